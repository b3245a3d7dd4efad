"""What all objectives have in common: what is read of student and teacher, how projections start, what is kept."""

from __future__ import annotations

from collections.abc import Iterator
from types import ModuleType
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from transformers import PreTrainedModel

from study import methods
from study.distillation import fused as fused_losses
from study.distillation import losses
from study.distillation.heads import language_modelling_head
from study.distillation.taps import Activations, Layers, read_activations
from study.distillation.teacher_outputs import TeacherOutputs
from study.families import family_of, part
from study.files import StudyError

#: Environment variable: 1 computes the student's layers a second time instead of keeping what is in them.
RECOMPUTE = "STUDY_GRADIENT_CHECKPOINTING"
Batch = dict[str, Tensor]


class Objective(nn.Module):
    """Base of all objectives; ``forward(**batch)`` returns ``{"loss": scalar}`` as the Trainer expects.

    It holds the student and its learned projections, never the teacher: its state is what a checkpoint needs.
    A batch is a dict of ``input_ids`` (B, T), ``masked_input_ids`` (B, T), ``positions`` (B, M) of the masked tokens,
    ``labels`` (B, M), the tokens that stood there, and ``item`` (B,), the number of the sequence in the run.

    Args:
        student: a masked language model; objectives without an output loss keep only its encoder.
        teacher: a masked language model, held outside the module tree; unused where ``needs_teacher`` is False.
        method: the options.
        inputs: ``masked`` or ``plain``: the text that both models read; masked whatever it says where ``needs_head``.
        fused: whether to take losses from :mod:`study.distillation.fused` where it has them, instead of
            :mod:`study.distillation.losses`.
    """

    needs_head: bool = False
    needs_teacher: bool = True
    gathers: bool = False  # whether a loss over pairs of sequences sees those of all processes, too
    student: Any

    def __init__(
        self,
        student: PreTrainedModel,
        teacher: PreTrainedModel | None,
        method: methods.Trained,
        inputs: methods.Inputs = "masked",
        fused: bool = True,
    ):
        super().__init__()
        self.student = student if self.needs_head else student.base_model
        self.method: Any = method
        self.inputs = "masked_input_ids" if self.needs_head or inputs == "masked" else "input_ids"
        self.losses: ModuleType = fused_losses if fused else losses
        self.projections = nn.ModuleDict()
        self._outside = (teacher.eval().requires_grad_(False) if teacher is not None and self.needs_teacher else None,)
        self.teacher_outputs: TeacherOutputs | None = None
        self.rounds_outputs = False
        self._keys_to_ignore_on_save = sorted(self._tied())  # the Trainer asks for this when it loads a checkpoint
        self._register_state_dict_hook(self._without_tied)
        self.build()

    def build(self) -> None:
        """Make what the objective has beside both models: learned projections, layers by name."""

    @torch.no_grad()
    def round_teacher(self) -> None:
        """Keep the teacher's linear layers in bfloat16: what autocast would make of them anew at every step.

        Values do not change under autocast; outside of it the teacher cannot be read.
        """
        for module in self.teacher.modules() if self.teacher is not None else ():
            if isinstance(module, nn.Linear):  # the output matrix leaves the word embeddings it is tied to
                module.weight = nn.Parameter(module.weight.bfloat16(), requires_grad=False)
                if module.bias is not None:
                    module.bias = nn.Parameter(module.bias.bfloat16(), requires_grad=False)

    def recompute_layers(self) -> None:
        """Gradient checkpointing: keep of the student's layers their inputs, and compute what is in them twice.

        Losses and gradients do not change: what is read inside a layer keeps its place in the graph. A layer inside
        which reading ends is left as it is: no more than its projections are computed, from the input that is kept.

        Raises:
            StudyError: transformers has no gradient checkpointing for the student's family.

        Source: Chen et al. (1604.06174), as PyTorch and transformers have it.
        """
        if not self.student.supports_gradient_checkpointing:
            family = self.student.config.model_type
            raise StudyError(f"{RECOMPUTE} = 1: transformers has no gradient checkpointing for {family}; allowed: 0")
        options = {"use_reentrant": False, "preserve_rng_state": False}  # no layer draws at random
        self.student.activation_checkpointing_enable(activation_checkpointing_kwargs=options)
        read = self.student_layers()
        last = max(read.get("attention_layers", ()), default=0)
        if last > max(read.get("hidden_layers", ()), default=0):
            part(self.student.base_model, family_of(self.student).layers)[last - 1].gradient_checkpointing = False

    @property
    def teacher(self) -> Any:
        """The frozen teacher; None where the objective needs none."""
        return self._outside[0]

    def map_to_teacher(self) -> nn.Linear:
        """A linear map from the student's width to the teacher's."""
        return nn.Linear(self.student.config.hidden_size, self.teacher.config.hidden_size)

    def forward(self, **batch: Tensor) -> dict[str, Tensor]:
        with torch.no_grad():
            teacher = self.read_teacher(batch)
        return {"loss": self.loss(self.read_student(batch), teacher, batch)}

    def singles(self) -> list[Objective]:
        """The objectives whose losses are computed: itself, or the parts of a sum."""
        return [self]

    @classmethod
    def trains_head(cls, method: Any) -> bool:
        """Whether a method of this objective reads the student's output distribution."""
        return cls.needs_head

    def student_layers(self) -> Layers:
        """What the loss reads of the student."""
        return {"hidden_layers": {self.student.config.num_hidden_layers}}

    def read_student(self, batch: Batch) -> Activations:
        """The student's activations that the loss needs, with gradients."""
        return read_activations(self.student, batch[self.inputs], None, **self.student_layers())

    @staticmethod
    def layers_read(method: Any, teacher_layers: int, student_layers: int) -> Layers:
        """What a method reads of a teacher of that depth when the student has the other."""
        return {}

    def teacher_layers(self) -> Layers:
        """:meth:`layers_read` of this method, teacher and student."""
        if self.teacher is None:
            return {}
        return self.layers_read(
            self.method, self.teacher.config.num_hidden_layers, self.student.config.num_hidden_layers
        )

    def read_teacher(self, batch: Batch) -> Activations | None:
        """The teacher's activations that the loss needs: from ``teacher_outputs`` where they are there, else computed.

        Under bfloat16 autocast, and where ``rounds_outputs``, they are rounded to bfloat16 either way (this study's
        choice), so that results are the same with and without sharing.
        """
        layers, autocast = self.teacher_layers(), torch.is_autocast_enabled(batch[self.inputs].device.type)
        if self.teacher is None or not layers:
            return None
        store = self.teacher_outputs
        activations = store.load(batch["item"]) if store else None
        if activations is None:
            layers = store.layers if store else layers
            activations = read_activations(self.teacher, batch[self.inputs], None, **layers)
            if autocast or self.rounds_outputs:
                activations = activations.to(torch.bfloat16)
            if store:
                store.save(batch["item"], activations)
        return activations if autocast else activations.to(torch.float32)

    def loss(self, student: Activations, teacher: Activations | None, batch: Batch) -> Tensor:
        """The scalar that training minimises."""
        raise TypeError(f"{type(self).__name__} defines no loss")

    @torch.no_grad()
    def start(self, batch: Batch) -> None:
        """Set learned projections to the least-squares solution on ``batch`` (this study's choice).

        Without it, methods with projections would spend their first steps on finding them, and methods without
        would not: a difference of the start, not of what is transferred.
        """
        if self.projections and self.method.fitted_start:
            student, teacher = self.read_student(batch), self.read_teacher(batch)
            for name, source, target in self.pairs(student, teacher):
                fit_linear(self.projections[name], source, target)

    def pairs(self, student: Activations, teacher: Activations | None) -> Iterator[tuple[str, Tensor, Tensor]]:
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


