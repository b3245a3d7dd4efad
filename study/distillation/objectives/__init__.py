"""The objectives of distillation by name; a family of methods has a module each."""

from __future__ import annotations

from study.distillation.objectives.attention import AttentionRelation, DirectAttention
from study.distillation.objectives.base import Objective
from study.distillation.objectives.hidden_state import HiddenState
from study.distillation.objectives.output import MaskedLanguageModelling, OutputDistribution
from study.distillation.objectives.sentence import SentenceEmbedding

#: ``methods.<name>.objective`` in params.yaml -> its module.
OBJECTIVES: dict[str, type[Objective]] = {
    "masked_language_modelling": MaskedLanguageModelling,
    "output_distribution": OutputDistribution,
    "hidden_state": HiddenState,
    "attention_relation": AttentionRelation,
    "direct_attention": DirectAttention,
    "sentence_embedding": SentenceEmbedding,
}
