"""Figures of one sentence: what each objective compares, layer mappings as arrows, and where gradients reach."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import pandas as pd
import seaborn
from matplotlib.axes import Axes
from matplotlib.colors import LogNorm
from matplotlib.figure import Figure
from matplotlib.image import AxesImage

from study.analysis.figures.style import GREY, drawn, handle, new_figure

TEACHER_COLOR, STUDENT_COLOR = "#4d4d4d", "#0072b2"


@drawn
def distributions(
    teacher: Any, student: Any, words: Sequence[str], names: Callable[[list[int]], list[str]], count: int = 8
) -> Figure:
    """Probabilities, (positions, vocabulary), of the teacher's ``count`` first tokens, and the student's of those."""
    figure = new_figure(2.6)
    for axes, own, other, word in zip(
        figure.subplots(1, len(words), squeeze=False)[0], teacher, student.detach(), words, strict=True
    ):
        best = own.topk(count).indices
        places = np.arange(count)
        axes.barh(places - 0.2, own[best], 0.4, color=TEACHER_COLOR)
        axes.barh(places + 0.2, other[best], 0.4, color=STUDENT_COLOR)
        axes.set_yticks(places, names(best.tolist()))
        axes.invert_yaxis()
        axes.set(title=f"for “{word}”", xlabel="probability")
    handles = [handle("teacher", TEACHER_COLOR, "s"), handle("student", STUDENT_COLOR, "s")]
    figure.legend(handles=handles, loc="outside right upper")
    return figure


def at_temperature(
    teacher: Any, student: Any, words: Sequence[str], names: Callable[[list[int]], list[str]], temperature: float
) -> Figure:
    """:func:`distributions` of logits, (positions, vocabulary), divided by a temperature."""
    of_teacher, of_student = ((own / temperature).softmax(dim=-1) for own in (teacher, student))
    return distributions(of_teacher, of_student, words, names)


@drawn
def mappings(of: dict[str, dict[int, tuple[int, ...]]], teacher_layers: int, student_layers: int) -> Figure:
    """An arrow from every teacher layer to the student layer that learns from it, a panel per mapping."""
    columns = 4
    figure = new_figure(2.2 * -(-len(of) // columns))
    grid = figure.subplots(-(-len(of) // columns), columns, squeeze=False).ravel()
    top = max(teacher_layers, student_layers)
    for axes in grid[len(of) :]:
        axes.remove()
    for axes, (name, mapping) in zip(grid, of.items(), strict=False):
        heights = [np.linspace(1, top, layers) for layers in (teacher_layers, student_layers)]
        for x, levels, color in zip((0, 1), heights, (TEACHER_COLOR, STUDENT_COLOR), strict=True):
            for number, y in enumerate(levels, start=1):
                box = {"boxstyle": "round", "facecolor": color, "edgecolor": "none"}
                axes.text(x, y, str(number), color="white", ha="center", va="center", fontsize=8, bbox=box)
        for i, targets in mapping.items():
            for j in targets:
                ends = {"xy": (0.87, heights[1][i - 1]), "xytext": (0.13, heights[0][j - 1])}
                axes.annotate("", **ends, arrowprops={"arrowstyle": "->", "color": GREY})
        axes.set(title=name, xlim=(-0.3, 1.3), ylim=(0.3, top + 0.7), xticks=(0, 1), yticks=())
        axes.set_xticklabels(["teacher", "student"])
        axes.tick_params(length=0)
        seaborn.despine(ax=axes, left=True, bottom=True)
    return figure


@drawn
def by_token(parts: dict[str, Any], tokens: Sequence[str]) -> Figure:
    """What each token adds to a loss, (T,) values for every part of it."""
    figure = new_figure(0.9 + 0.3 * len(parts))
    axes = figure.subplots()
    table = pd.DataFrame({name: values.numpy() for name, values in parts.items()}).T
    bar = {"label": "squared error"}
    seaborn.heatmap(table, ax=axes, cmap="cividis", vmin=0, cbar_kws=bar, linewidths=0.5)
    axes.set_xticks(np.arange(len(tokens)) + 0.5, tokens, rotation=60, ha="right")
    axes.set_yticklabels(list(parts), rotation=0)
    axes.tick_params(length=0)
    return figure


@drawn
def relations(of: dict[str, tuple[Any, Any]], tokens: Sequence[str]) -> Figure:
    """The teacher's relations (T, T) above the student's, a column for each of queries, keys and values; one scale."""
    figure = new_figure(5.4)
    grid = figure.subplots(2, len(of), sharex=True, sharey=True, squeeze=False)
    highest = max(float(matrix.max()) for pair in of.values() for matrix in pair)
    for column, (name, pair) in zip(grid.T, of.items(), strict=True):
        for axes, matrix, model in zip(column, pair, ("teacher", "student"), strict=True):
            image = draw_relation(axes, matrix, tokens, highest)
            axes.set_title(f"{model}: {name}")
    figure.colorbar(image, ax=grid, shrink=0.6, label="share of the relation")
    return figure


def with_heads(
    related: Callable[[Any, int], Any],
    teacher: dict[str, Any],
    student: dict[str, Any],
    tokens: Sequence[str],
    relation_heads: int,
) -> Figure:
    """:func:`relations` of queries, keys and values, each (1, T, width): means over the relation heads of ``related``.

    Args:
        related: :func:`study.evaluation.representations.relations`.
    """
    of = {
        name: (
            related(own, relation_heads)[0].mean(dim=0),
            related(student[name].detach(), relation_heads)[0].mean(dim=0),
        )
        for name, own in teacher.items()
    }
    return relations(of, tokens)


def draw_relation(axes: Axes, matrix: Any, tokens: Sequence[str], highest: float | None = None) -> AxesImage:
    """A relation (T, T) among tokens; brightest at ``highest``, by default its own."""
    axes.set_xticks(range(len(tokens)), tokens, rotation=90, fontsize=7)
    axes.set_yticks(range(len(tokens)), tokens, fontsize=7)
    axes.tick_params(length=0)
    return axes.imshow(matrix, cmap="cividis", vmin=0, vmax=highest)


@drawn
def gradients(norms: pd.DataFrame) -> Figure:
    """Norm of the gradient: part of the student (rows) by loss (columns), on a logarithmic scale; white where none."""
    figure = new_figure(0.8 + 0.27 * len(norms), width=5.5)
    axes = figure.subplots()
    positive = norms.where(norms > 0)
    scale, bar = LogNorm(positive.min().min(), positive.max().max()), {"label": "norm of the gradient"}
    seaborn.heatmap(positive, ax=axes, norm=scale, annot=True, fmt=".2g", cmap="cividis", linewidths=1, cbar_kws=bar)
    axes.set_yticklabels(norms.index, rotation=0)
    axes.xaxis.tick_top()
    axes.tick_params(length=0)
    return figure