@torch.no_grad()
def fit_linear(layer: Any, source: Tensor, target: Tensor) -> None:
    """Set a linear layer to the least-squares map from ``source`` (B, T, H) to ``target`` (B, T, H')."""
    source, target = source.flatten(0, 1).double(), target.flatten(0, 1).double()
    source = torch.cat([source, source.new_ones(len(source), 1)], dim=1)
    # Normal equations: torch.linalg.lstsq differs in its last bits from call to call. The cutoff is needed
    # because layer-norm outputs and a constant are linearly dependent.
    moments = torch.linalg.pinv(source.T @ source, rtol=1e-10, hermitian=True)
    solution = moments @ (source.T @ target)
    layer.weight.copy_(solution[:-1].T)
    layer.bias.copy_(solution[-1])


def gather(states: Tensor, positions: Tensor) -> Tensor:
    """(B, T, H) at ``positions`` (B, M) to (B, M, H)."""
    return states.gather(1, positions[..., None].expand(-1, -1, states.shape[-1]))


def masked_logits(model: PreTrainedModel, activations: Activations, positions: Tensor | None) -> Tensor:
    """Logits (B, M, vocabulary) of the deepest hidden state at ``positions`` (B, M), or at all tokens for None."""
    states = activations.hidden[model.config.num_hidden_layers]
    return language_modelling_head(model)(states if positions is None else gather(states, positions))


def masked_cross_entropy(logits: Tensor, labels: Tensor) -> Tensor:
    """Mean negative log-likelihood, in nats, of ``labels`` (B, M) under ``logits`` (B, M, vocabulary), in float32."""
    return F.cross_entropy(logits.flatten(0, 1).float(), labels.flatten())
