"""Which word stands at a mask: what an encoder's states hold of the words around, without any training of it."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import torch
from datasets import Dataset
from sklearn.discriminant_analysis import LinearDiscriminantAnalysis
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from study.data.pretrained import load_model
from study.data.tasks import TASKS, load_task, split_in, subsample
from study.evaluation.finetune import Judging
from study.files import StudyError
from study.records import ProbeResult
from study.runtime import keep_freed_memory, use_bf16


def guess_masked_words(
    description: Judging, folder: Path, name: str, tasks: Path, tokenizer: PreTrainedTokenizerBase
) -> ProbeResult:
    """The entry of a masked-word probe in a result file: how often the word at the mask is told right.

    The encoder saved in ``folder`` is used as it is. In each language, a linear discriminant (its covariance shrunk
    after Ledoit and Wolf, so that nothing is to be tuned) learns from the last hidden states at the masks of the
    training examples and is scored on the other splits. Chance is 1 / number of words.

    Source: this study's choice. It needs neither labels nor a language-modelling head: every method can take it.

    Args:
        tasks: the folder that holds the task ``name``.

    Raises:
        StudyError: the encoder's states are not finite.
    """
    task, dataset, budget = TASKS[name], load_task(tasks, name), description.tasks[name]
    if "kept-memory" in description.fast_paths:
        keep_freed_memory()
    encoder = load_model(folder, description.attention_implementation, head=False)
    sizes = {"train": budget.train, "development": budget.development, "test": budget.test}
    scores: dict[str, dict[str, float]] = {}
    examples = 0
    for language in (language for language in task.languages if language in budget.languages):
        states, words = {}, {}
        for split, size in sizes.items():
            rows = subsample(dataset[split_in(split, language)], size)
            states[split] = states_at_masks(
                encoder, rows, tokenizer, budget.max_length, use_bf16(description.precision)
            )
            words[split] = np.array(rows["label"])
        readout = LinearDiscriminantAnalysis(solver="lsqr", shrinkage="auto").fit(states["train"], words["train"])
        scores[language] = {
            split: float(readout.score(states[split], words[split])) for split in ("development", "test")
        }
        examples = max(examples, len(words["test"]))
    return ProbeResult(
        metric=task.metric,
        group=task.group,
        test_examples=examples,
        development={language: score["development"] for language, score in scores.items()},
        languages={language: {task.metric: score["test"]} for language, score in scores.items()},
    )


@torch.inference_mode()
def states_at_masks(
    encoder: PreTrainedModel,
    rows: Dataset,
    tokenizer: PreTrainedTokenizerBase,
    max_length: int,
    bf16: bool,
    batch_size: int = 64,
) -> np.ndarray:
    """(N, width): the last hidden state at the mask between ``text`` and ``text_pair`` of each row.

    Raises:
        StudyError: a text is longer than ``max_length`` tokens, or the states are not finite.
    """
    encoder.eval()
    texts = [
        f"{before}{tokenizer.mask_token}{after}" for before, after in zip(rows["text"], rows["text_pair"], strict=True)
    ]
    ids = tokenizer(texts)["input_ids"]
    longest = max(map(len, ids))
    if longest > max_length:
        raise StudyError(f"masked words: a text has {longest} tokens; allowed: at most max_length = {max_length}")
    states = np.empty((len(ids), encoder.config.hidden_size), dtype=np.float32)
    order = sorted(range(len(ids)), key=lambda i: len(ids[i]))
    for first in range(0, len(order), batch_size):
        chosen = order[first : first + batch_size]
        batch = tokenizer.pad({"input_ids": [ids[i] for i in chosen]}, return_tensors="pt").to(encoder.device)
        with torch.autocast(encoder.device.type, dtype=torch.bfloat16, enabled=bf16):
            output = encoder(**batch).last_hidden_state
        at_mask = batch["input_ids"] == tokenizer.mask_token_id
        states[chosen] = output[at_mask].float().cpu().numpy()
    if not np.isfinite(states).all():
        raise StudyError("the encoder's states are not finite, no result written")
    return states
