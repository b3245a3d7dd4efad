"""The figures of the comparison: each takes the results and returns a matplotlib figure; :func:`save` writes it."""

from __future__ import annotations

import io
import itertools
import os
from dataclasses import dataclass
from pathlib import Path

import matplotlib
import matplotlib.ticker
import numpy as np
import pandas as pd
import seaborn
from IPython.display import Image
from matplotlib.figure import Figure
from matplotlib.lines import Line2D
from matplotlib.patches import Rectangle

from study.analysis.ablations import ABLATIONS, effects
from study.analysis.results import FLOOR, TEACHER, Results, macro
from study.analysis.statistics import performance_profile, score_arrays
from study.analysis.tables import per_language as language_scores
from study.analysis.tables import summary
from study.analysis.verdicts import CONTRADICTED, SUPPORTED, UNDECIDED, contrasts, verdicts
from study.files import write_file


@dataclass(frozen=True)
class Style:
    """How a method looks in every figure."""

    label: str
    color: str
    marker: str
    hatch: str = ""


# One hue per family, told apart from the others by colour-blind readers; lightness, marker and hatch within a family.
STYLES = {
    "none": Style("none: as initialised", "#a6a6a6", "o"),
    "mlm": Style("MLM: no teacher", "#4d4d4d", "s", "xx"),
    "od": Style("OD: output distribution", "#e6b800", "D", ".."),
    "hs-last": Style("HS: last", "#a9cfe8", "v", ""),
    "hs-top": Style("HS: top", "#6faed6", "^", "//"),
    "hs-uniform": Style("HS: uniform", "#3a87c0", "<", "\\\\"),
    "hs-uniform-consecutive": Style("HS: uniform-consecutive", "#1a5c9e", ">", "--"),
    "hs-uniform+last": Style("HS: uniform+last", "#08306b", "p", ""),
    "mha-minilmv2": Style("MHA: MiniLMv2", "#d55e00", "*", ""),
    "mha-direct": Style("MHA: DirectMiniLM", "#7f2704", "X", "//"),
}
SPARE = [("#009e73", "P"), ("#cc79a7", "h"), ("#66c2a4", "d"), ("#8c6bb1", "8"), ("#00441b", "H")]
METRICS = {"accuracy": "accuracy", "macro_f1": "macro F1", "spearman": "Spearman's ρ"}
STUDENT_STYLES = [("#0072b2", "o"), ("#e69f00", "s"), ("#005c44", "^"), ("#cc79a7", "D"), ("#4d4d4d", "v")]
SHOWN = {SUPPORTED: "shown as claimed", CONTRADICTED: "shown not to be so", UNDECIDED: "not shown either way"}
VERDICT_STYLES = {SUPPORTED: ("#0072b2", "o"), CONTRADICTED: ("#d55e00", "X"), UNDECIDED: ("#7a7a7a", "D")}

LOOK = {
    "font.size": 9,
    "axes.titlesize": 9,
    "axes.labelsize": 9,
    "xtick.labelsize": 8,
    "ytick.labelsize": 8,
    "legend.fontsize": 8,
    "hatch.linewidth": 0.6,
    "hatch.color": "white",
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.axisbelow": True,
    "grid.color": "#e5e5e5",
    "svg.hashsalt": "study",
    "svg.fonttype": "path",
}

CAPTIONS = {
    "claims": "Every contrast of the paper's claims: difference of macro test scores with its 95 % interval. A claim"
    " has its effects to the right of the ticks (equivalence: between two); the band is the margin on both sides of"
    " zero. Colours and marks say what is shown of a contrast (failures: after Holm's correction over the claim), words"
    " on the right what of the claim.",
    "quality_heatmap": "Share of the teacher's macro test score that each method's student retains, in percent, with"
    " its 95 % interval below. A frame marks each student's best method on development data.",
    "quality_latency": "Macro test score against the median latency of one sequence. Methods of one student have the"
    " same latency: they are set side by side, the one chosen on development data at the true place. Bars are 95 %"
    " intervals, dots single distillation seeds where there are several. The line is the Pareto front of the chosen"
    " methods and the teacher.",
    "per_task": "Test score of every method in every task. Open marks are single fine-tuning runs, filled ones their"
    " mean; the dashed line is the teacher, the dotted ones are the untrained students.",
    "performance_profiles": "Share of fine-tuned models (all students, tasks and seeds) that score above each share of"
    " the teacher's score of their task: a line further to the right is better, and one that falls steeply is even.",
    "per_language": "Test score by language of every task that has several, × 100. Fine-tuning saw English alone.",
    "learning_curves": "Held-out value of each method's own loss, relative to its value before training, by tokens and"
    " by time. Only shapes can be compared: the losses measure different things. Times depend on which run came first:"
    " with a shared teacher, the first to need a layer computes it, and later ones read it.",
    "distillation_cost": "Training speed of every run: tokens of text per second. With a shared teacher, the first run"
    " to need one of its layers computes it, and later ones read it from disk: these are the speeds of this study's"
    " runs in their order, not of methods (`make benchmark` measures those).",
}


