"""What the task-level systems have in common: a teacher of a task, its logits, and one stage of training."""

from __future__ import annotations

import tempfile
from collections.abc import Callable, Iterable, Iterator, Sequence
from functools import partial
from pathlib import Path
from typing import Any, Literal

import torch
from datasets import Dataset
from torch import Tensor, nn
from torch.nn import functional as F
from transformers import PreTrainedModel, PrinterCallback, TrainerCallback, TrainingArguments

from study.data.corpus import load_corpus
from study.data.pretrained import load_tokenizer, save_model
from study.data.tasks import Task, find_task, load_task
from study.descriptions import NeighbourSystem
from study.distillation.trainer import DistillationTrainer, common_arguments
from study.evaluation.finetune import Collator, MeanPoolingClassifier, encode, finetune, pooled_features, reading_batch
from study.evaluation.metrics import task_metrics
from study.files import Layout, StudyError
from study.runtime import compute_device, use_bf16
from study.sections import TaskBudget


def both(rows: Tensor, columns: Tensor) -> Tensor:
    """(B, T) and (B, U), nonzero at real tokens: pairs of them, (B, T, U)."""
    return rows.bool()[:, :, None] & columns.bool()[:, None, :]


def attention_rows(student: Tensor, teacher: Tensor, allowed: Tensor) -> Tensor:
    r"""Cross-entropy of the student's attention rows under the teacher's, per row.

    .. math:: -\frac{1}{A N} \sum_b \sum_a \sum_t \sum_{u \in x_{b,t}} P^T_{a,t,u} \log P^S_{a,t,u}

    P is the softmax of the scores over the columns u that are allowed in row t, N the number of rows that have one.

    Args:
        student, teacher: (B, A, T, U) scores, computed in float32. allowed: (B, T, U), true where a row sees a column.

    Raises:
        ValueError: shapes that do not agree.

    Source: CR-ILD (2302.01530), its public code, which counts rows of padding in the mean.
    """
    if student.shape != teacher.shape or allowed.shape != (len(student), *student.shape[2:]):
        raise ValueError(
            f"scores and mask differ in shape: student {tuple(student.shape)}, teacher {tuple(teacher.shape)},"
            f" mask {tuple(allowed.shape)}"
        )
    own, target = (x.float().masked_fill(~allowed[:, None], torch.finfo(torch.float32).min) for x in (student, teacher))
    rows, counted = -(F.softmax(target, dim=-1) * F.log_softmax(own, dim=-1)).sum(dim=-1), allowed.any(dim=-1)
    return rows.masked_fill(~counted[:, None], 0.0).sum() / (student.shape[1] * counted.sum().clamp(min=1))


class Distillation(nn.Module):
    """A student that is trained and its teacher, if any: outside the module tree, neither trained nor saved."""

    accepts_loss_kwargs = False  # its losses are means: the Trainer has to divide under accumulation

    def __init__(self, student: Any, teacher: Any = None):
        super().__init__()
        self.student = student
        self._outside = (None if teacher is None else teacher.eval().requires_grad_(False),)

    @property
    def teacher(self) -> Any:
        return self._outside[0]


class TargetCollator(Collator):
    """A collator that hands on the teacher's logits (B, classes) of its rows, where they have ``targets``."""

    def __call__(self, rows: list[dict[str, Any]]) -> dict[str, Tensor]:
        targets = {"targets": torch.tensor([row["targets"] for row in rows])} if "targets" in rows[0] else {}
        return super().__call__(rows) | targets


def batches(rows: Dataset, collate: Callable[[list[dict[str, Any]]], Any], size: int) -> Iterator[dict[str, Tensor]]:
    """The rows in their order, collated, where models are trained."""
    for start in range(0, len(rows), size):
        batch = collate([*rows.select(range(start, min(start + size, len(rows))))])
        yield {key: x.to(compute_device()) for key, x in batch.items()}


@torch.no_grad()
def with_targets(description: Any, teacher: MeanPoolingClassifier, examples: Dataset, collate: Collator) -> Dataset:
    """The examples with the teacher's logits as column ``targets``."""
    batch_size, bf16 = reading_batch(description.finetuning), use_bf16(description.precision)
    features, order = pooled_features(teacher, examples, collate, batch_size, bf16)
    logits = torch.empty(len(order), teacher.output.out_features)
    logits[torch.tensor(order)] = teacher.output(features.to(compute_device())).float().cpu()
    return examples.add_column("targets", logits.tolist())


def joint_splits(
    description: NeighbourSystem, layout: Layout, task: Task, budget: TaskBudget, tokenizer: Any, seed: int
) -> dict[str, Dataset]:
    """The splits of a task; two texts are one sequence, and taps read every token as of the first segment."""
    splits = encode(load_task(layout.tasks, task.name), task, budget, tokenizer, "joint", seed)
    return {split: own.remove_columns({"token_type_ids"} & {*own.column_names}) for split, own in splits.items()}


