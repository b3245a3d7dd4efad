"""Adaptation of teachers: where it starts, what it trains, when it stops."""

from __future__ import annotations

import json
import stat

import numpy as np
import pytest
import tiny
import torch
from tiny_training import adapted
from transformers import AutoModelForMaskedLM

from study import StudyError
from study.data.corpus import corpus_hash
from study.files import Layout, content_hash
from study.records import Training


@pytest.fixture
def folder(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    return tiny.workspace(tmp_path)


def test_adaptation_lowers_the_loss_ties_the_head_and_stops_by_its_criterion(folder):
    budget = {"steps": 60, "evaluate_every": 10, "min_improvement": 0.0, "learning_rate": 5e-3}
    whole = adapted(folder, "teacher", adaptation=budget)
    record = whole["training"]
    assert json.loads((folder / "teacher" / "record.json").read_text()) == whole and Training.model_validate(record)
    assert record["curve"][-1]["loss"] < record["curve"][0]["loss"] - 0.1
    model = AutoModelForMaskedLM.from_pretrained(folder / "teacher")
    assert model.get_output_embeddings().weight is model.get_input_embeddings().weight
    before, after = tiny.weights(folder / "pretrained"), tiny.weights(folder / "teacher")
    encoder = [name for name in after if name.startswith("bert.")]
    assert encoder and not any(
        torch.equal(before[name], after[name]) for name in encoder
    )  # the whole encoder is trained
    # No improvement of a hundred nats, twice in a row: the next two evaluations are compared with that at step 10.
    budget = {"steps": 60, "evaluate_every": 10, "min_improvement": 100.0, "patience": 2}
    record = adapted(folder, "early", adaptation=budget)["training"]
    assert record["steps"] == 30 and "no longer improves" in record["stopped"]


def test_a_head_alone_is_fitted_and_the_encoder_stays_bit_for_bit(folder):
    budget = {"steps": 60, "evaluate_every": 10, "min_improvement": 0.0, "learning_rate": 5e-3, "head_only": True}
    record = adapted(folder, "teacher", adaptation=budget)["training"]
    before, after = tiny.weights(folder / "pretrained"), tiny.weights(folder / "teacher")
    assert all(torch.equal(before[name], after[name]) for name in after if name.startswith("bert."))
    assert not torch.equal(after["cls.predictions.transform.dense.weight"], torch.eye(24))
    assert record["curve"][-1]["loss"] < record["curve"][0]["loss"]


def test_adaptation_starts_from_the_unigram_distribution(folder):
    """Before training, held-out loss is near the unigram entropy: far below a random head's."""
    record = adapted(folder, "teacher")["training"]
    model = tiny.masked_language_model()
    ids = torch.from_numpy(tiny.sequences(16, 2).astype(np.int64))
    random = torch.nn.functional.cross_entropy(model(input_ids=ids).logits.flatten(0, 1), ids.flatten()).item()
    assert record["curve"][0]["loss"] < random


def test_an_adaptation_that_is_not_finite(folder):
    model = tiny.masked_language_model()
    with torch.no_grad():
        model.bert.encoder.layer[2].output.dense.weight[0, 0] = float("nan")
    model.save_pretrained(Layout(folder, "english").encoder)
    with pytest.raises(StudyError, match="nan"):
        adapted(folder, "teacher")
    assert not (folder / "teacher").exists()


def test_a_teacher_is_adapted_from_the_encoder_beside_the_corpus(folder):
    encoder = Layout(folder, "english").encoder
    encoder.rename(encoder.with_name("elsewhere"))
    with pytest.raises(StudyError, match="encoder: no saved model; run the stage"):
        adapted(folder, "teacher")


def test_a_record_says_what_was_made_of_what(folder):
    record = adapted(folder, "teacher")
    layout = Layout(folder, "english")
    assert record.keys() == {"run", "hashes", "training", "environment"}
    assert record["run"] == {"setting": "english", "method": "teacher", "student": "teacher", "seed": 0}
    assert record["hashes"] == {"corpus": corpus_hash(layout.corpus), "encoder": content_hash(layout.encoder)}
    assert record["training"]["revisions"].keys() == {"head", "masked_language_modelling", "masking", "training"}
    assert {stat.S_IMODE(file.stat().st_mode) for file in (folder / "teacher").iterdir()} == {0o644}


def test_an_output_that_cannot_be_written_fails_before_any_work(folder, capsys):
    (folder / "file").write_text("")
    with pytest.raises(StudyError, match="cannot be written"):
        adapted(folder, "file/teacher")
    assert "| step " not in capsys.readouterr().out
