"""Public packages at the same work: one complete training step each, as their users run it, in float32 (B = batch, T =
tokens, V = vocabulary).

What all share. They read the masked tokens, as the study's methods do, with the teacher in evaluation mode and the
student in training mode as it was built: dropout is on, the default of their users (the study switches it off). The
package does the teacher's and the student's forward passes, the loss and (inside a Trainer) the backward pass; around
it stand one AdamW step, in the fused form that transformers' Trainer uses by default and the study uses too, and
``zero_grad``. Data loading, clipping and schedules are left out, though the study's own steps are timed with them.
Every peer runs both models through all layers; where its loss covers more or less than the study's method, its
docstring says so. None of these packages is a dependency: :data:`INSTALL` installs them beside the study, without their
pins (bertdistiller 0.1.2 asks for transformers < 5 and datasets < 4, torchdistill 1.1.5 for torchvision).
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass
from functools import partial
from importlib import import_module, metadata
from tempfile import TemporaryDirectory

import torch
from torch import Tensor
from torch.nn import functional as F
from transformers import BertForMaskedLM, Trainer, TrainingArguments

from study.config import StudyError
from study.mappings import layer_mapping

#: What follows ``python -m pip install`` to have every peer.
INSTALL = (
    "--no-deps --ignore-requires-python bertdistiller==0.1.2 textbrewer==0.2.1.post1 torchdistill==1.1.5"
    " tensorboardX==2.6.5 protobuf==7.36.2"
)

Batch = dict[str, Tensor]
Step = Callable[[], Tensor]


@dataclass(frozen=True)
class Peer:
    """A package at the work of one of the study's methods.

    Attributes:
        name: as in ``params.benchmark.peers``.
        requirement: the package and the version that is measured, ``package==version``.
        does: what a step computes, in one sentence.
        prepare: (teacher, student, batch) -> step; imports the package.
    """

    name: str
    requirement: str
    does: str
    prepare: Callable[[BertForMaskedLM, BertForMaskedLM, Batch], Step]

    def step(self, teacher: BertForMaskedLM, student: BertForMaskedLM, batch: Batch) -> Step:
        """Set everything up and return a function that makes one training step and returns its loss, detached.

        Args:
            teacher, student: on the same device; put into evaluation and training mode. Steps change the student alone.
            batch: ``masked_input_ids`` (B, T) is read, on the models' device; the rest is not.

        Raises:
            StudyError: the package is missing, of another version or cannot be imported; one line that says so.
        """
        package, _, wanted = self.requirement.partition("==")
        arguments = INSTALL if self.requirement in INSTALL else self.requirement
        needs, remedy = f"{self.name} needs {self.requirement}", f"python -m pip install {arguments}"
        try:
            found = metadata.version(package)
        except metadata.PackageNotFoundError:
            found = "none"
        if found != wanted:
            raise StudyError(f"{needs}, found {found}; install it with: {remedy}")
        try:
            return self.prepare(teacher.eval(), student.train(), batch)
        except ImportError as error:
            raise StudyError(f"{needs}, found it but cannot import it ({error}); try: {remedy}") from error


class FullVocabularyTrainer(Trainer):
    r"""What many write first: a Trainer whose loss compares the two distributions everywhere.

    .. math:: \frac{1}{B T} \sum_{n=1}^{B T} KL(softmax(z^T_n) \,\|\, softmax(z^S_n)), \quad z_n \in R^V

    The same as :func:`study.losses.output_distribution` at all positions; the study's default compares the masked ones
    (15 %), and so makes that many fewer logits.

    Args:
        teacher: gives ``logits`` (B, T, V), as the student does; not trained.
    """

    def __init__(self, *arguments, teacher: BertForMaskedLM, **keywords):
        super().__init__(*arguments, **keywords)
        self.teacher = teacher

    def compute_loss(self, model, inputs, return_outputs=False, num_items_in_batch=None):
        outputs = model(**inputs)
        with torch.no_grad():
            targets = F.softmax(self.teacher(**inputs).logits.flatten(0, 1), dim=-1)
        loss = F.kl_div(F.log_softmax(outputs.logits.flatten(0, 1), dim=-1), targets, reduction="batchmean")
        return (loss, outputs) if return_outputs else loss


def trainer_full_vocabulary(teacher: BertForMaskedLM, student: BertForMaskedLM, batch: Batch) -> Step:
    """``training_step`` of :class:`FullVocabularyTrainer`."""
    with TemporaryDirectory() as folder:
        trainer = FullVocabularyTrainer(student, _on_device(TrainingArguments, student, folder), teacher=teacher)
    inputs = {"input_ids": batch["masked_input_ids"]}
    return _complete(_adamw(student.parameters()), lambda: trainer.training_step(student, inputs))


def bertdistiller(teacher: BertForMaskedLM, student: BertForMaskedLM, batch: Batch, relation_heads: int) -> Step:
    """``training_step`` of bertdistiller's ``MiniLMTrainer`` on the encoders, student layer L_S and teacher layer
    L_T - 1.

    The loss is that of the study's MiniLMv2: the sum over Q, K, V of :func:`study.losses.attention_relation`. The work
    is more: both encoders run through all layers, the queries, keys and values of the two layers are computed a second
    time from the hidden states, and divergences are taken sequence by sequence. It asks for an attention mask, as
    tokenizers give it; here it is all ones.

    Source: bertdistiller 0.1.2, distillation/minilm/trainer.py.
    """
    package = import_module("bertdistiller")
    teacher, student = teacher.base_model, student.base_model
    teacher.config.architectures = ["BertForMaskedLM"]  # as saved checkpoints say; the package looks it up
    sizes = {
        "teacher_layer": teacher.config.num_hidden_layers - 1,
        "student_layer": student.config.num_hidden_layers,
        "student_hidden_size": student.config.hidden_size,
        "student_attention_heads": student.config.num_attention_heads,
        "num_relation_heads": relation_heads,
    }
    with TemporaryDirectory() as folder:
        arguments = _on_device(package.MiniLMTrainingArguments, student, folder, **sizes)
        trainer = package.MiniLMTrainer(student, arguments, teacher_model=teacher)
    tokens = batch["masked_input_ids"]
    inputs = {"input_ids": tokens, "attention_mask": torch.ones_like(tokens)}
    return _complete(_adamw(student.parameters()), lambda: trainer.training_step(student, inputs))


def textbrewer(
    teacher: BertForMaskedLM, student: BertForMaskedLM, batch: Batch, logits_weight: float, heads: bool = True
) -> Step:
    r"""What ``GeneralDistiller.train`` does at each step, with its losses ``hidden_mse`` and, with heads, ``ce``.

    .. math:: \sum_i \frac{1}{B T H} \| W_i h^S_i - h^T_{\phi(i)} \|^2
              - \frac{w}{B T} \sum_{n=1}^{B T} softmax(z^T_n) \cdot \log softmax(z^S_n)

    phi is the uniform mapping, W_i a linear map with bias to the teacher's width H. The first term is that of the
    study's ``hs-uniform`` times the number of pairs. The second, at temperature 1, is
    :func:`study.losses.output_distribution` at all positions (the study's default: the masked ones) plus the teacher's
    entropy, a constant. With w = 0 it is computed and backpropagated all the same, as users find who set this weight
    alone; encoders without heads leave it out, and compare with ``hs-uniform`` like with like.

    Args:
        logits_weight: w.
        heads: whether the models keep their language-modelling heads.

    Source: textbrewer 0.2.1.post1, distiller_general.py and distiller_basic.py.
    """
    package = import_module("textbrewer")
    if not heads:
        teacher, student = teacher.base_model, student.base_model
    mapping = layer_mapping("uniform", teacher.config.num_hidden_layers, student.config.num_hidden_layers)
    linear = ("linear", student.config.hidden_size, teacher.config.hidden_size)
    match = {"feature": "hidden", "loss": "hidden_mse", "weight": 1}
    matches = [match | {"layer_S": i, "layer_T": j, "proj": list(linear)} for i, (j,) in mapping.items()]
    losses = package.DistillationConfig(temperature=1, kd_loss_weight=logits_weight, intermediate_matches=matches)
    with TemporaryDirectory() as folder:
        training = package.TrainingConfig(output_dir=folder, device=student.device)

    def adaptor(batch, outputs):
        return {"hidden": outputs.hidden_states} | ({"logits": outputs.logits} if heads else {})

    distiller = package.GeneralDistiller(training, losses, teacher, student, adaptor, adaptor)
    optimizer = _adamw(student.parameters())
    distiller.initialize_training(optimizer, None, None, None)  # adds the linear maps to the optimizer
    inputs = {"input_ids": batch["masked_input_ids"]}

    def forward_and_backward() -> Tensor:
        loss, parts = distiller.train_on_batch(inputs, {"output_hidden_states": True})
        distiller.write_loss(loss, 0, parts)
        loss.backward()
        return loss.detach()

    return _complete(optimizer, forward_and_backward)


def torchdistill(teacher: BertForMaskedLM, student: BertForMaskedLM, batch: Batch) -> Step:
    """torchdistill's ``KDLoss`` of the logits, flattened to (B T, V), in a plain loop.

    The formula is that of :class:`FullVocabularyTrainer`, at all positions, where the study's default takes the masked
    ones. Flattened, because the package takes softmax over dimension 1, which would be the tokens. Its DistillationBox
    imports torchvision and PIL with it, so only its loss is used.

    Source: torchdistill 1.1.5, losses/mid_level.py.
    """
    package = import_module("torchdistill.losses.mid_level")
    criterion = package.KDLoss("logits", "output", "logits", "output", temperature=1, alpha=0)
    inputs = {"input_ids": batch["masked_input_ids"]}

    def forward_and_backward() -> Tensor:
        with torch.no_grad():
            targets = {"logits": {"output": teacher(**inputs).logits.flatten(0, 1)}}
        loss = criterion({"logits": {"output": student(**inputs).logits.flatten(0, 1)}}, targets)
        loss.backward()
        return loss.detach()

    return _complete(_adamw(student.parameters()), forward_and_backward)


def _on_device(kind: type, student: torch.nn.Module, folder: str, **sizes) -> TrainingArguments:
    return kind(output_dir=folder, use_cpu=student.device.type == "cpu", report_to="none", **sizes)


def _adamw(parameters: Iterable[Tensor]) -> torch.optim.Optimizer:
    return torch.optim.AdamW(parameters, lr=1e-5, fused=True)


def _complete(optimizer: torch.optim.Optimizer, forward_and_backward: Step) -> Step:
    def step() -> Tensor:
        loss = forward_and_backward()
        optimizer.step()
        optimizer.zero_grad()
        return loss

    return step


_BERTDISTILLER, _TEXTBREWER = "bertdistiller==0.1.2", "textbrewer==0.2.1.post1"
_RELATIONS = "MiniLMv2 on {} relation heads, by its own Trainer: whole encoders, relations one sequence at a time."

#: Name in ``params.benchmark.peers`` -> the peer.
PEERS = {
    peer.name: peer
    for peer in (
        Peer(
            "bertdistiller-minilmv2",
            _BERTDISTILLER,
            _RELATIONS.format(12),
            partial(bertdistiller, relation_heads=12),
        ),
        Peer(
            "bertdistiller-minilmv2-48-heads",
            _BERTDISTILLER,
            _RELATIONS.format(48),
            partial(bertdistiller, relation_heads=48),
        ),
        Peer(
            "textbrewer-hidden-and-logits",
            _TEXTBREWER,
            "Hidden states by the uniform mapping, plus the cross-entropy of the distributions at all positions.",
            partial(textbrewer, logits_weight=1),
        ),
        Peer(
            "textbrewer-hidden",
            _TEXTBREWER,
            "Hidden states by the uniform mapping; the logits' loss is computed at all positions and weighted 0.",
            partial(textbrewer, logits_weight=0),
        ),
        Peer(
            "textbrewer-hidden-encoders",
            _TEXTBREWER,
            "Hidden states by the uniform mapping, of encoders without language-modelling heads.",
            partial(textbrewer, logits_weight=0, heads=False),
        ),
        Peer(
            "torchdistill-logits",
            "torchdistill==1.1.5",
            "Divergence of the distributions over the whole vocabulary at all positions.",
            torchdistill,
        ),
        Peer(
            "trainer-full-vocabulary",
            "transformers==5.23.0",
            "A Trainer with the divergence of the distributions over the whole vocabulary at all positions as its loss.",
            trainer_full_vocabulary,
        ),
    )
}
