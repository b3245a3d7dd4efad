"""Figures of the comparison: quality by method, student, task and language, its price, the claims, learning curves."""

from __future__ import annotations

from typing import Any

import matplotlib
import numpy as np
import pandas as pd
import seaborn
from matplotlib.figure import Figure
from matplotlib.patches import Rectangle

from study.analysis.figures.style import (
    GREY,
    LOOK,
    MACRO,
    METRICS,
    PALE,
    Style,
    handle,
    method_legend,
    new_figure,
    panels,
    sized,
    student_styles,
    styles,
)
from study.analysis.numbers.analysis import Analysis
from study.analysis.numbers.claims import CONTRADICTED, SUPPORTED, UNDECIDED
from study.analysis.numbers.results import FLOOR, TEACHER
from study.analysis.numbers.statistics import performance_profile

SHOWN = {SUPPORTED: "shown as claimed", CONTRADICTED: "shown not to be so", UNDECIDED: "not shown either way"}
VERDICT_STYLES = {SUPPORTED: ("#0072b2", "o"), CONTRADICTED: ("#d55e00", "X"), UNDECIDED: ("#7a7a7a", "D")}
CHOSEN = "#d62728"
#: Held-out losses above this share of the loss before training lie outside the panels of learning curves.
HIGHEST_LOSS = 1.5

CAPTIONS = {
    "quality_heatmap": "Share of the teacher's macro test score that each method's student retains, in percent, with"
    " its 95 % interval below. A frame marks each student's best method on development data.",
    "quality_latency": "Macro test score against the median latency of one sequence. Methods of one student have the"
    " same latency. The one chosen on development data is large, with a black edge and its 95 % interval. The line is"
    " the Pareto front of the chosen methods and the teacher.",
    "per_task": "Test score of every method in every task. Ticks are single fine-tuning runs (means over the task's"
    " languages), marks their mean; the dashed line is the teacher, the dotted ones are the untrained students.",
    "per_language": "Test score by language of every task that has several, × 100. Fine-tuning saw the first alone.",
    "performance_profiles": "Share of fine-tuned models (all students, tasks and seeds) that score above each share of"
    " the teacher's score of their task: a line further to the right is better, and one that falls steeply is even.",
    "claims": "Every contrast of the paper's claims: difference of macro test scores with its 95 % interval. A claim"
    " has its effects to the right of the ticks (equivalence: between two); the band is the margin on both sides of"
    " zero. Colours and marks say what is shown of a contrast (failures: after Holm's correction over the claim), words"
    " on the right what of the claim.",
    "learning_curves": "Held-out value of each method's own loss, relative to its value before training, by tokens and"
    " by time, a line per distillation seed. Only shapes can be compared: the losses measure different things. Times"
    " depend on which run came first: with a shared teacher, the first to need a layer computes it, and later ones read"
    " it. Losses more than half above that before training lie outside.",
}


def names(analysis: Analysis) -> list[str]:
    """The figures that these results give: one by language only where a task has several."""
    return [name for name in CAPTIONS if name != "per_language" or not analysis.per_language.empty]


@matplotlib.rc_context(LOOK)
def quality_heatmap(analysis: Analysis) -> Figure:
    """Method x student: percent of the teacher's macro test score retained, with its interval; the teacher is 100."""
    look, students, table = styles(analysis.comparison), list(analysis.comparison.students), analysis.summary
    shares = table[table["method"] != TEACHER].set_index(["method", "student"])
    values = 100 * shares["retained"].unstack("student").loc[list(look), students]
    low, high = (100 * shares[column] for column in ("retained_low", "retained_high"))
    notes = values.copy().astype(object)
    for method, student in shares.index:
        bounds = low[method, student], high[method, student]
        interval = "" if np.isnan(bounds).any() else f"\n{bounds[0]:.1f} – {bounds[1]:.1f}"
        notes.loc[method, student] = f"{values.loc[method, student]:.1f}{interval}"
    values.loc[TEACHER], notes.loc[TEACHER] = 100.0, "100"
    values, notes = (frame.loc[[TEACHER, *look]] for frame in (values, notes))

    figure = new_figure(0.8 + 0.42 * len(values), width=2.6 + 1.2 * len(students))
    axes = figure.subplots()
    seaborn.heatmap(
        values,
        ax=axes,
        annot=notes,
        fmt="",
        annot_kws={"size": 8},
        cmap="cividis",
        linewidths=1,
        cbar_kws={"label": "macro test score, % of teacher"},
    )
    axes.set_yticklabels(["teacher", *(style.label for style in look.values())], rotation=0)
    axes.set(xlabel="student", ylabel="")
    axes.tick_params(length=0)
    for best in table[table["selected"]].itertuples():
        corner = students.index(best.student), 1 + list(look).index(best.method)
        axes.add_patch(Rectangle(corner, 1, 1, fill=False, edgecolor=CHOSEN, linewidth=2, clip_on=False, zorder=3))
    return figure


