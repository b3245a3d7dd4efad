"""CR-ILD: task-level distillation of intermediate layers with mixed inputs and a consistency term.

Standing: code-exact. From the public code are the mixing, the losses and their masks, the schedule of the consistency
term and both stages. This study's choices: padding is left out as query, too; there is no learned map over the
student's states, which have the teacher's width; models pool by the mean; the student's linear layer starts as a probe
of what the teacher predicts; of supplementary text as many steps are read as of task text, each sequence once.

Source: Ko et al. (2302.01530) and their public code.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from statistics import fmean
from typing import Any, cast

import numpy as np
import torch
from datasets import Dataset
from torch import Tensor, nn
from torch.nn import functional as F
from transformers import PreTrainedModel, TrainerCallback, set_seed

from study.data.pretrained import load_model, load_tokenizer
from study.data.tasks import Task, find_task
from study.descriptions import NeighbourSystem
from study.distillation.losses import attention_scores, hidden_state, output_distribution
from study.distillation.mappings import layer_mapping
from study.distillation.objectives.attention_maps import check_scores_exist
from study.distillation.taps import Activations, read_activations, state_of
from study.evaluation.finetune import MeanPoolingClassifier, frozen_score, reading_batch, start_from_probe
from study.families import family_of, keep_layers
from study.files import Layout, StudyError
from study.neighbours.stages import (
    Distillation,
    TargetCollator,
    attention_rows,
    both,
    corpus_texts,
    joint_splits,
    teacher_of,
    train_stage,
    with_targets,
)
from study.neighbours.system import Measured, System
from study.neighbours_options import CrIld
from study.records_beside import Check
from study.runtime import compute_device, use_bf16

#: Share of the steps in which the rate rises.
WARMUP = 0.1
#: What is compared, beside hidden states -> the two projections whose products it is.
RELATIONS = {
    "attention": ("query", "key"),
    "query": ("query", "query"),
    "key": ("key", "key"),
    "value": ("value", "value"),
}
#: What the consistency term reads, where it is distilled.
CONSISTENT = ("attention", "hidden")


def logits_loss(student: Tensor, teacher: Tensor, temperature: float) -> Tensor:
    r"""Distillation of logits (B, classes): :func:`study.distillation.losses.output_distribution`.

    For regression, (B, 1), :math:`\frac{1}{B} \sum_b ((z^S_b - z^T_b) / \tau)^2`.
    """
    if student.shape[-1] == 1:
        return F.mse_loss(student.float() / temperature, teacher.float() / temperature)
    return output_distribution(student, teacher, temperature)


@contextmanager
def mixed_embeddings(encoder: PreTrainedModel, weight: float) -> Iterator[None]:
    r"""Within the block the encoder's embedding outputs are :math:`\lambda e_b + (1 - \lambda) e_{B + 1 - b}`.

    The partner of a text is that at its place in the reversed batch; ``weight`` is lambda.
    """
    module = state_of(encoder, family_of(encoder), 0, encoder.config.num_hidden_layers)

    def mix(module: nn.Module, arguments: tuple, output: Tensor) -> Tensor:
        return weight * output + (1 - weight) * output.flip(0)

    with module.register_forward_hook(mix):
        yield


class IntermediateDistillation(Distillation):
    r"""Stage 1; ``forward`` returns the loss D of mapped layers of student s and teacher t.

    .. math:: L = D(s(m), t(m)) + w \frac{e}{E} \left[\lambda D(s(m), s(x)) + (1 - \lambda) D(s(m), s(x'))\right]

    m is a batch x mixed with its reverse x' by lambda ~ Beta(1, 1), then max(lambda, 1 - lambda), and e the number of
    epochs that are over. The second term is of the last layer, of attention and hidden states alone; s(x) and s(x')
    are passes under dropout and without gradient. Without regularisers L = D(s(x), t(x)), and in evaluation always.
    D is a sum over ``objects`` and pairs of layers; for ``uniform`` hidden states are those of the embeddings, too.

    Args:
        objects: ``hidden`` and names of RELATIONS. mapping: ``last`` or ``uniform``.
        consistency: w; None: neither mixing nor consistency.

    Raises:
        StudyError: attention is compared of a model that has other scores than those of queries and keys.
    """

    def __init__(
        self,
        student: PreTrainedModel,
        teacher: PreTrainedModel,
        objects: Sequence[str],
        mapping: str,
        consistency: float | None,
    ):
        super().__init__(student, teacher)
        if any(name in RELATIONS for name in objects):
            check_scores_exist(teacher, "model", "cr-ild")
        self.objects, self.consistency = objects, consistency
        own, target = student.config.num_hidden_layers, teacher.config.num_hidden_layers
        self.pairs = {i: j for i, (j,) in layer_mapping(mapping, target, own).items()}
        self.states = self.pairs | ({0: 0} if mapping == "uniform" else {})
        self.last = {own: own}
        self.progress = 0.0  # e / E

    def forward(self, input_ids: Tensor, attention_mask: Tensor, **others: Tensor) -> dict[str, Tensor]:
        if self.consistency is None or not self.training:
            return {"loss": self._distillation(input_ids, attention_mask, attention_mask)[1]}
        drawn = torch.rand(()).item()  # Beta(1, 1)
        weight = max(drawn, 1 - drawn)
        with mixed_embeddings(self.student, weight), mixed_embeddings(self.teacher, weight):
            own, loss = self._distillation(input_ids, attention_mask | attention_mask.flip(0), attention_mask)
        objects = [name for name in self.objects if name in CONSISTENT]
        share = self.consistency * self.progress
        if objects and share:
            with torch.no_grad():
                clean = self._read(self.student, input_ids, attention_mask, self.last, self.last)
            first = self.distance(own, clean, attention_mask, objects, self.last, self.last)
            turned = self.distance(own, _reversed(clean), attention_mask.flip(0), objects, self.last, self.last)
            loss = loss + share * (weight * first + (1 - weight) * turned)
        return {"loss": loss}

    def _distillation(self, input_ids: Tensor, attended: Tensor, counted: Tensor) -> tuple[Activations, Tensor]:
        own = self._read(self.student, input_ids, attended, self.pairs, self.states)
        with torch.no_grad():
            targets = set(self.pairs.values()), set(self.states.values())
            target = self._read(self.teacher, input_ids, attended, *targets)
        return own, self.distance(own, target, counted, self.objects, self.pairs, self.states)

    def _read(self, model: Any, input_ids: Tensor, mask: Tensor, maps: Any, states: Any) -> Activations:
        maps = maps if any(name in RELATIONS for name in self.objects) else ()
        states = states if "hidden" in self.objects else ()
        return read_activations(model, input_ids, mask, hidden_layers=states, attention_layers=maps)

    def distance(
        self,
        own: Activations,
        target: Activations,
        mask: Tensor,
        objects: Sequence[str],
        pairs: dict[int, int],
        states: dict[int, int],
    ) -> Tensor:
        """D: :func:`attention_rows` over ``pairs`` of layers, and mean squared errors over those of ``states``."""
        heads, parts = self.student.config.num_attention_heads, []
        for name in objects:
            if name == "hidden":
                parts += [hidden_state(own.hidden[i], target.hidden[j], mask) for i, j in states.items()]
                continue
            first, second = RELATIONS[name]
            for i, j in pairs.items():
                x, y = own.attention[i], target.attention[j]
                scores = attention_scores(x[first], x[second], heads), attention_scores(y[first], y[second], heads)
                parts.append(attention_rows(*scores, both(mask, mask)))
        return torch.stack(parts).sum()


def _reversed(read: Activations) -> Activations:
    attention = {i: {name: x.flip(0) for name, x in parts.items()} for i, parts in read.attention.items()}
    return Activations({i: states.flip(0) for i, states in read.hidden.items()}, attention)


class Progress(TrainerCallback):
    """Tells the distillation which part of its epochs is over; ``epochs``: E, however the steps are counted."""

    def __init__(self, distillation: IntermediateDistillation, epochs: int):
        self.distillation, self.epochs = distillation, epochs

    def on_step_begin(self, args, state, control, **kwargs):
        self.distillation.progress = state.global_step * self.epochs // state.max_steps / self.epochs


class LogitStudent(MeanPoolingClassifier):
    """Stage 2: a classifier whose loss is :func:`logits_loss` to the teacher's logits, given as ``targets``."""

    temperature = 2.0

    def forward(
        self, labels: Tensor | None = None, targets: Tensor | None = None, **texts: Tensor
    ) -> dict[str, Tensor]:
        outcome = super().forward(**texts)
        if targets is None:
            return outcome
        return {"loss": logits_loss(outcome["logits"], targets, self.temperature)} | outcome


@dataclass(frozen=True)
class Taught:
    """A task whose teacher is trained: its splits, and what of them the teacher has labelled.

    ``distilled``: training and development with its logits; ``predicted``: training with its predictions as labels.
    """

    task: Task
    splits: dict[str, Dataset]
    distilled: dict[str, Dataset]
    predicted: Dataset
    teacher: MeanPoolingClassifier
    collate: TargetCollator
    scores: dict[str, float]


_taught: dict[tuple[str, str, int], Taught] = {}


def mislabelled(labels: Sequence[int], classes: int, share: float, seed: int) -> list[int]:
    """Labels of which each is, with a chance of ``share``, another class, any as likely."""
    generator = np.random.default_rng(seed)
    wrong, moved = generator.random(len(labels)) < share, generator.integers(1, classes, len(labels))
    return [
        int((own + step) % classes) if is_wrong else int(own)
        for own, is_wrong, step in zip(labels, wrong, moved, strict=True)
    ]


def teach(description: NeighbourSystem, layout: Layout, name: str, seed: int) -> Taught:
    """Fine-tune the model of the description on a task, once for all arms of a seed.

    Labels of training alone are noisy, and of classes alone.
    """
    key = description.model_dump_json(), name, seed
    if key not in _taught:
        options = cast(CrIld, description.options)
        task, budget = find_task(layout.tasks, name), description.tasks[name]
        budget = budget.model_copy(update={"languages": task.languages[:1]})  # arms are told in this language alone
        tokenizer = load_tokenizer(description.folder(layout))
        splits = joint_splits(description, layout, task, budget, tokenizer, seed)
        if task.labels:
            noisy = mislabelled(splits["train"]["labels"], len(task.labels), options.noise, seed)
            splits["train"] = _relabelled(splits["train"], noisy)
        teacher = teacher_of(description, layout, task, splits, tokenizer, seed)
        collate = TargetCollator(tokenizer, description.finetuning.pad_to_multiple_of)
        scores = {split: frozen_score(description, teacher, task, own, collate) for split, own in splits.items()}
        distilled = {
            split: with_targets(description, teacher, splits[split], collate) for split in ("train", "development")
        }
        logits = np.array(distilled["train"]["targets"])
        found = logits.argmax(axis=1) if task.labels else logits[:, 0]
        predicted = _relabelled(splits["train"], found.tolist())
        _taught[key] = Taught(task, splits, distilled, predicted, teacher, collate, scores)
    return _taught[key]


def _relabelled(examples: Dataset, labels: Sequence[float]) -> Dataset:
    return examples.remove_columns("labels").add_column("labels", [*labels])


def jobs(options: CrIld) -> list[str]:
    """The arms, the system's own first, and ``logits`` alone."""
    return [*options.arms, "logits"]


def words(arm: str) -> str:
    """An arm's name in words."""
    if arm in ("logits", "teacher"):
        return {"logits": "logits alone", "teacher": "the teacher of the task"}[arm]
    mapping, text, *regularised = arm.split("-")
    layers = {"last": "last layer", "uniform": "all layers, uniform"}[mapping]
    return f"{layers}, {text} text{', mixed and consistent' * bool(regularised)}"


def run(description: NeighbourSystem, layout: Layout, job: str, seed: int) -> Measured:
    """Both stages on every task; of ``logits``, the second stage alone, and the teacher beside it."""
    taught = [teach(description, layout, name, seed) for name in description.tasks]
    measured = {job: [_distilled(description, layout, own, job, seed) for own in taught]}
    if job == "logits":
        measured["teacher"] = [own.scores for own in taught]
    return {arm: _together([*description.tasks], found) for arm, found in measured.items()}


def _together(names: list[str], found: list[dict[str, float]]) -> dict[str, float]:
    by_task = {name: own["test"] for name, own in zip(names, found, strict=True)}
    means = {key: fmean([own[key] for own in found]) for key in found[0] if key != "test"}
    gap = {"gap": means["train"] - means["development"]}
    return {"score": fmean([*by_task.values()])} | by_task | means | gap


def _distilled(description: NeighbourSystem, layout: Layout, taught: Taught, job: str, seed: int) -> dict[str, float]:
    """Main metric of a split each, and, of the first stage, by which share it lowered its own held-out loss."""
    options = cast(CrIld, description.options)
    set_seed(seed)
    encoder = load_model(description.folder(layout), description.attention_implementation, head=False)
    if options.layers > encoder.config.num_hidden_layers:
        depth = encoder.config.num_hidden_layers
        raise StudyError(f"neighbours.{description.neighbour}.layers = {options.layers}; allowed: at most {depth}")
    keep_layers(encoder, options.layers)
    splits, found = taught.distilled, {}
    shared: dict[str, Any] = {"description": description, "collate": taught.collate, "seed": seed}
    shared |= {"schedule": {"weight_decay": options.weight_decay, "warmup_steps": WARMUP}}
    if job != "logits":
        mapping, text, *regularised = job.split("-")
        first = IntermediateDistillation(
            encoder, taught.teacher.encoder, options.objects, mapping, options.consistency if regularised else None
        ).to(compute_device())
        stage = options.intermediate.model_dump()
        train, progress = taught.splits["train"], Progress(first, options.intermediate.epochs)
        if text == "supplementary":
            length = description.tasks[taught.task.name].max_length
            train = corpus_texts(layout.corpus, stage["epochs"] * len(train), length, seed)
            stage["epochs"] = 1
        held_out = taught.splits["development"]
        before, after = train_stage(
            model=first, train=train, development=held_out, keep="last", callbacks=[progress], **stage, **shared
        )
        found["lowered"] = 1 - after / before
    student = LogitStudent(encoder, taught.teacher.output.out_features, pairs=False).to(compute_device())
    if len({*taught.predicted["labels"]}) > 1:
        reading = reading_batch(description.finetuning), use_bf16(description.precision)
        start_from_probe(student, taught.predicted, taught.collate, *reading)
    else:  # nothing to probe: a teacher that tells no classes apart
        student.output.load_state_dict(taught.teacher.output.state_dict())
    train_stage(
        model=student, train=splits["train"], development=splits["development"], keep=taught.task,
        **options.logits.model_dump(), **shared,
    )  # fmt: skip
    for split, own in taught.splits.items():
        found[split] = frozen_score(description, student, taught.task, own, taught.collate)
    return found


def checks(options: CrIld) -> list[Check]:
    """What the paper says of the order of arms."""
    last, other, whole = "last-task", "last-supplementary", "last-task-regularised"
    better = [
        ("the last layer alone is better than all of them", last, "uniform-task"),
        ("supplementary text is better than the task's", other, last),
        ("the whole is better than all layers on task text", whole, "uniform-task"),
        ("the whole is better than logits alone", whole, "logits"),
    ]
    smaller = [
        ("mixing and consistency lower the gap to development data", whole, last),
        ("supplementary text lowers it, too", other, last),
    ]
    found = [Check(claim=claim, first=a, second=b, measure="score") for claim, a, b in better]
    return found + [Check(claim=claim, first=a, second=b, measure="gap", sign="below") for claim, a, b in smaller]


CR_ILD = System(
    title="CR-ILD: layers of a task's teacher, with mixed inputs and consistency",
    source="arXiv 2302.01530",
    standing="code-exact",
    equation="L = D(s(m), t(m)) + w · e/E · [λ · D(s(m), s(x)) + (1 − λ) · D(s(m), s(x′))], with m = λx + (1 − λ)x′"
    " at the embeddings, λ ~ Beta(1, 1), then λ ← max(λ, 1 − λ)",
    reproduced="Embedding outputs are mixed with those of the reversed batch, for teacher and student alike; what is"
    " compared is attention, by cross-entropy of its rows, and hidden states, by squared error; consistency with the"
    " student's own clean passes grows by epochs; then logits are distilled at temperature 2. The student begins as the"
    " bottom layers of the encoder before fine-tuning, as in the public code; its head, as a linear probe of what the"
    " teacher predicts. The teacher learns from few examples, part of them mislabelled.",
    unknown=(
        "its scores: other tasks, and a teacher that is larger by far",
        "what rows of padding add: the public code counts them, here they are left out",
        "what its learned map over the student's states adds: it starts at random; here there is none",
        "mixing and consistency over all layers: the public code has them for the last alone, and so has this",
        "whether more steps turn the order: the first stage has the examples and epochs of the options, not 20 epochs",
    ),
    jobs=jobs,
    run=run,
    words=words,
    measures=lambda description: (
        {"score": "macro score on test data"}
        | {name: name for name in description.tasks}
        | {"train": "macro score on training data, as labelled", "development": "macro score on development data"}
        | {"gap": "training minus development", "lowered": "share of the first stage's held-out loss that it removes"}
    ),
    checks=checks,
)
