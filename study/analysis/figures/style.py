"""How figures look: methods, students, numbers and words that all of them share; drawing panels; saving."""

from __future__ import annotations

import io
import itertools
import os
import re
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import matplotlib
import pandas as pd
import PIL.Image
import seaborn
from IPython.display import Image
from matplotlib import pyplot
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.lines import Line2D
from matplotlib.patheffects import withStroke

from study.descriptions import Comparison
from study.files import write_file

#: Dots per inch of every picture.
DPI = 200
#: Inches that a figure is wide in a page; those of which two stand side by side.
WIDTH, HALF = 7.0, 4.5


@dataclass(frozen=True)
class Style:
    """How a method looks in every figure."""

    label: str
    color: str
    marker: str


# Every colour has a contrast of at least 4.5 : 1 with white. One range of hues per family; within a profile markers
# tell methods apart without colour.
STYLES = {
    "none": Style("none: as initialised", "#737373", "o"),
    "mlm": Style("MLM: no teacher", "#262626", "s"),
    "od": Style("OD: output distribution", "#8a6d00", "D"),
    "hs-last": Style("HS: last", "#00808c", "v"),
    "hs-top": Style("HS: top", "#2578b8", "^"),
    "hs-uniform": Style("HS: uniform", "#1f5fd0", "<"),
    "hs-uniform-consecutive": Style("HS: uniform-consecutive", "#4b4fa8", ">"),
    "hs-uniform+last": Style("HS: uniform+last", "#08306b", "p"),
    "mha-minilmv2": Style("MHA: MiniLMv2", "#c2500a", "*"),
    "mha-direct": Style("MHA: DirectMiniLM", "#7f2704", "X"),
    "se-mse": Style("SE: squared error", "#0e7a56", "P"),
    "se-cosine": Style("SE: cosine", "#557a00", "d"),
    "se-relational": Style("SE: relational", "#00441b", "H"),
    "od+hs": Style("sum: OD + HS", "#a3447c", "h"),
    "hs+mha": Style("sum: HS + MHA", "#6a51a3", "8"),
    "distilbert": Style("DistilBERT", "#c2186b", "<"),
    "tinybert": Style("TinyBERT", "#980043", ">"),
    "minilm": Style("MHA: MiniLM v1", "#a65e1a", "^"),
    "pruned": Style("pruned: every other layer", "#737373", "^"),
    "pruned-top": Style("pruned: last layers", "#a3447c", "v"),
    "pruned-bottom": Style("pruned: first layers", "#557a00", "D"),
    "pruned-mlm": Style("pruned: every other + MLM", "#262626", "X"),
    "pruned-bottom-mlm": Style("pruned: first + MLM", "#595959", "P"),
    "pruned-hs": Style("pruned: every other + HS", "#2578b8", "h"),
    "pruned-bottom-hs": Style("pruned: first + HS", "#00441b", "d"),
}
SPARE = [("#0e7a56", "P"), ("#a3447c", "h"), ("#557a00", "d"), ("#6a51a3", "8"), ("#00441b", "H")]
STUDENT_STYLES = [("#0072b2", "o"), ("#9a6700", "s"), ("#005c44", "^"), ("#a3447c", "D"), ("#4d4d4d", "v")]
#: What methods and layers are called where there is little room.
SHORT = {"none": "untrained", "mlm": "MLM", "od": "OD"}
TASKS = {"sts-b": "STS-B", "boolq": "BoolQ", "privacy-qa": "privacy questions"}
METRICS = {"accuracy": "accuracy", "macro_f1": "macro F1", "spearman": "Spearman's ρ", "entity_f1": "entity F1"}
MACRO = "macro test score (0–100)"
GREY, PALE = "#4d4d4d", "#b0b0b0"  # PALE: of lines that carry no value

#: Keeps lines from crossing words.
HALO = {"path_effects": [withStroke(linewidth=2.5, foreground="white")]}

LOOK: dict[Any, Any] = {
    "font.size": 9,
    "axes.titlesize": 9,
    "axes.labelsize": 9,
    "xtick.labelsize": 8,
    "ytick.labelsize": 8,
    "legend.fontsize": 8,
    "legend.frameon": False,
    "hatch.linewidth": 0.6,
    "hatch.color": "white",
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.axisbelow": True,
    "grid.color": "#e5e5e5",
    "figure.dpi": 100,
    "figure.facecolor": "white",
}
#: Decorates what draws a figure.
drawn = matplotlib.rc_context(LOOK)


def style_of(method: str, place: int) -> Style:
    """The style of a method; one that is unknown to this module gets a spare one, by its place among others."""
    return STYLES.get(method) or Style(label(method), *SPARE[place % len(SPARE)])


