"""Attention as it is: unnormalised scores (TinyBERT), or distributions of the last layer (MiniLM)."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from study import methods
from study.distillation import losses
from study.distillation.mappings import layer_mapping
from study.distillation.objectives.base import Batch, Objective
from study.distillation.taps import Activations, Layers
from study.files import StudyError


class AttentionMaps(Objective):
    """Common to both: scores of student and teacher, head by head, from their queries and keys.

    Raises:
        StudyError: models of different numbers of heads, or whose scores are more than those of queries and keys.
    """

    def build(self) -> None:
        student, teacher, reader = self.student, self.teacher, f"objective {self.method.objective}"
        self.depths = teacher.config.num_hidden_layers, student.config.num_hidden_layers
        self.heads = student.config.num_attention_heads
        for name, model in (("student", student), ("teacher", teacher)):
            check_scores_exist(model, name, reader)
        if self.heads != teacher.config.num_attention_heads:
            raise StudyError(
                f"{reader}: the student has {self.heads} attention heads; allowed:"
                f" {teacher.config.num_attention_heads}, as the teacher has"
            )

    def scores(self, activations: Activations, layer: int) -> Tensor:
        """(B, A, T, T) of a layer."""
        parts = activations.attention[layer]
        return losses.attention_scores(parts["query"], parts["key"], self.heads)


class AttentionScore(AttentionMaps):
    """TinyBERT: :func:`study.distillation.losses.attention_score` over mapped pairs of layers, mean or sum."""

    method: methods.AttentionScore

    @staticmethod
    def layers_read(method: Any, teacher_layers: int, student_layers: int) -> Layers:
        mapping = layer_mapping(method.mapping, teacher_layers, student_layers)
        return {"attention_layers": {j for targets in mapping.values() for j in targets}}

    def student_layers(self) -> Layers:
        return {"attention_layers": set(layer_mapping(self.method.mapping, *self.depths))}

    def loss(self, student: Activations, teacher: Activations | None, batch: Batch) -> Tensor:
        assert teacher is not None
        parts = torch.stack(
            [
                losses.attention_score(self.scores(student, i), self.scores(teacher, j))
                for i, targets in layer_mapping(self.method.mapping, *self.depths).items()
                for j in targets
            ]
        )
        return parts.sum() if self.method.reduction == "sum" else parts.mean()


class AttentionDistribution(AttentionMaps):
    """MiniLM: :func:`study.distillation.losses.attention_distribution` of the last student layer and a teacher layer.

    With ``value_relation``, plus :func:`study.distillation.losses.attention_relation` of their values, head by head.
    """

    method: methods.AttentionDistribution

    @staticmethod
    def layers_read(method: Any, teacher_layers: int, student_layers: int) -> Layers:
        return {"attention_layers": {teacher_layers - method.teacher_layer_from_top}}

    def student_layers(self) -> Layers:
        return {"attention_layers": {self.depths[1]}}

    def loss(self, student: Activations, teacher: Activations | None, batch: Batch) -> Tensor:
        assert teacher is not None
        own, target = self.depths[1], self.depths[0] - self.method.teacher_layer_from_top
        loss = losses.attention_distribution(self.scores(student, own), self.scores(teacher, target))
        if self.method.value_relation:
            values = student.attention[own]["value"], teacher.attention[target]["value"]
            loss = loss + self.losses.attention_relation(*values, self.heads)
        return loss


def check_scores_exist(model: Any, name: str, reader: str) -> None:
    """Refuse a model whose attention is more than queries times keys; ``reader``: what would read its scores.

    Raises:
        StudyError: it is of another family, or has relative positions.
    """
    layers = getattr(getattr(model.base_model, "encoder", None), "layer", [None])
    attention = getattr(getattr(layers[0], "attention", None), "self", None)
    position = getattr(model.config, "position_embedding_type", None) or "absolute"
    if not all(hasattr(attention, part) for part in ("query", "key", "value")) or position != "absolute":
        raise StudyError(
            f"{reader}: the {name} ({model.config.model_type}, {position} positions) has no attention"
            " scores of queries and keys alone; allowed: encoders of the BERT, RoBERTa and XLM-R families"
        )
