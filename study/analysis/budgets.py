"""What methods give for the tokens that their students read, as readers see it.

Each function takes the tables of :mod:`study.analysis.numbers.budget_tables`, of one setting or by setting.
"""

from __future__ import annotations

from typing import Any

import pandas as pd
from IPython.display import HTML
from pandas.io.formats.style import Styler

from study.analysis.answers import answers, card, strip
from study.analysis.figures.budgets import GROUP_WORDS
from study.analysis.figures.style import in_words, label, short, titled
from study.analysis.numbers.budgets import NOT_TESTABLE
from study.analysis.numbers.text import NOTHING, interval, millions, number, rate, with_interval
from study.analysis.presentation import styled

Tables = dict[str, pd.DataFrame]
#: The first columns of a row about a verdict.
VERDICT = ("", "tasks", "tokens", "verdict")


def cards(curves: dict[str, Tables]) -> HTML | None:
    """A card for every setting and kind of task: what closes most of the gap on test data at the budget to read first.

    Where no method learnt, the card says so.
    """
    kinds = [(setting, kind) for setting, tables in curves.items() for kind in tables["gap"]["group"].unique()]
    shown = []
    for setting, kind in [(setting, kind) for setting, kind in kinds if kind != "all"]:
        most = curves[setting]["recommendation"]["tokens"].iloc[0]
        rows = curves[setting]["gap"].query("group == @kind and tokens == @most")
        best, head = rows.loc[rows["closed"].idxmax()], f"{titled(setting)}: {millions(most)} tokens"
        if not rows["learnt"].any():
            shown.append(card(head, "Nothing", f"was learnt on {GROUP_WORDS[kind]} by any of {len(rows)} methods"))
            continue
        between = interval(best["low"], best["high"], 0).strip(" ()") or "unknown"
        models = "one distilled model" if best["models"] == 1 else f"{best['models']} distilled models"
        lines = [f"of the gap on {GROUP_WORDS[kind]} closed by {label(best['method'])}"]
        lines += [f"the highest of {len(rows)} methods on test data; {models}, 95 % interval {between}"]
        shown.append(card(head, f"{number(best['closed'], 0)} %", *lines))
    return answers(shown)


def verdicts(setting: str, tables: Tables, group: str) -> Styler | None:
    """Verdict and decisive effect of every claim at every budget, by a group of tasks; the caption says which to read.

    That is the first judged, since claims are about what a student has learnt of language.
    """
    first = None if tables["verdicts"].empty else tables["verdicts"]["group"].iloc[0]
    lead = "The verdict to read" if group == first else "Beside it, judged by the same rule"
    caption = f"{lead}: {GROUP_WORDS[group]}; effects in percent of the gap."
    if group == first:
        caption += _left_out(group, tables)
    return strip(_by_tokens(tables, group), caption, f"verdicts-{group}", setting)


def to_read(curves: dict[str, Tables]) -> Styler | None:
    """The verdicts to read, a column for every setting and budget; None where no claim is judged."""
    columns, said = dict[str, pd.DataFrame](), list[str]()
    for setting, tables in curves.items():
        for group in tables["verdicts"]["group"].iloc[:1]:
            columns |= {f"{setting}: {head}": rows for head, rows in _by_tokens(tables, group).items()}
            said.append(f"{titled(setting)}: {GROUP_WORDS[group]}.{_left_out(group, tables)}")
    return strip(columns, f"{' '.join(said)} Effects in percent of the gap.", "to-read")


def _by_tokens(tables: Tables, group: str) -> dict[str, pd.DataFrame]:
    judged = tables["verdicts"].query("group == @group")
    return {f"{millions(tokens)} tokens": rows for tokens, rows in judged.groupby("tokens")}


def _left_out(group: str, tables: Tables) -> str:
    if group == "context" or "context" not in set(tables["references"]["group"]):
        return ""
    return " On tasks that need context the teacher is not above the untrained student: nothing to judge."


def reasons(setting: str, tables: Tables) -> Styler | None:
    """Every verdict that could be tested, with its reason and its decisive contrast; None without any."""
    rows = [
        _verdict(row)
        | {"because": in_words(row.reason, short) if isinstance(row.reason, str) else ""}
        | {"decisive contrast": in_words(row.contrast, short)}
        | {"effect (interval)": with_interval((row.effect, row.low, row.high), 1, "+"), "models": row.runs}
        for row in tables["verdicts"].sort_values(["claim", "tokens"], kind="stable").itertuples()
        if row.verdict != NOT_TESTABLE
    ]
    looks: dict[str, Any] = {"words": VERDICT, "wide": ["because", "decisive contrast"], "groups": ""}
    return styled(rows, "reasons", "What could be tested.", setting=setting, **looks)


def _verdict(row: Any) -> dict[str, str]:
    return {"": row.claim, "tasks": row.group, "tokens": millions(row.tokens), "verdict": row.verdict}


