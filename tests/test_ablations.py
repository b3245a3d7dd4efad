"""Ablations: which methods are variants of which, what they change, and how it is said."""

from __future__ import annotations

import numpy as np
import pandas as pd
import pytest
from constructed_results import SPLITS, latency_result, make_study, results_of_scores, run_result, write

from study import StudyError
from study.analysis.figures.style import varied
from study.analysis.numbers.ablations import rate_variants, sentences, write_effects
from study.analysis.numbers.analysis import Analysis

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


def member(extends: str, variant: str, **changes) -> dict:
    return {"extends": extends, "variant": variant, "changes": changes}


MEMBERSHIPS = {
    "deep": member("mha-minilmv2", "from-top", teacher_layer_from_top=0),
    "deep-and-fine": member("mha-minilmv2", "both", teacher_layer_from_top=0, relation_heads=48),
    "fine": member("mha-minilmv2", "heads", relation_heads=48),
    "plain": member("mha-minilmv2", "plain", inputs="plain"),
    "none-random": member("none", "random", initialisation="random"),
}


def of_levels(seeds: int = 3, memberships: dict | None = None, **levels: float) -> Analysis:
    """Two students, two tasks; every method at its level, seed s shifted by the same small amount for all of them."""
    shift = 0.001 * np.arange(seeds)[:, None]
    own = 1e-4 * np.array([[0, 0], [1, 1], [-1, -1]])[:seeds]
    scores = {m: np.broadcast_to(levels.get(m, 0.6) + shift + k * own, (2, 2, seeds, 2)) for k, m in enumerate(OPTIONS)}
    return Analysis(results_of_scores(scores, OPTIONS, memberships or MEMBERSHIPS))


def test_variants_are_those_that_the_plan_names_with_what_they_extend():
    table = of_levels().effects
    assert list(zip(table["variant"], table["reference"], table["method"], strict=True)) == [
        ("from-top", "mha-minilmv2", "deep"),
        ("both", "mha-minilmv2", "deep-and-fine"),
        ("heads", "mha-minilmv2", "fine"),
        ("plain", "mha-minilmv2", "plain"),
        ("random", "none", "none-random"),
    ]


def test_a_variant_of_the_learning_rate_changes_nothing_else():
    memberships = MEMBERSHIPS | {
        "fine": member("mha-minilmv2", "slow", learning_rate=1e-4),
        "plain": member("mha-minilmv2", "slow-and-plain", learning_rate=1e-4, inputs="plain"),
    }
    assert rate_variants(of_levels(memberships=memberships).comparison) == ["slow"]


def test_methods_of_equal_compute_are_also_compared_with_what_they_equal():
    scores = {method: np.full((1, 2, 2, 1), level) for method, level in (("od", 0.5), ("mlm", 0.6), ("long", 0.65))}
    memberships = {"long": member("mlm", "equal-compute", equal_compute="od")}
    table = Analysis(results_of_scores(scores, {}, memberships)).effects.set_index("reference")
    assert table["effect"].to_dict() == pytest.approx({"mlm": 5, "od": 15}) and set(table["method"]) == {"long"}


def test_a_variant_of_a_variant_is_compared_with_it_alone():
    scores = {name: np.full((1, 2, 2, 1), level) for name, level in (("hs", 0.7), ("poor", 0.5), ("poor-top", 0.55))}
    memberships = {
        "poor-top": member("hs", "mapping-of-poor", initialisation="random", mapping="top"),
        "poor": member("hs", "random", initialisation="random"),
    }
    analysis = Analysis(results_of_scores(scores, {}, memberships))
    table = analysis.effects.set_index(["method", "reference"])
    assert table["effect"].to_dict() == pytest.approx({("poor-top", "poor"): 5, ("poor", "hs"): -20})
    assert varied(analysis.comparison, "poor-top", "poor") == "mapping: top"
    assert varied(analysis.comparison, "poor", "hs") == "start: random"
    assert varied(analysis.comparison, "poor-top") == "hs, start: random, mapping: top"


def test_without_ablations_the_mappings_of_the_grid_are_compared():
    hidden = {"objective": "hidden_state", "learning_rate": 0.003}
    options = {
        "hs-uniform+last": hidden | {"mapping": "uniform+last"},
        "hs-top": hidden | {"mapping": "top", "learning_rate": 0.001},
        "hs-plain": hidden | {"mapping": "top", "inputs": "plain"},
        "od": {"objective": "output_distribution"},
    }
    table = Analysis(results_of_scores({m: np.full((1, 1, 2, 1), 0.5) for m in options}, options)).effects
    assert table[["variant", "reference", "method"]].to_numpy().tolist() == [["mapping", "hs-uniform+last", "hs-top"]]


