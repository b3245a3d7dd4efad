r"""What a distillation run costs, from counts of arithmetic and memory traffic and two measured efficiencies.

.. math:: seconds = steps \cdot \left(\frac{F}{e_F \, peak_F} + \frac{M}{e_M \, peak_M} + \frac{C}{link}\right)

F are the floating-point operations of the matrix products of a step, M the bytes that everything else moves (sums,
norms, softmaxes, losses, optimiser), C the bytes of gradients that devices exchange. The efficiencies e_F and e_M are
fitted to measured steps (:func:`fit`). Source: this study's choice, after the roofline model (Williams et al., 2009).
"""

from __future__ import annotations

import json
import statistics
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from functools import cache
from typing import Any

import numpy as np
import pandas as pd
import torch
from scipy.optimize import nnls
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils.flop_counter import FlopCounterMode

from study.analysis.numbers.results import TEACHER, Results
from study.config import Params
from study.descriptions import Evaluation, Run
from study.distillation.mappings import layer_mapping
from study.distillation.objectives import OBJECTIVES
from study.distillation.operations import count_operations
from study.distillation.taps import read_activations
from study.files import StudyError
from study.methods import (
    METHOD,
    AttentionDistribution,
    AttentionRelation,
    AttentionScore,
    DirectAttention,
    FastPath,
    HiddenState,
    MaskedLanguageModelling,
    Method,
    OutputDistribution,
    SentenceEmbedding,
    Sum,
    Untrained,
    parts_of,
)
from study.plan import Plan
from study.sections import Benchmark, Encoder
from study.speed.benchmark import SHARED, applicable, bert


@dataclass(frozen=True)
class Device:
    """A device's peaks, size and price.

    ``flops``: FLOP/s of dense matrix products in the run's precision; ``bandwidth``: bytes/s of its memory;
    ``memory``: bytes; ``link``: bytes/s at which devices exchange gradients; ``price``: US dollars per hour.
    """

    name: str
    flops: float
    bandwidth: float
    memory: float = float("inf")
    link: float = float("inf")
    price: float = 0.0


@dataclass(frozen=True)
class Workload:
    """Everything that the work of a step depends on, and the ``steps`` of the training it belongs to.

    ``masked`` is the share of tokens predicted; ``fast_paths`` as in params.yaml; ``precision`` "bf16" or "fp32";
    ``attention`` "eager", which moves and keeps every score, or "sdpa", which does not let them reach memory.
    """

    teacher: Encoder
    student: Encoder
    method: Method
    vocabulary: int
    batch_size: int
    sequence_length: int
    steps: int = 1
    masked: float = 0.15
    precision: str = "bf16"
    fast_paths: tuple[FastPath, ...] = ("kept-memory", "fused-losses", "rounded-teacher")
    attention: str = "eager"

    @property
    def tokens(self) -> int:
        """Of one step."""
        return self.batch_size * self.sequence_length

    @property
    def predicted(self) -> int:
        """Tokens of a sequence that are masked, as in :class:`study.distillation.masking.MaskedSequences`."""
        return max(1, round(self.masked * self.sequence_length))


@dataclass(frozen=True)
class Counts:
    """Of one step: ``flops`` of matrix products, ``bytes`` moved besides.

    ``memory``: bytes that training holds at once. ``parameters``: of the student, which devices exchange gradients of.
    """

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


def count(workload: Workload) -> Counts:
    """Count one step.

    Matrix products are counted by PyTorch (:func:`_products`). No counter knows what stays within a processor's caches:
    bytes and memory are formulas of the shapes, with the passes above. A backward pass moves twice what the forward
    pass does.

    Raises:
        StudyError: an objective that the model does not know.
    """
    teacher, student, length = workload.teacher, workload.student, workload.sequence_length
    size = 2 if workload.precision == "bf16" else 4
    student_layers, values, kept = _loss(workload, workload.method, "fused-losses" in workload.fast_paths)
    method: Any = workload.method
    layers = OBJECTIVES[method.objective].layers_read(method, teacher.layers, student.layers)
    deepest = max(layers.get("hidden_layers", ()), default=0)
    projected = max(layers.get("attention_layers", ()), default=1)  # its projections, behind the layers below it
    shared = SHARED in workload.fast_paths
    shapes = (Encoder(**own.model_dump(include=set(Encoder.model_fields))) for own in (teacher, student))
    read, others = _products(*shapes, method.model_dump_json(), workload.vocabulary, length, workload.predicted)
    scores = length if workload.attention == "eager" else 0  # of a token and head, that reach memory
    values += 3 * student_layers * _layer_values(student, scores)
    values += 0 if shared else max(deepest, projected - 1) * _layer_values(teacher, scores)
    kept += student_layers * (
        WIDTH_KEPT * student.width + INTERMEDIATE_KEPT * student.intermediate + SCORES_KEPT * student.heads * scores
    )
    parameters = _parameters(student, workload.vocabulary)
    moments_and_gradient = 16 * parameters  # float32 throughout
    return Counts(
        flops=workload.batch_size * (others + (0 if shared else read)),
        bytes=values * workload.tokens * size + PARAMETER_PASSES * 4 * parameters,
        memory=moments_and_gradient + size * (kept * workload.tokens + _parameters(teacher, workload.vocabulary)),
        parameters=parameters,
    )


