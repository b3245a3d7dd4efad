r"""What a distillation run costs, from counts of arithmetic and memory traffic and two measured efficiencies.

.. math:: seconds = steps \cdot \left(\frac{F}{e_F \, peak_F} + \frac{M}{e_M \, peak_M} + \frac{C}{link}\right)

F are the floating-point operations of the matrix products of a step, M the bytes that everything else moves (sums,
norms, softmaxes, losses, optimiser), C the bytes of gradients that devices exchange. The efficiencies e_F and e_M are
fitted to measured steps (:func:`fit`). Source: this study's choice, after the roofline model (Williams et al., 2009).
"""

from __future__ import annotations

import json
import os
import statistics
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
import pandas as pd
from scipy.optimize import nnls

from study.analysis.results import TEACHER, Results
from study.config import Benchmark, Encoder, Method, Params
from study.evaluation.benchmark import applicable
from study.mappings import layer_mapping


@dataclass(frozen=True)
class Device:
    """``flops``: FLOP/s of dense matrix products in the run's precision; ``bandwidth``: bytes/s of its memory;
    ``memory``: bytes; ``link``: bytes/s at which devices exchange gradients; ``price``: US dollars per hour."""

    name: str
    flops: float
    bandwidth: float
    memory: float = float("inf")
    link: float = float("inf")
    price: float = 0.0


@dataclass(frozen=True)
class Run:
    """Everything that a step's work depends on. ``masked`` is the share of tokens predicted; ``fast_paths`` as in
    params.yaml; ``precision`` "bf16" or "fp32"."""

    teacher: Encoder
    student: Encoder
    method: Method
    vocabulary: int
    batch_size: int
    sequence_length: int
    steps: int = 1
    masked: float = 0.15
    precision: str = "bf16"
    fast_paths: tuple[str, ...] = ("kept-memory", "fused-losses", "rounded-teacher")

    @property
    def tokens(self) -> int:
        """Of one step."""
        return self.batch_size * self.sequence_length


@dataclass(frozen=True)
class Work:
    """Of one step: ``flops`` of matrix products, ``bytes`` moved besides. ``memory``: bytes that the run holds at once.
    ``parameters``: of the student, which devices exchange gradients of."""

    flops: float
    bytes: float
    memory: float
    parameters: float


@dataclass(frozen=True)
class Efficiency:
    """Shares of a device's peaks that a step reaches: ``flops`` in matrix products, ``bytes`` in all else."""

    flops: float
    bytes: float


# Traffic of one encoder layer without its matrix products, counted in values read or written per token: each operator
# reads its operands and writes its result once. Per unit of width: four biases, split and merged heads, two residuals,
# two layer norms. Per unit of feed-forward width: bias, GELU. Per score: scaling, softmax.
WIDTH_PASSES, INTERMEDIATE_PASSES, SCORE_PASSES = 30, 4, 5
# Per logit or relation score of a loss between two distributions, with gradient, by whether it is fused: then about
# half of the passes stay within the caches (judged on the benchmark). Cross-entropy has one distribution.
DIVERGENCE_PASSES = {False: 26, True: 14}
CROSS_ENTROPY_PASSES = 10
# Per parameter: gradient zeroed, written, clipped (norm, scale); AdamW reads four values and writes three.
PARAMETER_PASSES = 12
# Values kept for the backward pass.
WIDTH_KEPT, INTERMEDIATE_KEPT, SCORES_KEPT = 12, 2, 2


