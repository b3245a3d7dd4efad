"""The Trainer of the study: accumulation, elapsed time, checkpoints."""

from __future__ import annotations

import json

import pytest
import tiny
from tiny_training import METHODS, descend, objective_of, stream

from study import StudyError
from study.distillation.trainer import Checkpoints, Clock, DivergedError, last_complete_checkpoint


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
