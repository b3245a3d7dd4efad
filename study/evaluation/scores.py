"""One model's result file: downstream scores, MLM loss, size, and what its training left on record."""

from __future__ import annotations

import json
import subprocess
import time
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import torch
from torch.utils.flop_counter import FlopCounterMode
from transformers import PreTrainedModel, PreTrainedTokenizerBase, default_data_collator

from study.config import Layout, Params, StudyError, cell_title
from study.data.corpus import load_corpus
from study.data.tasks import TASKS, load_task, subsample, test_split
from study.files import write_json
from study.models.taps import read
from study.models.teachers import has_language_modelling_head, load_model, load_tokenizer
from study.runtime import environment, use_bf16
from study.training.distill import MaskedSequences
from study.training.finetune import MeanPoolingClassifier, encode, finetune
from study.training.objectives import masked_cross_entropy, masked_logits


def evaluate(params: Params, setting: str, method: str, student: str, seed: int, output: Path) -> dict:
    """Measure one model and write its result file.

    Per task: for each candidate learning rate one fine-tuning per seed on the same subsample; the rate with the best
    mean development score is kept; only its runs look at the test data. A seed draws training examples, their order and
    dropout, the same for every method (:func:`random_seed`). Probes are scored without any training.

    Args:
        method: an entry of ``params.methods``, or ``teacher`` (then ``student`` is ``teacher`` and ``seed`` 0).
        output: the JSON file to write, whole or not at all.

    Raises:
        StudyError: the model, tasks or corpus are missing, or the file cannot be written.
    """
    layout = Layout(params, setting)
    folder = layout.teacher if method == "teacher" else layout.student(method, student, seed)
    tokenizer = load_tokenizer(folder)
    title = cell_title(params, setting, method, student, seed)
    began = time.monotonic()
    result = {
        "profile": params.profile,
        "setting": setting,
        "method": method,
        "student": student,
        "seed": seed,
        "tasks": {},
    }
    for name in params.settings[setting].tasks:
        if TASKS[name].probe:
            probe = retrieve(params, folder, name, layout.tasks, tokenizer)
            result["probes"] = result.get("probes", {}) | {name: probe}
        else:
            result["tasks"][name] = evaluate_task(params, folder, name, layout.tasks, tokenizer, title, seed)
    result["masked_language_modelling"] = None
    if has_language_modelling_head(folder):
        model = load_model(folder, params.attention_implementation)
        validation = load_corpus(layout.corpus)["validation"]
        sequences = MaskedSequences(validation, params.masking, tokenizer, seed=0)
        result["masked_language_modelling"] = masked_language_modelling(model, sequences, use_bf16(params.precision))
    encoder = load_model(folder, params.attention_implementation, head=False)
    result["size"] = size(encoder, params.latency.sequence_length)
    record = json.loads((folder / "record.json").read_text())
    result["distillation"] = record if record["steps"] else None
    result["evaluation_seconds"] = round(time.monotonic() - began, 1)
    result["environment"] = environment()
    result["commit"] = commit(layout.root)
    write_json(output, result)
    return result


def commit(folder: Path) -> str | None:
    """The first 12 digits of the commit that the folder's files come from; None outside a git repository."""
    try:
        outcome = subprocess.run(["git", "rev-parse", "HEAD"], cwd=folder, capture_output=True, text=True)
    except OSError:  # git is not there
        return None
    return outcome.stdout.strip()[:12] if outcome.returncode == 0 else None


def random_seed(finetuning_seed: int, distillation_seed: int) -> int:
    """What draws a fine-tuning's training examples, their order and dropout.

    Other distillation seeds get other draws: the spread between them then holds the chance of fine-tuning too, instead
    of all of them sharing what a few draws happen to favour. Methods, students and, for distillation seed 1, the
    teacher (0) share them. Source: this study's choice.
    """
    return finetuning_seed + 1000 * max(distillation_seed - 1, 0)


def evaluate_task(
    params: Params, folder: Path, name: str, tasks: Path, tokenizer, title: str, distillation_seed: int
) -> dict:
    """The entry of one task in a result file: metric, budget, and per fine-tuning seed its scores.

    A run's ``test`` is that of the language trained on; where others are tested, it also has ``languages``: language ->
    metric -> score, and the entry ``language_examples``: language -> number of test examples.
    """
    task, budget = TASKS[name], params.finetuning
    dataset = load_task(tasks, name)
    drawn = {seed: random_seed(seed, distillation_seed) for seed in budget.seeds}
    splits = {s: encode(dataset, task, budget.tasks[name], tokenizer, budget.pairs, drawn[s]) for s in drawn}
    rates = budget.learning_rates
    if len(rates) > 1:
        tried = {
            rate: [
                finetune(params, folder, task, splits[s], tokenizer, drawn[s], rate, look_at_test=False) for s in drawn
            ]
            for rate in rates
        }
        mean = {rate: float(np.mean([run.development[task.metric] for run in runs])) for rate, runs in tried.items()}
        rates = [max(mean, key=mean.get)]
    runs = []
    for seed in drawn:
        began = time.monotonic()
        run = finetune(params, folder, task, splits[seed], tokenizer, drawn[seed], rates[0], look_at_test=True)
        runs.append({"seed": seed, "epoch": run.epoch, "development": run.development, "test": run.test})
        if run.languages:
            runs[-1]["languages"] = run.languages
        print(
            f"{title} | {name} seed {seed} | development {task.metric} {run.development[task.metric]:.3f}"
            f" | {time.monotonic() - began:.0f} s",
            flush=True,
        )
    sizes = {split: len(examples) for split, examples in splits[budget.seeds[0]].items()}
    entry = {
        "metric": task.metric,
        "learning_rate": rates[0],
        **{f"{split}_examples": sizes[split] for split in ("train", "development", "test")},
        "runs": runs,
    }
    others = {language: sizes[test_split(language)] for language in runs[0].get("languages", ())}
    return entry | ({"language_examples": others} if others else {})


