"""Training steps at the paper's scale on a GPU: seconds, model-FLOPs utilisation, public packages on the same card."""

from __future__ import annotations

import multiprocessing
import os
import statistics
import tempfile
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path
from typing import Any

import pandas as pd
import torch
from torch import nn
from transformers import TrainerCallback, TrainingArguments, default_data_collator

from study.config import Params
from study.distillation.distil import start_fast_paths
from study.distillation.trainer import applied, common_arguments, freeze_untrained, train
from study.files import StudyError, write_json
from study.runtime import compute_device, environment
from study.sections import Encoder
from study.speed import cost
from study.speed.benchmark import (
    SHARED,
    Subject,
    applicable,
    idle,
    label,
    measure_peaks,
    measure_peer,
    objective_of,
    sequences,
    summary,
)

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
    own = subjects(params)
    result: dict[str, Any] = {
        "benchmark": params.benchmark.model_dump(),
        "subjects": [subject | {"rounds": []} for subject in own],
        "peaks": _in_a_process(params, {"kind": "peaks"}),
        "environment": environment(),
    }
    for turn in range(params.benchmark.rounds):
        for i, subject in enumerate(own):
            measured = _in_a_process(params, subject)
            result["subjects"][i]["rounds"].append(measured)
            speed = "left out: {left_out}" if "left_out" in measured else "{tokens_per_second:,.0f} tokens/s"
            print(
                f"GPU round {turn + 1} [{i + 1}/{len(own)}] {label(subject)} | {speed.format(**measured)}", flush=True
            )
        result["benchmark"]["rounds"] = turn + 1
        write_json(output, result)
    return result


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

    Columns: subject, precision, fast_paths, tokens_per_second (also lowest, highest round), step and roofline
    (milliseconds; roofline: the step's products at the speed measured for large ones), efficiency (roofline / step),
    mfu (:func:`utilisation` of the maker's peak; empty for a card that is not in :data:`MAKERS_PEAKS`), memory (GiB).
    """
    rows, peak = [], makers_peak(result["environment"]["processor"])
    measured = result["peaks"].get("bf16") or result["peaks"]["fp32"]
    for subject in result["subjects"]:
        rounds = [r for r in subject["rounds"] if "left_out" not in r]
        if not rounds:
            continue
        seconds = statistics.median(r["median_seconds"] for r in rounds)
        speeds = [r["tokens_per_second"] for r in rounds]
        row = {"subject": subject["name"], "precision": subject["precision"]}
        row["fast_paths"] = ", ".join(subject.get("fast_paths", [])) or ("none" if subject["kind"] == "method" else "")
        row |= {"tokens_per_second": statistics.median(speeds), "lowest": min(speeds), "highest": max(speeds)}
        row["step"] = 1e3 * seconds
        if "flops" in rounds[0]:
            flops = rounds[0]["flops"]
            row |= {"roofline": 1e3 * flops / measured, "efficiency": utilisation(flops, seconds, measured)}
            row["mfu"] = utilisation(flops, seconds, peak) if peak else None
        rows.append(row | {"memory": statistics.median(r["memory"] for r in rounds) / 1024})
    names = ["subject", "precision", "fast_paths", "tokens_per_second", "lowest", "highest", "step"]
    return pd.DataFrame(rows, columns=[*names, "roofline", "efficiency", "mfu", "memory"])


class WholeSteps(TrainerCallback):
    """Seconds of every step from the end of the one before, the device idle at both."""

    def __init__(self) -> None:
        self.seconds: list[float] = []

    def on_train_begin(self, args, state, control, **kwargs):
        self.last = idle(compute_device())

    def on_step_end(self, args, state, control, **kwargs):
        now = idle(compute_device())
        self.seconds.append(now - self.last)
        self.last = now


def measure_step(params: Params, subject: Subject) -> dict[str, Any]:
    """Seconds of each counted step of a method by the study's training, data loading included, and its operations."""
    params = params.model_copy(update={"fast_paths": applied(subject["fast_paths"])})
    settings, bf16, device = params.benchmark, subject["precision"] == "bf16", compute_device()
    objective = objective_of(params, subject["name"])
    for model in (objective, objective.teacher):
        if model is not None:
            nn.Module.to(model, device)
    steps = settings.warmup_steps + settings.steps
    stream, clock = sequences(params, steps * settings.batch_size), WholeSteps()
    first = default_data_collator([stream[0]])
    freeze_untrained(objective, {key: x.to(device) for key, x in first.items()})
    with tempfile.TemporaryDirectory() as folder:
        arguments = TrainingArguments(
            output_dir=folder,
            max_steps=steps,
            per_device_train_batch_size=settings.batch_size,
            learning_rate=1e-5,
            seed=0,
            **common_arguments(bf16, settings.batch_size) | {"eval_strategy": "no", "save_strategy": "no"},
        )
        start_fast_paths(params.fast_paths, bf16, objective, Path(folder), (len(stream), settings.sequence_length))
        graphs = "cuda-graphs" in params.fast_paths
        train(objective, stream, sequences(params, 1), arguments, label(subject), [clock], graphs)
    return {"seconds": clock.seconds[settings.warmup_steps :], "flops": cost.count(_workload(params, subject)).flops}


def _workload(params: Params, subject: Subject) -> cost.Workload:
    sizes, method = params.benchmark, params.methods[subject["name"]]
    return cost.Workload(
        sizes.teacher,
        sizes.student,
        method,
        sizes.vocabulary,
        sizes.batch_size,
        sizes.sequence_length,
        masked=params.masking.fraction,
        fast_paths=(),
    )


def _in_a_process(params: Params, subject: Subject) -> dict[str, Any]:
    with ProcessPoolExecutor(1, multiprocessing.get_context("spawn")) as pool:
        return pool.submit(_measure, params, subject).result()


def _measure(params: Params, subject: Subject) -> dict[str, Any]:
    device = compute_device()
    if subject["kind"] == "peaks":
        return measure_peaks(device=device)
    try:
        peer = subject["kind"] == "peer"
        measured = summary(params, measure_peer(params, subject, device) if peer else measure_step(params, subject))
    except StudyError as error:  # a peer that is not installed
        return {"left_out": str(error)}
    except torch.OutOfMemoryError:
        return {"left_out": "does not fit in the memory of the card"}
    if device.type == "cuda":
        measured["memory"] = torch.cuda.max_memory_allocated() / 2**20
    return measured
