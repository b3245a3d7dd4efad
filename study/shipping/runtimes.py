"""Latency that decides: teacher and students in every runtime, side by side, and what each loses."""

from __future__ import annotations

import copy
import os
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterable
from functools import partial
from itertools import product
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor
from transformers import PreTrainedTokenizerBase

from study.analysis.runtimes import PRECISIONS, TEXTS, Footprint, Quality, RuntimesResult, Timing
from study.data.corpus import load_corpus
from study.data.pretrained import load_model, load_tokenizer
from study.data.tasks import load_task
from study.descriptions import TEACHER, LatencyMeasurement, Run
from study.distillation.students import create_student
from study.evaluation.provenance import provenance, weights_hash
from study.families import positions
from study.files import Layout, StudyError
from study.plan import Plan
from study.records import write_record
from study.runtime import PROCESSOR, use_bf16
from study.sections import Encoder, Runtimes
from study.shipping import memory, parity
from study.shipping.formats import MODEL, WRITERS, quantise

#: Passes of one model in a row: the first brings its weights into the caches again and is not counted.
BLOCK = 5
#: Seconds between two models where several threads work: threads of the one before stop waiting for work.
PAUSE = 0.005
#: Token ids and mask (B, T) to hidden states (B, T, H).
Forward = Callable[[Tensor, Tensor], Tensor]


def measure_runtimes(plan: Plan, setting: str, output: Path) -> RuntimesResult:
    """Time teacher and every student shape in every runtime, and score them in every precision; one result file.

    Speed: for each input, batch size and number of threads, all models and runtimes take turns in random order, blocks
    of BLOCK passes of which the first is not counted, until ``runs`` are counted or ``seconds`` are over (at least
    five), so that a drift of the machine's speed meets all alike. Inputs: full sequences of each length, encoded alone;
    and texts of the setting's tasks as served: tokenised at their own length (padded within a batch), encoded, mean
    pooled. Latency depends on a student's shape alone, so randomly initialised ones stand for all methods.

    Memory: peak of a new process that loads tokenizer and model and encodes three texts.

    Quality: development scores of a linear probe fitted on float32 states (:func:`study.shipping.parity.probe_scores`)
    of the teacher and each method of the grid (first seed, the largest budget that is trained here).

    Source: this study's choice.

    Raises:
        StudyError: a model or the tasks are missing, no such setting, or the file cannot be written.
    """
    layout, protocol = plan.layout(setting), plan.params.runtimes
    (description,) = plan.of(LatencyMeasurement, setting)
    absent = {}
    if "bf16" in protocol.runtimes and not use_bf16("auto", PROCESSOR):
        absent["bf16"] = "the processor has no bf16 instructions"
    runtimes: list[str] = [name for name in protocol.runtimes if name not in absent]
    began = os.getloadavg()[0]
    threads_before = torch.get_num_threads()
    with tempfile.TemporaryDirectory() as folder:
        models = _exported(description, layout, Path(folder))
        footprints = _footprints(models, runtimes, Path(folder))
        timings = []
        for threads in protocol.threads:
            torch.set_num_threads(threads)
            served = {
                (name, runtime): _served(Path(folder) / name, runtime, models[name], threads)
                for name, runtime in product(models, runtimes)
            }
            timings += _timings(served, protocol, threads, layout, models[TEACHER].config)
            torch.compiler.reset()
        torch.set_num_threads(threads_before)
        qualities = _qualities(plan, layout, runtimes)
    result = RuntimesResult(
        **provenance(description, layout, {TEACHER: weights_hash(layout.teacher)}, PROCESSOR),
        absent=absent,
        load=[round(value, 2) for value in (began, os.getloadavg()[0])],
        timings=timings,
        footprints=footprints,
        qualities=qualities,
    )
    write_record(output, result)
    return result


def _exported(description: LatencyMeasurement, layout: Layout, folder: Path) -> dict[str, Any]:
    """Teacher and students as encoders, and in ``folder`` each as ``transformers``, ``onnx`` and ``onnx-int8``."""
    tokenizer = load_tokenizer(layout.teacher)
    whole = load_model(layout.teacher, "eager").eval()
    shapes: dict[str, Encoder | None] = {TEACHER: None, **description.students}
    models: dict[str, Any] = {}
    for name, sizes in shapes.items():
        model: Any = (create_student(whole, sizes, "random") if sizes else whole).base_model.eval()
        for kind in ("transformers", "onnx"):
            WRITERS[kind](model, tokenizer, folder / name / kind, layout)
        shutil.copytree(folder / name / "onnx", folder / name / "onnx-int8")
        quantise(folder / name / "onnx-int8")
        models[name] = model
    return models


