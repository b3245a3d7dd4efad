"""Public packages at the work of the study's methods: whole training steps as their users run them, in float32.

What all share: both models read the masked tokens (B sequences of T) and run through all their layers; the teacher is
in evaluation mode, the student in training mode with its dropout, as users leave it (the study switches dropout off).
The package does the forward passes, the loss and the backward pass; around it stand one AdamW step, fused as in
transformers' Trainer and the study, and ``zero_grad``. Data loading, clipping and schedules, which the study's own
times include, are left out. Where a loss covers more or less than the study's, the docstring below says so.

No peer is a dependency. :data:`INSTALL` puts them beside the study against their own pins, which ask for older
transformers and datasets (bertdistiller) and for torchvision (torchdistill).
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from importlib import import_module, metadata
from tempfile import TemporaryDirectory
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F
from transformers import BertForMaskedLM, PreTrainedModel, Trainer, TrainingArguments

from study.distillation.mappings import layer_mapping
from study.files import StudyError

BERTDISTILLER, TEXTBREWER, TORCHDISTILL = "bertdistiller==0.1.2", "textbrewer==0.2.1.post1", "torchdistill==1.1.5"

#: What follows ``python -m pip install`` to have every peer.
INSTALL = (
    f"--no-deps --ignore-requires-python {BERTDISTILLER} {TEXTBREWER} {TORCHDISTILL}"
    " tensorboardX==2.6.5 protobuf==7.36.2"
)

Inputs = dict[str, Tensor]
Step = Callable[[], Tensor]


@dataclass(frozen=True)
class Peer:
    """A package at the work of one of the study's methods.

    Attributes:
        name: as in ``params.benchmark.peers``.
        requirement: package and measured version, ``package==version``.
        prepare: (teacher, student, inputs) -> step, with inputs ``{"input_ids": (B, T)}``; imports the package.
    """

    name: str
    requirement: str
    prepare: Callable[[BertForMaskedLM, BertForMaskedLM, Inputs], Step]

    def step(self, teacher: BertForMaskedLM, student: BertForMaskedLM, batch: Inputs) -> Step:
        """Set everything up; what is returned makes one training step of the student per call and returns its loss.

        Args:
            teacher, student: masked language models on one device; set to evaluation and training mode.
            batch: ``masked_input_ids`` (B, T) on that device; other entries are not used.

        Raises:
            StudyError: the package is missing, of another version or cannot be imported; one line that says which.
        """
        package, _, wanted = self.requirement.partition("==")
        needs = f"{self.name} needs {self.requirement}"
        remedy = f"python -m pip install {INSTALL if self.requirement in INSTALL else self.requirement}"
        try:
            installed = metadata.version(package)
        except metadata.PackageNotFoundError:
            installed = "none"
        if installed != wanted:
            raise StudyError(f"{needs}, found {installed}; install it with: {remedy}")
        try:
            return self.prepare(teacher.eval(), student.train(), {"input_ids": batch["masked_input_ids"]})
        except ImportError as error:
            raise StudyError(f"{needs}, found it but cannot import it ({error}); try: {remedy}") from error


def bertdistiller(teacher: BertForMaskedLM, student: BertForMaskedLM, inputs: Inputs, relation_heads: int) -> Step:
    """The package bertdistiller's ``MiniLMTrainer`` on the encoders: student layer L_S, teacher layer L_T - 1.

    The loss is that of the study's MiniLMv2, the sum over Q, K, V of
    :func:`study.distillation.losses.attention_relation`. The work is more: both encoders run to their ends, Q, K and V
    of the two layers are computed a second time from the layers' inputs, and relations are compared one sequence at a
    time. The attention mask it asks for, all ones, is added.

    Source: bertdistiller 0.1.2, distillation/minilm/trainer.py.
    """
    package = import_module("bertdistiller")
    teacher, student = _models(teacher, student, heads=False)
    teacher.config.architectures = ["BertForMaskedLM"]  # as in saved checkpoints; the package looks it up
    arguments = partial(
        package.MiniLMTrainingArguments,
        teacher_layer=teacher.config.num_hidden_layers - 1,
        student_layer=student.config.num_hidden_layers,
        student_hidden_size=student.config.hidden_size,
        student_attention_heads=student.config.num_attention_heads,
        num_relation_heads=relation_heads,
    )
    trainer = partial(package.MiniLMTrainer, teacher_model=teacher)
    return _by_trainer(trainer, arguments, student, inputs | {"attention_mask": torch.ones_like(inputs["input_ids"])})


def textbrewer(
    teacher: BertForMaskedLM, student: BertForMaskedLM, inputs: Inputs, logits_weight: float, heads: bool = True
) -> Step:
    r"""The body of ``GeneralDistiller.train`` with losses ``hidden_mse`` and ``ce`` (w = ``logits_weight``).

    .. math:: \sum_i \frac{1}{B T H} \| W_i h^S_i - h^T_{\phi(i)} \|^2
              - \frac{w}{B T} \sum_{n=1}^{B T} softmax(z^T_n) \cdot \log softmax(z^S_n)

    phi is the uniform mapping, W_i a linear map with bias to the teacher's width H. The first term is the loss of the
    study's ``hs-uniform`` times the number of pairs. The second is
    :func:`study.distillation.losses.output_distribution` plus the teacher's entropy, a constant; at all positions,
    where the study's default takes the masked 15 %. With w = 0 it is computed and backpropagated all the same, as for
    any user who only sets the weight. ``heads=False`` takes encoders without language-modelling heads and no second
    term: the same work as ``hs-uniform``.

    Source: textbrewer 0.2.1.post1, distiller_general.py and distiller_basic.py.
    """
    package = import_module("textbrewer")
    teacher, student = _models(teacher, student, heads)
    mapping = layer_mapping("uniform", teacher.config.num_hidden_layers, student.config.num_hidden_layers)
    widths = student.config.hidden_size, teacher.config.hidden_size
    match = {"feature": "hidden", "loss": "hidden_mse", "weight": 1}
    matches = [match | {"layer_S": i, "layer_T": j, "proj": ["linear", *widths]} for i, (j,) in mapping.items()]
    losses = package.DistillationConfig(temperature=1, kd_loss_weight=logits_weight, intermediate_matches=matches)

    def adaptor(batch, outputs):
        return {"hidden": outputs.hidden_states} | ({"logits": outputs.logits} if heads else {})

    with TemporaryDirectory() as folder:  # made at once, needed for checkpoints only
        training = package.TrainingConfig(output_dir=folder, device=student.device)
    distiller = package.GeneralDistiller(training, losses, teacher, student, adaptor, adaptor)
    optimizer = _adamw(student)
    distiller.initialize_training(optimizer, None, None, None)  # hands the linear maps to the optimizer

    def forward() -> Tensor:
        loss, parts = distiller.train_on_batch(inputs, {"output_hidden_states": True})
        distiller.write_loss(loss, 0, parts)
        return loss

    return _complete(optimizer, forward)


def torchdistill(teacher: BertForMaskedLM, student: BertForMaskedLM, inputs: Inputs) -> Step:
    """The ``KDLoss`` of torchdistill at temperature 1 in a plain loop; the loss of :class:`FullVocabularyTrainer`.

    Logits are flattened to (B T, vocabulary), since the package takes the softmax over dimension 1. Only its loss is
    used: its ``DistillationBox`` cannot be imported without torchvision.

    Source: torchdistill 1.1.5, losses/mid_level.py.
    """
    loss_of = import_module("torchdistill.losses.mid_level").KDLoss("", "logits", "", "logits", temperature=1, alpha=0)

    def forward() -> Tensor:
        with torch.no_grad():
            targets = teacher(**inputs).logits.flatten(0, 1)
        return loss_of({"": {"logits": student(**inputs).logits.flatten(0, 1)}}, {"": {"logits": targets}})

    return _complete(_adamw(student), forward)


class FullVocabularyTrainer(Trainer):
    r"""What a user of transformers writes first: a Trainer that compares the two distributions everywhere.

    .. math:: \frac{1}{B T} \sum_{n=1}^{B T} KL(softmax(z^T_n) \,\|\, softmax(z^S_n))

    This is :func:`study.distillation.losses.output_distribution` at all positions, with logits (B, T, vocabulary); the
    study's default computes logits and loss at the masked 15 % only.
    """

    def __init__(self, *arguments, teacher: PreTrainedModel, **keywords):
        super().__init__(*arguments, **keywords)
        self.teacher = teacher

    def compute_loss(self, model, inputs, return_outputs=False, num_items_in_batch=None):
        outputs = model(**inputs)
        with torch.no_grad():
            targets = F.softmax(self.teacher(**inputs).logits.flatten(0, 1), dim=-1)
        loss = F.kl_div(F.log_softmax(outputs.logits.flatten(0, 1), dim=-1), targets, reduction="batchmean")
        return (loss, outputs) if return_outputs else loss


def full_vocabulary(teacher: BertForMaskedLM, student: BertForMaskedLM, inputs: Inputs) -> Step:
    """Training steps of :class:`FullVocabularyTrainer`."""
    return _by_trainer(partial(FullVocabularyTrainer, teacher=teacher), TrainingArguments, student, inputs)


def _models(teacher: PreTrainedModel, student: PreTrainedModel, heads: bool) -> tuple[Any, Any]:
    """Both models, with their language-modelling heads or without."""
    return (teacher, student) if heads else (teacher.base_model, student.base_model)


def _by_trainer(
    make: Callable[..., Trainer], arguments: Callable[..., Any], student: PreTrainedModel, inputs: Inputs
) -> Step:
    with TemporaryDirectory() as folder:  # made at once, needed for checkpoints only
        on_cpu = student.device.type == "cpu"
        trainer = make(student, arguments(output_dir=folder, use_cpu=on_cpu, report_to="none"))
    trainer.current_gradient_accumulation_steps = 1  # Trainer.train sets it before its first step
    return _complete(_adamw(student), lambda: trainer.training_step(student, inputs))


def _adamw(student: PreTrainedModel) -> torch.optim.Optimizer:
    return torch.optim.AdamW(student.parameters(), lr=1e-5, fused=True)


def _complete(optimizer: torch.optim.Optimizer, forward: Step) -> Step:
    def step() -> Tensor:
        loss = forward()
        if loss.requires_grad:  # a Trainer has made the backward pass already
            loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        return loss.detach()

    return step


#: ``params.benchmark.peers`` -> the peer.
PEERS = {
    peer.name: peer
    for peer in (
        Peer("bertdistiller-minilmv2", BERTDISTILLER, partial(bertdistiller, relation_heads=12)),
        Peer("bertdistiller-minilmv2-48-heads", BERTDISTILLER, partial(bertdistiller, relation_heads=48)),
        Peer("textbrewer-hidden-and-logits", TEXTBREWER, partial(textbrewer, logits_weight=1)),
        Peer("textbrewer-hidden", TEXTBREWER, partial(textbrewer, logits_weight=0)),
        Peer("textbrewer-hidden-encoders", TEXTBREWER, partial(textbrewer, logits_weight=0, heads=False)),
        Peer("torchdistill-logits", TORCHDISTILL, torchdistill),
        Peer("trainer-full-vocabulary", "transformers==5.23.0", full_vocabulary),
    )
}
