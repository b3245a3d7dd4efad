"""One model's result file: downstream scores, MLM loss, size, and what its training left on record."""

from __future__ import annotations

import json
import shutil
import time
from collections.abc import Callable
from dataclasses import asdict
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
from pydantic import ValidationError
from torch.utils.flop_counter import FlopCounterMode
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from study.data.corpus import load_corpus
from study.data.pretrained import has_language_modelling_head, load_model, load_tokenizer
from study.data.tasks import find_task, load_task
from study.descriptions import Evaluation
from study.distillation.masking import MaskedSequences
from study.distillation.objectives.output import masked_words
from study.distillation.trainer import digest
from study.evaluation.finetune import encode, finetune
from study.evaluation.masked_word import guess_masked_words
from study.evaluation.provenance import input_hashes, provenance, weights_hash
from study.evaluation.retrieval import retrieve
from study.files import Layout, StudyError, write_file
from study.params import one_line
from study.records import (
    FinetuningRun,
    LanguageModelling,
    ProbeResult,
    Record,
    RunResult,
    Size,
    TaskResult,
    Training,
    write_record,
)
from study.runtime import use_bf16

#: Kinds of tasks that are not learnt -> what scores them.
PROBES: dict[str, Callable[..., ProbeResult]] = {"retrieval": retrieve, "masked-word": guess_masked_words}


def evaluate(description: Evaluation, layout: Layout, output: Path) -> RunResult:
    """Measure one model and write its result file.

    Per task: for each candidate learning rate one fine-tuning per seed on the same subsample; the rate with the best
    mean development score is kept; only its runs look at the test data. A seed draws training examples, their order and
    dropout, the same for every method (:func:`random_seed`). Probes are scored without any training.

    One that was interrupted keeps the tasks that it had finished, if description, model and data are the same.

    Args:
        output: the JSON file to write, whole or not at all.

    Raises:
        StudyError: the model, tasks or corpus are missing, or the file cannot be written.
    """
    folder = description.folder(layout)
    tokenizer = load_tokenizer(folder)
    training = training_of(folder)
    hashes = input_hashes(layout) | {"weights": weights_hash(folder)}
    kept = layout.checkpoints / digest({"evaluation": description.model_dump(mode="json"), "inputs": hashes})
    finished: dict[str, Finished] = {}
    for name in description.tasks:
        measure = PROBES.get(find_task(layout.tasks, name).kind, evaluate_task)
        file = kept / f"{name}.json"
        if file.is_file():
            print(f"{description.title} | {name} was finished before the interruption", flush=True)
        finished[name] = _finished(file, partial(measure, description, folder, name, layout.tasks, tokenizer))
    began, language_modelling = time.monotonic(), None
    if has_language_modelling_head(folder):
        model = load_model(folder, description.attention_implementation)
        validation = load_corpus(layout.corpus)["validation"]
        sequences = MaskedSequences(validation, description.masking, tokenizer, seed=0)
        language_modelling = masked_language_modelling(model, sequences, use_bf16(description.precision))
    encoder = load_model(folder, description.attention_implementation, head=False)
    result = RunResult(
        **provenance(description, layout, hashes),
        method=description.method,
        student=description.student,
        seed=description.seed,
        budget=description.budget,
        tasks={name: own.result for name, own in finished.items() if isinstance(own.result, TaskResult)},
        probes={name: own.result for name, own in finished.items() if isinstance(own.result, ProbeResult)},
        masked_language_modelling=language_modelling,
        size=size(encoder, description.sequence_length),
        distillation=training,
        evaluation_seconds=round(sum(own.seconds for own in finished.values()) + time.monotonic() - began, 1),
    )
    write_record(output, result)
    shutil.rmtree(kept, ignore_errors=True)
    return result


class Finished(Record):
    """What an evaluation measured of one task, and the seconds it took."""

    seconds: float
    result: TaskResult | ProbeResult


def _finished(file: Path, measure: Callable[[], TaskResult | ProbeResult]) -> Finished:
    """What is kept in ``file``; else it is measured and kept there."""
    try:
        return Finished.model_validate_json(file.read_bytes())
    except (OSError, ValidationError):
        began = time.monotonic()
        result = measure()
        finished = Finished(seconds=time.monotonic() - began, result=result)
        write_file(file, finished.model_dump_json())
        return finished


