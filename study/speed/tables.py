"""Tables and figure of the benchmark, from its result files alone."""

from __future__ import annotations

import json
import os
import statistics
from collections.abc import Iterator
from itertools import product
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
from matplotlib.axis import Axis
from matplotlib.figure import Figure
from matplotlib.ticker import LogLocator, NullLocator, StrMethodFormatter

from study.analysis.figures.style import GREY, PALE, drawn, short
from study.files import StudyError
from study.speed.parts import PARTS

#: What does the same work: a method of params.yaml -> peers of study/speed/peers.py.
COMPARISONS = {
    "mha-minilmv2-heads-48": ["bertdistiller-minilmv2-48-heads"],
    "mha-minilmv2": ["bertdistiller-minilmv2"],
    "od": ["trainer-full-vocabulary", "torchdistill-logits", "textbrewer-hidden-and-logits"],
    "hs-uniform": ["textbrewer-hidden", "textbrewer-hidden-encoders"],
}
NO_FAST_PATH = "none"


def load_benchmark(file: str | os.PathLike) -> dict:
    """A result file of :func:`study.speed.benchmark.benchmark`.

    Raises:
        StudyError: no such file.
    """
    file = Path(file)
    if not file.is_file():
        raise StudyError(f"{file}: no benchmark results; run `make benchmark` first")
    return json.loads(file.read_text())


def measured(result: dict) -> Iterator[tuple[dict[str, Any], list[dict]]]:
    """Of every subject that was measured, the columns that all tables of steps have, and its rounds.

    subject, precision, fast_paths; tokens_per_second (also of the lowest and highest round) and step (milliseconds),
    medians over rounds.
    """
    for subject in result["subjects"]:
        rounds = [r for r in subject["rounds"] if "left_out" not in r]
        if not rounds:
            continue
        speeds = [r["tokens_per_second"] for r in rounds]
        without = NO_FAST_PATH if subject["kind"] == "method" else ""
        row = {"subject": subject["name"], "precision": subject["precision"]}
        row["fast_paths"] = ", ".join(subject.get("fast_paths", [])) or without
        row |= {"tokens_per_second": statistics.median(speeds), "lowest": min(speeds), "highest": max(speeds)}
        yield row | {"step": 1e3 * statistics.median(r["median_seconds"] for r in rounds)}, rounds


def steps(result: dict) -> pd.DataFrame:
    """One row per subject: what :func:`measured` says, milliseconds of the step's parts and floor, memory.

    ``memory`` is in MiB, ``efficiency`` floor / step.
    """
    rows = []
    for row, rounds in measured(result):
        if "parts" in rounds[0]:
            row |= {part: 1e3 * statistics.median(r["parts"][part] for r in rounds) for part in PARTS}
            row["floor"] = 1e3 * statistics.median(r["floor_seconds"] for r in rounds)
            row["efficiency"] = statistics.median(r["floor_seconds"] / r["median_seconds"] for r in rounds)
        rows.append(row | {"memory": statistics.median(r["memory"] for r in rounds)})
    return pd.DataFrame(rows)


def ratios(result: dict) -> pd.DataFrame:
    """How many times a peer's speed ours is: median over pairs of rounds, and the extremes of their steps' quartiles.

    ``lowest`` compares the slower quartile of our steps with the faster of the peer's, ``highest`` the reverse, over
    all pairs of rounds. Rows are the methods of :data:`COMPARISONS` in every precision measured, without fast paths,
    with all but the shared teacher, and with all; peers run in float32, as their users run them.
    """
    rounds = {
        (subject["name"], subject["precision"], tuple(subject.get("fast_paths", ()))): [
            [r[f"{quartile}_seconds"] for quartile in ("lower_quartile", "median", "upper_quartile")]
            for r in subject["rounds"]
            if "left_out" not in r
        ]
        for subject in result["subjects"]
    }
    rows = []
    for method, precision in product(COMPARISONS, ("bf16", "fp32")):
        ladder = sorted((key for key in rounds if key[:2] == (method, precision)), key=lambda key: len(key[2]))
        for peer in COMPARISONS[method]:
            theirs = rounds.get((peer, "fp32", ()), [])
            for key in dict.fromkeys([*ladder[:1], *ladder[-2:]] if theirs else []):
                pairs = list(product(rounds[key], theirs))
                rows.append(
                    {
                        "method": method,
                        "precision": precision,
                        "fast_paths": ", ".join(key[2]) or NO_FAST_PATH,
                        "peer": peer,
                        "ratio": statistics.median(other[1] / ours[1] for ours, other in pairs),
                        "lowest": min(other[0] / ours[2] for ours, other in pairs),
                        "highest": max(other[2] / ours[0] for ours, other in pairs),
                    }
                )
    return pd.DataFrame(rows)


def levers(result: dict) -> pd.DataFrame:
    """What :func:`study.speed.benchmark.levers` measured, one row per lever and method.

    Columns: lever, method, precision, without and with (tokens per second, medians over rounds), ratio (with /
    without, median over rounds), lowest, highest (of the rounds).
    """
    rows = []
    for tried in result["levers"]:
        speed_ups = [r["with"] / r["without"] for r in tried["rounds"]]
        row = {"lever": tried["lever"], "method": tried["method"], "precision": result["precision"]}
        row |= {side: statistics.median(r[side] for r in tried["rounds"]) for side in ("without", "with")}
        rows.append(row | {"ratio": statistics.median(speed_ups), "lowest": min(speed_ups), "highest": max(speed_ups)})
    return pd.DataFrame(rows)


