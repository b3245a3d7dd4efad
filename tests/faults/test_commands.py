"""What users and machines do to commands: one line that names file or key, a code not 0, nothing overwritten."""

from __future__ import annotations

import dataclasses
import os
import resource
import shutil
import signal
import subprocess
import sys
from pathlib import Path

import nbformat
import pipeline
import pytest
import tiny
import torch
from datasets import DatasetDict
from ruamel.yaml import YAML

from study.data import storage
from study.descriptions import Evaluation, Run
from study.distillation.distil import distil
from study.distillation.teacher_outputs import TeacherOutputs
from study.evaluation.scores import evaluate
from study.files import Layout
from study.params import merge
from study.plan import write_plan

ROOT = Path(__file__).parents[2]


@pytest.fixture
def folder(tmp_path):
    """A study's folder with a notebook that does what its parameter says."""
    (tmp_path / "notebooks").mkdir()
    (tmp_path / "params.yaml").touch()
    cells = [
        nbformat.v4.new_code_cell("code = ''\nseed = 1", metadata={"tags": ["parameters"]}),
        nbformat.v4.new_code_cell("exec(code)"),
    ]
    nbformat.write(nbformat.v4.new_notebook(cells=cells), tmp_path / "notebooks" / "does.ipynb")
    return tmp_path


def study(folder: Path, *arguments: str, **variables: str) -> subprocess.CompletedProcess:
    environment = os.environ | {"PYTHONPATH": str(ROOT)} | variables
    command = [sys.executable, "-m", "study", *arguments]
    return subprocess.run(command, cwd=folder, env=environment, capture_output=True, text=True, timeout=120)


def refused(outcome: subprocess.CompletedProcess) -> str:
    """The one line of a refusal."""
    assert outcome.returncode == 1 and "Traceback" not in outcome.stderr, outcome.stderr
    errors = [line for line in outcome.stderr.splitlines() if line.startswith("error: ")]
    assert len(errors) == 1 and outcome.stderr.strip().endswith(errors[0]), outcome.stderr
    return errors[0]


@pytest.mark.parametrize("name", ["SIGSEGV", "SIGKILL"])
def test_a_kernel_that_dies_names_its_signal(folder, name):
    code = f"import os, signal; os.kill(os.getpid(), signal.{name})"
    line = refused(study(folder, "run", "notebooks/does.ipynb", "-p", "code", code))
    assert f"does.ipynb: the notebook's process was ended by {name}" in line
    assert ("memory" in line) == (getattr(signal, name) == signal.SIGKILL)


PARAMETERS = [
    ("seed", "abc", "parameter seed = 'abc'; allowed: int, such as 1"),
    ("seed", "true", "parameter seed = True; allowed: int, such as 1"),
    ("seed", "[1", r"parameter seed = '[1' is no YAML value"),
    ("sead", "1", "parameter 'sead' is unknown; allowed: code, seed"),
]


@pytest.mark.parametrize(("key", "value", "told"), PARAMETERS)
def test_a_parameter_that_does_not_fit_is_named(folder, key, value, told):
    assert told in refused(study(folder, "run", "notebooks/does.ipynb", "-p", key, value))
    assert not (folder / "scratch").exists()


def test_code_of_notebooks_is_kept_apart_and_what_stays_as_it_is_is_left_alone(folder):
    source, kept = folder / "notebooks" / "does.ipynb", folder / "code" / "does.py"
    assert study(folder, "code", "notebooks", "code").returncode == 0
    assert kept.read_text() == "# tag: parameters\ncode = ''\nseed = 1\n\nexec(code)\n"
    os.utime(kept, ns=(1, 1))
    (folder / "code" / "gone.py").touch()
    content = nbformat.read(source, as_version=4)
    content.cells.append(nbformat.v4.new_markdown_cell("A remark."))
    nbformat.write(content, source)
    assert study(folder, "code", "notebooks", "code").returncode == 0
    assert kept.stat().st_mtime_ns == 1 and not (folder / "code" / "gone.py").exists()
    content.cells[0].metadata["tags"] = []
    nbformat.write(content, source)
    assert study(folder, "code", "notebooks", "code").returncode == 0
    assert kept.read_text().startswith("code = ''")


@pytest.mark.parametrize("content", [b"<<<<<<< HEAD\n{}\n=======\n", b"", b"[]", b"\xff\xfe", b'{"cells": 3}'])
def test_a_notebook_that_is_none_is_named(folder, content):
    (folder / "notebooks" / "does.ipynb").write_bytes(content)
    assert "notebooks/does.ipynb: not a notebook" in refused(study(folder, "run", "notebooks/does.ipynb"))


def test_a_folder_that_cannot_be_written_is_named(folder):
    (folder / "scratch").write_text("a file, where a folder is needed")
    assert "scratch" in refused(study(folder, "run", "notebooks/does.ipynb"))
    assert (folder / "scratch").read_text().startswith("a file")