@matplotlib.rc_context(LOOK)
def quality_latency(analysis: Analysis) -> Figure:
    """Macro test score against latency (ms, smallest batch and number of threads) with the Pareto front."""
    look, students, table = styles(analysis.comparison), list(analysis.comparison.students), analysis.summary
    measured = analysis.results.latency.sort_values(["batch_size", "threads"], kind="stable")
    measured = measured.groupby("student").first()
    latency = 1000 * measured["median_seconds"]

    figure = new_figure(4.6)
    axes = figure.subplots()
    chosen = table[table["selected"] | (table["method"] == TEACHER)].assign(latency=lambda t: t["student"].map(latency))
    front = chosen.sort_values(["latency", "test"], ascending=[True, False])
    front = front[front["test"] > front["test"].cummax().shift(fill_value=-np.inf)]
    axes.plot(front["latency"], 100 * front["test"], color=PALE, linewidth=1.5, zorder=1)
    tops: dict[str, float] = {}
    for row in table.itertuples():
        style, best = look.get(row.method) or Style("teacher", "black", "o"), row.selected or row.method == TEACHER
        looks: dict[str, Any] = {"markersize": 8 if best else 6, "markeredgecolor": "black" if best else "white"}
        x, y, low, high = latency[row.student], 100 * row.test, 100 * row.test_low, 100 * row.test_high
        if best:
            axes.vlines(x, low, high, color=style.color, linewidth=1, zorder=2)
        axes.plot(x, y, style.marker, color=style.color, markeredgewidth=0.6, zorder=4 if best else 3, **looks)
        tops[row.student] = max(tops.get(row.student, y), np.nanmax([y, high]) if best else y)
    ordered = latency[[*students, TEACHER]].sort_values()
    for place, (model, x) in enumerate(ordered.items()):
        axes.annotate(
            f"{model}\n{x:.3g} ms",
            (x, tops[model]),
            (0, 5),
            textcoords="offset points",
            ha="left" if 0 < place < len(ordered) - 1 else "right",
            va="bottom",
            fontsize=8,
            bbox={"facecolor": "white", "edgecolor": "none", "alpha": 0.8, "pad": 1},
        )
    batch, threads = measured.loc[TEACHER, ["batch_size", "threads"]].astype(int)
    tokens = int(analysis.results.latency["sequence_length"].iloc[0])
    words = f"batch of {batch}, {tokens} tokens, {threads} {'thread' if threads == 1 else 'threads'}"
    axes.set(xlabel=f"median latency (ms; {words})", ylabel=MACRO)
    axes.margins(x=0.15, y=0.12)
    axes.set_ylim(bottom=max(axes.get_ylim()[0], 0))  # intervals may go below what a score can
    axes.grid()
    handles = [handle(style.label, style.color, style.marker) for style in look.values()]
    handles += [handle("teacher", "black", "o"), handle("Pareto front", PALE, linestyle="-")]
    figure.legend(handles=handles, loc="outside right upper", frameon=False)
    return figure


