"""How figures look: methods, students and words that all of them share; captions; drawing panels; saving."""

from __future__ import annotations

import io
import itertools
import os
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import matplotlib
import PIL.Image
import seaborn
from IPython.display import Image
from matplotlib import pyplot
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.lines import Line2D

from study.descriptions import Comparison
from study.files import write_file

#: Dots per inch of every picture.
DPI = 200
#: Inches that a figure is wide in a page.
WIDTH = 7.0


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
    "se-mse": Style("SE: squared error", "#66c2a4", "P", ""),
    "se-cosine": Style("SE: cosine", "#009e73", "d", "//"),
    "se-relational": Style("SE: relational", "#00441b", "H", ".."),
    "od+hs": Style("sum: OD + HS", "#cc79a7", "h", ""),
    "hs+mha": Style("sum: HS + MHA", "#8c6bb1", "8", "//"),
    "distilbert": Style("DistilBERT", "#dd1c77", "o", "xx"),
    "tinybert": Style("TinyBERT", "#980043", "s", ""),
    "minilm": Style("MHA: MiniLM v1", "#fdae6b", "^", ".."),
}
SPARE = [("#009e73", "P"), ("#cc79a7", "h"), ("#66c2a4", "d"), ("#8c6bb1", "8"), ("#00441b", "H")]
STUDENT_STYLES = [("#0072b2", "o"), ("#e69f00", "s"), ("#005c44", "^"), ("#cc79a7", "D"), ("#4d4d4d", "v")]
METRICS = {"accuracy": "accuracy", "macro_f1": "macro F1", "spearman": "Spearman's ρ"}
MACRO = "macro test score (0–100)"
GREY, PALE = "#4d4d4d", "#b0b0b0"

LOOK: dict[Any, Any] = {
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
    "figure.dpi": 100,
    "figure.facecolor": "white",
}


def styles(comparison: Comparison) -> dict[str, Style]:
    """The style of every method of the grid, in its order; methods unknown to this module get spare ones."""
    unknown = [method for method in comparison.methods if method not in STYLES]
    spare = {method: Style(method, *SPARE[place % len(SPARE)]) for place, method in enumerate(unknown)}
    return {method: STYLES.get(method) or spare[method] for method in comparison.methods}


def label(method: str) -> str:
    """What a method is called in figures and pages; one without a style of its own goes by its name."""
    return STYLES[method].label if method in STYLES else method


def student_styles(comparison: Comparison) -> dict[str, tuple[str, str]]:
    """Colour and marker of every student of the grid, in its order."""
    return dict(zip(comparison.students, itertools.cycle(STUDENT_STYLES), strict=False))


def new_figure(height: float, width: float = WIDTH) -> Figure:
    """An empty figure; sizes in inches."""
    return Figure(figsize=(width, height), layout="constrained")


def panels(rows: Any, height: float, width: float = WIDTH, **options: Any) -> tuple[Figure, dict[Any, Axes]]:
    """Empty panels, one for each group of a table's rows.

    Args:
        rows: the table.
        height, width: of the whole figure, in inches.
        options: of seaborn's FacetGrid; ``row``, ``col``, ``col_wrap`` say what the panels stand for.

    Returns:
        The figure, and its panels by what they stand for: a value, or the pair of those of ``row`` and ``col``.
    """
    grid = seaborn.FacetGrid(rows, **options)
    return sized(grid, height, width), grid.axes_dict


def sized(grid: seaborn.FacetGrid, height: float, width: float = WIDTH) -> Figure:
    """The figure of seaborn's panels, ``width`` x ``height`` inches, without a legend and forgotten by pyplot."""
    figure = grid.figure
    pyplot.close(figure)
    if grid.legend is not None:
        grid.legend.remove()
    figure.set_layout_engine("constrained")
    figure.set_size_inches(width, height)
    return figure


def handle(text: str, color: str, marker: str = "", linestyle: str = "", **options: Any) -> Line2D:
    """An entry of a legend."""
    return Line2D([], [], linestyle=linestyle, marker=marker, markersize=6, color=color, label=text, **options)


def method_legend(figure: Figure, look: dict[str, Style], *more: Line2D) -> None:
    """Name methods beside a figure's panels, and whatever ``more`` stands for."""
    handles = [handle(style.label, style.color, style.marker, "-") for style in look.values()]
    figure.legend(handles=[*handles, *more], loc="outside right upper", frameon=False)


def show(figure: Figure | None, folder: str | os.PathLike, name: str, caption: str) -> Image | None:
    """:func:`save`, and what a notebook displays of it; nothing where there is no figure."""
    return Image(filename=str(save(figure, folder, name)), alt=caption) if figure else None


def save(figure: Figure, folder: str | os.PathLike, name: str) -> Path:
    """Write ``name``.png into ``folder`` and return its path; the same figure gives the same bytes.

    Raises:
        StudyError: the folder cannot be written.
    """
    path, content, small = Path(folder) / f"{name}.png", io.BytesIO(), io.BytesIO()
    with matplotlib.rc_context(LOOK):
        figure.savefig(content, format="png", dpi=DPI)
    colours = PIL.Image.open(content).convert("RGB")  # 256 of them: a third of the size at no visible loss
    colours = colours.quantize(256, PIL.Image.Quantize.MAXCOVERAGE, dither=PIL.Image.Dither.NONE)
    colours.save(small, format="png", optimize=True)
    write_file(path, small.getvalue())
    return path
