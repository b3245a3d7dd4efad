"""XtremeDistilTransformers: an encoder distilled in stages from a teacher of one task, then used for others.

Standing: code-exact. From the public code are the compressed embeddings, what the first stage compares, the map that
stays in the classifier, stages and what they freeze, and the optimiser. This study's choices: padding is left out,
and weights are chosen on development data, where the public code chooses on test data.

Source: Mukherjee et al. (2106.04563) and their public code.
"""

from __future__ import annotations

from dataclasses import dataclass
from statistics import fmean
from typing import Any, cast

import numpy as np
import torch
from datasets import Dataset
from torch import Tensor, nn
from torch.nn import functional as F
from transformers import PreTrainedModel

from study.data.pretrained import load_model, load_tokenizer
from study.data.tasks import Task, find_task
from study.descriptions import NeighbourSystem
from study.distillation.losses import attention_scores, hidden_state
from study.distillation.mappings import layer_mapping
from study.distillation.objectives.attention_maps import check_scores_exist
from study.distillation.objectives.base import gather
from study.distillation.students import create_student
from study.distillation.taps import read_activations
from study.evaluation.finetune import MeanPoolingClassifier, reading_batch
from study.evaluation.metrics import task_metrics
from study.families import family_of
from study.files import Layout, StudyError
from study.neighbours.stages import (
    Distillation,
    TargetCollator,
    batches,
    both,
    joint_splits,
    on_tasks,
    teacher_of,
    train_stage,
    with_targets,
)
from study.neighbours.system import Measured, System
from study.neighbours_options import XtremeDistil
from study.records_beside import Check
from study.runtime import compute_device

#: What the first stage compares -> how its layers are mapped; None: the last layer's [CLS] alone.
VARIANTS = {"cls": None, "topmost": "top", "uniform": "uniform"}
#: The optimiser is Adam at a rate that stays, without decay or clipping.
SCHEDULE = {"lr_scheduler_type": "constant", "weight_decay": 0.0, "max_grad_norm": 0.0}


def compressed(embeddings: Tensor, width: int) -> Tensor:
    r"""Word embeddings E (V, H) on their ``width`` leading principal directions P: :math:`(E - \bar{e}) P^\top`.

    Raises:
        StudyError: embeddings that are narrower.
    """
    if width > embeddings.shape[1]:
        raise StudyError(f"width = {width}; allowed: at most {embeddings.shape[1]}, as the teacher's embeddings have")
    centred = embeddings.double() - embeddings.double().mean(dim=0)
    directions = torch.linalg.eigh(centred.T @ centred).eigenvectors.flip(1)[:, :width]
    return (centred @ directions).to(embeddings)


def attention_maps(student: Tensor, teacher: Tensor, attention_mask: Tensor) -> Tensor:
    r"""Mean squared error of attention, head by head, over pairs of real tokens.

    .. math:: \frac{1}{A \sum_b |x_b|^2} \sum_b \sum_a \sum_{t, u \in x_b} (P^S_{a,t,u} - P^T_{a,t,u})^2

    Args:
        student, teacher: (B, A, T, T) scores; P is their softmax over real tokens u. attention_mask: (B, T).

    Source: XtremeDistilTransformers, its public code, which counts padding in the mean.
    """
    padding, least = ~attention_mask.bool()[:, None, None, :], torch.finfo(torch.float32).min
    own, target = (x.float().masked_fill(padding, least).softmax(dim=-1) for x in (student, teacher))
    pairs = both(attention_mask, attention_mask)[:, None]
    squared = (own - target).square().masked_fill(~pairs, 0.0)
    return squared.sum() / (student.shape[1] * pairs.sum().clamp(min=1))


def first_token(states: Tensor, attention_mask: Tensor) -> Tensor:
    """(B, T, H) at the first real token, on whichever side padding is: (B, H)."""
    return gather(states, attention_mask.argmax(1, keepdim=True))[:, 0]


class ClsClassifier(MeanPoolingClassifier):
    """The teacher: :class:`study.evaluation.finetune.MeanPoolingClassifier` of the first token instead of the mean."""

    def _pooled(self, input_ids: Tensor, attention_mask: Tensor, token_type_ids: Tensor | None = None) -> Tensor:
        states = self.encoder(input_ids=input_ids, attention_mask=attention_mask).last_hidden_state
        return first_token(states, attention_mask).float()


