"""Figures of the ablations: variants beside the methods that they vary, and the learning rates that were tried."""

from __future__ import annotations

from typing import Any

import matplotlib
import numpy as np
import pandas as pd
from matplotlib.figure import Figure

from study.analysis.figures.style import (
    GREY,
    LOOK,
    MACRO,
    STYLES,
    handle,
    label,
    method_legend,
    panels,
    student_styles,
    styles,
)
from study.analysis.numbers.analysis import Analysis

VARIANTS = (
    "Macro test score of a method of the grid (filled) and its variants (open), mean over distillation seeds; dots are"
    " single distilled models."
)
TRIED = (
    "What tuning tried, a row per student: linear probes on development data (left; a line that leaves the panel"
    " falls far below it) and each method's own held-out loss (right), after tuning's steps. Filled marks: the rates of"
    " the results, if they have this student."
)


@matplotlib.rc_context(LOOK)
def ablation(analysis: Analysis, *variants: str) -> Figure | None:
    """Macro test score (0-100) of every distilled model and their mean, a panel per reference, a line per variant.

    Args:
        variants: axes, as in the column ``variant`` of the effects. None where the results hold none of them.
    """
    table = analysis.effects[analysis.effects["variant"].isin(variants)]
    if table.empty:
        return None
    groups = {name: [name, *own] for name, own in table.groupby("reference", sort=False)["method"]}
    runs, students = analysis.ablation_macro, student_styles(analysis.comparison)
    students = {student: style for student, style in students.items() if student in set(runs["student"])}
    lines = [len(own) for own in groups.values()]
    figure, grid = panels(
        pd.DataFrame({"reference": list(groups)}),
        height=0.8 + 0.24 * sum(lines) + 0.2 * len(lines),
        row="reference",
        sharey=False,
        gridspec_kws={"height_ratios": lines},
    )
    for reference, axes in grid.items():
        for height, method in enumerate(groups[reference]):
            color = STYLES[method].color if method == reference and method in STYLES else GREY
            for student, (_, marker) in students.items():
                own = 100 * runs.loc[(runs["method"] == method) & (runs["student"] == student), "test"]
                axes.plot(own, [height] * len(own), ".", color=color, markersize=4, alpha=0.7)
                axes.plot(own.mean(), height, marker, color=color, markersize=7, zorder=3,
                          markerfacecolor=color if method == reference else "white")  # fmt: skip
        axes.set(title="", xlabel="", ylim=(lines[list(groups).index(reference)] - 0.5, -0.5))
        axes.set_yticks(range(len(groups[reference])), [label(method) for method in groups[reference]])
        axes.tick_params(length=0)
        axes.spines["bottom"].set_visible(reference == list(groups)[-1])
        axes.margins(x=0.08)
        axes.grid(axis="x")
    figure.axes[-1].set_xlabel(MACRO)
    handles = [handle(student, GREY, marker) for student, (_, marker) in students.items()]
    figure.legend(handles=handles, loc="outside upper center", ncols=len(handles), frameon=False)
    return figure


@matplotlib.rc_context(LOOK)
def learning_rates_tried(analysis: Analysis, tried: pd.DataFrame) -> Figure | None:
    """Development score and held-out loss of every candidate rate, a line of panels per student, a line per method.

    A mark is filled at the rate that the results' runs of that student were made with; None where nothing was tried.

    Args:
        tried: as from :func:`study.analysis.numbers.results.load_tuning`.
    """
    runs = analysis.results.runs.groupby(["student", "method"], sort=False)["options"].first()
    used = {model: (options or {}).get("learning_rate", np.nan) for model, options in runs.items()}
    look = {method: style for method, style in styles(analysis.comparison).items() if method in set(tried["method"])}
    if not look:
        return None
    words = {
        "development": "linear probes on\ndevelopment data (0–100)",
        "loss": "held-out loss,\n% of that before training",
    }
    tried = tried.melt(["student", "method", "learning_rate"], list(words), var_name="measure")
    height = 0.9 + 2.7 * tried["student"].nunique()
    figure, grid = panels(tried, height, row="student", col="measure", sharey=False)
    for (student, measure), axes in grid.items():
        own = tried[(tried["student"] == student) & (tried["measure"] == measure)]
        for method, style in look.items():
            values = 100 * own[own["method"] == method].set_index("learning_rate")["value"].sort_index()
            taken = values[np.isclose(values.index, used.get((student, method), np.nan), rtol=1e-6)]
            drawn: dict[str, Any] = {"color": style.color, "marker": style.marker, "markersize": 5}
            axes.plot(values.index, values, markerfacecolor="white", linewidth=1, **drawn)
            axes.plot(taken.index, taken, linestyle="", **drawn)
        axes.set(xscale="log", title=student, xlabel="", ylabel=words[measure])
        top = 100 * own["value"].max()
        # a rate that breaks a method would flatten all others
        axes.set_ylim(*((top - 15, top + 1) if measure == "development" else (0, 100)))
        axes.grid()
    figure.supxlabel("learning rate", fontsize=9)
    method_legend(figure, look)
    return figure