def _loss(workload: Workload, method: Method, fused: bool) -> tuple[int, float, float]:
    """Whole layers of the student that a step runs; per token, values that the loss moves and that it keeps."""
    teacher, student = workload.teacher, workload.student
    if isinstance(method, Sum):  # one pass, as deep as the deepest part, and every part's loss
        depths, moved, kept = zip(*(_loss(workload, own, fused) for own in parts_of(method)), strict=True)
        return max(depths), sum(moved), sum(kept)
    share, scores = workload.predicted / workload.sequence_length, student.heads * workload.sequence_length
    if isinstance(method, AttentionRelation):
        scores = 3 * method.relation_heads * workload.sequence_length
        return student.layers - 1, scores * DIVERGENCE_PASSES[fused], 0 if fused else 4 * scores
    if isinstance(method, DirectAttention):
        return student.layers - 1, 3 * 12 * teacher.width, 3 * 2 * teacher.width
    if isinstance(method, AttentionScore):
        mapping = layer_mapping(method.mapping, teacher.layers, student.layers)
        scores *= sum(map(len, mapping.values()))
        return max(mapping) - 1, scores * 12, scores * 2
    if isinstance(method, AttentionDistribution):
        relations = DIVERGENCE_PASSES[False] + DIVERGENCE_PASSES[fused] * method.value_relation
        return student.layers - 1, scores * relations, scores * (4 + (0 if fused else 4) * method.value_relation)
    if isinstance(method, HiddenState):
        mapping = layer_mapping(method.mapping, teacher.layers, student.layers)
        pairs = sum(map(len, mapping.values())) + bool(method.embeddings)
        return student.layers, pairs * 12 * teacher.width, pairs * 2 * teacher.width
    if isinstance(method, SentenceEmbedding):  # both are averaged over tokens; what follows has one row a sequence
        return student.layers, 3 * student.width + teacher.width, 0
    masked = share * workload.vocabulary
    if isinstance(method, MaskedLanguageModelling):
        return student.layers, masked * CROSS_ENTROPY_PASSES, masked * 3
    if isinstance(method, OutputDistribution):
        logits = workload.vocabulary if method.positions == "all" else masked
        masked = masked if method.mlm_weight else 0
        values = logits * DIVERGENCE_PASSES[fused] + masked * CROSS_ENTROPY_PASSES
        return student.layers, values, logits * 5 + masked * 3
    raise StudyError(f"the cost model does not know objective {method.objective!r}; allowed: those it counts (cost.py)")


@cache
def _products(
    teacher: Encoder, student: Encoder, described: str, vocabulary: int, length: int, predicted: int
) -> tuple[int, int]:
    """Floating-point operations of one sequence: of the teacher's layers that are read, and of all else in a step.

    Counted by PyTorch on tensors that have shapes but no values: the paper's scale takes seconds and no memory.
    """
    method: Any = METHOD.validate_json(described)
    with FakeTensorMode():
        model = bert(teacher, vocabulary, "eager", length)
        lengths = {"input_ids": length, "masked_input_ids": length, "positions": predicted, "labels": predicted}
        lengths["sampled"] = predicted
        batch = {name: torch.zeros(1, size, dtype=torch.long) for name, size in lengths.items()}
        whole = count_operations(model, student, method, batch)
        layers: dict[str, Any] = OBJECTIVES[method.objective].layers_read(method, teacher.layers, student.layers)
        with FlopCounterMode(display=False) as counter, torch.no_grad():
            if layers:
                read_activations(model, batch["input_ids"], **layers)
    read = counter.get_total_flops()
    return read, whole - read


