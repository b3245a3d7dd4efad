"""Verdicts on constructed results whose answer is known: three outcomes of every claim, and why none is given."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pandas as pd
import pytest
from constructed_results import make_study, results_of_scores, run_result, write, write_grid
from scipy import stats

from study.analysis import presentation
from study.analysis.numbers import claims as module
from study.analysis.numbers.analysis import Analysis
from study.analysis.numbers.claims import CLAIMS, HS, ONE_TO_N, Claim, Contrast
from study.analysis.numbers.statistics import score_array
from study.analysis.numbers.tables import write_comparison
from study.analysis.numbers.text import p_value, rate

#: Every claim holds in these scores, all by half a point or more. Layers are those of the MHA variants, from the top.
LEVELS = {"none": 0.55, "mlm": 0.56, "od": 0.60} | dict.fromkeys(HS, 0.640) | dict.fromkeys(ONE_TO_N, 0.645)
LEVELS |= {"mha-minilmv2": 0.652, "mha-direct": 0.651}
LEVELS |= {f"{variant}-{layer}": 0.65 for variant in ("relations", "direct") for layer in (2,)}
LEVELS |= {f"{variant}-{layer}": 0.62 for variant in ("relations", "direct") for layer in (0, 3)}
RELATIONS = {"objective": "attention_relation", "learning_rate": 0.003, "relation_heads": 12}
DIRECT = {"objective": "direct_attention", "learning_rate": 0.0003}
OPTIONS = {"mha-minilmv2": RELATIONS | {"teacher_layer_from_top": 1}}
OPTIONS |= {"mha-direct": DIRECT | {"teacher_layer_from_top": 1}}
BASES = {"relations": "mha-minilmv2", "direct": "mha-direct"}


def layer_variant(method: str) -> tuple[dict, dict]:
    """Options and membership of relations-<k> or direct-<k>: another teacher layer, k from the top."""
    family, layer = method.split("-")
    changes = {"teacher_layer_from_top": int(layer)}
    options = (RELATIONS | {"learning_rate": 0.001} if family == "relations" else DIRECT) | changes
    return options, {"extends": BASES[family], "variant": "from-top", "changes": changes}


def constructed(changes: dict | None = None, noise: float = 0.0005, seeds: int = 3, finetunings: int = 2, without=()):
    """Three students, two tasks; each model's macro is its level plus noise that sums to zero over its seeds."""
    generator = np.random.default_rng(0)
    scores = {}
    for method, level in (LEVELS | (changes or {})).items():
        chance = generator.normal(size=(3, 2, seeds, finetunings))
        chance -= chance.mean(axis=(2, 3), keepdims=True)
        scores[method] = level + noise * chance
    kept = {method: own for method, own in scores.items() if method not in without}
    layers = {method: layer_variant(method) for method in kept if method.split("-")[0] in BASES}
    options = OPTIONS | {method: own for method, (own, _) in layers.items()}
    return results_of_scores(kept, options, {method: member for method, (_, member) in layers.items()})


def verdicts(results) -> pd.DataFrame:
    return Analysis(results).verdicts


def contrasts(results) -> pd.DataFrame:
    return Analysis(results).contrasts


def judged(*arguments, **keywords) -> pd.DataFrame:
    return verdicts(constructed(*arguments, **keywords)).set_index("claim")


def test_results_in_which_the_paper_is_right_support_every_claim():
    table = judged()
    assert table["verdict"].to_dict() == {f"D{place}": "supported" for place in range(1, 8)}
    assert (table["reason"] == "").all() and (table["p"] <= 0.025).all()
    assert (table["low"] < table["effect"]).all() and (table["effect"] < table["high"]).all()
    assert set(table["figure"]) == {"claims"} and set(table["covers"]) == {"distillation and fine-tuning seeds"}


WRONG = {
    "D1": {"hs-top": 0.66},
    "D2": {"mha-direct": 0.60},
    "D3": dict.fromkeys(ONE_TO_N, 0.62),
    "D4": {"od": 0.66},
    "D5": {"direct-0": 0.67},
    "D6": {"mha-direct": 0.67},
    "D7": {"hs-last": 0.62},
}


@pytest.mark.parametrize("claim", WRONG)
def test_results_in_which_a_claim_is_wrong_contradict_it(claim):
    table = judged(WRONG[claim])
    assert table.loc[claim, "verdict"] == "contradicted" and table.loc[claim, "reason"] == ""
    assert table.loc[claim, "p"] <= 0.025
    untouched = {"D4": ["D2", "D3", "D5", "D6", "D7"], "D5": ["D1", "D2", "D3", "D4", "D6", "D7"]}
    assert (table.loc[untouched.get(claim, []), "verdict"] == "supported").all()


