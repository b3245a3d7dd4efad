"""What the report answers: cards and pictures, what the paper's claims came to, what choosing costs."""

from __future__ import annotations

import html
import itertools
from collections.abc import Collection, Iterable
from typing import Any

import pandas as pd
from IPython.display import HTML, Image
from pandas.io.formats.style import Styler

from study.analysis.figures.budgets import GROUP_WORDS
from study.analysis.figures.style import label, titled
from study.analysis.numbers.budgets import NOT_TESTABLE
from study.analysis.numbers.claims import CONTRADICTED, SUPPORTED, UNDECIDED
from study.analysis.numbers.selection import RULES
from study.analysis.numbers.text import NOTHING, millions, number, percent
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
    looks = itertools.chain(("soft", "big", "said"), itertools.repeat("soft"))
    texts = zip(looks, (head, big, *lines), strict=False)
    shown = (f"<p class={look}>{html.escape(text, quote=False)}</p>\n" for look, text in texts)
    return f"<div class=answer>\n{''.join(shown)}</div>"


def answers(cards: list[str]) -> HTML | None:
    """Cards side by side; None without any."""
    return HTML(f"<div class=answers>{''.join(cards)}</div>") if cards else None


def pictures(plan: Plan, analysis: str, name: str, caption: str, settings: Collection[str] = ()) -> list[Image | HTML]:
    """The picture of every setting that has it, or of those named alone, then the caption of all of them."""
    layouts = {c.setting: plan.layout(c.setting) for c in plan.of(Comparison) if c.setting in (settings or [c.setting])}
    files = {titled(s): layout.analysis(analysis) / f"{name}.png" for s, layout in layouts.items()}
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
    outcomes = {titled(head): table.set_index("claim").to_dict("index") for head, table in tables.items()}
    rows, looks = [], dict[str, str]()
    for place, (claim, text) in enumerate(claims.items()):
        cells = {head: own.get(claim) for head, own in outcomes.items()}
        rows.append({"claim": f"{claim}: {text}"} | {head: _verdict(cell) for head, cell in cells.items()})
        for column, cell in enumerate(cells.values(), start=1):
            looks |= {f"td.row{place}.col{column}": VERDICT_LOOKS[cell["verdict"]]} if cell else {}
    return styled(rows, name, caption, setting=setting, wide=["claim", *outcomes], marked=looks)


def _verdict(cell: dict[str, Any] | None) -> str:
    if not cell:
        return NOTHING
    known = cell["verdict"] != NOT_TESTABLE and pd.notna(cell["effect"])
    return f"{cell['verdict']} {number(cell['effect'], 1, '+')}" if known else cell["verdict"]


def selection(tables: Iterable[pd.DataFrame]) -> Styler | None:
    """What each rule picks for each student, what that keeps beside the floor, and the regret.

    Args:
        tables: :func:`numbers.selection.selection`, or :func:`numbers.recommendation.choices`, of every setting.
    """
    rows = [
        {"student": f"{titled(row['setting'])}, {row['student']}"}
        | ({"tasks": GROUP_WORDS[row["group"]], "tokens": millions(row["tokens"])} if "group" in row else {})
        | {
            "methods chosen by": RULES[row["rule"]].words + ": in use here" * row["in_use"],
            "picks": label(row["method"]),
            "teacher's score kept": percent(row["retained"]),
            "floor": percent(row["floor"]),
            "regret": number(row["regret"], 1),
            "rank correlation with test": number(row["rank_correlation"], 2),
        }
        for table in tables
        for row in table.to_dict("records")
    ]
    groups = [f"{row['student']} {row.get('tasks', '')}" for row in rows]
    words = ["student", "tasks", "tokens", "picks"]
    return styled(rows, "selection", words=words, wide=["methods chosen by"], groups=groups)
