"""Figures of a student's layers while it trains."""

from __future__ import annotations

from typing import Any

import pandas as pd
import seaborn
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import FixedLocator, FuncFormatter, NullLocator

from study.analysis.dynamics import MEASURES
from study.analysis.figures.style import GREY, drawn, handle, label, method_legend, new_figure, style_of
from study.records_beside import DynamicsResult


def _shades(depth: int) -> list[Any]:
    """Of the embeddings, grey, of each layer, darker with depth, and of the last, which stands out."""
    return ["#b0b0b0", *seaborn.color_palette("blend:#9cc3e6,#3f7fc1,#08306b", depth - 1), "#c2500a"]


def _tokens(axes: Axes, measured: pd.DataFrame) -> None:
    """Tokens on an axis that starts at 0 and is logarithmic from the first snapshot on."""
    seen = sorted(measured["tokens"].unique())
    axes.set_xscale("symlog", linthresh=next(tokens for tokens in seen if tokens), linscale=0.6)
    axes.xaxis.set_major_locator(FixedLocator([0, *seen[2:-2:2], *seen[-2:]]))
    axes.xaxis.set_minor_locator(NullLocator())
    axes.xaxis.set_major_formatter(
        FuncFormatter(lambda value, _: f"{value / 1e6:.1g}" if value < 1e6 else f"{value / 1e6:.0f}")
    )
    axes.grid()


@drawn
def layers_by_tokens(measured: pd.DataFrame, result: DynamicsResult, methods: list[str]) -> Figure:
    """Score of a probe of every layer against tokens read: a row per task, a column per method, a line per layer.

    Dashed: the teacher's last layer. Hollow: the end of a run of a larger budget.

    Args:
        measured: :func:`study.analysis.dynamics.measures` of ``result``.
    """
    tasks = [*result.teacher]
    figure = new_figure(0.8 + 1.7 * len(tasks))
    grid = figure.subplots(len(tasks), len(methods), sharex=True, sharey="row", squeeze=False)
    depth = measured["layer"].max()
    shades = _shades(depth)
    for panels, task in zip(grid, tasks, strict=True):
        for axes, method in zip(panels, methods, strict=True):
            own = measured[(measured["method"] == method) & (measured["measure"] == task)]
            for (layer, budget), line in own.groupby(["layer", "budget"]):
                face = None if budget == result.runs[0].budget else "white"
                look = {"color": shades[layer], "marker": "o", "markerfacecolor": face}
                axes.plot(line["tokens"], line["value"], markersize=3 if face is None else 4, linewidth=1.4, **look)
            axes.axhline(100 * result.teacher[task][-1], color=GREY, linestyle="--", linewidth=1)
            _tokens(axes, measured)
        panels[0].set_ylabel(f"{task}\n(development, 0\u2013100)")
    for axes, method in zip(grid[0], methods, strict=True):
        axes.set_title(label(method))
    figure.supxlabel("million tokens read", fontsize=9)
    names = ["embeddings", *(f"layer {i}" for i in range(1, depth)), f"layer {depth}, the last"]
    handles = [handle(name, shade, "o", "-") for name, shade in zip(names, shades, strict=True)]
    handles.append(handle("teacher\u2019s last", GREY, "", "--"))
    figure.legend(handles=handles, loc="outside right upper")
    return figure


@drawn
def last_layer_by_tokens(measured: pd.DataFrame, result: DynamicsResult) -> Figure:
    """Measures of the last layer against tokens read, a line per method: probes, CKA and divergence of relations."""
    last = measured[(measured["layer"] == measured["layer"].max()) & (measured["budget"] == result.runs[0].budget)]
    methods = [run.method for run in result.runs if run.budget == result.runs[0].budget]
    look = {method: style_of(method, place) for place, method in enumerate(methods)}
    asked = [*result.teacher, *MEASURES]
    figure = new_figure(5.0)
    grid = figure.subplots(-(-len(asked) // 2), 2, sharex=True, squeeze=False)
    for axes, measure in zip(grid.flat, asked, strict=False):
        for method, style in look.items():
            line = last[(last["method"] == method) & (last["measure"] == measure)]
            looks = {"color": style.color, "marker": style.marker, "markersize": 5, "linewidth": 1.2}
            axes.plot(line["tokens"], line["value"], **looks)
        if measure in result.teacher:
            axes.axhline(100 * result.teacher[measure][-1], color=GREY, linestyle="--", linewidth=1)
        axes.set_title(MEASURES.get(measure, f"{measure} (dashed: teacher)"))
        _tokens(axes, measured)
    figure.supxlabel("million tokens read", fontsize=9)
    method_legend(figure, look)
    return figure
