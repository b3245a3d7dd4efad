"""Which student to take, distilled how, and what is lost: for a budget of latency, or by score where none is timed."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pandas as pd
import xarray as xr

from study.analysis.numbers.budgets import GROUPS, Budgets, of_group
from study.analysis.numbers.results import BASELINE, FLOOR, MODEL
from study.analysis.numbers.selection import selection
from study.analysis.numbers.statistics import AXES, DISTILLATION_SEEDS, TOLD_APART, complete_array, covered, of_method
from study.analysis.numbers.tables import differences, summary
from study.analysis.numbers.tables import headline as headline_of
from study.descriptions import TEACHER

#: Name of its table among those of an analysis.
NAME = "recommendation"
#: The group of tasks that a comparison is about, beside those of :data:`budgets.GROUPS`.
FINE_TUNED = "fine-tuned"
COLUMNS = ["setting", "group", "tasks", "languages", "tokens", "budget_ms", "speed_up", "student", "method"]
COLUMNS += ["methods", "rule", "retained", "retained_low", "retained_high", "floor"]
COLUMNS += ["margin", "margin_low", "margin_high", "loss", "recommended", "because", "alike", "better"]
#: Columns of words that may be empty.
_TEXTS = ["rule", "because", "alike", "better"]
#: Columns that are numbers, undefined where nothing was measured.
_NUMBERS = ["budget_ms", "speed_up", "retained", "retained_low", "retained_high", "floor"]
_NUMBERS += ["margin", "margin_low", "margin_high", "loss"]


def recommendation(
    headline: dict[str, Any],
    scores: xr.DataArray,
    pairs: pd.DataFrame,
    place: dict[str, Any],
    latency: pd.DataFrame | None = None,
) -> pd.DataFrame:
    """What to take for every budget of latency, from the largest budget down, one row per model.

    The first row is the teacher, whose time may be there. A student comes with its best method on development data;
    what is promised is from test data. It is not recommended where it is not shown to score above the same student
    untrained, where a faster student scores as high on test data, or where one distillation seed is all there is.
    Latency: median of the smallest batch and number of threads measured, here, so budgets are better read as shares of
    the teacher's time (``speed_up``). Where nothing is timed, both are NaN and scores alone decide.

    Columns: setting; group, tasks, languages and tokens (``place``); budget_ms (the least budget that this model fits
    in), speed_up, student, method, methods (how many it was chosen among), rule (by which),
    retained, retained_low, retained_high (percent of the teacher's macro test score, with the interval of
    :func:`tables.summary`), floor (what the untrained student keeps; NaN where it was not run), margin, margin_low,
    margin_high (points of macro test score, 0-100, over the floor), loss (points below the teacher), recommended,
    because (why it is not; of one that is, what is not shown of it), alike (trained methods that the student's own is
    not told apart from, joined by commas: ``pairs``, corrected over all pairs of the student's methods), better (those
    that are told apart from it and have the higher mean on test data, which chose nothing).

    Args:
        headline: :func:`tables.headline`. scores: :func:`statistics.score_array`. pairs: their
            :func:`tables.differences`. place: group (of tasks), tasks and languages (names joined by commas) of the
            scores, and tokens that a student read. latency: :func:`tables.timed`.

    Source: this study's choice.
    """
    ceiling, rows = headline["teacher"]["test"], []
    methods = sum(method != FLOOR for method in scores["method"].to_numpy().tolist())
    shared = {"setting": headline["setting"], "rule": headline["rule"]} | place
    faster: dict[str, float] = {}
    for student, best in sorted(headline["students"].items(), key=lambda item: item[1].get("latency_ms", 0)):
        against = _against(best, faster, covered(scores) in DISTILLATION_SEEDS)
        if latency is not None:
            faster[student] = best["test"]
        row = shared | {"budget_ms": best.get("latency_ms"), "speed_up": best.get("speed_up")}
        row |= {"student": student, "method": best["method"], "methods": methods, "retained": best["retained_percent"]}
        row |= {f"retained_{end}": best[f"retained_percent_{end}"] for end in ("low", "high")}
        if FLOOR in scores["method"]:
            row |= {"floor": 100 * float(of_method(scores, FLOOR, student).mean()) / ceiling}
        row |= {f"margin{end}": best.get(f"margin_over_{FLOOR}{end}") for end in ("", "_low", "_high")}
        row |= {"loss": 100 * (ceiling - best["test"]), "recommended": not against}
        alike, better = _beside(best["method"], pairs[pairs["student"] == student])
        row |= {"because": against or _unsure(best), "alike": ",".join(alike), "better": ",".join(better)}
        rows.append(row)
    teacher = shared | {"student": TEACHER, "method": TEACHER, "retained": 100.0, "loss": 0.0, "methods": 0}
    if latency is not None:
        teacher |= {"budget_ms": 1000 * latency.loc[TEACHER, "median_seconds"], "speed_up": 1.0}
    rows.append(teacher | {"recommended": True, "because": "", "alike": "", "better": ""})
    return pd.DataFrame(rows[::-1], columns=COLUMNS).astype(dict.fromkeys(_NUMBERS, float))


def by_score(budgets: Budgets) -> pd.DataFrame:
    """:func:`recommendation` of a setting that was run at budgets of tokens, where nothing is timed.

    By every group of tasks, the mean of all first, at the budget to read first. The best method on development data is
    that over the tasks that have them. Intervals of ``retained`` leave out the teacher's chance, as of the gap.

    Raises:
        StudyError: a method lacks a task or seed that another has.
    """
    found = []
    for group in _groups(budgets):
        summed, scores, place = _of_group(budgets, group)
        headline = headline_of(budgets.comparison, summed, scores)
        found.append(recommendation(headline, scores, differences(scores), place))
    return pd.concat(found, ignore_index=True)


def choices(budgets: Budgets) -> pd.DataFrame:
    """:func:`selection.selection` by every group of tasks at the budget to read first; ``group`` and ``tokens`` too.

    Groups on which the untrained student is above the teacher are left out: there is nothing to choose for.

    Raises:
        StudyError: as :func:`by_score`.
    """
    found = []
    for group in _groups(budgets):
        summed, _, place = _of_group(budgets, group)
        found.append(selection(summed).assign(group=group, tokens=place["tokens"]))
    table = pd.concat(found, ignore_index=True)
    return table[~(table["floor"] > 100)].reset_index(drop=True)


def _groups(budgets: Budgets) -> list[str]:
    return [group for group in GROUPS[::-1] if group in {*budgets.scores["group"], "all"}]


def _of_group(budgets: Budgets, group: str) -> tuple[pd.DataFrame, xr.DataArray, dict[str, Any]]:
    """Summary, scores and place of a group's tasks at the budget to read first."""
    rows, setting, budget = of_group(budgets, group), budgets.comparison.setting, budgets.first
    seeds = rows.loc[(rows["budget"] == budget) & ~rows["method"].isin([TEACHER, FLOOR]), "seed"].unique()
    kept = (rows["budget"] == budget) | (rows["method"] == FLOOR)
    own = rows[kept & (rows["method"] != TEACHER) & rows["seed"].isin(seeds)]
    own = own.rename(columns={"seed": "distillation_seed"})
    scores = complete_array(own.set_index(["method", *AXES])["score"], f"budget {budget}")
    ceiling = rows[rows["method"] == TEACHER]
    means = ceiling.groupby("task", sort=False)["score"].mean().to_xarray()
    teacher = means.expand_dims(finetuning_seed=scores["finetuning_seed"].to_numpy())  # taken as it is: no chance
    every = pd.concat([ceiling.rename(columns={"seed": "distillation_seed"}), own]).assign(setting=setting)
    runs = every.groupby([*MODEL, "distillation_seed", "task"], sort=False)[["development", "score"]].mean()
    macro = runs.groupby([*MODEL, "distillation_seed"], sort=False).mean().reset_index()
    macro = macro.rename(columns={"score": "test"}).assign(retained=lambda table: table["test"] / float(teacher.mean()))
    languages = dict.fromkeys(name for scored in own["languages"] for name in scored)
    place: dict[str, Any] = {"group": group, "tasks": ",".join(own["task"].unique())}
    place |= {"languages": ",".join(languages), "tokens": budgets.tokens[budget]}
    return summary(macro, scores, teacher), scores, place


