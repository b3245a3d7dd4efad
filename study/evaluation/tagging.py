"""Tasks that tag every word of a text: words among sub-words, a classifier of words, entities and their F1."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from datasets import Dataset
from torch import Tensor
from torch.nn import functional as F
from torch.nn.utils.rnn import pad_sequence
from transformers import PreTrainedTokenizerBase

from study.evaluation.classifier import NO_WORD, Collator, MeanPoolingClassifier, finite, read_batches
from study.files import StudyError

#: Words that a probe is fitted on at most, the first of the training examples. Source: this study's choice.
PROBED = 20_000


class WordClassifier(MeanPoolingClassifier):
    """An encoder, dropout and one linear layer over the state of each word's first sub-word.

    Source: BERT (1810.04805), section 5.3, which tags a word by its first sub-word.
    """

    def forward(self, labels: Tensor | None = None, **texts: Tensor) -> dict[str, Tensor]:
        """(B, T) token ids to logits (B, T, labels); the loss is the mean cross-entropy over words."""
        logits = self.output(self.dropout(self.encoder(**texts).last_hidden_state.float())).float()
        if labels is None:
            return {"logits": logits}
        return {"loss": F.cross_entropy(logits.flatten(0, 1), labels.flatten(), ignore_index=NO_WORD), "logits": logits}


def align(texts: Sequence[str], tags: Sequence[Sequence[int]], tokenizer: PreTrainedTokenizerBase, max_length: int):
    """Columns of texts whose words are set off by single blanks: ``input_ids`` and, of the same length, ``labels``.

    A word's tag is that of its first sub-word, the one that its first character is in. Words beyond ``max_length``
    tokens, and those that the tokenizer drops, have none: they are neither learnt nor scored.

    Raises:
        StudyError: a tokenizer that does not say which characters a token stands for.
    """
    if not tokenizer.is_fast:
        raise StudyError("tagging words needs a fast tokenizer, which says where tokens are; allowed: one in Rust")
    columns: Any = tokenizer(list(texts), truncation=True, max_length=max_length, return_attention_mask=False)
    labels = []
    for row, (text, own) in enumerate(zip(texts, tags, strict=True)):
        aligned, start = [NO_WORD] * len(columns["input_ids"][row]), 0
        for word, tag in zip(text.split(" "), own, strict=True):
            token = columns.char_to_token(row, start)
            if token is not None:
                aligned[token] = tag
            start += len(word) + 1
        labels.append(aligned)
    return {**columns, "labels": labels}


@torch.no_grad()
def word_features(
    model: WordClassifier, rows: Dataset, collate: Collator, batch_size: int, bf16: bool
) -> tuple[np.ndarray, np.ndarray]:
    """States (N, H) of the first PROBED words of the examples, as the encoder gives them, and their tags (N,)."""
    states, tags = [], []
    for _, batch, found in read_batches(model, rows, collate, batch_size, bf16, model.encoder):
        words = batch["labels"] != NO_WORD
        states.append(found.last_hidden_state.float().cpu()[words])
        tags.append(batch["labels"][words])
        if sum(map(len, tags)) >= PROBED:
            break
    return finite(torch.cat(states)[:PROBED]).numpy(), torch.cat(tags)[:PROBED].numpy()


@torch.no_grad()
def tagged(
    model: WordClassifier, rows: Dataset, collate: Collator, batch_size: int, bf16: bool
) -> tuple[np.ndarray, np.ndarray]:
    """Logits (N, T, labels) and tags (N, T) of examples by a model as it is; what stands for no word is NO_WORD."""
    logits: list[Tensor] = []
    labels: list[Tensor] = []
    for _, batch, found in read_batches(model, rows, collate, batch_size, bf16):
        logits += found["logits"].cpu()
        labels += batch["labels"]
    return (
        pad_sequence(logits, batch_first=True).numpy(),
        pad_sequence(labels, batch_first=True, padding_value=NO_WORD).numpy(),
    )


def entities(tags: Sequence[str]) -> set[tuple[int, int, str]]:
    """Entities of a sequence of tags: first word, the one behind the last, kind.

    Tags are O, or B-, I-, E-, L-, S- or U- and a kind. An entity begins at B, S or U, and wherever its kind does not go
    on: behind another kind, O, or the end (E, L, S, U) of the one before. IOB1, IOB2, IOBES and BILOU are read so.

    Source: the script conlleval of the shared tasks of CoNLL-2000 and 2003; seqeval by default.
    """
    found, start, before, kind_before = set(), 0, "O", ""
    for place, tag in enumerate([*tags, "O"]):
        prefix, _, kind = tag.partition("-")
        goes_on = kind == kind_before and prefix not in "BSU" and before not in "ELSU"
        if kind_before and not goes_on:
            found.add((start, place, kind_before))
        if kind and not (kind_before and goes_on):
            start = place
        before, kind_before = prefix, kind
    return found


def entity_f1(predicted: Sequence[Sequence[str]], gold: Sequence[Sequence[str]]) -> float:
    r"""F1 of entities, over all sequences and kinds together: one is right if its words and its kind are.

    .. math:: F_1 = \frac{2 \, |P \cap G|}{|P| + |G|}

    0 where there are none.
    """
    pairs = [(entities(one), entities(other)) for one, other in zip(predicted, gold, strict=True)]
    found, total = sum(len(p & g) for p, g in pairs), sum(len(p) + len(g) for p, g in pairs)
    return 2 * found / total if total else 0.0


def tag_metrics(
    names: Sequence[str], metrics: Sequence[str], outputs: np.ndarray, labels: np.ndarray
) -> dict[str, float]:
    """``entity_f1`` and ``accuracy`` (share of words with the right tag), those of ``metrics``.

    Args:
        outputs: logits (N, T, tags). labels: (N, T), NO_WORD where no word is.
    """
    predicted, words = outputs.argmax(axis=-1), labels != NO_WORD
    rows = [
        ([names[tag] for tag in one[word]], [names[tag] for tag in own[word]])
        for one, own, word in zip(predicted, labels, words, strict=True)
    ]
    values = {
        "entity_f1": lambda: entity_f1([one for one, _ in rows], [own for _, own in rows]),
        "accuracy": lambda: float((predicted == labels)[words].mean()) if words.any() else 0.0,
    }
    return {name: values[name]() for name in metrics}
