"""Which method a rule picks for a student, and what that costs against the best one on test data."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import pandas as pd

from study.analysis.numbers.results import FLOOR, MODEL
from study.descriptions import TEACHER


@dataclass(frozen=True)
class Rule:
    """A way to choose: its name in words, and how what was chosen is called."""

    words: str
    best: str


DEVELOPMENT, RETRIEVAL, ORACLE = "development", "retrieval_development", "oracle"
RULES = {
    DEVELOPMENT: Rule("development scores", "best on development data"),
    RETRIEVAL: Rule("retrieval of translations", "best at retrieval on development data"),
    ORACLE: Rule("test scores (oracle)", "best on test data"),
}


def trained(summary: pd.DataFrame) -> pd.DataFrame:
    """Rows of the methods that a rule chooses among: all but the teacher's and the untrained floor's."""
    return summary[~summary["method"].isin([TEACHER, FLOOR])]


def in_use(summary: pd.DataFrame) -> str:
    """The rule that methods are chosen by: retrieval where every trained method has it, else development scores.

    Neither sees test data, nor needs labels in another language than that of training. Where a task is tested in
    languages that it was not learnt in, retrieval has less regret in the mean (docs/findings.md).

    Args:
        summary: a row per method and student, with ``retrieval_development`` where it was measured.

    Source: this study's choice.
    """
    return RETRIEVAL if RETRIEVAL in summary and trained(summary)[RETRIEVAL].notna().all() else DEVELOPMENT


def signals(summary: pd.DataFrame) -> pd.DataFrame:
    """What each rule goes by, a column each, beside setting, method and student of every trained method.

    ``development`` and ``oracle`` are macro scores (0-1); ``retrieval_development`` is the mean development accuracy
    over languages and tasks of the probe, NaN where there is none.

    Args:
        summary: :func:`tables.summary`.
    """
    table = trained(summary)
    return table.reindex(columns=[*MODEL, DEVELOPMENT, RETRIEVAL]).assign(oracle=table["test"])


def selection(summary: pd.DataFrame) -> pd.DataFrame:
    """What each rule picks for each student, what that keeps, and its regret; one row per student and rule.

    Columns: setting, student, rule, in_use (is it the one of :func:`in_use`?), method, retained and floor (percent of
    the teacher's macro test score; floor is NaN where it was not run), regret (percent of the teacher's, best trained
    method on test data less the picked one), rank_correlation (Spearman's, of what the rule goes by with the test score
    over trained methods; NaN of fewer than three or where all are equal). Rules without a signal are left out; of equal
    methods the first of the grid is picked.

    Source: this study's choice.
    """
    seen, kept, rows = signals(summary), summary.set_index(["method", "student"])["retained"], []
    used = in_use(summary)
    for (setting, student), table in seen.groupby(["setting", "student"], sort=False):
        best = 100 * max(kept[method, student] for method in table["method"])
        for name in RULES:
            if table[name].isna().any():
                continue
            method, varied = table.loc[table[name].idxmax(), "method"], min(table[name].nunique(), len(table) - 1) > 1
            retained = 100 * kept[method, student]
            row = {"setting": setting, "student": student, "rule": name, "in_use": name == used}
            row |= {"method": method, "retained": retained, "floor": 100 * kept.get((FLOOR, student), np.nan)}
            row |= {"regret": best - retained}
            ranks = table[name].rank().corr(table["oracle"].rank()) if varied else np.nan
            rows.append(row | {"rank_correlation": ranks})
    return pd.DataFrame(rows)
