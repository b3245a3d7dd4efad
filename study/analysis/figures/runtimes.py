"""Quality against latency where the runtime and its precision are part of the choice."""

from __future__ import annotations

import pandas as pd
from matplotlib.figure import Figure
from matplotlib.ticker import LogLocator, StrMethodFormatter

from study.analysis.figures.style import GREY, PALE, STYLES, Style, drawn, handle, new_figure, note, style_of
from study.analysis.runtimes import LABELS
from study.descriptions import TEACHER

MARKERS = {"eager": "o", "compiled": "D", "bf16": "v", "onnx": "s", "onnx-int8": "*"}


@drawn
def quality_latency(choices: pd.DataFrame) -> Figure:
    """Development score of the frozen probe against milliseconds a text, for every model in every runtime.

    Colour: method; marker: runtime, filled in 8 bits. The line joins the front.

    Args:
        choices: :func:`study.analysis.runtimes.choices`.
    """
    figure = new_figure(4.6)
    axes = figure.subplots()
    look = {TEACHER: Style("teacher", "#d6006c", "o")}
    for method in sorted(choices["method"].unique(), key=[TEACHER, *STYLES, *choices["method"]].index):
        look.setdefault(method, style_of(method, len(look)))
    front = choices[choices["front"]]
    axes.plot(front["milliseconds"], front["score"], color=PALE, linewidth=1.5, zorder=1)
    for row in choices.itertuples():
        color = look[row.method].color
        face = color if row.precision == "int8" else "white"
        axes.plot(row.milliseconds, row.score, linestyle="", marker=MARKERS[row.runtime], zorder=3,
                  markersize=12 if row.precision == "int8" else 7, color=color, markerfacecolor=face)  # fmt: skip
    for best in front.itertuples():
        words, at = f"{best.model}\n{best.milliseconds:.3g} ms", (best.milliseconds, best.score)
        note(axes, words, at, (0, 9), ha="center", va="bottom", fontsize=7.5, color=GREY)
    axes.set_xscale("log")
    axes.xaxis.set_major_formatter(StrMethodFormatter("{x:g}"))
    axes.xaxis.set_minor_locator(LogLocator(subs=(2, 5)))
    axes.xaxis.set_minor_formatter(StrMethodFormatter("{x:g}"))
    axes.set_xlabel("median milliseconds a text as served (log scale; batch of 1, one thread)")
    axes.set_ylabel("mean development score of the frozen probe (0–100)")
    axes.margins(x=0.12, y=0.18)
    axes.grid()
    handles = [handle(style.label, style.color, "o") for style in look.values()]
    for runtime, marker in MARKERS.items():
        if runtime in set(choices["runtime"]):
            face = GREY if "int8" in runtime else "white"
            handles.append(handle(LABELS[runtime], GREY, marker, markerfacecolor=face))
    handles.append(handle("front", PALE, linestyle="-"))
    figure.legend(handles=handles, loc="outside right upper")
    return figure