def test_a_loss_is_no_gain():
    """D6 denies a gain: DirectMiniLM far below MiniLMv2 bears it out."""
    table = judged({"mha-direct": 0.60})
    assert table.loc["D6", "verdict"] == "supported" and table.loc["D6", "effect"] == pytest.approx(5.2)


@pytest.mark.parametrize(("level", "verdict"), [(0.62, "supported"), (0.75, "contradicted")])
def test_lower_teacher_layers_count_where_they_were_run(level, verdict):
    changes = {f"{variant}-{layer}": level for variant in ("relations", "direct") for layer in (4, 5)}
    results = constructed(changes)
    assert verdicts(results).set_index("claim").loc["D5", "verdict"] == verdict
    assert (contrasts(results)["claim"] == "D5").sum() == 8 and (contrasts(constructed())["claim"] == "D5").sum() == 4


def test_methods_that_do_not_beat_no_training_are_named():
    table = judged({"none": 0.61})
    assert table["verdict"].tolist() == ["supported"] * 7
    assert table.loc["D4", "not_above_floor"] == "od" and table.loc["D7", "not_above_floor"] == ""
    assert judged(without=["none"])["not_above_floor"].tolist() == [""] * 7


@pytest.mark.parametrize("claim", WRONG)
def test_too_much_noise_leaves_a_claim_undecided_whether_right_or_wrong(claim):
    for changes in ({}, WRONG[claim]):
        results = constructed(changes, noise=0.3)
        row, own = verdicts(results).set_index("claim").loc[claim], contrasts(results).query("claim == @claim")
        names = own.loc[own["shown"] == "undecided", "contrast"].tolist()
        told = ", ".join(names) if len(names) <= 2 else f"{len(names)} of {len(own)} contrasts"
        assert row["verdict"] == "undecided" and row["contrast"] in names
        assert row["reason"].partition("; ")[0] == f"not shown either way: {told}"
        assert row["high"] - row["low"] > 2


@pytest.mark.parametrize(("finetunings", "reason"), [(3, "covers fine-tuning seeds only"), (1, "no interval")])
def test_one_distillation_seed_judges_nothing(finetunings, reason):
    for changes in ({}, WRONG["D1"]):
        table = judged(changes, seeds=1, finetunings=finetunings)
        assert set(table["verdict"]) == {"undecided"}
        assert (
            table["reason"].str.startswith("one distillation seed").all() and table["reason"].str.contains(reason).all()
        )
        assert set(table["covers"]) == {"fine-tuning seeds only"} and table["effect"].notna().all()


@pytest.mark.parametrize(
    ("seeds", "finetunings", "said"),
    [
        (3, 2, "distillation and fine-tuning seeds"),
        (3, 1, "distillation seeds, one fine-tuning of each"),
        (1, 2, "fine-tuning seeds only"),
    ],
)
def test_tables_name_the_seeds_that_their_intervals_cover(seeds, finetunings, said):
    analysis = Analysis(constructed(seeds=seeds, finetunings=finetunings))
    assert presentation.verdicts(analysis).caption.endswith(f"intervals over {said}.")
    assert set(analysis.verdicts["covers"]) == set(analysis.aggregates["covers"]) == {said}
    assert (analysis.verdicts["verdict"] != "undecided").any() == (seeds > 1)


@pytest.mark.parametrize(
    ("gone", "missing"),
    [
        ("od", {"D1": "od", "D4": "od"}),
        ("hs-top", {claim: "hs-top" for claim in ("D1", "D2", "D3", "D4", "D7")}),
        ("relations-3", {"D5": "mha-minilmv2@L_T-3"}),
        ("mha-direct", {claim: "mha-direct" for claim in ("D1", "D2", "D4", "D6")} | {"D5": "mha-direct@L_T-1"}),
    ],
)
def test_what_was_not_run_is_named_and_leaves_other_claims_alone(gone, missing):
    table = judged(without=[gone])
    for claim, row in table.iterrows():
        if claim in missing:
            assert row["verdict"] == "undecided" and row["reason"].startswith(f"not run: {missing[claim]}")
        else:
            assert row["verdict"] == "supported"


def test_a_grid_without_any_of_the_methods_has_a_row_for_every_claim():
    table = judged(without=[method for method in LEVELS if method not in ("none", "mlm")])
    assert set(table["verdict"]) == {"undecided"} and table["effect"].isna().all() and (table["runs"] == 0).all()


