"""Distillation: students and their records, what every method sees, what a run rests on, bad input."""

from __future__ import annotations

import itertools
import json
import math
import stat
from pathlib import Path

import numpy as np
import pytest
import tiny
import torch
from tiny_training import METHODS, ONE_OF_EACH, above_the_projections, distilled, encoder_weights
from transformers import AutoModel, AutoModelForMaskedLM

from study import StudyError
from study.data.corpus import corpus_hash
from study.data.pretrained import has_language_modelling_head
from study.distillation import distil as distillation
from study.distillation.objectives import OBJECTIVES
from study.files import Layout, content_hash
from study.records import Training


@pytest.fixture
def folder(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    return tiny.workspace(tmp_path)


@pytest.mark.parametrize(
    ("method", "student"), [*((method, "L2-H12") for method in METHODS), ("od", "L2-H24"), ("mha-minilmv2", "L2-H24")]
)
def test_a_student_comes_out_trained_loadable_and_with_its_record(folder, method, student, capsys):
    budget = {"steps": 20, "evaluate_every": 10, "save_every": 100}
    whole = distilled(folder, "student", method, student, distillation=budget)
    assert json.loads((folder / "student" / "record.json").read_text()) == whole
    assert whole["run"] == {"setting": "english", "method": method, "student": student, "seed": 1}
    assert whole["hashes"].keys() == {"corpus", "teacher"} and whole["environment"]["torch"]
    record = whole["training"]
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
    for name in ("first", "second"):
        torch.rand(3)
        distilled(folder, name, method)
        assert tiny.identical(tiny.weights(folder / "first"), tiny.weights(folder / name))
    distilled(folder, "other", method, seed=2)
    assert not tiny.identical(tiny.weights(folder / "first"), tiny.weights(folder / "other"))


def test_dropout_is_off_in_training_and_kept_in_the_saved_configuration(folder, monkeypatch):
    rates = []
    original = distillation.train

    def watch(objective, *arguments, **named):
        rates.extend(module.p for module in objective.modules() if isinstance(module, torch.nn.Dropout))
        return original(objective, *arguments, **named)

    monkeypatch.setattr(distillation, "train", watch)
    distilled(folder, "student", "mlm")
    assert rates and set(rates) == {0.0}
    assert AutoModel.from_pretrained(folder / "student").config.hidden_dropout_prob == 0.1


def test_none_is_the_student_as_every_method_starts_from_it(folder, monkeypatch):
    assert distilled(folder, "none", "none")["training"] is None
    starts = {}
    original = distillation.train

    def watch(objective, *arguments, **named):
        starts[type(objective).__name__] = tiny.snapshot(objective.student.base_model)
        return original(objective, *arguments, **named)

    monkeypatch.setattr(distillation, "train", watch)
    for method in ONE_OF_EACH:
        distilled(folder, method, method)
    untrained = {
        name.removeprefix("bert."): t for name, t in tiny.weights(folder / "none").items() if name.startswith("bert.")
    }
    assert len(starts) == 5 and all(tiny.identical(start, untrained) for start in starts.values())


def test_what_a_method_sets_for_itself_stands_in_the_place_of_what_all_share(folder):
    """Steps, inputs and initialisation: as if the shared values were these, in the students' very weights."""
    shared = tiny.parameters(folder).methods["mha-direct"].model_dump()
    methods = {"own": shared | {"steps": 3, "inputs": "plain", "initialisation": "random"}}
    first = distilled(folder, "own", "own", methods=methods)["training"]
    assert (first["steps"], first["inputs"], first["initialisation"]) == (3, "plain", "random")
    budget = {"steps": 3, "inputs": "plain"}
    distilled(folder, "shared", "mha-direct", distillation=budget, initialisation="random")
    assert tiny.identical(tiny.weights(folder / "own"), tiny.weights(folder / "shared"))
    distilled(folder, "other", "mha-direct")
    assert not tiny.identical(tiny.weights(folder / "own"), tiny.weights(folder / "other"))


def test_a_students_own_rate_is_the_one_it_is_trained_with(folder):
    """Bit for bit what the method gives at that rate; the other student is trained as before."""
    shape = {"layers": 2, "width": 12, "heads": 4, "intermediate": 24}
    rated = {"students": {"L2-H12": shape | {"learning_rates": {"mlm": 5e-3}}}}
    higher = {"methods": {"mlm": {"objective": "masked_language_modelling", "learning_rate": 5e-3}}}
    training = distilled(folder, "rated", "mlm", **rated)["training"]
    assert training["learning_rate"] == training["options"]["learning_rate"] == 5e-3
    distilled(folder, "higher", "mlm", **higher)
    distilled(folder, "plain", "mlm")
    assert tiny.identical(tiny.weights(folder / "rated"), tiny.weights(folder / "higher"))
    assert not tiny.identical(tiny.weights(folder / "rated"), tiny.weights(folder / "plain"))
    distilled(folder, "beside-rated", "mlm", "L2-H24", **rated)
    distilled(folder, "beside-plain", "mlm", "L2-H24")
    assert tiny.identical(tiny.weights(folder / "beside-rated"), tiny.weights(folder / "beside-plain"))


def test_a_record_says_what_was_made_of_what(folder):
    record = distilled(folder, "student", "od", "L2-H24", seed=3)
    layout, (run, _) = Layout(folder, "english"), tiny.run(folder, "od", "L2-H24", 3)
    assert record.keys() == {"run", "hashes", "training", "environment"}
    assert record["run"] == {"setting": "english", "method": "od", "student": "L2-H24", "seed": 3}
    assert record["hashes"] == {"corpus": corpus_hash(layout.corpus), "teacher": content_hash(layout.teacher)}
    training = Training.model_validate(record["training"])
    assert training.objective == "output_distribution" and training.options == run.objective.model_dump()
    assert training.revisions == run.revisions and "output_distribution" in run.revisions
    assert training.fast_paths == run.fast_paths
    assert (training.initialisation, training.inputs) == ("teacher-layers", "masked")
    assert {stat.S_IMODE(file.stat().st_mode) for file in (folder / "student").iterdir()} == {0o644}


def test_outputs_are_learnt_from_masked_text_whatever_the_others_read(folder):
    """A method that reads plain text gets none of the teacher's outputs on masked text, nor the other way round."""
    plain = {"distillation": {"inputs": "plain"}}
    for method, inputs in (("od", "masked"), ("hs-last", "plain")):
        assert distilled(folder, method, method, **plain)["training"]["inputs"] == inputs
        distilled(folder, f"{method}-alone", method, fast_paths=["fused-losses"], **plain)
        assert tiny.identical(tiny.weights(folder / method), tiny.weights(folder / f"{method}-alone"))


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
            distilled(folder, method, method)
    reference = seen["mlm"]
    assert len(reference) == 6
    for method, batches in seen.items():
        assert len(batches) == 6, method
        for batch, expected in zip(batches, reference, strict=True):
            assert all(torch.equal(batch[key], expected[key]) for key in expected), method


@pytest.mark.parametrize("method", ["mha-minilmv2", "mha-direct"])
def test_what_is_frozen_leaves_distillation_as_it_was_initialised(folder, method):
    distilled(folder, "none", "none")
    distilled(folder, "student", method)
    before, after = encoder_weights(folder / "none"), encoder_weights(folder / "student")
    frozen = above_the_projections(after)
    assert len(frozen) == 10 and all(torch.equal(after[name], before[name]) for name in frozen)
    assert not any(torch.equal(after[name], before[name]) for name in after.keys() - frozen)


def test_accumulation_through_distil_gives_the_same_student(folder):
    """Adam hides factors on gradients unless its epsilon is large."""
    students = []
    for accumulation in (1, 4):
        budget = {"accumulation_steps": accumulation, "adam_epsilon": 10.0, "steps": 2}
        distilled(folder, str(accumulation), "mha-minilmv2", distillation=budget)
        students.append(tiny.weights(folder / str(accumulation)))
    distilled(folder, "none", "none")
    before = encoder_weights(folder / "none")
    moved = 0
    for name in students[0]:
        length = (students[0][name] - before[name]).norm().item()
        moved += length > 0
        assert (students[0][name] - students[1][name]).norm().item() <= 0.02 * length + 1e-9, name
    assert moved > 10


# Bad input


def poison(folder: Path, value: float) -> None:
    model = tiny.masked_language_model()
    with torch.no_grad():
        model.bert.encoder.layer[2].attention.self.query.weight[0, 0] = value
        model.bert.encoder.layer[2].attention.self.value.weight[0, 0] = value
    model.save_pretrained(Layout(folder, "english").teacher)


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
    with pytest.raises(StudyError) as error:
        distilled(folder, "student", method, initialisation=initialisation)
    assert "\n" not in str(error.value)
    assert not (folder / "student").exists()
    assert not any((folder / "scratch" / "checkpoints").glob("*"))  # nothing to resume from into the same end


def test_a_loss_that_stops_being_finite_on_the_way(folder, monkeypatch):
    """Not at a held-out evaluation, and not at a multiple of the logging interval."""
    budget = {"evaluate_every": 100, "steps": 14, "save_every": 100}
    objective, calls = OBJECTIVES["masked_language_modelling"], itertools.count()
    original = objective.loss

    def loss(self, student, teacher, batch):
        value = original(self, student, teacher, batch)
        return value * float("nan") if torch.is_grad_enabled() and next(calls) == 13 else value

    monkeypatch.setattr(objective, "loss", loss)
    with pytest.raises(StudyError, match="nan"):
        distilled(folder, "student", "mlm", distillation=budget)
    assert not (folder / "student").exists()


def test_a_corpus_shorter_than_one_batch(folder):
    tiny.save_corpus(Layout(folder, "english").corpus, train=7)
    with pytest.raises(StudyError) as error:
        distilled(folder, "student", "mlm")
    assert all(part in str(error.value) for part in ("7 ", "batch_size", "8")) and "\n" not in str(error.value)


@pytest.mark.parametrize("method", ["none", "mlm"])
def test_an_output_that_cannot_be_written_fails_before_any_work(folder, method, capsys):
    (folder / "file").write_text("")
    with pytest.raises(StudyError, match="cannot be written"):
        distilled(folder, "file/student", method)
    assert "| step " not in capsys.readouterr().out  # an hour of training must not come before this


def test_inputs_that_do_not_exist(folder):
    layout = Layout(folder, "english")
    for missing in (layout.corpus, layout.teacher):
        missing.rename(missing.with_name("elsewhere"))
        with pytest.raises(StudyError, match=missing.name):
            distilled(folder, "student", "mlm")
        missing.with_name("elsewhere").rename(missing)


def test_a_run_of_a_plan_says_which_of_them_it_is(folder, capsys):
    runs = [tiny.run(folder, method)[0] for method in ("none", "mlm")]
    distilled(folder, "student", "mlm", "L2-H24", others=runs)
    assert "[2/2] english mlm L2-H24 seed 1 | step" in capsys.readouterr().out
    distilled(folder, "student", "od", "L2-H24", others=runs)
    assert "\nenglish od L2-H24 seed 1 | step" in "\n" + capsys.readouterr().out


def test_equal_compute_takes_the_steps_that_cost_as_much(folder):
    """A cheaper method makes more steps than the one whose operations it takes; that one itself makes as many."""
    own = tiny.parameters(folder).methods["mlm"].model_dump()
    methods = {name: own | {"equal_compute": other} for name, other in (("as-od", "od"), ("as-mlm", "mlm"))}
    steps = {name: distilled(folder, name, name, methods=methods)["training"]["steps"] for name in methods}
    assert steps["as-mlm"] == tiny.parameters(folder).distillation.steps < steps["as-od"]
