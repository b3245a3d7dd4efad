"""Tiny streams, objectives and runs that tests of training share."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import tiny
import torch
from datasets import Dataset
from transformers import TrainingArguments, default_data_collator

from study.config import Params
from study.descriptions import Run, TeacherAdaptation
from study.distillation import processes
from study.distillation.distil import distil
from study.distillation.masking import MaskedSequences
from study.distillation.objectives import OBJECTIVES
from study.distillation.students import create_student
from study.distillation.teacher import adapt_teacher
from study.distillation.trainer import common_arguments, switch_off_dropout, train
from study.files import Layout

METHODS = [
    "mlm",
    "od",
    "hs-last",
    "hs-top",
    "hs-uniform",
    "hs-uniform-consecutive",
    "hs-uniform+last",
    "mha-minilmv2",
    "mha-direct",
    "se-mse",
    "se-relational",
]
RIVALS = ["scores", "minilm", "tinybert", "distilbert", "od+hs", "hs+mha"]
ONE_OF_EACH = ["mlm", "od", "hs-uniform+last", "mha-minilmv2", "mha-direct"]


def stream(params: Params, words, seed=1, length=64, rows=24, sampled=False) -> MaskedSequences:
    sequences = Dataset.from_dict({"input_ids": tiny.sequences(rows, 1)})
    return MaskedSequences(sequences, params.masking, words, seed, length, sampled=sampled)


def objective_of(params: Params, method: str, teacher=None, student="L2-H12", start=None):
    """An objective of a tiny student; its projections start on the first 24 sequences of ``start``."""
    teacher = teacher or tiny.masked_language_model()
    sample = torch.from_numpy(tiny.sequences(24, 5).astype(np.int64))
    model = create_student(teacher, params.students[student], "teacher-layers", sample, seed=1)
    switch_off_dropout(model)
    options = params.methods[method]
    objective = OBJECTIVES[options.objective](model, teacher, options, params.distillation.inputs)
    if start is not None:
        objective.start(default_data_collator([start[i] for i in range(24)]))
    return objective


def descend(objective, training: MaskedSequences, folder: Path, accumulation: int, steps=2, rate=0.05) -> dict:
    """Plain gradient descent without clipping: unlike Adam, it shows every factor on a gradient."""
    plain: dict[str, Any] = {"optim": "sgd", "lr_scheduler_type": "constant", "use_cpu": True, "logging_steps": 1}
    arguments = TrainingArguments(
        output_dir=str(folder),
        max_steps=steps,
        per_device_train_batch_size=processes.share(8, accumulation),
        gradient_accumulation_steps=accumulation,
        learning_rate=rate,
        max_grad_norm=0.0,
        **common_arguments(False, 8) | plain | {"eval_strategy": "no", "save_strategy": "no"},
    )
    words, sampled = tiny.tokenizer(folder), training.sampled
    validation = MaskedSequences(training.sequences, training.masking, words, seed=0, sampled=sampled)
    return train(objective, training, validation, arguments, "test")


def distilled(
    folder: Path,
    output: str,
    method: str,
    student: str = "L2-H12",
    seed: int = 1,
    others: Sequence[Run] = (),
    **changes: Any,
) -> dict[str, Any]:
    """One run of the workspace in ``folder``, saved to its folder ``output``: the record."""
    run, layout = tiny.run(folder, method, student, seed, **changes)
    return distil(run, layout, folder / output, others)


def adapted(folder: Path, output: str, **changes: Any) -> dict[str, Any]:
    """The teacher of the workspace in ``folder`` adapted, saved to its folder ``output``: the record."""
    (description,) = tiny.plan(folder, **changes).of(TeacherAdaptation)
    return adapt_teacher(description, Layout(folder, "english"), folder / output)


def encoder_weights(folder: Path) -> dict[str, torch.Tensor]:
    """Weights of a saved model by the names of a bare encoder, those of a head by their own."""
    return {name.removeprefix("bert."): tensor for name, tensor in tiny.weights(folder).items()}


def above_the_projections(parameters) -> set[str]:
    """Of a student of two layers: what lies above the last layer's query, key and value projections."""
    return {
        name
        for name in parameters
        if "encoder.layer.1." in name and not any(f".self.{part}." in name for part in ("query", "key", "value"))
    }