def retrieve(params: Params, folder: Path, name: str, tasks: Path, tokenizer: PreTrainedTokenizerBase) -> dict:
    """The entry of a probe in a result file: how often a text's nearest neighbour is its translation.

    The encoder is used as it is. A text is represented by the mean of its last hidden states over real tokens; the
    nearest of the N texts in the other language is the one of greatest cosine. Chance is 1 / N.

    Source: the Tatoeba task of XTREME (2003.11080), section 3; both directions after LASER (1812.10464), section 4.4.

    Returns:
        metric, test_examples (N) and languages: language -> from_english and to_english, accuracies of the nearest
        neighbours of English texts and of those in that language, and accuracy, the mean of both.
    """
    task, dataset, budget = TASKS[name], load_task(tasks, name), params.finetuning.tasks[name]
    encoder = load_model(folder, params.attention_implementation, head=False)
    model = MeanPoolingClassifier(encoder, labels=1, pairs=False)
    vectors, languages = {}, {}
    for language in (language for language in task.languages[1:] if language in budget.languages):
        pairs = subsample(dataset[test_split(language)], budget.test)
        texts = tuple(tuple(pairs[column]) for column in ("text", "text_pair"))
        for side in set(texts) - vectors.keys():  # the English side is the same for every language
            vectors[side] = embed(params, model, side, tokenizer, budget.max_length)
        similarity = vectors[texts[0]] @ vectors[texts[1]].T  # (N, N)
        found = {
            direction: float((similarity.argmax(axis=axis) == np.arange(len(similarity))).mean())
            for axis, direction in ((1, "from_english"), (0, "to_english"))
        }
        languages[language] = {"accuracy": sum(found.values()) / 2} | found
    return {"metric": task.metric, "test_examples": len(similarity), "languages": languages}


@torch.inference_mode()
def embed(
    params: Params,
    model: MeanPoolingClassifier,
    texts: Sequence[str],
    tokenizer: PreTrainedTokenizerBase,
    max_length: int,
    batch_size: int = 32,
) -> np.ndarray:
    """(N, width): the pooled states of each text, scaled to length 1.

    Raises:
        StudyError: the model's states are not finite.
    """
    model.eval()
    ids = tokenizer(list(texts), truncation=True, max_length=max_length, return_token_type_ids=False)["input_ids"]
    order, rows = sorted(range(len(ids)), key=lambda i: len(ids[i])), []
    for first in range(0, len(order), batch_size):
        batch = {"input_ids": [ids[i] for i in order[first : first + batch_size]]}
        padded = tokenizer.pad(batch, pad_to_multiple_of=params.finetuning.pad_to_multiple_of, return_tensors="pt")
        with torch.autocast("cpu", dtype=torch.bfloat16, enabled=use_bf16(params.precision)):
            rows.append(model.features(**padded))
    vectors = torch.nn.functional.normalize(torch.cat(rows), dim=1).numpy()
    if not np.isfinite(vectors).all():
        raise StudyError("retrieval: the encoder's states are not finite, no result written")
    return vectors[np.argsort(order)]


@torch.inference_mode()
def masked_language_modelling(
    model: PreTrainedModel, sequences: MaskedSequences, bf16: bool, batch_size: int = 16
) -> dict:
    """Mean cross-entropy in nats and accuracy over the masked tokens of held-out text."""
    model.eval()
    losses, hits = [], []
    for first in range(0, len(sequences), batch_size):
        batch = default_data_collator([sequences[i] for i in range(first, min(first + batch_size, len(sequences)))])
        with torch.autocast(model.device.type, dtype=torch.bfloat16, enabled=bf16):
            readings = read(model, batch["masked_input_ids"], hidden_layers=[model.config.num_hidden_layers])
            logits = masked_logits(model, readings, batch["positions"])
        losses.append(masked_cross_entropy(logits, batch["labels"]).item() * len(batch["labels"]))
        hits.append((logits.argmax(dim=-1) == batch["labels"]).float().mean(dim=1).sum().item())
    return {"loss": sum(losses) / len(sequences), "accuracy": sum(hits) / len(sequences)}


def size(encoder: PreTrainedModel, sequence_length: int) -> dict:
    """Parameters of the encoder, and the floating-point operations of one sequence's forward pass."""
    embedding = sum(p.numel() for p in encoder.embeddings.parameters())
    total = sum(p.numel() for p in encoder.parameters())
    with FlopCounterMode(display=False) as counter, torch.inference_mode():
        encoder.eval()(input_ids=torch.zeros(1, sequence_length, dtype=torch.long))
    return {
        "parameters": total,
        "embedding_parameters": embedding,
        "encoder_parameters": total - embedding,
        "flops_per_sequence": counter.get_total_flops(),
        "sequence_length": sequence_length,
    }
