"""What the report answers first: which student to take, what the paper's claims came to, what choosing costs."""

from __future__ import annotations

import html
from collections.abc import Sequence
from typing import Any

import pandas as pd
from IPython.display import HTML, Image
from pandas.io.formats.style import Styler

from study.analysis.figures.style import NOTHING, interval, label, number
from study.analysis.numbers.analysis import Analysis
from study.analysis.numbers.budgets import NOT_TESTABLE
from study.analysis.numbers.claims import CONTRADICTED, SUPPORTED, UNDECIDED
from study.analysis.numbers.results import TEACHER
from study.analysis.numbers.selection import RULES
from study.analysis.presentation import styled
from study.descriptions import Comparison
from study.plan import Plan

VERDICT_LOOKS = {
    SUPPORTED: "background-color: #dcebfa; color: #003f70",
    CONTRADICTED: "background-color: #fbe3d6; color: #7a2f00",
    UNDECIDED: "background-color: #f0f1f2; color: #4d4d4d",
    NOT_TESTABLE: "color: #4d4d4d; font-style: italic",
}


def card(head: str, big: str, *lines: str) -> str:
    """An answer as HTML: what it is about, the number, what it means."""
    texts = head, big, *lines
    looks = ("soft", "big", "said", *["soft"] * (len(lines) - 1))
    shown = [f"<p class={look}>{html.escape(text, quote=False)}</p>" for look, text in zip(looks, texts, strict=True)]
    return "\n".join(["<div class=answer>", *shown, "</div>"])


def answers(cards: list[str]) -> HTML | None:
    """Cards side by side; None without any."""
    return HTML(f"<div class=answers>{''.join(cards)}</div>") if cards else None


def cards(analyses: Sequence[Analysis]) -> HTML | None:
    """A card for every recommended student, or one that says why a setting has none."""
    shown = []
    for analysis in analyses:
        setting, table = analysis.setting.capitalize(), analysis.recommendation
        students = table[table["student"] != TEACHER]
        for row in students[students["recommended"]].to_dict("records"):
            floor = f"; untrained: {number(row['floor'], 1)} %" if pd.notna(row["floor"]) else ""
            kept = interval(row["retained_low"], row["retained_high"], 1).strip(" ()")
            lines = [f"of the teacher's score kept by {label(row['method'])}"]
            lines += [f"95 % interval {kept or 'unknown'}{floor}"]
            speed = (
                f"{number(row['speed_up'], 1)} times the teacher's speed: {number(row['budget_ms'], 1)} ms a sequence"
            )
            lines += [speed, *([row["because"]] if row["because"] else [])]
            shown.append(card(f"{setting}: {row['student']}", f"{number(row['retained'], 1)} %", *lines))
        if not students["recommended"].any():
            reasons = dict.fromkeys(reason for text in students["because"] for reason in text.split("; ") if reason)
            shown.append(card(setting, "No recommendation", f"because: {'; '.join(reasons)}"))
    return answers(shown)


def pictures(plan: Plan, analysis: str, name: str, caption: str) -> list[Image | HTML]:
    """The picture of every setting that has it, then the caption of all of them."""
    layouts = {comparison.setting: plan.layout(comparison.setting) for comparison in plan.of(Comparison)}
    files = {s.capitalize(): layout.analysis(analysis) / f"{name}.png" for s, layout in layouts.items()}
    shown: list[Image | HTML] = [
        Image(filename=str(file), alt=f"{setting}. {caption}", metadata={"caption": setting})
        for setting, file in files.items()
        if file.is_file()
    ]
    return [*shown, HTML(f"<p class=caption>{html.escape(caption, quote=False)}</p>")] if shown else []


def strip(tables: dict[str, pd.DataFrame], caption: str, name: str = "strip", setting: str = "") -> Styler | None:
    """Verdict and decisive effect of every claim, a column for each of several tables of verdicts; None without any.

    Args:
        tables: head of a column -> verdicts. caption, name, setting: as of :func:`presentation.styled`.
    """
    claims = {row.claim: row.text for table in tables.values() for row in table.itertuples()}
    outcomes = {head: table.set_index("claim").to_dict("index") for head, table in tables.items()}
    rows, looks = [], []
    for place, (claim, text) in enumerate(claims.items()):
        cells = {head: own.get(claim) for head, own in outcomes.items()}
        rows.append({"claim": f"{claim}: {text}"} | {head: _verdict(cell) for head, cell in cells.items()})
        for column, cell in enumerate(cells.values(), start=1):
            if cell:
                looks.append({"selector": f"td.row{place}.col{column}", "props": VERDICT_LOOKS[cell["verdict"]]})
    shown = styled(rows, name, caption, setting=setting, wide=["claim", *tables])
    return shown.set_table_styles(looks, overwrite=False) if rows else None


def _verdict(cell: dict[str, Any] | None) -> str:
    if not cell:
        return NOTHING
    return cell["verdict"] if pd.isna(cell["effect"]) else f"{cell['verdict']} {number(cell['effect'], 1, '+')}"


def recommendation(analyses: Sequence[Analysis]) -> Styler | None:
    """For every budget of time what to take, from the largest budget down; what is not recommended, and why."""
    rows = []
    for analysis in analyses:
        table = analysis.recommendation
        for row in table[table["student"] != TEACHER].to_dict("records"):
            others = f" ({len(row['alike'])} others not told apart)" if row["alike"] else ""
            kept = f"{number(row['retained'], 1)} %{interval(row['retained_low'], row['retained_high'], 1)}"
            rows.append(
                {
                    "setting": analysis.setting.capitalize(),
                    "take": row["student"] if row["recommended"] else f"({row['student']})",
                    "distilled by": f"{label(row['method'])}{others}",
                    "score kept (interval)": kept,
                    "floor": f"{number(row['floor'], 1)} %" if pd.notna(row["floor"]) else NOTHING,
                    "ms a sequence": number(row["budget_ms"], 1),
                    "times as fast": number(row["speed_up"], 1),
                    "recommended": f"{'yes, but' if row['recommended'] else 'no:'} {row['because']}"
                    if row["because"]
                    else "yes",
                }
            )
    groups, words, wide = [row["setting"] for row in rows], ["setting", "take"], ["recommended", "distilled by"]
    caption = "Score kept, and floor: in percent of the teacher's macro test score."
    return styled(rows, "recommendation", caption, words=words, wide=wide, groups=groups) if rows else None


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
                    "floor": f"{number(row['floor'], 1)} %" if pd.notna(row["floor"]) else NOTHING,
                    "regret": number(row["regret"], 1),
                    "rank correlation with test": number(row["rank_correlation"], 2),
                }
            )
    words, groups = ["student", "picks"], [row["student"] for row in rows]
    return styled(rows, "selection", words=words, wide=["methods chosen by"], groups=groups)
