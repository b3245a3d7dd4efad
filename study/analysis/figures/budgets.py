"""Figures of scores against training tokens."""

from __future__ import annotations

import pandas as pd
from matplotlib.figure import Figure

from study.analysis.figures.style import (
    GREY,
    PALE,
    Style,
    drawn,
    handle,
    millions,
    note,
    number,
    panels,
    point,
    ranking,
    styles,
)
from study.descriptions import Comparison

#: Percent of the gap at which points and intervals are cut off: a small gap makes large shares. Source: this study.
LOWEST, HIGHEST = -60.0, 110.0
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
    figure, grid = panels(closed, height=0.9 + 0.24 * len(look), col="group", col_order=groups, sharey=False)
    for group, axes in grid.items():
        own = closed[closed["group"] == group]
        ends = _ends(own, margin=6)
        ranked = ranking(axes, own.rename(columns={"closed": "value", "learnt": "filled"}), look, ends)
        for row in ranked[~ranked["value"].between(*ends)].itertuples():
            note(axes, number(row.value, 0), (ends[0], row.height), (8, -3), fontsize=7, zorder=5)
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
    figure, grid = panels(
        drawn, 0.8 + 2.1 * len(groups), row="group", row_order=groups, col="family", col_order=families, sharey="row"
    )
    for (group, family_shown), axes in grid.items():
        rows = drawn[drawn["group"] == group].sort_values("tokens")
        low, high = _ends(rows, margin=4)
        inside = rows[rows["closed"].between(low, high)]
        for _, line in inside[inside["family"] != family_shown].groupby("method"):
            axes.plot(line["tokens"], line["closed"], color=PALE, linewidth=0.7, zorder=1)
        members = [method for method in look if family[method] == family_shown]
        for place, method in enumerate(members):
            style, kept = look[method], inside[inside["method"] == method]
            apart = (ticks[-1] / ticks[0]) ** (0.04 * (place - (len(members) - 1) / 2))  # bars side by side
            axes.plot(kept["tokens"] * apart, kept["closed"], color=style.color, linewidth=1.4, zorder=3)
            for row in rows[rows["method"] == method].itertuples():
                x = row.tokens * apart
                axes.vlines(x, max(row.low, low), min(row.high, high), color=style.color, linewidth=1, zorder=2)
                point(axes, x, min(max(row.closed, low), high), style, row.learnt)
                if not low <= row.closed <= high:
                    note(axes, number(row.closed, 0), (x, low), (0, 7 + 24 * place), fontsize=7, ha="center",
                         rotation=90, color=style.color, zorder=5)  # fmt: skip
        axes.axhline(0, color=GREY, linewidth=0.8, zorder=0)
        if high > 100:
            axes.axhline(100, color=GREY, linewidth=0.8, linestyle=":", zorder=0)
        axes.set(xscale="log", xlabel="", ylim=(low, high), title=family_shown if group == groups[0] else "")
        axes.set_ylabel(f"{GROUP_WORDS[group]}\ngap closed (%)" if family_shown == families[0] else "")
        axes.set_xticks(ticks, [millions(value).removesuffix(" M") for value in ticks], fontsize=7)
        axes.minorticks_off()
        axes.margins(x=0.15)
        axes.grid(axis="y")
    grid[groups[-1], families[len(families) // 2]].set_xlabel("tokens (millions)")
    handles = [handle(style.label, style.color, style.marker, "-") for style in look.values()]
    handles.append(handle("not learnt, or below the floor", GREY, "o", fillstyle="none"))
    figure.legend(handles=handles, loc="outside lower center", ncols=3)
    return figure


def _ends(rows: pd.DataFrame, margin: float) -> tuple[float, float]:
    """What is shown of a panel's axis: all points and intervals, with zero, within LOWEST and HIGHEST."""
    low, high = min(0.0, rows[["closed", "low"]].min().min()), rows[["closed", "high"]].max().max()
    return max(low - margin, LOWEST), min(high + margin, HIGHEST)
