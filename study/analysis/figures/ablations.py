"""Figures of the ablations: variants beside the methods that they vary, and the learning rates that were tried."""

from __future__ import annotations

from typing import Any

import numpy as np
import pandas as pd
from matplotlib.figure import Figure

from study.analysis.figures.style import (
    GREY,
    draw_interval,
    drawn,
    handle,
    method_legend,
    panels,
    student_styles,
    styles,
    varied,
)
from study.analysis.numbers.analysis import Analysis
from study.analysis.numbers.statistics import DISTILLATION_SEEDS, TOLD_APART

VARIANTS = (
    "What each variant changes of the macro test score of the method named above its panel, paired by student and"
    " seeds: mean with its 95 % interval (an arrow: it goes on); small marks are single distilled models less those of"
    " the reference. Filled: told apart from it (Holm, 5 %, over distillation seeds)."
)
TRIED = (
    "What tuning tried, a row per student: linear probes on development data (left; a line that leaves the panel"
    " falls far below it) and each method's own held-out loss (right), after tuning's steps. Filled marks: the rates of"
    " the results, if they have this student."
)


@drawn
def ablation(analysis: Analysis, *variants: str) -> Figure | None:
    """Effect of every variant with its interval (points), a panel per reference, which is the line at zero.

    Args:
        variants: axes, as in the column ``variant`` of the effects. None where the results hold none of them.
    """
    table = analysis.effects[analysis.effects["variant"].isin(variants)]
    if table.empty:
        return None
    groups = dict(tuple(table.groupby("reference", sort=False)))
    runs = analysis.ablation_macro.set_index(["method", "student", "distillation_seed"])["test"]
    singles = {row.Index: 100 * (runs[row.method] - runs[row.reference]).dropna() for row in table.itertuples()}
    seen = pd.concat([*singles.values(), table["effect"]])
    low, high = min(seen.min(), 0), max(seen.max(), 0)
    within = low - 0.35 * (high - low) - 0.5, high + 0.35 * (high - low) + 0.5
    ran = set(analysis.ablation_macro["student"])
    students = {student: look for student, look in student_styles(analysis.comparison).items() if student in ran}
    lines = [len(own) for own in groups.values()]
    figure, grid = panels(
        pd.DataFrame({"reference": list(groups)}), 0.9 + 0.26 * sum(lines) + 0.35 * len(lines), row="reference",
        sharey=False, gridspec_kws={"height_ratios": lines},
    )  # fmt: skip
    for reference, axes in grid.items():
        rows = groups[reference]
        axes.axvline(0, color=GREY, linewidth=0.8, zorder=1)
        for height, row in enumerate(rows.itertuples()):
            for student, (color, marker) in students.items():
                own = singles[row.Index].xs(student, level="student")
                axes.plot(own, [height] * len(own), marker, color=color, markersize=3.5, alpha=0.6, linestyle="")
            draw_interval(axes, height, row.low, row.high, within, GREY)
            face = GREY if row.p_holm <= TOLD_APART and row.covers in DISTILLATION_SEEDS else "white"
            axes.plot(row.effect, height, "D", color=GREY, markersize=7, zorder=4, markerfacecolor=face)
        axes.set(xlabel="", xlim=within, ylim=(len(rows) - 0.5, -0.5))
        axes.set_title("")
        axes.set_title(f"from {varied(analysis.comparison, reference)}", loc="left")
        axes.set_yticks(range(len(rows)), [varied(analysis.comparison, method, reference) for method in rows["method"]])
        axes.tick_params(length=0)
        axes.tick_params(axis="y", pad=8)  # beside arrows at the edge
        axes.spines["bottom"].set_visible(reference == list(groups)[-1])
        axes.grid(axis="x")
    figure.axes[-1].set_xlabel("difference of macro test scores (points of 0–100)")
    handles = [handle(student, color, marker) for student, (color, marker) in students.items()]
    figure.legend(handles=handles, loc="outside upper center", ncols=len(handles))
    return figure


@drawn
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
