"""How fast a training step is: tokens per second, memory and time split per method, beside floor and peers.

Weights and tokens are random, since neither changes the work; sizes come from ``params.benchmark``. Every measurement
runs in a process of its own, one after the other and in several rounds, so that a drift of the machine's speed meets
all of them and no one inherits another's memory.
"""

from __future__ import annotations

import multiprocessing
import os
import re
import resource
import statistics
import sys
import tempfile
import time
from collections.abc import Callable
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path
from types import ModuleType
from typing import Any, get_args

import numpy as np
import torch
from datasets import Dataset
from tokenizers import Tokenizer
from tokenizers.models import WordLevel
from torch import Tensor, nn
from transformers import (
    BertConfig,
    BertForMaskedLM,
    PreTrainedTokenizerFast,
    PrinterCallback,
    TrainingArguments,
    default_data_collator,
)

from study.config import Params
from study.distillation import losses
from study.distillation.distil import start_fast_paths
from study.distillation.masking import MaskedSequences
from study.distillation.objectives import OBJECTIVES, Objective
from study.distillation.trainer import DistillationTrainer, common_arguments, freeze_untrained, switch_off_dropout
from study.files import StudyError, write_json
from study.methods import FastPath, Trained
from study.runtime import PROCESSOR, autocast, environment, keep_freed_memory, use_bf16
from study.sections import Encoder
from study.speed.floor import floor
from study.speed.parts import PARTS, StepTimer
from study.speed.peers import PEERS

SHARED: FastPath = "shared-teacher"

#: What a process of its own measures: ``kind`` (method, peer, peaks) and, for the first two, ``name``, ``precision``;
#: for methods ``fast_paths`` and, if it is tried, a ``lever``.
Subject = dict[str, Any]


@dataclass(frozen=True)
class Lever:
    """A change of the training step that the study does not make, and the methods that it might speed up or slow down.

    ``params`` and ``arguments`` replace values of the parameters and of TrainingArguments; ``compiled``: losses of
    :mod:`study.distillation.losses` by torch.compile instead of the fused ones; ``processes`` share the benchmark's
    threads evenly and train a student each.
    """

    methods: tuple[str, ...]
    params: dict[str, Any] = field(default_factory=dict)
    arguments: dict[str, Any] = field(default_factory=dict)
    compiled: bool = False
    processes: int = 1


LEVERS = {
    "scaled-dot-product attention": Lever(("mlm", "hs-uniform"), params={"attention_implementation": "sdpa"}),
    "losses by torch.compile": Lever(("od", "mha-minilmv2-heads-48"), compiled=True),
    "optimiser not fused": Lever(("mlm", "hs-uniform"), arguments={"optim": "adamw_torch"}),
    "two processes": Lever(("mlm", "od", "hs-uniform", "mha-minilmv2-heads-48"), processes=2),
}


def benchmark(params: Params, output: str | os.PathLike) -> dict[str, Any]:
    """Measure every method with fast paths added one by one, in every precision, and every peer; write one JSON file.

    The file is written after every round. bf16 is measured only where the processor has instructions for it: elsewhere
    it is emulated, and no one would use it.

    Returns:
        ``subjects``: per subject and round, seconds of the timed steps (median and quartiles), tokens per second, peak
        resident memory of its process in MiB, seconds per part of the step, and the floor: seconds of the step's matrix
        products alone. ``peaks``: see :func:`measure_peaks`. ``benchmark``: the sizes. ``environment``: versions,
        processor, date.

    Raises:
        StudyError: an unknown name under ``benchmark.peers``, or the file cannot be written.
    """
    settings = params.benchmark
    for name in settings.peers:
        if name not in PEERS:
            raise StudyError(f"benchmark.peers: {name!r} is unknown; allowed: {', '.join(PEERS)}")
    subjects: list[Subject] = [
        {"kind": "method", "name": name, "precision": precision, "fast_paths": paths[:count]}
        for precision in (["bf16", "fp32"] if use_bf16("auto", PROCESSOR) else ["fp32"])
        for name in settings.methods
        for paths in [applicable(params.methods[name].objective, precision)]
        for count in range(len(paths) + 1)
    ]
    subjects += [{"kind": "peer", "name": name, "precision": "fp32"} for name in settings.peers]
    result: dict[str, Any] = {
        "benchmark": settings.model_dump(),
        "subjects": [subject | {"rounds": []} for subject in subjects],
        "peaks": _in_a_process(params, {"kind": "peaks"}),
        "environment": environment(PROCESSOR),
    }
    for turn in range(settings.rounds):
        for i, subject in enumerate(subjects):
            measured = _in_a_process(params, subject)
            result["subjects"][i]["rounds"].append(measured)
            speed = "left out: {left_out}" if "left_out" in measured else "{tokens_per_second:,.0f} tokens/s"
            print(
                f"benchmark round {turn + 1}/{settings.rounds} [{i + 1}/{len(subjects)}] {label(subject)} | "
                + speed.format(**measured),
                flush=True,
            )
        result["benchmark"]["rounds"] = turn + 1
        write_json(output, result)  # a round that was finished is kept, whatever happens to the next
    return result


