"""Which tasks tell a Transformer from a bag of embeddings: models without training beside the teacher."""

from __future__ import annotations

import tempfile
from pathlib import Path
from typing import Any

import torch
from torch import nn

from study.data.corpus import load_corpus
from study.data.pretrained import load_model, load_tokenizer, save_model
from study.data.tasks import TASKS, load_task
from study.descriptions import Admission
from study.distillation.students import create_student
from study.evaluation.finetune import linear_probe, splits_without_test
from study.evaluation.masked_word import guess_masked_words
from study.evaluation.provenance import input_hashes, provenance
from study.files import Layout
from study.records import AdmissionResult, TaskAdmission, write_record

SAMPLE = 32  # sequences of the corpus, for layers that are projected


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
    tokenizer = load_tokenizer(layout.teacher)
    splits = splits_without_test(description, layout, tokenizer, seed=0)
    scores: dict[str, dict[str, float]] = {name: {} for name in description.tasks if TASKS[name].kind != "retrieval"}
    with tempfile.TemporaryDirectory() as folder:
        for model, place in _models(description, layout, Path(folder)).items():
            for name in scores:
                if TASKS[name].kind == "masked-word":
                    guessed = guess_masked_words(description, place, name, layout.tasks, tokenizer)
                    scores[name][model] = sum(guessed.development.values()) / len(guessed.development)
                else:
                    scores[name][model] = linear_probe(description, place, TASKS[name], splits[name], tokenizer, 0)
                print(f"admission: {name} | {model} | {scores[name][model]:.3f}", flush=True)
    result = AdmissionResult(
        **provenance(description, layout, input_hashes(layout)),
        tasks=[
            TaskAdmission(
                task=name,
                group=TASKS[name].group,
                metric=TASKS[name].metric,
                examples=_examples(name, splits, layout),
                majority=_majority(name, layout),
                scores=own,
            )
            for name, own in scores.items()
        ],
    )
    write_record(output, result)
    return result


def _models(description: Admission, layout: Layout, folder: Path) -> dict[str, Path]:
    """Name -> the folder it is saved in; those that are made here are below ``folder``."""
    tokenizer = load_tokenizer(layout.teacher)
    teacher = load_model(layout.teacher, description.attention_implementation)
    sample = torch.tensor(load_corpus(layout.corpus)["train"][:SAMPLE]["input_ids"])
    for name, initialisation in (("floor", description.initialisation), ("bag", "teacher-embeddings")):
        student = create_student(teacher, description.sizes, initialisation, sample, seed=0)
        save_model(student, tokenizer, folder / name)
    embeddings: Any = load_model(layout.teacher, description.attention_implementation, head=False)
    embeddings.encoder.layer = nn.ModuleList()
    embeddings.config.num_hidden_layers = 0
    save_model(embeddings, tokenizer, folder / "embeddings")
    made = {name: folder / name for name in ("floor", "bag", "embeddings")}
    return {"teacher": layout.teacher, "encoder": layout.encoder} | made


def _majority(name: str, layout: Layout) -> float:
    """What always giving the commonest label of the development data scores; 0 for a correlation."""
    if TASKS[name].labels is None:
        return 0.0
    labels = list(load_task(layout.tasks, name)["development"]["label"])
    share = max(map(labels.count, set(labels))) / len(labels)
    if TASKS[name].metric == "macro_f1":  # of the commonest class 2 s / (1 + s), of all others 0
        return 2 * share / (1 + share) / len(set(labels))
    return share


def _examples(name: str, splits: dict[str, Any], layout: Layout) -> int:
    return len(splits[name]["development"]) if name in splits else len(load_task(layout.tasks, name)["development"])