def workload_of(plan: Plan, run: Run, vocabulary: int, precision: str = "bf16") -> Workload:
    """The work of a run's training; steps of equal compute are those of equal products.

    Args:
        vocabulary: tokens of the teacher's tokenizer, which a plan does not know.

    Raises:
        StudyError: the run is not trained.
    """
    if isinstance(run.objective, Untrained):
        raise StudyError(f"{run.name} is not trained; allowed: runs that have steps")
    work = Workload(
        plan.params.settings[run.setting].teacher,
        run.sizes,
        run.objective.model_copy(update={"learning_rate": 1.0}),  # which is no work: shapes are counted once
        vocabulary,
        run.distillation.batch_size,
        plan.params.corpus.sequence_length,
        steps=run.distillation.steps,
        masked=run.masking.fraction,
        precision=precision,
        fast_paths=tuple(path for path in run.fast_paths if path != SHARED),  # a GPU computes it sooner
        attention=plan.params.attention_implementation,
    )
    if run.equal_compute is None:
        return work
    reference = replace(work, method=run.equal_compute.objective)
    steps = round(run.equal_compute.steps * count(reference).flops / count(work).flops)
    return replace(work, steps=max(1, steps))


def fit(workloads: Sequence[Workload], seconds_per_step: Sequence[float], device: Device) -> Efficiency:
    """Efficiencies that explain measured steps best: least squares of relative errors, neither below zero.

    Raises:
        ValueError: fewer than two steps.
    """
    if len(workloads) < 2:
        raise ValueError(f"{len(workloads)} measured steps; allowed: at least 2")
    counts = np.array([[c.flops / device.flops, c.bytes / device.bandwidth] for c in map(count, workloads)])
    measured = np.asarray(seconds_per_step, dtype=float)
    inverse, _ = nnls(counts / measured[:, None], np.ones(len(workloads)))
    return Efficiency(*(1 / value if value > 0 else float("inf") for value in inverse))


