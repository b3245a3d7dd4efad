"""Latency and throughput of students, each measured side by side with its teacher."""

from __future__ import annotations

import time
from pathlib import Path

import numpy as np
import torch
from transformers import PreTrainedModel

from study.config import Layout, Params
from study.files import write_json
from study.models.students import create_student
from study.models.teachers import load_model
from study.runtime import environment, use_bf16


def measure_latency(params: Params, setting: str, output: Path) -> dict:
    """Time every student of the grid against the teacher and write one result file.

    Protocol: encoder forward pass on ``sequence_length`` tokens without padding, inputs in memory (no tokenisation, no
    data loading), inference mode, the study's precision; ``warmup_runs`` uncounted, then ``runs`` pairs student,
    teacher, student, teacher ... in turn, so that a drift of the machine's speed meets both; median and quartiles in
    seconds;
    ``speed_up`` is the median of the ratios pair by pair. Latency depends on a student's shape alone, not on its
    weights, so a randomly initialised one stands for all methods. Source: this study's choice.

    Raises:
        StudyError: a model is missing or the file cannot be written.
    """
    layout, protocol = Layout(params, setting), params.latency
    bf16 = use_bf16(params.precision)
    teacher = load_model(layout.teacher, params.attention_implementation).eval()
    measurements, threads_before = [], torch.get_num_threads()
    for name in params.grid.students[setting]:
        student = create_student(teacher, params.students[name], "random").base_model.eval()
        for threads in protocol.threads:
            torch.set_num_threads(threads)
            for batch_size in protocol.batch_sizes:
                shape = (batch_size, protocol.sequence_length)
                inputs = torch.randint(teacher.config.vocab_size, shape, generator=torch.Generator().manual_seed(0))
                pairs = [
                    (forward_seconds(student, inputs, bf16), forward_seconds(teacher.base_model, inputs, bf16))
                    for _ in range(protocol.warmup_runs + protocol.runs)
                ][protocol.warmup_runs :]
                seconds = np.array(pairs)  # (runs, 2): student, teacher
                setup = {"batch_size": batch_size, "threads": threads}
                measurement = {"student": name, **setup, **_summary(seconds[:, 0], batch_size)}
                measurement["teacher_median_seconds"] = float(np.median(seconds[:, 1]))
                measurement["speed_up"] = float(np.median(seconds[:, 1] / seconds[:, 0]))
                measurements.append(measurement)
                own, reference = np.median(seconds, axis=0) * 1e3
                print(
                    f"latency {name} batch {batch_size} threads {threads} | {own:.1f} ms | teacher {reference:.1f} ms"
                    f" | {measurement['speed_up']:.2f} x",
                    flush=True,
                )
                if name == params.grid.students[setting][-1]:
                    measurements.append({"student": "teacher", **setup, **_summary(seconds[:, 1], batch_size)})
                    measurements[-1] |= {"teacher_median_seconds": float(np.median(seconds[:, 1])), "speed_up": 1.0}
    torch.set_num_threads(threads_before)
    result = {
        "profile": params.profile,
        "setting": setting,
        **protocol.model_dump(include={"sequence_length", "runs", "warmup_runs"}),
        "precision": "bf16" if bf16 else "fp32",
        "measurements": measurements,
        "environment": environment(),
    }
    write_json(output, result)
    return result


@torch.inference_mode()
def forward_seconds(model: PreTrainedModel, inputs: torch.Tensor, bf16: bool) -> float:
    """Seconds of one forward pass of ``inputs`` (batch, tokens), waiting for the device to finish."""
    inputs = inputs.to(model.device)
    began = time.perf_counter()
    with torch.autocast(model.device.type, dtype=torch.bfloat16, enabled=bf16):
        model(input_ids=inputs)
    if model.device.type == "cuda":
        torch.cuda.synchronize()
    return time.perf_counter() - began


def _summary(seconds: np.ndarray, batch_size: int) -> dict:
    lower, median, upper = (float(value) for value in np.percentile(seconds, [25, 50, 75]))
    return {
        "median_seconds": median,
        "lower_quartile_seconds": lower,
        "upper_quartile_seconds": upper,
        "sequences_per_second": batch_size / median,
    }
