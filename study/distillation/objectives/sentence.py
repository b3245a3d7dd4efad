"""Embedding transfer: the pooled embedding of a sequence."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor

from study import methods
from study.distillation import losses
from study.distillation.objectives.base import Batch, Objective
from study.distillation.processes import gathered
from study.distillation.taps import Activations, Layers


class SentenceEmbedding(Objective):
    """:func:`study.distillation.losses.sentence_embedding` of the mean of the last hidden states over all tokens.

    A sentence is a packed sequence of the corpus, special tokens included and without padding, masked or plain as
    ``inputs`` says. The teacher is that of the setting after its adaptation. Mean pooling is how the embedded teachers
    were trained; embeddings are not normalised before the squared error.

    One learned linear map takes the student's embedding to the teacher's width where the two differ, but for the
    relational distance, which needs none. Since the mean of mapped states is the map of their mean, ``fitted_start``
    fits it to the states of single tokens, of which a batch has many more than of sequences (this study's choice).
    """

    method: methods.SentenceEmbedding

    def build(self) -> None:
        student, teacher = self.student.config, self.teacher.config
        self.student_layer, self.teacher_layer = student.num_hidden_layers, teacher.num_hidden_layers
        if self.method.distance != "relational" and student.hidden_size != teacher.hidden_size:
            self.projections["sentence"] = self.map_to_teacher()

    @staticmethod
    def layers_read(method: Any, teacher_layers: int, student_layers: int) -> Layers:
        return {"hidden_layers": {teacher_layers}}

    def pairs(self, student: Activations, teacher: Activations | None) -> Iterator[tuple[str, Tensor, Tensor]]:
        assert teacher is not None
        yield "sentence", student.hidden[self.student_layer], teacher.hidden[self.teacher_layer]

    def loss(self, student: Activations, teacher: Activations | None, batch: Batch) -> Tensor:
        ((name, own, target),) = self.pairs(student, teacher)
        embedding, goal = own.float().mean(dim=1), target.float().mean(dim=1)
        if name in self.projections:
            embedding = self.projections[name](embedding)
        if self.method.distance == "relational" and self.gathers and torch.is_grad_enabled():
            embedding, goal = gathered(embedding), gathered(goal)
        return losses.sentence_embedding(embedding, goal, self.method.distance)
