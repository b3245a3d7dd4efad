"""One module per family of methods: what it reads of student and teacher, and the loss it takes of that.

Every objective holds the student and its learned projections, never the teacher: its state is what a checkpoint needs.
A batch is a dict of ``input_ids`` (B, T), ``masked_input_ids`` (B, T), ``positions`` (B, M) of the masked tokens,
``labels`` (B, M), the tokens that stood there, and ``item`` (B,), the number of the sequence in the run.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from transformers import PreTrainedModel

import study.fused
from study import losses
from study.config import Distillation, Method
from study.mappings import layer_mapping
from study.models.taps import PROJECTIONS, Readings, read
from study.models.teachers import language_modelling_head
from study.training.shared import SharedTeacher


class Objective(nn.Module):
    """Base of all objectives; ``forward(**batch)`` returns ``{"loss": scalar}`` as the Trainer expects.

    Args:
        student: a masked language model; objectives without an output loss keep only its encoder.
        teacher: a masked language model, held outside the module tree; unused where ``needs_teacher`` is False.
        method: the entry of ``params.methods``.
        distillation: ``params.distillation``.
        fused: whether to take losses from :mod:`study.fused` where it has them, instead of :mod:`study.losses`.
    """

    needs_head = False
    needs_teacher = True

    def __init__(
        self,
        student: PreTrainedModel,
        teacher: PreTrainedModel | None,
        method: Method,
        distillation: Distillation,
        fused: bool = True,
    ):
        super().__init__()
        self.student = student if self.needs_head else student.base_model
        self.method = method
        self.inputs = "masked_input_ids" if self.needs_head or distillation.inputs == "masked" else "input_ids"
        self.losses = study.fused if fused else losses
        self.projections = nn.ModuleDict()
        self._outside = (teacher.eval().requires_grad_(False) if self.needs_teacher else None,)
        self.shared_teacher: SharedTeacher | None = None
        self._keys_to_ignore_on_save = sorted(self._tied())  # the Trainer asks for this when it loads a checkpoint
        self._register_state_dict_hook(self._without_tied)

    @torch.no_grad()
    def round_teacher(self) -> None:
        """Keep the teacher's linear layers in bfloat16: what autocast would make of them anew at every step.

        Values do not change under autocast; outside of it the teacher can no longer be read.
        """
        for module in self.teacher.modules():
            if isinstance(module, nn.Linear):  # the output matrix leaves the word embeddings it is tied to
                module.weight = nn.Parameter(module.weight.bfloat16(), requires_grad=False)
                if module.bias is not None:
                    module.bias = nn.Parameter(module.bias.bfloat16(), requires_grad=False)

    @property
    def teacher(self) -> PreTrainedModel | None:
        return self._outside[0]

    def forward(self, **batch: Tensor) -> dict[str, Tensor]:
        with torch.no_grad():
            teacher = self.read_teacher(batch)
        return {"loss": self.loss(self.read_student(batch), teacher, batch)}

    def read_student(self, batch: dict[str, Tensor]) -> Readings:
        return read(self.student, batch[self.inputs], hidden_layers=[self.student.config.num_hidden_layers])

    @staticmethod
    def reads(method: Method, teacher_layers: int, student_layers: int) -> dict[str, set[int]]:
        """What a method reads of a teacher of that depth, as keyword arguments of :func:`study.models.taps.read`."""
        return {}

    def teacher_layers(self) -> dict[str, set[int]]:
        """:meth:`reads` of this method, teacher and student."""
        if self.teacher is None:
            return {}
        return self.reads(self.method, *(m.config.num_hidden_layers for m in (self.teacher, self.student)))

    def read_teacher(self, batch: dict[str, Tensor]) -> Readings | None:
        """What the loss reads of the teacher: from ``shared_teacher`` where it is there, else computed.

        Under bfloat16 autocast it is rounded to bfloat16 either way (this study's choice), so that results are the same
        with and without sharing.
        """
        layers = self.teacher_layers()
        if not layers:
            return None
        store = self.shared_teacher
        readings = store.read(batch["item"]) if store else None
        if readings is None:
            readings = read(self.teacher, batch[self.inputs], **(store.layers if store else layers))
            if torch.is_autocast_enabled(batch[self.inputs].device.type):
                readings = readings.to(torch.bfloat16)
            if store:
                store.write(batch["item"], readings)
        return readings

    def loss(self, student: Readings, teacher: Readings | None, batch: dict[str, Tensor]) -> Tensor:
        raise TypeError(f"{type(self).__name__} defines no loss")

    @torch.no_grad()
    def start(self, batch: dict[str, Tensor]) -> None:
        """Set learned projections to the least-squares solution on ``batch`` (this study's choice).

        Without it, methods with projections would spend their first steps on finding them, and methods without
        would not: a difference of the start, not of what is transferred.
        """
        if self.projections:
            student, teacher = self.read_student(batch), self.read_teacher(batch)
            for name, source, target in self.pairs(student, teacher):
                source, target = source.flatten(0, 1).double(), target.flatten(0, 1).double()
                source = torch.cat([source, source.new_ones(len(source), 1)], dim=1)
                # Normal equations: torch.linalg.lstsq differs in its last bits from call to call. The cutoff is needed
                # because layer-norm outputs and a constant are linearly dependent.
                moments = torch.linalg.pinv(source.T @ source, rtol=1e-10, hermitian=True)
                solution = moments @ (source.T @ target)
                self.projections[name].weight.copy_(solution[:-1].T)
                self.projections[name].bias.copy_(solution[-1])

    def pairs(self, student: Readings, teacher: Readings):
        """Yield (projection name, student tensor, teacher tensor) for every pair that a projection connects."""
        return iter(())

    def tie_weights(self) -> None:
        """What the Trainer calls after loading a checkpoint; the student's weights are tied already."""

    def _tied(self) -> set[str]:
        return {f"student.{key}" for key in getattr(self.student, "all_tied_weights_keys", {})}

    @staticmethod
    def _without_tied(module: Objective, state: dict, prefix: str, metadata: dict) -> None:
        for key in module._keys_to_ignore_on_save:
            state.pop(prefix + key, None)


class MaskedLanguageModelling(Objective):
    """No teacher: cross-entropy of the masked tokens. The baseline, and how the teacher itself is adapted."""

    needs_head = True
    needs_teacher = False

    def loss(self, student, teacher, batch):
        return masked_cross_entropy(masked_logits(self.student, student, batch["positions"]), batch["labels"])


class OutputDistribution(Objective):
    """:func:`study.losses.output_distribution` at the masked positions or at all, plus weighted MLM if asked for."""

    needs_head = True

    @staticmethod
    def reads(method, teacher_layers, student_layers):
        return {"hidden_layers": {teacher_layers}}

    def loss(self, student, teacher, batch):
        everywhere = self.method.positions == "all"
        positions = None if everywhere else batch["positions"]
        student_logits = masked_logits(self.student, student, positions)
        with torch.no_grad():
            teacher_logits = masked_logits(self.teacher, teacher, positions)
        loss = self.losses.output_distribution(student_logits, teacher_logits, self.method.temperature)
        if self.method.mlm_weight:
            masked = gather(student_logits, batch["positions"]) if everywhere else student_logits
            loss = loss + self.method.mlm_weight * masked_cross_entropy(masked, batch["labels"])
        return loss


class HiddenState(Objective):
    """Mean of :func:`study.losses.hidden_state` over the mapped pairs of layers, one learned linear map per pair."""

    def __init__(self, student, teacher, method, distillation, fused=True):
        super().__init__(student, teacher, method, distillation, fused)
        depths = teacher.config.num_hidden_layers, student.config.num_hidden_layers
        self.mapping = layer_mapping(method.mapping, *depths)
        for i, targets in self.mapping.items():
            for j in targets:
                self.projections[f"{i}-{j}"] = nn.Linear(student.config.hidden_size, teacher.config.hidden_size)

    @staticmethod
    def reads(method, teacher_layers, student_layers):
        mapping = layer_mapping(method.mapping, teacher_layers, student_layers)
        return {"hidden_layers": {j for targets in mapping.values() for j in targets}}

    def read_student(self, batch):
        return read(self.student, batch[self.inputs], hidden_layers=self.mapping)

    def pairs(self, student, teacher):
        for i, targets in self.mapping.items():
            for j in targets:
                yield f"{i}-{j}", student.hidden[i], teacher.hidden[j]

    def loss(self, student, teacher, batch):
        parts = [losses.hidden_state(self.projections[name](s), t) for name, s, t in self.pairs(student, teacher)]
        return torch.stack(parts).mean()


class Attention(Objective):
    """Common to both attention methods: queries, keys and values of the last student layer and one teacher layer."""

    def __init__(self, student, teacher, method, distillation, fused=True):
        super().__init__(student, teacher, method, distillation, fused)
        self.student_layer = student.config.num_hidden_layers
        (self.teacher_layer,) = self.teacher_layers()["attention_layers"]

    @staticmethod
    def reads(method, teacher_layers, student_layers):
        return {"attention_layers": {teacher_layers - method.teacher_layer_from_top}}

    def read_student(self, batch):
        return read(self.student, batch[self.inputs], attention_layers=[self.student_layer])

    def pairs(self, student, teacher):
        for name in PROJECTIONS:
            yield name, student.attention[self.student_layer][name], teacher.attention[self.teacher_layer][name]


class AttentionRelation(Attention):
    """MiniLMv2: sum over Q, K, V of :func:`study.losses.attention_relation`."""

    def loss(self, student, teacher, batch):
        pairs = self.pairs(student, teacher)
        return sum(self.losses.attention_relation(s, t, self.method.relation_heads) for _, s, t in pairs)


class DirectAttention(Attention):
    """DirectMiniLM: sum over Q, K, V of :func:`study.losses.direct_attention`, one learned linear map each."""

    def __init__(self, student, teacher, method, distillation, fused=True):
        super().__init__(student, teacher, method, distillation, fused)
        for name in PROJECTIONS:
            self.projections[name] = nn.Linear(student.config.hidden_size, teacher.config.hidden_size)

    def loss(self, student, teacher, batch):
        pairs = self.pairs(student, teacher)
        return sum(losses.direct_attention(self.projections[name](s), t) for name, s, t in pairs)


#: ``methods.<name>.objective`` in params.yaml -> its module.
OBJECTIVES = {
    "masked_language_modelling": MaskedLanguageModelling,
    "output_distribution": OutputDistribution,
    "hidden_state": HiddenState,
    "attention_relation": AttentionRelation,
    "direct_attention": DirectAttention,
}


def gather(states: Tensor, positions: Tensor) -> Tensor:
    """(B, T, H) at ``positions`` (B, M) to (B, M, H)."""
    return states.gather(1, positions[..., None].expand(-1, -1, states.shape[-1]))


def masked_logits(model: PreTrainedModel, readings: Readings, positions: Tensor | None) -> Tensor:
    """Logits (B, M, vocabulary) of the deepest hidden state at ``positions`` (B, M), or at all tokens for None."""
    states = readings.hidden[model.config.num_hidden_layers]
    return language_modelling_head(model)(states if positions is None else gather(states, positions))


def masked_cross_entropy(logits: Tensor, labels: Tensor) -> Tensor:
    """Mean negative log-likelihood, in nats, of ``labels`` (B, M) under ``logits`` (B, M, vocabulary), in float32."""
    return F.cross_entropy(logits.flatten(0, 1).float(), labels.flatten())