@drawn
def step_times(result: dict, precision: str) -> Figure:
    """Where the time of a step goes, per method: stacked parts without and with fast paths, and the floor."""
    shades = ("#c6c6c6", "#08306b", "#3a87c0", "#d55e00", "#e6b800", "#4d4d4d")
    hatches = ("", "", "//", "", "..", "xx")
    rows = steps(result)
    rows = rows[(rows["precision"] == precision) & (rows["fast_paths"] != "")]
    names, ladders = zip(*rows.groupby("subject", sort=False), strict=True)
    groups = [ladder.iloc[sorted({0, max(len(ladder) - 2, 1), len(ladder) - 1})] for ladder in ladders]
    rows = pd.concat(groups)
    figure = Figure(figsize=(7, 0.9 + 0.21 * len(rows)), layout="constrained")
    axes = figure.subplots()
    heights = np.arange(len(rows), dtype=float) + 0.6 * np.repeat(np.arange(len(groups)), [len(g) for g in groups])
    left = np.zeros(len(rows))
    for part, shade, hatch in zip(PARTS, shades, hatches, strict=True):
        axes.barh(heights, rows[part], 0.8, left, color=shade, hatch=hatch, edgecolor="white", linewidth=0, label=part)
        left += rows[part].to_numpy()
    axes.plot(rows["floor"], heights, "k|", markersize=9, markeredgewidth=1.5, label="floor: matrix products alone")
    rungs = ["no fast path", "fast paths", "and teacher shared"]
    axes.set_yticks(
        heights, [f"{short(name)}: {rung}" for name, g in zip(names, groups, strict=True) for rung in rungs[: len(g)]]
    )
    axes.set_ylim(heights[-1] + 0.7, -0.7)
    sizes = result["benchmark"]
    tokens = f"{sizes['batch_size']} × {sizes['sequence_length']}"
    axes.set_xlabel(f"milliseconds per step of {tokens} tokens, {precision}")
    figure.legend(loc="outside upper center", ncols=4, frameon=False)
    return figure


def _plain(axis: Axis) -> None:
    """Numbers at 1, 2 and 5 of each power of ten."""
    axis.set_major_locator(LogLocator(subs=(1, 2, 5)))
    axis.set_major_formatter(StrMethodFormatter("{x:g}"))
    axis.set_minor_locator(NullLocator())


@drawn
def predictions(checked: dict[str, pd.DataFrame]) -> Figure:
    """Predicted against measured milliseconds a step, a panel for each of ``study.speed.grid_cost.checks``."""
    figure = Figure(figsize=(7, 2.8), layout="constrained")
    panels = figure.subplots(1, len(checked), squeeze=False)[0]
    for axes, (name, steps) in zip(panels, checked.items(), strict=True):
        measured, predicted = 1e3 * steps["seconds"], 1e3 * steps["predicted"]
        ends = [0.8 * min(measured.min(), predicted.min()), 1.25 * max(measured.max(), predicted.max())]
        axes.plot(ends, ends, color=GREY, linewidth=0.8)
        axes.fill_between(ends, [0.8 * end for end in ends], [1.2 * end for end in ends], color=PALE, alpha=0.3)
        axes.plot(measured, predicted, "o", markersize=4, color=GREY, markerfacecolor="#0072b2", markeredgewidth=0.3)
        axes.set(title=f"{name} ({len(steps)} steps)", xscale="log", yscale="log", xlim=ends, ylim=ends, aspect="equal")
        axes.set_xlabel("measured (ms)")
        for axis in (axes.xaxis, axes.yaxis):
            _plain(axis)
    panels[0].set_ylabel("predicted (ms)")
    return figure


@drawn
def waits(clusters: pd.DataFrame) -> Figure:
    """Hours of every study against GPUs, a line for each driver, above the two bounds (study.speed.simulation)."""
    studies = list(clusters.groupby("study", sort=False))
    figure = Figure(figsize=(8, 2.8), layout="constrained")
    for axes, (name, rows) in zip(figure.subplots(1, len(studies), squeeze=False)[0], studies, strict=True):
        for (recorded, own), look in zip(rows.groupby("recorded", sort=False), ("s-", "o--", "^:"), strict=False):
            axes.plot(own["gpus"], own["hours"], look, label=f"outcomes recorded {recorded}")
        own = rows.drop_duplicates("gpus")
        axes.plot(own["gpus"], own["longest chain (hours)"], "k:", linewidth=1, label="longest chain of stages")
        axes.plot(own["gpus"], own["GPUs (hours)"], "k--", linewidth=1, label="all work over all GPUs")
        axes.set(title=f"{name} ({own['stages'].iloc[0]} stages)", xlabel="GPUs", xscale="log", yscale="log")
        _plain(axes.yaxis)
        axes.set_xticks(own["gpus"], [str(number) for number in own["gpus"]], minor=False)
        axes.xaxis.set_minor_locator(NullLocator())
    figure.axes[0].set_ylabel("hours")
    figure.legend(*figure.axes[0].get_legend_handles_labels(), loc="outside upper center", ncols=4)
    return figure
