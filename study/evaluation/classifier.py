"""A classifier of texts over an encoder, the batches it reads, and reading them."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from study.families import family_of
from study.files import StudyError
from study.runtime import autocast

#: Label of sub-words that stand for no word: special tokens, padding, all but the first of a word.
NO_WORD = -100


class MeanPoolingClassifier(nn.Module):
    """An encoder, mean pooling over real tokens, dropout and one linear layer.

    One text (or a pair encoded jointly) is represented by its pooled states u; a pair encoded separately by
    [u, v, |u - v|, u * v]. Mean pooling instead of [CLS] because no training of teacher or students ever gave [CLS] a
    sentence-level task (the embedded teachers were trained with mean pooling). Source: InferSent (1705.02364), section
    3.2, for the features of a pair; mean pooling after Sentence-BERT (1908.10084).

    Args:
        labels: number of classes; 1 means regression with a mean-squared-error loss.
        pairs: whether two texts come separately.
    """

    accepts_loss_kwargs = False  # its losses are means: the Trainer has to divide under accumulation

    def __init__(self, encoder: PreTrainedModel, labels: int, pairs: bool):
        super().__init__()
        self.encoder = encoder
        self.dropout = nn.Dropout(getattr(encoder.config, family_of(encoder).dropout))
        self.output = nn.Linear(encoder.config.hidden_size * (4 if pairs else 1), labels)

    def features(
        self,
        input_ids: Tensor,
        attention_mask: Tensor,
        pair_input_ids: Tensor | None = None,
        pair_attention_mask: Tensor | None = None,
        token_type_ids: Tensor | None = None,
    ) -> Tensor:
        """(B, T) token ids to (B, H) or, for separate pairs, (B, 4 H), in float32."""
        first = self._pooled(input_ids, attention_mask, token_type_ids)
        if pair_input_ids is None:
            return first
        assert pair_attention_mask is not None
        second = self._pooled(pair_input_ids, pair_attention_mask)
        return torch.cat([first, second, (first - second).abs(), first * second], dim=1)

    def forward(self, labels: Tensor | None = None, **texts: Tensor) -> dict[str, Tensor]:
        logits = self.output(self.dropout(self.features(**texts))).float()  # (B, labels)
        if labels is None:
            return {"logits": logits}
        if self.output.out_features == 1:
            return {"loss": F.mse_loss(logits[:, 0], labels.float()), "logits": logits}
        return {"loss": F.cross_entropy(logits, labels), "logits": logits}

    def _pooled(self, input_ids: Tensor, attention_mask: Tensor, token_type_ids: Tensor | None = None) -> Tensor:
        segments = {} if token_type_ids is None else {"token_type_ids": token_type_ids}
        states = self.encoder(input_ids=input_ids, attention_mask=attention_mask, **segments).last_hidden_state.float()
        weights = attention_mask[..., None].float()  # (B, T, 1)
        return (states * weights).sum(dim=1) / weights.sum(dim=1)


class Collator:
    """Pads each side of a batch to a multiple of ``pad_to_multiple_of`` tokens, so that shapes are few."""

    def __init__(self, tokenizer: PreTrainedTokenizerBase, pad_to_multiple_of: int):
        self.tokenizer, self.pad_to_multiple_of = tokenizer, pad_to_multiple_of

    def __call__(self, rows: list[dict[str, Any]]) -> dict[str, Tensor]:
        batch = self._padded([{key: row[key] for key in ("input_ids", "token_type_ids") if key in row} for row in rows])
        if "pair_input_ids" in rows[0]:
            pair = self._padded([{"input_ids": row["pair_input_ids"]} for row in rows])
            batch |= {f"pair_{key}": value for key, value in pair.items()}
        if "labels" in rows[0]:
            labels = [row["labels"] for row in rows]
            if isinstance(labels[0], list):  # of words
                left = self.tokenizer.padding_side == "left"
                missing = [[NO_WORD] * (batch["input_ids"].shape[1] - len(own)) for own in labels]
                labels = [gap + own if left else own + gap for own, gap in zip(labels, missing, strict=True)]
            batch["labels"] = torch.tensor(labels)
        return batch

    def _padded(self, rows: list[dict[str, Any]]) -> dict[str, Tensor]:
        return dict(self.tokenizer.pad(rows, pad_to_multiple_of=self.pad_to_multiple_of, return_tensors="pt"))


def read_batches(
    model: nn.Module,
    rows: Sequence[dict[str, Any]],
    collate: Collator,
    batch_size: int,
    bf16: bool,
    read: Callable[..., Any] | None = None,
    by_length: bool = False,
) -> Iterator[tuple[list[int], dict[str, Tensor], Any]]:
    """Batch after batch: the places of its rows, the batch, and what a model in evaluation says of it.

    Args:
        read: what of the model reads all of a batch but its labels; None: the model. by_length: short rows first.
    """
    model.eval()
    device, order = next(model.parameters()).device, list(range(len(rows)))
    if by_length:
        order.sort(key=[len(row["input_ids"]) for row in rows].__getitem__)
    for first in range(0, len(rows), batch_size):
        places = order[first : first + batch_size]
        batch = collate([rows[i] for i in places])
        with autocast(device, bf16):
            found = (read or model)(**{key: x.to(device) for key, x in batch.items() if key != "labels"})
        yield places, batch, found


def finite(states: Tensor) -> Tensor:
    """The states.

    Raises:
        StudyError: they are not finite.
    """
    if not states.isfinite().all():
        raise StudyError("the encoder's states are not finite, no result written")
    return states
