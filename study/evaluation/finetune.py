"""Fine-tuning one encoder on one task, with selection on development data and a single look at the test data."""

from __future__ import annotations

import math
import tempfile
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from datasets import Dataset, DatasetDict
from sklearn.linear_model import LogisticRegression, RidgeCV
from sklearn.preprocessing import StandardScaler
from torch import Tensor, nn
from transformers import PreTrainedModel, PreTrainedTokenizerBase, PrinterCallback, Trainer, TrainingArguments, set_seed

from study.data.pretrained import load_model
from study.data.tasks import Task, find_task, load_task, subsample
from study.descriptions import Admission, Evaluation, LayerComparison, NeighbourSystem, Tuning
from study.evaluation.classifier import Collator, MeanPoolingClassifier, finite, read_batches
from study.evaluation.metrics import task_metrics
from study.evaluation.tagging import WordClassifier, align, tagged, word_features
from study.files import Layout, StudyError
from study.runtime import compute_device, keep_freed_memory, one_device, use_bf16
from study.sections import Finetuning, Reading, TaskBudget

#: Descriptions that say on which tasks, with which budgets and how models are fine-tuned, ...
Learning = Evaluation | NeighbourSystem
#: ... or at least probed.
Judging = Learning | Admission | LayerComparison | Tuning


@dataclass(frozen=True)
class FinetunedRun:
    """One fine-tuning: the epoch kept, its development scores, and the test scores.

    ``test`` are those of the language trained on, ``languages`` those of every other language tested. ``frozen``: split
    -> main metric of the linear probe that fine-tuning starts from; empty unless test data are looked at.
    """

    epoch: int
    development: dict[str, float]
    test: dict[str, float] | None
    languages: dict[str, dict[str, float]]
    frozen: dict[str, float]


def encode(
    dataset: DatasetDict, task: Task, budget: TaskBudget, tokenizer: PreTrainedTokenizerBase, pairs: str, seed: int
) -> dict[str, Dataset]:
    """The splits cut to the budget and tokenised; of the test splits those of the budget's languages.

    Regression labels are standardised by mean and deviation of the training examples; correlations do not change by
    that. Source: this study's choice.

    Args:
        pairs: ``separate`` encodes the two texts of a pair on their own (input_ids and pair_input_ids), ``joint``
            as one sequence with a separator.
        seed: which training examples are drawn; development and test examples are always the same.
    """
    tests = {task.split("test", language): budget.test for language in budget.languages}
    sizes = {"train": budget.train, "development": budget.development, **tests}
    splits = {name: subsample(dataset[name], size, seed if name == "train" else 0) for name, size in sizes.items()}
    centre, spread = 0, 1
    if task.labels is None:
        centre, spread = np.mean(splits["train"]["label"]), np.std(splits["train"]["label"]) or 1

    def tokenise(rows: dict) -> dict:
        options = {"truncation": True, "max_length": budget.max_length, "return_attention_mask": False}
        if task.kind == "tokens":
            return align(rows["text"], rows["label"], tokenizer, budget.max_length)
        if task.pair and pairs == "separate":
            columns = dict(tokenizer(rows["text"], return_token_type_ids=False, **options))
            columns["pair_input_ids"] = tokenizer(rows["text_pair"], **options)["input_ids"]
            columns["length"] = [len(a) + len(b) for a, b in zip(*columns.values(), strict=True)]
        else:
            columns = dict(tokenizer(rows["text"], rows["text_pair"] if task.pair else None, **options))
        labels = rows["label"] if task.labels else [(label - centre) / spread for label in rows["label"]]
        return columns | {"labels": labels}

    return {
        name: split.map(tokenise, batched=True, remove_columns=split.column_names, keep_in_memory=True)
        for name, split in splits.items()
    }


def splits_without_test(
    description: Judging, layout: Layout, tokenizer: PreTrainedTokenizerBase, seed: int
) -> dict[str, dict[str, Dataset]]:
    """Training and development examples of every task of the description that is learnt, as :func:`encode` gives them.

    Raises:
        StudyError: a task is missing.
    """
    splits, pairs = {}, description.finetuning.pairs
    for name, budget in description.tasks.items():
        task = find_task(layout.tasks, name)
        if not task.probe:
            without_test = budget.model_copy(update={"languages": []})
            splits[name] = encode(load_task(layout.tasks, name), task, without_test, tokenizer, pairs, seed)
    return splits


def reading_batch(budget: Finetuning | Reading) -> int:
    """Examples that are read at once where nothing is learnt: enough to keep a GPU busy."""
    return 256 if compute_device().type == "cuda" else 2 * budget.batch_size