MISTYPED = [
    (("export", "english_od_L3-H192_9"), "run 'english_od_L3-H192_9' is none of profile laptop"),
    (("new", "mine", "--teacher", "./nowhere", "--text", "wikipedia", "--task", "sentiment"), "teacher './nowhere'"),
    (("new", "mine", "--teacher", "all-minilm-l6-v2", "--text", "wikipedi", "--task", "sts-b"), "--text wikipedi"),
    (("new", "mine", "--teacher", "all-minilm-l6-v2", "--text", "wikipedia", "--task", "sts"), "--task sts"),
]


@pytest.mark.parametrize(("arguments", "told"), MISTYPED)
def test_what_is_mistyped_is_told_before_the_libraries_load(folder, arguments, told):
    shutil.copy(ROOT / "tests" / "fixtures" / "params.yaml", folder)
    (folder / "torch.py").write_text("raise SystemExit('torch was loaded')")
    line = refused(study(folder, *arguments, PYTHONPATH=f"{folder}{os.pathsep}{ROOT}"))
    assert told in line and not (folder / "profiles").exists()


def test_a_relative_cache_of_sources_is_that_of_the_command(folder):
    code = "import os; open(os.environ['STUDY_SOURCES'] + '/seen', 'w').close()"
    (folder / "wheels").mkdir()
    arguments = ("run", "notebooks/does.ipynb", "-p", "code", code)
    assert study(folder, *arguments, STUDY_SOURCES="wheels").returncode == 0
    assert (folder / "wheels" / "seen").exists()


def outputs(folder: Path) -> TeacherOutputs:
    return TeacherOutputs(folder / "outputs", (64, 16, 512), torch.float32, {"hidden_layers": {1, 2}})


def test_the_space_of_teacher_outputs_is_reserved(tmp_path):
    assert outputs(tmp_path).open()
    for file in (tmp_path / "outputs").iterdir():
        assert file.stat().st_blocks * 512 >= file.stat().st_size > 0


def test_teacher_outputs_that_do_not_fit_leave_nothing(tmp_path):
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (2**20, before[1]))  # of 2 MiB needed for a file
    try:
        assert not outputs(tmp_path).open()
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)
    assert list((tmp_path / "outputs").iterdir()) == []


@pytest.mark.parametrize("text", ["a: &x {rate: 1}\nb: *x\n", "a: &x {rate: 1}\nb: {<<: *x}\n"])
def test_a_profile_changes_no_more_than_it_names(text):
    base = YAML(typ="safe").load(text)
    merged = merge(base, {"a": {"rate": 2}})
    assert merged == {"a": {"rate": 2}, "b": {"rate": 1}} and base["a"]["rate"] == 1


def test_collecting_garbage_keeps_what_every_profile_has_cached(tmp_path):
    pipeline.clone(tmp_path)
    folders = (tmp_path, tmp_path / "profiles" / "smoke")
    for folder in folders:
        assert pipeline.command(folder, "dvc", "repro", "--single-item", "notebooks").returncode == 0
    cached = pipeline.files_below(tmp_path / ".dvc" / "cache" / "files")
    assert cached
    for folder in folders:
        assert pipeline.command(folder, "dvc", "gc", "--workspace", "--force").returncode == 0
        assert pipeline.files_below(tmp_path / ".dvc" / "cache" / "files") == cached


def test_a_link_that_was_unpacked_as_a_file_is_made_again(tmp_path):
    """ZIP files unpacked by Python, and clones where links are switched off."""
    folder = tiny.workspace(tmp_path)
    (tmp_path / "profiles" / "own").mkdir(parents=True)
    (tmp_path / "dvc.yaml").write_text("stages: {}")
    link = tmp_path / "profiles" / "own" / "dvc.yaml"
    plan = dataclasses.replace(tiny.plan(folder), profile="own", folder=link.parent, root=tmp_path)
    link.write_text("../../dvc.yaml")
    write_plan(plan)
    assert link.is_symlink() and link.read_text() == "stages: {}"
    link.unlink()
    link.write_text("stages: {own: {}}")  # a user's own
    write_plan(plan)
    assert not link.is_symlink() and link.read_text() == "stages: {own: {}}"


def test_an_environment_whose_python_is_gone_is_told(tmp_path):
    shutil.copy(ROOT / "Makefile", tmp_path)
    (tmp_path / ".venv" / "bin").mkdir(parents=True)
    (tmp_path / ".venv" / "bin" / "python").symlink_to(tmp_path / "python3.10")
    (tmp_path / ".venv" / "ready").touch()
    alone = {key: value for key, value in os.environ.items() if not key.startswith("MAKE")}  # not part of `make test`
    outcome = subprocess.run(["make", "check"], cwd=tmp_path, capture_output=True, text=True, env=alone)
    assert outcome.returncode and "delete the folder .venv" in outcome.stderr
    assert outcome.stderr.count("\n") == 1


