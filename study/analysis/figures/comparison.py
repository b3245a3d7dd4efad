"""Figures of the comparison: quality by method, student, task and language, its price, the claims, learning curves."""

from __future__ import annotations

import textwrap
from typing import Any

import numpy as np
import pandas as pd
import seaborn
from matplotlib.figure import Figure

from study.analysis.figures.style import (
    GREY,
    HALF,
    MACRO,
    METRICS,
    PALE,
    WIDTH,
    Style,
    contrast_words,
    draw_interval,
    drawn,
    handle,
    label,
    lines_of_methods,
    method_legend,
    new_figure,
    note,
    panels,
    ranking,
    sized,
    student_styles,
    styles,
)
from study.analysis.numbers.analysis import Analysis
from study.analysis.numbers.claims import CONTRADICTED, SUPPORTED, UNDECIDED
from study.analysis.numbers.results import FLOOR, RUN, TEACHER
from study.analysis.numbers.statistics import performance_profile
from study.analysis.numbers.text import number

SHOWN = {SUPPORTED: "shown as claimed", CONTRADICTED: "shown not to be so", UNDECIDED: "not shown either way"}
VERDICT_STYLES = {SUPPORTED: ("#0072b2", "o"), CONTRADICTED: ("#b84a00", "X"), UNDECIDED: ("#6b6b6b", "D")}
#: The columns of the table of scores by language that are languages.
LANGUAGES = slice(5, -3)
#: How light red, green and blue are.
LUMINANCE = np.array([0.2126, 0.7152, 0.0722])
#: Held-out losses above this share of the loss before training lie outside the panels of learning curves.
HIGHEST_LOSS = 1.5

TEACHER_LINE: dict[str, Any] = {"color": "black", "linestyle": "--", "linewidth": 1}

CAPTIONS = {
    "quality": "Share of the teacher's macro test score that each method's student keeps, in percent, with its 95 %"
    " interval (an arrow: it goes on), the best on top. Dotted: the floor, the same student as initialised; dashed: the"
    " teacher. Ringed: the student's method that development data chose.",
    "quality_latency": "Macro test score against the median latency of one sequence. Large, with black edge and 95 %"
    " interval: the method chosen on development data. The line is the Pareto front of these and the teacher. Hollow,"
    " where there are any: rows beside the students, which no method here trained.",
    "per_task": "Test score of every method in every task. Ticks are single fine-tuning runs (means over the task's"
    " languages), marks their mean; the dashed line is the teacher, the dotted ones are the untrained students.",
    "per_language": "What each method adds to the untrained student's score in every language, points of 0–100; below"
    " each language the score of the untrained student itself. Fine-tuning saw the first language of a task alone.",
    "performance_profiles": "Share of fine-tuned models (all students, tasks and seeds) that score above each share of"
    " the teacher's score of their task: a line further to the right is better, and one that falls steeply is even.",
    "claims": "Every contrast of the paper's claims: difference of macro test scores with its own 95 % interval (those"
    " of tables are simultaneous over a claim's contrasts unless it is supported). A claim has its effects to the right"
    " of the ticks (equivalence: between two); the band is the margin on both sides of zero. Colours and marks say what"
    " is shown of a contrast (failures: after Holm's correction over the claim), the words above the rows what of the"
    " claim.",
    "learning_curves": "Held-out value of each method's own loss, relative to its value before training, by tokens, a"
    f" line per distillation seed, up to {HIGHEST_LOSS:g} times that before training. Only shapes can be compared: the"
    " losses measure different things.",
}


def names(analysis: Analysis) -> list[str]:
    """The figures that these results give: languages where there are several, claims where a contrast was run."""
    left_out = set() if len(analysis.per_language.columns[LANGUAGES]) > 1 else {"per_language"}
    left_out |= {"claims"} if analysis.contrasts["missing"].astype(bool).all() else set()
    return [name for name in CAPTIONS if name not in left_out]


