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
import tempfile
from collections.abc import Callable, Sequence
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass, field
from functools import partial
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
from study.shipping.memory import peak
from study.speed.floor import floor
from study.speed.parts import PARTS, StepTimer, timed
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
    measure = partial(measure_subject, threads=settings.threads)
    return in_rounds(params, subjects, measure, PROCESSOR, "benchmark", output)


def in_rounds(
    params: Params,
    subjects: Sequence[Subject],
    measure: Callable[[Params, Subject], dict[str, Any]],
    device: torch.device,
    title: str,
    output: str | os.PathLike,
) -> dict[str, Any]:
    """Measure every subject in turn, and all of them again in the next round; the file is written after every round.

    Returns:
        As :func:`benchmark` says.
    """
    result: dict[str, Any] = {
        "benchmark": params.benchmark.model_dump(),
        "subjects": [subject | {"rounds": []} for subject in subjects],
        "peaks": _in_processes(measure, params, {"kind": "peaks"})[0],
        "environment": environment(device),
    }
    done, of_all = 0, params.benchmark.rounds * len(subjects)
    for turn in range(params.benchmark.rounds):
        for subject, own in zip(subjects, result["subjects"], strict=True):
            (measured,) = _in_processes(measure, params, subject)
            own["rounds"].append(measured)
            done += 1
            speed = "left out: {left_out}" if "left_out" in measured else "{tokens_per_second:,.0f} tokens/s"
            place = f"round {turn + 1} [{done}/{of_all}]"
            print(f"{title} {place} {label(subject)} | {speed.format(**measured)}", flush=True)
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
                speeds = []
                for tried, processes in ((subject, 1), (subject | {"lever": name}, lever.processes)):
                    measure = partial(measure_subject, threads=max(1, params.benchmark.threads // processes))
                    speeds.append(sum(m["tokens_per_second"] for m in _in_processes(measure, params, tried, processes)))
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


def _in_processes(
    measure: Callable[[Params, Subject], dict[str, Any]], params: Params, subject: Subject, count: int = 1
) -> list[dict[str, Any]]:
    """What ``count`` processes side by side measure."""
    with ProcessPoolExecutor(count, multiprocessing.get_context("spawn")) as pool:
        running = [pool.submit(measure, params, subject) for _ in range(count)]
        return [process.result() for process in running]


def measure_subject(
    params: Params,
    subject: Subject,
    threads: int | None = None,
    device: torch.device = PROCESSOR,
    method: Callable[[Params, Subject], dict[str, Any]] | None = None,
) -> dict[str, Any]:
    """What this process measures of a subject, or why it is ``left_out``.

    Args:
        threads: of torch; None: as they are. method: what measures a method, by default :func:`measure_method`.

    Returns:
        Of steps their median and quartiles, tokens per second, memory in MiB, and what else is measured of a method.
    """
    if threads:
        torch.set_num_threads(threads)
    if subject["kind"] == "peaks":
        return measure_peaks(device)
    try:
        of_peer = subject["kind"] == "peer"
        result = measure_peer(params, subject, device) if of_peer else (method or measure_method)(params, subject)
    except StudyError as error:  # a peer that is not installed
        return {"left_out": str(error)}
    except torch.OutOfMemoryError:
        return {"left_out": "does not fit in the memory of the card"}
    lower, median, upper = np.percentile(result.pop("seconds"), [25, 50, 75])
    tokens = params.benchmark.batch_size * params.benchmark.sequence_length
    return {
        "median_seconds": float(median),
        "lower_quartile_seconds": float(lower),
        "upper_quartile_seconds": float(upper),
        "tokens_per_second": float(tokens / median),
        "memory": _peak_memory(device),
        **result,
    }


def _peak_memory(device: torch.device) -> float:
    """In MiB: of this process, or of its GPU."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated() / 2**20
    return (peak() or resource.getrusage(resource.RUSAGE_SELF).ru_maxrss) / 2**20


def measure_method(params: Params, subject: Subject) -> dict[str, Any]:
    """Seconds of each counted step of the study's own Trainer, of the step's parts, and of its matrix products alone.

    The Trainer runs as in :func:`study.distillation.distil.distil`, data loading included, without evaluation and
    checkpoints; ``backward`` includes clipping of gradients.
    """
    lever = LEVERS[subject["lever"]] if subject.get("lever") else Lever(())
    update = {"precision": subject["precision"], "fast_paths": subject["fast_paths"]}
    params = params.model_copy(update=update | lever.params)
    settings, bf16 = params.benchmark, subject["precision"] == "bf16"
    objective, stream = prepared(params, subject["name"])
    if lever.compiled:
        objective.losses = ModuleType("compiled")
        for loss in (losses.output_distribution, losses.attention_relation):
            setattr(objective.losses, loss.__name__, torch.compile(loss))

    def batch(first: int) -> dict[str, Tensor]:
        return default_data_collator([stream[first + i] for i in range(settings.batch_size)])

    def forward_and_backward() -> None:
        with autocast(PROCESSOR, bf16):
            loss = objective(**first_batch)["loss"]
        loss.backward()
        objective.zero_grad()

    timer, first_batch = StepTimer(objective), batch(0)
    with tempfile.TemporaryDirectory() as folder:
        shape = len(stream), settings.sequence_length
        start_fast_paths(params.fast_paths, bf16, objective, Path(folder) / "teacher", shape)
        if objective.teacher_outputs:  # are on disk, as for every run of the grid but the first that needs them
            with torch.no_grad(), autocast(PROCESSOR, bf16):
                for first in range(0, len(stream), settings.batch_size):
                    objective.read_teacher(batch(first))
        objective.accepts_loss_kwargs = False  # type: ignore[assignment]  # as in the study's training
        trainer = DistillationTrainer(
            model=objective,
            args=arguments(params, bf16, folder, {"use_cpu": True} | lever.arguments),
            train_dataset=stream,
            data_collator=default_data_collator,
        )
        trainer.remove_callback(PrinterCallback)
        trainer.add_callback(timer)
        trainer.train()
    counted = timer.steps[settings.warmup_steps :]
    return {
        "seconds": [sum(step.values()) for step in counted],
        "parts": {part: statistics.median(step[part] for step in counted) for part in PARTS},
        "floor_seconds": floor(forward_and_backward),
    }


def prepared(params: Params, name: str, device: torch.device = PROCESSOR) -> tuple[Objective, MaskedSequences]:
    """The objective of a method on the benchmark's models, frozen as in training, and the text of its steps."""
    teacher, student = models(params)
    switch_off_dropout(student)
    method = params.methods[name]
    assert isinstance(method, Trained)
    fused = "fused-losses" in params.fast_paths
    objective = OBJECTIVES[method.objective](student, teacher, method, params.distillation.inputs, fused)
    for model in (objective, objective.teacher):
        if model is not None:
            nn.Module.to(model, device)
    stream = sequences(params, (params.benchmark.warmup_steps + params.benchmark.steps) * params.benchmark.batch_size)
    freeze_untrained(objective, {key: x.to(device) for key, x in default_data_collator([stream[0]]).items()})
    return objective, stream


def arguments(params: Params, bf16: bool, folder: str, changes: dict[str, Any]) -> TrainingArguments:
    """Those of a training of the benchmark's steps, without evaluation and checkpoints."""
    settings = params.benchmark
    return TrainingArguments(
        output_dir=folder,
        max_steps=settings.warmup_steps + settings.steps,
        per_device_train_batch_size=settings.batch_size,
        learning_rate=1e-5,
        seed=0,
        **common_arguments(bf16, settings.batch_size) | {"eval_strategy": "no", "save_strategy": "no"} | changes,
    )


def measure_peer(params: Params, subject: Subject, device: torch.device = PROCESSOR) -> dict[str, Any]:
    """Seconds of each counted training step of another package (see :mod:`study.speed.peers`), waited for."""
    settings = params.benchmark
    stream = sequences(params, settings.batch_size)
    batch = default_data_collator([stream[i] for i in range(settings.batch_size)])
    teacher, student = (nn.Module.to(model, device) for model in models(params))
    step = PEERS[subject["name"]].step(teacher, student, {key: x.to(device) for key, x in batch.items()})
    step = autocast(device, subject["precision"] == "bf16")(step)
    return {"seconds": timed(step, settings.warmup_steps + settings.steps, device)[settings.warmup_steps :]}


def measure_peaks(device: torch.device = PROCESSOR) -> dict[str, float]:
    """What a device can do: FLOP/s of large square matrix products per precision, bytes/s of copying a large tensor.

    Matrices are 2048 wide and the tensor has 256 MiB; on a GPU 8192 and 4 GiB.
    """
    keep_freed_memory()
    gpu = device.type == "cuda"

    def fastest(call: Callable[[], Any]) -> float:
        return min(timed(call, 10, device))

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
    attention = params.attention_implementation
    teacher, student = (bert(own, settings.vocabulary, attention) for own in (settings.teacher, settings.student))
    return teacher.eval(), student


def bert(sizes: Encoder, vocabulary: int, attention: str, positions: int = 512) -> BertForMaskedLM:
    """A masked language model with random weights."""
    config = BertConfig(
        vocab_size=vocabulary,
        num_hidden_layers=sizes.layers,
        hidden_size=sizes.width,
        num_attention_heads=sizes.heads,
        intermediate_size=sizes.intermediate,
        max_position_embeddings=positions,
    )
    return BertForMaskedLM._from_config(config, attn_implementation=attention)


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
