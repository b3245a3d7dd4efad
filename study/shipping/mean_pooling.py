"""A text classifier over mean pooled states, by ``AutoModelForSequenceClassification``, without the study.

A copy of this file lies in every exported classifier, since no class of transformers pools BERT's states by their mean.
"""

import torch
from torch import nn
from transformers import AutoModel, PreTrainedModel
from transformers.modeling_outputs import SequenceClassifierOutput


class MeanPoolingForSequenceClassification(PreTrainedModel):
    """An encoder, the mean of its last states over real tokens, and one linear layer: (B, T) ids to (B, labels)."""

    base_model_prefix = "encoder"

    def __init__(self, config):
        super().__init__(config)
        self.encoder = AutoModel.from_config(config, add_pooling_layer=False)
        self.output = nn.Linear(config.hidden_size, config.num_labels)
        self.post_init()

    def forward(self, input_ids, attention_mask=None, labels=None, **ignored):
        mask = torch.ones_like(input_ids) if attention_mask is None else attention_mask
        states = self.encoder(input_ids=input_ids, attention_mask=mask).last_hidden_state
        weights = mask[..., None].to(states.dtype)
        logits = self.output((states * weights).sum(dim=1) / weights.sum(dim=1))
        loss = None if labels is None else nn.functional.cross_entropy(logits, labels)
        return SequenceClassifierOutput(loss=loss, logits=logits)