@matplotlib.rc_context(LOOK)
def per_task(analysis: Analysis) -> Figure:
    """One panel per task: test score of every method (vertical axis) and student (colour), every fine-tuning run."""
    look, students = styles(analysis.comparison), student_styles(analysis.comparison)
    main = analysis.results.scores.query("main")
    keys = ["task", "metric", "method", "student", "distillation_seed", "finetuning_seed"]
    runs = main.groupby(keys, sort=False)["test"].mean().mul(100).reset_index()
    metrics = runs.groupby("task", sort=False)["metric"].first()
    trained = {method: style for method, style in look.items() if method != FLOOR} or look
    shown = runs[runs["method"].isin(list(trained))].assign(label=lambda rows: rows["method"].map(_labels(look)))
    marks: dict[str, Any] = {
        "x": "test",
        "y": "label",
        "hue": "student",
        "order": _labels(trained).values(),
        "hue_order": students,
    }
    marks |= {"palette": [color for color, _ in students.values()], "legend": False}
    columns = min(3, len(metrics))
    grid = seaborn.catplot(
        shown, kind="strip", col="task", col_wrap=columns, sharex=False, dodge=True, jitter=False, marker="|", size=5,
        linewidth=0.8, **marks,
    )  # fmt: skip
    figure = sized(grid, 0.8 + -(-len(metrics) // columns) * (0.75 + 0.23 * len(trained)))
    levels = runs.groupby(["task", "method", "student"])["test"].mean()
    for task, axes in grid.axes_dict.items():
        seaborn.pointplot(
            shown[shown["task"] == task], ax=axes, errorbar=None, linestyle="none", markersize=4.5, markeredgewidth=0,
            dodge=0.8 * (1 - 1 / len(students)) if len(students) > 1 else False,
            markers=[marker for _, marker in students.values()], **marks,
        )  # fmt: skip
        axes.axvline(levels[task, TEACHER, TEACHER], color="black", linestyle="--", linewidth=1, zorder=1)
        for student, (color, _) in students.items():
            if FLOOR in look:
                axes.axvline(levels[task, FLOOR, student], color=color, linestyle=":", linewidth=1.5, zorder=1)
        axes.set(title=task, xlabel=f"{METRICS.get(metrics[task], metrics[task])} × 100", ylabel="")
        axes.grid(axis="y")
        axes.tick_params(axis="y", length=0)
    handles = []
    for student, (color, marker) in students.items():
        handles.append(handle(student, color, marker))
        if FLOOR in look:
            handles.append(handle(f"{student}, untrained", color, linestyle=":", linewidth=1.5))
    handles.append(handle("teacher", "black", linestyle="--", linewidth=1))
    figure.legend(handles=handles, loc="outside upper center", ncols=len(students) + 1, frameon=False)
    return figure


def _labels(look: dict[str, Style]) -> dict[str, str]:
    return {method: style.label for method, style in look.items()}


@matplotlib.rc_context(LOOK)
def performance_profiles(analysis: Analysis) -> Figure:
    """Share of fine-tuned models above each share of the teacher's score of their task, a line per method."""
    look = styles(analysis.comparison)
    kept = analysis.scores / analysis.teacher_scores.mean("finetuning_seed")
    thresholds = np.linspace(float(kept.min()) - 0.02, max(float(kept.max()), 1) + 0.02, 400)
    figure = new_figure(3.4)
    axes = figure.subplots()
    for place, (method, style) in enumerate(look.items()):
        shares = performance_profile(kept.sel({"method": method}), list(thresholds))
        axes.plot(100 * thresholds, 100 * shares, color=style.color, marker=style.marker, markersize=4,
                  markevery=(4 * place, 50), linewidth=1.2, drawstyle="steps-post")  # fmt: skip
    axes.axvline(100, color="black", linestyle="--", linewidth=1)
    axes.set(xlabel="test score, % of the teacher's in the task", ylabel="fine-tuned models above it (%)")
    axes.grid()
    method_legend(figure, look, handle("teacher", "black", linestyle="--", linewidth=1))
    return figure


@matplotlib.rc_context(LOOK)
def per_language(analysis: Analysis) -> Figure:
    """Method x language, one panel per student and task: main metric x 100; the teacher on top of each."""
    table, look = analysis.per_language, styles(analysis.comparison)
    students, tasks = list(analysis.comparison.students), list(table["task"].unique())
    by_task = {task: rows[table.columns[5:-3]].dropna(axis=1, how="all") for task, rows in table.groupby("task")}
    widths = [by_task[task].shape[1] for task in tasks]
    figure, grid = panels(
        pd.MultiIndex.from_product([students, tasks], names=["student", "task"]).to_frame(index=False),
        height=0.7 + len(students) * (0.5 + 0.22 * (len(look) + 1)),
        width=1.9 + 0.3 * sum(widths) + 0.3 * len(tasks),
        row="student",
        col="task",
        sharex=False,
        sharey=False,
        despine=False,
        gridspec_kws={"width_ratios": widths},
    )
    for (student, task), axes in grid.items():
        own = table[(table["task"] == task) & table["student"].isin([student, TEACHER])]
        scores = by_task[task].loc[own.index].set_axis(own["method"]).loc[[TEACHER, *look]]
        seaborn.heatmap(
            100 * scores,
            ax=axes,
            annot=True,
            fmt=".0f",
            annot_kws={"size": 6.5},
            cmap="cividis",
            vmin=100 * by_task[task].min().min(),
            vmax=100 * by_task[task].max().max(),
            linewidths=0.5,
            cbar=False,
        )
        shown = ["teacher", *_labels(look).values()] if task == tasks[0] else []
        axes.set_yticks(np.arange(len(shown)) + 0.5, shown, rotation=0)
        axes.set(title=f"{task}, {student}", xlabel="", ylabel="")
        axes.tick_params(length=0)
    return figure


@matplotlib.rc_context(LOOK)
def claims(analysis: Analysis) -> Figure:
    """Forest plot, one row per contrast of a claim: effect and 95 % interval (points), margin, bounds of the region."""
    table, judged = analysis.contrasts, analysis.verdicts.set_index("claim")["verdict"]
    table = table.assign(height=np.arange(len(table)) + 0.8 * table["claim"].ne(table["claim"].shift()).cumsum())
    figure = new_figure(0.8 + 0.17 * table["height"].max())
    axes = figure.subplots()
    axes.axvline(0, color=GREY, linewidth=0.8, zorder=1)
    for row in table.itertuples():
        color, marker = VERDICT_STYLES[row.shown]
        axes.barh(row.height, 2 * row.margin, left=-row.margin, height=1, color="#ececec", zorder=0)
        bounds = [bound for bound in (row.lower, row.upper) if np.isfinite(bound)]
        axes.vlines(bounds, row.height - 0.5, row.height + 0.5, color="black", linewidth=1.2, zorder=2)
        if row.missing:
            axes.annotate("not run", (0, row.height), (4, 0), textcoords="offset points", va="center", fontsize=7)
        axes.hlines(row.height, row.low, row.high, color=color, linewidth=1.4, zorder=3)
        axes.plot(row.effect, row.height, linestyle="", marker=marker, markersize=4.5, color=color, zorder=4)
    for claim, rows in table.groupby("claim", sort=False):
        corner = (1.01, rows["height"].mean())
        axes.annotate(f"{claim} {judged[claim]}", corner, xycoords=("axes fraction", "data"), va="center", fontsize=8)
    axes.set_yticks(table["height"], table["contrast"], fontsize=7)
    axes.set_ylim(table["height"].max() + 0.8, table["height"].min() - 0.8)
    axes.set_xlabel("difference of macro test scores (points of 0–100)")
    axes.tick_params(axis="y", length=0)
    axes.margins(x=0.05)
    figure.legend(
        handles=[handle(SHOWN[verdict], *style, linestyle="-") for verdict, style in VERDICT_STYLES.items()],
        loc="outside upper center",
        ncols=len(VERDICT_STYLES),
        frameon=False,
    )
    return figure


@matplotlib.rc_context(LOOK)
def learning_curves(analysis: Analysis) -> Figure:
    """Held-out loss(step) / loss(0) of each method's own loss, against tokens and against time, a panel per student."""
    curves = analysis.results.curves
    look, ran = styles(analysis.comparison), set(curves["method"])
    trained = {method: style for method, style in look.items() if method in ran}
    keys = ["student", "method", "distillation_seed"]
    curves = curves[curves["method"].isin(list(trained))].assign(
        ratio=lambda rows: rows["loss"] / rows.groupby(keys)["loss"].transform("first"),
        tokens=lambda rows: rows["tokens"] / 1e6,
        minutes=lambda rows: rows["seconds"] / 60,
    )
    units = {"tokens": "training tokens (millions)", "minutes": "training time (minutes)"}
    grid = seaborn.relplot(
        curves.melt([*keys, "ratio"], list(units), var_name="unit", value_name="spent"),
        kind="line",
        x="spent",
        y="ratio",
        row="unit",
        col="student",
        col_order=list(analysis.comparison.students),
        hue="method",
        style="method",
        palette={method: style.color for method, style in trained.items()},
        markers={method: style.marker for method, style in trained.items()},
        dashes=False,
        units="distillation_seed",
        estimator=None,
        markersize=5,
        markeredgewidth=0.3,
        linewidth=1.2,
        legend=False,
        facet_kws={"sharex": "row"},
    )
    figure = sized(grid, 5)
    for (unit, student), axes in grid.axes_dict.items():
        axes.axhline(1, color="#a6a6a6", linewidth=0.8, zorder=0)
        axes.set(title=student if unit == "tokens" else "", xlabel=units[unit], ylabel="")
        axes.set_ylim(0, min(1.05 * curves["ratio"].max(), HIGHEST_LOSS))
        axes.grid()
    figure.supylabel("held-out loss / loss before training", fontsize=9)
    method_legend(figure, trained)
    return figure
