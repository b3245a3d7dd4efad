"""Figures of scores against training tokens."""

from __future__ import annotations

from collections import Counter

import matplotlib
import pandas as pd
from matplotlib.figure import Figure
from matplotlib.ticker import FuncFormatter

from study.analysis.figures.style import GREY, HALO, LOOK, handle, millions, number, panels, styles
from study.descriptions import Comparison

#: Percent of the gap below which points and intervals are cut off: a small gap makes large shares. Source: this study.
LOWEST = -60.0
GAP = (
    "Share of the gap between the untrained student (0) and the teacher (100) that a method closes, against the tokens"
    " its students read, by kind of task, methods side by side; bars: 95 % intervals over distillation seeds, where"
    " there are several; circled: a method whose loss did not fall or whose mean over these tasks is below the floor;"
    f" numbers with an arrow: points below {number(LOWEST, 0)}."
)
#: Groups of tasks in words.
GROUP_WORDS = {"context": "tasks that need context", "sentence": "sentence tasks", "all": "all tasks"}


@matplotlib.rc_context(LOOK)
def gap_closed(comparison: Comparison, closed: pd.DataFrame) -> Figure:
    """Percent of the gap closed against tokens, a panel per group of tasks, a line per method.

    Args:
        closed: as from :func:`study.analysis.numbers.budgets.table`.
    """
    groups = [group for group in GROUP_WORDS if group in set(closed["group"])]
    figure, grid = panels(closed, height=3.7, col="group", col_order=groups, sharey=False)
    look = {method: style for method, style in styles(comparison).items() if method in set(closed["method"])}
    for group, axes in grid.items():
        own = closed[closed["group"] == group]
        apart = max((closed["tokens"].max() / closed["tokens"].min()) ** 0.015, 1.03)
        hidden = own[own["closed"] < LOWEST].groupby("tokens").size()
        lowest = LOWEST - 12 * hidden.max() if len(hidden) else min(own["closed"].min(), 0) - 6
        below: Counter[float] = Counter()
        for place, (method, style) in enumerate(look.items()):
            line = own[own["method"] == method].sort_values("tokens")
            x = line["tokens"] * apart ** (place - len(look) / 2)  # side by side, so that bars can be told apart
            axes.plot(x, line["closed"], color=style.color, linewidth=1.3)
            points = line["closed"].where(line["closed"] >= LOWEST)
            axes.plot(x, points, style.marker, color=style.color, markersize=5)
            axes.vlines(x[points.notna()], line["low"][points.notna()], line["high"][points.notna()], color=style.color)
            failed = ~line["learnt"].astype(bool)
            axes.plot(x[failed], points[failed], "o", color=GREY, markersize=10, fillstyle="none")
            for tokens, value in line.loc[points.isna(), ["tokens", "closed"]].itertuples(index=False):
                above = (0, 4 + 9 * below[tokens])
                below[tokens] += 1
                axes.annotate(f"↓{number(value, 0)}", (tokens, lowest), above, textcoords="offset points",
                              color=style.color, fontsize=7, ha="center", bbox=HALO)  # fmt: skip
        axes.axhline(0, color=GREY, linewidth=0.8)
        axes.axhline(100, color=GREY, linewidth=0.8, linestyle=":")
        axes.set(
            title=GROUP_WORDS[str(group)],
            xscale="log",
            xlabel="tokens (millions)",
            ylim=(lowest, max(105, own["closed"].max() + 6)),
        )
        axes.set_ylabel("gap closed (%)" if group == groups[0] else "")
        axes.xaxis.set_major_formatter(FuncFormatter(lambda value, _: millions(value).removesuffix(" M")))
        axes.set_xticks(sorted(closed["tokens"].unique()))
        axes.minorticks_off()
        axes.margins(x=0.12)
        axes.grid(axis="y")
    handles = [handle(style.label, style.color, style.marker, "-") for style in look.values()]
    handles.append(handle("not learnt, or below the floor", GREY, "o", fillstyle="none"))
    figure.legend(handles=handles, loc="outside lower center", ncols=3, frameon=False)
    return figure