def read_recommendations(folders: Sequence[Path]) -> pd.DataFrame:
    """The tables ``recommendation.csv`` of some folders, one below the other; folders without one are left out.

    A column of words that a table lacks, as one written by an earlier version does, is empty.
    """
    files = [folder / f"{NAME}.csv" for folder in folders]
    tables = [pd.read_csv(file, dtype=dict.fromkeys(_TEXTS, str)) for file in files if file.is_file()]
    if not tables:
        return pd.DataFrame(columns=COLUMNS)
    table = pd.concat(tables, ignore_index=True).reindex(columns=COLUMNS)
    table = table.astype(dict.fromkeys(_NUMBERS, float) | dict.fromkeys(_TEXTS, object))
    return table.fillna(dict.fromkeys(_TEXTS, ""))


def _against(best: dict[str, Any], faster: dict[str, float], several_seeds: bool) -> str:
    """Why a student is not recommended; empty if it is."""
    reasons = [f"{student} is faster and scores as high" for student, test in faster.items() if test >= best["test"]]
    if f"margin_over_{FLOOR}" in best and not (best[f"margin_over_{FLOOR}_low"] or 0) > 0:
        reasons.append("not shown above the untrained student")
    if not several_seeds:
        reasons.append("one distillation seed")
    return "; ".join(reasons)


def _unsure(best: dict[str, Any]) -> str:
    known = f"margin_over_{BASELINE}" in best
    unsure = known and not (best[f"margin_over_{BASELINE}_low"] or 0) > 0
    return "not shown to beat training without a teacher" if unsure else ""


def _beside(best: str, table: pd.DataFrame) -> tuple[list[str], list[str]]:
    """Trained methods that the student's best one is not told apart from, and those shown better, in the grid's order.

    Args:
        table: the student's pairs.
    """
    pairs = table[((table["first"] == best) | (table["second"] == best)) & (table["first"] != FLOOR)]
    pairs = pairs[pairs["second"] != FLOOR]
    own = pairs["first"] == best
    told = (pairs["p_holm"] <= TOLD_APART) & pairs["covers"].isin(DISTILLATION_SEEDS)
    others = pairs["second"].where(own, pairs["first"])
    ahead = pairs["effect"].where(~own, -pairs["effect"])
    return others[~told].tolist(), others[told & (ahead > 0)].tolist()
