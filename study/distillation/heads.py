"""The language-modelling head: giving a teacher one, and finding its parts in models of several families."""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn
from transformers import AutoModelForMaskedLM, PreTrainedModel

from study.families import family_of, part


def with_language_modelling_head(encoder: PreTrainedModel, token_counts: Tensor) -> PreTrainedModel:
    """The encoder under a masked-language-modelling head whose output matrix is tied to the word embeddings.

    The head starts neutral: its dense layer as the identity, its bias as the log relative frequency of each token
    (add-one smoothed), so that training starts from the unigram distribution. Source: this study's choice.

    Args:
        token_counts: (vocabulary,), how often each token occurs in the corpus.
    """
    config = copy.deepcopy(encoder.config)
    config.tie_word_embeddings = True  # whatever the encoder's own file says: an untied matrix would start at random
    if hasattr(config, "decoder_bias"):
        config.decoder_bias = True  # ModernBERT may go without
    model = AutoModelForMaskedLM.from_config(config, attn_implementation=encoder.config._attn_implementation)
    model.base_model.load_state_dict(encoder.state_dict())
    frequencies = (token_counts.double() + 1) / (token_counts.sum() + len(token_counts))
    with torch.no_grad():
        nn.init.eye_(dense_of_head(model).weight)
        model.get_output_embeddings().bias.copy_(frequencies.log())
    return model


def language_modelling_head(model: PreTrainedModel) -> Callable[[Tensor], Tensor]:
    """What maps hidden states (..., width) to logits (..., vocabulary)."""
    modules = [getattr(model, name) for name in family_of(model).head]
    return modules[0] if len(modules) == 1 else nn.Sequential(*modules)


def dense_of_head(model: PreTrainedModel) -> Any:
    """The head's linear layer before its layer norm and the vocabulary projection."""
    return part(model, family_of(model).dense)


def norm_of_head(model: PreTrainedModel) -> Any:
    """The head's layer norm, between its dense layer and the vocabulary projection."""
    return part(model, family_of(model).norm)
