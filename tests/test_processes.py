"""Several processes train the student that one would: same sequences, same weights, one voice, one record."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import tiny
import tiny_processes
import torch
from test_cells import shell
from tiny_processes import BUDGET, CASES, METHOD, interrupted, launch, trained
from tiny_training import distilled, encoder_weights

from study import StudyError, cells
from study.__main__ import main
from study.distillation import processes
from study.plan import Plan
from study.records import Training

NAMES = [f"{method} in {accumulation}" for method, accumulation in CASES]


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """Where two processes did all that :mod:`tiny_processes` says, its last part from a checkpoint of one process."""
    folder = tiny.workspace(tmp_path_factory.mktemp("study"))
    run, layout = tiny.run(folder, METHOD, "L2-H12", distillation=BUDGET)
    interrupted(run, layout, folder / "continued")
    description = folder / "plan" / "distill" / f"{run.name}.json"
    description.parent.mkdir(parents=True)
    description.write_text(run.model_dump_json())
    outcome = launch(2, tiny_processes.__file__, str(description), folder=folder)
    assert outcome.returncode == 0, outcome.stderr[-3000:]
    (folder / "printed").write_text(outcome.stdout)
    return folder


@pytest.fixture(scope="module")
def together(folder):
    """What each of two processes did, case by case."""
    return [torch.load(folder / f"{rank}.pt") for rank in (0, 1)]


def check_weights(start, alone, others):
    """Equal to a thousandth of how far each tensor moved.

    The bias of keys adds the same to all scores of a query: it changes nothing, and what Adam makes of its gradient is
    made of rounding errors alone.
    """
    moved = {name: (alone[name] - start[name]).norm().item() for name in alone if not name.endswith("key.bias")}
    assert sum(length > 0 for length in moved.values()) > 10
    for name, length in moved.items():
        assert (others[name] - alone[name]).norm().item() <= 1e-3 * length + 1e-7, name


@pytest.mark.parametrize("case", range(len(CASES)), ids=NAMES)
def test_two_processes_train_the_student_that_one_does_on_the_same_sequences(tmp_path, together, case):
    alone, (first, second) = trained(tmp_path, *CASES[case]), (rank[case] for rank in together)
    assert tiny.identical(first["start"], alone["start"]) and tiny.identical(first["end"], second["end"])
    check_weights(alone["start"], alone["end"], first["end"])
    assert first["tokens"] == second["tokens"] == alone["tokens"] == 2 * 8 * 16
    for losses in ("training", "held out"):
        assert first[losses] == second[losses] == pytest.approx(alone[losses], rel=1e-5)
    share = 4 // CASES[case][1]
    halves = [list(range(start, start + share)) for start in range(0, 16, share)]
    assert first["read"] == sum(halves[::2], []) and second["read"] == sum(halves[1::2], [])
    assert alone["read"] == list(range(16))


@pytest.mark.parametrize(("seed", "output"), [(1, "continued"), (2, "interrupted")])
def test_other_numbers_of_processes_continue_a_checkpoint(folder, monkeypatch, capsys, seed, output):
    """Of one process by two, and of two processes by one: as if never interrupted."""
    monkeypatch.chdir(folder)
    monkeypatch.setattr(tiny_processes.trainer, "LOGGED_EVERY", tiny_processes.LOGGED_EVERY)
    if seed == 2:
        assert not (folder / output).exists()
        distilled(folder, output, METHOD, seed=seed, distillation=BUDGET)
        assert "continues from step 4 of 8" in capsys.readouterr().out
    whole = distilled(folder, f"whole-{seed}", METHOD, seed=seed, distillation=BUDGET)["training"]
    record = json.loads((folder / output / "record.json").read_text())["training"]
    for curve in ("training_curve", "curve"):
        losses = [[(point["step"], point["loss"]) for point in own[curve]] for own in (record, whole)]
        assert losses[0] == [(step, pytest.approx(loss, rel=1e-5)) for step, loss in losses[1]]
    assert [point["step"] for point in record["training_curve"]] == [7]  # of both parts
    distilled(folder, f"start-{seed}", "none", seed=seed)
    start, alone, others = (encoder_weights(folder / name) for name in (f"start-{seed}", f"whole-{seed}", output))
    check_weights(start, alone, others)
    assert not any((folder / "scratch" / "checkpoints").iterdir()) or seed == 1


def test_a_cell_is_trained_by_as_many_processes_as_the_grid_gives_it(folder, monkeypatch):
    """From the stage's command to the record, as DVC has it."""
    (description,) = (folder / "plan" / "distill").iterdir()
    stage = {"cmd": "false", "deps": [f"plan/distill/{description.name}"], "outs": ["made/student"]}
    (folder / "dvc.yaml").write_text(json.dumps({"stages": {"distill": {"foreach": [description.stem], "do": stage}}}))
    monkeypatch.setattr(cells, "write_plan", lambda plan: 0)
    assert shell(folder, "dvc init --no-scm --quiet").returncode == 0
    study = cells.Cells(Plan("small", folder, folder, None, []))
    ((own,), _) = study.ready()
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "")
    assert " false " in study.command(own) and "false" not in study.command(own, processes=2)
    outcome = shell(folder, study.command(own, processes=2))
    assert outcome.returncode == 0, outcome.stderr[-2000:]
    assert json.loads((folder / "made" / "student" / "record.json").read_text())["training"]["processes"] == 2
    assert study.record() == ([own.name], {}) and study.ready() == ([], [])