def test_teacher_layers_are_those_of_variants_that_change_the_layer_alone():
    """Another number of relation heads is another method: at layer L_T-2 it does not stand in for the missing one."""
    results = constructed()
    comparison = results.ablations.comparison
    other = comparison.memberships["relations-2"]
    other = other.model_copy(update={"changes": other.changes | {"relation_heads": 48}})
    comparison = comparison.model_copy(update={"memberships": comparison.memberships | {"relations-2": other}})
    results = replace(results, ablations=replace(results.ablations, comparison=comparison))
    row = verdicts(results).set_index("claim").loc["D5"]
    assert row["verdict"] == "undecided" and row["reason"] == "not run: mha-minilmv2@L_T-2"


def single(test: str, difference, *others, margin=1.0):
    """Verdict on one claim of contrasts a - b, given the differences (points) of three distillation seeds."""
    columns = [difference, *others]
    scores = {"b": np.full((1, 1, 3, 1), 0.5)}
    scores |= {f"a{place}": 0.5 + np.reshape(own, (1, 1, 3, 1)) / 100 for place, own in enumerate(columns)}
    claim = Claim("X", "text", "made up", tuple(Contrast(f"a{p}", "b", test, margin) for p in range(len(columns))))
    results = results_of_scores(scores)
    named = module.claim_scores(results, score_array(results), None)
    table = module.contrasts(named, (claim,))
    return module.verdicts(named, table, (claim,)).iloc[0], table


def around(low: float, high: float) -> list[float]:
    """Three values whose 95 % interval is low to high: mean -+ t s / sqrt(3), s of mean - d, mean, mean + d being d."""
    step = (high - low) / 2 * 3**0.5 / stats.t.ppf(0.975, 2)
    return [(low + high) / 2 + shift for shift in (-step, 0, step)]


@pytest.mark.parametrize(
    ("test", "interval", "verdict"),
    [
        ("superior", (0.1, 3), "supported"),
        ("superior", (-3, -0.1), "contradicted"),
        ("superior", (-0.1, 3), "undecided"),
        ("superior", (-3, 0.1), "undecided"),
        ("non-inferior", (-0.9, 3), "supported"),
        ("non-inferior", (-0.9, -0.1), "supported"),
        ("non-inferior", (-3, -1.1), "contradicted"),
        ("non-inferior", (-1.1, 3), "undecided"),
        ("equivalent", (-0.9, 0.9), "supported"),
        ("equivalent", (0.1, 0.9), "supported"),
        ("equivalent", (1.1, 3), "contradicted"),
        ("equivalent", (-3, -1.1), "contradicted"),
        ("equivalent", (-1.1, 0.9), "undecided"),
        ("equivalent", (-0.9, 1.1), "undecided"),
        ("equivalent", (-3, 3), "undecided"),
    ],
)
def test_a_single_contrast_is_judged_by_its_interval_and_region(test, interval, verdict):
    row, _ = single(test, around(*interval))
    assert (row["low"], row["high"]) == pytest.approx(interval)
    assert row["verdict"] == verdict
    assert row["effect"] == pytest.approx(sum(interval) / 2) and row["runs"] == 6 and row["finetunings"] == 6


def test_the_margin_is_the_claims_own():
    assert single("equivalent", around(-0.4, 0.4), margin=0.5)[0]["verdict"] == "supported"
    assert single("equivalent", around(-0.6, 0.4), margin=0.5)[0]["verdict"] == "undecided"


def test_failures_are_corrected_over_the_claims_contrasts_and_successes_need_none():
    fails, holds = around(-3, -0.1), around(0.1, 3)
    alone, table = single("superior", fails)
    assert alone["verdict"] == "contradicted" and 0.0125 < table["p_outside"].item() < 0.025
    together, table = single("superior", around(-1.4, -0.1), holds)  # pooled: as sure as the one above is alone
    assert table["high"].min() < 0 and together["verdict"] == "undecided" and 0.025 < table["p_outside"].min() < 0.05
    assert single("superior", holds, holds, holds)[0]["verdict"] == "supported"
    assert single("superior", [-3, -3.01, -2.99], holds)[0]["verdict"] == "contradicted"


def test_the_interval_beside_a_verdict_agrees_with_it():
    """Of a supported claim it lies above zero, of a contradicted one below, of an undecided one around."""
    generator, seen = np.random.default_rng(0), set()
    for _ in range(150):
        ends = generator.normal(size=(generator.integers(1, 4), 2)).cumsum(axis=1) * [1, 2]
        row, _ = single("superior", *(around(low, low + abs(width) + 0.05) for low, width in ends))
        seen.add(row["verdict"])
        sides = {"supported": row["low"] > 0, "contradicted": row["high"] < 0}
        assert sides.get(row["verdict"], row["low"] <= 0 <= row["high"]), row
    assert seen == {"supported", "contradicted", "undecided"}


