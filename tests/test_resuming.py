"""Killed and started again: the same weights bit for bit, and no checkpoint of anything else."""

from __future__ import annotations

import json
import os
import re
import signal
import subprocess
import sys
import time
from pathlib import Path
from types import SimpleNamespace

import pytest
import tiny
import torch
from tiny_training import adapted, distilled

from study import StudyError
from study.descriptions import Run
from study.distillation import trainer
from study.distillation.objectives.base import Objective
from study.files import Layout
from study.revisions import REVISIONS


@pytest.fixture
def folder(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    return tiny.workspace(tmp_path)


TESTS = Path(__file__).parent
OFTEN = {"distillation": {"evaluate_every": 2}}


def interrupt_after(monkeypatch, checkpoint: str) -> None:
    """Stop like Ctrl-C at the first log after a checkpoint of that name is complete."""

    original = trainer.Progress.on_log

    def on_log(self, args, state, control, logs=None, **kwargs):
        original(self, args, state, control, logs, **kwargs)
        if (Path(args.output_dir) / checkpoint / "trainer_state.json").is_file():
            raise KeyboardInterrupt

    monkeypatch.setattr(trainer.Progress, "on_log", on_log)


SCRIPT = """
from pathlib import Path
from tiny_training import distilled
distilled(Path.cwd(), "student", "od", distillation={budget})
"""


def test_a_killed_run_continues_and_ends_with_the_same_weights_bit_for_bit(folder, capsys):
    budget = {"steps": 100, "save_every": 5, "evaluate_every": 50, "accumulation_steps": 2}
    threads = str(torch.get_num_threads())
    environment = os.environ | {"PYTHONPATH": f"{TESTS.parent}{os.pathsep}{TESTS}", "OMP_NUM_THREADS": threads}
    process = subprocess.Popen(
        [sys.executable, "-c", SCRIPT.format(budget=budget)],
        cwd=folder,
        env=environment,
        stdout=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL,
    )
    checkpoints = folder / "scratch" / "checkpoints"
    while process.poll() is None and not any(checkpoints.glob("*/checkpoint-*/trainer_state.json")):
        time.sleep(0.005)
    process.send_signal(signal.SIGKILL)
    assert process.wait(10) == -signal.SIGKILL  # it was still running
    assert not (folder / "student").exists()
    saved = max(
        int(path.parent.name.rpartition("-")[2]) for path in checkpoints.glob("*/checkpoint-*/trainer_state.json")
    )
    assert 0 < saved < 100

    capsys.readouterr()
    resumed = distilled(folder, "student", "od", distillation=budget)["training"]
    lines = capsys.readouterr().out.splitlines()
    assert f"english od L2-H12 seed 1 | continues from step {saved} of 100" in lines
    steps = [int(line.partition(" | step ")[2].partition("/")[0]) for line in lines if " | step " in line]
    assert min(steps) >= saved  # it did continue
    assert not any(checkpoints.iterdir())  # nothing is left of a run that ended

    whole = distilled(folder, "whole", "od", distillation=budget)["training"]
    assert tiny.identical(tiny.weights(folder / "student"), tiny.weights(folder / "whole"))
    curves = [[(entry["step"], entry["loss"]) for entry in record["curve"]] for record in (resumed, whole)]
    assert curves[0] == curves[1]
    curves = [[(entry["step"], entry["loss"]) for entry in record["training_curve"]] for record in (resumed, whole)]
    assert curves[0] == curves[1] and len(curves[0]) == 10


def test_a_training_loss_is_the_mean_over_the_same_steps_wherever_a_run_was_interrupted(folder, monkeypatch):
    """Of the losses of steps 1 to 10, the checkpoint has six."""
    budget = {"distillation": {"steps": 12, "evaluate_every": 3, "save_every": 3}}
    whole = distilled(folder, "whole", "mlm", **budget)["training"]
    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        interrupt_after(patch, "checkpoint-6")
        distilled(folder, "student", "mlm", **budget)
    resumed = distilled(folder, "student", "mlm", **budget)["training"]
    for record in (whole, resumed):
        assert [point["step"] for point in record["training_curve"]] == [10]
    assert resumed["training_curve"][0]["loss"] == whole["training_curve"][0]["loss"]


@pytest.mark.parametrize("steps", [2, 4, 6])
def test_interrupted_after_any_checkpoint(folder, monkeypatch, steps):
    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        interrupt_after(patch, f"checkpoint-{steps}")
        distilled(folder, "student", "mha-direct", **OFTEN)
    assert not (folder / "student").exists()
    record = distilled(folder, "student", "mha-direct", **OFTEN)["training"]
    distilled(folder, "whole", "mha-direct", **OFTEN)
    assert record["steps"] == 6 and [entry["step"] for entry in record["curve"]] == [0, 2, 4, 6]
    assert tiny.identical(tiny.weights(folder / "student"), tiny.weights(folder / "whole"))


@pytest.mark.parametrize("saved", [2, 4])
def test_an_interrupted_adaptation_stops_where_the_whole_one_stops(folder, monkeypatch, saved):
    """The count of evaluations without improvement has to survive the interruption too."""
    adaptation = {"min_improvement": 100.0, "patience": 3, "steps": 20}
    whole = adapted(folder, "whole", adaptation=adaptation)["training"]
    assert whole["steps"] < 20 and whole["stopped"] != "step limit"
    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        interrupt_after(patch, f"checkpoint-{saved}")
        adapted(folder, "teacher", adaptation=adaptation)
    resumed = adapted(folder, "teacher", adaptation=adaptation)["training"]
    assert resumed["steps"] == whole["steps"]
    assert tiny.identical(tiny.weights(folder / "teacher"), tiny.weights(folder / "whole"))


def leave_a_checkpoint(folder, monkeypatch, method="mlm", saved="checkpoint-4", **changes) -> Path:
    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        interrupt_after(patch, saved)
        distilled(folder, "interrupted", method, **OFTEN | changes)
    (run,) = (folder / "scratch" / "checkpoints").iterdir()
    return run


def first_step(capsys) -> int:
    lines = [line for line in capsys.readouterr().out.splitlines() if " | step " in line]
    return int(lines[0].partition("| step ")[2].partition("/")[0])


OTHERS = {
    "learning rate": {"methods": {"mlm": {"objective": "masked_language_modelling", "learning_rate": 5e-4}}},
    "masking": {"masking": {"fraction": 0.3}},
    "steps": {"distillation": {"evaluate_every": 2, "steps": 8}},
    "initialisation": {"initialisation": "teacher-embeddings"},
    "precision": {"precision": "bf16"},
    "attention implementation": {"attention_implementation": "sdpa"},
    "student": {"students": {"L2-H12": {"layers": 2, "width": 12, "heads": 4, "intermediate": 20}}},
}


@pytest.mark.parametrize("name", OTHERS)
def test_a_checkpoint_of_another_configuration_is_never_picked_up(folder, emulated_bf16, monkeypatch, capsys, name):
    leave_a_checkpoint(folder, monkeypatch)
    capsys.readouterr()
    distilled(folder, "other", "mlm", **OFTEN | OTHERS[name])
    assert first_step(capsys) == 0


@pytest.mark.parametrize("part", ["seed", "method", "teacher", "corpus", "behaviour"])
def test_nor_one_of_another_seed_method_teacher_corpus_or_behaviour(folder, monkeypatch, capsys, part):
    layout = Layout(folder, "english")
    leave_a_checkpoint(folder, monkeypatch, "hs-last")
    method, seed = "hs-last", 1
    if part == "seed":
        seed = 2
    elif part == "method":
        method = "hs-top"
    elif part == "teacher":
        tiny.masked_language_model(seed=1).save_pretrained(layout.teacher)
    elif part == "corpus":
        tiny.save_corpus(layout.corpus, train=72)
    else:
        monkeypatch.setitem(REVISIONS, "hidden_state", REVISIONS["hidden_state"] + 1)
    capsys.readouterr()
    distilled(folder, "other", method, seed=seed, **OFTEN)
    assert first_step(capsys) == 0


@pytest.mark.parametrize("beside", [False, True])
def test_the_same_configuration_does_pick_its_checkpoint_up_whatever_runs_beside_it(
    folder, monkeypatch, capsys, beside
):
    leave_a_checkpoint(folder, monkeypatch)
    others = tiny.plan(folder, **OFTEN).of(Run) if beside else []
    capsys.readouterr()
    distilled(folder, "same", "mlm", others=others, **OFTEN)
    assert first_step(capsys) >= 4


DAMAGES = {
    "no state": lambda checkpoint: (checkpoint / "trainer_state.json").unlink(),
    "half a state": lambda checkpoint: (checkpoint / "trainer_state.json").write_text('{"epoch": 0.5, "global'),
    "empty state": lambda checkpoint: (checkpoint / "trainer_state.json").write_text(""),
}


@pytest.mark.parametrize("name", DAMAGES)
def test_a_half_written_checkpoint_is_passed_over_for_the_one_before(folder, monkeypatch, capsys, name):
    budget = {"distillation": {"evaluate_every": 1, "steps": 10}}
    run = leave_a_checkpoint(folder, monkeypatch, saved="checkpoint-10", **budget)
    assert sorted(path.name for path in run.iterdir()) == ["checkpoint-10", "checkpoint-8"]
    DAMAGES[name](run / "checkpoint-10")
    capsys.readouterr()
    distilled(folder, "student", "mlm", **budget)
    assert 8 <= first_step(capsys) < 10
    distilled(folder, "whole", "mlm", **budget)
    assert tiny.identical(tiny.weights(folder / "student"), tiny.weights(folder / "whole"))


def test_the_state_is_what_a_checkpoint_writes_last(folder, monkeypatch):
    """Resuming trusts that a checkpoint with a whole state is whole; that holds while the Trainer writes it last."""
    run = leave_a_checkpoint(folder, monkeypatch, distillation={"evaluate_every": 1})
    times = {path.name: path.stat().st_mtime_ns for path in (run / "checkpoint-4").iterdir()}
    assert {"model.safetensors", "optimizer.pt", "scheduler.pt", "rng_state.pth"} <= times.keys()
    assert times["trainer_state.json"] == max(times.values())


# The time that both parts took


def test_seconds_are_those_of_both_parts(folder, monkeypatch):
    """By a clock on which a training step takes a second; of six steps made the four saved count."""
    clock = SimpleNamespace(now=0.0, monotonic=lambda: clock.now)
    monkeypatch.setattr(trainer, "time", clock)
    forward = Objective.forward

    def slow(self, **batch):
        clock.now += float(torch.is_grad_enabled() and len(batch["item"]) == 8)
        return forward(self, **batch)

    monkeypatch.setattr(Objective, "forward", slow)
    budget = {"distillation": {"steps": 12, "evaluate_every": 3}}
    whole = distilled(folder, "whole", "mlm", **budget)["training"]
    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        interrupt_after(patch, "checkpoint-4")
        distilled(folder, "student", "mlm", **budget)
    clock.now += 1000.0  # nobody works
    resumed = distilled(folder, "student", "mlm", **budget)["training"]
    for record in (whole, resumed):
        assert record["seconds"] == 12.0
        assert record["tokens_per_second"] == 8 * 16
        for curve in ("curve", "training_curve"):
            assert [point["seconds"] for point in record[curve]] == [point["step"] for point in record[curve]]
            assert [point["tokens"] for point in record[curve]] == [point["step"] * 128 for point in record[curve]]
    assert [point["step"] for point in resumed["training_curve"]] == [10]


@pytest.mark.parametrize("saved", [2, 4])
def test_no_second_of_either_part_is_lost(folder, monkeypatch, saved):
    """By the machine's own clock: from the checkpoint's seconds to the end of the resumed run nothing is left out."""
    run = leave_a_checkpoint(folder, monkeypatch, saved=f"checkpoint-{saved}")
    state = json.loads((run / f"checkpoint-{saved}" / "trainer_state.json").read_text())
    first = state["stateful_callbacks"]["Clock"]["args"]["earlier"]
    parts = []
    train_begin, train_end = trainer.Progress.on_train_begin, trainer.Progress.on_train_end

    def begin(self, *arguments, **named):
        parts.append(time.monotonic())
        return train_begin(self, *arguments, **named)

    def end(self, *arguments, **named):
        parts.append(time.monotonic())
        return train_end(self, *arguments, **named)

    monkeypatch.setattr(trainer.Progress, "on_train_begin", begin)
    monkeypatch.setattr(trainer.Progress, "on_train_end", end)
    record = distilled(folder, "student", "mlm", **OFTEN)["training"]
    assert first > 0 and record["seconds"] >= first + parts[1] - parts[0] - 0.05  # rounded to tenths


def test_batches_that_other_processes_prepare_are_the_same_also_after_an_interruption(folder, monkeypatch, capsys):
    """Every bit of the weights; the stream of several processes is that of :mod:`tiny_processes`."""
    budget = {"steps": 8, "save_every": 2, "evaluate_every": 4, "accumulation_steps": 2}
    distilled(folder, "alone", "od", distillation=budget)
    monkeypatch.setenv("STUDY_LOADERS", "2")
    started, original = [], torch.utils.data.dataloader._MultiProcessingDataLoaderIter.__init__

    def noted(self, loader):
        started.append(loader.num_workers)
        original(self, loader)

    monkeypatch.setattr(torch.utils.data.dataloader._MultiProcessingDataLoaderIter, "__init__", noted)
    with monkeypatch.context() as interrupted, pytest.raises(KeyboardInterrupt):
        interrupt_after(interrupted, "checkpoint-2")
        distilled(folder, "student", "od", distillation=budget)
    distilled(folder, "student", "od", distillation=budget)
    assert re.search("continues from step [24] of 8", capsys.readouterr().out)
    assert len(started) >= 2 and set(started) == {2}
    assert tiny.identical(tiny.weights(folder / "alone"), tiny.weights(folder / "student"))
    monkeypatch.setenv("STUDY_LOADERS", "two")
    with pytest.raises(StudyError, match="^STUDY_LOADERS = two; allowed: a number of processes, 0 for none$"):
        distilled(folder, "other", "od", distillation=budget)
