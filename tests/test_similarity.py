"""Likeness of layers from constructed files, and what is said of it."""

from __future__ import annotations

import json

import pytest
from constructed_results import change, make_study, write_grid

from study import StudyError
from study.analysis import figures
from study.analysis.results import load_results
from study.analysis.similarity import found, likeness, load_similarity, write_similarity


@pytest.fixture
def study(tmp_path):
    params = make_study(tmp_path, ["none", "mlm", "od", "hs-last"], ["L3-H384"], seeds=(1, 2))
    return tmp_path, params, write_grid(tmp_path, params)


def test_every_pair_of_layers_is_a_row(study):
    root, params, _ = study
    table = load_similarity(params, "english", root)
    assert len(table) == 4 * 2 * 2 * 4
    row = table.query("method == 'od' and seed == 2 and layer == 2 and teacher_layer == 4").iloc[0]
    assert row["cka"] == pytest.approx(0.58) and row["divergence"] == pytest.approx(1 + 1 - 0.58)


def test_likeness_beside_quality(study):
    """In the files both CKA and score rise with the place in the grid."""
    root, params, _ = study
    layers = load_similarity(params, "english", root)
    table = likeness(layers, load_results(params, "english", root)).set_index("method")
    assert table["last_layers"].tolist() == pytest.approx([0.5, 0.54, 0.58, 0.62])
    assert table.loc["od", "macro"] == pytest.approx(62.2)
    assert table["depth_kept"].tolist() == pytest.approx([1, 1, 1, 1])
    assert table.loc["od", "divergence"] == pytest.approx(1.7)
    said = found(table.reset_index())
    assert "`hs-last` (CKA 0.62); the best macro test score has `hs-last`" in said and "3 methods: +1.00" in said
    write_similarity(layers, table.reset_index(), root)
    assert (root / "layers.csv").is_file() and (root / "likeness.csv").is_file()


def test_a_missing_run_and_a_damaged_file_are_named(study):
    root, params, folder = study
    path = folder / "representations.json"
    models = json.loads(path.read_text())["models"]
    change(path, models=models[:-1])
    with pytest.raises(StudyError, match="representations.json: models: hs-last L3-H384 2 is missing"):
        load_similarity(params, "english", root)
    models[0]["relation_divergence"]["query"] = [[1.0]]
    change(path, models=models)
    with pytest.raises(StudyError, match=r"relation_divergence.query is \(1, 1\); allowed: \(2, 4\)"):
        load_similarity(params, "english", root)


def test_results_without_compared_layers_stay_readable(study):
    root, params, folder = study
    (folder / "representations.json").unlink()
    layers = load_similarity(params, "english", root)
    table = likeness(layers, load_results(params, "english", root))
    assert layers.empty and table.empty and "not compared" in found(table)
    assert figures.layer_similarity(layers) is None and figures.relation_divergence(layers, None) is None
    write_similarity(layers, table, root)
    assert (root / "layers.csv").read_text().startswith("method,student,seed,layer,teacher_layer")
