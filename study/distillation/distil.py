"""Distillation of one student as its description says."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

import torch
from datasets import DatasetDict
from torch import Tensor, nn
from transformers import (
    PreTrainedModel,
    PreTrainedTokenizerBase,
    TrainerCallback,
    TrainingArguments,
    default_data_collator,
)

from study.data.corpus import corpus_hash, load_corpus
from study.data.pretrained import load_model, load_tokenizer
from study.descriptions import Run
from study.distillation import processes
from study.distillation.masking import MaskedSequences
from study.distillation.objectives import OBJECTIVES, Objective
from study.distillation.objectives.base import RECOMPUTE
from study.distillation.operations import equal_steps
from study.distillation.pruning import SEQUENCES, unit_importance
from study.distillation.students import create_student, prunes_within_layers
from study.distillation.taps import Layers
from study.distillation.teacher_outputs import TeacherOutputs
from study.distillation.trainer import (
    Checkpoints,
    applied,
    common_arguments,
    digest,
    freeze_untrained,
    save_trained,
    switch_off_dropout,
    train,
)
from study.files import Layout, StudyError, content_hash, make_folder
from study.methods import PARTS, FastPath, OutputDistribution, Untrained, parts_of
from study.records import Training
from study.revisions import revisions
from study.runtime import compute_device, keep_freed_memory, switched_on, use_bf16
from study.sections import Distillation

START_SEQUENCES = 32  # of the training stream, for projections and projected initialisation


def distil(
    run: Run, layout: Layout, output: Path, others: Sequence[Run] = (), callbacks: Sequence[TrainerCallback] = ()
) -> dict[str, Any]:
    """Distil one student and save it to ``output`` (loadable by ``from_pretrained``) with its ``record.json``.

    A run that was killed continues from its last checkpoint when called again with the same description, corpus and
    teacher, by however many processes (:mod:`study.distillation.processes`).

    Args:
        others: the runs of the plan. Where the teacher has to be computed, what they read of it is kept for them too;
            and the progress says which of them this is. The student does not depend on them.
        callbacks: of the Trainer, which watch.

    Returns:
        The record: ``run`` (its names), ``hashes`` of corpus and teacher, ``training`` (fields of
        :class:`study.records.Training`; None for the untrained student) and ``environment``.

    Raises:
        StudyError: a missing or damaged input, a corpus shorter than one batch, processes that do not divide it or
            cannot do what the environment asks for (sharded teacher, gradient checkpointing).
        DivergedError: a loss that is not finite.
    """
    processes.share(run.distillation.batch_size, run.distillation.accumulation_steps)  # before any work
    sharded, recomputes = processes.shards_teacher(), switched_on(RECOMPUTE)
    make_folder(output.parent)
    tokenizer, teacher, corpus = _inputs(run, layout)
    stream = MaskedSequences(
        corpus["train"], run.masking, tokenizer, run.seed, START_SEQUENCES, sampled=_samples_positions(run)
    )
    device = compute_device()
    home = torch.device("cpu") if sharded else device  # where a teacher to be sharded may not fit
    nn.Module.to(teacher, home)
    start = {k: x.to(home) for k, x in default_data_collator([stream[i] for i in range(START_SEQUENCES)]).items()}
    budget = training_budget(run, teacher, start)  # before anything is drawn at random
    importance = None
    if prunes_within_layers(teacher, run.sizes, run.initialisation):
        read = MaskedSequences(corpus["train"], run.masking, tokenizer, run.seed, SEQUENCES)
        importance = unit_importance(teacher, read)
    student = create_student(teacher, run.sizes, run.initialisation, start["input_ids"], run.seed, importance)
    nn.Module.to(student, device)
    if sharded:
        processes.shard(teacher)
        start = {key: x.to(device) for key, x in start.items()}
    record: dict[str, Any] = {
        "run": {"setting": run.setting, "method": run.method, "student": run.student, "seed": run.seed},
        "hashes": {"corpus": corpus_hash(layout.corpus), "teacher": content_hash(layout.teacher)},
        "training": None,
    }
    if isinstance(run.objective, Untrained):
        save_trained(student, tokenizer, record, output)
        return record

    objective = prepare_objective(run, budget, student, teacher, start)
    if recomputes:
        objective.recompute_layers()
    stream, validation = sequences(run, budget, corpus, tokenizer)
    paths = applied(run.fast_paths, budget.accumulation_steps, sharded, recomputes)
    start_fast_paths(
        paths,
        use_bf16(run.precision),
        objective,
        layout.teacher_outputs / digest(_outputs_identity(run, budget) | {"inputs": record["hashes"]}),
        (stream.numbered + len(validation), start["input_ids"].shape[1]),
        layers_of_others(run, budget, others, teacher.config.num_hidden_layers),
    )
    with Checkpoints(layout.checkpoints, {"run": run.model_dump(mode="json"), "inputs": record["hashes"]}) as folder:
        arguments, title = _arguments(run, budget, folder), progress_title(run, others)
        trained = train(objective, stream, validation, arguments, title, [*callbacks], "cuda-graphs" in paths)
        record["training"] = Training(
            objective=run.objective.objective,
            learning_rate=run.objective.learning_rate,
            options=run.objective.model_dump(),
            revisions=run.revisions,
            initialisation=run.initialisation,
            inputs=budget.inputs,
            fast_paths=list(paths),
            **trained,
        ).model_dump(exclude_none=True)
        save_trained(objective.student, tokenizer, record, output)
    return record


def _inputs(run: Run, layout: Layout) -> tuple[PreTrainedTokenizerBase, PreTrainedModel, DatasetDict]:
    """Tokenizer, teacher and corpus, looked at before any work."""
    tokenizer = load_tokenizer(layout.teacher)
    teacher = load_model(layout.teacher, run.attention_implementation)
    if not all(parameter.isfinite().all() for parameter in teacher.parameters()):
        raise StudyError(f"{layout.teacher}: holds weights that are not finite; run the stage that writes it again")
    corpus = load_corpus(layout.corpus)
    if len(corpus["train"]) < run.distillation.batch_size:
        raise StudyError(
            f"{layout.corpus}: {len(corpus['train'])} training sequences; distillation.batch_size ="
            f" {run.distillation.batch_size} needs at least one batch"
        )
    return tokenizer, teacher, corpus


def training_budget(run: Run, teacher: PreTrainedModel, start: dict[str, Tensor]) -> Distillation:
    """``run.distillation`` with what follows from the method: the steps of equal compute, masked inputs of outputs."""
    if isinstance(run.objective, Untrained):
        return run.distillation
    return _with_inputs(run).model_copy(update={"steps": equal_steps(run, teacher, start)})


def prepare_objective(
    run: Run, budget: Distillation, student: PreTrainedModel, teacher: PreTrainedModel, start: dict[str, Tensor]
) -> Objective:
    """The objective ready for training: no dropout, projections at least squares, frozen what is not trained."""
    assert not isinstance(run.objective, Untrained)
    switch_off_dropout(student)
    architecture = OBJECTIVES[run.objective.objective]
    objective = architecture(student, teacher, run.objective, budget.inputs, "fused-losses" in run.fast_paths)
    objective.rounds_outputs = budget.mask_sets is not None
    objective.to(start["input_ids"].device).start(start)
    freeze_untrained(objective, {key: value[:1] for key, value in start.items()})
    return objective


def sequences(
    run: Run, budget: Distillation, corpus: DatasetDict, tokenizer: PreTrainedTokenizerBase
) -> tuple[MaskedSequences, MaskedSequences]:
    """The stream of training and the held-out sequences; the numbers of the latter follow those of the former."""
    sampled = _samples_positions(run)
    length = budget.steps * budget.batch_size
    stream = MaskedSequences(
        corpus["train"], run.masking, tokenizer, run.seed, length, mask_sets=budget.mask_sets, sampled=sampled
    )
    held_out = corpus["validation"].select(range(min(budget.validation_sequences, len(corpus["validation"]))))
    return stream, MaskedSequences(held_out, run.masking, tokenizer, seed=0, first=stream.numbered, sampled=sampled)


def layers_of_others(run: Run, budget: Distillation, others: Iterable[Run], teacher_layers: int) -> Layers:
    """What those of ``others`` read of the teacher that read the very sequences of ``run``.

    Runs of equal compute are left out: their steps, and with them the numbers of their sequences, are their own.

    Args:
        teacher_layers: the teacher's depth.
    """
    layers: dict[str, set[int]] = defaultdict(set)
    for other in others:
        if other.setting != run.setting or isinstance(other.objective, Untrained) or other.equal_compute:
            continue
        if _outputs_identity(other, _with_inputs(other)) == _outputs_identity(run, budget):
            architecture = OBJECTIVES[other.objective.objective]
            for key, needed in architecture.layers_read(other.objective, teacher_layers, other.sizes.layers).items():
                layers[key] |= needed
    return dict(layers)


def start_fast_paths(
    fast_paths: Sequence[FastPath],
    bf16: bool,
    objective: Objective,
    teacher_outputs: Path,
    shape: tuple[int, int],
    others: Layers | None = None,
) -> None:
    """Switch on those of ``fast_paths`` that are not built into the objective.

    Args:
        teacher_outputs: a folder that names everything that the teacher's outputs depend on.
        shape: (sequences that the run numbers, tokens of each).
        others: what other runs read of the teacher (:func:`layers_of_others`); left out if the disk is too full for it.
    """
    if "kept-memory" in fast_paths:
        keep_freed_memory()
    if objective.teacher is None:
        return
    if "rounded-teacher" in fast_paths and bf16:
        objective.round_teacher()
    if "shared-teacher" in fast_paths:
        dtype = torch.bfloat16 if bf16 or objective.rounds_outputs else torch.float32
        size, needed = (*shape, objective.teacher.config.hidden_size), objective.teacher_layers()
        stores = (TeacherOutputs(teacher_outputs, size, dtype, needed, also) for also in (others, None))
        objective.teacher_outputs = next((store for store in stores if store.open()), None)
        if objective.teacher_outputs is None:
            print(f"{teacher_outputs}: the disk is too full to share what the teacher computes", flush=True)


def progress_title(run: Run, others: Sequence[Run]) -> str:
    """The run's title, behind its number among ``others`` where it is one of them."""
    return f"[{others.index(run) + 1}/{len(others)}] {run.title}" if run in others else run.title


