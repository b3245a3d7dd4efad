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
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path
from types import SimpleNamespace
from typing import get_args

import numpy as np
import torch
from datasets import Dataset
from tokenizers import Tokenizer
from tokenizers.models import WordLevel
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from transformers import (
    BertConfig,
    BertForMaskedLM,
    PreTrainedTokenizerFast,
    PrinterCallback,
    TrainerCallback,
    TrainingArguments,
    default_data_collator,
)

from study import losses
from study.config import Encoder, FastPath, Params, StudyError
from study.evaluation.peers import PEERS
from study.files import write_json
from study.runtime import environment, keep_freed_memory, use_bf16
from study.training.distill import (
    DistillationTrainer,
    MaskedSequences,
    common_arguments,
    freeze_untrained,
    start_fast_paths,
    switch_off_dropout,
)
from study.training.objectives import OBJECTIVES

SHARED: FastPath = "shared-teacher"
PARTS = ("data", "teacher forward", "student forward", "loss", "backward", "optimiser")


@dataclass(frozen=True)
class Lever:
    """A change of the training step that the study does not make, and the methods that it might speed up or slow down.

    ``params`` and ``arguments`` replace values of the parameters and of TrainingArguments; ``compiled``: losses of
    study/losses.py by torch.compile instead of study/fused.py; ``processes`` share the benchmark's threads evenly and
    train a student each.
    """

    methods: tuple[str, ...]
    params: dict = field(default_factory=dict)
    arguments: dict = field(default_factory=dict)
    compiled: bool = False
    processes: int = 1


LEVERS = {
    "scaled-dot-product attention": Lever(("mlm", "hs-uniform"), params={"attention_implementation": "sdpa"}),
    "losses by torch.compile": Lever(("od", "mha-minilmv2-48-heads"), compiled=True),
    "optimiser not fused": Lever(("mlm", "hs-uniform"), arguments={"optim": "adamw_torch"}),
    "two processes": Lever(("mlm", "od", "hs-uniform", "mha-minilmv2-48-heads"), processes=2),
}

#: Operators that multiply matrices, as PyTorch dispatches them -> where their two matrices stand.
PRODUCTS = {"mm": 0, "bmm": 0, "addmm": 1, "baddbmm": 1, "addmm_": 1, "baddbmm_": 1}


