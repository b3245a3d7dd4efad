"""The Trainer of the study: accumulation, elapsed time, checkpoints."""

from __future__ import annotations

import json
import os

import pytest
import tiny
import torch
from tiny_training import METHODS, descend, objective_of, stream
from transformers import Trainer, TrainingArguments

from study import StudyError
from study.distillation.trainer import (
    Checkpoints,
    Clock,
    DistillationTrainer,
    DivergedError,
    common_arguments,
    last_complete_checkpoint,
)
from study.execution import take_one_gpu
from study.runtime import use_bf16


@pytest.fixture
def words(tmp_path):
    return tiny.tokenizer(tmp_path / "words")


@pytest.mark.parametrize("method", [method for method in METHODS if method != "se-relational"])  # refused by params
def test_gradients_under_accumulation_are_those_without(tmp_path, words, method):
    params = tiny.parameters(tmp_path)
    ends, records = [], []
    for accumulation in (1, 4):
        training = stream(params, words, length=16)
        objective = objective_of(params, method, start=training)
        start = tiny.snapshot(objective)
        records.append(descend(objective, training, tmp_path / f"run-{accumulation}", accumulation))
        ends.append(tiny.snapshot(objective))
    moved = {name: (ends[0][name] - start[name]).norm().item() for name in start}
    assert sum(length > 0 for length in moved.values()) > 20
    for name, length in moved.items():
        assert (ends[0][name] - ends[1][name]).norm().item() <= 2e-3 * length + 1e-5, name
    for key in ("steps", "tokens"):
        assert records[0][key] == records[1][key] == (2 if key == "steps" else 2 * 8 * 16)
    losses = [[entry["loss"] for entry in record["training_curve"]] for record in records]
    assert losses[0] == pytest.approx(losses[1], rel=1e-3)


def test_checkpoints_outlive_crashes_and_full_disks_but_not_success(tmp_path):
    kept = {RuntimeError: True, KeyboardInterrupt: True, StudyError: True, DivergedError: False, None: False}
    for error, left in kept.items():
        checkpoints = Checkpoints(tmp_path, {"of": str(error)})
        try:
            with checkpoints as run:
                (run / "checkpoint-1").mkdir()
                if error:
                    raise error
        except (RuntimeError, KeyboardInterrupt, StudyError):
            pass
        assert checkpoints.folder.exists() == left


def test_the_newest_whole_checkpoint_is_continued_from_and_half_ones_go(tmp_path):
    assert last_complete_checkpoint(tmp_path / "nowhere") is None
    for step, whole in ((2, True), (10, True), (12, False)):
        (tmp_path / f"checkpoint-{step}").mkdir()
        if whole:
            (tmp_path / f"checkpoint-{step}" / "trainer_state.json").write_text(json.dumps({"global_step": step}))
    assert last_complete_checkpoint(tmp_path) == tmp_path / "checkpoint-10"
    assert sorted(path.name for path in tmp_path.iterdir()) == ["checkpoint-10", "checkpoint-2"]


def test_a_clock_adds_to_what_a_checkpoint_kept():
    clock = Clock(earlier=5.0)
    assert clock.seconds() == 5.0  # it does not run yet
    clock.start()
    kept = Clock.from_state(clock.state())
    assert 5.0 <= kept.seconds() <= clock.seconds() < 6.0


def test_a_process_that_sees_several_gpus_trains_on_one(tmp_path, words, monkeypatch):
    """transformers' own Trainer would double the batch and wrap the model in DataParallel."""
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    objective, numbers = objective_of(tiny.parameters(tmp_path), "mlm"), []
    for kind in (Trainer, DistillationTrainer):
        options = common_arguments(False, 8) | {"use_cpu": False, "eval_strategy": "no", "save_strategy": "no"}
        arguments = TrainingArguments(str(tmp_path), per_device_train_batch_size=4, max_steps=1, **options)
        trainer = kind(model=objective, args=arguments)
        wrapped = isinstance(trainer._wrap_model(objective), torch.nn.DataParallel)
        numbers.append((trainer.args.n_gpu, trainer.args.train_batch_size, wrapped))
    assert numbers[1] == (1, 4, False) != numbers[0]


@pytest.mark.parametrize(
    ("visible", "job", "left"),
    [
        ("0,1,2", "0", "0"),
        ("0,1,2", "4", "1"),
        ("GPU-a, GPU-b", "1", "GPU-b"),
        ("3,5", None, "3"),
        ("3", "1", "3"),
        ("", "1", ""),
    ],
)
def test_commands_side_by_side_take_a_gpu_each(monkeypatch, visible, job, left):
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", visible)
    monkeypatch.setenv("STUDY_JOB", job) if job else monkeypatch.delenv("STUDY_JOB", raising=False)
    take_one_gpu()
    assert os.environ["CUDA_VISIBLE_DEVICES"] == left


def test_one_of_several_processes_sees_all_gpus(monkeypatch):
    for name, value in {"TORCHELASTIC_RUN_ID": "1", "WORLD_SIZE": "2", "CUDA_VISIBLE_DEVICES": "0,1"}.items():
        monkeypatch.setenv(name, value)
    take_one_gpu()
    assert os.environ["CUDA_VISIBLE_DEVICES"] == "0,1"


def test_bf16_where_there_are_no_instructions_for_it_is_refused(monkeypatch):
    monkeypatch.setattr("study.runtime.has_bf16", lambda device: False)
    assert not use_bf16("auto") and not use_bf16("fp32")
    with pytest.raises(StudyError, match=r"^precision = bf16: .* has no bf16 instructions; allowed: auto, fp32$"):
        use_bf16("bf16")
    monkeypatch.setattr("study.runtime.has_bf16", lambda device: True)
    assert use_bf16("auto") and use_bf16("bf16") and not use_bf16("fp32")


def test_bf16_on_a_card_without_it_is_told_with_its_name(monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_bf16_supported", lambda including_emulation: including_emulation)
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda device: "Tesla V100")
    card = torch.device("cuda", 0)
    with pytest.raises(
        StudyError, match=r"^precision = bf16: Tesla V100 has no bf16 instructions; allowed: auto, fp32$"
    ):
        use_bf16("bf16", card)
    assert not use_bf16("auto", card)