class Representation(Distillation):
    r"""Stage 1: states of student and teacher, at the teacher's width H through one map W a state.

    ========= =============================================================================================
    variant   loss; MSE is a mean over real tokens and width, [CLS] the first token
    ========= =============================================================================================
    cls       MSE of [CLS] of the last layers, :math:`\| W_m h^S_m - h^T_L \|^2 / H`
    topmost   :math:`\sum_{i=0}^m MSE(W_i h^S_i, h^T_{L-m+i})` + sum of :func:`attention_maps` of the m topmost layers
    uniform   the same with layers :math:`\lfloor i L / m \rfloor`: a control
    ========= =============================================================================================

    State 0 of the student is its embedding output. Where widths are equal there are no maps.

    Raises:
        StudyError: an unknown variant, a student with more layers, or with other heads where attention is compared.
    """

    def __init__(self, student: PreTrainedModel, teacher: PreTrainedModel, variant: str):
        super().__init__(student, teacher)
        own, target = student.config, teacher.config
        if variant not in VARIANTS:
            raise StudyError(f"variant {variant!r} is unknown; allowed: {', '.join(VARIANTS)}")
        if own.num_hidden_layers > target.num_hidden_layers:
            raise StudyError(f"layers = {own.num_hidden_layers}; allowed: at most {target.num_hidden_layers}")
        if variant != "cls" and own.num_attention_heads != target.num_attention_heads:
            raise StudyError(
                f"variant {variant}: heads = {own.num_attention_heads}; allowed: {target.num_attention_heads}, as the"
                " teacher has, whose attention is compared"
            )
        if variant != "cls":
            check_scores_exist(teacher, "model", "xtremedistil")
        self.heads, mapping = own.num_attention_heads, VARIANTS[variant]
        depth = own.num_hidden_layers
        if mapping is None:
            self.pairs, self.states = {}, {depth: target.num_hidden_layers}
        else:
            self.pairs = {i: j for i, (j,) in layer_mapping(mapping, target.num_hidden_layers, depth).items()}
            self.states = {0: self.pairs[1] - 1 if variant == "topmost" else 0} | self.pairs
        widths: tuple[int, int] = own.hidden_size, target.hidden_size
        self.maps = (
            nn.ModuleDict() if widths[0] == widths[1] else nn.ModuleDict({str(i): _dense(*widths) for i in self.states})
        )
        self.dropout = nn.Dropout(getattr(own, family_of(student).dropout))

    def forward(self, input_ids: Tensor, attention_mask: Tensor, **others: Tensor) -> dict[str, Tensor]:
        own = read_activations(self.student, input_ids, attention_mask, self.states, self.pairs)
        with torch.no_grad():
            layers = self.states.values(), self.pairs.values()
            target = read_activations(self.teacher, input_ids, attention_mask, *layers)
        counted = attention_mask if self.pairs else F.one_hot(attention_mask.argmax(1), attention_mask.shape[1])
        parts = [hidden_state(self.mapped(i, own.hidden[i]), target.hidden[j], counted) for i, j in self.states.items()]
        for i, j in self.pairs.items():
            x, y = own.attention[i], target.attention[j]
            scores = [attention_scores(layer["query"], layer["key"], self.heads) for layer in (x, y)]
            parts.append(attention_maps(scores[0], scores[1], attention_mask))
        return {"loss": torch.stack(parts).sum()}

    def mapped(self, layer: int, states: Tensor) -> Tensor:
        """Dropout, then the map of a state."""
        return self.maps[str(layer)](self.dropout(states)) if self.maps else states


def _dense(width: int, outputs: int) -> nn.Linear:
    dense = nn.Linear(width, outputs)
    nn.init.trunc_normal_(dense.weight, std=0.02)
    nn.init.zeros_(dense.bias)
    return dense


