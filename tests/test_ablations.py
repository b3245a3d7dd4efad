"""Ablations: which methods are variants of which, what they change, and how it is said."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
from constructed_results import SPLITS, change_params, latency_result, make_study, results_of_scores, run_result, write

from study import StudyError, load_params
from study.analysis.ablations import ABLATIONS, Ablation, effects, found, variants, write_effects
from study.analysis.cost import Run, work
from study.analysis.results import load_results

ROOT = Path(__file__).parents[1]
MINILMV2 = {"objective": "attention_relation", "teacher_layer_from_top": 1, "relation_heads": 12, "learning_rate": 1e-3}
OPTIONS = {
    "none": {"objective": "none"},
    "mha-minilmv2": MINILMV2,
    "deep": MINILMV2 | {"teacher_layer_from_top": 0, "learning_rate": 3e-4},
    "deep-and-fine": MINILMV2 | {"teacher_layer_from_top": 0, "relation_heads": 48},
    "fine": MINILMV2 | {"relation_heads": 48, "inputs": None},
    "plain": MINILMV2 | {"inputs": "plain"},
    "none-random": {"objective": "none", "initialisation": "random"},
}


def of_levels(seeds: int = 3, **levels: float):
    """Two students, two tasks; every method at its level, seed s shifted by the same small amount for all of them."""
    shift = 0.001 * np.arange(seeds)[:, None]
    own = 1e-4 * np.array([[0, 0], [1, 1], [-1, -1]])[:seeds]
    scores = {m: np.broadcast_to(levels.get(m, 0.6) + shift + k * own, (2, 2, seeds, 2)) for k, m in enumerate(OPTIONS)}
    return results_of_scores(scores, OPTIONS)


def test_variants_are_read_from_what_was_run_not_from_names():
    results = of_levels()
    assert variants(results, "mha-minilmv2", ("teacher_layer_from_top",)) == ["deep"]
    assert variants(results, "mha-minilmv2", ("relation_heads",)) == ["fine"]
    assert variants(results, "mha-minilmv2", ("relation_heads", "teacher_layer_from_top")) == [
        "deep",
        "deep-and-fine",
        "fine",
    ]
    assert variants(results, "mha-minilmv2", ("inputs",)) == ["plain"]
    assert variants(results, "none", ("initialisation",)) == ["none-random"]
    assert variants(results, "od", ("temperature",)) == []


def test_a_learning_rate_is_varied_alone():
    options = OPTIONS | {"slow": MINILMV2 | {"learning_rate": 1e-4}}
    results = results_of_scores({method: np.full((1, 1, 2, 1), 0.5) for method in options}, options)
    assert variants(results, "mha-minilmv2", ("learning_rate",)) == ["slow"]
    assert variants(results, "mha-minilmv2", ("teacher_layer_from_top",)) == ["deep"]


def test_an_effect_is_variant_less_reference_in_points():
    levels = {"mha-minilmv2": 0.60, "deep": 0.58, "fine": 0.63}
    table = effects(of_levels(**levels)).set_index("variant")
    assert list(table.index) == ["deep", "fine", "plain", "none-random"]
    assert table["effect"].tolist() == pytest.approx([-2, 3, 0, 0])
    assert table.loc["deep", "macro"] == pytest.approx(58.1) and (table["runs"] == 6).all()
    assert ((table["low"] <= table["effect"]) & (table["effect"] <= table["high"])).all()
    said = found(table.reset_index(), "teacher_layer")
    assert "1 of 1 variants differ" in said and "`deep` less `mha-minilmv2`: -2.0 points" in said and "shown" in said
    assert said.endswith("**shown**; learning rates 0.0003 and 0.001")
    assert "0 of 1 variants differ" in (plain := found(table.reset_index(), "inputs")) and "**shown**" not in plain
    assert "No variant was run" in found(table.reset_index(), "layer_mapping")


def test_one_distillation_seed_shows_nothing():
    table = effects(of_levels(seeds=1, deep=0.5))
    assert "One distillation seed" in found(table, "teacher_layer")
    assert "**shown**" not in found(table, "teacher_layer") and "-10.0 points" in found(table, "teacher_layer")


def test_p_values_are_corrected_within_an_ablation():
    both = {"both": Ablation(("mha-minilmv2",), ("teacher_layer_from_top", "relation_heads"))}
    one = {"one": Ablation(("mha-minilmv2",), ("teacher_layer_from_top",))}
    results = of_levels(deep=0.599)
    alone, among = effects(results, one)["p_holm"], effects(results, both)["p_holm"]
    assert among.max() > 0.5 and 0 < alone[0] < among[0] <= 3 * alone[0] + 1e-12


@pytest.fixture
def study(tmp_path):
    params = make_study(tmp_path, ["none", "od"], seeds=(1, 2))
    folder = tmp_path / "reports" / "laptop" / "results" / "english"
    folder.mkdir(parents=True)
    ablated = {"english": {"methods": ["od-temperature-2"], "students": ["L3-H192"]}}
    params = change_params(tmp_path, ablations=ablated)
    write(folder / "teacher_teacher_0.json", run_result("teacher", "teacher", 0, 0.8))
    write(folder / "latency.json", latency_result(("L3-H384", "L3-H192")))
    write(folder / "tasks.json", SPLITS)
    for method, student, test in (
        ("none", "L3-H384", 0.5),
        ("none", "L3-H192", 0.5),
        ("od", "L3-H384", 0.9),
        ("od", "L3-H192", 0.6),
        ("od-temperature-2", "L3-H192", 0.65),
    ):
        for seed in (1, 2):
            result = run_result(method, student, seed, test + 0.001 * seed)
            if result["distillation"]:
                result["distillation"]["method"] = params.methods[method].model_dump(exclude_none=True)
            write(folder / f"{method}_{student}_{seed}.json", result)
    return tmp_path, params, folder


def test_ablations_are_compared_on_their_own_students_and_stay_out_of_the_grid(study):
    root, params, folder = study
    results = load_results(params, "english", root)
    assert set(results.runs["method"]) == {"teacher", "none", "od"}
    assert set(results.ablations.runs["student"]) == {"teacher", "L3-H192"}
    (row,) = write_effects(results, root).to_dict("records")
    assert (row["reference"], row["variant"], row["runs"]) == ("od", "od-temperature-2", 2)
    assert row["effect"] == pytest.approx(5)
    written = pd.read_csv(root / "effects.csv").iloc[0]
    assert written["effect"] == pytest.approx(5)
    assert written["learning_rate"] == params.methods["od-temperature-2"].learning_rate  # not rounded
    (folder / "od-temperature-2_L3-H192_2.json").unlink()
    with pytest.raises(StudyError, match="od-temperature-2_L3-H192_2.json"):
        load_results(params, "english", root)


def test_every_variant_of_the_study_differs_in_its_ablation_alone():
    """By the very rule that sorts results: each variant of the profile belongs to exactly one ablation."""
    params = load_params(ROOT / "params.yaml", profile="overnight")
    options = {name: method.model_dump(exclude_none=True) for name, method in params.methods.items()}
    for setting in params.grid.settings:
        ablations = params.grid.ablations[setting]
        methods = [*params.grid.methods, *ablations.methods]
        results = results_of_scores({m: np.zeros((1, 1, 1, 2)) for m in methods}, options)
        table = effects(results)
        assert set(ablations.methods) <= set(table["variant"]), setting
        own = table[[row.reference in ABLATIONS[row.ablation].references for row in table.itertuples()]]
        assert (table.loc[table.index.difference(own.index), ["ablation", "reference"]] == ["compute", "od"]).all(
            axis=None
        )
        rates = set(own.loc[own["ablation"] == "learning_rate", "variant"])
        assert {name for name in ablations.methods if name.endswith("-rate")} == rates
        others = [name for name in ablations.methods if name not in rates]  # those vary nothing but their rate
        assert own["variant"].value_counts().reindex(others).eq(1).all()
        for row in own[own["variant"].isin(others)].itertuples():
            assert params.methods[row.variant].objective == params.methods[row.reference].objective
            mine, its = (getattr(params.methods[m], "learning_rate", None) for m in (row.variant, row.reference))
            assert mine == its, f"{row.variant} is to be trained at the rate of {row.reference}"
        run = {"layer_mapping", "teacher_layer"} if setting == "english" else set(ABLATIONS) - {"learning_rate"}
        assert set(table["ablation"]) == run


def test_every_ablation_has_variants_in_the_parameters_run_or_not():
    """Of all methods of params.yaml, whatever a profile runs of them."""
    params = load_params(ROOT / "params.yaml")
    options = {name: method.model_dump(exclude_none=True) for name, method in params.methods.items()}
    table = effects(results_of_scores({name: np.zeros((1, 1, 1, 2)) for name in options}, options))
    assert set(table["ablation"]) == set(ABLATIONS)
    grid = {name for name in options if name in load_params(ROOT / "params.yaml", profile="laptop").grid.methods}
    assert set(options) - grid <= set(table["variant"])


def test_equal_compute_is_that_of_output_distribution_transfer():
    """Operations of all steps, the teacher's included, within a percent of those of OD."""
    params = load_params(ROOT / "params.yaml", profile="overnight")
    teacher = params.settings["multilingual"].teacher
    (student,) = params.grid.ablations["multilingual"].students
    corpus = json.loads((ROOT / "reports/laptop/results/multilingual/corpus.json").read_text())
    vocabulary = corpus["vocabulary"]["kept"]

    def operations(method: str) -> float:
        chosen = params.methods[method]
        run = Run(teacher, params.students[student], chosen, vocabulary, params.distillation.batch_size, 128)
        return work(run).flops * (getattr(chosen, "steps", None) or params.distillation.steps)

    equal = [name for name in params.methods if name.endswith("-equal-compute")]
    assert len(equal) == 4
    assert [operations(name) / operations("od") for name in equal] == pytest.approx([1] * 4, rel=0.01)
