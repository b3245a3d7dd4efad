"""Attention transfer: queries, keys and values of the last student layer and of one teacher layer."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any, cast

import torch
from torch import Tensor

from study import methods
from study.distillation import losses
from study.distillation.objectives.base import Batch, Objective, fit_linear
from study.distillation.taps import PROJECTIONS, Activations, Layers, read_activations
from study.families import family_of, part
from study.files import StudyError


class Attention(Objective):
    """Common to both methods: what is read, and of which layers."""

    method: methods.AttentionRelation | methods.DirectAttention

    def build(self) -> None:
        self.student_layer = self.student.config.num_hidden_layers
        (self.teacher_layer,) = self.teacher_layers()["attention_layers"]

    @staticmethod
    def layers_read(method: Any, teacher_layers: int, student_layers: int) -> Layers:
        return {"attention_layers": {teacher_layers - method.teacher_layer_from_top}}

    def student_layers(self) -> Layers:
        return {"attention_layers": {self.student_layer}}

    def pairs(self, student: Activations, teacher: Activations | None) -> Iterator[tuple[str, Tensor, Tensor]]:
        assert teacher is not None
        for name in PROJECTIONS:
            yield name, student.attention[self.student_layer][name], teacher.attention[self.teacher_layer][name]


class AttentionRelation(Attention):
    """MiniLMv2: sum over Q, K, V of :func:`study.distillation.losses.attention_relation`, V times ``value_weight``."""

    method: methods.AttentionRelation

    @torch.no_grad()
    def start(self, batch: Batch) -> None:
        r"""With ``fitted_start``, set the last layer's Q, K and V to a fit of the teacher's relations on ``batch``.

        Per relation head, the best approximation of the scores :math:`X X^\top / \sqrt{d_T}` of the teacher by vectors
        of the student's :math:`d_S` entries is :math:`(d_S / d_T)^{1/4} X V`, V the leading eigenvectors of
        :math:`X^\top X`. The projections become the least-squares maps from the layer's input to them. Source: this
        study's choice; it gives MiniLMv2 the kind of start that methods with learned maps have.
        """
        if not self.method.fitted_start:
            return
        below = self.student_layer - 1
        inputs = read_activations(self.student, batch[self.inputs], hidden_layers=[below]).hidden[below]
        teacher = self.read_teacher(batch)
        assert teacher is not None
        family = family_of(self.student)
        if len(family.block.projections) == 1:
            raise StudyError(
                f"fitted_start = true: queries, keys and values of {self.student.config.model_type} are one map;"
                " allowed: false"
            )
        layer = part(self.student, family.layers)[below]
        for name, path in zip(PROJECTIONS, family.block.projections, strict=True):
            targets = leading_directions(
                teacher.attention[self.teacher_layer][name], self.method.relation_heads, inputs.shape[-1]
            )
            fit_linear(part(layer, path), inputs, targets)

    def loss(self, student: Activations, teacher: Activations | None, batch: Batch) -> Tensor:
        pairs, heads = self.pairs(student, teacher), self.method.relation_heads
        divergences = {name: self.losses.attention_relation(s, t, heads) for name, s, t in pairs}
        if self.method.value_weight is not None:
            divergences["value"] = self.method.value_weight * divergences["value"]
        return cast(Tensor, sum(divergences.values()))


class DirectAttention(Attention):
    """DirectMiniLM: sum over Q, K, V of :func:`study.distillation.losses.direct_attention`, one linear map each."""

    method: methods.DirectAttention

    def build(self) -> None:
        super().build()
        for name in PROJECTIONS:
            self.projections[name] = self.map_to_teacher()

    def loss(self, student: Activations, teacher: Activations | None, batch: Batch) -> Tensor:
        pairs = self.pairs(student, teacher)
        return cast(Tensor, sum(losses.direct_attention(self.projections[name](s), t) for name, s, t in pairs))


def leading_directions(states: Tensor, relation_heads: int, width: int) -> Tensor:
    """(B, T, H) to (B, T, width): per relation head the leading directions, scaled for the scores of that width."""
    heads = states.double().flatten(0, 1).unflatten(-1, (relation_heads, -1)).transpose(0, 1)  # (A, N, d_T)
    kept, all_of_them = width // relation_heads, heads.shape[-1]
    directions = torch.linalg.eigh(heads.transpose(1, 2) @ heads).eigenvectors[..., -kept:]
    scaled = heads @ directions * (kept / all_of_them) ** 0.25
    return scaled.transpose(0, 1).reshape(*states.shape[:2], width)
