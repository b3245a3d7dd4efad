"""Similarity of layers against values known by hand, and the file of a whole (tiny) grid."""

from __future__ import annotations

import hashlib

import pytest
import tiny
import torch
from datasets import DatasetDict
from safetensors.torch import load_file, save_file
from transformers import BertConfig, BertModel

from study import StudyError
from study.data import storage
from study.data.pretrained import load_tokenizer
from study.data.tasks import TASKS
from study.descriptions import LayerComparison, Run
from study.distillation import losses
from study.distillation.distil import distil
from study.distillation.taps import read_activations
from study.evaluation.finetune import linear_probe, splits_without_test
from study.evaluation.representations import compare_layers, linear_cka, probe_last_layers, relations, represent
from study.files import Layout
from study.records import RepresentationsResult, read_record


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
    storage.save(DatasetDict(splits), Layout(tmp_path, "english").tasks / "topic")
    return tiny.workspace(tmp_path)


def test_every_student_of_the_grid_is_compared_with_its_teacher(folder):
    plan = tiny.plan(folder, representations={"sequences": 8, "relation_sequences": 2})
    layout, (description,) = plan.layout("english"), plan.of(LayerComparison)
    for run in plan.of(Run):
        distil(run, layout, layout.student(run.model))
    result = represent(description, layout, folder / "representations.json")
    written = read_record(folder / "representations.json", RepresentationsResult, profile="test", setting="english")
    assert written == result and [model.method for model in result.models] == ["none", "mlm"]
    assert (result.sequences, result.relation_sequences, result.relation_heads) == (8, 2, 4)
    assert set(result.hashes) == {"corpus", "tasks", "teacher"}
    for model in result.models:
        assert len(model.cka) == 2 and all(len(line) == 4 for line in model.cka)
        assert all(0 <= value <= 1 for line in model.cka for value in line)
        assert set(model.relation_divergence) == {"query", "key", "value"}
        assert all(value >= 0 for matrix in model.relation_divergence.values() for line in matrix for value in line)
        assert set(model.probes) == {"topic"}
        weights = (layout.student(f"{model.method}_L2-H24_1") / "model.safetensors").read_bytes()
        assert model.weights == hashlib.sha256(weights).hexdigest()
    assert result.models[0].cka != result.models[1].cka


def test_a_collapsed_layer_costs_its_own_pairs_alone(folder, capsys):
    """The last layer of one student gives every token its bias, 0.3; the one below it is as it was."""
    plan = tiny.plan(folder, representations={"sequences": 8, "relation_sequences": 2})
    layout, (description,) = plan.layout("english"), plan.of(LayerComparison)
    for run in plan.of(Run):
        distil(run, layout, layout.student(run.model))
    whole = represent(description, layout, folder / "whole.json").models
    student = layout.student("mlm_L2-H24_1")
    weights = load_file(student / "model.safetensors")
    (norm,) = {name for name in weights if name.endswith("layer.1.output.LayerNorm.weight")}
    weights[norm] = torch.zeros_like(weights[norm])
    weights[norm.replace("weight", "bias")] = torch.full_like(weights[norm], 0.3)
    save_file(weights, student / "model.safetensors", {"format": "pt"})
    capsys.readouterr()
    represent(description, layout, folder / "representations.json")
    told = capsys.readouterr().out
    assert told.count("4 of 8 pairs of layers have no CKA: one is collapsed") == 1
    none, mlm = read_record(folder / "representations.json", RepresentationsResult).models
    assert none == whole[0] and mlm.cka == [whole[1].cka[0], [None] * 4]
    assert all(value >= 0 for matrix in mlm.relation_divergence.values() for line in matrix for value in line)
    weights[norm.replace("weight", "bias")][0] = torch.nan
    save_file(weights, student / "model.safetensors", {"format": "pt"})
    with pytest.raises(StudyError, match="mlm_L2-H24_1: its hidden states are not finite"):
        represent(description, layout, folder / "representations.json")


@pytest.mark.parametrize("size", [1e-20, 1.0, 1e6])
def test_what_is_left_by_rounding_is_no_likeness(size):
    torch.manual_seed(0)
    other = torch.randn(40, 3)
    states = torch.full((40, 3), 0.1 * size)
    assert linear_cka(states, other) is linear_cka(other, states) is None
    assert linear_cka(states + 1e-3 * size * other, other) == pytest.approx(1, abs=1e-4)


def test_a_width_that_the_teachers_heads_do_not_divide_is_compared_by_fewer_heads(folder):
    """Width 6 beside a teacher of 4 heads: 2 divide both."""
    students = {"L2-H6": {"layers": 2, "width": 6, "heads": 3, "intermediate": 12}}
    grid = {"methods": ["mlm"], "students": {"english": ["L2-H6"]}}
    sizes = {"sequences": 8, "relation_sequences": 2}
    plan = tiny.plan(folder, students=students, grid=grid, initialisation="random", representations=sizes)
    layout, (description,) = plan.layout("english"), plan.of(LayerComparison)
    for run in plan.of(Run):
        distil(run, layout, layout.student(run.model))
    result = represent(description, layout, folder / "representations.json")
    assert result.relation_heads == 2 and len(result.models[0].relation_divergence["key"]) == 2


def test_the_last_layer_is_what_the_shorter_student_lacks(folder):
    """Probes of a model of two layers against those of one built from its first layer alone."""
    (description,) = tiny.plan(folder).of(LayerComparison)
    run, layout = tiny.run(folder)
    distil(run, layout, folder / "whole")
    model = BertModel.from_pretrained(folder / "whole")
    config = model.config.to_dict() | {"num_hidden_layers": 1}
    shorter = BertModel(BertConfig.from_dict(config))
    kept = {name: value for name, value in model.state_dict().items() if "layer.1." not in name}
    shorter.load_state_dict(kept)
    shorter.save_pretrained(folder / "shorter")
    tokenizer = load_tokenizer(folder / "whole")
    splits = splits_without_test(description, layout, tokenizer, 1)
    probes = probe_last_layers(description, folder / "whole", splits, tokenizer, 1, layout.tasks)
    assert set(splits) == {"topic"} and set(splits["topic"]) == {"train", "development"}
    scores = [
        linear_probe(description, folder / name, TASKS["topic"], splits["topic"], tokenizer, 1)
        for name in ("whole", "shorter")
    ]
    probe = probes["topic"]
    assert [probe.last, probe.last_but_one] == pytest.approx(scores, abs=1e-4) and scores[0] != scores[1]


def test_a_model_is_its_own_likeness():
    model = tiny.masked_language_model()
    ids = torch.from_numpy(tiny.sequences(8, 1).astype("int64"))
    activations = read_activations(model.eval(), ids, hidden_layers=range(1, 5), attention_layers=range(1, 5))
    with torch.no_grad():
        compared = compare_layers(activations, activations, 4, 8)
    for layer in range(4):
        assert compared["cka"][layer][layer] == 1
        assert all(matrix[layer][layer] == 0 for matrix in compared["relation_divergence"].values())
