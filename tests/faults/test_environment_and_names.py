"""Faults that people report: what is left in the environment, code of another checkout, names, seeds, dead channels."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import nbformat
import numpy as np
import pytest
import tiny
import torch
from pydantic import ValidationError

from study import StudyError
from study.distillation.students import create_student
from study.execution import run_notebook
from study.files import profile_folder
from study.runtime import commit

ROOT = Path(__file__).parents[2]


def notebook(folder: Path, source: str) -> Path:
    cells = [
        nbformat.v4.new_code_cell("output = ''", metadata={"tags": ["parameters"]}),
        nbformat.v4.new_code_cell(source),
    ]
    path = folder / "notebooks" / "asks.ipynb"
    path.parent.mkdir(parents=True, exist_ok=True)
    nbformat.write(nbformat.v4.new_notebook(cells=cells), path)
    (folder / "params.yaml").touch()
    return path


ASK = """
import json, os, sys, matplotlib, study
from transformers import TrainingArguments
arguments = TrainingArguments(output_dir="x", use_cpu=True, report_to="none")
open(output, "w").write(json.dumps({
    "python": sys.executable, "prefix": sys.prefix, "study": study.__file__, "backend": matplotlib.get_backend(),
    "mixed": arguments.bf16, "rank": arguments.local_rank, "world": arguments.world_size,
    "left": [name for name in os.environ if name.startswith("ACCELERATE_") or name in ("LOCAL_RANK", "WORLD_SIZE")]}))
"""


def test_a_notebook_inherits_nothing_that_overrides_params(tmp_path, monkeypatch):
    """Launchers' variables, an IDE's backend and another project's kernels named python3."""
    other = tmp_path / "jupyter" / "kernels" / "python3"
    other.mkdir(parents=True)
    (other / "kernel.json").write_text(json.dumps({"argv": ["/bin/false"], "display_name": "x", "language": "python"}))
    hostile = {
        "ACCELERATE_MIXED_PRECISION": "bf16",
        "LOCAL_RANK": "3",
        "WORLD_SIZE": "4",
        "MPLBACKEND": "module://nowhere",
    }
    hostile["JUPYTER_PATH"] = str(tmp_path / "jupyter")
    for name, value in hostile.items():
        monkeypatch.setenv(name, value)
    monkeypatch.setenv("PYTHONPATH", str(tmp_path))
    output = tmp_path / "answer.json"
    run_notebook(notebook(tmp_path, ASK), tmp_path / "executed.ipynb", {"output": str(output)}, tmp_path)
    answer = json.loads(output.read_text())
    assert Path(answer["prefix"]) == Path(sys.prefix) and Path(answer["study"]).parents[1] == ROOT
    assert answer["left"] == [] and answer["mixed"] is False and answer["world"] == 1
    assert "inline" in answer["backend"]


def test_a_notebook_whose_description_changes_meanwhile_is_refused(tmp_path, monkeypatch):
    path = notebook(tmp_path, "1")
    (description := tmp_path / "plan.json").write_text("{}")
    cells = [nbformat.v4.new_code_cell("description = ''", metadata={"tags": ["parameters"]})]
    nbformat.write(nbformat.v4.new_notebook(cells=cells), path)
    for content in ("{}", '{"seed": 2}'):
        monkeypatch.setattr("papermill.execute_notebook", lambda *_, now=content, **__: description.write_text(now))
        if content == "{}":
            run_notebook(path, tmp_path / "executed.ipynb", {"description": "../plan.json"}, tmp_path)
            continue
        with pytest.raises(StudyError, match=f"{description}: changed while it was run"):
            run_notebook(path, tmp_path / "executed.ipynb", {"description": "../plan.json"}, tmp_path)


def test_the_code_of_another_checkout_is_refused(tmp_path):
    path = notebook(tmp_path, "1")
    (tmp_path / "study").mkdir()
    with pytest.raises(StudyError, match=f"runs the code of {ROOT}; allowed: that of {tmp_path}"):
        run_notebook(path, tmp_path / "executed.ipynb", {}, tmp_path)
    assert not (tmp_path / "executed.ipynb").exists()


