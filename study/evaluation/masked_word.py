"""Which word stands at a mask: what an encoder's states hold of the words around, without any training of it."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import numpy as np
import torch
from datasets import Dataset
from sklearn.discriminant_analysis import LinearDiscriminantAnalysis
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from study.data.tasks import find_task, load_task, subsample
from study.evaluation.classifier import Collator, finite, read_batches
from study.evaluation.finetune import Judging, load_encoder
from study.files import StudyError
from study.records import ProbeResult
from study.runtime import use_bf16


def guess_masked_words(
    description: Judging, folder: Path, name: str, tasks: Path, tokenizer: PreTrainedTokenizerBase
) -> ProbeResult:
    """The entry of a masked-word probe in a result file: how often the word at the mask is told right.

    Args, Raises: as :func:`masked_word_scores`, whose scores of development and test data these are.
    """
    task, budget = find_task(tasks, name), description.tasks[name]
    scores = masked_word_scores(description, folder, name, tasks, tokenizer, ("development", "test"))
    dataset = load_task(tasks, name)
    return ProbeResult(
        metric=task.metric,
        group=task.group,
        test_examples=max(len(subsample(dataset[task.split("test", language)], budget.test)) for language in scores),
        development={language: own["development"] for language, own in scores.items()},
        languages={language: {task.metric: own["test"]} for language, own in scores.items()},
    )


def masked_word_scores(
    description: Judging,
    folder: Path,
    name: str,
    tasks: Path,
    tokenizer: PreTrainedTokenizerBase,
    splits: Sequence[str] = ("development",),
) -> dict[str, dict[str, float]]:
    """Language -> split -> accuracy of a readout of an encoder's states at masks; other splits are not touched.

    The encoder saved in ``folder`` is used as it is. In each language, a linear discriminant (its covariance shrunk
    after Ledoit and Wolf, so that nothing is to be tuned) learns from the last hidden states at the masks of the
    training examples. Chance is 1 / number of words.

    Source: this study's choice. It needs neither labels nor a language-modelling head: every method can take it.

    Args:
        tasks: the folder that holds the task ``name``. splits: those to score.

    Raises:
        StudyError: a text is too long, or the encoder's states are not finite.
    """
    task, dataset, budget = find_task(tasks, name), load_task(tasks, name), description.tasks[name]
    encoder = load_encoder(description, folder)
    collate, bf16 = Collator(tokenizer, description.finetuning.pad_to_multiple_of), use_bf16(description.precision)

    def states_and_words(split: str, language: str) -> tuple[np.ndarray, list[str]]:
        rows = subsample(dataset[task.split(split, language)], getattr(budget, split))
        return states_at_masks(encoder, rows, collate, budget.max_length, bf16), list(rows["label"])

    scores: dict[str, dict[str, float]] = {}
    for language in (language for language in task.languages if language in budget.languages):
        readout = LinearDiscriminantAnalysis(solver="lsqr", shrinkage="auto")
        readout.fit(*states_and_words("train", language))
        scores[language] = {split: float(readout.score(*states_and_words(split, language))) for split in splits}
    return scores


@torch.inference_mode()
def states_at_masks(
    encoder: PreTrainedModel, rows: Dataset, collate: Collator, max_length: int, bf16: bool, batch_size: int = 64
) -> np.ndarray:
    """(N, width): the last hidden state at the mask between ``text`` and ``text_pair`` of each row.

    Raises:
        StudyError: a text is longer than ``max_length`` tokens, or the states are not finite.
    """
    tokenizer = collate.tokenizer
    pairs = zip(rows["text"], rows["text_pair"], strict=True)
    ids = tokenizer([f"{before}{tokenizer.mask_token}{after}" for before, after in pairs])["input_ids"]
    longest = max(map(len, ids))
    if longest > max_length:
        raise StudyError(f"masked words: a text has {longest} tokens; allowed: at most max_length = {max_length}")
    states = torch.empty(len(ids), encoder.config.hidden_size)
    texts = [{"input_ids": own} for own in ids]
    for places, batch, found in read_batches(encoder, texts, collate, batch_size, bf16, by_length=True):
        states[places] = found.last_hidden_state.float().cpu()[batch["input_ids"] == tokenizer.mask_token_id]
    return finite(states).numpy()
