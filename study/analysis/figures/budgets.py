"""Figures of scores against training tokens."""

from __future__ import annotations

import math

import pandas as pd
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator

from study.analysis.figures.style import (
    GREY,
    HALF,
    PALE,
    WIDTH,
    Style,
    drawn,
    handle,
    note,
    panels,
    point,
    ranking,
    styles,
)
from study.analysis.numbers.text import millions, number
from study.descriptions import Comparison

#: Percent of the gap at which points and intervals are cut off: a small gap makes large shares. Source: this study.
LOWEST, HIGHEST = -60.0, 110.0
#: Inches of a panel of lines, and what each row of numbers below it takes.
PANEL, NUMBERS = 1.75, 0.45
GAP = (
    "Share of the gap between the untrained student (0) and the teacher (100) that a method closes, by kind of task;"
    " bars: 95 % intervals over distillation seeds, where there are several. Against the tokens its students read, a"
    " column per family of methods, the others in grey; with one number of tokens, methods sorted. Hollow: a method"
    " whose loss did not fall or whose mean over these tasks is below the floor; numbers at the edge: points beyond it."
)
#: Groups of tasks in words.
GROUP_WORDS = {"context": "tasks that need context", "sentence": "sentence tasks", "all": "all tasks"}


@drawn
def gap_closed(comparison: Comparison, closed: pd.DataFrame) -> Figure:
    """Percent of the gap closed: against tokens, by family of methods; sorted where all read the same number.

    The mean of all tasks is drawn only where there are no groups.

    Args:
        closed: as from :func:`study.analysis.numbers.budgets.table`.
    """
    groups = [group for group in GROUP_WORDS if group in set(closed["group"])]
    groups = [group for group in groups if group != "all"] or groups
    look = {method: style for method, style in styles(comparison).items() if method in set(closed["method"])}
    shown = closed[closed["group"].isin(groups)]
    return _lines(shown, groups, look) if shown["tokens"].nunique() > 1 else _sorted(shown, groups, look)


def _sorted(closed: pd.DataFrame, groups: list[str], look: dict[str, Style]) -> Figure:
    """A panel per group of tasks: a dot with its interval per method, the best at the top."""
    height, width = 0.9 + 0.24 * len(look), WIDTH if len(groups) > 1 else HALF
    figure, grid = panels(closed, height, width, col="group", col_order=groups, sharex=False, sharey=False)
    for group, axes in grid.items():
        own = closed[closed["group"] == group]
        ends = _ends(own, margin=6)
        ranked = ranking(axes, own.rename(columns={"closed": "value", "learnt": "filled"}), look, ends)
        beyond = ranked[~ranked["value"].between(*ends)]
        for row in beyond.itertuples():
            note(axes, number(row.value, 0), (ends[0], row.height), (-7, -3), fontsize=7, ha="right", zorder=5)
        axes.set_xticks([tick for tick in MaxNLocator(5).tick_values(*ends) if ends[0] <= tick <= ends[1]])
        axes.set_xlim(ends[0] - (0.28 * (ends[1] - ends[0]) if len(beyond) else 0), ends[1])  # room for the numbers
        axes.axvline(0, color=GREY, linewidth=0.8)
        axes.axvline(100, color=GREY, linewidth=0.8, linestyle=":")
        axes.set_title(f"{GROUP_WORDS[group]}, {millions(own['tokens'].iloc[0])} tokens")
    figure.supxlabel("gap closed (%)", fontsize=9)
    return figure