def work(run: Run) -> Work:
    """Count one step. A backward pass multiplies twice what the forward pass does, and moves twice as much."""
    teacher, student, method, length = run.teacher, run.student, run.method, run.sequence_length
    size = 2 if run.precision == "bf16" else 4
    fused = "fused-losses" in run.fast_paths
    shared = "shared-teacher" in run.fast_paths or method.objective == "masked_language_modelling"
    has_head = method.objective in ("masked_language_modelling", "output_distribution")
    positions = 1.0 if getattr(method, "positions", "masked") == "all" else run.masked

    if "teacher_layer_from_top" in type(method).model_fields:
        depth = teacher.layers - method.teacher_layer_from_top - 1  # whole layers below the projections that are read
        teacher_flops = depth * _layer_flops(teacher, length) + 6 * teacher.width**2
        student_flops = (student.layers - 1) * _layer_flops(student, length) + 6 * student.width**2
        student_layers = student.layers - 1
    else:
        mapping = layer_mapping(method.mapping, teacher.layers, student.layers) if hasattr(method, "mapping") else {}
        depth = max((j for targets in mapping.values() for j in targets), default=teacher.layers)
        teacher_flops = depth * _layer_flops(teacher, length)
        student_flops, student_layers = student.layers * _layer_flops(student, length), student.layers
    flops = 3 * student_flops + (0 if shared else teacher_flops)
    values = 3 * student_layers * _layer_values(student, length) + (
        0 if shared else depth * _layer_values(teacher, length)
    )
    kept = student_layers * (
        WIDTH_KEPT * student.width + INTERMEDIATE_KEPT * student.intermediate + SCORES_KEPT * student.heads * length
    )
    if has_head:
        flops += positions * 3 * 2 * (student.width**2 + student.width * run.vocabulary)
        with_teacher = method.objective == "output_distribution"
        values += positions * run.vocabulary * (DIVERGENCE_PASSES[fused] if with_teacher else CROSS_ENTROPY_PASSES)
        kept += positions * run.vocabulary * 3
        if with_teacher:
            flops += positions * 2 * (teacher.width**2 + teacher.width * run.vocabulary)
            kept += positions * run.vocabulary * 2
    if method.objective == "hidden_state":
        pairs = sum(map(len, mapping.values()))
        flops += pairs * 3 * 2 * student.width * teacher.width
        values += pairs * 12 * teacher.width
        kept += pairs * 2 * teacher.width
    if method.objective == "direct_attention":
        flops += 3 * 3 * 2 * student.width * teacher.width
        values += 3 * 12 * teacher.width
        kept += 3 * 2 * teacher.width
    if method.objective == "attention_relation":
        flops += 3 * 2 * length * (teacher.width + 3 * student.width)
        values += 3 * method.relation_heads * length * DIVERGENCE_PASSES[fused]
        kept += 0 if fused else 3 * 4 * method.relation_heads * length
    parameters = _parameters(student, run.vocabulary)
    moments_and_gradient = 16 * parameters  # float32 throughout
    return Work(
        flops=flops * run.tokens,
        bytes=values * run.tokens * size + PARAMETER_PASSES * 4 * parameters,
        memory=moments_and_gradient + size * (kept * run.tokens + _parameters(teacher, run.vocabulary)),
        parameters=parameters,
    )


def fit(runs: Sequence[Run], seconds_per_step: Sequence[float], device: Device) -> Efficiency:
    """Efficiencies that explain measured steps best: least squares of relative errors, neither below zero.

    Raises:
        ValueError: fewer than two runs.
    """
    if len(runs) < 2:
        raise ValueError(f"{len(runs)} measured steps; allowed: at least 2")
    counts = np.array([[w.flops / device.flops, w.bytes / device.bandwidth] for w in map(work, runs)])
    measured = np.asarray(seconds_per_step, dtype=float)
    inverse, _ = nnls(counts / measured[:, None], np.ones(len(runs)))
    return Efficiency(*(1 / value if value > 0 else float("inf") for value in inverse))