@drawn
def quality(analysis: Analysis) -> Figure:
    """Percent of the teacher's macro test score that methods keep, with intervals, a panel per student, sorted."""
    look, students = styles(analysis.comparison), list(analysis.comparison.students)
    shares = analysis.summary[analysis.summary["method"] != TEACHER].assign(filled=True)
    shares[["value", "low", "high"]] = 100 * shares[["retained", "retained_low", "retained_high"]]
    within = min(90, shares["value"].min()) - 8, max(100, shares["value"].max()) + 5
    columns = min(2, len(students))
    height, width = 0.8 + -(-len(students) // columns) * (0.5 + 0.2 * len(look)), WIDTH if columns > 1 else HALF
    every = pd.DataFrame({"student": students})
    figure, grid = panels(every, height, width, col="student", col_wrap=columns, sharey=False)
    floor_line: dict[str, Any] = {"linestyle": ":", "linewidth": 1.4}
    for student, axes in grid.items():
        axes.set_title(student)
        ranked = ranking(axes, shares[shares["student"] == student], look, within)
        for floor in ranked.loc[ranked["method"] == FLOOR, "value"]:
            axes.axvline(floor, color=look[FLOOR].color, zorder=1, **floor_line)
        axes.axvline(100, zorder=1, **TEACHER_LINE)
        for best in ranked[ranked["selected"]].itertuples():
            axes.plot(best.value, best.height, "o", color="black", markersize=12, fillstyle="none", zorder=4)
    figure.supxlabel("macro test score, % of the teacher's", fontsize=9)
    handles = [handle("teacher", **TEACHER_LINE)]
    if FLOOR in look:
        handles.append(handle("floor: untrained", look[FLOOR].color, **floor_line))
    handles.append(handle("chosen on development data", "black", "o", fillstyle="none"))
    figure.legend(handles=handles, loc="outside upper center", ncols=3)
    return figure


@drawn
def quality_latency(analysis: Analysis) -> Figure:
    """Macro test score against latency (ms, smallest batch and number of threads) with the Pareto front.

    Rows beside the students are drawn, too, but are no part of the front.
    """
    look, measured = styles(analysis.comparison) | {TEACHER: Style("teacher", "black", "o")}, analysis.timed
    latency = 1000 * measured["median_seconds"]
    table = analysis.summary.assign(latency=lambda rows: rows["student"].map(latency))
    table[["test", "low", "high"]] = 100 * table[["test", "test_low", "test_high"]]
    table["best"] = table["selected"] | (table["method"] == TEACHER)

    figure = new_figure(4.6, HALF)
    axes = figure.subplots()
    front = table[table["best"]].sort_values(["latency", "test"], ascending=[True, False])
    front = front[front["test"] > front["test"].cummax().shift(fill_value=-np.inf)]
    axes.plot(front["latency"], front["test"], color=PALE, linewidth=1.5, zorder=1)
    for row in table.itertuples():
        style, edge = look[row.method], "black" if row.best else "white"
        if row.best:
            axes.vlines(row.latency, row.low, row.high, color=style.color, linewidth=1, zorder=2)
        axes.plot(row.latency, row.test, style.marker, color=style.color, markeredgewidth=0.6, markeredgecolor=edge,
                  markersize=8 if row.best else 6, zorder=4 if row.best else 3)  # fmt: skip
    tops = table.assign(top=table["high"].where(table["best"])).groupby("student")[["test", "top"]].max().max(axis=1)
    ordered = latency[[*analysis.comparison.students, TEACHER]].sort_values()
    for place, (model, x) in enumerate(ordered.items()):
        side = {0: "center", len(ordered) - 1: "right"}.get(place, "left")
        note(axes, f"{model}\n{x:.3g} ms", (x, tops[model]), (0, 5), ha=side, va="bottom", fontsize=8)
    for row in analysis.beside.itertuples():
        at = (row.milliseconds, 100 * row.macro)
        axes.plot(*at, "D", color=GREY, markersize=6, fillstyle="none", zorder=3)
        above = at[1] > np.interp(at[0], front["latency"], front["test"])  # words stay off the front
        away, side, edge = ((-14, 5), "center", "bottom") if above else ((6, -3), "left", "center")
        words = f"{row.method}\n{row.milliseconds:.3g} ms"
        note(axes, words, at, away, ha=side, va=edge, fontsize=7, color=GREY)
    batch, threads = measured.loc[TEACHER, ["batch_size", "threads"]].astype(int)
    tokens = int(analysis.results.latency["sequence_length"].iloc[0])
    words = f"batch of {batch}, {tokens} tokens, {threads} {'thread' if threads == 1 else 'threads'}"
    axes.set(xlabel=f"median latency (ms; {words})", ylabel=MACRO)
    axes.margins(x=0.15, y=0.12)
    bottom, top = axes.get_ylim()
    axes.set_ylim(max(bottom, 0), top + 0.08 * (top - bottom))  # no score is below 0; words stand above the teacher
    axes.set_xlim(left=max(axes.get_xlim()[0], 0))
    axes.grid()
    handles = [handle(style.label, style.color, style.marker) for style in look.values()]
    handles.append(handle("Pareto front", PALE, linestyle="-"))
    figure.legend(handles=handles, loc="outside lower center", ncols=2)
    return figure


@drawn
def per_task(analysis: Analysis) -> Figure:
    """One panel per task: test score of every method (vertical axis) and student (colour), every fine-tuning run."""
    look, students = styles(analysis.comparison), student_styles(analysis.comparison)
    keys = ["task", "metric", "method", "student", "distillation_seed", "finetuning_seed"]
    runs = analysis.results.scores.query("main").groupby(keys, sort=False)["test"].mean().mul(100).reset_index()
    metrics = runs.groupby("task", sort=False)["metric"].first()
    trained = {method: style.label for method, style in look.items() if method != FLOOR or len(look) == 1}
    shown = runs.assign(label=runs["method"].map(trained)).dropna(subset="label")
    marks: dict[str, Any] = {"x": "test", "y": "label", "hue": "student", "order": trained.values(), "legend": False}
    marks |= {"hue_order": students, "palette": [color for color, _ in students.values()]}
    columns = 2 if len(metrics) == 4 else min(3, len(metrics))
    grid = seaborn.catplot(
        shown, kind="strip", col="task", col_wrap=columns, sharex=False, dodge=True, jitter=False, marker="|", size=5,
        linewidth=0.8, **marks,
    )  # fmt: skip
    figure = sized(grid, 0.8 + -(-len(metrics) // columns) * (0.75 + 0.23 * len(trained)))
    levels = runs.groupby(["task", "method", "student"])["test"].mean()
    floor_line: dict[str, Any] = {"linestyle": ":", "linewidth": 1.5}
    for task, axes in grid.axes_dict.items():
        seaborn.pointplot(
            shown[shown["task"] == task], ax=axes, errorbar=None, linestyle="none", markersize=4.5, markeredgewidth=0,
            dodge=0.8 * (1 - 1 / len(students)) if len(students) > 1 else False,
            markers=[marker for _, marker in students.values()], **marks,
        )  # fmt: skip
        axes.axvline(levels[task, TEACHER, TEACHER], zorder=1, **TEACHER_LINE)
        for student, (color, _) in students.items():
            if FLOOR in look:
                axes.axvline(levels[task, FLOOR, student], color=color, zorder=1, **floor_line)
        axes.set(title=task, xlabel=f"{METRICS.get(metrics[task], metrics[task])} × 100", ylabel="")
        axes.grid(axis="y")
        axes.tick_params(axis="y", length=0, pad=8)
    handles = []
    for student, (color, marker) in students.items():
        handles.append(handle(student, color, marker))
        if FLOOR in look:
            handles.append(handle(f"{student}, untrained", color, **floor_line))
    handles.append(handle("teacher", **TEACHER_LINE))
    figure.legend(handles=handles, loc="outside upper center", ncols=len(students) + 1)
    return figure


@drawn
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
    axes.axvline(100, **TEACHER_LINE)
    axes.set(xlabel="test score, % of the teacher's in the task", ylabel="fine-tuned models above it (%)")
    axes.grid()
    method_legend(figure, look, handle("teacher", **TEACHER_LINE))
    return figure


@drawn
def per_language(analysis: Analysis) -> Figure:
    """Method x language, a panel per student and task: points above the untrained student, else below the teacher."""
    table, look = analysis.per_language, styles(analysis.comparison)
    base = FLOOR if FLOOR in look else TEACHER
    students, tasks = list(analysis.comparison.students), list(table["task"].unique())
    shown = [method for method in (TEACHER, *look) if method != base]
    scores = 100 * table.set_index(["student", "task", "method"])[table.columns[LANGUAGES]]
    by_task = {task: scores.xs(task, level="task").dropna(axis=1, how="all") for task in tasks}

    def of(student: str, task: str, method: str) -> pd.Series:
        return by_task[task].loc[TEACHER if method == TEACHER else student, method]

    added = {
        (student, task): pd.DataFrame({m: of(student, task, m) - of(student, task, base) for m in shown}).T
        for student in students
        for task in tasks
    }
    widths = [by_task[task].shape[1] for task in tasks]
    limit = max(np.abs(own.drop(TEACHER, errors="ignore")).to_numpy().max() for own in added.values())
    heads = {task: textwrap.fill(task, max(14, int(4.4 * width))) for task, width in zip(tasks, widths, strict=True)}
    lines = 2 + max(head.count("\n") for head in heads.values())
    height = 0.2 + len(students) * (0.5 + 0.15 * lines + 0.16 * len(shown))
    every = pd.MultiIndex.from_product([students, tasks], names=["student", "task"]).to_frame(index=False)
    figure, grid = panels(
        every, height, 2.0 + 0.33 * sum(widths) + 0.3 * len(tasks), row="student", col="task", sharex=False,
        sharey=False, despine=False, gridspec_kws={"width_ratios": widths},
    )  # fmt: skip
    for (student, task), axes in grid.items():
        own = added[student, task]
        notes = own.map(number, digits=0, sign="+")
        seaborn.heatmap(own, ax=axes, annot=notes, fmt="", annot_kws={"size": 7.5}, cmap="PuOr_r", vmin=-limit,
                        vmax=limit, linewidths=0.5, cbar=False)  # fmt: skip
        for text, color in zip(axes.texts, axes.collections[0].get_facecolor(), strict=True):
            text.set_color("black" if color[:3] @ LUMINANCE > 0.45 else "white")
        words = ["the teacher" if method == TEACHER else label(method) for method in shown]
        axes.set_yticks(np.arange(len(shown)) + 0.5, words if task == tasks[0] else [""] * len(shown), rotation=0)
        below = [f"{language}\n{score:.0f}" for language, score in of(student, task, base).items()]
        axes.set_xticks(np.arange(len(below)) + 0.5, below, rotation=0, fontsize=8)
        axes.set(title=f"{heads[task]}\n{student}", xlabel="", ylabel="")
        axes.tick_params(length=0)
    return figure


@drawn
def claims(analysis: Analysis) -> Figure:
    """Forest plot, one row per contrast of a claim: effect and 95 % interval (points), margin, bounds of the region."""
    table, judged = analysis.contrasts, analysis.verdicts.set_index("claim")
    table = table.assign(height=np.arange(len(table)) + 2.2 * table["claim"].ne(table["claim"].shift()).cumsum())
    figure = new_figure(0.9 + 0.17 * table["height"].max())
    axes = figure.subplots()
    axes.axvline(0, color=GREY, linewidth=0.8, zorder=1)
    for row in table.itertuples():
        color, marker = VERDICT_STYLES[row.shown]
        axes.barh(row.height, 2 * row.margin, left=-row.margin, height=1, color="#ececec", zorder=0)
        bounds = [bound for bound in (row.lower, row.upper) if np.isfinite(bound)]
        axes.vlines(bounds, row.height - 0.5, row.height + 0.5, color="black", linewidth=1.2, zorder=2)
        if row.missing:
            note(axes, "not run", (0, row.height), (4, 0), va="center", fontsize=7)
        draw_interval(axes, row.height, row.low, row.high, (-np.inf, np.inf), color)
        axes.plot(row.effect, row.height, linestyle="", marker=marker, markersize=4.5, color=color, zorder=4)
    for claim, rows in table.groupby("claim", sort=False):
        text, verdict = judged.loc[claim, ["text", "verdict"]]
        words, at = textwrap.fill(f"{claim}, {verdict}: {text}", 88), (0, rows["height"].min() - 0.7)
        looks = {"xycoords": ("axes fraction", "data"), "color": VERDICT_STYLES[verdict][0]}
        note(axes, words, at, (-150, 0), va="bottom", fontsize=8, **looks)
    pairs = zip(table["first"], table["second"], strict=True)
    axes.set_yticks(table["height"], [contrast_words(*pair) for pair in pairs], fontsize=7)
    axes.set_ylim(table["height"].max() + 0.8, table["height"].min() - 2.2)
    axes.spines["left"].set_visible(False)
    axes.set_xlabel("difference of macro test scores (points of 0–100)")
    axes.tick_params(axis="y", length=0)
    axes.margins(x=0.05)
    handles = [handle(SHOWN[verdict], *look, linestyle="-") for verdict, look in VERDICT_STYLES.items()]
    figure.legend(handles=handles, loc="outside upper center", ncols=len(handles))
    return figure


@drawn
def learning_curves(analysis: Analysis) -> Figure:
    """Held-out loss(step) / loss(0) of each method's own loss, against tokens, a panel per student."""
    curves = analysis.results.curves
    look = {method: own for method, own in styles(analysis.comparison).items() if method in set(curves["method"])}
    curves = curves[curves["method"].isin(list(look))].assign(tokens=lambda rows: rows["tokens"] / 1e6)
    curves["ratio"] = curves["loss"] / curves.groupby(RUN)["loss"].transform("first")
    figure, grid = lines_of_methods(
        curves, look, 3.2, x="tokens", y="ratio", col_order=list(analysis.comparison.students), linewidth=1.2,
        units="distillation_seed", estimator=None,
    )  # fmt: skip
    for axes in grid.values():
        axes.axhline(1, color="#a6a6a6", linewidth=0.8, zorder=0)
        axes.set_ylim(0, min(1.05 * curves["ratio"].max(), HIGHEST_LOSS))
    figure.supxlabel("training tokens (millions)", fontsize=9)
    figure.supylabel("held-out loss / loss before training", fontsize=9)
    return figure
