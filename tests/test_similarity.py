"""Likeness of layers from constructed files, and what is said of it."""

from __future__ import annotations

import json

import numpy as np
import pytest
from constructed_results import change, make_study, write_grid

from study import StudyError
from study.analysis.figures.representations import layer_similarity
from study.analysis.numbers.similarity import likeness, load_similarity, sentences, write_similarity


@pytest.fixture
def study(tmp_path):
    made = make_study(tmp_path, ["none", "mlm", "od", "hs-last"], ["L3-H384"], seeds=(1, 2))
    return tmp_path, made, write_grid(made)


def test_every_pair_of_layers_is_a_row(study):
    root, made, _ = study
    table, probes = load_similarity(made.comparison, made.layout)
    assert len(table) == 4 * 2 * 2 * 4 and len(probes) == 4 * 2 * 2
    row = table.query("method == 'od' and seed == 2 and layer == 2 and teacher_layer == 4").iloc[0]
    assert row["cka"] == pytest.approx(0.58) and row["divergence"] == pytest.approx(1 + 1 - 0.58)


def test_likeness_beside_quality(study):
    """In the files both CKA and score rise with the place in the grid."""
    root, made, _ = study
    layers, probes = load_similarity(made.comparison, made.layout)
    table = likeness(layers, probes, made.analyse().macro).set_index("method")
    assert table["last_layers"].tolist() == pytest.approx([0.5, 0.54, 0.58, 0.62])
    assert table.loc["od", "macro"] == pytest.approx(62.2)
    assert table["depth_kept"].tolist() == pytest.approx([1, 1, 1, 1])
    assert table.loc["od", "divergence"] == pytest.approx(1.7)
    assert table["last_layer_adds"].tolist() == pytest.approx([-1, 0, 1, 2])
    said = sentences(table.reset_index())
    assert "hs-last (CKA 0.62); the best macro test score is that of hs-last" in said and "+1.00. To a" in said
    assert "the last layer adds most with hs-last (+2.0 points), least with none (−1.0)." in said
    write_similarity(layers, probes, table.reset_index(), root)
    assert all((root / f"{name}.csv").is_file() for name in ("layers", "probes", "likeness"))


@pytest.mark.filterwarnings("error")
def test_what_is_said_of_collapsed_layers(study):
    """`od` has collapsed last layers at one seed, then every method at both."""
    root, made, folder = study
    path = folder / "representations.json"
    models = json.loads(path.read_text())["models"]
    for model in models:
        if model["method"] == "od" and model["seed"] == 2:
            model["cka"][1] = [None] * 4
    change(path, models=models)
    layers, probes = load_similarity(made.comparison, made.layout)
    table = likeness(layers, probes, made.analyse().macro).set_index("method")
    assert table["last_layers"].tolist() == pytest.approx([0.5, 0.54, float("nan"), 0.62], nan_ok=True)
    assert table["depth_kept"].tolist() == pytest.approx([1, 1, float("nan"), 1], nan_ok=True)
    assert table["divergence"].notna().all() and table["macro"].notna().all()
    said = sentences(table.reset_index())
    assert "over 2 methods" in said and "since one gives every token the same state: od. To a" in said
    assert "nan" not in said and "least with none (−1.0)" in said
    panel = layer_similarity(layers).axes[2]
    assert np.isnan(panel.images[0].get_array().filled(np.nan)[1]).all()
    write_similarity(layers, probes, table.reset_index(), root)
    assert "od,L3-H384,2,2,4,,1.42" in (root / "layers.csv").read_text()
    for model in models:
        model["cka"] = [[None] * 4] * 2
    change(path, models=models)
    layers, probes = load_similarity(made.comparison, made.layout)
    said = sentences(likeness(layers, probes, made.analyse().macro))
    assert "most like" not in said and "none, mlm, od, hs-last. To a" in said
    layer_similarity(layers).savefig(root / "empty.png")


def test_a_missing_run_and_damaged_or_missing_files_are_named(study):
    _, made, folder = study
    path = folder / "representations.json"
    models = json.loads(path.read_text())["models"]
    change(path, models=models[:-1])
    with pytest.raises(StudyError, match="representations.json: models: hs-last L3-H384 2 is missing"):
        load_similarity(made.comparison, made.layout)
    models[0]["relation_divergence"]["query"] = [[1.0]]
    change(path, models=models)
    with pytest.raises(StudyError, match=r"relation_divergence.query is \(1, 1\); allowed: \(2, 4\)"):
        load_similarity(made.comparison, made.layout)
    path.unlink()
    with pytest.raises(StudyError, match="representations.json"):
        load_similarity(made.comparison, made.layout)