OTHER_CAPTIONS = {
    "layer_similarity": "Linear centred kernel alignment of the hidden states of every student layer and teacher layer"
    " on held-out text, mean over distillation seeds; brighter is more alike.",
    "relation_divergence": "Divergence of the attention relations of the student's last layer from those of each"
    " teacher layer (mean over queries, keys and values) on held-out text; lower is more alike.",
    "learning_rates_tried": "What `make tune` tried, a row per student: linear probes on development data (left; a line"
    " that leaves the panel falls far below it) and each method's own held-out loss (right), after tuning's steps."
    " Filled marks: the rates of the results, if they have this student.",
}
ABLATION_CAPTION = (
    "Macro test score of a reference (filled) and its variants (open), mean over distillation seeds; dots are single"
    " distilled models."
)


def caption(name: str) -> str:
    """What the figure of that name shows."""
    return (CAPTIONS | OTHER_CAPTIONS).get(name, ABLATION_CAPTION)


def names(results: Results) -> list[str]:
    """The figures that these results give: one by language only where a task has several."""
    return [name for name in CAPTIONS if name != "per_language" or not language_scores(results).empty]


def styles(results: Results) -> dict[str, Style]:
    """The style of every method of the grid, in its order; methods unknown to this module get spare ones."""
    methods = [method for method in results.runs["method"].unique() if method != TEACHER]
    unknown = [method for method in methods if method not in STYLES]
    spare = {method: Style(method, *SPARE[place % len(SPARE)]) for place, method in enumerate(unknown)}
    return {method: STYLES.get(method) or spare[method] for method in methods}


def _students(results: Results) -> dict[str, tuple[str, str]]:
    """Colour and marker of every student of the grid, in its order."""
    students = [student for student in results.runs["student"].unique() if student != TEACHER]
    return dict(zip(students, itertools.cycle(STUDENT_STYLES), strict=False))


def _figure(width: float, height: float) -> Figure:
    return Figure(figsize=(width, height), layout="constrained")


@matplotlib.rc_context(LOOK)
def quality_heatmap(results: Results) -> Figure:
    """Method x student: percent of the teacher's macro test score retained, with its interval; the teacher is 100."""
    look, students = styles(results), list(_students(results))
    table = summary(results)
    cells = table[table["method"] != TEACHER].set_index(["method", "student"])
    values = 100 * cells["retained"].unstack("student").loc[list(look), students]
    low, high = (100 * cells[column] for column in ("retained_low", "retained_high"))
    notes = values.copy().astype(object)
    for method, student in cells.index:
        bounds = low[method, student], high[method, student]
        interval = "" if np.isnan(bounds).any() else f"\n{bounds[0]:.1f} – {bounds[1]:.1f}"
        notes.loc[method, student] = f"{values.loc[method, student]:.1f}{interval}"
    values.loc[TEACHER], notes.loc[TEACHER] = 100.0, "100"
    values, notes = (frame.loc[[TEACHER, *look]] for frame in (values, notes))

    figure = _figure(2.6 + 1.2 * len(students), 0.8 + 0.42 * len(values))
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
        place = students.index(best.student), 1 + list(look).index(best.method)
        axes.add_patch(Rectangle(place, 1, 1, fill=False, edgecolor="#d62728", linewidth=2, clip_on=False, zorder=3))
    return figure