def _served(folder: Path, runtime: str, model: Any, threads: int) -> Forward:
    if runtime.startswith("onnx"):
        model = parity.onnx_encoder(folder / runtime / MODEL, model.config, threads)
    elif runtime == "bf16":
        model = copy.deepcopy(model).to(torch.bfloat16)
    elif runtime == "compiled":
        model = torch.compile(model, dynamic=True)
    return lambda ids, mask: model(input_ids=ids, attention_mask=mask).last_hidden_state


def _timings(
    served: dict[tuple[str, str], Forward], protocol: Runtimes, threads: int, layout: Layout, config: Any
) -> list[Timing]:
    texts, tokenizer = _texts(layout, protocol.texts), load_tokenizer(layout.teacher)
    lengths = [length for length in protocol.lengths if length <= positions(config)]
    timings = []
    for batch_size in protocol.batch_sizes:
        inputs: dict[str, Callable[[Forward, int], None]] = {TEXTS: _as_served(texts, tokenizer, batch_size)}
        inputs |= {str(length): _sequences(batch_size, length, config.vocab_size) for length in lengths}
        for name, feed in inputs.items():
            seconds = _interleaved([partial(feed, call) for call in served.values()], protocol, threads)
            for (model, runtime), counted in zip(served, seconds, strict=True):
                lower, p50, upper, p90, p99 = map(float, np.percentile(counted, [25, 50, 75, 90, 99]))
                timings.append(Timing(
                    model=model, runtime=runtime, input=name, batch_size=batch_size, threads=threads,
                    runs=len(counted), lower_quartile=lower, p50=p50, upper_quartile=upper, p90=p90,
                    p99=p99 if len(counted) >= 100 else None,
                ))  # fmt: skip
            shown = " | ".join(f"{t.model} {t.runtime} {1000 * t.p50:.1f}" for t in timings[-len(served) :])
            print(f"threads {threads} batch {batch_size} {name}: {timings[-1].runs} runs, ms: {shown}", flush=True)
    return timings


def _texts(layout: Layout, count: int) -> list[str]:
    """Development texts of the setting's first tasks, in turn."""
    names = sorted(path.name for path in layout.tasks.iterdir() if path.is_dir())
    found: list[list[str]] = []
    for name in names:
        dataset = load_task(layout.tasks, name)
        if "development" in dataset and "text" in dataset["development"].column_names:
            found.append(list(dataset["development"]["text"][:count]))
    if not found:
        raise StudyError(f"{layout.tasks}: no task has development texts; allowed: at least one")
    return [text for row in zip(*found, strict=False) for text in row][:count]


def _as_served(texts: list[str], tokenizer: PreTrainedTokenizerBase, batch_size: int) -> Callable[[Forward, int], None]:
    def feed(call: Forward, turn: int) -> None:
        chosen = [texts[(turn * batch_size + place) % len(texts)] for place in range(batch_size)]
        batch = tokenizer(chosen, padding=True, truncation=True, return_tensors="pt")
        mask: Any = batch["attention_mask"]
        weights = mask[..., None].float()
        (call(batch["input_ids"], mask) * weights).sum(dim=1) / weights.sum(dim=1)

    return feed


def _sequences(batch_size: int, length: int, vocabulary: int) -> Callable[[Forward, int], None]:
    ids = torch.randint(vocabulary, (batch_size, length), generator=torch.Generator().manual_seed(0))
    mask = torch.ones_like(ids)

    def feed(call: Forward, turn: int) -> None:
        call(ids, mask)

    return feed