def styles(comparison: Comparison) -> dict[str, Style]:
    """The style of every method of the grid, in its order."""
    unknown = [method for method in comparison.methods if method not in STYLES]
    places = {method: place for place, method in enumerate(unknown)}
    return {method: style_of(method, places.get(method, 0)) for method in comparison.methods}


def label(method: str) -> str:
    """What a method is called in figures and pages.

    One without a style of its own goes by its name; if that begins with the name of one that has, by that one's.
    """
    if method in STYLES:
        return STYLES[method].label
    base = max((name for name in STYLES if method.startswith(f"{name}-")), key=len, default="")
    return f"{short(base)}, {method.removeprefix(base)[1:].replace('-', ' ')}" if base else method


def short(method: str) -> str:
    """As :func:`label`, in fewer words."""
    return SHORT.get(method, label(method))


def titled(setting: str) -> str:
    """A setting's name as it begins a line; its other letters stay as they are."""
    return setting[:1].upper() + setting[1:]


def task_words(task: str) -> str:
    """A task's name as readers see it; what sets those of several languages apart stands beside them anyway."""
    return TASKS.get(task) or task.removesuffix("-multilingual").replace("-", " ")


def in_words(text: str, named: Callable[[str], str] = label) -> str:
    """``text`` with the names of methods, and of the layers behind their @, replaced by what figures call them."""
    names = "|".join(re.escape(name) for name in sorted(STYLES, key=len, reverse=True))
    text = re.sub(rf"(?<![\w-])({names})(?![\w+-])", lambda name: named(name[0]), text)
    text = re.sub(r"@L_T-(\d+)", r" from the last layer but \1", text)
    return text.replace("@L_T", " from the last layer").replace("@upper-middle", " from an upper-middle layer")


def contrast_words(first: str, second: str) -> str:
    """A contrast in words; the method once where it differs from itself by a layer alone."""
    names, layers = zip(*(side.partition("@")[::2] for side in (first, second)), strict=True)
    if names[0] == names[1]:
        return f"{in_words(first, short)} − {in_words('@' + layers[1]).removeprefix(' from ')}"
    return f"{in_words(first, short)} − {in_words(second, short)}"


def variant_words(changes: dict[str, Any]) -> str:
    """What a variant of a method changes (key of params.yaml -> value) in words; other keys stand as they are."""
    return ", ".join(_change(key, value) for key, value in changes.items())


def varied(comparison: Comparison, method: str, reference: str = "") -> str:
    """A method or variant in words: what it extends and what it changes; of a reference, what sets it apart alone."""
    members = comparison.memberships
    if method not in members:
        return label(method)
    own, other = members[method], members.get(reference)
    same = other.changes if other and other.extends == own.extends else {}
    changed = variant_words({key: value for key, value in own.changes.items() if key not in same or same[key] != value})
    return changed if same or reference == own.extends else f"{short(own.extends)}, {changed}"


def _change(key: str, value: Any) -> str:
    if key == "teacher_layer_from_top":
        return "teacher's last layer" + (f" but {value}" if value else "")
    words = {
        "mapping": "mapping: {}",
        "relation_heads": "{} relation heads",
        "temperature": "temperature {:g}",
        "positions": "{} positions",
        "mlm_weight": "and MLM, weight {:g}",
        "inputs": "{} text",
        "initialisation": "start: {}",
        "equal_compute": "as many operations as {}",
        "learning_rate": "learning rate {:g}",
    }
    value = short(value) if key == "equal_compute" else value
    if key == "initialisation" and value == "teacher-embeddings":
        value = "embeddings alone"
    try:
        return words[key].format(value)
    except (KeyError, ValueError):
        return f"{key.replace('_', ' ')} {value}"


def student_styles(comparison: Comparison) -> dict[str, tuple[str, str]]:
    """Colour and marker of every student of the grid, in its order."""
    return dict(zip(comparison.students, itertools.cycle(STUDENT_STYLES), strict=False))


def new_figure(height: float, width: float = WIDTH) -> Figure:
    """An empty figure; sizes in inches."""
    return Figure(figsize=(width, height), layout="constrained")


def panels(rows: Any, height: float, width: float = WIDTH, **options: Any) -> tuple[Figure, dict[Any, Axes]]:
    """Empty panels, one for each group of a table's rows, by value or by the pair of those of ``row`` and ``col``.

    Args:
        height, width: of the whole figure, in inches. options: of seaborn's FacetGrid; ``row``, ``col``, ``col_wrap``
            say what the panels stand for.
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


def lines_of_methods(
    rows: pd.DataFrame, look: dict[str, Style], height: float, **options: Any
) -> tuple[Figure, dict[Any, Axes]]:
    """Lines of methods, a panel per student; ``options``: of seaborn's relplot, ``x`` and ``y`` among them."""
    grid = seaborn.relplot(
        rows, kind="line", col="student", hue="method", style="method", dashes=False, legend=False, markersize=5,
        markeredgewidth=0.3, palette={method: style.color for method, style in look.items()},
        markers={method: style.marker for method, style in look.items()}, **options,
    )  # fmt: skip
    for student, axes in grid.axes_dict.items():
        axes.set(title=student, xlabel="", ylabel="")
        axes.grid()
    figure = sized(grid, height)
    method_legend(figure, look)
    return figure, grid.axes_dict