class StagedClassifier(nn.Module):
    """[CLS] of the student, dropout, the map of the first stage, dropout, logits.

    ``forward`` gives the loss that its stage minimises: MSE to the teacher's logits, given as ``targets``, while
    ``from_logits``, then cross-entropy of labels.
    """

    accepts_loss_kwargs = False

    def __init__(self, first: Representation, classes: int):
        super().__init__()
        self.encoder: Any = first.student
        last = str(self.encoder.config.num_hidden_layers)
        self.dense = first.maps[last] if first.maps else nn.Identity()
        self.dropout = first.dropout
        self.output = _dense(first.teacher.config.hidden_size, classes)  # widths are equal without a map
        self.from_logits = True

    def blocks(self) -> list[nn.Module]:
        """What is unfrozen in turn, from the top: the map, if any, and the whole encoder."""
        return [*([self.dense] if isinstance(self.dense, nn.Linear) else []), self.encoder]

    def forward(self, labels: Tensor, targets: Tensor, input_ids: Tensor, attention_mask: Tensor) -> dict[str, Tensor]:
        states = self.encoder(input_ids=input_ids, attention_mask=attention_mask).last_hidden_state
        first = first_token(states, attention_mask)
        inner = self.dense(self.dropout(first)) if isinstance(self.dense, nn.Linear) else first
        logits = self.output(self.dropout(inner)).float()
        loss = F.mse_loss(logits, targets.float()) if self.from_logits else F.cross_entropy(logits, labels)
        return {"loss": loss, "logits": logits}


@dataclass(frozen=True)
class Taught:
    """The source task, its teacher, and examples with the teacher's logits: labelled, held out, and for transfer."""

    task: Task
    teacher: MeanPoolingClassifier
    collate: TargetCollator
    train: Dataset
    development: Dataset
    transfer: Dataset


_taught: dict[tuple[str, int], Taught] = {}


def teach(description: NeighbourSystem, layout: Layout, seed: int) -> Taught:
    """Fine-tune the model of the description on the source task, once for all arms of a seed.

    Raises:
        StudyError: a source task without classes.
    """
    key = description.model_dump_json(), seed
    if key not in _taught:
        options = cast(XtremeDistil, description.options)
        task = find_task(layout.tasks, options.source)
        if not task.labels:
            raise StudyError(f"source = {task.name!r} has no classes; allowed: a task whose labels are names")
        tokenizer = load_tokenizer(description.folder(layout))
        budget = description.tasks[task.name].model_copy(update={"languages": []})

        def examples(train: int | None) -> dict[str, Dataset]:
            own = budget.model_copy(update={"train": train})
            return joint_splits(description, layout, task, own, tokenizer, seed)

        splits, more = examples(budget.train), examples(options.transfer)["train"]
        teacher = teacher_of(description, layout, task, splits, tokenizer, seed, ClsClassifier)
        collate = TargetCollator(tokenizer, description.finetuning.pad_to_multiple_of)
        train, development, transfer = (
            with_targets(description, teacher, own, collate) for own in (splits["train"], splits["development"], more)
        )
        _taught[key] = Taught(task, teacher, collate, train, development, transfer)
    return _taught[key]


def distil(
    description: NeighbourSystem, student: PreTrainedModel, taught: Taught, variant: str, seed: int
) -> dict[str, float]:
    """All stages, in place: the student ends with the weights that are best on the source's development data.

    Word embeddings that ask for no gradient stay as they are in all of them.

    Returns:
        That score, ``source``, and by which share the first stage lowered its own held-out loss, ``lowered``.
    """
    options = cast(XtremeDistil, description.options)
    frozen = [own for own in student.parameters() if not own.requires_grad]
    shared: dict[str, Any] = {"description": description, "collate": taught.collate, "seed": seed, "schedule": SCHEDULE}
    first = Representation(student, taught.teacher.encoder, variant).to(compute_device())
    before, after = train_stage(
        model=first, train=taught.transfer, development=taught.development, keep="loss",
        **options.representation.model_dump(), **shared,
    )  # fmt: skip
    model = StagedClassifier(first, taught.teacher.output.out_features).to(compute_device())
    best: tuple[float, dict[str, Tensor]] | None = None
    for model.from_logits in (True, False):
        stage = options.logits if model.from_logits else options.labels
        keep: Any = "loss" if model.from_logits else taught.task
        for thawed in range(len(model.blocks()) + 1):
            model.requires_grad_(False)
            for block in [model.output, *model.blocks()[:thawed]]:
                block.requires_grad_(True)
            for own in frozen:
                own.requires_grad_(False)
            train_stage(
                model=model, train=taught.transfer if model.from_logits else taught.train,
                development=taught.development, keep=keep, **stage.model_dump(), **shared,
            )  # fmt: skip
            score = _score(description, model, taught)
            if best is None or score >= best[0]:
                best = score, {name: own.detach().clone() for name, own in model.state_dict().items()}
    assert best is not None
    model.load_state_dict(best[1])
    return {"source": best[0], "lowered": 1 - after / before}


