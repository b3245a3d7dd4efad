"""The interactive notebook's library on tiny models: figures, tables, errors."""

from __future__ import annotations

import pytest
import tiny
from tiny_training import distilled

from study import StudyError
from study.analysis.explore import Explorer
from study.data.pretrained import load_model
from study.evaluation.representations import relations


@pytest.fixture
def explorer(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    folder = tiny.workspace(tmp_path)
    plan = tiny.plan(folder, grid={"methods": ["mlm", "mha-minilmv2"]})
    for method in plan.params.grid.methods:
        distilled(folder, f"runs/english/students/{method}_L2-H24_1", method, "L2-H24")
    return Explorer(plan, "english")


def test_attention_of_teacher_and_student_stands_side_by_side(explorer):
    figure = explorer.attention("ax by cz", "mha-minilmv2", "L2-H24")
    titles = [axes.get_title() for axes in figure.axes]
    assert titles[:3] == [f"teacher, layer 3: {name}" for name in ("query", "key", "value")]
    assert titles[3:] == [f"MHA: MiniLMv2, L2-H24, last layer: {name}" for name in ("query", "key", "value")]
    assert all(axes.images[0].get_array().sum() == pytest.approx(5, rel=1e-4) for axes in figure.axes)  # rows sum to 1
    assert [label.get_text() for label in figure.axes[3].get_yticklabels()] == ["[CLS]", "ax", "by", "cz", "[SEP]"]


def test_maps_are_relations_and_attention_of_every_layer(explorer):
    """Attention written out from the queries and keys that hooks read: softmax(Q K^T / sqrt(d)), mean over heads."""
    maps = explorer.maps(["mha-minilmv2_L2-H24_1", "mlm_L2-H24_1"], ["ax by cz", "a b"])
    first, second = maps.sentences
    assert first.tokens == ["[CLS]", "ax", "by", "cz", "[SEP]"] and len(second.tokens) == 4
    assert first.matrices("teacher", "query").shape == (4, 5, 5)
    assert second.matrices("mlm_L2-H24_1", "value").shape == (2, 4, 4)
    model = load_model(explorer.layout.student("mlm_L2-H24_1"), "eager", head=False).eval()
    read = explorer.activations("ax by cz", model).attention
    heads = model.config.num_attention_heads
    for layer in (1, 2):
        query, key = (read[layer][name][0].unflatten(-1, (heads, -1)).transpose(0, 1) for name in ("query", "key"))
        expected = (query @ key.mT / query.shape[-1] ** 0.5).softmax(dim=-1).mean(dim=0).double().numpy()
        assert abs(first.matrices("mlm_L2-H24_1", "attention")[layer - 1] - expected).max() < 0.004
        own = relations(read[layer]["value"], maps.relation_heads)[0].mean(dim=0).double().numpy()
        assert abs(first.matrices("mlm_L2-H24_1", "value")[layer - 1] - own).max() < 0.004
    assert set(maps.hashes) == {"teacher", "mha-minilmv2_L2-H24_1", "mlm_L2-H24_1"}


def test_layers_by_layers(explorer):
    table = explorer.nearest_layers("ax by cz a b", "mlm", "L2-H24")
    assert table.shape == (2, 4) and table.index.name == "student layer"
    assert ((table >= 0) & (table <= 1 + 1e-9)).all(axis=None)


def test_predictions_stand_beside_the_teachers_where_the_student_has_a_head(explorer):
    table = explorer.predictions("ax [MASK] cz [MASK]", "mlm", "L2-H24", count=3)
    assert list(table.columns) == ["teacher", "mlm L2-H24"] and len(table) == 6
    probabilities = table["teacher"].str.extract(r"\((\d+)%\)$")[0].astype(int)
    assert probabilities.loc[1].is_monotonic_decreasing
    assert list(explorer.predictions("ax [MASK]", "mha-minilmv2", "L2-H24").columns) == ["teacher"]


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda e: e.attention("ax", "magic", "L2-H24"), "'magic' is not in the grid; allowed: mlm, mha-minilmv2"),
        (lambda e: e.attention("ax", "mlm", "L9"), "'L9' is not in the grid; allowed: L2-H24"),
        (lambda e: e.attention("ax", "mlm", "L2-H24", 9), "teacher layer 9; allowed: 1 to 4"),
        (lambda e: e.attention("", "mlm", "L2-H24"), "0 tokens; allowed: 1 to 14"),
        (lambda e: e.attention("ax " * 40, "mlm", "L2-H24"), "40 tokens; allowed: 1 to 14"),
        (lambda e: e.predictions("ax by", "mlm", "L2-H24"), r"no \[MASK\] to predict: 'ax by'"),
    ],
)
def test_what_cannot_be_shown_is_one_line(explorer, call, message):
    with pytest.raises(StudyError, match=message):
        call(explorer)
