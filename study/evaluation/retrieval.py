"""Retrieval of translations: what an encoder is worth across languages without any training."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import numpy as np
import torch
from transformers import PreTrainedTokenizerBase

from study.data.tasks import find_task, load_task, subsample
from study.descriptions import Evaluation
from study.evaluation.finetune import Collator, MeanPoolingClassifier, load_encoder, pooled_features
from study.records import ProbeResult
from study.runtime import compute_device, use_bf16


def retrieve(
    description: Evaluation, folder: Path, name: str, tasks: Path, tokenizer: PreTrainedTokenizerBase
) -> ProbeResult:
    """The entry of a probe in a result file: how often a text's nearest neighbour is its translation.

    The encoder saved in ``folder`` is used as it is. A text is represented by the mean of its last hidden states over
    real tokens; the nearest of the N texts in the other language is the one of greatest cosine. Chance is 1 / N.

    Source: the Tatoeba task of XTREME (2003.11080), section 3; both directions after LASER (1812.10464), section 4.4.

    Args:
        tasks: the folder that holds the task ``name``.

    Returns:
        metric, test_examples (N) and languages: language -> from_english and to_english (from_de and to_de where the
        first language is German), accuracies of the nearest neighbours of texts in the first language and of those in
        that language, and accuracy, the mean of both.
    """
    task, dataset, budget = find_task(tasks, name), load_task(tasks, name), description.tasks[name]
    model = MeanPoolingClassifier(load_encoder(description, folder), labels=1, pairs=False).to(compute_device())
    vectors: dict[tuple[str, ...], np.ndarray] = {}
    languages, examples = {}, 0
    first = "english" if task.languages[0] == "en" else task.languages[0]
    for language in (language for language in task.languages[1:] if language in budget.languages):
        pairs = subsample(dataset[task.split("test", language)], budget.test)
        texts = tuple(tuple(pairs[column]) for column in ("text", "text_pair"))
        for side in set(texts) - vectors.keys():  # the English side is the same for every language
            vectors[side] = embed(description, model, side, tokenizer, budget.max_length)
        similarity = vectors[texts[0]] @ vectors[texts[1]].T  # (N, N)
        examples = len(similarity)
        accuracies = {
            direction: float((similarity.argmax(axis=axis) == np.arange(examples)).mean())
            for axis, direction in ((1, f"from_{first}"), (0, f"to_{first}"))
        }
        languages[language] = {"accuracy": sum(accuracies.values()) / 2} | accuracies
    return ProbeResult(metric=task.metric, group=task.group, test_examples=examples, languages=languages)


@torch.inference_mode()
def embed(
    description: Evaluation,
    model: MeanPoolingClassifier,
    texts: Sequence[str],
    tokenizer: PreTrainedTokenizerBase,
    max_length: int,
    batch_size: int = 32,
) -> np.ndarray:
    """(N, width): the pooled states of each text, scaled to length 1.

    Raises:
        StudyError: the model's states are not finite.
    """
    ids = tokenizer(list(texts), truncation=True, max_length=max_length, return_token_type_ids=False)["input_ids"]
    collate = Collator(tokenizer, description.finetuning.pad_to_multiple_of)
    rows = [{"input_ids": tokens} for tokens in ids]
    features, order = pooled_features(model, rows, collate, batch_size, use_bf16(description.precision))
    return torch.nn.functional.normalize(features, dim=1).numpy()[np.argsort(order)]