def gains(setting: str, tables: Tables) -> Styler | None:
    """Points that each method's students score above the untrained one, a column per budget."""
    shown = [with_interval((row.gain, row.low, row.high), 1, "+") for row in tables["gains"].itertuples()]
    caption = "Points of the macro test score above the untrained student (95 % interval)."
    return _by_budget(tables["gains"].assign(shown=shown), "gains", caption, setting)


def sensitivity(setting: str, tables: Tables) -> Styler | None:
    """What becomes of every verdict without one of its tasks, and when tasks and seeds are drawn anew."""
    rows = [
        _verdict(row)
        | {"changes without": row.without if isinstance(row.without, str) and row.without else "no task alone"}
        | {"effect": number(row.effect, 1, "+")}
        | {"tasks and seeds drawn anew": interval(row.drawn_low, row.drawn_high, 1, "+").strip(" ()") or NOTHING}
        for row in tables["sensitivity"].sort_values(["claim", "tokens"], kind="stable").itertuples()
    ]
    caption = "Effects of the decisive contrast in percent of the gap; of so few tasks the bootstrap is a coarse check."
    looks: dict[str, Any] = {"words": VERDICT, "wide": ["changes without"], "groups": ""}
    return styled(rows, "sensitivity", caption, setting=setting, **looks)


def gap(setting: str, tables: Tables) -> Styler | None:
    """Percent of the gap that each method closes, a column per budget; what did not learn is in brackets."""
    rows = tables["gap"].itertuples()
    closed = [(with_interval((row.closed, row.low, row.high), 1), row.learnt) for row in rows]
    shown = [text if learnt else f"[{text}]" for text, learnt in closed]
    caption = "Percent of the gap closed (95 % interval). In square brackets: did not learn, or below the floor."
    return _by_budget(tables["gap"].assign(shown=shown), "gap", caption, setting)


def _by_budget(rows: pd.DataFrame, name: str, caption: str, setting: str) -> Styler | None:
    """What is ``shown`` of every group of tasks and method, a column per budget."""
    order = {method: place for place, method in enumerate(rows.sort_values("tokens", kind="stable")["method"].unique())}
    wide = rows.pivot(index=["group", "method"], columns="tokens", values="shown").fillna(NOTHING)
    wide = wide.rename_axis(columns=None).reset_index()
    places = {"group": {group: place for place, group in enumerate(GROUP_WORDS)}, "method": order}
    wide = wide.sort_values(["group", "method"], key=lambda column: column.map(places[column.name]))
    wide = wide.assign(method=wide["method"].map(label)).rename(columns={"group": "tasks"})
    wide = wide.rename(columns={tokens: f"{millions(tokens)} tokens" for tokens in rows["tokens"].unique()})
    return styled(wide, name, caption, setting=setting, words=["tasks", "method"], groups="tasks")


def trends(setting: str, tables: Tables) -> Styler | None:
    """What ten times the tokens close of the gap, and where a method's line meets the leader's; None of one budget."""
    faster = "more per ten times than the leader"
    rows = [
        {"tasks": row.group, "method": label(row.method), "at the smallest budget": number(row.first, 1)}
        | {"per ten times the tokens": with_interval((row.per_decade, row.low, row.high), 1, "+")}
        | {"meets the leader at": NOTHING if pd.isna(row.meets) else millions(row.meets), "models": row.runs}
        | {faster: with_interval((row.faster, row.faster_low, row.faster_high), 1, "+")}
        for row in tables["trends"].itertuples()
    ]
    caption = (
        "Percent of the gap, a line through a method's runs. Leader: the line highest at the smallest budget."
        " Last column: interval over tasks."
    )
    return styled(rows, "trends", caption, setting=setting, words=["tasks", "method"], groups="tasks")


def references(setting: str, tables: Tables) -> Styler | None:
    """The two ends of the gap: test scores of the untrained student and of the teacher, by task."""
    rows = [
        {"tasks": row["group"], "task": row["task"], "untrained": number(row["none"], 1)}
        | {"teacher": number(row["teacher"], 1), "gap": number(row["teacher"] - row["none"], 1)}
        for row in tables["references"].to_dict("records")
    ]
    words = ["tasks", "task"]
    return styled(rows, "references", "Test scores × 100.", setting=setting, words=words, groups="tasks")


def training(setting: str, tables: Tables) -> Styler | None:
    """Every method's learning rate, models and held-out loss at every budget."""
    table = tables["gap"].query("group == 'all'").sort_values("tokens", kind="stable")
    order = {method: place for place, method in enumerate(table["method"].unique())}
    rows = [
        {"method": label(row.method), "tokens": millions(row.tokens), "models": row.models}
        | {"learning rate": rate(row.learning_rate)}
        | {"held-out loss, % of that before": number(100 * row.loss_share, 0)}
        for row in table.sort_values("method", key=lambda own: own.map(order), kind="stable").itertuples()
    ]
    caption, words = "Of each method at each number of tokens.", ["method", "tokens"]
    return styled(rows, "training", caption, setting=setting, words=words, groups="method")