@torch.no_grad()
def pooled_features(
    model: MeanPoolingClassifier, rows: Sequence[dict[str, Any]], collate: Collator, batch_size: int, bf16: bool
) -> tuple[Tensor, list[int]]:
    """Features (N, H) or (N, 4 H) of the encoder as it is, ordered by length, and the index of each one's row.

    Raises:
        StudyError: the features are not finite.
    """
    features: list[Tensor] = []
    order: list[int] = []
    for places, _, found in read_batches(model, rows, collate, batch_size, bf16, model.features, by_length=True):
        features.append(found.float())
        order += places
    return finite(torch.cat(features).cpu()), order


def labelled_features(
    model: MeanPoolingClassifier, examples: Dataset, collate: Collator, batch_size: int, bf16: bool
) -> tuple[np.ndarray, np.ndarray]:
    """:func:`pooled_features` of the examples of a task, and their labels (N,) in the same order; or those of words."""
    if isinstance(model, WordClassifier):
        return word_features(model, examples, collate, batch_size, bf16)
    features, order = pooled_features(model, examples, collate, batch_size, bf16)
    labels = list(examples["labels"])
    return features.numpy(), torch.tensor([labels[i] for i in order]).numpy()


@torch.no_grad()
def start_from_probe(
    model: MeanPoolingClassifier, train: Dataset, collate: Collator, batch_size: int, bf16: bool
) -> None:
    """Set the linear layer to a linear probe on the frozen encoder's features: linear probing, then fine-tuning.

    Ridge regression or multinomial logistic regression (scikit-learn) on standardised features, with the scaling folded
    into the weights. A few hundred steps then refine features instead of being spent on finding a readout.

    Raises:
        StudyError: all training examples of a classification have the same label.

    Source: Kumar et al. (2202.10054), LP-FT.
    """
    features, labels = labelled_features(model, train, collate, batch_size, bf16)
    regression = model.output.out_features == 1
    if not regression and len(np.unique(labels)) == 1:
        raise StudyError(
            f"fine-tuning: all {len(labels)} training examples have label {labels[0]}; allowed: at least two labels"
            " (raise finetuning.tasks.<task>.train)"
        )
    scaler = StandardScaler().fit(features)
    probe = RidgeCV(np.logspace(1, 4, 7)) if regression else LogisticRegression(C=0.01, max_iter=500)
    probe.fit(scaler.transform(features), labels)
    weight, bias = np.atleast_2d(probe.coef_), np.atleast_1d(probe.intercept_)
    if not regression and len(weight) == 1:  # scikit-learn keeps one row for two classes
        weight, bias = np.concatenate([-weight, weight]) / 2, np.concatenate([-bias, bias]) / 2
    weight = weight / scaler.scale_
    classes = [0] if regression else probe.classes_.astype(int)
    model.output.weight.zero_()
    model.output.bias.fill_(0.0 if regression else -10.0)  # a class without training examples
    model.output.weight[classes] = torch.from_numpy(weight).to(model.output.weight)
    model.output.bias[classes] = torch.from_numpy(bias - weight @ scaler.mean_).to(model.output.bias)


def load_encoder(description: Judging, folder: Path) -> PreTrainedModel:
    """The encoder saved in ``folder``, where models are read."""
    if "kept-memory" in description.fast_paths:
        keep_freed_memory()
    encoder = load_model(folder, description.attention_implementation, head=False)
    nn.Module.to(encoder, compute_device())
    return encoder


def probed_classifier(
    description: Judging,
    encoder_folder: Path,
    task: Task,
    splits: dict[str, Dataset],
    tokenizer: PreTrainedTokenizerBase,
    seed: int,
    classifier: type[MeanPoolingClassifier] | None = None,
) -> tuple[MeanPoolingClassifier, Collator]:
    """What fine-tuning starts from: the encoder saved in ``encoder_folder`` under a linear probe, and its collator."""
    set_seed(seed)
    encoder = load_encoder(description, encoder_folder)
    kind = classifier or (WordClassifier if task.kind == "tokens" else MeanPoolingClassifier)
    model = kind(encoder, len(task.labels) if task.labels else 1, "pair_input_ids" in splits["train"].column_names)
    model.to(compute_device())
    budget = description.finetuning
    collate = Collator(tokenizer, budget.pad_to_multiple_of)
    start_from_probe(model, splits["train"], collate, reading_batch(budget), use_bf16(description.precision))
    return model, collate


@torch.no_grad()
def linear_probe(
    description: Judging,
    encoder_folder: Path,
    task: Task,
    splits: dict[str, Dataset],
    tokenizer: PreTrainedTokenizerBase,
    seed: int,
) -> float:
    """The task's main metric on development data of a linear probe: what fine-tuning reaches before its first step."""
    model, collate = probed_classifier(description, encoder_folder, task, splits, tokenizer, seed)
    return frozen_score(description, model, task, splits["development"], collate)


