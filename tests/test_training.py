"""Distillation and adaptation: accumulation, kill and resume, what is trained, what every method sees."""

from __future__ import annotations

import itertools
import json
import math
import os
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest
import tiny
import torch
from datasets import Dataset, DatasetDict
from ruamel.yaml import YAML
from transformers import AutoModel, AutoModelForMaskedLM, TrainingArguments, default_data_collator

from study import StudyError
from study.__main__ import main
from study.config import Layout
from study.data.tasks import save
from study.models.students import create_student
from study.models.teachers import has_language_modelling_head, load_pretrained
from study.training import distill
from study.training.distill import Checkpoints, MaskedSequences, adapt_teacher, distil, freeze_untrained, train
from study.training.objectives import OBJECTIVES
from study.training.tune import choose, tune

ROOT = Path(__file__).parents[1]
METHODS = [
    "mlm",
    "od",
    "hs-last",
    "hs-top",
    "hs-uniform",
    "hs-uniform-consecutive",
    "hs-uniform+last",
    "mha-minilmv2",
    "mha-direct",
]
ONE_OF_EACH = ["mlm", "od", "hs-uniform+last", "mha-minilmv2", "mha-direct"]
SPECIAL = np.array([0, 1, 2, 3, 4])


@pytest.fixture
def folder(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    return tiny.workspace(tmp_path)


@pytest.fixture
def words(tmp_path):
    return tiny.tokenizer(tmp_path / "words")


def stream(params, words, seed=1, length=64, rows=24) -> MaskedSequences:
    sequences = Dataset.from_dict({"input_ids": tiny.sequences(rows, 1)})
    return MaskedSequences(sequences, params.masking, words, seed, length)


def objective_of(params, method, teacher=None, student="L2-H12", start=None):
    teacher = teacher or tiny.masked_language_model()
    batch = default_data_collator([start[i] for i in range(24)]) if start is not None else None
    sample = torch.from_numpy(tiny.sequences(24, 5).astype(np.int64))
    model = create_student(teacher, params.students[student], "teacher-layers", sample, seed=1)
    distill.switch_off_dropout(model)
    chosen = params.methods[method]
    objective = OBJECTIVES[chosen.objective](model, teacher, chosen, params.distillation)
    if batch is not None:
        objective.start(batch)
    return objective


# What is trained on: a pure function of seed and position


def test_the_stream_is_a_pure_function_of_seed_and_position(folder, words):
    params = tiny.parameters(folder)
    first, second = stream(params, words), stream(params, words)
    torch.manual_seed(7)
    np.random.seed(7)
    for i in (50, 3, 3, 23, 24, 0):  # any order, repeated, across passes
        expected, other = first[i], second[i]
        second[63 - i]
        assert expected.keys() == other.keys() and all(np.array_equal(expected[key], other[key]) for key in expected)
    assert any(
        not np.array_equal(stream(params, words, seed=2)[i]["positions"], first[i]["positions"]) for i in range(3)
    )


def test_every_pass_reads_every_sequence_once_in_another_order_under_other_masks(folder, words):
    rows = tiny.sequences(24, 1)
    items = [stream(tiny.parameters(folder), words)[i] for i in range(48)]
    passes = [[tuple(item["input_ids"]) for item in items[:24]], [tuple(item["input_ids"]) for item in items[24:]]]
    assert sorted(passes[0]) == sorted(passes[1]) == sorted(map(tuple, rows.astype(int).tolist()))
    assert passes[0] != passes[1] and passes[0] != list(map(tuple, rows.astype(int).tolist()))
    again = {tuple(item["input_ids"]): item["positions"].tolist() for item in items[24:]}
    assert sum(again[tuple(item["input_ids"])] == item["positions"].tolist() for item in items[:24]) < 12


def test_evaluation_is_one_pass_in_the_given_order(folder, words):
    rows = tiny.sequences(24, 1)
    validation = stream(tiny.parameters(folder), words, seed=0, length=None)
    assert len(validation) == 24
    assert np.array_equal([validation[i]["input_ids"] for i in range(24)], rows)


def test_masks(folder, words):
    """A constant count, no special token, 80/10/10 within four standard deviations, originals as labels."""
    params = tiny.parameters(folder, masking={"fraction": 0.25})
    training = stream(params, words, length=1500, rows=100)
    items = [training[i] for i in range(1500)]
    positions, labels, originals, masked = (
        np.array([item[key] for item in items]) for key in ("positions", "labels", "input_ids", "masked_input_ids")
    )
    assert positions.shape == labels.shape == (1500, 4)  # 0.25 x 16
    assert (np.diff(positions, axis=1) > 0).all()
    assert np.array_equal(labels, np.take_along_axis(originals, positions, axis=1))
    assert not np.isin(labels, SPECIAL).any()
    elsewhere = np.ones_like(originals, dtype=bool)
    np.put_along_axis(elsewhere, positions, False, axis=1)
    assert np.array_equal(masked[elsewhere], originals[elsewhere])
    put = np.take_along_axis(masked, positions, axis=1)
    n, vocabulary = put.size, tiny.VOCABULARY
    # A random token is [MASK] or the token itself once in a vocabulary each.
    for share, expected in (
        ((put == 4).mean(), 0.8 + 0.1 / vocabulary),
        ((put == labels).mean(), 0.1 + 0.1 / vocabulary),
        (((put != 4) & (put != labels)).mean(), 0.1 * (vocabulary - 2) / vocabulary),
    ):
        assert abs(share - expected) < 4 * math.sqrt(expected * (1 - expected) / n)
    counts = np.bincount(positions.ravel(), minlength=16)
    assert counts[0] == counts[15] == 0 and counts[1:15].min() > 0.8 * n / 14


def test_a_sequence_with_few_words_still_gives_the_fixed_count_of_masks_or_says_why_not(folder, words):
    """Separators between short documents, or unknown words, can leave fewer words than the count asks for."""
    row = np.full((1, 16), 1, dtype=np.uint16)  # [UNK] throughout, two words
    row[0, [0, 5, 9, 15]] = [2, 20, 30, 3]
    params = tiny.parameters(folder, masking={"fraction": 0.25})
    sequences = MaskedSequences(Dataset.from_dict({"input_ids": row}), params.masking, words, seed=1, length=4)
    try:
        item = sequences[0]
    except StudyError as error:
        assert "\n" not in str(error)
        return
    assert item["positions"].shape == item["labels"].shape == (4,)


def test_all_methods_of_a_seed_see_the_same_sequences_and_masks(folder, monkeypatch):
    seen = {}
    for method in METHODS:
        batches = seen.setdefault(method, [])
        architecture = OBJECTIVES[tiny.parameters(folder).methods[method].objective]

        def forward(self, *, batches=batches, original=architecture.forward, **batch):
            if torch.is_grad_enabled() and len(batch["input_ids"]) == 8:
                batches.append({key: value.clone() for key, value in batch.items()})
            return original(self, **batch)

        with monkeypatch.context() as patch:
            patch.setattr(architecture, "forward", forward)
            distil(tiny.parameters(folder), "english", method, "L2-H12", 1, folder / method)
    reference = seen["mlm"]
    assert len(reference) == 6
    for method, batches in seen.items():
        assert len(batches) == 6, method
        for batch, expected in zip(batches, reference, strict=True):
            assert all(torch.equal(batch[key], expected[key]) for key in expected), method


# Objectives


@pytest.mark.parametrize("method", METHODS)
def test_the_state_of_an_objective_holds_no_teacher_and_no_tied_duplicate(folder, method):
    params = tiny.parameters(folder)
    objective = objective_of(params, method)
    state = objective.state_dict()
    assert not any("teacher" in name for name in state)
    assert all(name.startswith(("student.", "projections.")) for name in state)
    storages = [tensor.data_ptr() for tensor in state.values()]
    assert len(storages) == len(set(storages))
    assert {name for name, _ in objective.named_parameters()} <= set(state)
    if objective.teacher is not None:
        teachers = {parameter.data_ptr() for parameter in objective.teacher.parameters()}
        assert not teachers & set(storages) and not teachers & {p.data_ptr() for p in objective.parameters()}


@pytest.mark.parametrize("method", METHODS)
def test_training_changes_the_student_and_not_the_teacher(folder, words, method):
    params = tiny.parameters(folder)
    teacher = tiny.masked_language_model().train()
    before = tiny.snapshot(teacher)
    objective = objective_of(params, method, teacher)
    start = tiny.snapshot(objective)
    run(objective, stream(params, words), folder / "run", accumulation=1)
    assert tiny.identical(before, tiny.snapshot(teacher))
    assert all(parameter.grad is None for parameter in teacher.parameters())
    assert not tiny.identical(start, tiny.snapshot(objective))
    if method != "mlm":
        assert not teacher.training and not any(p.requires_grad for p in teacher.parameters())
        assert not any(module.training for module in teacher.modules())


def above_the_projections(parameters) -> set[str]:
    """Of a student of two layers: what lies above the last layer's query, key and value projections."""
    return {
        name
        for name in parameters
        if "encoder.layer.1." in name and not any(f".self.{part}." in name for part in ("query", "key", "value"))
    }


@pytest.mark.parametrize("method", METHODS)
def test_frozen_is_what_the_loss_does_not_reach(folder, words, method):
    params = tiny.parameters(folder)
    objective = objective_of(params, method)
    training = stream(params, words)
    frozen = freeze_untrained(objective, default_data_collator([training[0]]))
    expected = above_the_projections(name for name, _ in objective.named_parameters()) if "mha" in method else set()
    assert set(frozen) == expected and (not expected or len(expected) == 10)
    assert {name for name, parameter in objective.named_parameters() if not parameter.requires_grad} == expected
    assert all(parameter.grad is None for parameter in objective.parameters())


@pytest.mark.parametrize("method", ["mha-minilmv2", "mha-direct"])
def test_what_is_frozen_leaves_distillation_as_it_was_initialised(folder, method):
    params = tiny.parameters(folder)
    distil(params, "english", "none", "L2-H12", 1, folder / "none")
    distil(params, "english", method, "L2-H12", 1, folder / "student")
    before = {name.removeprefix("bert."): tensor for name, tensor in tiny.weights(folder / "none").items()}
    after = {name.removeprefix("bert."): tensor for name, tensor in tiny.weights(folder / "student").items()}
    frozen = above_the_projections(after)
    assert len(frozen) == 10 and all(torch.equal(after[name], before[name]) for name in frozen)
    assert not any(torch.equal(after[name], before[name]) for name in after.keys() - frozen)


@pytest.mark.parametrize("method", [method for method in METHODS if method.startswith("hs") or method == "mha-direct"])
@pytest.mark.parametrize("inputs", ["masked", "plain"])
def test_projections_start_at_least_squares(folder, words, method, inputs):
    """Not above the variance of the target, which a constant reaches; on these very tokens not above any other map."""
    params = tiny.parameters(folder, distillation={"inputs": inputs})
    training = stream(params, words)
    batch = default_data_collator([training[i] for i in range(24)])
    untouched = objective_of(params, method)(**batch)["loss"].item()
    objective = objective_of(params, method, start=training)
    with torch.no_grad():
        loss = objective(**batch)["loss"].item()
        pairs = list(objective.pairs(objective.read_student(batch), objective.read_teacher(batch)))
    variances = [(t - t.mean(dim=(0, 1))).square().mean().item() for _, _, t in pairs]
    without = sum(variances) if method == "mha-direct" else np.mean(variances)
    assert loss < 0.9 * without and loss < untouched
    best = []
    for _, student, teacher in pairs:
        source, target = (states.flatten(0, 1).double().numpy() for states in (student, teacher))
        source = np.pad(source, ((0, 0), (0, 1)), constant_values=1)
        # The states leave a layer norm: with the constant they are linearly dependent, but for rounding.
        best.append(np.square(source @ np.linalg.lstsq(source, target, rcond=1e-5)[0] - target).mean())
    assert loss == pytest.approx(sum(best) if method == "mha-direct" else np.mean(best), rel=1e-4)


def test_inputs_decide_what_hidden_states_and_attention_read_and_never_what_logits_read(folder, words):
    training = stream(tiny.parameters(folder), words)
    batch = default_data_collator([training[i] for i in range(8)])
    for method in METHODS:
        values = [
            objective_of(tiny.parameters(folder, distillation={"inputs": inputs}), method)(**batch)["loss"].item()
            for inputs in ("masked", "plain")
        ]
        assert (values[0] == values[1]) == (method in ("mlm", "od")), method


@pytest.mark.parametrize("positions", ["masked", "all"])
def test_output_distribution_and_its_mlm_term_by_whole_forward_passes(folder, words, positions):
    params = tiny.parameters(folder)
    method = params.methods["od"].model_copy(update={"positions": positions, "temperature": 2.0, "mlm_weight": 0.5})
    params = params.model_copy(update={"methods": {"od": method}})
    training = stream(params, words)
    batch = default_data_collator([training[i] for i in range(8)])
    objective = objective_of(params, "od").eval()
    with torch.no_grad():
        loss = objective(**batch)["loss"]
        student, teacher = (
            model(input_ids=batch["masked_input_ids"]).logits for model in (objective.student, objective.teacher)
        )
        rows = torch.arange(8)[:, None]
        at_masked = student[rows, batch["positions"]]
        mlm = torch.nn.functional.cross_entropy(at_masked.flatten(0, 1), batch["labels"].flatten())
        if positions == "masked":
            student, teacher = at_masked, teacher[rows, batch["positions"]]
        p, q = torch.softmax(teacher / 2, dim=-1), torch.log_softmax(student / 2, dim=-1)
        kl = 4 * (p * (p.log() - q)).sum(dim=-1).mean()
    assert loss.item() == pytest.approx((kl + 0.5 * mlm).item(), rel=1e-4)


@pytest.mark.parametrize("from_top", [0, 1, 2])
def test_attention_methods_read_the_teacher_layer_they_are_told(folder, words, from_top):
    params = tiny.parameters(folder)
    training = stream(params, words)
    batch = default_data_collator([training[i] for i in range(4)])
    for name in ("mha-minilmv2", "mha-direct"):
        method = params.methods[name].model_copy(update={"teacher_layer_from_top": from_top})
        objective = objective_of(params.model_copy(update={"methods": {name: method}}), name)
        inputs = objective.teacher(input_ids=batch["masked_input_ids"], output_hidden_states=True).hidden_states
        layer = 4 - from_top
        expected = objective.teacher.base_model.encoder.layer[layer - 1].attention.self.value(inputs[layer - 1])
        teacher = {n: t for n, _, t in objective.pairs(objective.read_student(batch), objective.read_teacher(batch))}
        torch.testing.assert_close(teacher["value"], expected)


# Accumulation


def run(objective, training, folder, accumulation, steps=2, rate=0.05):
    """Plain gradient descent without clipping: unlike Adam, it shows every factor on a gradient."""
    arguments = TrainingArguments(
        output_dir=str(folder),
        max_steps=steps,
        per_device_train_batch_size=8 // accumulation,
        gradient_accumulation_steps=accumulation,
        optim="sgd",
        learning_rate=rate,
        lr_scheduler_type="constant",
        max_grad_norm=0.0,
        use_cpu=True,
        eval_strategy="no",
        save_strategy="no",
        logging_steps=1,
        label_names=["labels"],
        prediction_loss_only=True,
        remove_unused_columns=False,
        train_sampling_strategy="sequential",
        report_to="none",
        disable_tqdm=True,
        dataloader_pin_memory=False,
    )
    validation = MaskedSequences(training.sequences, training.masking, tiny.tokenizer(folder), seed=0)
    return train(objective, training, validation, arguments, "test")


@pytest.mark.parametrize("method", METHODS)
def test_gradients_under_accumulation_are_those_without(folder, words, method):
    params = tiny.parameters(folder)
    ends, records = [], []
    for accumulation in (1, 4):
        training = stream(params, words, length=16)
        objective = objective_of(params, method, start=training)
        start = tiny.snapshot(objective)
        records.append(run(objective, training, folder / f"run-{accumulation}", accumulation))
        ends.append(tiny.snapshot(objective))
    moved = {name: (ends[0][name] - start[name]).norm().item() for name in start}
    assert sum(length > 0 for length in moved.values()) > 20
    for name, length in moved.items():
        assert (ends[0][name] - ends[1][name]).norm().item() <= 2e-3 * length + 1e-5, name
    for key in ("steps", "tokens"):
        assert records[0][key] == records[1][key] == (2 if key == "steps" else 2 * 8 * 16)
    losses = [[entry["loss"] for entry in record["training_curve"]] for record in records]
    assert losses[0] == pytest.approx(losses[1], rel=1e-3)


def test_accumulation_through_distil_gives_the_same_student(folder):
    """Adam hides factors on gradients unless its epsilon is large."""
    students = []
    for accumulation in (1, 4):
        params = tiny.parameters(
            folder, distillation={"accumulation_steps": accumulation, "adam_epsilon": 10.0, "steps": 2}
        )
        distil(params, "english", "mha-minilmv2", "L2-H12", 1, folder / str(accumulation))
        students.append(tiny.weights(folder / str(accumulation)))
    distil(params, "english", "none", "L2-H12", 1, folder / "none")
    before = {name.removeprefix("bert."): tensor for name, tensor in tiny.weights(folder / "none").items()}
    moved = 0
    for name in students[0]:
        length = (students[0][name] - before[name]).norm().item()
        moved += length > 0
        assert (students[0][name] - students[1][name]).norm().item() <= 0.02 * length + 1e-9, name
    assert moved > 10


# Killed and started again


def interrupt_after(monkeypatch, checkpoint: str) -> None:
    """Stop like Ctrl-C at the first log after a checkpoint of that name is complete."""

    original = distill.Progress.on_log

    def on_log(self, args, state, control, logs=None, **kwargs):
        original(self, args, state, control, logs, **kwargs)
        if (Path(args.output_dir) / checkpoint / "trainer_state.json").is_file():
            raise KeyboardInterrupt

    monkeypatch.setattr(distill.Progress, "on_log", on_log)


SCRIPT = """
import sys
from pathlib import Path
import tiny
from study.training.distill import distil
distil(tiny.parameters(Path.cwd(), distillation={budget}), "english", "od", "L2-H12", 1, Path.cwd() / "student")
"""


def test_a_killed_run_continues_and_ends_with_the_same_weights_bit_for_bit(folder, capsys):
    budget = {"steps": 100, "save_every": 5, "evaluate_every": 50, "accumulation_steps": 2}
    threads = str(torch.get_num_threads())
    environment = os.environ | {
        "PYTHONPATH": f"{tiny.ROOT}{os.pathsep}{tiny.ROOT / 'tests'}",
        "OMP_NUM_THREADS": threads,
    }
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

    params = tiny.parameters(folder, distillation=budget)
    capsys.readouterr()
    resumed = distil(params, "english", "od", "L2-H12", 1, folder / "student")
    steps = [
        int(line.partition("step ")[2].partition("/")[0])
        for line in capsys.readouterr().out.splitlines()
        if "step" in line
    ]
    assert min(steps) >= saved  # it did continue
    assert not any(checkpoints.iterdir())  # nothing is left of a run that ended

    whole = distil(params, "english", "od", "L2-H12", 1, folder / "whole")
    assert tiny.identical(tiny.weights(folder / "student"), tiny.weights(folder / "whole"))
    curves = [[(entry["step"], entry["loss"]) for entry in record["curve"]] for record in (resumed, whole)]
    assert curves[0] == curves[1]
    curves = [{entry["step"]: entry["loss"] for entry in record["training_curve"]} for record in (resumed, whole)]
    assert curves[0].keys() == curves[1].keys()
    for step, loss in curves[1].items():  # the Trainer means over the steps since the last log, or since it resumed
        assert curves[0][step] == loss or saved < step < saved + 10


@pytest.mark.parametrize("steps", [2, 4, 6])
def test_interrupted_after_any_checkpoint(folder, monkeypatch, steps):
    params = tiny.parameters(folder, distillation={"evaluate_every": 2})
    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        interrupt_after(patch, f"checkpoint-{steps}")
        distil(params, "english", "mha-direct", "L2-H12", 1, folder / "student")
    assert not (folder / "student").exists()
    record = distil(params, "english", "mha-direct", "L2-H12", 1, folder / "student")
    distil(params, "english", "mha-direct", "L2-H12", 1, folder / "whole")
    assert record["steps"] == 6 and [entry["step"] for entry in record["curve"]] == [0, 2, 4, 6]
    assert tiny.identical(tiny.weights(folder / "student"), tiny.weights(folder / "whole"))


@pytest.mark.parametrize("saved", [2, 4])
def test_an_interrupted_adaptation_stops_where_the_whole_one_stops(folder, monkeypatch, saved):
    """The count of evaluations without improvement has to survive the interruption too."""
    params = tiny.parameters(folder, adaptation={"min_improvement": 100.0, "patience": 3, "steps": 20})
    whole = adapt_teacher(params, "english", folder / "whole")
    assert whole["steps"] < 20 and whole["stopped"] != "step limit"
    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        interrupt_after(patch, f"checkpoint-{saved}")
        adapt_teacher(params, "english", folder / "teacher")
    resumed = adapt_teacher(params, "english", folder / "teacher")
    assert resumed["steps"] == whole["steps"]
    assert tiny.identical(tiny.weights(folder / "teacher"), tiny.weights(folder / "whole"))


def leave_a_checkpoint(
    folder, monkeypatch, params, method="mlm", saved="checkpoint-4", student="L2-H12", seed=1
) -> Path:
    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        interrupt_after(patch, saved)
        distil(params, "english", method, student, seed, folder / "interrupted")
    (run,) = (folder / "scratch" / "checkpoints").iterdir()
    return run


def first_step(capsys) -> int:
    lines = [line for line in capsys.readouterr().out.splitlines() if " | step " in line]
    return int(lines[0].partition("| step ")[2].partition("/")[0])


OTHERS = {
    "learning rate": lambda params: params.model_copy(
        update={"methods": params.methods | {"mlm": params.methods["mlm"].model_copy(update={"learning_rate": 5e-4})}}
    ),
    "masking": lambda params: params.model_copy(
        update={"masking": params.masking.model_copy(update={"fraction": 0.3})}
    ),
    "steps": lambda params: params.model_copy(
        update={"distillation": params.distillation.model_copy(update={"steps": 8})}
    ),
    "initialisation": lambda params: params.model_copy(update={"initialisation": "teacher-embeddings"}),
    "precision": lambda params: params.model_copy(update={"precision": "bf16"}),
    "attention implementation": lambda params: params.model_copy(update={"attention_implementation": "sdpa"}),
    "student": lambda params: params.model_copy(
        update={
            "students": {**params.students, "L2-H12": params.students["L2-H12"].model_copy(update={"intermediate": 20})}
        }
    ),
}


@pytest.mark.parametrize("name", OTHERS)
def test_a_checkpoint_of_another_configuration_is_never_picked_up(folder, monkeypatch, capsys, name):
    params = tiny.parameters(folder, distillation={"evaluate_every": 2})
    leave_a_checkpoint(folder, monkeypatch, params)
    capsys.readouterr()
    distil(OTHERS[name](params), "english", "mlm", "L2-H12", 1, folder / "other")
    assert first_step(capsys) == 0


@pytest.mark.parametrize("part", ["seed", "method", "teacher", "corpus", "code"])
def test_nor_one_of_another_seed_method_teacher_corpus_or_code(folder, monkeypatch, capsys, part):
    params = tiny.parameters(folder, distillation={"evaluate_every": 2})
    leave_a_checkpoint(folder, monkeypatch, params, method="hs-last")
    method, seed = "hs-last", 1
    if part == "seed":
        seed = 2
    elif part == "method":
        method = "hs-top"
    elif part == "teacher":
        tiny.masked_language_model(seed=1).save_pretrained(folder / "runs" / "test" / "english" / "teacher")
    elif part == "corpus":
        tiny.save_corpus(folder / "runs" / "test" / "english" / "corpus", train=72)
    else:
        original = distill.fingerprint
        monkeypatch.setattr(
            distill, "fingerprint", lambda path: original(path) + ("x" if path.name == "losses.py" else "")
        )
    capsys.readouterr()
    distil(params, "english", method, "L2-H12", seed, folder / "other")
    assert first_step(capsys) == 0


def test_the_same_configuration_does_pick_its_checkpoint_up(folder, monkeypatch, capsys):
    params = tiny.parameters(folder, distillation={"evaluate_every": 2})
    leave_a_checkpoint(folder, monkeypatch, params)
    capsys.readouterr()
    distil(params, "english", "mlm", "L2-H12", 1, folder / "same")
    assert first_step(capsys) >= 4


DAMAGES = {
    "no state": lambda checkpoint: (checkpoint / "trainer_state.json").unlink(),
    "half a state": lambda checkpoint: (checkpoint / "trainer_state.json").write_text('{"epoch": 0.5, "global'),
    "empty state": lambda checkpoint: (checkpoint / "trainer_state.json").write_text(""),
}


@pytest.mark.parametrize("name", DAMAGES)
def test_a_half_written_checkpoint_is_passed_over_for_the_one_before(folder, monkeypatch, capsys, name):
    params = tiny.parameters(folder, distillation={"evaluate_every": 1, "steps": 10})
    run = leave_a_checkpoint(folder, monkeypatch, params, saved="checkpoint-10")
    assert sorted(path.name for path in run.iterdir()) == ["checkpoint-10", "checkpoint-8"]
    DAMAGES[name](run / "checkpoint-10")
    capsys.readouterr()
    distil(params, "english", "mlm", "L2-H12", 1, folder / "student")
    assert 8 <= first_step(capsys) < 10
    distil(params, "english", "mlm", "L2-H12", 1, folder / "whole")
    assert tiny.identical(tiny.weights(folder / "student"), tiny.weights(folder / "whole"))


def test_the_state_is_what_a_checkpoint_writes_last(folder, monkeypatch):
    """Resuming trusts that a checkpoint with a whole state is whole; that holds while the Trainer writes it last."""
    params = tiny.parameters(folder, distillation={"evaluate_every": 1})
    run = leave_a_checkpoint(folder, monkeypatch, params)
    times = {path.name: path.stat().st_mtime_ns for path in (run / "checkpoint-4").iterdir()}
    assert {"model.safetensors", "optimizer.pt", "scheduler.pt", "rng_state.pth"} <= times.keys()
    assert times["trainer_state.json"] == max(times.values())


# Bad input


def poison(folder: Path, value: float) -> None:
    model = tiny.masked_language_model()
    with torch.no_grad():
        model.bert.encoder.layer[2].attention.self.query.weight[0, 0] = value
        model.bert.encoder.layer[2].attention.self.value.weight[0, 0] = value
    model.save_pretrained(folder / "runs" / "test" / "english" / "teacher")


@pytest.mark.parametrize("initialisation", ["random", "teacher-layers"])
@pytest.mark.parametrize(
    ("method", "value"),
    [
        ("od", math.nan),
        ("od", math.inf),
        ("hs-uniform+last", math.nan),
        ("mha-minilmv2", math.nan),
        ("mha-direct", math.nan),
    ],
)
def test_a_loss_that_is_not_finite_stops_the_run_and_writes_no_result(folder, method, value, initialisation):
    poison(folder, value)
    params = tiny.parameters(folder, initialisation=initialisation)
    with pytest.raises(StudyError) as error:
        distil(params, "english", method, "L2-H12", 1, folder / "student")
    assert "\n" not in str(error.value)
    assert not (folder / "student").exists()
    assert not any((folder / "scratch" / "checkpoints").glob("*"))  # nothing to resume from into the same end


def test_a_loss_that_stops_being_finite_on_the_way(folder, words, monkeypatch):
    """Not at a held-out evaluation, and not at a multiple of the logging interval."""
    params = tiny.parameters(folder, distillation={"evaluate_every": 100, "steps": 14, "save_every": 100})
    objective, calls = OBJECTIVES["masked_language_modelling"], itertools.count()
    original = objective.loss

    def loss(self, student, teacher, batch):
        value = original(self, student, teacher, batch)
        return value * float("nan") if torch.is_grad_enabled() and next(calls) == 13 else value

    monkeypatch.setattr(objective, "loss", loss)
    with pytest.raises(StudyError, match="nan"):
        distil(params, "english", "mlm", "L2-H12", 1, folder / "student")
    assert not (folder / "student").exists()


def test_an_adaptation_that_is_not_finite(folder):
    model = tiny.masked_language_model()
    with torch.no_grad():
        model.bert.encoder.layer[2].output.dense.weight[0, 0] = float("nan")
    params = tiny.parameters(folder)
    model.save_pretrained(Layout(params, "english").encoder)
    with pytest.raises(StudyError, match="nan"):
        adapt_teacher(params, "english", folder / "teacher")
    assert not (folder / "teacher").exists()


def test_a_corpus_shorter_than_one_batch(folder):
    tiny.save_corpus(folder / "runs" / "test" / "english" / "corpus", train=7)
    with pytest.raises(StudyError) as error:
        distil(tiny.parameters(folder), "english", "mlm", "L2-H12", 1, folder / "student")
    assert all(part in str(error.value) for part in ("7 ", "batch_size", "8")) and "\n" not in str(error.value)


@pytest.mark.parametrize("method", ["none", "mlm"])
def test_an_output_that_cannot_be_written_fails_before_any_work(folder, method, capsys):
    (folder / "file").write_text("")
    with pytest.raises(StudyError, match="cannot be written"):
        distil(tiny.parameters(folder), "english", method, "L2-H12", 1, folder / "file" / "student")
    assert "| step " not in capsys.readouterr().out  # an hour of training must not come before this


def test_names_and_inputs_that_do_not_exist(folder):
    params, output = tiny.parameters(folder), folder / "student"
    for arguments, named in (
        (("german", "mlm", "L2-H12"), "'german'.*english"),
        (("english", "magic", "L2-H12"), "'magic'.*mlm"),
        (("english", "mlm", "L9"), "'L9'.*L2-H12"),
    ):
        with pytest.raises(StudyError, match=named):
            distil(params, *arguments, 1, output)
    layout = Layout(params, "english")
    for missing in (layout.corpus, layout.teacher):
        missing.rename(missing.with_name("elsewhere"))
        with pytest.raises(StudyError, match=missing.name):
            distil(params, "english", "mlm", "L2-H12", 1, output)
        missing.with_name("elsewhere").rename(missing)


def test_a_teacher_of_other_sizes_than_declared(folder):
    teacher = tiny.parameters(folder).settings["english"].teacher.model_copy(update={"intermediate": 64})
    with pytest.raises(StudyError, match="intermediate = 64.*48"):
        load_pretrained(teacher)


def test_a_teacher_that_does_not_exist(folder, monkeypatch):
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    teacher = tiny.parameters(folder).settings["english"].teacher.model_copy(update={"name": str(folder / "nowhere")})
    with pytest.raises(StudyError) as error:
        load_pretrained(teacher)
    message = str(error.value)
    assert "nowhere" in message and "\n" not in message
    assert "all-minilm-l6-v2, multilingual-e5-small" in message


def test_a_teacher_is_adapted_from_the_encoder_beside_the_corpus(folder):
    encoder = Layout(tiny.parameters(folder), "english").encoder
    encoder.rename(encoder.with_name("elsewhere"))
    with pytest.raises(StudyError, match="encoder: no saved model; run the stage"):
        adapt_teacher(tiny.parameters(folder), "english", folder / "teacher")


# Whole runs


@pytest.mark.parametrize(
    ("method", "student"), [*((method, "L2-H12") for method in METHODS), ("od", "L2-H24"), ("mha-minilmv2", "L2-H24")]
)
def test_a_student_comes_out_trained_loadable_and_with_its_record(folder, method, student, capsys):
    params = tiny.parameters(folder, distillation={"steps": 20, "evaluate_every": 10, "save_every": 100})
    record = distil(params, "english", method, student, 1, folder / "student")
    assert json.loads((folder / "student" / "record.json").read_text()) == record
    assert (record["steps"], record["tokens"]) == (20, 20 * 8 * 16)
    assert [entry["step"] for entry in record["curve"]] == [0, 10, 20]
    assert record["curve"][-1]["loss"] < record["curve"][0]["loss"]
    assert all(math.isfinite(entry["loss"]) for entry in record["curve"] + record["training_curve"])
    assert record["tokens_per_second"] > 0 and record["precision"] == "fp32"
    with_head = method in ("mlm", "od")
    assert has_language_modelling_head(folder / "student") == with_head
    encoder = AutoModel.from_pretrained(folder / "student")
    assert encoder.config.num_hidden_layers == 2
    files = {path.name for path in (folder / "student").iterdir()}
    assert {"config.json", "model.safetensors", "tokenizer.json", "record.json"} <= files and not files & {
        "training_args.bin"
    }
    saved = tiny.weights(folder / "student")
    assert not any("projections" in name or "teacher" in name for name in saved)
    assert {tensor.shape[-1] for name, tensor in saved.items() if "attention" in name} == {int(student[-2:])}
    if with_head:
        ids = torch.from_numpy(tiny.sequences(2, 1).astype(np.int64))
        model = AutoModelForMaskedLM.from_pretrained(folder / "student")
        assert model(input_ids=ids).logits.shape == (2, 16, 60)
        assert model.get_output_embeddings().weight is model.get_input_embeddings().weight
    lines = [line for line in capsys.readouterr().out.splitlines() if " | step " in line]
    assert any("tokens/s" in line and "left" in line and "loss" in line for line in lines)


@pytest.mark.parametrize("method", ONE_OF_EACH)
def test_a_run_depends_on_nothing_but_its_seed(folder, method):
    """Bit for bit, as resuming promises."""
    params = tiny.parameters(folder)
    for name in ("first", "second"):
        torch.rand(3)
        distil(params, "english", method, "L2-H12", 1, folder / name)
        assert tiny.identical(tiny.weights(folder / "first"), tiny.weights(folder / name))
    distil(params, "english", method, "L2-H12", 2, folder / "other")
    assert not tiny.identical(tiny.weights(folder / "first"), tiny.weights(folder / "other"))


def test_dropout_is_off_in_training_and_kept_in_the_saved_configuration(folder, monkeypatch):
    rates = []
    original = distill.train

    def watch(objective, *arguments, **named):
        rates.extend(module.p for module in objective.modules() if isinstance(module, torch.nn.Dropout))
        return original(objective, *arguments, **named)

    monkeypatch.setattr(distill, "train", watch)
    distil(tiny.parameters(folder), "english", "mlm", "L2-H12", 1, folder / "student")
    assert rates and set(rates) == {0.0}
    assert AutoModel.from_pretrained(folder / "student").config.hidden_dropout_prob == 0.1


def test_none_is_the_student_as_every_method_starts_from_it(folder, monkeypatch):
    params = tiny.parameters(folder)
    record = distil(params, "english", "none", "L2-H12", 1, folder / "none")
    assert record["steps"] == 0
    starts = {}
    original = distill.train

    def watch(objective, *arguments, **named):
        starts[type(objective).__name__] = tiny.snapshot(objective.student.base_model)
        return original(objective, *arguments, **named)

    monkeypatch.setattr(distill, "train", watch)
    for method in ONE_OF_EACH:
        distil(params, "english", method, "L2-H12", 1, folder / method)
    untrained = {
        name.removeprefix("bert."): t for name, t in tiny.weights(folder / "none").items() if name.startswith("bert.")
    }
    assert len(starts) == 5 and all(tiny.identical(start, untrained) for start in starts.values())


def test_adaptation_lowers_the_loss_ties_the_head_and_stops_by_its_criterion(folder):
    params = tiny.parameters(
        folder, adaptation={"steps": 60, "evaluate_every": 10, "min_improvement": 0.0, "learning_rate": 5e-3}
    )
    record = adapt_teacher(params, "english", folder / "teacher")
    assert record["curve"][-1]["loss"] < record["curve"][0]["loss"] - 0.1
    model = AutoModelForMaskedLM.from_pretrained(folder / "teacher")
    assert model.get_output_embeddings().weight is model.get_input_embeddings().weight
    before, after = tiny.weights(folder / "pretrained"), tiny.weights(folder / "teacher")
    encoder = [name for name in after if name.startswith("bert.")]
    assert encoder and not any(
        torch.equal(before[name], after[name]) for name in encoder
    )  # the whole encoder is trained
    # No improvement of a hundred nats, twice in a row: the next two evaluations are compared with that at step 10.
    params = tiny.parameters(
        folder, adaptation={"steps": 60, "evaluate_every": 10, "min_improvement": 100.0, "patience": 2}
    )
    record = adapt_teacher(params, "english", folder / "early")
    assert record["steps"] == 30 and "no longer improves" in record["stopped"]


def test_adaptation_starts_from_the_unigram_distribution(folder):
    """Before training, held-out loss is near the unigram entropy: far below a random head's."""
    record = adapt_teacher(tiny.parameters(folder), "english", folder / "teacher")
    model = tiny.masked_language_model()
    ids = torch.from_numpy(tiny.sequences(16, 2).astype(np.int64))
    random = torch.nn.functional.cross_entropy(model(input_ids=ids).logits.flatten(0, 1), ids.flatten()).item()
    assert record["curve"][0]["loss"] < random


def test_tuning_tries_every_candidate_and_looks_at_development_data_only(folder):
    params = tiny.parameters(folder, tuning={"learning_rates": [1e-6, 1e-3], "steps": 20})
    place = folder / "runs" / "test" / "english" / "tasks" / "topic"
    dataset = DatasetDict(train=tiny.sentences(128, 1), development=tiny.sentences(64, 2), test=tiny.sentences(64, 3))
    save(dataset, place)
    result = tune(params, "english", "mlm", "L2-H12", folder / "tuning" / "mlm.json")
    assert json.loads((folder / "tuning" / "mlm.json").read_text()) == result
    tried = {entry["learning_rate"]: entry for entry in result["tried"]}
    assert set(tried) == {1e-6, 1e-3} and tried[1e-3]["held_out_loss"] < tried[1e-6]["held_out_loss"]
    assert len({entry["held_out_loss_before"] for entry in result["tried"]}) == 1
    for entry in tried.values():
        assert entry["development"].keys() == {"topic"}
        assert entry["development_mean"] == entry["development"]["topic"] > 0.75
    dataset["test"] = tiny.sentences(64, 4, flip=True)
    shutil.rmtree(place)
    save(dataset, place)
    again = tune(params, "english", "mlm", "L2-H12", folder / "tuning" / "again.json")
    assert again["tried"] == result["tried"]
    with pytest.raises(StudyError, match="'magic'.*mlm"):
        tune(params, "english", "magic", "L2-H12", folder / "tuning" / "magic.json")


def test_a_students_own_rate_is_the_one_it_is_trained_with_and_tuning_looks_past_it(folder):
    """Bit for bit what the method gives at that rate; the other student is trained as before."""
    shape = {"layers": 2, "width": 12, "heads": 4, "intermediate": 24}
    own = {"L2-H12": shape | {"learning_rates": {"mlm": 5e-3}}, "L2-H24": shape | {"width": 24, "intermediate": 48}}
    plain, rated = tiny.parameters(folder), tiny.parameters(folder, students=own)
    higher = plain.model_copy(
        update={"methods": plain.methods | {"mlm": plain.methods["mlm"].model_copy(update={"learning_rate": 5e-3})}}
    )
    record = distil(rated, "english", "mlm", "L2-H12", 1, folder / "rated")
    assert record["learning_rate"] == record["method"]["learning_rate"] == 5e-3
    distil(higher, "english", "mlm", "L2-H12", 1, folder / "higher")
    distil(plain, "english", "mlm", "L2-H12", 1, folder / "plain")
    assert tiny.identical(tiny.weights(folder / "rated"), tiny.weights(folder / "higher"))
    assert not tiny.identical(tiny.weights(folder / "rated"), tiny.weights(folder / "plain"))
    for params, name in ((rated, "beside-rated"), (plain, "beside-plain")):
        distil(params, "english", "mlm", "L2-H24", 1, folder / name)
    assert tiny.identical(tiny.weights(folder / "beside-rated"), tiny.weights(folder / "beside-plain"))

    dataset = DatasetDict(train=tiny.sentences(32, 1), development=tiny.sentences(16, 2), test=tiny.sentences(16, 3))
    save(dataset, folder / "runs" / "test" / "english" / "tasks" / "topic")
    results = [
        tune(
            tiny.parameters(folder, tuning={"learning_rates": [1e-6, 1e-2]}, **changes),
            "english",
            "mlm",
            "L2-H12",
            folder / "tuning" / "mlm.json",
        )
        for changes in ({}, {"students": own})
    ]
    assert results[0]["tried"] == results[1]["tried"]
    assert results[0]["tried"][0]["held_out_loss"] != results[0]["tried"][1]["held_out_loss"]


def test_tuned_chooses_by_itself_for_a_student_with_rates_of_its_own(folder, capsys):
    """Of two students, the one prefers 1e-3 and the other 2e-3; together they would share the better on average."""
    values = YAML(typ="safe").load(ROOT / "params.yaml")
    values["students"]["L4-H192"]["learning_rates"] = {
        name: 1e-3 for name, method in values["methods"].items() if method["objective"] != "none"
    }
    (folder / "params.yaml").unlink()
    YAML().dump(values, folder / "params.yaml")
    rates = {"L3-H192": {1e-3: ([0.9], 0.5), 2e-3: ([0.4], 0.5)}, "L4-H192": {1e-3: ([0.7], 0.5), 2e-3: ([0.8], 0.5)}}
    for student, own in rates.items():
        file = folder / "reports" / "tuning" / "english" / f"od_{student}.json"
        file.parent.mkdir(parents=True, exist_ok=True)
        file.write_text(json.dumps(tried("od", own) | {"student": student}))
    assert main(["tuned"]) == 0
    assert capsys.readouterr().out.splitlines() == [
        "methods.od.learning_rate: 0.001",
        "students.L4-H192.learning_rates.od: 0.002",
    ]


def tried(method: str, rates: dict[float, tuple[list[float], float]]) -> dict:
    """A record of tuning: rate -> development scores, and the held-out loss that began at 1."""
    return {
        "method": method,
        "tried": [
            {
                "learning_rate": rate,
                "development": dict(zip("abc", scores, strict=False)),
                "held_out_loss_before": 1.0,
                "held_out_loss": loss,
            }
            for rate, (scores, loss) in rates.items()
        ],
    }


def test_a_rate_told_from_the_best_on_development_data_is_not_chosen_however_low_its_loss():
    """Behind by 0.2, 0.1 and 0.3: mean 0.2, standard error 0.058."""
    assert choose([tried("od", {1.0: ([0.7, 0.8, 0.9], 0.9), 2.0: ([0.5, 0.7, 0.6], 0.1)})]) == {"od": 1.0}


def test_of_rates_not_told_from_the_best_the_one_with_the_lowest_loss_is_chosen():
    """Behind by 0.2, -0.1 and 0: mean 0.033, standard error 0.088. A third, behind by 0.3 each time, is told apart."""
    rates = {1.0: ([0.7, 0.8, 0.9], 0.9), 2.0: ([0.5, 0.9, 0.9], 0.8), 3.0: ([0.4, 0.5, 0.6], 0.1)}
    assert choose([tried("od", rates), tried("mlm", {1.0: ([0.2], 0.9), 2.0: ([0.3], 0.95)})]) == {
        "od": 2.0,
        "mlm": 2.0,
    }


def test_differences_are_taken_over_all_students_and_losses_count_as_shares_of_their_start():
    """Behind by 0.02, 0.04 and 0.03 with a standard error of 0.006. Without the second student not told apart."""
    first = tried("od", {1.0: ([0.52, 0.54], 0.9), 2.0: ([0.5, 0.5], 0.8)})
    other = tried("od", {1.0: ([0.53], 0.9), 2.0: ([0.5], 0.8)})
    assert choose([first, other]) == {"od": 1.0}
    other = tried("od", {1.0: ([0.5], 0.9), 2.0: ([0.9], 0.8)})
    assert choose([first, other]) == {"od": 2.0}
    large = tried("od", {1.0: ([0.5], 0.7), 2.0: ([0.5], 0.9)})
    for candidate in large["tried"]:
        candidate["held_out_loss_before"], candidate["held_out_loss"] = 10.0, 10 * candidate["held_out_loss"]
    level = tried("od", {1.0: ([0.5, 0.5], 0.9), 2.0: ([0.5, 0.5], 0.8)})
    assert choose([level]) == {"od": 2.0} and choose([level, large]) == {"od": 1.0}  # 0.9 and 0.7 against 0.8 and 0.9
    for candidate in large["tried"]:
        candidate["held_out_loss_before"], candidate["held_out_loss"] = 0.1, candidate["held_out_loss"] / 100
    assert choose([level, large]) == {"od": 1.0}  # the larger loss does not weigh more


def test_a_rate_at_which_any_student_diverges_or_its_loss_rises_is_not_chosen():
    records = [tried("od", {1.0: ([0.7, 0.8], 0.9), 2.0: ([0.9, 0.9], 0.8)}) for _ in range(2)]
    assert choose(records) == {"od": 2.0}
    records[1]["tried"][1]["held_out_loss"] = 1.1
    assert choose(records) == {"od": 1.0}
    records[1]["tried"][1] = {"learning_rate": 2.0, "diverged": "loss = nan"}
    assert choose(records) == {"od": 1.0}
    records[0]["tried"][0] = {"learning_rate": 1.0, "diverged": "loss = nan"}
    with pytest.raises(StudyError, match=r"od: diverged, or its loss rose, at every learning rate of \[1.0, 2.0\]"):
        choose(records)


def test_rates_that_were_not_tried_everywhere_are_not_compared():
    records = [tried("od", {1.0: ([0.7], 0.9), 2.0: ([0.9], 0.8)}), tried("od", {1.0: ([0.7], 0.9)})]
    with pytest.raises(StudyError, match="od was tried at 2.0 1 times, at others 2"):
        choose(records)


def test_a_candidate_that_diverges_is_recorded_and_the_others_are_tried(folder, monkeypatch):
    params = tiny.parameters(folder, tuning={"learning_rates": [1e-3, 1.0]})
    dataset = DatasetDict(train=tiny.sentences(32, 1), development=tiny.sentences(16, 2), test=tiny.sentences(16, 3))
    save(dataset, folder / "runs" / "test" / "english" / "tasks" / "topic")
    calm = distill.DistillationTrainer.log

    def log(trainer, logs, start_time=None):
        calm(trainer, logs | ({"loss": math.nan} if trainer.args.learning_rate == 1.0 else {}), start_time)

    monkeypatch.setattr(distill.DistillationTrainer, "log", log)
    result = tune(params, "english", "mlm", "L2-H12", folder / "mlm.json")
    first, second = result["tried"]
    assert "diverged" not in first and first["development_mean"] >= 0
    assert "loss = nan" in second["diverged"] and choose([result]) == {"mlm": 1e-3}


def test_what_a_method_sets_for_itself_stands_in_the_place_of_what_all_share(folder):
    """Steps, inputs and initialisation: as if the shared values were these, in the students' very weights."""
    params = tiny.parameters(folder)
    shared = params.methods["mha-direct"]
    own = {"steps": 3, "inputs": "plain", "initialisation": "random"}
    methods = {**params.methods, "own": shared.model_copy(update=own)}
    first = distil(params.model_copy(update={"methods": methods}), "english", "own", "L2-H12", 1, folder / "own")
    assert (first["steps"], first["inputs"], first["initialisation"]) == (3, "plain", "random")
    others = tiny.parameters(folder, distillation={"steps": 3, "inputs": "plain"}, initialisation="random")
    distil(others, "english", "mha-direct", "L2-H12", 1, folder / "shared")
    assert tiny.identical(tiny.weights(folder / "own"), tiny.weights(folder / "shared"))
    distil(params, "english", "mha-direct", "L2-H12", 1, folder / "other")
    assert not tiny.identical(tiny.weights(folder / "own"), tiny.weights(folder / "other"))


def test_checkpoints_outlive_crashes_but_not_success(tmp_path):
    for error, left in ((RuntimeError, True), (KeyboardInterrupt, True), (None, False)):
        checkpoints = Checkpoints(tmp_path, {"of": str(error)})
        try:
            with checkpoints as run:
                (run / "checkpoint-1").mkdir()
                if error:
                    raise error
        except (RuntimeError, KeyboardInterrupt):
            pass
        assert checkpoints.folder.exists() == left
