"""Figures of the representations: how alike the layers of students and teacher are."""

from __future__ import annotations

import itertools

import pandas as pd
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator

from study.analysis.figures.style import drawn, label, lines_of_methods, new_figure, styles
from study.descriptions import Comparison

CAPTIONS = {
    "layer_similarity": "Linear centred kernel alignment of the hidden states of every student layer and teacher layer"
    " on held-out text, mean over distillation seeds; brighter is more alike, empty where a layer gives every token the"
    " same state.",
    "relation_divergence": "Divergence of the attention relations of the student's last layer from those of each"
    " teacher layer (mean over queries, keys and values) on held-out text, mean over distillation seeds; lower is more"
    " alike.",
}


@drawn
def layer_similarity(layers: pd.DataFrame) -> Figure:
    """CKA of every student layer (row) and teacher layer (column), a panel per student and method, mean over seeds.

    Args:
        layers: every pair of layers, as from :func:`study.analysis.numbers.similarity.load_similarity`.
    """
    methods, students = layers["method"].unique(), layers["student"].unique()
    columns = min(5, len(methods))
    lines = -(-len(methods) // columns)
    depths = [layers.loc[layers["student"] == student, "layer"].max() for student in students]
    figure = new_figure(0.6 + lines * sum(0.75 + 0.14 * depth for depth in depths))
    ratios = [0.75 + 0.14 * depth for depth in depths for _ in range(lines)]
    grid = figure.subplots(lines * len(students), columns, squeeze=False, sharex=True, height_ratios=ratios)
    lowest, panels = layers["cka"].min(), iter(grid.flat)
    lowest = 0 if pd.isna(lowest) else lowest
    for student, place in itertools.product(students, range(lines * columns)):
        axes = next(panels)
        if place >= len(methods):
            axes.axis("off")
            continue
        method = methods[place]
        own = layers[(layers["student"] == student) & (layers["method"] == method)]
        values = own.groupby(["layer", "teacher_layer"])["cka"].mean(skipna=False).unstack()
        image = axes.imshow(values, cmap="cividis", vmin=lowest, vmax=1, origin="lower", aspect="auto")
        axes.set_title(f"{student}\n{label(method)}", fontsize=6.5)
        axes.set_xticks([0, values.shape[1] - 1], [1, values.shape[1]])
        axes.set_yticks([0, values.shape[0] - 1], [1, values.shape[0]])
        axes.tick_params(length=0, labelsize=6.5)
    figure.supxlabel("teacher layer", fontsize=9)
    figure.supylabel("student layer", fontsize=9)
    figure.colorbar(image, ax=grid, label="linear CKA", aspect=40, shrink=0.8)
    return figure


@drawn
def relation_divergence(layers: pd.DataFrame, comparison: Comparison) -> Figure:
    """Divergence (nats) of attention relations, last student layer from each teacher layer, a line per method."""
    last = layers[layers["layer"] == layers.groupby("student")["layer"].transform("max")]
    figure, grid = lines_of_methods(
        last, styles(comparison), 3.6, x="teacher_layer", y="divergence", col_order=list(comparison.students),
        errorbar=None, linewidth=1,
    )  # fmt: skip
    for place, axes in enumerate(grid.values()):
        axes.set(yscale="log", ylabel="" if place else "divergence of attention relations (nats)")
        axes.yaxis.set_major_formatter("{x:g}")
        axes.yaxis.set_minor_formatter("{x:g}")
        axes.xaxis.set_major_locator(MaxNLocator(integer=True))
    figure.supxlabel("teacher layer", fontsize=9)
    return figure