def test_the_contrast_that_settles_a_claim_is_the_weakest_or_the_one_that_fails():
    row, _ = single("superior", around(1, 3), around(0.1, 3))
    assert row["verdict"] == "supported" and row["contrast"] == "a1 − b"
    row, _ = single("superior", around(0.1, 3), around(-3.01, -2.99))
    assert row["verdict"] == "contradicted" and row["contrast"] == "a1 − b"


def test_methods_shown_to_be_close_are_told_from_those_of_which_nothing_is_known():
    close, _ = single("superior", around(-0.3, 0.4))
    far, _ = single("superior", around(-0.3, 4))
    assert close["verdict"] == far["verdict"] == "undecided"
    assert close["reason"].endswith("; less than 1 point apart: a0 − b") and "apart" not in far["reason"]


def test_rates_and_small_p_values_are_written_without_exponents_or_zeros():
    rates = (3e-05, 3e-4, 0.001, 0.01, float("nan"))
    assert [rate(value) for value in rates] == ["0.00003", "0.0003", "0.001", "0.01", "–"]
    assert [p_value(value) for value in (0.0002, 0.0564, 1.0, float("nan"))] == ["< 0.001", "0.056", "1.000", "–"]


def test_many_undecided_contrasts_are_counted_instead_of_named():
    few, _ = single("superior", around(-2, 3), around(-2, 3), around(2, 3))
    assert few["reason"] == "not shown either way: a0 − b, a1 − b"
    many, _ = single("superior", *[around(-3, 3)] * 3, around(2, 3))
    assert many["reason"] == "not shown either way: 3 of 4 contrasts"


def test_groups_are_means_of_their_methods():
    row = contrasts(constructed(noise=0)).set_index(["claim", "contrast"]).loc[("D2", "mha-minilmv2 − HS")]
    assert row["effect"] == pytest.approx(65.2 - (3 * 64.0 + 2 * 64.5) / 5)
    assert row["runs"] == 6 * 9 and row["finetunings"] == 6 * 9 * 2 * 2


def test_claims_are_complete_and_every_group_is_used():
    assert [claim.id for claim in CLAIMS] == [f"D{place}" for place in range(1, 8)]
    sides = {side for claim in CLAIMS for contrast in claim.contrasts for side in (contrast.first, contrast.second)}
    assert set(module.GROUPS) <= sides


def test_tables_are_written(tmp_path):
    tables = module_tables(tmp_path)
    assert set(tables) >= {"verdicts", "contrasts", "differences", "aggregates"}
    assert tables["verdicts"]["claim"].tolist() == [f"D{place}" for place in range(1, 8)]
    assert set(tables["contrasts"]["claim"]) == set(tables["verdicts"]["claim"])


def module_tables(folder) -> dict[str, pd.DataFrame]:
    """The tables that a comparison of a whole study writes."""
    study = make_study(folder, seeds=(1, 2, 3), variants=["from-top"], ablated_students=["L3-H192"])
    write_grid(study)
    for method, student, seed in study.comparison.ablation_cells():
        result = run_result(method, student, seed, 0.6 + 0.004 * seed)
        write(study.layout.result(f"{method}_{student}_{seed}"), result)
    paths = write_comparison(study.analyse(), folder / "tables")
    return {path.stem: pd.read_csv(path) for path in paths if path.suffix == ".csv"}


def test_the_floor_is_that_of_the_students_a_variant_was_run_on():
    """The floor is far lower on student 0, on which variants were run, than on student 1: they beat theirs."""
    chance = 0.0005 * np.array([-1, 0, 1])[None, None, :, None]
    floor = np.stack([np.full((2, 3, 2), 0.40), np.full((2, 3, 2), 0.70)]) + chance
    grid = {"none": floor, "mha-minilmv2": floor + 0.05, "mha-direct": floor + 0.05}
    layers = {f"{family}-{layer}": floor[:1] + 0.05 for family in BASES for layer in (0, 2, 3)}
    described = {method: layer_variant(method) for method in layers}
    options = OPTIONS | {method: own for method, (own, _) in described.items()}
    memberships = {method: member for method, (_, member) in described.items()}
    whole = results_of_scores(grid, options)
    varied = results_of_scores({m: own[:1] for m, own in grid.items()} | layers, options, memberships)
    judged = Analysis(replace(whole, ablations=varied.ablations)).verdicts.set_index("claim")
    assert judged.loc["D5", "not_above_floor"] == ""