def levers(params: Params, output: str | os.PathLike) -> dict[str, Any]:
    """Measure every one of :data:`LEVERS` in turn with the step as the study makes it, and write one JSON file.

    The step has all fast paths but the shared teacher, in bf16 where the processor has instructions for it.

    Returns:
        ``levers``: per lever and method, and round, tokens per second with and without it; of several processes their
        sum. ``benchmark`` and ``environment`` as in :func:`benchmark`.

    Raises:
        StudyError: the file cannot be written.
    """
    precision = "bf16" if use_bf16("auto", PROCESSOR) else "fp32"
    result: dict[str, Any] = {"benchmark": params.benchmark.model_dump(), "precision": precision, "levers": []}
    for name, lever in LEVERS.items():
        for method in (method for method in lever.methods if method in params.benchmark.methods):
            paths = [path for path in applicable(params.methods[method].objective, precision) if path != SHARED]
            subject: Subject = {"kind": "method", "name": method, "precision": precision, "fast_paths": paths}
            rounds = []
            for _ in range(params.benchmark.rounds):
                speeds = [
                    sum(measured["tokens_per_second"] for measured in _in_processes(params, tried, processes))
                    for tried, processes in ((subject, 1), (subject | {"lever": name}, lever.processes))
                ]
                rounds.append(dict(zip(("without", "with"), speeds, strict=True)))
                print(f"benchmark {name} | {method} | {speeds[1] / speeds[0]:.2f} x as fast", flush=True)
            result["levers"].append({"lever": name, "method": method, "rounds": rounds})
    result["environment"] = environment(PROCESSOR)
    write_json(output, result)
    return result


def applicable(objective: str, precision: str) -> list[FastPath]:
    """The fast paths that change anything for a method's objective in this precision, in their order."""
    has_teacher = OBJECTIVES[objective].needs_teacher
    without = {
        "fused-losses": objective not in ("output_distribution", "attention_relation", "attention_distribution", "sum"),
        "rounded-teacher": not has_teacher or precision == "fp32",
        "shared-teacher": not has_teacher,
        "cuda-graphs": True,  # these are steps of the processor
    }
    return [path for path in get_args(FastPath) if not without.get(path)]


def machine(device: torch.device = PROCESSOR) -> str:
    """A name for a kind of processor or card, as a folder: models and their instructions differ in speed."""
    here = environment(device)
    return re.sub(r"[^a-z0-9]+", "-", f"{here['processor']} {here['instructions']}".lower()).strip("-")


def label(subject: Subject) -> str:
    """How a subject is named in tables and progress lines."""
    paths = f" {', '.join(subject['fast_paths']) or 'no fast path'}" if subject["kind"] == "method" else ""
    return f"{subject['name']} {subject['precision']}{paths}"


def _in_a_process(params: Params, subject: Subject) -> dict[str, Any]:
    (measured,) = _in_processes(params, subject, 1)
    return measured