def test_an_effect_is_variant_less_reference_in_points():
    table = of_levels(**{"mha-minilmv2": 0.60, "deep": 0.58, "fine": 0.63}).effects.set_index("method")
    assert table["effect"].to_dict() == pytest.approx(
        {"deep": -2, "deep-and-fine": 0, "fine": 3, "plain": 0, "none-random": 0}
    )
    assert table.loc["deep", "macro"] == pytest.approx(58.1) and (table["runs"] == 6).all()
    assert ((table["low"] <= table["effect"]) & (table["effect"] <= table["high"])).all()
    said = sentences(table.reset_index(), "from-top")
    assert "1 of 1 variants are told apart" in said and "`deep` less `mha-minilmv2`: −2.0 points" in said
    assert said.endswith("**told apart**; learning rates 0.0003 and 0.001")
    assert (
        "0 of 1 variants are told apart" in (plain := sentences(table.reset_index(), "plain"))
        and "**told apart**" not in plain
    )
    assert "No variant was run" in sentences(table.reset_index(), "mapping")


def test_one_distillation_seed_shows_nothing():
    table = of_levels(seeds=1, deep=0.5).effects
    assert "One distillation seed" in sentences(table, "from-top")
    assert "**told apart**" not in sentences(table, "from-top") and "−10.0 points" in sentences(table, "from-top")


def test_what_is_zero_when_rounded_has_no_sign():
    said = sentences(of_levels(deep=0.59999, fine=0.60001).effects, "from-top", "heads")
    assert said.count(" 0.0 points (0.0 to 0.0)") == 2


def test_p_values_are_corrected_within_an_ablation():
    names = ("deep", "fine", "deep-and-fine")
    both = MEMBERSHIPS | {name: MEMBERSHIPS[name] | {"variant": "both"} for name in names}
    alone = of_levels(deep=0.599).effects.set_index("method")["p_holm"]
    among = of_levels(deep=0.599, memberships=both).effects.set_index("method")["p_holm"]
    assert among.max() > 0.5 and 0 < alone["deep"] < among["deep"] <= 3 * alone["deep"] + 1e-12


@pytest.fixture
def study(tmp_path):
    made = make_study(
        tmp_path, ["none", "od"], seeds=(1, 2), variants=["od-temperature-2"], ablated_students=["L3-H192"]
    )
    folder = made.layout.results
    folder.mkdir(parents=True)
    write(folder / "teacher.json", run_result("teacher", "teacher", 0, 0.8))
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
                options = made.plan.params.methods[method].model_dump()
                result["distillation"] |= {"options": options, "learning_rate": options["learning_rate"]}
            write(folder / f"{method}_{student}_{seed}.json", result)
    return tmp_path, made, folder


def test_ablations_are_compared_on_their_own_students_and_stay_out_of_the_grid(study):
    root, made, folder = study
    analysis = made.analyse()
    assert set(analysis.results.runs["method"]) == {"teacher", "none", "od"}
    assert set(analysis.results.ablations.runs["student"]) == {"teacher", "L3-H192"}
    (row,) = write_effects(analysis, root).to_dict("records")
    assert (row["variant"], row["reference"], row["method"], row["runs"]) == (
        "temperature",
        "od",
        "od-temperature-2",
        2,
    )
    assert row["effect"] == pytest.approx(5)
    written = pd.read_csv(root / "effects.csv").iloc[0]
    assert written["effect"] == pytest.approx(5)
    rate = made.plan.params.methods["od-temperature-2"].learning_rate
    assert written["learning_rate"] == rate  # not rounded
    (folder / "od-temperature-2_L3-H192_2.json").unlink()
    with pytest.raises(StudyError, match="od-temperature-2_L3-H192_2.json"):
        made.load()


def test_a_run_that_is_no_such_variant_is_refused(study):
    """The file of temperature 2 holds a run at temperature 1: its name alone does not make it one."""
    _, made, folder = study
    result = run_result("od-temperature-2", "L3-H192", 2, 0.6)
    result["distillation"]["options"] = made.plan.params.methods["od"].model_dump()
    write(folder / "od-temperature-2_L3-H192_2.json", result)
    with pytest.raises(StudyError, match=r"od-temperature-2_L3-H192_2.json.*temperature = 1.0; allowed: 2.0"):
        made.load()
