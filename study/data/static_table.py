"""A static table: one vector a token and no layers, made from a teacher; the extreme of latency."""

from __future__ import annotations

import re
from typing import Any

import torch
from torch import Tensor, nn
from transformers import AutoConfig, AutoModel, PreTrainedConfig, PreTrainedModel, PreTrainedTokenizerBase
from transformers.modeling_outputs import BaseModelOutput

from study.families import STATIC_TABLE

#: Tokens read at once.
BATCH = 512
UNUSED = re.compile(r"\[unused\d+\]")


class StaticTableConfig(PreTrainedConfig):
    model_type = STATIC_TABLE
    vocab_size: int = 0
    hidden_size: int = 0
    num_hidden_layers: int = 0
    hidden_dropout_prob: float = 0.1


class StaticTable(PreTrainedModel):
    """The states (B, T, width) of a text are the rows of its tokens, whatever stands around them."""

    config_class = StaticTableConfig
    _supports_sdpa = True  # there is no attention to choose for

    def __init__(self, config: StaticTableConfig):
        super().__init__(config)
        self.embeddings = nn.Embedding(config.vocab_size, config.hidden_size)
        self.post_init()

    def get_input_embeddings(self) -> nn.Embedding:
        return self.embeddings

    def forward(self, input_ids: Tensor, **ignored: Any) -> BaseModelOutput:
        return BaseModelOutput(last_hidden_state=self.embeddings(input_ids))


AutoConfig.register(STATIC_TABLE, StaticTableConfig)
AutoModel.register(StaticTableConfig, StaticTable)


@torch.no_grad()
def static_table(
    encoder: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, width: int, smoothing: float
) -> StaticTable:
    r"""The table of a teacher's vocabulary.

    For token w, t_w is the mean of the last hidden states of [CLS] w [SEP]. With P the ``width`` leading principal
    directions of all t (centred) and a = ``smoothing``, its row is

        a / (a + p_w) * P (t_w - mean t),    p_w = (1 / (r_w + 1)) / sum_v 1 / (r_v + 1),

    r_w = 1, 2, ... the token's place in the vocabulary, taken for its rank in frequency (Zipf's law). Tokens that are
    special or unused have no place, and a row of zeros.

    Source: model2vec 0.10 (its public code), which also scales the mean of a text's rows to length 1, and which stores
    half precision; SIF weights after Arora et al. (2017).
    """
    vocabulary = tokenizer.get_vocab()
    special = set(tokenizer.all_special_ids)
    tokens = sorted(i for word, i in vocabulary.items() if i not in special and not UNUSED.fullmatch(word))
    encoder.eval()
    means = [
        encoder(input_ids=_alone(torch.tensor(tokens[first : first + BATCH]), tokenizer)).last_hidden_state.mean(dim=1)
        for first in range(0, len(tokens), BATCH)
    ]
    vectors = torch.cat(means).double()
    vectors = vectors - vectors.mean(dim=0)
    directions = torch.linalg.eigh(vectors.T @ vectors).eigenvectors.flip(1)[:, :width]
    inverse_rank = 1 / torch.arange(2, len(tokens) + 2, dtype=torch.double)
    weights = smoothing / (smoothing + inverse_rank / inverse_rank.sum())
    table = StaticTable(StaticTableConfig(vocab_size=encoder.config.vocab_size, hidden_size=width))
    table.embeddings.weight.zero_()
    table.embeddings.weight[tokens] = (weights[:, None] * (vectors @ directions)).float()
    return table


def _alone(tokens: Tensor, tokenizer: PreTrainedTokenizerBase) -> Tensor:
    """(N,) to (N, 3): every token between the special tokens of a text."""
    before, after = (torch.full_like(tokens, i) for i in (tokenizer.cls_token_id, tokenizer.sep_token_id))
    return torch.stack([before, tokens, after], dim=1)