def training_of(folder: Path) -> Training | None:
    """What the training of the model in ``folder`` left on record; None for a student that is not trained.

    Raises:
        StudyError: there is no record, or it is damaged.
    """
    path = folder / "record.json"
    try:
        training = json.loads(path.read_bytes())["training"]
        return None if training is None else Training.model_validate(training)
    except OSError as error:
        reason = str(error.strerror)
    except ValidationError as error:
        reason = f"training.{one_line(error)}"
    except (ValueError, KeyError, TypeError):
        reason = "no record of a training"
    raise StudyError(f"{path}: {reason}; run the stage that writes the model again") from None


def random_seed(finetuning_seed: int, distillation_seed: int) -> int:
    """What draws a fine-tuning's training examples, their order and dropout.

    Other distillation seeds get other draws: the spread between them then holds the chance of fine-tuning too, instead
    of all of them sharing what a few draws happen to favour. Methods, students and, for distillation seed 1, the
    teacher (0) share them. Source: this study's choice.
    """
    return finetuning_seed + 1000 * max(distillation_seed - 1, 0)


def evaluate_task(
    description: Evaluation, folder: Path, name: str, tasks: Path, tokenizer: PreTrainedTokenizerBase
) -> TaskResult:
    """The entry of one task in a result file: metric, budget, and per fine-tuning seed its scores.

    A run's ``test`` is that of the language trained on; where others are tested, it also has ``languages``: language ->
    metric -> score, and the entry ``language_examples``: language -> number of test examples.

    Args:
        folder: of the model. tasks: the folder that holds the task ``name``.
    """
    task, budget, finetuning = find_task(tasks, name), description.tasks[name], description.finetuning
    dataset = load_task(tasks, name)
    drawn = {seed: random_seed(seed, description.seed) for seed in finetuning.seeds}
    splits = {s: encode(dataset, task, budget, tokenizer, finetuning.pairs, drawn[s]) for s in drawn}
    learn = {s: partial(finetune, description, folder, task, splits[s], tokenizer, drawn[s]) for s in drawn}

    def development(rate: float) -> float:
        return float(np.mean([learn[s](rate, look_at_test=False).development[task.metric] for s in drawn]))

    rates, scored = finetuning.learning_rates, []
    rate = max(rates, key=development) if len(rates) > 1 else rates[0]
    for seed in drawn:
        began = time.monotonic()
        run = learn[seed](rate, look_at_test=True)
        scored.append(FinetuningRun(seed=seed, **asdict(run)))
        print(
            f"{description.title} | {name} seed {seed} | development {task.metric} {run.development[task.metric]:.3f}"
            f" | {time.monotonic() - began:.0f} s",
            flush=True,
        )
    sizes = {split: len(examples) for split, examples in splits[finetuning.seeds[0]].items()}
    return TaskResult(
        metric=task.metric,
        group=task.group,
        language=task.languages[0],
        learning_rate=rate,
        train_examples=sizes["train"],
        development_examples=sizes["development"],
        test_examples=sizes["test"],
        language_examples={language: sizes[task.split("test", language)] for language in scored[0].languages},
        runs=scored,
    )


def masked_language_modelling(model: PreTrainedModel, sequences: MaskedSequences, bf16: bool) -> LanguageModelling:
    """:func:`study.distillation.objectives.output.masked_words` as part of a result."""
    loss, accuracy = masked_words(model, sequences, bf16)
    return LanguageModelling(loss=loss, accuracy=accuracy)


def size(encoder: PreTrainedModel, sequence_length: int) -> Size:
    """Parameters of the encoder, and the floating-point operations of one sequence's forward pass."""
    embeddings: Any = encoder.embeddings
    embedding = sum(p.numel() for p in embeddings.parameters())
    total = sum(p.numel() for p in encoder.parameters())
    with FlopCounterMode(display=False) as counter, torch.inference_mode():
        encoder.eval()(input_ids=torch.zeros(1, sequence_length, dtype=torch.long))
    return Size(
        parameters=total,
        embedding_parameters=embedding,
        encoder_parameters=total - embedding,
        flops_per_sequence=counter.get_total_flops(),
        sequence_length=sequence_length,
    )