def _samples_positions(run: Run) -> bool:
    parts = parts_of(run.objective)
    return any(isinstance(own, OutputDistribution) and own.positions == "sampled" for own in parts)


def _with_inputs(run: Run) -> Distillation:
    assert not isinstance(run.objective, Untrained)
    masked = OBJECTIVES[run.objective.objective].trains_head(run.objective)
    return run.distillation.model_copy(update={"inputs": "masked"}) if masked else run.distillation


def _outputs_identity(run: Run, budget: Distillation) -> dict[str, Any]:
    """What the teacher's outputs depend on, teacher and corpus aside; runs with the same may share them.

    Where every sequence has its own numbered masks, seed and budget do not count.
    """
    shared = budget.model_dump(mode="json", include={"inputs", "mask_sets", "validation_sequences"})
    if budget.mask_sets is None:
        shared = {"seed": run.seed, **budget.model_dump(mode="json")}
    return {
        **run.model_dump(mode="json", include={"masking", "precision", "attention_implementation"}),
        "distillation": shared,
        "revisions": revisions("masking", *PARTS),
    }


def _arguments(run: Run, budget: Distillation, folder: Path) -> TrainingArguments:
    assert not isinstance(run.objective, Untrained)
    return TrainingArguments(
        output_dir=str(folder),
        max_steps=budget.steps,
        per_device_train_batch_size=processes.share(budget.batch_size, budget.accumulation_steps),
        gradient_accumulation_steps=budget.accumulation_steps,
        learning_rate=run.objective.learning_rate,
        warmup_steps=round(budget.warmup_fraction * budget.steps),
        weight_decay=budget.weight_decay,
        adam_epsilon=budget.adam_epsilon,
        max_grad_norm=budget.max_gradient_norm,
        eval_steps=budget.evaluate_every,
        save_steps=budget.save_every,
        seed=run.seed,
        **common_arguments(use_bf16(run.precision), budget.batch_size),
    )