def _lines(closed: pd.DataFrame, groups: list[str], look: dict[str, Style]) -> Figure:
    """Rows of panels are groups of tasks, columns families: its methods' lines with intervals over those of all."""
    family = {method: style.label.partition(":")[0] for method, style in look.items()}
    families, drawn = list(dict.fromkeys(family.values())), closed.assign(family=closed["method"].map(family))
    ticks = sorted(drawn["tokens"].unique())
    ends = {group: _ends(own, margin=4) for group, own in drawn.groupby("group")}
    outside = drawn[[not ends[row.group][0] <= row.closed <= ends[row.group][1] for row in drawn.itertuples()]]
    below = outside.groupby(["group", "family"])["method"].nunique().groupby("group").max()  # rows of numbers
    below = (below + 0.2).to_dict()
    heights = [PANEL + NUMBERS * below.get(group, 0) for group in groups]
    figure, grid = panels(
        drawn, 1.5 + sum(heights), row="group", row_order=groups, col="family", col_order=families, sharey="row",
        gridspec_kws={"height_ratios": heights},
    )  # fmt: skip
    for (group, family_shown), axes in grid.items():
        rows = drawn[drawn["group"] == group].sort_values("tokens")
        low, high = ends[group]
        step = NUMBERS * (high - low) / PANEL
        inside = rows[rows["closed"].between(low, high)]
        for _, line in inside[inside["family"] != family_shown].groupby("method"):
            axes.plot(line["tokens"], line["closed"], color=PALE, linewidth=0.7, zorder=1)
        members = [method for method in look if family[method] == family_shown]
        numbered = [method for method in members if method in set(outside.loc[outside["group"] == group, "method"])]
        for place, method in enumerate(members):
            style, kept = look[method], inside[inside["method"] == method]
            apart = (ticks[-1] / ticks[0]) ** (0.04 * (place - (len(members) - 1) / 2))  # bars side by side
            axes.plot(kept["tokens"] * apart, kept["closed"], color=style.color, linewidth=1.4, zorder=3)
            for row in rows[rows["method"] == method].itertuples():
                x = row.tokens * apart
                if row.high > low and row.low < high:
                    axes.vlines(x, max(row.low, low), min(row.high, high), color=style.color, linewidth=1, zorder=2)
                if low <= row.closed <= high:
                    point(axes, x, row.closed, style, row.learnt)
                    continue
                y = low - step * (0.2 + numbered.index(method))
                point(axes, row.tokens, y, style, row.learnt)
                note(axes, number(row.closed, 0), (row.tokens, y), (1, -7), fontsize=7, ha="center", va="top",
                     rotation=90, color=style.color, zorder=5)  # fmt: skip
        axes.axhline(0, color=GREY, linewidth=0.8, zorder=0)
        if high > 100:
            axes.axhline(100, color=GREY, linewidth=0.8, linestyle=":", zorder=0)
        if group in below:
            axes.axhline(low, color=PALE, linewidth=0.6, zorder=0)
        axes.set_yticks([tick for tick in axes.get_yticks() if low <= tick <= high])
        bottom = low - step * below.get(group, 0)
        axes.set(xscale="log", xlabel="", ylim=(bottom, high), title=family_shown if group == groups[0] else "")
        axes.set_ylabel(f"{GROUP_WORDS[group]}\ngap closed (%)" if family_shown == families[0] else "")
        axes.set_xticks(ticks, _in_two_lines(ticks, 0.045 * len(families)), fontsize=7)
        axes.minorticks_off()
        axes.margins(x=0.15)
        axes.grid(axis="y")
    grid[groups[-1], families[len(families) // 2]].set_xlabel("tokens (millions)")
    handles = [handle(style.label, style.color, style.marker, "-") for style in look.values()]
    handles.append(handle("not learnt, or below the floor", GREY, "o", fillstyle="none"))
    figure.legend(handles=handles, loc="outside lower center", ncols=3)
    return figure


def _in_two_lines(ticks: list[float], apart: float) -> list[str]:
    """Labels of a log axis; one that is less than a part of the axis from its neighbour goes below it."""
    labels, last, whole = [], -math.inf, math.log(ticks[-1] / ticks[0])
    for tick in ticks:
        near = math.log(tick) - last < apart * whole
        labels.append("\n" * near + millions(tick).removesuffix(" M"))
        last = last if near else math.log(tick)
    return labels


def _ends(rows: pd.DataFrame, margin: float) -> tuple[float, float]:
    """What is shown of a panel's axis: all points and intervals, with zero, within LOWEST and HIGHEST."""
    low, high = min(0.0, rows[["closed", "low"]].min().min()), rows[["closed", "high"]].max().max()
    return max(low - margin, LOWEST), min(high + margin, HIGHEST)
