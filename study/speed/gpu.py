"""Training steps at the paper's scale on a GPU: seconds, model-FLOPs utilisation, public packages on the same card."""

from __future__ import annotations

import os
import statistics
import tempfile
from functools import partial
from pathlib import Path
from typing import Any

import pandas as pd

from study.config import Params
from study.distillation.distil import start_fast_paths
from study.distillation.trainer import applied, train
from study.runtime import compute_device
from study.sections import Encoder
from study.speed import cost
from study.speed.benchmark import (
    SHARED,
    Subject,
    applicable,
    arguments,
    in_rounds,
    label,
    measure_subject,
    prepared,
    sequences,
)
from study.speed.parts import WholeSteps
from study.speed.tables import measured

#: What replaces the sizes of params.benchmark. Source: the paper's teacher, a student of 6 x 384.
SCALE: dict[str, Any] = {
    "teacher": Encoder(layers=12, width=768, heads=12, intermediate=3072),
    "student": Encoder(layers=6, width=384, heads=12, intermediate=1536),
    "batch_size": 64,
    "sequence_length": 512,
}
#: FLOP/s of dense products in bf16 as makers state them, by what a card's name holds; the first that fits.
MAKERS_PEAKS = {
    **{"H100 PCIe": 756e12, "H100 NVL": 835e12, "H100": 989e12, "H200": 989e12, "B200": 2250e12},
    **{"A100": 312e12, "L40S": 362e12, "L4": 121e12},
}


def at_scale(params: Params) -> Params:
    """``params`` with the sizes of :data:`SCALE`, in bf16, with scaled-dot-product attention."""
    sizes = params.benchmark.model_copy(update=SCALE)
    return params.model_copy(update={"benchmark": sizes, "precision": "bf16", "attention_implementation": "sdpa"})


def subjects(params: Params) -> list[Subject]:
    """Every method without and with all fast paths, then every peer in fp32, as its users run it, and under bf16."""
    rows: list[Subject] = []
    for name in params.benchmark.methods:
        useful = applicable(params.methods[name].objective, "bf16")
        paths = [path for path in (*useful, "cuda-graphs") if path != SHARED]  # computed sooner than read, on a GPU
        rows += [{"kind": "method", "name": name, "precision": "bf16", "fast_paths": own} for own in ([], paths)]
    peers = params.benchmark.peers
    return rows + [{"kind": "peer", "name": name, "precision": own} for name in peers for own in ("fp32", "bf16")]


def missing(params: Params) -> str:
    """One line for a machine without a GPU: what its table would have."""
    rows = ", ".join(dict.fromkeys(subject["name"] for subject in subjects(params)))
    return f"no GPU is visible: the table of steps on a GPU was not measured; its rows would be {rows}"


def gpu_benchmark(params: Params, output: str | os.PathLike) -> dict[str, Any]:
    """Measure :func:`subjects` where models are trained, each in a process of its own, and write one JSON file.

    Every step is waited for: its seconds begin and end with an idle card. The file is written after every round.

    Args:
        params: with the sizes to measure, :func:`at_scale`.

    Returns:
        As :func:`study.speed.benchmark.benchmark` has it, without parts and floors; of a method also ``flops``, the
        floating-point operations of a step's matrix products (:func:`study.speed.cost.count`). ``memory`` is the
        card's, in MiB.

    Raises:
        StudyError: the file cannot be written.
    """
    device = compute_device()
    measure = partial(measure_subject, device=device, method=measure_step)
    return in_rounds(params, subjects(params), measure, device, "GPU", output)


def makers_peak(card: str) -> float | None:
    """FLOP/s of dense bf16 products of a card, by its name; None for one that is not known."""
    return next((peak for name, peak in MAKERS_PEAKS.items() if name in card), None)


def utilisation(flops: float, seconds: float, peak: float) -> float:
    r"""Share of a peak that the model's own operations reach: flops / (seconds x peak).

    The operations are those that the step needs, not those that an implementation makes: computing layers twice, or
    logits that no one reads, earns nothing. Source: model-FLOPs utilisation (Chowdhery et al., 2204.02311), here with
    the teacher's forward pass as far as it is read.
    """
    return flops / (seconds * peak)


def gpu_steps(result: dict[str, Any]) -> pd.DataFrame:
    """One row per subject of :func:`gpu_benchmark` that was measured, medians over rounds.

    Columns: those of :func:`study.speed.tables.measured`; roofline (milliseconds: the step's products at the speed
    measured for large ones), efficiency (roofline / step), mfu (:func:`utilisation` of the maker's peak; empty for a
    card that is not in :data:`MAKERS_PEAKS`), memory (GiB).
    """
    rows, peak = [], makers_peak(result["environment"]["processor"])
    fastest = result["peaks"].get("bf16") or result["peaks"]["fp32"]
    for row, rounds in measured(result):
        if (flops := rounds[0].get("flops")) is not None:
            seconds = statistics.median(r["median_seconds"] for r in rounds)
            row |= {"roofline": 1e3 * flops / fastest, "efficiency": utilisation(flops, seconds, fastest)}
            row["mfu"] = utilisation(flops, seconds, peak) if peak else None
        rows.append(row | {"memory": statistics.median(r["memory"] for r in rounds) / 1024})
    names = ["subject", "precision", "fast_paths", "tokens_per_second", "lowest", "highest", "step"]
    return pd.DataFrame(rows, columns=[*names, "roofline", "efficiency", "mfu", "memory"])


def measure_step(params: Params, subject: Subject) -> dict[str, Any]:
    """Seconds of each counted step of a method by the study's training, data loading included, and its operations."""
    params = params.model_copy(update={"fast_paths": applied(subject["fast_paths"])})
    settings, bf16, clock = params.benchmark, subject["precision"] == "bf16", WholeSteps()
    objective, stream = prepared(params, subject["name"], compute_device())
    with tempfile.TemporaryDirectory() as folder:
        start_fast_paths(params.fast_paths, bf16, objective, Path(folder), (len(stream), settings.sequence_length))
        graphs, own = "cuda-graphs" in params.fast_paths, arguments(params, bf16, folder, {})
        train(objective, stream, sequences(params, 1), own, label(subject), [clock], graphs)
    flops = cost.count(cost.benchmark_workload(params, settings, subject)).flops
    return {"seconds": clock.seconds[settings.warmup_steps :], "flops": flops}