def test_make_tells_which_stage_of_how_many_begins(tmp_path):
    """Commands that say how they were called, in the place of DVC and the study."""
    for name in ("Makefile", "pyproject.toml", "constraints.txt"):
        shutil.copy(ROOT / name, tmp_path)
    (tmp_path / ".venv" / "bin").mkdir(parents=True)
    stages = ["plan", "notebooks", "sources", "tasks@a", "teacher@a", "distill@a_b+c_d_1", "analyse@a", "report"]
    scripts = {
        "python": 'if [ "$1" = -c ]; then echo 1; else echo "python $*"; fi',
        "dvc": f'if [ "$1" = stage ]; then printf "%s\\n" {" ".join(stages)}; else echo "dvc $*"; fi',
    }
    for name, script in scripts.items():
        (tmp_path / ".venv" / "bin" / name).write_text(f"#!/bin/sh\n{script}\n")
        (tmp_path / ".venv" / "bin" / name).chmod(0o755)
    (tmp_path / ".venv" / "ready").touch()
    alone = {key: value for key, value in os.environ.items() if not key.startswith("MAKE")}  # not part of `make test`
    make = ["make", "--silent", "repro", "JOBS=1"]
    outcome = subprocess.run(make, cwd=tmp_path, capture_output=True, text=True, env=alone, timeout=60)
    said = outcome.stdout.splitlines()
    assert (outcome.returncode, said[0]) == (0, "python -m study plan laptop --unlock"), outcome.stderr
    begun = [line for line in said if " of 8: " in line]
    assert begun == [f"stage {number} of 8: {name}" for number, name in enumerate(stages, start=1)]
    for line, following in zip(said, said[1:], strict=False):
        if line in begun:
            assert following == f"dvc --wait-for-lock repro --single-item {line.partition(': ')[2]}"
    assert said[-1] == "dvc --wait-for-lock repro"  # a command of another profile holds the lock now and then
    assert [path.name for path in (tmp_path / "scratch").iterdir()] == ["stages"]
    outcome = subprocess.run([*make[:2], "report"], cwd=tmp_path, capture_output=True, text=True, env=alone, timeout=60)
    assert outcome.returncode and outcome.stdout == "", "no command before the check"
    first, *others = outcome.stderr.splitlines()
    assert first == "profile laptop has no results yet; `make repro PROFILE=laptop` makes them" and len(others) == 1


MACHINES = [("3.10", "Linux x86_64", "is Python 3.10; Python 3.11 to 3.14 is needed")]
MACHINES += [("3.15", "Linux x86_64", "is Python 3.15; Python 3.11 to 3.14 is needed")]
MACHINES += [("3.11", "Darwin x86_64", "macOS 14 on Apple silicon")]


@pytest.mark.parametrize(("version", "system", "told"), MACHINES)
def test_a_machine_for_which_there_is_no_pytorch_is_told(tmp_path, version, system, told):
    """An interpreter and a system that say what they are."""
    for name in ("Makefile", "pyproject.toml", "constraints.txt"):
        shutil.copy(ROOT / name, tmp_path)
    number = version.replace(".", ", ")
    scripts = {
        "python": f"[ $1 = --version ] && echo Python {version} && exit\n[ $1 = -c ] || exit 9\n"
        f'exec {sys.executable} -c "import sys; sys.version_info = ({number}); $2"',
        "uname": f"echo {system}",
    }
    for name, script in scripts.items():
        (tmp_path / "bin").mkdir(exist_ok=True)
        (tmp_path / "bin" / name).write_text(f"#!/bin/sh\n{script}\n")
        (tmp_path / "bin" / name).chmod(0o755)
    variables = os.environ | {"PATH": f"{tmp_path / 'bin'}{os.pathsep}{os.environ['PATH']}"}
    command = ["make", "check", f"PYTHON={tmp_path / 'bin' / 'python'}"]
    outcome = subprocess.run(command, cwd=tmp_path, env=variables, capture_output=True, text=True)
    assert outcome.returncode and told in outcome.stderr
    assert not (tmp_path / ".venv").exists()


@pytest.mark.parametrize("section", [{"grid": {"seeds": [1_000_000]}}, {"finetuning": {"seeds": [1_000_000]}}])
def test_the_largest_seeds_run_to_the_end(tmp_path, monkeypatch, section):
    monkeypatch.chdir(tmp_path)
    folder = tiny.workspace(tmp_path)
    storage.save(
        DatasetDict({split: tiny.sentences(48, 1) for split in ("train", "development", "test")}),
        Layout(tmp_path, "english").tasks / "topic",
    )
    plan = tiny.plan(folder, latency={"sequence_length": 16}, **section)
    layout = plan.layout("english")
    run = next(run for run in plan.of(Run) if run.method == "mlm")
    distil(run, layout, layout.student(run.model))
    evaluation = next(own for own in plan.of(Evaluation) if own.model == run.model)
    assert evaluate(evaluation, layout, tmp_path / "result.json").tasks
