"""Damaged files of a model, pickled weights, and disks that fill up while something is saved."""

from __future__ import annotations

import os
import subprocess

import pytest
import tiny
import torch
from datasets import DatasetDict

from study import StudyError
from study.data import storage
from study.data.pretrained import load_model, load_pretrained, load_tokenizer, save_model
from study.data.teachers import check_teachers
from study.distillation.distil import distil
from study.files import Layout, write_file

POINTER = b"version https://git-lfs.github.com/spec/v1\noid sha256:4d7a2146\nsize 90868376\n"
DAMAGES = {
    "pointer": (POINTER, "is a pointer of Git LFS: run `git lfs pull`"),
    "conflict": (b"<<<<<<< HEAD\n{}\n=======\n{}\n>>>>>>> theirs\n", "is no JSON|damaged weights"),
    "empty": (b"", "is no JSON|damaged weights"),
    "half": (None, "is no JSON|damaged weights"),
}


@pytest.fixture
def folder(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    return tiny.workspace(tmp_path)


def refusal(call, *arguments) -> str:
    with pytest.raises(StudyError) as error:
        call(*arguments)
    assert len(str(error.value).splitlines()) == 1
    return str(error.value)


@pytest.mark.parametrize("name", DAMAGES)
@pytest.mark.parametrize("file", ["model.safetensors", "tokenizer.json", "tokenizer_config.json"])
def test_damaged_files_of_a_model_are_told_by_check_and_wherever_they_are_read(folder, file, name):
    params = tiny.parameters(folder, latency={"sequence_length": 16})
    place = folder / "pretrained" / file
    content, told = DAMAGES[name]
    place.write_bytes(place.read_bytes()[:-20] if content is None else content)
    lines = [refusal(check_teachers, params, folder), refusal(load_pretrained, params.settings["english"].teacher)]
    if "tokenizer" in file:
        lines.append(refusal(load_tokenizer, folder / "pretrained"))
    else:
        lines.append(refusal(load_model, folder / "pretrained", "eager"))
    for line in lines:
        assert any(part in line for part in told.split("|")) and "pretrained" in line, line
        assert file in line or "damaged weights" in line


def test_pickled_weights_are_not_read(folder):
    params = tiny.parameters(folder, latency={"sequence_length": 16})
    torch.save(tiny.weights(folder / "pretrained"), folder / "pretrained" / "pytorch_model.bin")
    load_pretrained(params.settings["english"].teacher)
    (folder / "pretrained" / "model.safetensors").unlink()
    assert "pickled ones are not read" in refusal(check_teachers, params, folder)
    assert "model.safetensors" in refusal(load_pretrained, params.settings["english"].teacher)
    assert "model.safetensors" in refusal(load_model, folder / "pretrained", "eager")


@pytest.fixture
def disk(tmp_path_factory):
    """A disk of one megabyte."""
    place = tmp_path_factory.mktemp("disk")
    mounted = subprocess.run(["mount", "-t", "tmpfs", "-o", "size=1m", "tmpfs", place], capture_output=True)
    if mounted.returncode:
        pytest.skip("no small disk can be mounted here (Linux, as root)")
    yield place
    subprocess.run(["umount", "-l", place], check=True)


def fill(disk, free: int) -> None:
    """Leave so many kilobytes of it."""
    status = os.statvfs(disk)
    (disk / "fill").write_bytes(bytes(max(0, status.f_bavail * status.f_frsize - free * 1024)))


def test_what_does_not_fit_on_the_disk_is_one_line(folder, disk):
    large = tiny.masked_language_model(intermediate=8000)
    tokenizer = load_tokenizer(folder / "pretrained")
    data = DatasetDict({"train": tiny.sentences(60_000, 1)})
    for call, *arguments in (
        (save_model, large, tokenizer, disk / "model"),
        (storage.save, data, disk / "data"),
        (write_file, disk / "file", bytes(2**21)),
    ):
        assert "No space left on device" in refusal(call, *arguments)
    assert not (disk / "data").exists() and not (disk / "file").exists()


@pytest.mark.parametrize("free", [400, 90, 40, 10])
def test_a_disk_that_fills_up_costs_no_training(folder, disk, free):
    """Whatever file of a checkpoint, or of the model, is the one that no longer fits."""
    run, layout = tiny.run(folder)
    distil(run, layout, folder / "whole")
    crowded = Layout(folder, "english")
    crowded.checkpoints = disk / "checkpoints"
    fill(disk, free)
    assert "No space left on device" in refusal(distil, run, crowded, folder / "student")
    assert not (folder / "student").exists()
    (disk / "fill").unlink()
    distil(run, crowded, folder / "student")
    fill(disk, 10)
    assert "No space left on device" in refusal(distil, run, layout, disk / "student")
    assert any(layout.checkpoints.glob("*/checkpoint-6"))  # what was learnt is kept
    (disk / "fill").unlink()
    distil(run, layout, disk / "student")
    assert not any(layout.checkpoints.iterdir())
    for saved in (folder / "student", disk / "student"):
        assert tiny.identical(tiny.weights(saved), tiny.weights(folder / "whole"))