@torch.no_grad()
def _score(description: NeighbourSystem, model: StagedClassifier, taught: Taught) -> float:
    read = batches(taught.development, taught.collate, reading_batch(description.finetuning))
    model.eval()
    logits = torch.cat([model(**batch)["logits"].cpu() for batch in read])
    return task_metrics(taught.task, logits.numpy(), np.array(taught.development["labels"]))[taught.task.metric]


def jobs(options: XtremeDistil) -> list[str]:
    """Variant and embeddings, joined by a dash, of which one at most is not the first of its list; then ``start``."""
    embeddings = [f"{options.variants[0]}-{own}" for own in options.embeddings]
    return [*embeddings, *(f"{own}-{options.embeddings[0]}" for own in options.variants[1:]), "start"]


def words(arm: str) -> str:
    """An arm's name in words."""
    if arm == "start":
        return "the student before distillation"
    variant, embeddings = arm.split("-")
    states = {"cls": "[CLS] of the last layer", "topmost": "topmost states", "uniform": "states of uniform layers"}
    return f"{states[variant]}, {'compressed' if embeddings == 'pca' else 'random'} embeddings"


def run(description: NeighbourSystem, layout: Layout, job: str, seed: int) -> Measured:
    """Distil from the source task, then fine-tune the encoder on every other task of the description."""
    options = cast(XtremeDistil, description.options)
    taught, folder = teach(description, layout, seed), description.folder(layout)
    variant, _, embeddings = (job if job != "start" else f"-{options.embeddings[0]}").partition("-")
    model = create_student(
        load_model(folder, description.attention_implementation), options.student, "random", seed=seed
    )
    if embeddings == "pca":
        table: Any = taught.teacher.encoder.get_input_embeddings()
        own: Any = model.get_input_embeddings()
        own.weight.data.copy_(compressed(table.weight.detach(), options.student.width))
        own.weight.requires_grad_(job == "start")
    found = distil(description, cast(PreTrainedModel, model.base_model), taught, variant, seed) if variant else {}
    others = [name for name in description.tasks if name != options.source]
    scores, probes = on_tasks(description, layout, model, others, seed, description.finetuning.learning_rates[0])
    return {job: {"score": fmean([*scores.values()])} | scores | {"probe": fmean([*probes.values()])} | found}


def checks(options: XtremeDistil) -> list[Check]:
    """What the paper and its code imply of the order of arms."""
    own = f"{options.variants[0]}-{options.embeddings[0]}"
    claims = [
        ("distilled on one task, the encoder is better on others than before", own, "start", "score"),
        ("so it is without fine-tuning, under a linear probe", own, "start", "probe"),
        ("topmost layers teach more than uniform ones", "topmost-pca", "uniform-pca", "score"),
        ("all topmost states teach more than [CLS] alone", "topmost-pca", "cls-pca", "score"),
        ("compressed embeddings are better than random ones", "topmost-pca", "topmost-random", "score"),
    ]
    return [Check(claim=claim, first=a, second=b, measure=measure) for claim, a, b, measure in claims]


XTREME_DISTIL = System(
    title="XtremeDistilTransformers: an encoder from the teacher of one task, for others",
    source="arXiv 2106.04563",
    standing="code-exact",
    equation="Σ‖W_i h_i(student) − h_(L−m+i)(teacher)‖² / H over i = 0 … m, + Σ‖P_i(student) − P_(L−m+i)(teacher)‖²"
    " over i = 1 … m, then ‖z(student) − z(teacher)‖², then −log p(y)",
    reproduced="Word embeddings by centred PCA of the teacher's, frozen; a first stage on the source's texts, of [CLS]"
    " of the last layer or of all topmost states and attention; logits, then labels, each with all but the head frozen"
    " and then unfrozen from the top, the encoder as one; the encoder is then fine-tuned on other tasks.",
    unknown=(
        "its scores: other tasks, a larger teacher, and up to 500 epochs where the options have few",
        "weights: chosen here on development data of the source, by the public code on test data",
        "the order of unfreezing: from the top, as its text says; the public code takes a set's",
        "rows and columns of padding: left out here, counted by the public code",
        "where the public code starts from a published student (as its MNLI command does), this starts at random",
    ),
    jobs=jobs,
    run=run,
    words=words,
    measures=lambda description: (
        {"score": "macro score on test data of other tasks"}
        | {name: name for name in description.tasks if name != description.options.source}  # type: ignore[union-attr]
        | {"probe": "macro score of linear probes", "source": "score on development data of the source"}
        | {"lowered": "share of the first stage's held-out loss that it removes"}
    ),
    checks=checks,
)