@torch.inference_mode()
def _interleaved(calls: list[Callable[[int], None]], protocol: Runtimes, threads: int) -> list[list[float]]:
    """Seconds of each call's counted runs; every call gets the same turns, that is the same texts."""
    order, seconds = np.random.default_rng(0), [[] for _ in calls]  # type: ignore[var-annotated]
    for call in calls:  # kernels are chosen, code is compiled
        call(0)
    started = time.perf_counter()
    for call in calls:
        call(1)
    slow = BLOCK * (time.perf_counter() - started) > protocol.seconds / 2
    block = 1 if slow else BLOCK  # what a slow pass reads again is little beside it
    started = time.perf_counter()
    while True:
        counted = len(seconds[0])
        for place in order.permutation(len(calls)):
            if threads > 1:
                time.sleep(PAUSE)
            for turn in range(block):
                began = time.perf_counter()
                calls[place](counted + turn - 1)
                if turn or block == 1:
                    seconds[place].append(time.perf_counter() - began)
        passed, counted = time.perf_counter() - started, len(seconds[0])
        if counted >= protocol.runs or (passed > protocol.seconds and counted >= 5):
            return seconds


def _footprints(models: Iterable[str], runtimes: list[str], folder: Path) -> list[Footprint]:
    found = []
    for name, runtime in product(models, runtimes):
        kind, weights = (runtime, MODEL) if runtime.startswith("onnx") else ("transformers", "model.safetensors")
        source = folder / name / kind
        outcome = subprocess.run([sys.executable, memory.__file__, runtime, source], capture_output=True, text=True)
        if outcome.returncode:
            raise StudyError(f"memory of {name} in {runtime}: {outcome.stderr.strip().splitlines()[-1]}")
        size = (source / weights).stat().st_size // (2 if runtime == "bf16" else 1)
        peak = int(outcome.stdout.strip() or 0)
        found.append(Footprint(model=name, runtime=runtime, file_bytes=size, memory_bytes=peak or None))
        print(f"memory: {name} {runtime} | {size / 1e6:.1f} MB file | {peak / 1e6:.0f} MB process", flush=True)
    return found


def _qualities(plan: Plan, layout: Layout, runtimes: list[str]) -> list[Quality]:
    """Teacher and trained runs, each in the precisions that the runtimes compute in."""
    seed = plan.params.grid.seeds[0]
    runs = [run for run in plan.of(Run, layout.setting) if run.seed == seed and run.method in plan.params.grid.methods]
    runs.sort(key=lambda run: run.distillation.steps * run.distillation.batch_size)
    here = [run for run in runs if (layout.student(run.model) / "model.safetensors").is_file()]
    largest = {(run.student, run.method): run for run in (*runs[::-1], *here)}  # of those here, if any is
    entries = [(TEACHER, TEACHER, TEACHER, layout.teacher)]
    entries += [(run.student, run.method, run.model, layout.student(run.model)) for run in largest.values()]
    precisions = {PRECISIONS[runtime] for runtime in runtimes} - {"fp32"}
    tokenizer = load_tokenizer(layout.teacher)
    ids = torch.tensor(load_corpus(layout.corpus)["validation"][: parity.TEXTS]["input_ids"])
    found = []
    for shape, method, model_name, source in entries:
        if not (source / "model.safetensors").is_file():
            print(f"quality: {model_name} is not trained here, left out", flush=True)
            continue
        original: Any = load_model(source, "eager", head=False).eval()
        others: dict[str, Any] = {}
        with tempfile.TemporaryDirectory() as folder:
            if "int8" in precisions:
                WRITERS["onnx-int8"](original, tokenizer, Path(folder) / "int8", layout)
                others["int8"] = parity.onnx_encoder(Path(folder) / "int8" / MODEL, original.config)
            if "bf16" in precisions:
                others["bf16"] = copy.deepcopy(original).to(torch.bfloat16)
            description = parity.evaluation_of(plan, layout.setting, model_name)
            scores = parity.probe_scores(description, layout, seed, [(other, None) for other in others.values()])
            for place, (precision, model) in enumerate({"fp32": original, **others}.items()):
                cosine = parity.deviation(original, model, ids)["cosine"]
                tasks = {task: values[place] for task, values in scores.items()}
                own = {"model": shape, "method": method, "run": model_name, "precision": precision}
                found.append(Quality(**own, cosine=cosine, tasks=tasks))
                mean = 100 * sum(tasks.values()) / len(tasks)
                print(f"quality: {model_name} {precision} | {mean:.1f} | cosine {cosine:.5f}", flush=True)
    return found