def test_one_process_speaks_and_the_record_says_how_many_there_were(folder):
    printed = (folder / "printed").read_text().splitlines()
    title = f"[1/1] english {METHOD} L2-H12 seed 1 | "
    assert [line for line in printed if " seed 1 | continues" in line] == [title + "continues from step 4 of 8"]
    assert sum(line.startswith(title + "step 8/8 | held-out") for line in printed) == 1
    assert printed.count(f"distil: {folder / 'continued'}") == 1
    record = json.loads((folder / "continued" / "record.json").read_text())["training"]
    assert record["processes"] == 2 and record["steps"] == 8 and record["tokens"] == 8 * 8 * 16
    assert [point["step"] for point in record["curve"]] == [0, 2, 4, 6, 8]


def test_a_record_of_one_process_is_as_it_was(folder):
    record = distilled(folder, "alone", "mlm")["training"]
    assert "processes" not in record
    written = json.loads(Training.model_validate(record).model_dump_json())
    assert "processes" not in written and "stopped" in written


@pytest.fixture(scope="module")
def sharded(folder):
    """What each of two processes saw of sharded teachers."""
    return [torch.load(folder / f"sharded-{rank}.pt") for rank in (0, 1)]


@pytest.mark.parametrize("method", tiny_processes.SHARDED_METHODS)
def test_a_sharded_teacher_trains_the_same_student_and_each_process_holds_its_share(folder, sharded, method):
    """Every bit on processors: layers are gathered whole, so that nothing is summed in another order. The student's
    layers are computed twice meanwhile (gradient checkpointing)."""
    assert tiny.identical(*(tiny.weights(folder / f"{how}-{method}") for how in ("sharded", "unsharded")))
    records = [json.loads((folder / f"{how}-{method}" / "record.json").read_text()) for how in ("sharded", "unsharded")]
    losses = [[point["loss"] for point in record["training"]["curve"]] for record in records]
    assert losses[0] == losses[1] and len(set(losses[0])) == 3
    whole = tiny.masked_language_model(**tiny.TEACHER)
    both = tiny_processes.held_of(whole) + whole.get_input_embeddings().weight.numel()  # no longer tied to the head
    assert all(rank["held"][method] == 4 * [both / 2] for rank in sharded)


@pytest.mark.parametrize("family", [*tiny.FAMILIES, *tiny.OTHERS])
def test_every_family_is_read_from_shares_as_from_the_whole(sharded, family):
    """Hidden states, queries, keys, values and logits, also after a reading that was broken off."""
    for whole, readings, (before, tied, after) in (rank[family] for rank in sharded):
        assert len(whole) == 5 + 3 * 4 + 1
        for reading in readings:
            assert all(torch.equal(own, other) for own, other in zip(whole, reading, strict=True))
        assert after == (before + tied) / 2


@pytest.mark.parametrize(
    ("value", "told"),
    [("1", "one process; allowed: two or more, started by torchrun"), ("yes", "allowed: 1, 0 or nothing")],
)
def test_a_teacher_that_cannot_be_sharded_is_told_before_any_work(tmp_path, monkeypatch, value, told):
    monkeypatch.setenv("STUDY_SHARD_TEACHER", value)
    run, layout = tiny.run(tmp_path)
    with pytest.raises(StudyError, match=f"^STUDY_SHARD_TEACHER = {value}( with|;) {told}$"):
        tiny_processes.distil(run, layout, tmp_path / "nowhere" / "student")
    assert not (tmp_path / "nowhere").exists()


@pytest.mark.parametrize(
    ("number", "allowed"), [(3, "1, 2, 4 processes"), (8, "1, 2, 4 processes"), (16, "1, 2, 4 processes")]
)
def test_processes_that_do_not_divide_a_batch_are_told_so(monkeypatch, tmp_path, number, allowed):
    monkeypatch.setattr(processes, "count", lambda: number)
    run, layout = tiny.run(tmp_path, distillation={"batch_size": 8, "accumulation_steps": 2})
    with pytest.raises(StudyError, match=f"{number} processes do not divide .* = 8 .* = 2; allowed: {allowed}"):
        tiny_processes.distil(run, layout, Path("nowhere"))


def test_more_processes_than_gpus_on_a_machine_are_told_so(monkeypatch):
    for name in ("LOCAL_RANK", "LOCAL_WORLD_SIZE"):
        monkeypatch.setenv(name, "4")
    monkeypatch.setattr(processes, "launched", lambda: True)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    with pytest.raises(StudyError, match="^4 processes on a machine with 2 GPUs; allowed: at most one process a GPU$"):
        processes.join()


@pytest.mark.parametrize("left", [{"LOCAL_RANK": "0", "WORLD_SIZE": "2", "RANK": "1"}, {"LOCAL_RANK": "3"}])
def test_what_a_launcher_left_makes_no_process_wait_for_others(folder, monkeypatch, left):
    for name, value in left.items():
        monkeypatch.setenv(name, value)
    assert "processes" not in distilled(folder, "left", "mlm")["training"]


def test_a_description_that_changes_meanwhile_is_refused(folder, monkeypatch, capsys):
    """DVC takes the hash of what a stage depends on when the stage has ended."""
    (description,) = (folder / "plan" / "distill").iterdir()
    monkeypatch.setattr(tiny_processes.trainer.Progress, "on_train_end", lambda *_, **__: description.write_text("{}"))
    assert main(["distil", str(description), "--output", str(folder / "changed")]) == 1
    assert f"{description}: changed while it was run" in capsys.readouterr().err
