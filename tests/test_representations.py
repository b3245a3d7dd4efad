"""Similarity of layers against values known by hand, and the file of a whole (tiny) grid."""

from __future__ import annotations

import json

import pytest
import tiny
import torch
from datasets import DatasetDict
from transformers import BertConfig, BertModel

from study import losses
from study.data import tasks
from study.data.tasks import TASKS
from study.evaluation.representations import linear_cka, probe_last_layers, relations, represent
from study.models.taps import read
from study.models.teachers import load_tokenizer
from study.training.distill import distil
from study.training.finetune import linear_probe
from study.training.tune import splits_without_test


def test_alignment_by_hand():
    """Centred: x = (-1, 0, 1), y = (1, -2, 1): orthogonal; 5 - 7 x is x but for shift and scale."""
    x, y = torch.tensor([[1.0], [2.0], [3.0]]), torch.tensor([[3.0], [0.0], [3.0]])
    assert linear_cka(x, y) == pytest.approx(0)
    assert linear_cka(x, torch.cat([5 - 7 * x, torch.ones(3, 1)], dim=1)) == pytest.approx(1)
    # x against (x, y): |y'x|^2 = 2^2 + 0, |x'x| = 2, |(x y)'(x y)| = sqrt(2^2 + 6^2)
    assert linear_cka(x, torch.cat([x, y], dim=1)) == pytest.approx(4 / (2 * 40**0.5))


def test_alignment_does_not_see_rotations():
    torch.manual_seed(0)
    x = torch.randn(50, 6)
    rotation, _ = torch.linalg.qr(torch.randn(6, 6))
    assert linear_cka(x, 3 * x @ rotation + 1) == pytest.approx(1)
    assert linear_cka(x, torch.randn(50, 6)) < 0.5


def test_relations_are_those_of_the_loss():
    torch.manual_seed(0)
    student, teacher = torch.randn(2, 5, 8), torch.randn(2, 5, 12)
    own, other = relations(student, 4), relations(teacher, 4)
    assert own.shape == (2, 4, 5, 5) and torch.allclose(own.sum(-1), torch.ones(2, 4, 5))
    divergence = (other * (other.log() - own.log())).sum() / (2 * 4 * 5)
    assert losses.attention_relation(student, teacher, 4).item() == pytest.approx(divergence.item(), rel=1e-5)


@pytest.fixture
def folder(tmp_path, monkeypatch):
    """A folder to run in, with the task topic."""
    monkeypatch.chdir(tmp_path)
    splits = {"train": tiny.sentences(96, 1), "development": tiny.sentences(48, 2)}
    tasks.save(DatasetDict(splits), tmp_path / "runs" / "test" / "english" / "tasks" / "topic")
    return tiny.workspace(tmp_path)


def test_every_student_of_the_grid_is_compared_with_its_teacher(folder):
    params = tiny.parameters(folder, representations={"sequences": 8, "relation_sequences": 2})
    runs = folder / "runs" / "test" / "english"
    for method in params.grid.methods:
        distil(params, "english", method, "L2-H24", 1, runs / "students" / f"{method}_L2-H24_1")
    found = represent(params, "english", folder / "representations.json")
    written = json.loads((folder / "representations.json").read_text())
    assert written["models"] == found and [row["method"] for row in found] == ["none", "mlm"]
    assert (written["sequences"], written["relation_heads"]) == (8, 4)
    for row in found:
        assert len(row["cka"]) == 2 and all(len(line) == 4 for line in row["cka"])
        assert all(0 <= value <= 1 for line in row["cka"] for value in line)
        assert all(value >= 0 for matrix in row["relation_divergence"].values() for line in matrix for value in line)
        assert set(row["probes"]) == {"topic"} and set(row["probes"]["topic"]) == {"last", "last_but_one"}
    assert found[0]["cka"] != found[1]["cka"]


def test_the_last_layer_is_what_the_shorter_student_lacks(folder):
    """Probes of a model of two layers against those of one built from its first layer alone."""
    params = tiny.parameters(folder)
    distil(params, "english", "mlm", "L2-H24", 1, folder / "whole")
    model = BertModel.from_pretrained(folder / "whole")
    config = model.config.to_dict() | {"num_hidden_layers": 1}
    shorter = BertModel(BertConfig.from_dict(config))
    kept = {name: value for name, value in model.state_dict().items() if "layer.1." not in name}
    shorter.load_state_dict(kept)
    shorter.save_pretrained(folder / "shorter")
    tokenizer = load_tokenizer(folder / "whole")
    splits = splits_without_test(params, "english", tokenizer, 1)
    probes = probe_last_layers(params, folder / "whole", splits, tokenizer, 1)
    assert set(splits) == {"topic"} and set(splits["topic"]) == {"train", "development"}
    scores = [
        linear_probe(params, folder / place, TASKS["topic"], splits["topic"], tokenizer, 1)
        for place in ("whole", "shorter")
    ]
    assert list(probes["topic"].values()) == pytest.approx(scores, abs=1e-4) and scores[0] != scores[1]


def test_a_model_is_its_own_likeness(tmp_path):
    from study.evaluation.representations import compare_layers

    model = tiny.masked_language_model()
    ids = torch.from_numpy(tiny.sequences(8, 1).astype("int64"))
    readings = read(model.eval(), ids, hidden_layers=range(1, 5), attention_layers=range(1, 5))
    with torch.no_grad():
        compared = compare_layers(readings, readings, 4, 8)
    for layer in range(4):
        assert compared["cka"][layer][layer] == 1
        assert all(matrix[layer][layer] == 0 for matrix in compared["relation_divergence"].values())