def benchmark(params: Params, output: str | os.PathLike) -> dict:
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
    subjects = [
        {"kind": "method", "name": name, "precision": precision, "fast_paths": paths[:count]}
        for precision in (["bf16", "fp32"] if use_bf16("auto") else ["fp32"])
        for name in settings.methods
        for paths in [applicable(params.methods[name].objective, precision)]
        for count in range(len(paths) + 1)
    ]
    subjects += [{"kind": "peer", "name": name, "precision": "fp32"} for name in settings.peers]
    result = {
        "benchmark": settings.model_dump(),
        "subjects": [subject | {"rounds": []} for subject in subjects],
        "peaks": _in_a_process(params, {"kind": "peaks"}),
        "environment": environment(),
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


def levers(params: Params, output: str | os.PathLike) -> dict:
    """Measure every one of :data:`LEVERS` in turn with the step as the study makes it, and write one JSON file.

    The step has all fast paths but the shared teacher, in bf16 where the processor has instructions for it.

    Returns:
        ``levers``: per lever and method, and round, tokens per second with and without it; of several processes their
        sum. ``benchmark`` and ``environment`` as in :func:`benchmark`.

    Raises:
        StudyError: the file cannot be written.
    """
    precision = "bf16" if use_bf16("auto") else "fp32"
    result = {"benchmark": params.benchmark.model_dump(), "precision": precision, "levers": []}
    for name, lever in LEVERS.items():
        for method in (method for method in lever.methods if method in params.benchmark.methods):
            paths = [path for path in applicable(params.methods[method].objective, precision) if path != SHARED]
            subject = {"kind": "method", "name": method, "precision": precision, "fast_paths": paths}
            rounds = []
            for _ in range(params.benchmark.rounds):
                speeds = [
                    sum(measured["tokens_per_second"] for measured in _in_processes(params, tried, processes))
                    for tried, processes in ((subject, 1), (subject | {"lever": name}, lever.processes))
                ]
                rounds.append(dict(zip(("without", "with"), speeds, strict=True)))
                print(f"benchmark {name} | {method} | {speeds[1] / speeds[0]:.2f} x as fast", flush=True)
            result["levers"].append({"lever": name, "method": method, "rounds": rounds})
    result["environment"] = environment()
    write_json(output, result)
    return result


def applicable(objective: str, precision: str) -> list[FastPath]:
    """The fast paths that change anything for a method's objective in this precision, in their order."""
    has_teacher = OBJECTIVES[objective].needs_teacher
    without = {
        "fused-losses": objective not in ("output_distribution", "attention_relation"),
        "rounded-teacher": not has_teacher or precision == "fp32",
        "shared-teacher": not has_teacher,
    }
    return [path for path in get_args(FastPath) if not without.get(path)]


def machine() -> str:
    """A name for this machine's kind of processor, as a folder: models and their instructions differ in speed."""
    found = environment()
    return re.sub(r"[^a-z0-9]+", "-", f"{found['processor']} {found['instructions']}".lower()).strip("-")


def label(subject: dict) -> str:
    """How a subject is named in tables and progress lines."""
    paths = f" {', '.join(subject['fast_paths']) or 'no fast path'}" if subject["kind"] == "method" else ""
    return f"{subject['name']} {subject['precision']}{paths}"


def _in_a_process(params: Params, subject: dict) -> dict:
    (measured,) = _in_processes(params, subject, 1)
    return measured


def _in_processes(params: Params, subject: dict, count: int) -> list[dict]:
    """What ``count`` processes side by side measure, which share the threads."""
    threads = max(1, params.benchmark.threads // count)
    with ProcessPoolExecutor(count, multiprocessing.get_context("spawn")) as pool:
        running = [pool.submit(_measure, params.model_dump(), subject, threads) for _ in range(count)]
        return [process.result() for process in running]


def _measure(values: dict, subject: dict, threads: int) -> dict:
    params = Params.model_validate(values)
    torch.set_num_threads(threads)
    if subject["kind"] == "peaks":
        return measure_peaks()
    try:
        result = (measure_peer if subject["kind"] == "peer" else measure_method)(params, subject)
    except StudyError as error:  # a peer that is not installed
        return {"left_out": str(error)}
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
        return int(re.search(r"VmHWM:\s+(\d+) kB", Path("/proc/self/status").read_text())[1]) / 1024
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024**2


def measure_method(params: Params, subject: dict) -> dict:
    """Seconds of each counted step of the study's own Trainer, of the step's parts, and of its matrix products alone.

    The Trainer runs as in :func:`study.training.distill.distil`, data loading included, without evaluation and
    checkpoints; ``backward`` includes clipping of gradients.
    """
    lever = LEVERS.get(subject.get("lever"), Lever(()))
    update = {"precision": subject["precision"], "fast_paths": subject["fast_paths"]}
    params = params.model_copy(update=update | lever.params)
    settings, bf16 = params.benchmark, subject["precision"] == "bf16"
    teacher, student = models(params)
    switch_off_dropout(student)
    method = params.methods[subject["name"]]
    fused = "fused-losses" in params.fast_paths
    objective = OBJECTIVES[method.objective](student, teacher, method, params.distillation, fused)
    if lever.compiled:
        plain = (losses.output_distribution, losses.attention_relation)
        objective.losses = SimpleNamespace(**{loss.__name__: torch.compile(loss) for loss in plain})
    steps = settings.warmup_steps + settings.steps
    stream = sequences(params, steps * settings.batch_size)
    batch = default_data_collator([stream[i] for i in range(settings.batch_size)])
    freeze_untrained(objective, {key: value[:1] for key, value in batch.items()})
    timer = _Timer(objective)
    with tempfile.TemporaryDirectory() as folder:
        arguments = TrainingArguments(
            output_dir=folder,
            max_steps=steps,
            per_device_train_batch_size=settings.batch_size,
            learning_rate=1e-5,
            seed=0,
            **common_arguments(params, settings.batch_size)
            | {"bf16": bf16, "eval_strategy": "no", "save_strategy": "no"}
            | lever.arguments,
        )
        start_fast_paths(params, objective, Path(folder) / "teacher", (len(stream), settings.sequence_length))
        if objective.shared_teacher:
            _fill(objective, stream, settings.batch_size, bf16)
        objective.accepts_loss_kwargs = False
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


def measure_peer(params: Params, subject: dict) -> dict:
    """Seconds of each counted training step of another package (see :mod:`study.evaluation.peers`)."""
    settings = params.benchmark
    stream = sequences(params, settings.batch_size)
    batch = default_data_collator([stream[i] for i in range(settings.batch_size)])
    step = PEERS[subject["name"]].step(*models(params), batch)
    seconds = []
    for _ in range(settings.warmup_steps + settings.steps):
        began = time.perf_counter()
        step()
        seconds.append(time.perf_counter() - began)
    return {"seconds": seconds[settings.warmup_steps :]}


def measure_peaks(repeats: int = 10) -> dict[str, float]:
    """What the machine can do: FLOP/s of 2048 x 2048 matrix products per precision, bytes/s of copying 256 MiB."""
    keep_freed_memory()

    def fastest(call) -> float:
        seconds = []
        for _ in range(repeats):
            began = time.perf_counter()
            call()
            seconds.append(time.perf_counter() - began)
        return min(seconds)

    peaks, side = {}, 2048
    for name, kind in (("bf16", torch.bfloat16), ("fp32", torch.float32)):
        if name == "fp32" or use_bf16("auto"):
            left, right, out = torch.randn(3, side, side).to(kind)
            peaks[name] = 2 * side**3 / fastest(lambda: torch.mm(left, right, out=out))  # noqa: B023
    source = torch.ones(2**26)
    target = torch.empty_like(source)
    peaks["bandwidth"] = 2 * 4 * 2**26 / fastest(lambda: target.copy_(source))
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


class _Timer(TrainerCallback):
    """Seconds per part of every step, taken around the objective's own methods and at the Trainer's events."""

    def __init__(self, objective):
        self.steps: list[dict[str, float]] = []
        for name, part in (
            ("read_teacher", "teacher forward"),
            ("read_student", "student forward"),
            ("loss", "loss"),
        ):
            setattr(objective, name, self._timed(getattr(objective, name), part))

    def _timed(self, function, part: str):
        def timed(*arguments):
            self._lap("between")
            result = function(*arguments)
            self._lap(part)
            return result

        return timed

    def _lap(self, part: str) -> None:
        if torch.cuda.is_available():
            torch.cuda.synchronize()
        now = time.perf_counter()
        if self._current is not None:
            self._current[part] = self._current.get(part, 0.0) + now - self._last
        self._last = now

    _current, _last = None, 0.0

    def on_train_begin(self, args, state, control, **kwargs):
        self._current = dict.fromkeys(PARTS, 0.0)
        self._lap("data")

    def on_step_begin(self, args, state, control, **kwargs):
        self._lap("data")

    def on_pre_optimizer_step(self, args, state, control, **kwargs):
        self._lap("backward")

    def on_step_end(self, args, state, control, **kwargs):
        self._lap("optimiser")
        self._current["optimiser"] += self._current.pop("between", 0.0)
        self.steps.append(self._current)
        self._current = dict.fromkeys(PARTS, 0.0)


def _fill(objective, stream: MaskedSequences, batch_size: int, bf16: bool) -> None:
    """Have the teacher's outputs on disk, as for every cell of the grid but the first that reads them."""
    with torch.no_grad(), torch.autocast("cpu", dtype=torch.bfloat16, enabled=bf16):
        for first in range(0, len(stream), batch_size):
            objective.read_teacher(default_data_collator([stream[first + i] for i in range(batch_size)]))


def _forward_and_backward(objective, batch: dict[str, Tensor], bf16: bool) -> None:
    with torch.autocast("cpu", dtype=torch.bfloat16, enabled=bf16):
        loss = objective(**batch)["loss"]
    loss.backward()
    objective.zero_grad()


class _Products(TorchDispatchMode):
    """Records shape, strides and type of the two matrices of every product."""

    def __init__(self):
        super().__init__()
        self.found: list[tuple] = []

    def __torch_dispatch__(self, function, types, arguments=(), keywords=None):
        first = PRODUCTS.get(function.overloadpacket.__name__)
        if first is not None:
            pair = arguments[first : first + 2]
            self.found.append(tuple((tuple(x.shape), x.stride(), x.dtype) for x in pair))
        return function(*arguments, **(keywords or {}))


def floor(step, repeats: int = 12) -> float:
    """Median seconds of the matrix products of one ``step()`` alone: same shapes, strides, types and order.

    Operands are random and results go to memory that is there already, so that nothing but the products is timed.
    """
    with _Products() as recorded:
        step()
    operands, results, calls = {}, {}, []
    for pair in recorded.found:
        for shape, stride, kind in pair:
            if (shape, stride, kind) not in operands:
                length = 1 + sum((size - 1) * step for size, step in zip(shape, stride, strict=True))
                operands[shape, stride, kind] = torch.randn(length).to(kind).as_strided(shape, stride)
        left, right = (operands[key] for key in pair)
        out = (*left.shape[:-1], right.shape[-1]), left.dtype
        if out not in results:
            results[out] = torch.empty(out[0], dtype=out[1])
        calls.append((torch.mm if left.dim() == 2 else torch.bmm, left, right, results[out]))
    seconds = []
    for _ in range(repeats + 2):
        began = time.perf_counter()
        for product, left, right, out in calls:
            product(left, right, out=out)
        seconds.append(time.perf_counter() - began)
    return statistics.median(seconds[2:])