@torch.no_grad()
def frozen_score(
    description: Judging, model: MeanPoolingClassifier, task: Task, examples: Dataset, collate: Collator
) -> float:
    """The task's main metric of a model as it is on ``examples``."""
    batch_size, bf16 = reading_batch(description.finetuning), use_bf16(description.precision)
    if isinstance(model, WordClassifier):
        return task_metrics(task, *tagged(model, examples, collate, batch_size, bf16))[task.metric]
    features, labels = labelled_features(model, examples, collate, batch_size, bf16)
    logits = model.output(torch.from_numpy(features).to(model.output.weight)).cpu().numpy()
    return task_metrics(task, logits, labels)[task.metric]


def finetune(
    description: Learning,
    encoder_folder: Path,
    task: Task,
    splits: dict[str, Dataset],
    tokenizer: PreTrainedTokenizerBase,
    seed: int,
    learning_rate: float,
    look_at_test: bool,
    keep: Callable[[MeanPoolingClassifier], object] | None = None,
    prepare: Callable[[MeanPoolingClassifier], object] | None = None,
    classifier: type[MeanPoolingClassifier] | None = None,
) -> FinetunedRun:
    """Fine-tune the encoder saved in ``encoder_folder``, keep the epoch with the best main metric on development data.

    Args:
        look_at_test: score the test splits with the model kept, not just a candidate. keep: called with that model.
        prepare: called with the model before its first step, to say what of it is trained. classifier: its class.
    """
    model, collate = probed_classifier(description, encoder_folder, task, splits, tokenizer, seed, classifier)
    probed = [split for split in splits if look_at_test and split != "train"]
    frozen = {split: frozen_score(description, model, task, splits[split], collate) for split in probed}
    if prepare:
        prepare(model)
    with tempfile.TemporaryDirectory() as folder:
        arguments = _arguments(description, Path(folder), task, len(splits["train"]), seed, learning_rate)
        trainer = Trainer(
            model=model,
            args=arguments,
            train_dataset=splits["train"],
            eval_dataset=splits["development"],
            data_collator=collate,
            compute_metrics=lambda found: task_metrics(task, found.predictions, found.label_ids),  # type: ignore[arg-type]
        )
        trainer.remove_callback(PrinterCallback)
        loss = trainer.train().training_loss
        if not math.isfinite(loss):
            where = f"fine-tuning on {task.name} at learning rate {learning_rate}"
            raise StudyError(f"{where}: loss = {loss}, no result written")
        epochs = [entry for entry in trainer.state.log_history if f"eval_{task.metric}" in entry]
        best = max(epochs, key=lambda entry: entry[f"eval_{task.metric}"])
        development = {name: best[f"eval_{name}"] for name in task.metrics}
        tests = {}
        for language in task.languages if look_at_test else ():
            if (split := task.split("test", language)) in splits:
                metrics = trainer.predict(splits[split]).metrics or {}
                tests[language] = {name: metrics[f"test_{name}"] for name in task.metrics}
    test = tests.pop(task.languages[0], None)
    if keep:
        keep(model)
    return FinetunedRun(round(best["epoch"]), development, test, tests, frozen)


def _arguments(
    description: Learning, folder: Path, task: Task, examples: int, seed: int, learning_rate: float
) -> TrainingArguments:
    budget = description.finetuning
    steps = budget.epochs * -(-examples // budget.batch_size)
    arguments = TrainingArguments(
        output_dir=str(folder),
        num_train_epochs=budget.epochs,
        per_device_train_batch_size=budget.batch_size,
        per_device_eval_batch_size=reading_batch(budget),
        learning_rate=learning_rate,
        warmup_steps=round(budget.warmup_fraction * steps),
        weight_decay=budget.weight_decay,
        lr_scheduler_type="linear",
        optim="adamw_torch_fused",
        bf16=use_bf16(description.precision),
        use_cpu=compute_device().type == "cpu",
        train_sampling_strategy="group_by_length",
        eval_strategy="epoch",
        save_strategy="epoch" if budget.epochs > 1 else "no",
        save_only_model=True,
        save_total_limit=1,
        load_best_model_at_end=budget.epochs > 1,
        metric_for_best_model=task.metric,
        greater_is_better=True,
        logging_nan_inf_filter=False,
        remove_unused_columns=False,
        label_names=["labels"],
        seed=seed,
        report_to="none",
        disable_tqdm=True,
        dataloader_pin_memory=False,
    )
    return one_device(arguments)
