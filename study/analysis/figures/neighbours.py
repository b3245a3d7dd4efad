"""Systems beside the grid as readers see them: what each is, its arms in a table and a figure, verdicts."""

from __future__ import annotations

import textwrap

import pandas as pd
from IPython.display import Markdown
from matplotlib.figure import Figure
from pandas.io.formats.style import Styler

from study.analysis.answers import VERDICT_LOOKS
from study.analysis.figures.style import GREY, STUDENT_STYLES, drawn, in_words, new_figure, short
from study.analysis.numbers.neighbours import arms, called, verdicts
from study.analysis.numbers.overview import NOT_MEASURED, NOT_RUN
from study.analysis.numbers.text import interval, number, with_interval
from study.analysis.presentation import styled
from study.records_beside import NeighbourResult

CAPTION = "Mean over seeds and 95 % interval of each arm; the dotted line is at the first arm."
KEPT = (
    "What is kept against latency, of one text at a time on one thread; means over seeds. Methods: share of the"
    " teacher's mean over all tasks, at its largest budget with several seeds; tokens are named where others read more;"
    " systems: of their own reference on their own task. What has no latency or no share stands in the table alone."
)
#: Words of an axis -> kinds of rows of :func:`overview.overview` on it.
SCALES = (
    ("methods: of the teacher's mean over all tasks", ["teacher", "method"]),
    ("systems: of their own reference, on their own task", ["system"]),
)
#: Measures of this size are shown as they are; shares of one, as most scores are, times 100.
LARGE = 1.0


def about(result: NeighbourResult, again: bool = False) -> Markdown:
    """What a system is, what was reproduced of it and how sure that is, and what could not be known.

    Args:
        again: the page has told of the same system on another model already.
    """
    model = "the teacher" if result.model == "teacher" else f"the student `{result.model}`"
    options, cuts = result.options, ("train", "development", "test")
    sizes = ", ".join(f"{name} {options[name]:,}" for name in cuts if options.get(name))
    run = f"On {model}, {len(result.seeds)} seed{'s' * (len(result.seeds) > 1)}"
    run += f"; {', '.join(options['tasks'])}" if options.get("tasks") else ""
    run += f"; at most so many examples: {sizes}" if sizes else ""
    run += f"; {number(result.seconds / 60, 0)} min of computing."
    told = ", ".join(filter(None, (result.title.partition(":")[2].strip(), result.source)))
    title = f"**{called(result)}**: {told}. Standing: **{result.standing}**."
    if again:
        return Markdown(f"**{called(result)}**: the same. {run}")
    unknown = "\n".join(f"* {line}" for line in result.unknown)
    given = {key: value for key, value in options.items() if key not in ("system", "seeds", "model")}
    chosen = ", ".join(f"{key}: {value}" for key, value in given.items()).replace("'", "")
    parts = [title, result.equation, result.reproduced, f"Run with `{chosen}`." if chosen else ""]
    parts += [f"What could not be known:\n\n{unknown}" if unknown else "", run]
    return Markdown("\n\n".join(filter(None, parts)))


def _scale(rows: pd.DataFrame) -> pd.Series:
    """Measure -> 100 where all its values are shares of one, else 1."""
    return rows["mean"].abs().groupby(rows["measure"]).max().map(lambda largest: 100 if largest <= LARGE else 1)


def arms_table(result: NeighbourResult) -> Styler | None:
    """Arms by measures, or the other way if arms are fewer: mean and 95 % interval over seeds; shares of one times 100.

    A measure that is the first one again, as a task's score is where there is one task, is left out.
    """
    rows = arms(result)
    scale = _scale(rows)
    whole = {m for m in result.measures if all(v == int(v) for arm in result.arms for v in arm.values.get(m, []))}
    shown: dict[tuple[str, str], str] = {}
    for row in rows.itertuples():
        mean, low, high = (scale[row.measure] * value for value in (row.mean, row.low, row.high))
        digits = 1 if scale[row.measure] == 100 else (0 if row.measure in whole else 2)
        ends = interval(low, high, digits) if number(low, digits) != number(high, digits) else ""
        shown[row.arm, row.measure] = number(mean, digits) + ends
    first, *others = result.measures
    other = [m for m in others if any(arm.values.get(m) != arm.values.get(first) for arm in result.arms)]
    table = pd.DataFrame(
        {"arm": arm.words} | {result.measures[m]: shown.get((arm.name, m), "") for m in (first, *other)}
        for arm in result.arms
    )
    if len(other) >= len(result.arms):
        table = table.set_index("arm").T.rename_axis("measure").reset_index()
    caption = f"{called(result)}: means over seeds and 95 % intervals (Student's)."
    return styled(table, f"arms-{result.neighbour}", caption, setting=result.setting, wide=[table.columns[0]])