def _in_processes(params: Params, subject: Subject, count: int) -> list[dict[str, Any]]:
    """What ``count`` processes side by side measure, which share the threads."""
    threads = max(1, params.benchmark.threads // count)
    with ProcessPoolExecutor(count, multiprocessing.get_context("spawn")) as pool:
        running = [pool.submit(_measure, params, subject, threads) for _ in range(count)]
        return [process.result() for process in running]


def _measure(params: Params, subject: Subject, threads: int) -> dict[str, Any]:
    torch.set_num_threads(threads)
    if subject["kind"] == "peaks":
        return measure_peaks()
    try:
        result = (measure_peer if subject["kind"] == "peer" else measure_method)(params, subject)
    except StudyError as error:  # a peer that is not installed
        return {"left_out": str(error)}
    return summary(params, result)


def summary(params: Params, result: dict[str, Any]) -> dict[str, Any]:
    """Median and quartiles of ``seconds`` of the steps, tokens per second, memory, and what else ``result`` has."""
    lower, median, upper = np.percentile(result.pop("seconds"), [25, 50, 75])
    tokens = params.benchmark.batch_size * params.benchmark.sequence_length
    return {
        "median_seconds": float(median),
        "lower_quartile_seconds": float(lower),
        "upper_quartile_seconds": float(upper),
        "tokens_per_second": float(tokens / median),
        "memory": _peak_memory(),
        **result,
    }


def _peak_memory() -> float:
    """Highest resident memory of this process in MiB; Linux's getrusage would count the parent's before it started."""
    if sys.platform == "linux":
        (peak,) = re.findall(r"VmHWM:\s+(\d+) kB", Path("/proc/self/status").read_text())
        return int(peak) / 1024
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024**2


def measure_method(params: Params, subject: Subject) -> dict[str, Any]:
    """Seconds of each counted step of the study's own Trainer, of the step's parts, and of its matrix products alone.

    The Trainer runs as in :func:`study.distillation.distil.distil`, data loading included, without evaluation and
    checkpoints; ``backward`` includes clipping of gradients.
    """
    lever = LEVERS[subject["lever"]] if subject.get("lever") else Lever(())
    update = {"precision": subject["precision"], "fast_paths": subject["fast_paths"]}
    params = params.model_copy(update=update | lever.params)
    settings, bf16 = params.benchmark, subject["precision"] == "bf16"
    objective = objective_of(params, subject["name"])
    if lever.compiled:
        objective.losses = ModuleType("compiled")
        for loss in (losses.output_distribution, losses.attention_relation):
            setattr(objective.losses, loss.__name__, torch.compile(loss))
    steps = settings.warmup_steps + settings.steps
    stream = sequences(params, steps * settings.batch_size)
    batch = default_data_collator([stream[i] for i in range(settings.batch_size)])
    freeze_untrained(objective, {key: value[:1] for key, value in batch.items()})
    timer = StepTimer(objective)
    with tempfile.TemporaryDirectory() as folder:
        arguments = TrainingArguments(
            output_dir=folder,
            max_steps=steps,
            per_device_train_batch_size=settings.batch_size,
            learning_rate=1e-5,
            seed=0,
            **common_arguments(bf16, settings.batch_size)
            | {"eval_strategy": "no", "save_strategy": "no", "use_cpu": True}
            | lever.arguments,
        )
        shape = len(stream), settings.sequence_length
        start_fast_paths(params.fast_paths, bf16, objective, Path(folder) / "teacher", shape)
        if objective.teacher_outputs:
            _fill(objective, stream, settings.batch_size, bf16)
        objective.accepts_loss_kwargs = False  # type: ignore[assignment]  # as in the study's training
        trainer = DistillationTrainer(
            model=objective, args=arguments, train_dataset=stream, data_collator=default_data_collator
        )
        trainer.remove_callback(PrinterCallback)
        trainer.add_callback(timer)
        trainer.train()
    counted = timer.steps[settings.warmup_steps :]
    parts = {part: statistics.median(step[part] for step in counted) for part in PARTS}
    return {
        "seconds": [sum(step.values()) for step in counted],
        "parts": parts,
        "floor_seconds": floor(lambda: _forward_and_backward(objective, batch, bf16)),
    }


def objective_of(params: Params, name: str) -> Objective:
    """The objective of a method on the benchmark's models."""
    teacher, student = models(params)
    switch_off_dropout(student)
    method = params.methods[name]
    assert isinstance(method, Trained)
    fused = "fused-losses" in params.fast_paths
    return OBJECTIVES[method.objective](student, teacher, method, params.distillation.inputs, fused)


def measure_peer(params: Params, subject: Subject, device: torch.device = PROCESSOR) -> dict[str, Any]:
    """Seconds of each counted training step of another package (see :mod:`study.speed.peers`), waited for."""
    settings = params.benchmark
    stream = sequences(params, settings.batch_size)
    batch = default_data_collator([stream[i] for i in range(settings.batch_size)])
    teacher, student = (nn.Module.to(model, device) for model in models(params))
    step = PEERS[subject["name"]].step(teacher, student, {key: x.to(device) for key, x in batch.items()})
    seconds = []
    for _ in range(settings.warmup_steps + settings.steps):
        began = idle(device)
        with autocast(device, subject["precision"] == "bf16"):
            step()
        seconds.append(idle(device) - began)
    return {"seconds": seconds[settings.warmup_steps :]}


def idle(device: torch.device) -> float:
    """The time at which a device has done all that it was given."""
    if device.type == "cuda":
        torch.cuda.synchronize()
    return time.perf_counter()


def measure_peaks(repeats: int = 10, device: torch.device = PROCESSOR) -> dict[str, float]:
    """What a device can do: FLOP/s of large square matrix products per precision, bytes/s of copying a large tensor.

    Matrices are 2048 wide and the tensor has 256 MiB; on a GPU 8192 and 4 GiB.
    """
    keep_freed_memory()
    gpu = device.type == "cuda"

    def fastest(call: Callable[[], Any]) -> float:
        seconds = []
        for _ in range(repeats):
            began = idle(device)
            call()
            seconds.append(idle(device) - began)
        return min(seconds)

    peaks, side, length = {}, 8192 if gpu else 2048, 2**30 if gpu else 2**26
    for name, dtype in (("bf16", torch.bfloat16), ("fp32", torch.float32)):
        if name == "fp32" or use_bf16("auto", device):
            left, right, out = torch.randn(3, side, side, device=device).to(dtype)
            peaks[name] = 2 * side**3 / fastest(lambda: torch.mm(left, right, out=out))  # noqa: B023
    source = torch.ones(length, device=device)
    target = torch.empty_like(source)
    peaks["bandwidth"] = 2 * 4 * length / fastest(lambda: target.copy_(source))
    return peaks


def models(params: Params) -> tuple[BertForMaskedLM, BertForMaskedLM]:
    """Teacher and student of the benchmark's sizes with random weights."""
    torch.manual_seed(0)
    settings = params.benchmark

    def model(sizes: Encoder) -> BertForMaskedLM:
        config = BertConfig(
            vocab_size=settings.vocabulary,
            num_hidden_layers=sizes.layers,
            hidden_size=sizes.width,
            num_attention_heads=sizes.heads,
            intermediate_size=sizes.intermediate,
        )
        return BertForMaskedLM._from_config(config, attn_implementation=params.attention_implementation)

    return model(settings.teacher).eval(), model(settings.student)


def sequences(params: Params, length: int) -> MaskedSequences:
    """A stream of random tokens, masked as the study masks its corpus."""
    settings = params.benchmark
    shape = (4 * settings.batch_size, settings.sequence_length)
    tokens = np.random.default_rng(0).integers(10, settings.vocabulary, size=shape)
    pieces = {name: index for index, name in enumerate(("[UNK]", "[MASK]"))}
    pieces |= {str(index): index for index in range(len(pieces), settings.vocabulary)}
    backend = Tokenizer(WordLevel(pieces, unk_token="[UNK]"))
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=backend, unk_token="[UNK]", mask_token="[MASK]")
    return MaskedSequences(Dataset.from_dict({"input_ids": tokens}), params.masking, tokenizer, 0, length)


def _fill(objective: Objective, stream: MaskedSequences, batch_size: int, bf16: bool) -> None:
    """Have the teacher's outputs on disk, as for every run of the grid but the first that needs them."""
    with torch.no_grad(), torch.autocast("cpu", dtype=torch.bfloat16, enabled=bf16):
        for first in range(0, len(stream), batch_size):
            objective.read_teacher(default_data_collator([stream[first + i] for i in range(batch_size)]))


def _forward_and_backward(objective: Objective, batch: dict[str, Tensor], bf16: bool) -> None:
    with torch.autocast("cpu", dtype=torch.bfloat16, enabled=bf16):
        loss = objective(**batch)["loss"]
    loss.backward()
    objective.zero_grad()