def predict(run: Run, device: Device, efficiency: Efficiency, devices: int = 1) -> dict[str, float]:
    """Cost of a whole run, its batch divided evenly over ``devices``.

    Returns:
        ``seconds``, ``tokens_per_second``, ``memory`` (bytes per device), ``dollars``; of the seconds, ``products``,
        ``traffic`` and ``exchange``.

    Raises:
        ValueError: ``devices`` does not divide the batch.
    """
    if run.batch_size % devices:
        raise ValueError(f"{devices} devices do not divide a batch of {run.batch_size}")
    part = work(replace(run, batch_size=run.batch_size // devices))
    exchanged = 2 * (devices - 1) / devices * 4 * part.parameters  # ring all-reduce of float32 gradients
    seconds = {
        "products": run.steps * part.flops / (efficiency.flops * device.flops),
        "traffic": run.steps * part.bytes / (efficiency.bytes * device.bandwidth),
        "exchange": run.steps * exchanged / device.link,
    }
    total = sum(seconds.values())
    return {
        "seconds": total,
        "tokens_per_second": run.steps * run.tokens / total,
        "memory": part.memory,
        "dollars": total / 3600 * device.price * devices,
        **seconds,
    }


def benchmark_steps(result: dict, params: Params) -> pd.DataFrame:
    """The benchmark's steps with every fast path of one process, and with a shared teacher: what the study runs.

    Returns:
        columns method, precision, fast_paths, seconds (per step, median), memory (bytes of the process) and run.
    """
    sizes, rows = Benchmark.model_validate(result["benchmark"]), []
    for subject in result["subjects"]:
        if subject["kind"] != "method":
            continue
        method = params.methods[subject["name"]]
        if set(applicable(method.objective, subject["precision"])) - {"shared-teacher", *subject["fast_paths"]}:
            continue
        run = Run(
            sizes.teacher,
            sizes.student,
            method,
            sizes.vocabulary,
            sizes.batch_size,
            sizes.sequence_length,
            masked=params.masking.fraction,
            precision=subject["precision"],
            fast_paths=tuple(subject["fast_paths"]),
        )
        seconds = statistics.median(r["median_seconds"] for r in subject["rounds"])
        memory = statistics.median(r["memory"] for r in subject["rounds"]) * 2**20
        rows.append((subject["name"], subject["precision"], ", ".join(run.fast_paths), seconds, memory, run))
    return pd.DataFrame(rows, columns=["method", "precision", "fast_paths", "seconds", "memory", "run"])


def stage_steps(results: Results, params: Params, setting: str) -> pd.DataFrame:
    """The distillation stages of a profile as they were run; position embeddings are counted as vocabulary.

    Where the teacher was shared, its part is left out for every cell, also for the one that computed it.

    Returns:
        columns method, student, precision, threads, seconds (per step, mean) and run.
    """
    rows = []
    trained = results.runs[results.runs["student"] != TEACHER].dropna(subset="tokens_per_second")
    for cell in trained.itertuples():
        run = Run(
            params.settings[setting].teacher,
            params.students[cell.student],
            params.methods[cell.method],
            round(cell.embedding_parameters / params.students[cell.student].width),
            params.distillation.batch_size,
            params.corpus.sequence_length,
            masked=params.masking.fraction,
            precision=cell.precision,
            fast_paths=tuple(cell.fast_paths),
        )
        seconds = run.tokens / cell.tokens_per_second
        rows.append((cell.method, cell.student, cell.precision, cell.training_threads, seconds, run))
    return pd.DataFrame(rows, columns=["method", "student", "precision", "threads", "seconds", "run"])


def result_seconds(results: Results) -> pd.DataFrame:
    """Training (the teacher's is its adaptation) and evaluation, by model.

    Returns:
        columns stage, student, cells, seconds (summed) and tokens_per_second.
    """
    trained = results.runs.dropna(subset="tokens").groupby("student", sort=False)
    tables = [trained[["seconds", "tokens"]].sum().assign(cells=trained.size(), stage="train")]
    everyone = results.runs.groupby("student", sort=False)
    evaluated = everyone[["evaluation_seconds"]].sum().rename(columns={"evaluation_seconds": "seconds"})
    tables.append(evaluated.assign(cells=everyone.size(), stage="evaluate"))
    table = pd.concat(tables).reset_index()
    table["tokens_per_second"] = table["tokens"] / table["seconds"]
    return table[["stage", "student", "cells", "seconds", "tokens_per_second"]]


def stage_seconds(notebooks: str | os.PathLike) -> pd.DataFrame:
    """Wall time of the stages of a profile, from its executed notebooks: columns stage, cells and seconds (summed).

    Stages of one kind may have run side by side; a repeated run counts with its last execution.
    """
    rows = []
    for file in sorted(Path(notebooks).glob("*.ipynb")):
        duration = json.loads(file.read_text())["metadata"]["papermill"]["duration"]
        rows.append((file.stem.partition("_")[0], duration))
    table = pd.DataFrame(rows, columns=["stage", "seconds"])
    return table.groupby("stage", sort=False)["seconds"].agg(cells="count", seconds="sum").reset_index()


def cross_validate(steps: pd.DataFrame, groups: str, device: Device) -> pd.Series:
    """Seconds per step of every row, predicted from efficiencies fitted to the rows of all other ``groups``."""
    predicted = pd.Series(index=steps.index, dtype=float)
    for group in steps[groups].unique():
        own = steps[groups] == group
        efficiency = fit(steps["run"][~own], steps["seconds"][~own], device)
        predicted[own] = [predict(run, device, efficiency)["seconds"] for run in steps["run"][own]]
    return predicted


def device_of(result: dict, precision: str) -> Device:
    """The machine that a benchmark ran on, by the peaks measured there."""
    peaks = result["peaks"]
    return Device(result["environment"]["processor"], peaks[precision], peaks["bandwidth"])


def _layer_flops(encoder: Encoder, length: int) -> float:
    """Per token: four width x width products, two of the feed-forward part, scores and their products with values."""
    return 8 * encoder.width**2 + 4 * encoder.width * encoder.intermediate + 4 * length * encoder.width


def _layer_values(encoder: Encoder, length: int) -> float:
    return (
        WIDTH_PASSES * encoder.width
        + INTERMEDIATE_PASSES * encoder.intermediate
        + SCORE_PASSES * encoder.heads * length
    )


def _parameters(encoder: Encoder, vocabulary: int) -> float:
    return vocabulary * encoder.width + encoder.layers * (
        4 * encoder.width**2 + 2 * encoder.width * encoder.intermediate
    )