def verdicts_table(result: NeighbourResult) -> Styler | None:
    """The verdict on each ordinal claim with the difference that decides it; None without any."""
    rows = verdicts(result)
    if rows.empty:
        return None
    words, scale = {arm.name: arm.words for arm in result.arms}, rows["measure"].map(_scale(arms(result)))
    rows[["difference", "low", "high"]] = rows[["difference", "low", "high"]].mul(scale, axis=0)
    table = [
        {"claim": row.claim, "verdict": row.verdict}
        | {"difference (interval)": with_interval((row.difference, row.low, row.high), 2, "+")}
        | {"between": f"{words[row.first]} − {words[row.second]}", "expected": f"{row.sign} zero"}
        for row in rows.itertuples()
    ]
    seeds = f"{len(result.seeds)} seeds; at least 3 are needed to judge."
    return styled(
        table, f"checks-{result.neighbour}", f"{called(result)}: differences paired by seed, {seeds}",
        setting=result.setting, words=["verdict", "expected"], wide=["claim", "between"],
        marked={f"td.row{n}.col1": look for n, own in enumerate(rows["verdict"]) if (look := VERDICT_LOOKS.get(own))},
    )  # fmt: skip


@drawn
def arms_figure(result: NeighbourResult) -> Figure:
    """The first measure of every arm that has it, a line each."""
    measure, rows = next(iter(result.measures)), arms(result)
    times = _scale(rows)[measure]
    rows = rows[rows["measure"] == measure]
    rows = rows.assign(height=range(len(rows))[::-1], **(times * rows[["mean", "low", "high"]]))
    figure = new_figure(0.9 + 0.32 * len(rows))
    axes, (color, marker) = figure.subplots(), STUDENT_STYLES[0]
    axes.axvline(rows["mean"].iloc[0], color=GREY, linestyle=":", linewidth=1)
    axes.plot(rows["mean"], rows["height"], marker, color=color, markersize=5, linestyle="")
    known = rows.dropna(subset="low")
    axes.hlines(known["height"], known["low"], known["high"], color=color, linewidth=1.4)
    axes.set_yticks(rows["height"], [textwrap.fill(words, 58) for words in rows["words"]])
    axes.set_xlabel(f"{result.measures[measure]}{' × 100' if times == 100 else ''}")
    axes.set_ylim(-0.6, len(rows) - 0.4)
    axes.grid(axis="x")
    return figure


def overview_table(rows: pd.DataFrame, setting: str) -> Styler | None:
    """Everything side by side; a cell without a number says why."""
    table = []
    for row in rows.itertuples():
        after = f", {row.tokens} tokens" if row.tokens else ""
        kept = "" if pd.isna(row.kept) else with_interval((row.kept, row.low, row.high), 1)
        missing = row.of if row.of in (NOT_RUN, NOT_MEASURED) else NOT_MEASURED
        table.append(
            {"what": in_words(row.row, short) + after, "kept (%)": kept or missing}
            | {"of": row.of if row.of != missing or kept else ""}
            | {"latency (ms)": NOT_MEASURED if pd.isna(row.latency) else number(row.latency, 1)}
            | {"reads of the teacher": row.teacher, "labels": row.labels, "task": row.task}
            | {"cost of training": row.cost}
        )
    caption = "What each needs, costs and keeps."
    wide = ["of", "reads of the teacher", "labels", "task", "cost of training"]
    return styled(table, "overview", caption, setting=setting, words=["what"], wide=wide)


@drawn
def overview_figure(rows: pd.DataFrame) -> Figure | None:
    """What is kept against latency, a panel each for methods and systems; None where no row has both."""
    shown = rows[rows["kept"].notna() & rows["latency"].notna()].sort_values("kept")
    if shown.empty:
        return None
    kinds = [(words, shown[shown["kind"].isin(of)]) for words, of in SCALES if shown["kind"].isin(of).any()]
    figure = new_figure(1.2 + 0.3 * len(shown) + 0.4 * len(kinds))
    heights = [2 + len(own) for _, own in kinds]
    panels = figure.subplots(len(kinds), 1, sharex=True, squeeze=False, height_ratios=heights)[:, 0]
    ticks = sorted({*shown["latency"]})
    for axes, (words, own), height in zip(panels, kinds, heights, strict=True):
        color, marker = STUDENT_STYLES[own["kind"].iloc[0] == "system"]
        axes.set(xscale="log", xlim=(0.8 * ticks[0], 2.8 * ticks[-1]), ylabel="kept (%)")
        axes.set_title(words, loc="left")
        axes.margins(y=0.15)
        axes.grid(axis="y")
        axes.set_xticks(ticks, [number(tick, 1) for tick in ticks])
        axes.minorticks_off()
        step = 0.8 * (own["kept"].max() - own["kept"].min()) / height
        for column, group in own.groupby("latency"):
            least = -float("inf")
            for row in group.itertuples():  # labels of one latency stand above each other
                least = max(row.kept, least + step)
                after = f" ({row.tokens} tokens)" if row.tokens else ""
                text = f"{in_words(row.row.partition(',')[0], short)}{after}  {number(row.kept, 1)}"
                text += f" of {row.of}" * (row.kind == "system")
                line = {"arrowstyle": "-", "color": GREY, "linewidth": 0.5, "relpos": (0, 0.5)}
                axes.plot(column, row.kept, marker, color=color)
                place = (column, row.kept), (1.12 * column, least)
                axes.annotate(text, *place, fontsize=8, va="center", arrowprops=line)
    panels[-1].set_xlabel("milliseconds a text")
    return figure
