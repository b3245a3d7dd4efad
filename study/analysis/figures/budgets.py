"""Figures of scores against training tokens."""

from __future__ import annotations

import matplotlib
import pandas as pd
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from study.analysis.figures.style import (
    GREY,
    HALO,
    LOOK,
    PALE,
    Style,
    draw_interval,
    handle,
    label,
    millions,
    number,
    panels,
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


@matplotlib.rc_context(LOOK)
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
        own = closed[closed["group"] == group].sort_values("closed", ascending=False, kind="stable")
        ends = _ends(own, margin=6)
        for height, row in enumerate(own.itertuples()):
            color = look[row.method].color
            draw_interval(axes, height, row.low, row.high, ends, color)
            _point(axes, min(max(row.closed, ends[0]), ends[1]), height, look[row.method], row.learnt)
            if not ends[0] <= row.closed <= ends[1]:
                axes.annotate(number(row.closed, 0), (ends[0], height), (8, -3), textcoords="offset points",
                              fontsize=7, bbox=HALO, zorder=5)  # fmt: skip
        axes.axvline(0, color=GREY, linewidth=0.8)
        axes.axvline(100, color=GREY, linewidth=0.8, linestyle=":")
        axes.set_yticks(range(len(own)), [label(method) for method in own["method"]])
        tokens = millions(own["tokens"].iloc[0])
        axes.set(title=f"{GROUP_WORDS[group]}, {tokens} tokens", xlim=ends, ylim=(len(own) - 0.4, -0.6))
        axes.set(xlabel="", ylabel="")
        axes.tick_params(axis="y", length=0)
        axes.grid(axis="x")
    figure.supxlabel("gap closed (%)", fontsize=9)
    return figure


def _lines(closed: pd.DataFrame, groups: list[str], look: dict[str, Style]) -> Figure:
    """Rows of panels are groups of tasks, columns families: its methods' lines with intervals over those of all."""
    families: dict[str, list[str]] = {}
    for method, style in look.items():
        families.setdefault(style.label.partition(":")[0], []).append(method)
    drawn = closed.assign(family=closed["method"].map({m: family for family, own in families.items() for m in own}))
    ticks = sorted(drawn["tokens"].unique())
    figure, grid = panels(
        drawn,
        height=0.8 + 2.1 * len(groups),
        row="group",
        row_order=groups,
        col="family",
        col_order=[*families],
        sharey="row",
    )
    for (group, family), axes in grid.items():
        rows = drawn[drawn["group"] == group].sort_values("tokens")
        low, high = _ends(rows, margin=4)
        inside = rows[rows["closed"].between(low, high)]
        for _, line in inside[inside["family"] != family].groupby("method"):
            axes.plot(line["tokens"], line["closed"], color=PALE, linewidth=0.7, zorder=1)
        for place, method in enumerate(families[family]):
            line, style = rows[rows["method"] == method], look[method]
            apart = (ticks[-1] / ticks[0]) ** (0.04 * (place - (len(families[family]) - 1) / 2))  # bars side by side
            kept = line[line["closed"].between(low, high)]
            axes.plot(kept["tokens"] * apart, kept["closed"], color=style.color, linewidth=1.4, zorder=3)
            for row in line.itertuples():
                x = row.tokens * apart
                axes.vlines(x, max(row.low, low), min(row.high, high), color=style.color, linewidth=1, zorder=2)
                _point(axes, x, min(max(row.closed, low), high), style, row.learnt)
                if not low <= row.closed <= high:
                    above = (0, 7 + 24 * place)
                    axes.annotate(number(row.closed, 0), (x, low), above, textcoords="offset points", fontsize=7,
                                  ha="center", rotation=90, color=style.color, bbox=HALO, zorder=5)  # fmt: skip
        axes.axhline(0, color=GREY, linewidth=0.8, zorder=0)
        if high > 100:
            axes.axhline(100, color=GREY, linewidth=0.8, linestyle=":", zorder=0)
        axes.set(xscale="log", xlabel="", ylim=(low, high), title=family if group == groups[0] else "")
        axes.set_ylabel(f"{GROUP_WORDS[group]}\ngap closed (%)" if family == [*families][0] else "")
        axes.set_xticks(ticks, [millions(value).removesuffix(" M") for value in ticks], fontsize=7)
        axes.minorticks_off()
        axes.margins(x=0.15)
        axes.grid(axis="y")
    middle = [*families][len(families) // 2]
    grid[groups[-1], middle].set_xlabel("tokens (millions)")
    handles = [handle(style.label, style.color, style.marker, "-") for style in look.values()]
    handles.append(handle("not learnt, or below the floor", GREY, "o", fillstyle="none"))
    figure.legend(handles=handles, loc="outside lower center", ncols=3, frameon=False)
    return figure


def _ends(rows: pd.DataFrame, margin: float) -> tuple[float, float]:
    """What is shown of a panel's axis: all points and intervals, with zero, within LOWEST and HIGHEST."""
    low = min(0.0, rows["closed"].min(), rows["low"].min())
    high = max(rows["closed"].max(), rows["high"].max())
    return max(low - margin, LOWEST), min(high + margin, HIGHEST)


def _point(axes: Axes, x: float, y: float, style: Style, learnt: bool) -> None:
    face = style.color if learnt else "white"
    axes.plot(x, y, style.marker, color=style.color, markerfacecolor=face, markersize=6, clip_on=False, zorder=4)