def handle(text: str, color: str, marker: str = "", linestyle: str = "", **options: Any) -> Line2D:
    """An entry of a legend."""
    return Line2D([], [], linestyle=linestyle, marker=marker, markersize=6, color=color, label=text, **options)


def method_legend(figure: Figure, look: dict[str, Style], *more: Line2D) -> None:
    """Name methods beside a figure's panels, and whatever ``more`` stands for."""
    handles = [handle(style.label, style.color, style.marker, "-") for style in look.values()]
    figure.legend(handles=[*handles, *more], loc="outside right upper")


def draw_interval(axes: Axes, height: float, low: float, high: float, within: tuple[float, float], color: str) -> None:
    """An interval as a line; an arrow at the end of what is shown says that it goes on. Nothing where it is NaN."""
    start, end = max(low, within[0]), min(high, within[1])
    if start < end:
        axes.hlines(height, start, end, color=color, linewidth=1.4, zorder=3)
    for beyond, edge, marker in ((low < within[0], within[0], "<"), (high > within[1], within[1], ">")):
        if beyond:
            axes.plot(edge, height, marker, color=color, markersize=5, clip_on=False, zorder=3)


def point(axes: Axes, x: float, y: float, style: Style, filled: bool) -> None:
    """A method's mark, hollow if not ``filled``."""
    face = style.color if filled else "white"
    axes.plot(x, y, style.marker, color=style.color, markerfacecolor=face, markersize=6, clip_on=False, zorder=4)


def ranking(axes: Axes, rows: pd.DataFrame, look: dict[str, Style], within: tuple[float, float]) -> pd.DataFrame:
    """A dot with its interval for every method, named beside the axis, the best at the top.

    Args:
        rows: method, value, low, high, filled. within: ends of the axis, at which points and intervals are cut off.

    Returns:
        The rows in the order drawn, with their ``height``.
    """
    rows = rows.sort_values("value", ascending=False, kind="stable").assign(height=range(len(rows)))
    for row in rows.itertuples():
        low, high = row.low, row.high
        if not within[0] <= row.value <= within[1]:  # its mark at the edge says that the interval goes on
            low, high = max(low, within[0]), min(high, within[1])
        draw_interval(axes, row.height, low, high, within, look[row.method].color)
        point(axes, min(max(row.value, within[0]), within[1]), row.height, look[row.method], row.filled)
    axes.set_yticks(rows["height"], [label(method) for method in rows["method"]])
    axes.set(xlabel="", ylabel="", xlim=within, ylim=(len(rows) - 0.4, -0.6))
    axes.tick_params(axis="y", length=0, pad=8)  # beside marks and arrows at the edge
    axes.grid(axis="x")
    return rows


def note(axes: Axes, text: str, at: tuple[float, float], points: tuple[float, float], **options: Any) -> None:
    """Words so many ``points`` from a place, readable above lines; ``options``: of matplotlib's annotate."""
    axes.annotate(text, at, points, textcoords="offset points", **HALO | options)


def show(figure: Figure | None, folder: str | os.PathLike, name: str, caption: str) -> Image | None:
    """:func:`save`, and what a notebook displays of it; nothing where there is no figure."""
    return Image(filename=str(save(figure, folder, name)), alt=caption) if figure else None


def save(figure: Figure, folder: str | os.PathLike, name: str) -> Path:
    """Write ``name``.png into ``folder`` and return its path; the same figure gives the same bytes.

    Raises:
        StudyError: the folder cannot be written.
    """
    path, content = Path(folder) / f"{name}.png", io.BytesIO()
    with matplotlib.rc_context(LOOK):
        figure.savefig(content, format="png", dpi=DPI)
    write_file(path, small(content.getvalue()))
    return path


def small(picture: bytes) -> bytes:
    """A PNG in 256 colours: a third of the size at no visible loss."""
    content = io.BytesIO()
    colours = PIL.Image.open(io.BytesIO(picture)).convert("RGB")
    colours = colours.quantize(256, PIL.Image.Quantize.MAXCOVERAGE, dither=PIL.Image.Dither.NONE)
    colours.save(content, format="png", optimize=True)
    return content.getvalue()
