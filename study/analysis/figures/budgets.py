"""Figures of scores against training tokens."""

from __future__ import annotations

import matplotlib
import pandas as pd
from matplotlib.figure import Figure
from matplotlib.ticker import FuncFormatter

from study.analysis.figures.style import GREY, LOOK, handle, method_legend, panels, styles
from study.descriptions import Comparison

GAP = (
    "Share of the gap between the untrained student (0) and the teacher (100) that a method closes, against the tokens"
    " its students read, by kind of task; bars: 95 % intervals over distillation seeds, where there are several;"
    " circled: a method whose loss did not fall or whose mean over all tasks is below the floor."
)
_TITLES = {"context": "tasks that need context", "sentence": "sentence tasks", "all": "all tasks"}


@matplotlib.rc_context(LOOK)
def gap_closed(comparison: Comparison, closed: pd.DataFrame) -> Figure:
    """Percent of the gap closed against tokens, a panel per group of tasks, a line per method.

    Args:
        closed: as from :func:`study.analysis.numbers.budgets.table`.
    """
    groups = [group for group in _TITLES if group in set(closed["group"])]
    figure, grid = panels(closed, height=3.6, width=9.5, col="group", col_order=groups, sharey=False)
    look = {method: style for method, style in styles(comparison).items() if method in set(closed["method"])}
    for group, axes in grid.items():
        own = closed[closed["group"] == group]
        for place, (method, style) in enumerate(look.items()):
            line = own[own["method"] == method].sort_values("tokens")
            x = line["tokens"] * 1.03 ** (place - len(look) / 2)  # side by side, so that bars can be told apart
            axes.plot(x, line["closed"], color=style.color, marker=style.marker, markersize=6, linewidth=1.3)
            axes.vlines(x, line["low"], line["high"], color=style.color, linewidth=1)
            failed = line[~line["learnt"].astype(bool)]
            axes.plot(failed["tokens"], failed["closed"], "o", color=GREY, markersize=11, fillstyle="none")
        axes.axhline(0, color=GREY, linewidth=0.8)
        axes.axhline(100, color=GREY, linewidth=0.8, linestyle=":")
        axes.set(title=_TITLES[str(group)], xscale="log", xlabel="tokens (millions)", ylabel="gap closed (%)")
        axes.xaxis.set_major_formatter(
            FuncFormatter(lambda value, _: f"{round(value / 1e6, 1 if value < 1e6 else None):g}")
        )
        axes.set_xticks(sorted(closed["tokens"].unique()))
        axes.minorticks_off()
        axes.grid(axis="y")
    method_legend(figure, look, handle("not learnt, or below the floor", GREY, "o", fillstyle="none"))
    return figure
