"""For a latency budget: which student, distilled how, and what is lost."""

from __future__ import annotations

from typing import Any

import pandas as pd
import xarray as xr

from study.analysis.numbers.results import BASELINE, FLOOR, Results
from study.analysis.numbers.statistics import difference, estimate, of_method, replicates
from study.descriptions import TEACHER

COLUMNS = ["setting", "budget_ms", "speed_up", "student", "method", "retained", "retained_low", "retained_high", "loss"]


def recommendation(results: Results, headline: dict[str, Any], scores: xr.DataArray) -> pd.DataFrame:
    """What to take for every budget of latency, from the largest budget down, one row per model worth taking.

    The first row is the teacher, whose time may be there. A student comes with its best method. It is worth taking if
    no faster student scores as well. Both choices are made on development data; what is promised is from test data.
    Latency: median of the smallest batch and number of threads measured, here, so budgets are better read as shares of
    the teacher's time (``speed_up``).

    Columns: setting, budget_ms (the least budget that this model fits in), speed_up, student, method, retained,
    retained_low, retained_high (percent of the teacher's macro test score, with the interval of
    :func:`tables.summary`), loss (points of macro test score, 0-100, below the teacher), alike (tuple of trained
    methods that the student's own is not told apart from: the 95 % interval of the paired difference holds zero or is
    undefined), reservation (what is not shown of this model: better than no training, than training without a teacher;
    empty if both are, or were not run).

    Args:
        headline: of the results (:func:`tables.headline`). scores: :func:`statistics.score_array`.

    Source: this study's choice.
    """
    ceiling, rows, fastest_best = headline["teacher"]["test"], [], -float("inf")
    for student, best in sorted(headline["students"].items(), key=lambda item: item[1]["latency_ms"]):
        if best["development"] <= fastest_best:
            continue
        fastest_best = best["development"]
        unsure = [
            words
            for baseline, words in ((FLOOR, "no training"), (BASELINE, "training without a teacher"))
            if f"margin_over_{baseline}" in best and not (best[f"margin_over_{baseline}_low"] or 0) > 0
        ]
        row = {"setting": headline["setting"], "budget_ms": best["latency_ms"], "speed_up": best["speed_up"]}
        row |= {"student": student, "method": best["method"], "retained": best["retained_percent"]}
        row |= {f"retained_{end}": best[f"retained_percent_{end}"] for end in ("low", "high")}
        row |= {"loss": 100 * (ceiling - best["test"]), "alike": _alike(best["method"], student, scores)}
        rows.append(row | {"reservation": f"not shown to beat {' or '.join(unsure)}" if unsure else ""})
    latency = results.latency.sort_values(["batch_size", "threads"], kind="stable").groupby("student").first()
    teacher = {"setting": headline["setting"], "budget_ms": 1000 * latency.loc[TEACHER, "median_seconds"]}
    teacher |= {"speed_up": 1.0, "student": TEACHER, "method": TEACHER, "retained": 100.0, "loss": 0.0}
    rows.append(teacher | {"alike": (), "reservation": ""})
    table = pd.DataFrame(rows[::-1], columns=[*COLUMNS, "alike", "reservation"])
    return table.astype({name: float for name in ("retained_low", "retained_high")})


def _alike(best: str, student: str, scores: xr.DataArray) -> tuple[str, ...]:
    """Trained methods that the student's best one is not told apart from, in the order of the grid."""
    alike = []
    for method in scores["method"].to_numpy().tolist():
        if method in (FLOOR, best):
            continue
        gap = difference(of_method(scores, best, student), of_method(scores, method, student))
        low, high = estimate(replicates(gap)).interval()
        if not (low > 0 or high < 0):
            alike.append(method)
    return tuple(alike)
