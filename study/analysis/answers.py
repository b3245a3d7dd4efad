"""Which student to take for a budget of time, and what the rule that chose its method costs."""

from __future__ import annotations

from collections.abc import Sequence

import pandas as pd
from pandas.io.formats.style import Styler

from study.analysis.figures.style import label
from study.analysis.numbers.analysis import Analysis
from study.analysis.numbers.results import TEACHER
from study.analysis.numbers.selection import RULES
from study.analysis.presentation import NOTHING, interval, number, styled


def recommendation(analyses: Sequence[Analysis]) -> Styler:
    """For every budget of time what to take, from the largest budget down; what is not recommended, and why."""
    rows = []
    for analysis in analyses:
        for row in analysis.recommendation.to_dict("records"):
            others = f" or {len(row['alike'])} not told apart from it" if row["alike"] else ""
            kept = f"{number(row['retained'], 1)} %{interval(row['retained_low'], row['retained_high'], 1)}"
            rows.append(
                {
                    "setting": analysis.setting.capitalize(),
                    "take": row["student"] if row["recommended"] else f"({row['student']})",
                    "distilled by": f"{label(row['method'])}{others}",
                    "teacher's score kept": kept,
                    "by the floor": f"{number(row['floor'], 1)} %" if pd.notna(row["floor"]) else NOTHING,
                    "if a sequence may take": f"{number(row['budget_ms'], 1)} ms",
                    "of the teacher's time": f"1 / {number(row['speed_up'], 1)}",
                    "points lost": number(row["loss"], 1),
                    "recommended": f"{'' if row['recommended'] else 'no: '}{row['because']}" or "yes",
                }
            )
    groups = [row["setting"] for row in rows]
    shown = styled(
        rows, "recommendation", words=["setting", "take"], wide=["recommended", "distilled by"], groups=groups
    )
    tables = {a.setting: a.recommendation for a in analyses}
    none = [name for name, table in tables.items() if not table.loc[table["student"] != TEACHER, "recommended"].any()]
    return shown.set_caption(f"No student is recommended in {' or '.join(none)}: the rows say why.") if none else shown


def selection(analyses: Sequence[Analysis]) -> Styler:
    """What each rule picks for each student, what that keeps beside the floor, and the regret."""
    rows = []
    for analysis in analyses:
        for row in analysis.selection.to_dict("records"):
            rows.append(
                {
                    "student": f"{analysis.setting.capitalize()}, {row['student']}",
                    "methods chosen by": RULES[row["rule"]].words,
                    "picks": label(row["method"]),
                    "teacher's score kept": f"{number(row['retained'], 1)} %",
                    "by the floor": f"{number(row['floor'], 1)} %" if pd.notna(row["floor"]) else NOTHING,
                    "regret": number(row["regret"], 1),
                    "rank correlation with test": number(row["rank_correlation"], 2),
                }
            )
    words, groups = ["student", "picks"], [row["student"] for row in rows]
    return styled(rows, "selection", words=words, wide=["methods chosen by"], groups=groups)