def teacher_of(
    description: NeighbourSystem,
    layout: Layout,
    task: Task,
    splits: dict[str, Dataset],
    tokenizer: Any,
    seed: int,
    classifier: type[MeanPoolingClassifier] | None = None,
) -> MeanPoolingClassifier:
    """The model of the description fine-tuned on a task, in evaluation; test data are not looked at."""
    kept: list[MeanPoolingClassifier] = []
    folder, rate = description.folder(layout), description.finetuning.learning_rates[0]
    finetune(
        description, folder, task, splits, tokenizer, seed, rate, look_at_test=False, keep=kept.append,
        classifier=classifier,
    )  # fmt: skip
    return kept[0].eval()


def on_tasks(
    description: NeighbourSystem,
    layout: Layout,
    model: PreTrainedModel,
    names: Iterable[str],
    seed: int,
    learning_rate: float,
    prepare: Callable[[MeanPoolingClassifier], object] | None = None,
    keep: Callable[[Task, Dataset, MeanPoolingClassifier], object] | None = None,
) -> tuple[dict[str, float], dict[str, float]]:
    """Main metric on test data of an encoder fine-tuned on each task, and of the linear probe that this starts from.

    Args:
        prepare: as of :func:`study.evaluation.finetune.finetune`. keep: called with each task, its test data and
            the model that was kept.
    """
    scores, probes, tokenizer = {}, {}, load_tokenizer(description.folder(layout))
    with tempfile.TemporaryDirectory() as folder:
        save_model(model, tokenizer, Path(folder))
        for name in names:
            task, budget, pairs = find_task(layout.tasks, name), description.tasks[name], description.finetuning.pairs
            splits = encode(load_task(layout.tasks, name), task, budget, tokenizer, pairs, seed)
            found = finetune(
                description, Path(folder), task, splits, tokenizer, seed, learning_rate, look_at_test=True,
                prepare=prepare, keep=keep and partial(keep, task, splits["test"]),
            )  # fmt: skip
            assert found.test is not None
            scores[name], probes[name] = found.test[task.metric], found.frozen["test"]
    return scores, probes


def train_stage(
    description: Any,
    model: nn.Module,
    train: Dataset,
    development: Dataset,
    collate: Collator,
    epochs: int,
    batch_size: int,
    learning_rate: float,
    seed: int,
    keep: Literal["last", "loss"] | Task,
    schedule: dict[str, Any],
    callbacks: Sequence[TrainerCallback] = (),
) -> tuple[float, float]:
    """Train a model, whose forward pass gives its loss, in place.

    Args:
        keep: the weights of the last epoch, of the one with the lowest held-out loss, or of the one with the best main
            metric of a task, all on ``development``.
        schedule: further arguments of TrainingArguments.

    Returns:
        Held-out loss before training, and of the weights kept.

    Raises:
        DivergedError: a loss that is not finite.
    """
    task, chosen = keep if isinstance(keep, Task) else None, keep != "last"
    with tempfile.TemporaryDirectory() as folder:
        own = {
            "train_sampling_strategy": "group_by_length",
            "eval_strategy": "epoch" if chosen else "no",
            "save_strategy": "epoch" if chosen else "no",
            "save_only_model": True,
            "save_total_limit": 1,
            "load_best_model_at_end": chosen,
            "metric_for_best_model": task.metric if task else "loss",
            "prediction_loss_only": task is None,
            "logging_steps": 500,
        }
        common = common_arguments(use_bf16(description.precision), reading_batch(description.finetuning))
        arguments = TrainingArguments(
            output_dir=folder,
            num_train_epochs=epochs,
            per_device_train_batch_size=batch_size,
            learning_rate=learning_rate,
            seed=seed,
            **common | own | schedule,
        )
        trainer = DistillationTrainer(
            model=model,
            args=arguments,
            train_dataset=train,
            eval_dataset=development,
            data_collator=collate,
            callbacks=list(callbacks),
            compute_metrics=(lambda found: task_metrics(task, found.predictions, found.label_ids)) if task else None,
        )
        trainer.remove_callback(PrinterCallback)
        before = trainer.evaluate()["eval_loss"]
        trainer.train()
        after = trainer.evaluate()["eval_loss"]
    return before, after


def corpus_texts(folder: Path, count: int, length: int, seed: int, split: str = "train") -> Dataset:
    """Sequences of the study's corpus, drawn anew for each seed, cut to ``length`` tokens and closed as texts are.

    Raises:
        StudyError: no corpus, or one with fewer sequences.
    """
    corpus = load_corpus(folder)[split]
    if len(corpus) < count:
        where = {"train": "training"}.get(split, split)
        raise StudyError(f"{folder}: {len(corpus):,} sequences for {where}; allowed: at least {count:,}")
    shuffled = corpus.shuffle(seed=seed, keep_in_memory=True)  # else its order is written beside the corpus
    drawn = shuffled.select(range(count), keep_in_memory=True)["input_ids"]
    return Dataset.from_dict({"input_ids": [[*row[: length - 1], row[-1]] for row in drawn], "labels": [0] * count})
