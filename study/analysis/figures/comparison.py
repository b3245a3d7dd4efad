"""Figures of the comparison: quality by method, student, task and language, its price, the claims, learning curves."""

from __future__ import annotations

import textwrap
from typing import Any

import matplotlib
import numpy as np
import pandas as pd
import seaborn
from matplotlib.figure import Figure

from study.analysis.figures.style import (
    GREY,
    HALO,
    LOOK,
    MACRO,
    METRICS,
    PALE,
    Style,
    contrast_words,
    draw_interval,
    handle,
    label,
    method_legend,
    new_figure,
    number,
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
VERDICT_STYLES = {SUPPORTED: ("#0072b2", "o"), CONTRADICTED: ("#b84a00", "X"), UNDECIDED: ("#6b6b6b", "D")}
#: How light red, green and blue are.
LUMINANCE = np.array([0.2126, 0.7152, 0.0722])
#: Held-out losses above this share of the loss before training lie outside the panels of learning curves.
HIGHEST_LOSS = 1.5

CAPTIONS = {
    "quality": "Share of the teacher's macro test score that each method's student keeps, in percent, with its 95 %"
    " interval (an arrow: it goes on), the best on top. Dotted: the floor, the same student as initialised; dashed: the"
    " teacher. Ringed: the student's best method on development data.",
    "quality_latency": "Macro test score against the median latency of one sequence. Large, with black edge and 95 %"
    " interval: the method chosen on development data. The line is the Pareto front of these and the teacher.",
    "per_task": "Test score of every method in every task. Ticks are single fine-tuning runs (means over the task's"
    " languages), marks their mean; the dashed line is the teacher, the dotted ones are the untrained students.",
    "per_language": "What each method adds to the untrained student's score in every language, points of 0–100; below"
    " each language the score of the untrained student itself. Fine-tuning saw the first language of a task alone.",
    "performance_profiles": "Share of fine-tuned models (all students, tasks and seeds) that score above each share of"
    " the teacher's score of their task: a line further to the right is better, and one that falls steeply is even.",
    "claims": "Every contrast of the paper's claims: difference of macro test scores with its 95 % interval. A claim"
    " has its effects to the right of the ticks (equivalence: between two); the band is the margin on both sides of"
    " zero. Colours and marks say what is shown of a contrast (failures: after Holm's correction over the claim), the"
    " words above the rows what of the claim.",
    "learning_curves": "Held-out value of each method's own loss, relative to its value before training, by tokens, a"
    f" line per distillation seed, up to {HIGHEST_LOSS:g} times that before training. Only shapes can be compared: the"
    " losses measure different things.",
}


def names(analysis: Analysis) -> list[str]:
    """The figures that these results give: one by language only where a task has several."""
    return [name for name in CAPTIONS if name != "per_language" or not analysis.per_language.empty]


@matplotlib.rc_context(LOOK)
def quality(analysis: Analysis) -> Figure:
    """Percent of the teacher's macro test score that methods keep, with intervals, a panel per student, sorted."""
    look, students = styles(analysis.comparison), list(analysis.comparison.students)
    table = analysis.summary[analysis.summary["method"] != TEACHER]
    shares = table.assign(**{name: 100 * table[name] for name in ("retained", "retained_low", "retained_high")})
    left, right = min(90, shares["retained"].min()) - 8, max(100, shares["retained"].max()) + 5
    columns = min(2, len(students))
    rows = -(-len(students) // columns)
    figure, grid = panels(
        pd.DataFrame({"student": students}),
        height=0.8 + rows * (0.5 + 0.2 * len(look)),
        col="student",
        col_wrap=columns,
        sharey=False,
    )
    for student, axes in grid.items():
        own = shares[shares["student"] == student].sort_values("retained", ascending=False, kind="stable")
        if FLOOR in look:
            floor = own.loc[own["method"] == FLOOR, "retained"].iloc[0]
            axes.axvline(floor, color=look[FLOOR].color, linestyle=":", linewidth=1.4, zorder=1)
        axes.axvline(100, color="black", linestyle="--", linewidth=1, zorder=1)
        for height, row in enumerate(own.itertuples()):
            color = look[row.method].color
            draw_interval(axes, height, row.retained_low, row.retained_high, (left, right), color)
            axes.plot(row.retained, height, look[row.method].marker, color=color, markersize=6, zorder=4)
            if row.selected:
                axes.plot(row.retained, height, "o", color="black", markersize=12, fillstyle="none", zorder=4)
        axes.set_yticks(range(len(own)), [label(method) for method in own["method"]])
        axes.set(title=student, xlabel="", ylabel="", xlim=(left, right), ylim=(len(own) - 0.4, -0.6))
        axes.tick_params(axis="y", length=0)
        axes.grid(axis="x")
    figure.supxlabel("macro test score, % of the teacher's", fontsize=9)
    handles = [handle("teacher", "black", linestyle="--", linewidth=1)]
    if FLOOR in look:
        handles.append(handle("floor: untrained", look[FLOOR].color, linestyle=":", linewidth=1.4))
    handles.append(handle("best on development data", "black", "o", fillstyle="none"))
    figure.legend(handles=handles, loc="outside upper center", ncols=3, frameon=False)
    return figure


@matplotlib.rc_context(LOOK)
def quality_latency(analysis: Analysis) -> Figure:
    """Macro test score against latency (ms, smallest batch and number of threads) with the Pareto front."""
    look, students, table = styles(analysis.comparison), list(analysis.comparison.students), analysis.summary
    measured = analysis.results.latency.sort_values(["batch_size", "threads"], kind="stable")
    measured = measured.groupby("student").first()
    latency = 1000 * measured["median_seconds"]

    figure = new_figure(3.6)
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
            bbox=HALO,
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
    """Method x language, a panel per student and task: points above the untrained student, else below the teacher."""
    table, look = analysis.per_language, styles(analysis.comparison)
    base = FLOOR if FLOOR in look else TEACHER
    students, tasks = list(analysis.comparison.students), list(table["task"].unique())
    shown = [method for method in (TEACHER, *look) if method != base]
    scores = 100 * table.set_index(["student", "task", "method"])[table.columns[5:-3]]
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
    figure, grid = panels(
        pd.MultiIndex.from_product([students, tasks], names=["student", "task"]).to_frame(index=False),
        height=0.2 + len(students) * (0.65 + 0.16 * len(shown)),
        width=2.0 + 0.33 * sum(widths) + 0.3 * len(tasks),
        row="student",
        col="task",
        sharex=False,
        sharey=False,
        despine=False,
        gridspec_kws={"width_ratios": widths},
    )
    for (student, task), axes in grid.items():
        own = added[student, task]
        notes = own.map(number, digits=0, sign="+")
        seaborn.heatmap(own, ax=axes, annot=notes, fmt="", annot_kws={"size": 6.5}, cmap="PuOr_r", vmin=-limit,
                        vmax=limit, linewidths=0.5, cbar=False)  # fmt: skip
        for note, color in zip(axes.texts, axes.collections[0].get_facecolor(), strict=True):
            note.set_color("black" if color[:3] @ LUMINANCE > 0.45 else "white")
        words = ["the teacher", *(label(method) for method in shown[1:])] if base == FLOOR else map(label, shown)
        axes.set_yticks(np.arange(len(shown)) + 0.5, list(words) if task == tasks[0] else [""] * len(shown), rotation=0)
        heads = [f"{language}\n{score:.0f}" for language, score in of(student, task, base).items()]
        axes.set_xticks(np.arange(len(heads)) + 0.5, heads, rotation=0, fontsize=7)
        axes.set(title=f"{task}, {student}", xlabel="", ylabel="")
        axes.tick_params(length=0)
    return figure


@matplotlib.rc_context(LOOK)
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
            axes.annotate("not run", (0, row.height), (4, 0), textcoords="offset points", va="center", fontsize=7)
        axes.hlines(row.height, row.low, row.high, color=color, linewidth=1.4, zorder=3)
        axes.plot(row.effect, row.height, linestyle="", marker=marker, markersize=4.5, color=color, zorder=4)
    for claim, rows in table.groupby("claim", sort=False):
        text, verdict = judged.loc[claim, ["text", "verdict"]]
        axes.annotate(
            textwrap.fill(f"{claim}, {verdict}: {text}", 88),
            (0, rows["height"].min() - 0.7),
            (-150, 0),
            xycoords=("axes fraction", "data"),
            textcoords="offset points",
            va="bottom",
            fontsize=8,
            color=VERDICT_STYLES[verdict][0],
            bbox=HALO,
        )
    pairs = zip(table["first"], table["second"], strict=True)
    axes.set_yticks(table["height"], [contrast_words(*pair) for pair in pairs], fontsize=7)
    axes.set_ylim(table["height"].max() + 0.8, table["height"].min() - 2.2)
    axes.spines["left"].set_visible(False)
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
    """Held-out loss(step) / loss(0) of each method's own loss, against tokens, a panel per student."""
    curves = analysis.results.curves
    look, ran = styles(analysis.comparison), set(curves["method"])
    trained = {method: style for method, style in look.items() if method in ran}
    keys = ["student", "method", "distillation_seed"]
    curves = curves[curves["method"].isin(list(trained))].assign(
        ratio=lambda rows: rows["loss"] / rows.groupby(keys)["loss"].transform("first"),
        tokens=lambda rows: rows["tokens"] / 1e6,
    )
    grid = seaborn.relplot(
        curves,
        kind="line",
        x="tokens",
        y="ratio",
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
    )
    figure = sized(grid, 3.2)
    for student, axes in grid.axes_dict.items():
        axes.axhline(1, color="#a6a6a6", linewidth=0.8, zorder=0)
        axes.set(title=student, xlabel="", ylabel="")
        axes.set_ylim(0, min(1.05 * curves["ratio"].max(), HIGHEST_LOSS))
        axes.grid()
    figure.supxlabel("training tokens (millions)", fontsize=9)
    figure.supylabel("held-out loss / loss before training", fontsize=9)
    method_legend(figure, trained)
    return figure
