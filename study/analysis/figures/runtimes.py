"""Quality against latency where the runtime and its precision are part of the choice."""

from __future__ import annotations

import matplotlib
import pandas as pd
from matplotlib.figure import Figure
from matplotlib.ticker import StrMethodFormatter

from study.analysis.figures.style import GREY, HALO, LOOK, PALE, SPARE, STYLES, Style, handle, new_figure
from study.analysis.runtimes import LABELS
from study.descriptions import TEACHER

MARKERS = {"eager": "o", "compiled": "D", "bf16": "v", "onnx": "s", "onnx-int8": "*"}


@matplotlib.rc_context(LOOK)
def quality_latency(choices: pd.DataFrame) -> Figure:
    """Development score of the frozen probe against milliseconds a text, for every model in every runtime.

    Colour: method; marker: runtime, filled in 8 bits. The line joins what is recommended.

    Args:
        choices: :func:`study.analysis.runtimes.choices`.
    """
    figure = new_figure(4.6)
    axes = figure.subplots()
    look = {TEACHER: Style("teacher", "black", "o")}
    for method in choices["method"].unique():
        look.setdefault(method, STYLES.get(method) or Style(method, *SPARE[len(look) % len(SPARE)]))
    front = choices[choices["recommended"]]
    axes.plot(front["milliseconds"], front["score"], color=PALE, linewidth=1.5, zorder=1)
    for row in choices.itertuples():
        color = look[row.method].color
        face = color if row.precision == "int8" else "white"
        axes.plot(row.milliseconds, row.score, linestyle="", marker=MARKERS[row.runtime], zorder=3,
                  markersize=12 if row.precision == "int8" else 7, color=color, markerfacecolor=face)  # fmt: skip
    for best in front.itertuples():
        axes.annotate(
            f"{best.model}\n{best.milliseconds:.3g} ms", (best.milliseconds, best.score), (0, 9),
            textcoords="offset points", ha="center", va="bottom", fontsize=7.5, color=GREY, bbox=HALO,
        )  # fmt: skip
    axes.set_xscale("log")
    axes.xaxis.set_major_formatter(StrMethodFormatter("{x:g}"))
    axes.xaxis.set_minor_formatter(StrMethodFormatter("{x:g}"))
    axes.set(xlabel="median milliseconds a text as served (log scale; batch of 1, one thread)")
    axes.set(ylabel="mean development score of the frozen probe (0–100)")
    axes.margins(x=0.12, y=0.18)
    axes.grid()
    handles = [handle(style.label, style.color, "o") for style in look.values()]
    for runtime, marker in MARKERS.items():
        if runtime in set(choices["runtime"]):
            face = GREY if "int8" in runtime else "white"
            handles.append(handle(LABELS[runtime], GREY, marker, markerfacecolor=face))
    handles.append(handle("recommended", PALE, linestyle="-"))
    figure.legend(handles=handles, loc="outside right upper", frameon=False)
    return figure
