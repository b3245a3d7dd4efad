"""Hidden-state transfer: mapped pairs of layers, one learned linear map each."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor

from study import methods
from study.distillation import losses
from study.distillation.mappings import layer_mapping
from study.distillation.objectives.base import Batch, Objective
from study.distillation.taps import Activations, Layers


class HiddenState(Objective):
    """Mean of :func:`study.distillation.losses.hidden_state` over the mapped pairs of layers, one linear map each.

    Options change the mean to a sum, the squared error to the cosine distance, and which pairs there are.
    """

    method: methods.HiddenState

    def build(self) -> None:
        student, teacher = self.student.config, self.teacher.config
        self.mapping = _mapping(self.method, teacher.num_hidden_layers, student.num_hidden_layers)
        if self.method.map_equal_widths is False and student.hidden_size == teacher.hidden_size:
            return
        for i, targets in self.mapping.items():
            for j in targets:
                self.projections[f"{i}-{j}"] = self.map_to_teacher()

    @staticmethod
    def layers_read(method: Any, teacher_layers: int, student_layers: int) -> Layers:
        mapping = _mapping(method, teacher_layers, student_layers)
        return {"hidden_layers": {j for targets in mapping.values() for j in targets}}

    def student_layers(self) -> Layers:
        return {"hidden_layers": set(self.mapping)}

    def pairs(self, student: Activations, teacher: Activations | None) -> Iterator[tuple[str, Tensor, Tensor]]:
        assert teacher is not None
        for i, targets in self.mapping.items():
            for j in targets:
                yield f"{i}-{j}", student.hidden[i], teacher.hidden[j]

    def loss(self, student: Activations, teacher: Activations | None, batch: Batch) -> Tensor:
        distance = losses.hidden_state_cosine if self.method.distance == "cosine" else losses.hidden_state
        parts = [
            distance(self.projections[name](s) if name in self.projections else s, t)
            for name, s, t in self.pairs(student, teacher)
        ]
        return torch.stack(parts).sum() if self.method.reduction == "sum" else torch.stack(parts).mean()


def _mapping(method: methods.HiddenState, teacher_layers: int, student_layers: int) -> dict[int, tuple[int, ...]]:
    mapping = layer_mapping(method.mapping, teacher_layers, student_layers)
    return {0: (0,), **mapping} if method.embeddings else mapping
