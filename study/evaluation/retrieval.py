"""Retrieval of translations: what an encoder is worth across languages without any training."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
import torch
from datasets import Dataset
from transformers import PreTrainedTokenizerBase

from study.data.tasks import find_task, load_task, subsample
from study.descriptions import Evaluation
from study.evaluation.finetune import Collator, MeanPoolingClassifier, load_encoder, pooled_features
from study.files import StudyError
from study.records import ProbeResult
from study.runtime import compute_device, use_bf16


def retrieve(
    description: Evaluation, folder: Path, name: str, tasks: Path, tokenizer: PreTrainedTokenizerBase
) -> ProbeResult:
    """The entry of a probe in a result file: how often a text's nearest neighbour is its translation.

    The encoder saved in ``folder`` is used as it is. A text is represented by the mean of its last hidden states over
    real tokens; the nearest of the N texts in the other language is the one of greatest cosine. Chance is 1 / N.

    Source: the Tatoeba task of XTREME (2003.11080), section 3; both directions after LASER (1812.10464), section 4.4.

    Development data, where the task's budget names a number of them, are pairs that its test leaves over.

    Args:
        tasks: the folder that holds the task ``name``.

    Returns:
        metric, test_examples (N) and languages: language -> from_english and to_english (from_de and to_de where the
        first language is German), accuracies of the nearest neighbours of texts in the first language and of those in
        that language, and accuracy, the mean of both; development: language -> accuracy.

    Raises:
        StudyError: the test leaves too few pairs over; the model's states are not finite.
    """
    task, dataset, budget = find_task(tasks, name), load_task(tasks, name), description.tasks[name]
    model = MeanPoolingClassifier(load_encoder(description, folder), labels=1, pairs=False).to(compute_device())
    embedded = cache(lambda texts: embed(description, model, texts, tokenizer, budget.max_length))
    languages, development, examples = {}, {}, 0
    first = "english" if task.languages[0] == "en" else task.languages[0]
    for language in (language for language in task.languages[1:] if language in budget.languages):
        pairs = dataset[task.split("test", language)]
        tested = subsample(pairs, budget.test)
        examples = len(tested)
        there, back = _accuracies(tested, embedded)
        languages[language] = {"accuracy": (there + back) / 2, f"from_{first}": there, f"to_{first}": back}
        if budget.development:
            left = subsample(pairs, budget.development, after=examples)
            if len(left) < budget.development:
                told = f"allowed: null (none), or up to {len(left)}, the pairs that test = {budget.test} leaves over"
                raise StudyError(f"finetuning.tasks.{name}.development = {budget.development}; {told}")
            development[language] = sum(_accuracies(left, embedded)) / 2
    shared: dict[str, Any] = {"metric": task.metric, "group": task.group, "test_examples": examples}
    return ProbeResult(**shared, languages=languages, development=development)


def _accuracies(pairs: Dataset, embedded: Callable[[tuple[str, ...]], np.ndarray]) -> tuple[float, float]:
    """How often the nearest neighbour is the translation: of texts in the first language, and the way back."""
    first, other = (embedded(tuple(pairs[column])) for column in ("text", "text_pair"))  # English: the same for all
    similarity = first @ other.T  # (N, N)
    there, back = (float((similarity.argmax(axis=axis) == np.arange(len(pairs))).mean()) for axis in (1, 0))
    return there, back


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
