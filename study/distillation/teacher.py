"""Adaptation of a teacher: the masked language modelling that gives it an output distribution to transfer."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import torch
from transformers import EarlyStoppingCallback, TrainingArguments

from study import methods
from study.data.corpus import corpus_hash, load_corpus
from study.data.pretrained import load_model, load_tokenizer
from study.descriptions import TEACHER, TeacherAdaptation
from study.distillation.heads import with_language_modelling_head
from study.distillation.masking import MaskedSequences
from study.distillation.objectives.output import MaskedLanguageModelling
from study.distillation.trainer import Checkpoints, common_arguments, save_trained, switch_off_dropout, train
from study.files import Layout, content_hash, make_folder
from study.records import Training
from study.runtime import keep_freed_memory, use_bf16


def adapt_teacher(description: TeacherAdaptation, layout: Layout, output: Path) -> dict[str, Any]:
    """Continue MLM training of the setting's encoder on the corpus and save it to ``output`` with its ``record.json``.

    It stops at ``adaptation.steps``, or earlier once the held-out MLM loss has improved by less than
    ``adaptation.min_improvement`` nats in ``adaptation.patience`` evaluations in a row. One that was killed continues
    from its last checkpoint. With ``adaptation.head_only`` the encoder stays as it is, word embeddings and so the
    output matrix too: what is fitted is the head's dense layer, its norm and its bias.

    Returns:
        The record, as of :func:`study.distillation.distil.distil`; ``hashes`` are of corpus and encoder.

    Raises:
        StudyError: a missing input, or a folder that cannot be written.
        DivergedError: a loss that is not finite.
    """
    budget, bf16 = description.adaptation, use_bf16(description.precision)
    make_folder(output.parent)  # before any work
    tokenizer = load_tokenizer(layout.encoder)
    corpus = load_corpus(layout.corpus)
    encoder = load_model(layout.encoder, description.attention_implementation, head=False)
    tokens = torch.from_numpy(
        np.concatenate([batch["input_ids"].ravel() for batch in corpus["train"].with_format("numpy").iter(1024)])
    )
    model = with_language_modelling_head(encoder, torch.bincount(tokens.long(), minlength=encoder.config.vocab_size))
    switch_off_dropout(model)
    model.base_model.requires_grad_(not budget.head_only)
    method = methods.MaskedLanguageModelling(
        objective="masked_language_modelling", learning_rate=budget.learning_rate, inputs="masked"
    )
    hashes = {"corpus": corpus_hash(layout.corpus), "encoder": content_hash(layout.encoder)}
    record: dict[str, Any] = {
        "run": {"setting": description.setting, "method": TEACHER, "student": TEACHER, "seed": 0},
        "hashes": hashes,
    }
    if "kept-memory" in description.fast_paths:
        keep_freed_memory()
    identity = {"teacher": description.model_dump(mode="json"), "inputs": hashes}
    with Checkpoints(layout.checkpoints, identity) as folder:
        arguments = TrainingArguments(
            output_dir=str(folder),
            max_steps=budget.steps,
            per_device_train_batch_size=budget.batch_size,
            learning_rate=budget.learning_rate,
            warmup_steps=budget.warmup_steps,
            weight_decay=budget.weight_decay,
            eval_steps=budget.evaluate_every,
            save_steps=budget.evaluate_every,
            metric_for_best_model="eval_loss",
            greater_is_better=False,
            seed=0,
            **common_arguments(bf16, budget.batch_size),
        )
        trained = train(
            MaskedLanguageModelling(model, None, method),
            MaskedSequences(corpus["train"], description.masking, tokenizer, 0, budget.steps * budget.batch_size),
            MaskedSequences(corpus["validation"], description.masking, tokenizer, seed=0),
            arguments,
            f"{description.setting} teacher",
            [EarlyStoppingCallback(budget.patience, budget.min_improvement)],
        )
        ended = "step limit" if trained["steps"] == budget.steps else "held-out loss no longer improves"
        record["training"] = Training(
            objective=method.objective,
            learning_rate=budget.learning_rate,
            options=method.model_dump(),
            revisions=description.revisions,
            inputs=method.inputs,
            fast_paths=list(description.fast_paths),
            stopped=ended,
            **trained,
        ).model_dump(exclude_none=True)
        save_trained(model, tokenizer, record, output)
    return record
