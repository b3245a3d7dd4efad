"""Objectives of the output: masked words themselves, or the teacher's distribution over them."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from transformers import PreTrainedModel, default_data_collator

from study import methods
from study.distillation.masking import MaskedSequences
from study.distillation.objectives.base import Batch, Objective, gather, masked_cross_entropy, masked_logits
from study.distillation.taps import Activations, Layers, read_activations
from study.runtime import autocast, compute_device


class MaskedLanguageModelling(Objective):
    """No teacher: cross-entropy of the masked tokens. The baseline, and how the teacher itself is adapted."""

    needs_head = True
    needs_teacher = False

    def loss(self, student: Activations, teacher: Activations | None, batch: Batch) -> Tensor:
        return masked_cross_entropy(masked_logits(self.student, student, batch["positions"]), batch["labels"])


_POSITIONS = {"masked": "positions", "sampled": "sampled"}  # option -> key of the batch


class OutputDistribution(Objective):
    """Divergence of the distributions at the masked positions, a sample of all or all, plus weighted MLM if asked for.

    A sample is as large as the masked positions are and drawn anew at every reading: its loss has the expectation of
    that of all positions at a seventh of the cost (this study's choice).

    The divergence is :func:`study.distillation.losses.output_distribution`.
    """

    needs_head = True
    method: methods.OutputDistribution

    @staticmethod
    def layers_read(method: Any, teacher_layers: int, student_layers: int) -> Layers:
        return {"hidden_layers": {teacher_layers}}

    def loss(self, student: Activations, teacher: Activations | None, batch: Batch) -> Tensor:
        assert self.teacher is not None and teacher is not None
        positions = None if self.method.positions == "all" else batch[_POSITIONS[self.method.positions]]
        student_logits = masked_logits(self.student, student, positions)
        with torch.no_grad():
            teacher_logits = masked_logits(self.teacher, teacher, positions)
        loss = self.losses.output_distribution(student_logits, teacher_logits, self.method.temperature)
        if self.method.mlm_weight:
            masked = student_logits
            if self.method.positions == "all":
                masked = gather(student_logits, batch["positions"])
            elif self.method.positions == "sampled":
                masked = masked_logits(self.student, student, batch["positions"])
            loss = loss + self.method.mlm_weight * masked_cross_entropy(masked, batch["labels"])
        return loss


@torch.inference_mode()
def masked_words(
    model: PreTrainedModel, sequences: MaskedSequences, bf16: bool, batch_size: int = 16
) -> tuple[float, float]:
    """Mean cross-entropy in nats and accuracy over the masked tokens of held-out text."""
    model.eval().to(compute_device())
    losses, hits = [], []
    for first in range(0, len(sequences), batch_size):
        batch = default_data_collator([sequences[i] for i in range(first, min(first + batch_size, len(sequences)))])
        batch = {key: x.to(model.device) for key, x in batch.items()}
        with autocast(model.device, bf16):
            layers = [model.config.num_hidden_layers]
            activations = read_activations(model, batch["masked_input_ids"], hidden_layers=layers)
            logits = masked_logits(model, activations, batch["positions"])
        losses.append(masked_cross_entropy(logits, batch["labels"]).item() * len(batch["labels"]))
        hits.append((logits.argmax(dim=-1) == batch["labels"]).float().mean(dim=1).sum().item())
    return sum(losses) / len(sequences), sum(hits) / len(sequences)
