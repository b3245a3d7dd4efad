"""What users and machines do to commands: one line that names file or key, a code not 0, nothing overwritten."""

from __future__ import annotations

import json
import os
import resource
import signal
import subprocess
import sys
from pathlib import Path

import nbformat
import pytest
import torch
from ruamel.yaml import YAML

from study.distillation.teacher_outputs import TeacherOutputs
from study.params import merge

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
    line = refused(study(folder, "run", "notebooks/does.ipynb", "-p", "code", json.dumps(code)))
    assert f"does.ipynb: the notebook's process was ended by {name}" in line
    assert ("memory" in line) == (getattr(signal, name) == signal.SIGKILL)


PARAMETERS = [
    ("seed", "abc", "parameter seed = 'abc'; allowed: int, such as 1"),
    ("seed", "true", "parameter seed = True; allowed: int, such as 1"),
    ("code", "3", "parameter code = 3; allowed: str, such as ''"),
    ("code", "[1", r"parameter code = '[1' is no YAML value"),
    ("sead", "1", "parameter 'sead' is unknown; allowed: code, seed"),
]


@pytest.mark.parametrize(("key", "value", "told"), PARAMETERS)
def test_a_parameter_that_does_not_fit_is_named(folder, key, value, told):
    assert told in refused(study(folder, "run", "notebooks/does.ipynb", "-p", key, value))
    assert not (folder / "scratch").exists()


@pytest.mark.parametrize("content", [b"<<<<<<< HEAD\n{}\n=======\n", b"", b"[]", b"\xff\xfe", b'{"cells": 3}'])
def test_a_notebook_that_is_none_is_named(folder, content):
    (folder / "notebooks" / "does.ipynb").write_bytes(content)
    assert "notebooks/does.ipynb: not a notebook" in refused(study(folder, "run", "notebooks/does.ipynb"))


def test_a_folder_that_cannot_be_written_is_named(folder):
    (folder / "scratch").write_text("a file, where a folder is needed")
    assert "scratch" in refused(study(folder, "run", "notebooks/does.ipynb"))
    assert (folder / "scratch").read_text().startswith("a file")


def test_a_relative_cache_of_sources_is_that_of_the_command(folder):
    code = "import os; open(os.environ['STUDY_SOURCES'] + '/seen', 'w').close()"
    (folder / "wheels").mkdir()
    arguments = ("run", "notebooks/does.ipynb", "-p", "code", json.dumps(code))
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
