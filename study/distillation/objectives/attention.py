"""Attention transfer: queries, keys and values of the last student layer and of one teacher layer."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any, cast

from torch import Tensor, nn
from transformers import PreTrainedModel

from study import methods
from study.distillation import losses
from study.distillation.objectives.base import Batch, Objective
from study.distillation.taps import PROJECTIONS, Activations, Layers, read_activations


class Attention(Objective):
    """Common to both methods: what is read, and of which layers."""

    method: methods.AttentionRelation | methods.DirectAttention

    def __init__(
        self,
        student: PreTrainedModel,
        teacher: PreTrainedModel,
        method: methods.AttentionRelation | methods.DirectAttention,
        inputs: methods.Inputs = "masked",
        fused: bool = True,
    ):
        super().__init__(student, teacher, method, inputs, fused)
        self.student_layer = student.config.num_hidden_layers
        (self.teacher_layer,) = self.teacher_layers()["attention_layers"]

    @staticmethod
    def layers_read(method: Any, teacher_layers: int, student_layers: int) -> Layers:
        return {"attention_layers": {teacher_layers - method.teacher_layer_from_top}}

    def read_student(self, batch: Batch) -> Activations:
        return read_activations(self.student, batch[self.inputs], attention_layers=[self.student_layer])

    def pairs(self, student: Activations, teacher: Activations | None) -> Iterator[tuple[str, Tensor, Tensor]]:
        assert teacher is not None
        for name in PROJECTIONS:
            yield name, student.attention[self.student_layer][name], teacher.attention[self.teacher_layer][name]


class AttentionRelation(Attention):
    """MiniLMv2: sum over Q, K, V of :func:`study.distillation.losses.attention_relation`."""

    method: methods.AttentionRelation

    def loss(self, student: Activations, teacher: Activations | None, batch: Batch) -> Tensor:
        pairs = self.pairs(student, teacher)
        return sum(self.losses.attention_relation(s, t, self.method.relation_heads) for _, s, t in pairs)


class DirectAttention(Attention):
    """DirectMiniLM: sum over Q, K, V of :func:`study.distillation.losses.direct_attention`, one linear map each."""

    method: methods.DirectAttention

    def __init__(
        self,
        student: PreTrainedModel,
        teacher: PreTrainedModel,
        method: methods.DirectAttention,
        inputs: methods.Inputs = "masked",
        fused: bool = True,
    ):
        super().__init__(student, teacher, method, inputs, fused)
        for name in PROJECTIONS:
            self.projections[name] = nn.Linear(student.config.hidden_size, teacher.config.hidden_size)

    def loss(self, student: Activations, teacher: Activations | None, batch: Batch) -> Tensor:
        pairs = self.pairs(student, teacher)
        return cast(Tensor, sum(losses.direct_attention(self.projections[name](s), t) for name, s, t in pairs))