@matplotlib.rc_context(LOOK)
def quality_latency(results: Results) -> Figure:
    """Macro test score against latency (ms, smallest batch and number of threads) with the Pareto front."""
    look, students = styles(results), _students(results)
    table, runs = summary(results), macro(results)
    measured = results.latency.sort_values(["batch_size", "threads"], kind="stable").groupby("student").first()
    latency = 1000 * measured["median_seconds"]
    places = latency[[*students, TEACHER]].sort_values()
    span = places.iloc[-1] - places.iloc[0]
    width = np.clip(0.75 * places.diff().min(), 0.12 * span, 0.2 * span)

    figure = _figure(7, 4.6)
    axes = figure.subplots()
    chosen = table[table["selected"] | (table["method"] == TEACHER)].assign(latency=lambda t: t["student"].map(latency))
    front = chosen.sort_values(["latency", "test"], ascending=[True, False])
    front = front[front["test"] > front["test"].cummax().shift(fill_value=-np.inf)]
    axes.plot(front["latency"], 100 * front["test"], color="#b0b0b0", linewidth=1.5, zorder=1)
    for student in students:
        best = chosen.loc[chosen["student"] == student, "method"]
        others = [method for method in look if method not in set(best)]
        order = [*others[: len(others) // 2], *best, *others[len(others) // 2 :]]
        center = order.index(best.item()) if len(best) else (len(order) - 1) / 2
        for place, method in enumerate(order):
            x = latency[student] + width * (place - center) / len(order)
            _score_point(axes, table, runs, method, student, x, look[method].color, look[method].marker)
    _score_point(axes, table, runs, TEACHER, TEACHER, latency[TEACHER], "black", "o")
    tops = table.assign(top=table[["test", "test_high"]].max(axis=1)).groupby("student")["top"].max()
    for model, x in latency[[*students, TEACHER]].items():
        axes.annotate(
            f"{model}\n{x:.3g} ms",
            (x, 100 * tops[model]),
            (4, 5),
            textcoords="offset points",
            ha="right",
            va="bottom",
            fontsize=8,
            bbox={"facecolor": "white", "edgecolor": "none", "alpha": 0.8, "pad": 1},
        )
    batch, threads = measured.loc[TEACHER, ["batch_size", "threads"]].astype(int)
    tokens = int(results.latency["sequence_length"].iloc[0])
    words = f"batch of {batch}, {tokens} tokens, {threads} {'thread' if threads == 1 else 'threads'}"
    axes.set(xlabel=f"median latency (ms; {words})", ylabel="macro test score (0–100)")
    axes.margins(x=0.15, y=0.12)
    axes.set_ylim(bottom=max(axes.get_ylim()[0], 0))  # intervals may go below what a score can
    axes.grid()
    handles = [_handle(style.label, style.color, style.marker) for style in look.values()]
    handles += [_handle("teacher", "black", "o"), Line2D([], [], color="#b0b0b0", label="Pareto front")]
    figure.legend(handles=handles, loc="outside right upper", frameon=False)
    return figure


def _score_point(
    axes, table: pd.DataFrame, runs: pd.DataFrame, method: str, student: str, x: float, color: str, marker: str
) -> None:
    single = runs[(runs["method"] == method) & (runs["student"] == student)]["test"]
    mean = table[(table["method"] == method) & (table["student"] == student)].iloc[0]
    axes.vlines(x, 100 * mean["test_low"], 100 * mean["test_high"], color=color, linewidth=1, zorder=2)
    if len(single) > 1:
        axes.plot([x] * len(single), 100 * single, linestyle="", marker=".", markersize=3, color=color, zorder=2)
    axes.plot(x, 100 * mean["test"], linestyle="", marker=marker, markersize=7, color=color, markeredgecolor="white",
              markeredgewidth=0.6, zorder=3)  # fmt: skip


def _handle(label: str, color: str, marker: str, linestyle: str = "") -> Line2D:
    return Line2D([], [], linestyle=linestyle, marker=marker, markersize=6, color=color, label=label)


@matplotlib.rc_context(LOOK)
def per_task(results: Results) -> Figure:
    """One panel per task: test score of every method (vertical axis) and student (colour), every fine-tuning run."""
    look, students = styles(results), _students(results)
    main = results.scores[results.scores["main"]]
    tasks = list(main["task"].unique())
    trained = [method for method in look if method != FLOOR] or list(look)
    columns = min(3, len(tasks))
    rows = -(-len(tasks) // columns)
    figure = _figure(7, 0.8 + rows * (0.75 + 0.21 * len(trained)))
    panels = figure.subplots(rows, columns, sharey=True, squeeze=False).flat
    dodge = {student: 0.5 * (place - (len(students) - 1) / 2) / len(students) for place, student in enumerate(students)}
    for axes, task in zip(panels, tasks, strict=False):
        scores = main[main["task"] == task]
        metric = scores["metric"].iloc[0]
        ceiling = 100 * scores.loc[scores["method"] == TEACHER, "test"].mean()
        axes.axvline(ceiling, color="black", linestyle="--", linewidth=1)
        for student, (color, marker) in students.items():
            own = scores[scores["student"] == student]
            floor = own.loc[own["method"] == FLOOR, "test"]
            if len(floor):
                axes.axvline(100 * floor.mean(), color=color, linestyle=":", linewidth=1.5)
            for place, method in enumerate(trained):
                values = 100 * own.loc[own["method"] == method, "test"]
                height = place + dodge[student]
                axes.plot(values, [height] * len(values), linestyle="", marker=marker, markersize=3.5, color=color,
                          markerfacecolor="none", markeredgewidth=0.6)  # fmt: skip
                axes.plot(values.mean(), height, linestyle="", marker=marker, markersize=5, color=color)
        axes.set(title=task, xlabel=f"{METRICS.get(metric, metric)} × 100")
        axes.set_yticks(range(len(trained)), [look[method].label for method in trained])
        axes.set_ylim(len(trained) - 0.5, -0.5)
        axes.grid(axis="y")
        axes.tick_params(axis="y", length=0)
    for axes in list(figure.axes)[len(tasks) :]:
        axes.set_axis_off()
    handles = []
    for student, (color, marker) in students.items():
        handles.append(_handle(student, color, marker))
        if FLOOR in look:
            handles.append(Line2D([], [], color=color, linestyle=":", linewidth=1.5, label=f"{student}, untrained"))
    handles.append(Line2D([], [], color="black", linestyle="--", linewidth=1, label="teacher"))
    figure.legend(handles=handles, loc="outside upper center", ncols=len(students) + 1, frameon=False)
    return figure


@matplotlib.rc_context(LOOK)
def performance_profiles(results: Results) -> Figure:
    """Share of fine-tuned models above each share of the teacher's score of their task, a line per method."""
    look, arrays = styles(results), score_arrays(results)
    teacher = arrays[TEACHER].mean(axis=(0, 2, 3))[:, None, None]
    kept = {method: arrays[method] / teacher for method in look}
    every = np.concatenate([scores.ravel() for scores in kept.values()])
    thresholds = np.linspace(every.min() - 0.02, max(every.max(), 1) + 0.02, 400)
    figure = _figure(7, 3.4)
    axes = figure.subplots()
    for place, (method, scores) in enumerate(kept.items()):
        color, marker = look[method].color, look[method].marker
        axes.plot(100 * thresholds, 100 * performance_profile(scores, thresholds), color=color, marker=marker,
                  markersize=4, markevery=(4 * place, 50), linewidth=1.2, drawstyle="steps-post")  # fmt: skip
    axes.axvline(100, color="black", linestyle="--", linewidth=1)
    axes.set(xlabel="test score, % of the teacher's in the task", ylabel="fine-tuned models above it (%)")
    axes.grid()
    handles = [_handle(style.label, style.color, style.marker, linestyle="-") for style in look.values()]
    handles.append(Line2D([], [], color="black", linestyle="--", linewidth=1, label="teacher"))
    figure.legend(handles=handles, loc="outside right upper", frameon=False)
    return figure


@matplotlib.rc_context(LOOK)
def per_language(results: Results) -> Figure:
    """Method x language, one panel per student and task: main metric x 100; the teacher on top of each."""
    table, look = language_scores(results), styles(results)
    students, tasks = list(_students(results)), list(table["task"].unique())
    languages = {
        task: [c for c in table.columns[5:-3] if table.loc[table["task"] == task, c].notna().any()] for task in tasks
    }
    widths = [len(own) for own in languages.values()]
    figure = _figure(1.9 + 0.3 * sum(widths) + 0.3 * len(tasks), 0.7 + len(students) * (0.5 + 0.22 * (len(look) + 1)))
    panels = figure.subplots(len(students), len(tasks), squeeze=False, width_ratios=widths)
    for line, student in zip(panels, students, strict=True):
        for axes, task in zip(line, tasks, strict=True):
            rows = table[(table["task"] == task) & table["student"].isin([student, TEACHER])].set_index("method")
            seaborn.heatmap(
                100 * rows.loc[[m for m in (TEACHER, *look) if m in rows.index], languages[task]],
                ax=axes,
                annot=True,
                fmt=".0f",
                annot_kws={"size": 6.5},
                cmap="cividis",
                vmin=100 * table.loc[table["task"] == task, languages[task]].min().min(),
                vmax=100 * table.loc[table["task"] == task, languages[task]].max().max(),
                linewidths=0.5,
                cbar=False,
            )
            shown = [look[m].label if m in look else m for m in rows.index] if task == tasks[0] else []
            axes.set_yticks(np.arange(len(shown)) + 0.5, shown, rotation=0)
            axes.set(title=f"{task}, {student}", xlabel="", ylabel="")
            axes.tick_params(length=0)
    return figure


@matplotlib.rc_context(LOOK)
def claims(results: Results) -> Figure:
    """Forest plot, one row per contrast of a claim: effect and 95 % interval (points), margin, bounds of the region."""
    table, judged = contrasts(results), verdicts(results).set_index("claim")["verdict"]
    table["height"] = np.arange(len(table)) + 0.8 * table["claim"].ne(table["claim"].shift()).cumsum()
    figure = _figure(7, 0.8 + 0.17 * table["height"].max())
    axes = figure.subplots()
    axes.axvline(0, color="#4d4d4d", linewidth=0.8, zorder=1)
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
        place = (1.01, rows["height"].mean())
        axes.annotate(f"{claim} {judged[claim]}", place, xycoords=("axes fraction", "data"), va="center", fontsize=8)
    axes.set_yticks(table["height"], table["contrast"], fontsize=7)
    axes.set_ylim(table["height"].max() + 0.8, table["height"].min() - 0.8)
    axes.set_xlabel("difference of macro test scores (points of 0–100)")
    axes.tick_params(axis="y", length=0)
    axes.margins(x=0.05)
    figure.legend(
        handles=[_handle(SHOWN[verdict], *style, linestyle="-") for verdict, style in VERDICT_STYLES.items()],
        loc="outside upper center",
        ncols=len(VERDICT_STYLES),
        frameon=False,
    )
    return figure


@matplotlib.rc_context(LOOK)
def ablation(results: Results, name: str) -> Figure | None:
    """One entry of ABLATIONS: macro test score (0-100) of every distilled model, their mean, one line per variant.

    References are filled and dark, variants open; None where the results hold no variant.
    """
    table = effects(results, {name: ABLATIONS[name]})
    if table.empty:
        return None
    runs = macro(results.ablations or results)
    groups = table.groupby("reference", sort=False)["variant"].agg(list)
    lines = [[(reference, True), *((variant, False) for variant in own)] for reference, own in groups.items()]
    heights = np.cumsum([1.6 * (first and place > 0) + (not first) for place, (_, first) in enumerate(sum(lines, []))])
    figure = _figure(6.4, 0.9 + 0.24 * (heights[-1] + 1))
    axes, labels = figure.subplots(), []
    for height, (method, reference) in zip(heights, sum(lines, []), strict=True):
        color = STYLES[method].color if reference else "#4d4d4d"
        for student, (_, marker) in _students(results.ablations or results).items():
            own = 100 * runs.loc[(runs["method"] == method) & (runs["student"] == student), "test"]
            axes.plot(own, [height] * len(own), ".", color=color, markersize=4, alpha=0.7)
            axes.plot(own.mean(), height, marker, color=color, markersize=7, zorder=3,
                      markerfacecolor=color if reference else "white")  # fmt: skip
        labels.append(STYLES[method].label if method in STYLES else method)
    axes.set_yticks(heights, labels)
    axes.set_ylim(heights[-1] + 0.7, -0.7)
    axes.set_xlabel("macro test score (0–100)")
    axes.tick_params(axis="y", length=0)
    axes.margins(x=0.08)
    axes.grid(axis="x")
    students = _students(results.ablations or results).items()
    handles = [_handle(student, "#4d4d4d", marker) for student, (_, marker) in students]
    figure.legend(handles=handles, loc="outside upper center", ncols=len(handles), frameon=False)
    return figure


@matplotlib.rc_context(LOOK)
def learning_rates_tried(results: Results, tried: pd.DataFrame) -> Figure | None:
    """Development score and held-out loss of every candidate rate (:func:`results.load_tuning`), a line per method.

    A line of panels per student tried. A mark is filled at the rate that the results' runs of that student were made
    with; None where nothing was tried.
    """
    runs = results.runs.groupby(["student", "method"], sort=False)["options"].first()
    used = {cell: options.get("learning_rate", np.nan) for cell, options in runs.items()}
    look = {method: style for method, style in styles(results).items() if method in set(tried["method"])}
    if not look:
        return None
    students = list(tried["student"].unique())
    figure = _figure(7, 0.9 + 2.7 * len(students))
    grid = figure.subplots(len(students), 2, squeeze=False, sharex=True)
    for line, student in zip(grid, students, strict=True):
        own = tried[tried["student"] == student]
        for axes, column in zip(line, ("development", "loss"), strict=True):
            for method, style in look.items():
                values = 100 * own[own["method"] == method].set_index("learning_rate")[column].sort_index()
                taken = values[np.isclose(values.index, used.get((student, method), np.nan), rtol=1e-6)]
                drawn = {"color": style.color, "marker": style.marker, "markersize": 5}
                axes.plot(values.index, values, markerfacecolor="white", linewidth=1, **drawn)
                axes.plot(taken.index, taken, linestyle="", **drawn)
            axes.set(xscale="log", title=student)
            axes.grid()
        scores = 100 * own["development"]
        line[0].set_ylim(scores.max() - 15, scores.max() + 1)  # a rate that breaks a method would flatten all others
        line[0].set_ylabel("linear probes on\ndevelopment data (0–100)")
        line[1].set_ylim(bottom=0, top=100)
        line[1].set_ylabel("held-out loss,\n% of that before training")
    figure.supxlabel("learning rate", fontsize=9)
    handles = [_handle(style.label, style.color, style.marker, linestyle="-") for style in look.values()]
    figure.legend(handles=handles, loc="outside right upper", frameon=False)
    return figure


@matplotlib.rc_context(LOOK)
def layer_similarity(similarity: pd.DataFrame) -> Figure:
    """CKA of every student layer (row) and teacher layer (column), a panel per student and method, mean over seeds."""
    methods, students = similarity["method"].unique(), similarity["student"].unique()
    columns = min(5, len(methods))
    lines = -(-len(methods) // columns)
    depths = [similarity.loc[similarity["student"] == student, "layer"].max() for student in students]
    figure = _figure(7, 0.6 + lines * sum(0.75 + 0.14 * depth for depth in depths))
    ratios = [0.75 + 0.14 * depth for depth in depths for _ in range(lines)]
    grid = figure.subplots(lines * len(students), columns, squeeze=False, sharex=True, height_ratios=ratios)
    lowest, panels = similarity["cka"].min(), iter(grid.flat)
    for student, place in itertools.product(students, range(lines * columns)):
        axes = next(panels)
        if place >= len(methods):
            axes.axis("off")
            continue
        method = methods[place]
        own = similarity[(similarity["student"] == student) & (similarity["method"] == method)]
        values = own.groupby(["layer", "teacher_layer"])["cka"].mean().unstack()
        image = axes.imshow(values, cmap="cividis", vmin=lowest, vmax=1, origin="lower", aspect="auto")
        axes.set_title(f"{student}\n{method}", fontsize=6.5)
        axes.set_xticks([0, values.shape[1] - 1], [1, values.shape[1]])
        axes.set_yticks([0, values.shape[0] - 1], [1, values.shape[0]])
        axes.tick_params(length=0, labelsize=6.5)
    figure.supxlabel("teacher layer", fontsize=9)
    figure.supylabel("student layer", fontsize=9)
    figure.colorbar(image, ax=grid, label="linear CKA", aspect=40, shrink=0.8)
    return figure


@matplotlib.rc_context(LOOK)
def relation_divergence(similarity: pd.DataFrame, results: Results) -> Figure:
    """Divergence (nats) of attention relations, last student layer from each teacher layer, a line per method."""
    look, students = styles(results), list(_students(results))
    figure = _figure(7, 3.6)
    panels = figure.subplots(1, len(students), sharey=True, squeeze=False)[0]
    for axes, student in zip(panels, students, strict=True):
        own = similarity[similarity["student"] == student]
        last = own[own["layer"] == own["layer"].max()]
        for method, rows in last.groupby("method", sort=False):
            mean = rows.groupby("teacher_layer")["divergence"].mean()
            axes.plot(mean.index, mean, color=look[method].color, marker=look[method].marker, markersize=4, linewidth=1)
        axes.set_title(student)
        axes.set_yscale("log")
        axes.grid()
        axes.xaxis.set_major_locator(matplotlib.ticker.MaxNLocator(integer=True))
    panels[0].set_ylabel("divergence of attention relations (nats)")
    figure.supxlabel("teacher layer", fontsize=9)
    handles = [_handle(style.label, style.color, style.marker, linestyle="-") for style in look.values()]
    figure.legend(handles=handles, loc="outside right upper", frameon=False)
    return figure


@matplotlib.rc_context(LOOK)
def learning_curves(results: Results) -> Figure:
    """Held-out loss(step) / loss(0) of each method's own loss, against tokens and against time, a panel per student."""
    look, students = styles(results), _students(results)
    figure = _figure(7, 5)
    panels = figure.subplots(2, len(students), sharey=True, squeeze=False)
    axis = {"tokens": ("training tokens (millions)", 1e6), "seconds": ("training time (minutes)", 60)}
    for line, (column, (label, unit)) in zip(panels, axis.items(), strict=True):
        for axes, student in zip(line, students, strict=True):
            own = results.curves[results.curves["student"] == student]
            for (method, _), curve in own.groupby(["method", "distillation_seed"], sort=False):
                style = look[method]
                axes.plot(curve[column] / unit, curve["loss"] / curve["loss"].iloc[0], color=style.color,
                          marker=style.marker, markersize=4, linewidth=1.2)  # fmt: skip
            axes.axhline(1, color="#a6a6a6", linewidth=0.8, zorder=0)
            axes.set_title(student if column == "tokens" else "")
            axes.set_xlabel(label)
            axes.set_ylim(bottom=0)
            axes.grid()
    figure.supylabel("held-out loss / loss before training", fontsize=9)
    trained = [look[method] for method in look if method in set(results.curves["method"])]
    handles = [_handle(style.label, style.color, style.marker, linestyle="-") for style in trained]
    figure.legend(handles=handles, loc="outside right upper", frameon=False)
    return figure


@matplotlib.rc_context(LOOK)
def distillation_cost(results: Results) -> Figure:
    """Training tokens per second of every method that trains, mean over distillation seeds, one panel per student."""
    look, students = styles(results), _students(results)
    runs = results.runs.dropna(subset="tokens_per_second")
    speeds = runs.groupby(["student", "method"], sort=False)["tokens_per_second"].mean()
    trained = [method for method in look if method in set(runs["method"])]
    figure = _figure(7, 0.9 + 0.26 * len(trained))
    panels = figure.subplots(1, len(students), sharex=True, sharey=True, squeeze=False)[0]
    for axes, student in zip(panels, students, strict=True):
        for place, method in enumerate(trained):
            style, speed = look[method], speeds[student, method]
            axes.barh(place, speed, color=style.color, hatch=style.hatch, edgecolor="white", linewidth=0)
            axes.annotate(f"{speed:,.0f}", (speed, place), (3, 0), textcoords="offset points", va="center", fontsize=8)
        axes.set_title(student)
        axes.set_yticks(range(len(trained)), [look[method].label for method in trained])
        axes.set_ylim(len(trained) - 0.4, -0.6)
        axes.margins(x=0.25)
        axes.tick_params(axis="y", length=0)
    figure.supxlabel("training speed (tokens per second)", fontsize=9)
    return figure


def show(figure: Figure | None, folder: str | os.PathLike, name: str) -> Image | None:
    """:func:`save`, and what a notebook displays of it; nothing where there is no figure."""
    return Image(filename=save(figure, folder, name), alt=caption(name)) if figure else None


def save(figure: Figure, folder: str | os.PathLike, name: str) -> Path:
    """Write ``name``.png (200 dots per inch) and ``name``.svg into ``folder``; the same figure gives the same bytes.

    Returns:
        The path of the PNG.

    Raises:
        StudyError: the folder cannot be written.
    """
    paths = [Path(folder) / f"{name}.{kind}" for kind in ("svg", "png")]
    for path, metadata in zip(paths, ({"Date": None}, {"Software": None}), strict=True):
        content = io.BytesIO()
        with matplotlib.rc_context(LOOK):
            figure.savefig(content, format=path.suffix[1:], dpi=200, metadata=metadata)
        write_file(path, content.getvalue())
    return paths[-1]
