"""Latency and throughput of students, each measured side by side with its teacher."""

from __future__ import annotations

import itertools
import time
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import nn
from transformers import PreTrainedModel

from study.data.pretrained import load_model
from study.data.references import untrained_reference
from study.descriptions import TEACHER, LatencyMeasurement
from study.distillation.students import create_student
from study.evaluation.provenance import provenance, weights_hash
from study.files import Layout, StudyError
from study.records import LatencyResult, Measurement, write_record
from study.runtime import PROCESSOR, autocast, environment, use_bf16
from study.sections import Latency


def measure_latency(description: LatencyMeasurement, layout: Layout, output: Path) -> LatencyResult:
    """Time every student of the grid against the teacher and write one result file.

    Protocol: encoder forward pass on ``sequence_length`` tokens without padding, inputs in memory (no tokenisation, no
    data loading), inference mode, the study's precision; ``warmup_runs`` uncounted, then ``runs`` pairs student,
    teacher, student, teacher ... in turn, so that a drift of the machine's speed meets both; median and quartiles in
    seconds; ``speed_up`` is the median of the ratios pair by pair. Latency depends on a student's shape alone, not on
    its weights, so a randomly initialised one stands for all methods. The teacher's own entries are those measured
    beside the last student. References are measured as students are. Source: this study's choice.

    Where ``devices`` are asked for, each measurement says which one it was made on, and in which precision.

    Raises:
        StudyError: a model is missing, a GPU is asked for where there is none, or the file cannot be written.
    """
    protocol = description.latency
    if "cuda" in (protocol.devices or ()) and not torch.cuda.is_available():
        raise StudyError(f"latency.devices = {protocol.devices}: no GPU is visible here; allowed: [cpu]")
    devices = [torch.device(name) for name in protocol.devices] if protocol.devices else [PROCESSOR]
    bf16 = {device: use_bf16(description.precision, device) for device in devices}
    teacher = load_model(layout.teacher, description.attention_implementation).eval()
    encoder: Any = teacher.base_model
    hashes = {"teacher": weights_hash(layout.teacher)}
    measurements, threads_before = [], torch.get_num_threads()
    last = list(description.students)[-1]
    references = description.references or {}
    for name in (*references, *description.students):
        nn.Module.to(encoder, PROCESSOR)  # where students are made
        model: Any = (
            untrained_reference(references[name], teacher.config.vocab_size)
            if name in references
            else create_student(teacher, description.students[name], "random").base_model
        )
        student = model.eval()
        for device, threads, batch_size in itertools.product(devices, protocol.threads, protocol.batch_sizes):
            nn.Module.to(student, device)
            nn.Module.to(encoder, device)
            torch.set_num_threads(threads)
            shape = (batch_size, protocol.sequence_length)
            inputs = torch.randint(teacher.config.vocab_size, shape, generator=torch.Generator().manual_seed(0))
            seconds = _side_by_side(student, encoder, protocol, inputs, bf16[device])
            where = _where(student, bf16[device]) if protocol.devices else {}
            measurements.append(_measurement(name, batch_size, threads, seconds[:, 0], seconds[:, 1], where))
            of_student, of_teacher = np.median(seconds, axis=0) * 1e3
            print(
                f"latency {name} batch {batch_size} threads {threads} {device.type} | {of_student:.1f} ms"
                f" | teacher {of_teacher:.1f} ms | {measurements[-1].speed_up:.2f} x",
                flush=True,
            )
            if name == last:
                measurements.append(_measurement(TEACHER, batch_size, threads, seconds[:, 1], seconds[:, 1], where))
    torch.set_num_threads(threads_before)
    result = LatencyResult(
        **provenance(description, layout, hashes, devices[0]),
        sequence_length=protocol.sequence_length,
        precision=_precision(bf16[devices[0]]),
        runs=protocol.runs,
        warmup_runs=protocol.warmup_runs,
        measurements=measurements,
    )
    write_record(output, result)
    return result


def _side_by_side(
    student: PreTrainedModel, teacher: PreTrainedModel, protocol: Latency, inputs: torch.Tensor, bf16: bool
) -> np.ndarray:
    """(runs, 2): seconds of student and teacher, in turn, on the same tokens (batch, tokens)."""
    pairs = [
        (forward_seconds(student, inputs, bf16), forward_seconds(teacher, inputs, bf16))
        for _ in range(protocol.warmup_runs + protocol.runs)
    ]
    return np.array(pairs[protocol.warmup_runs :])


@torch.inference_mode()
def forward_seconds(model: PreTrainedModel, inputs: torch.Tensor, bf16: bool) -> float:
    """Seconds of one forward pass of ``inputs`` (batch, tokens), waiting for the device to finish."""
    inputs = inputs.to(model.device)
    if model.device.type == "cuda":
        torch.cuda.synchronize()
    began = time.perf_counter()
    with autocast(model.device, bf16):
        model(input_ids=inputs)
    if model.device.type == "cuda":
        torch.cuda.synchronize()
    return time.perf_counter() - began


def _measurement(
    name: str, batch_size: int, threads: int, seconds: np.ndarray, teacher_seconds: np.ndarray, where: dict[str, str]
) -> Measurement:
    """The entry of one model and setup: seconds (runs,) of it and of the teacher beside it."""
    lower, median, upper = (float(value) for value in np.percentile(seconds, [25, 50, 75]))
    return Measurement(
        student=name,
        batch_size=batch_size,
        threads=threads,
        median_seconds=median,
        lower_quartile_seconds=lower,
        upper_quartile_seconds=upper,
        sequences_per_second=batch_size / median,
        teacher_median_seconds=float(np.median(teacher_seconds)),
        speed_up=float(np.median(teacher_seconds / seconds)),
        **where,
    )


def _where(model: PreTrainedModel, bf16: bool) -> dict[str, str]:
    device = model.device
    return {"device": device.type, "processor": environment(device)["processor"], "precision": _precision(bf16)}


def _precision(bf16: bool) -> str:
    return "bf16" if bf16 else "fp32"
