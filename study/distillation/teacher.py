"""The teacher's output distribution: that of its own head, or one that masked language modelling gives it."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import numpy as np
import torch
from transformers import EarlyStoppingCallback, PreTrainedTokenizerBase, TrainingArguments

from study import methods
from study.data.corpus import corpus_hash, load_corpus
from study.data.pretrained import load_model, load_tokenizer
from study.descriptions import TEACHER, TeacherAdaptation
from study.distillation.heads import with_language_modelling_head
from study.distillation.masking import MaskedSequences
from study.distillation.objectives.output import MaskedLanguageModelling, masked_words
from study.distillation.trainer import Checkpoints, applied, common_arguments, save_trained, switch_off_dropout, train
from study.files import Layout, StudyError, content_hash, make_folder
from study.records import CurvePoint, Training
from study.runtime import keep_freed_memory, use_bf16


def adapt_teacher(description: TeacherAdaptation, layout: Layout, output: Path) -> dict[str, Any]:
    """Continue MLM training of the setting's encoder on the corpus and save it to ``output`` with its ``record.json``.

    It stops at ``adaptation.steps``, or earlier once the held-out MLM loss has improved by less than
    ``adaptation.min_improvement`` nats in ``adaptation.patience`` evaluations in a row. One that was killed continues
    from its last checkpoint. With ``adaptation.head_only`` the encoder stays as it is, word embeddings and so the
    output matrix too: what is fitted is the head's dense layer, its norm and its bias. A teacher with a head of its own
    (``head: own``) is taken as it is, and its held-out loss measured.

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
    held_out = MaskedSequences(corpus["validation"], description.masking, tokenizer, seed=0)
    hashes = {"corpus": corpus_hash(layout.corpus), "encoder": content_hash(layout.encoder)}
    record: dict[str, Any] = {
        "run": {"setting": description.setting, "method": TEACHER, "student": TEACHER, "seed": 0},
        "hashes": hashes,
    }
    if description.head == "own":
        return _as_it_is(description, layout, held_out, tokenizer, record, output)
    encoder = load_model(layout.encoder, description.attention_implementation, head=False)
    occurrences = np.zeros(encoder.config.vocab_size, dtype=np.int64)
    for batch in corpus["train"].with_format("numpy").iter(1024):
        occurrences += np.bincount(batch["input_ids"].ravel(), minlength=len(occurrences))
    model = with_language_modelling_head(encoder, torch.from_numpy(occurrences))
    switch_off_dropout(model)
    model.base_model.requires_grad_(not budget.head_only)
    method = methods.MaskedLanguageModelling(
        objective="masked_language_modelling", learning_rate=budget.learning_rate, inputs="masked"
    )
    paths = applied(description.fast_paths)
    if "kept-memory" in paths:
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
            held_out,
            arguments,
            f"{description.setting} teacher",
            [EarlyStoppingCallback(budget.patience, budget.min_improvement)],
            "cuda-graphs" in paths,
        )
        ended = "step limit" if trained["steps"] == budget.steps else "held-out loss no longer improves"
        record["training"] = Training(
            objective=method.objective,
            learning_rate=budget.learning_rate,
            options=method.model_dump(),
            revisions=description.revisions,
            inputs=method.inputs,
            fast_paths=list(paths),
            stopped=ended,
            **trained,
        ).model_dump(exclude_none=True)
        save_trained(model, tokenizer, record, output)
    return record


def _as_it_is(
    description: TeacherAdaptation,
    layout: Layout,
    held_out: MaskedSequences,
    tokenizer: PreTrainedTokenizerBase,
    record: dict[str, Any],
    output: Path,
) -> dict[str, Any]:
    model, bf16 = load_model(layout.encoder, description.attention_implementation), use_bf16(description.precision)
    loss, accuracy = masked_words(model, held_out, bf16)
    if not math.isfinite(loss):
        raise StudyError(f"{layout.encoder}: the held-out loss of its own head is {loss}; allowed: a finite one")
    print(
        f"{description.setting} teacher | its own head | held-out loss {loss:.4g}, accuracy {accuracy:.1%}", flush=True
    )
    record["training"] = Training(
        objective="masked_language_modelling",
        learning_rate=0.0,
        revisions=description.revisions,
        steps=0,
        tokens=0,
        seconds=0.0,
        tokens_per_second=0.0,
        precision="bf16" if bf16 else "fp32",
        threads=torch.get_num_threads(),
        curve=[CurvePoint(step=0, tokens=0, seconds=0.0, loss=loss)],
        stopped="not trained: the checkpoint's own head",
    ).model_dump(exclude_none=True)
    save_trained(model, tokenizer, record, output)
    return record
