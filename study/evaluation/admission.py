"""Which tasks tell a Transformer from a bag of embeddings: models without training beside the teacher."""

from __future__ import annotations

import tempfile
from collections import Counter
from collections.abc import Hashable, Sequence
from pathlib import Path
from typing import Any

import torch
from transformers import PreTrainedTokenizerBase

from study.data.corpus import load_corpus
from study.data.pretrained import load_model, save_model
from study.data.tasks import find_task, load_task, subsample
from study.descriptions import Admission
from study.distillation.distil import START_SEQUENCES
from study.distillation.students import create_student
from study.evaluation.probes import Probes
from study.evaluation.provenance import input_hashes, provenance
from study.families import keep_layers
from study.files import Layout
from study.records import AdmissionResult, TaskAdmission, write_record


def admit(description: Admission, layout: Layout, output: Path) -> AdmissionResult:
    """Score models on the development data of every task and candidate of a setting, and write the result file.

    The models: ``teacher``; ``encoder``, the teacher before its adaptation; ``floor``, an untrained student; ``bag``,
    one with random layers under the teacher's embeddings; ``embeddings``, the teacher's embeddings without any layer.
    Scores are those of linear probes of frozen states. Retrieval has no development data and is left out.

    Source: this study's choice. A task on which the bag closes half of the way from the majority to the teacher says
    little about what distillation gives a student.

    Raises:
        StudyError: teacher, tasks or corpus are missing.
    """
    probes = Probes(description, layout, seed=0)
    tasks = {name: find_task(layout.tasks, name) for name in description.tasks}
    scores: dict[str, dict[str, float]] = {name: {} for name in tasks if tasks[name].kind != "retrieval"}
    with tempfile.TemporaryDirectory() as folder:
        for model, place in _models(description, layout, probes.tokenizer, Path(folder)).items():
            for name in scores:
                scores[name][model] = probes.score(place, name)
                print(f"admission: {name} | {model} | {scores[name][model]:.3f}", flush=True)
    admitted = []
    for name, own in scores.items():
        task, rows = tasks[name], load_task(layout.tasks, name)["development"]
        labels = list(subsample(rows, description.tasks[name].development)["label"])
        admitted.append(
            TaskAdmission(
                task=name,
                group=task.group,
                metric=task.metric,
                examples=len(labels),
                majority=0.0 if task.labels is None or task.kind == "tokens" else majority(labels, task.metric),
                scores=own,
            )
        )
    result = AdmissionResult(**provenance(description, layout, input_hashes(layout)), tasks=admitted)
    write_record(output, result)
    return result


def majority(labels: Sequence[Hashable], metric: str) -> float:
    """What always giving the commonest label scores: its share or, in macro F1, that of the one class that is told."""
    counts = Counter(labels)
    share = max(counts.values()) / len(labels)
    return 2 * share / (1 + share) / len(counts) if metric == "macro_f1" else share


def _models(
    description: Admission, layout: Layout, tokenizer: PreTrainedTokenizerBase, folder: Path
) -> dict[str, Path]:
    """Name -> the folder it is saved in; those that are made here are below ``folder``."""
    teacher = load_model(layout.teacher, description.attention_implementation)
    sample = torch.tensor(load_corpus(layout.corpus)["train"][:START_SEQUENCES]["input_ids"])
    for name, initialisation in (("floor", description.initialisation), ("bag", "teacher-embeddings")):
        student = create_student(teacher, description.sizes, initialisation, sample, seed=0)
        save_model(student, tokenizer, folder / name)
    embeddings: Any = teacher.base_model
    keep_layers(embeddings, 0)
    save_model(embeddings, tokenizer, folder / "embeddings")
    made = {name: folder / name for name in ("floor", "bag", "embeddings")}
    return {"teacher": layout.teacher, "encoder": layout.encoder} | made