def predict(workload: Workload, device: Device, efficiency: Efficiency, devices: int = 1) -> dict[str, float]:
    """Cost of a whole training, its batch divided evenly over ``devices``.

    Returns:
        ``seconds``, ``tokens_per_second``, ``memory`` (bytes per device), ``dollars``; of the seconds, ``products``,
        ``traffic`` and ``exchange``.

    Raises:
        ValueError: ``devices`` does not divide the batch.
    """
    if workload.batch_size % devices:
        raise ValueError(f"{devices} devices do not divide a batch of {workload.batch_size}")
    part = count(replace(workload, batch_size=workload.batch_size // devices))
    exchanged = 2 * (devices - 1) / devices * 4 * part.parameters  # ring all-reduce of float32 gradients
    seconds = {
        "products": workload.steps * part.flops / (efficiency.flops * device.flops),
        "traffic": workload.steps * part.bytes / (efficiency.bytes * device.bandwidth),
        "exchange": workload.steps * exchanged / device.link,
    }
    total = sum(seconds.values())
    return {
        "seconds": total,
        "tokens_per_second": workload.steps * workload.tokens / total,
        "memory": part.memory,
        "dollars": total / 3600 * device.price * devices,
        **seconds,
    }


def benchmark_workload(params: Params, sizes: Benchmark, subject: dict[str, Any]) -> Workload:
    """The work of a step of a method of the benchmark."""
    return Workload(
        sizes.teacher,
        sizes.student,
        params.methods[subject["name"]],
        sizes.vocabulary,
        sizes.batch_size,
        sizes.sequence_length,
        masked=params.masking.fraction,
        precision=subject["precision"],
        fast_paths=tuple(subject["fast_paths"]),
    )


def benchmark_steps(result: dict, params: Params) -> pd.DataFrame:
    """The benchmark's steps with every fast path of one process, and with a shared teacher: what the study runs.

    Returns:
        columns method, precision, fast_paths, seconds (per step, median), memory (bytes of the process) and workload.

    Raises:
        StudyError: a method of the benchmark that params.yaml does not have.
    """
    sizes, rows = Benchmark.model_validate(result["benchmark"]), []
    for subject in result["subjects"]:
        if subject["kind"] != "method":
            continue
        if subject["name"] not in params.methods:
            raise StudyError(f"benchmark: method {subject['name']!r} is unknown; allowed: {', '.join(params.methods)}")
        method = params.methods[subject["name"]]
        if set(applicable(method.objective, subject["precision"])) - {SHARED, *subject["fast_paths"]}:
            continue
        workload = benchmark_workload(params, sizes, subject)
        seconds = statistics.median(r["median_seconds"] for r in subject["rounds"])
        memory = statistics.median(r["memory"] for r in subject["rounds"]) * 2**20
        rows.append((subject["name"], subject["precision"], ", ".join(workload.fast_paths), seconds, memory, workload))
    return pd.DataFrame(rows, columns=["method", "precision", "fast_paths", "seconds", "memory", "workload"])


def stage_steps(results: Results, plan: Plan) -> pd.DataFrame:
    """The distillation stages of a setting as they were run; position embeddings are counted as vocabulary.

    Where the teacher was shared, its part is left out for every run, also for the one that computed it. Runs of several
    processes are left out: they exchanged gradients, too.

    Args:
        results: of one setting of the plan.

    Returns:
        columns method, student, precision, threads, seconds (per step, mean) and workload.
    """
    setting, rows = results.comparison.setting, []
    trained = results.runs[results.runs["student"] != TEACHER].dropna(subset="tokens_per_second")
    if "processes" in trained:
        trained = trained[trained["processes"].isna()]
    for row in trained.to_dict("records"):
        run = plan.run(setting, row["method"], row["student"], row["distillation_seed"])
        vocabulary = round(row["embedding_parameters"] / run.sizes.width)
        workload = workload_of(plan, run, vocabulary, row["precision"])
        workload = replace(workload, steps=1, fast_paths=tuple(row["fast_paths"]))
        seconds = workload.tokens / row["tokens_per_second"]
        rows.append((run.method, run.student, row["precision"], row["training_threads"], seconds, workload))
    return pd.DataFrame(rows, columns=["method", "student", "precision", "threads", "seconds", "workload"])


def result_seconds(results: Results) -> pd.DataFrame:
    """Training (the teacher's is its adaptation) and evaluation, by model.

    Returns:
        columns stage, student, count (of stages), seconds (summed) and tokens_per_second.
    """
    trained = results.runs.dropna(subset="tokens").groupby("student", sort=False)
    parts = [trained[["seconds", "tokens"]].sum().assign(count=trained.size(), stage="train")]
    everyone = results.runs.groupby("student", sort=False)
    evaluated = everyone[["evaluation_seconds"]].sum().rename(columns={"evaluation_seconds": "seconds"})
    parts.append(evaluated.assign(count=everyone.size(), stage="evaluate"))
    table = pd.concat(parts).reset_index()
    table["tokens_per_second"] = table["tokens"] / table["seconds"]
    return table[["stage", "student", "count", "seconds", "tokens_per_second"]]


def stage_seconds(plan: Plan) -> pd.DataFrame:
    """Wall time of the stages of a profile, from its executed notebooks: columns stage, count and seconds (summed).

    Stages of one kind may have run side by side; a repeated one counts with its last execution. Empty unless every run
    of the plan was distilled and evaluated here: seconds of a part are not those of the study.
    """
    folder = plan.folder / "runs" / "notebooks"
    files = [("sources", folder / "sources.ipynb")]
    files += [(d.stage, folder / f"{d.stage}_{d.name}.ipynb") for d in plan.descriptions]
    executed = [(stage, file) for stage, file in files if file.is_file()]
    kinds = (Run.stage, Evaluation.stage)
    if any(stage in kinds for stage, _ in set(files) - set(executed)):
        executed = []
    rows = [(stage, json.loads(file.read_text())["metadata"]["papermill"]["duration"]) for stage, file in executed]
    table = pd.DataFrame(rows, columns=["stage", "seconds"])
    return table.groupby("stage", sort=False)["seconds"].agg(count="count", seconds="sum").reset_index()


def cross_validate(
    steps: pd.DataFrame, groups: str, device: Device, fitted: Callable[[pd.DataFrame, Device], Efficiency] | None = None
) -> pd.Series:
    """Seconds per step of every row, predicted from efficiencies ``fitted`` (:func:`fit`) to all other ``groups``."""
    predicted = pd.Series(index=steps.index, dtype=float)
    for group in steps[groups].unique():
        inside = steps[groups] == group
        others = steps[~inside]
        efficiency = fitted(others, device) if fitted else fit(others["workload"], others["seconds"], device)
        works = [replace(work, steps=1) for work in steps["workload"][inside]]
        predicted[inside] = [predict(work, device, efficiency)["seconds"] for work in works]
    return predicted


def device_of(result: dict, precision: str) -> Device:
    """The machine that a benchmark ran on, by the peaks measured there."""
    peaks = result["peaks"]
    return Device(result["environment"]["processor"], peaks[precision], peaks["bandwidth"])


def _layer_values(encoder: Encoder, scores: int) -> float:
    return (
        WIDTH_PASSES * encoder.width
        + INTERMEDIATE_PASSES * encoder.intermediate
        + SCORE_PASSES * encoder.heads * scores
    )


def _parameters(encoder: Encoder, vocabulary: int) -> float:
    return vocabulary * encoder.width + encoder.layers * (
        4 * encoder.width**2 + 2 * encoder.width * encoder.intermediate
    )
