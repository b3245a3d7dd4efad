"""Weighted sums of other objectives."""

from __future__ import annotations

from collections import defaultdict
from typing import Any

import torch
from torch import Tensor
from transformers import PreTrainedModel

from study import methods
from study.distillation.objectives.attention import AttentionRelation, DirectAttention
from study.distillation.objectives.attention_maps import AttentionDistribution, AttentionScore
from study.distillation.objectives.base import Batch, Objective
from study.distillation.objectives.hidden_state import HiddenState
from study.distillation.objectives.output import MaskedLanguageModelling, OutputDistribution
from study.distillation.objectives.sentence import SentenceEmbedding
from study.distillation.taps import Activations, Layers

#: Objectives that a sum may have as parts.
SINGLE: dict[str, type[Objective]] = {
    methods.objective_of(getattr(methods, own.__name__)): own  # the options of an objective have its name
    for own in (
        MaskedLanguageModelling,
        OutputDistribution,
        HiddenState,
        AttentionRelation,
        DirectAttention,
        SentenceEmbedding,
        AttentionScore,
        AttentionDistribution,
    )
}


class Sum(Objective):
    r"""Weighted sum :math:`\sum_k w_k L_k` of the losses of other objectives, on one pass of student and teacher.

    All parts read the same text, masked where one of them needs the output distribution. Parts of weight zero are left
    out. Projections start part by part, in order.
    """

    method: methods.Sum

    def __init__(
        self,
        student: PreTrainedModel,
        teacher: PreTrainedModel | None,
        method: methods.Sum,
        inputs: methods.Inputs = "masked",
        fused: bool = True,
    ):
        self.needs_head = self.trains_head(method)
        chosen = [(part.weight, part.method) for part in method.parts if part.weight]
        self.needs_teacher = any(SINGLE[own.objective].needs_teacher for _, own in chosen)
        super().__init__(student, teacher, method, inputs, fused)
        inputs = "masked" if self.needs_head else inputs
        # Outside the module tree: the student would stand in the state once for each.
        parts = [
            (weight, SINGLE[own.objective](student, teacher, own, inputs, fused))  # type: ignore[arg-type]
            for weight, own in chosen
        ]
        self._parts = (parts,)
        for place, (_, part) in enumerate(parts):
            if part.projections:
                self.projections[str(place)] = part.projections

    @classmethod
    def trains_head(cls, method: Any) -> bool:
        return any(SINGLE[part.method.objective].needs_head for part in method.parts if part.weight)

    @property
    def parts(self) -> list[tuple[float, Objective]]:
        """Weight and objective of every part."""
        return self._parts[0]

    def singles(self) -> list[Objective]:
        return [part for _, part in self.parts]

    @staticmethod
    def layers_read(method: Any, teacher_layers: int, student_layers: int) -> Layers:
        parts = [part.method for part in method.parts if part.weight]
        return _union([SINGLE[own.objective].layers_read(own, teacher_layers, student_layers) for own in parts])

    def student_layers(self) -> Layers:
        return _union([part.student_layers() for _, part in self.parts])

    @torch.no_grad()
    def start(self, batch: Batch) -> None:
        """Start the projections of every part."""
        for _, part in self.parts:
            part.rounds_outputs = self.rounds_outputs
            part.start(batch)

    def loss(self, student: Activations, teacher: Activations | None, batch: Batch) -> Tensor:
        return torch.stack([weight * part.loss(student, teacher, batch) for weight, part in self.parts]).sum()


def _union(all_layers: list[Layers]) -> Layers:
    union: dict[str, set[int]] = defaultdict(set)
    for layers in all_layers:
        for key, own in layers.items():
            union[key] |= own
    return dict(union)