def git(folder: Path, *arguments: str) -> str:
    identity = ["-c", "user.name=x", "-c", "user.email=x@example.org"]
    return subprocess.run(["git", *identity, *arguments], cwd=folder, capture_output=True, text=True, check=True).stdout


def test_a_commit_is_that_of_the_study_and_says_when_code_was_changed(tmp_path):
    inside = tmp_path / "unpacked"
    for file in ("study/runtime.py", "notebooks/a.ipynb", "reports/x.json"):
        (inside / file).parent.mkdir(parents=True, exist_ok=True)
        (inside / file).write_text("1")
    assert commit(inside) is None
    git(tmp_path, "init", "-q")
    git(tmp_path, "add", ".")
    git(tmp_path, "commit", "-qm", "another project")
    assert commit(inside) is None  # unpacked inside another repository
    git(inside, "init", "-q")
    git(inside, "add", ".")
    git(inside, "commit", "-qm", "the study")
    head = git(inside, "rev-parse", "HEAD")[:12]
    assert commit(inside) == commit(inside / "reports") == head
    (inside / "reports" / "x.json").write_text("2")  # results are no code
    assert commit(inside) == head
    (inside / "study" / "runtime.py").write_text("2")
    assert commit(inside) == head + "+"


@pytest.mark.parametrize("name", ["a b", "a/b", "a_b", "../a", "", "-a", "'a'", "a\n"])
@pytest.mark.parametrize("section", ["settings", "students", "methods", "budgets"])
def test_names_that_files_and_stages_cannot_have_are_refused(tmp_path, section, name):
    base = tiny.parameters(tmp_path)
    own = {
        "settings": base.settings["english"],
        "students": base.students["L2-H12"],
        "methods": base.methods["mlm"],
        "budgets": None,
    }[section]
    entry = {"steps": 3} if own is None else own.model_dump()
    with pytest.raises(ValidationError, match="cannot stand in names of files and stages"):
        tiny.parameters(tmp_path, **{section: {name: entry}})


@pytest.mark.parametrize("name", ["../laptop", "a/b", ".hidden"])
def test_a_profile_is_a_folder_and_no_path(name):
    with pytest.raises(StudyError, match="no name; allowed: that of a folder"):
        profile_folder(name, ROOT)


def test_seeds_that_would_fail_in_evaluation_are_refused(tmp_path):
    with pytest.raises(ValidationError, match="less than or equal to 1000000"):
        tiny.parameters(tmp_path, grid={"methods": ["mlm"], "seeds": [20261127]})
    assert tiny.parameters(tmp_path, grid={"methods": ["mlm"], "seeds": [1_000_000]}).grid.seeds == [1_000_000]


@pytest.mark.parametrize("fault", ["dead channels", "gamma 0", "constant states"])
@pytest.mark.parametrize("family", ["bert", "xlm-roberta"])
def test_a_degenerate_teacher_gives_a_finite_start(fault, family, tmp_path):
    teacher = tiny.masked_language_model(family)
    layers = [module for module in teacher.modules() if isinstance(module, torch.nn.LayerNorm)]
    with torch.no_grad():
        for norm in layers:
            if fault == "dead channels":
                norm.weight[6:] = 0
                norm.bias[6:] = 0
            else:
                norm.weight.zero_()
                if fault == "constant states":
                    norm.bias.fill_(0.5)
    sizes = tiny.parameters(tmp_path).students["L2-H12"]
    sample = torch.from_numpy(tiny.sequences(24, 5).astype(np.int64))
    student = create_student(teacher, sizes, "teacher-layers", sample, seed=1)
    assert all(parameter.isfinite().all() for parameter in student.parameters())
    with torch.no_grad():
        assert student.base_model(input_ids=sample).last_hidden_state.isfinite().all()
