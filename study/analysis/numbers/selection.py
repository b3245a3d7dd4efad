"""Which method a rule picks for a student, and what that costs against the best one on test data."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import pandas as pd

from study.analysis.numbers.results import FLOOR, MODEL, Results
from study.descriptions import TEACHER


@dataclass(frozen=True)
class Rule:
    """A way to choose: its name in words, and whether it may be used, that is, sees no test data."""

    words: str
    usable: bool


RULES = {
    "development": Rule("development scores", usable=True),
    "retrieval": Rule("retrieval of translations (test sentences)", usable=False),
    "oracle": Rule("test scores (oracle)", usable=False),
}


def signals(results: Results, summary: pd.DataFrame) -> pd.DataFrame:
    """What each rule goes by, a column each, beside setting, method and student of every trained method.

    ``development`` and ``oracle`` are macro scores (0-1); ``retrieval`` is the mean accuracy over languages of the
    probe, NaN where it was not run. The probe has no development split: its column is a hypothesis about a rule, which
    a development split would have to confirm.

    Args:
        summary: :func:`tables.summary`.
    """
    table = summary[~summary["method"].isin([TEACHER, FLOOR])]
    table = table.assign(oracle=table["test"])[[*MODEL, "development", "oracle"]]
    if results.probes.empty:
        return table.assign(retrieval=np.nan)
    probes = results.probes.query("task == 'retrieval'").groupby(MODEL)["test"].mean().rename("retrieval")
    return table.merge(probes.reset_index(), on=MODEL, how="left")


def selection(results: Results, summary: pd.DataFrame) -> pd.DataFrame:
    """What each rule picks for each student, what that keeps, and its regret; one row per student and rule.

    Columns: setting, student, rule, usable, method, retained and floor (percent of the teacher's macro test score;
    floor is NaN where it was not run), regret (percent of the teacher's, best trained method on test data less the
    picked one), rank_correlation (Spearman's, of what the rule goes by with the test score over trained methods; NaN of
    fewer than three or where all are equal). Rules without a signal are left out; of equal methods the first of the
    grid is picked.

    Source: this study's choice.
    """
    seen, kept, rows = signals(results, summary), summary.set_index(["method", "student"])["retained"], []
    for student, table in seen.groupby("student", sort=False):
        best = 100 * max(kept[method, student] for method in table["method"])
        for name, rule in RULES.items():
            if table[name].isna().any():
                continue
            method, varied = table.loc[table[name].idxmax(), "method"], min(table[name].nunique(), len(table) - 1) > 1
            retained = 100 * kept[method, student]
            row = {"setting": results.comparison.setting, "student": student, "rule": name, "usable": rule.usable}
            row |= {"method": method, "retained": retained, "floor": 100 * kept.get((FLOOR, student), np.nan)}
            row |= {"regret": best - retained}
            ranks = table[name].rank().corr(table["oracle"].rank()) if varied else np.nan
            rows.append(row | {"rank_correlation": ranks})
    return pd.DataFrame(rows)
