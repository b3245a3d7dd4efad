"""For a latency budget: which student, distilled how, and what is lost."""

from __future__ import annotations

from typing import Any

import pandas as pd
import xarray as xr

from study.analysis.numbers.results import BASELINE, FLOOR, Results
from study.analysis.numbers.statistics import (
    BOTH_SEEDS,
    TOLD_APART,
    by_method,
    covered,
    holm,
    of_method,
    pool,
    two_sided,
)
from study.analysis.numbers.tables import timed
from study.descriptions import TEACHER

COLUMNS = ["setting", "budget_ms", "speed_up", "student", "method", "retained", "retained_low", "retained_high"]
COLUMNS += ["floor", "loss", "recommended", "because", "alike"]


def recommendation(results: Results, headline: dict[str, Any], scores: xr.DataArray) -> pd.DataFrame:
    """What to take for every budget of latency, from the largest budget down, one row per model.

    The first row is the teacher, whose time may be there. A student comes with its best method on development data;
    what is promised is from test data. It is not recommended where it is not shown to score above the same student
    untrained, where a faster student scores as high on test data, or where one distillation seed is all there is.
    Latency: median of the smallest batch and number of threads measured, here, so budgets are better read as shares of
    the teacher's time (``speed_up``).

    Columns: setting, budget_ms (the least budget that this model fits in), speed_up, student, method, retained,
    retained_low, retained_high (percent of the teacher's macro test score, with the interval of
    :func:`tables.summary`), floor (what the untrained student keeps; NaN where it was not run), loss (points of macro
    test score, 0-100, below the teacher), recommended, because (why it is not; of one that is, what is not shown of
    it), alike (tuple of trained methods that the student's own is not told apart from: the paired difference has a
    p-value above 5 %, Holm-corrected over these methods, or an undefined one, or there is one distillation seed).

    Args:
        headline: of the results (:func:`tables.headline`). scores: :func:`statistics.score_array`.

    Source: this study's choice.
    """
    ceiling, rows = headline["teacher"]["test"], []
    faster: dict[str, float] = {}
    for student, best in sorted(headline["students"].items(), key=lambda item: item[1]["latency_ms"]):
        against = _against(best, faster, covered(scores) == BOTH_SEEDS)
        faster[student] = best["test"]
        floor = float("nan")
        if FLOOR in scores["method"]:
            floor = 100 * float(of_method(scores, FLOOR, student).mean()) / ceiling
        row = {"setting": headline["setting"], "budget_ms": best["latency_ms"], "speed_up": best["speed_up"]}
        row |= {"student": student, "method": best["method"], "retained": best["retained_percent"]}
        row |= {f"retained_{end}": best[f"retained_percent_{end}"] for end in ("low", "high")}
        row |= {"floor": floor, "loss": 100 * (ceiling - best["test"]), "recommended": not against}
        row |= {"because": against or _unsure(best), "alike": _alike(best["method"], student, scores)}
        rows.append(row)
    latency = timed(results).loc[TEACHER, "median_seconds"]
    teacher = {"setting": headline["setting"], "budget_ms": 1000 * latency}
    teacher |= {"speed_up": 1.0, "student": TEACHER, "method": TEACHER, "retained": 100.0, "loss": 0.0}
    rows.append(teacher | {"recommended": True, "because": "", "alike": ()})
    table = pd.DataFrame(rows[::-1], columns=COLUMNS)
    return table.astype({name: float for name in ("retained_low", "retained_high", "floor")})


def _against(best: dict[str, Any], faster: dict[str, float], several_seeds: bool) -> str:
    """Why a student is not recommended; empty if it is."""
    reasons = [f"{student} is faster and scores as high" for student, test in faster.items() if test >= best["test"]]
    if f"margin_over_{FLOOR}" in best and not (best[f"margin_over_{FLOOR}_low"] or 0) > 0:
        reasons.append("not shown to beat no training")
    if not several_seeds:
        reasons.append("one distillation seed")
    return "; ".join(reasons)


def _unsure(best: dict[str, Any]) -> str:
    known = f"margin_over_{BASELINE}" in best
    unsure = known and not (best[f"margin_over_{BASELINE}_low"] or 0) > 0
    return "not shown to beat training without a teacher" if unsure else ""


def _alike(best: str, student: str, scores: xr.DataArray) -> tuple[str, ...]:
    """Trained methods that the student's best one is not told apart from, in the order of the grid."""
    pooled = pool(by_method(scores, student))
    others = [method for method in pooled.scores if method not in (FLOOR, best)]
    p_values = holm([two_sided(pooled.effect([best], [method])) for method in others])
    told = (p_values <= TOLD_APART) & (covered(scores) == BOTH_SEEDS)
    return tuple(method for method, apart in zip(others, told, strict=True) if not apart)
