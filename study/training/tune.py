"""Choosing a method's learning rate on development data."""

from __future__ import annotations

import tempfile
from collections import defaultdict
from collections.abc import Iterable
from pathlib import Path
from statistics import mean

from datasets import Dataset
from transformers import PreTrainedTokenizerBase

from study.config import Layout, Params, StudyError
from study.data.tasks import TASKS, load_task
from study.files import write_json
from study.models.teachers import load_tokenizer
from study.runtime import environment
from study.training.distill import DivergedError, distil
from study.training.finetune import encode, linear_probe


def tune(params: Params, setting: str, method: str, student: str, output: Path) -> dict:
    """Try every candidate learning rate on one method and student, and write what was tried.

    Each candidate trains for ``tuning.steps`` steps. What counts is the mean over the setting's tasks of a linear
    probe's main metric on development data. The held-out value of the method's own loss, kept beside it, rules out
    rates at which it rises (:func:`choose`), and does not choose among the others: a relation loss may fall while the
    representations on top of it get worse. No test data is touched, and every method gets the same candidates, steps
    and examples. Source: this study's choice.

    Raises:
        StudyError: as :func:`study.training.distill.distil`; tasks are missing.
    """
    if method not in params.methods:
        raise StudyError(f"method {method!r} is unknown; allowed: {', '.join(params.methods)}")
    budget, tried = params.tuning, []
    tokenizer = load_tokenizer(Layout(params, setting).teacher)
    splits = splits_without_test(params, setting, tokenizer, budget.seed)
    for rate in budget.learning_rates:
        chosen = params.methods[method].model_copy(update={"learning_rate": rate})
        distillation = params.distillation.model_copy(update={"steps": budget.steps, "evaluate_every": budget.steps})
        candidate = params.model_copy(
            update={"methods": {**params.methods, method: chosen}, "distillation": distillation}
        )
        tried.append({"learning_rate": rate})
        with tempfile.TemporaryDirectory() as folder:
            try:
                record = distil(candidate, setting, method, student, budget.seed, Path(folder))
            except DivergedError as error:
                tried[-1]["diverged"] = str(error)
                continue
            scores = {
                name: linear_probe(params, Path(folder), TASKS[name], splits[name], tokenizer, budget.seed)
                for name in splits
            }
        tried[-1] |= {
            "development_mean": mean(scores.values()),
            "development": scores,
            "held_out_loss_before": record["curve"][0]["loss"],
            "held_out_loss": record["curve"][-1]["loss"],
        }
    result = {
        "setting": setting,
        "method": method,
        "student": student,
        **budget.model_dump(include={"steps", "seed"}),
        "initialisation": params.initialisation,
        "tried": tried,
        "environment": environment(),
    }
    write_json(output, result)
    return result


def splits_without_test(
    params: Params, setting: str, tokenizer: PreTrainedTokenizerBase, seed: int
) -> dict[str, dict[str, Dataset]]:
    """Training and development examples of every task of a setting that is learnt, encoded as for fine-tuning.

    Raises:
        StudyError: a task is missing.
    """
    folder, budget = Layout(params, setting).tasks, params.finetuning
    return {
        name: encode(
            load_task(folder, name),
            TASKS[name],
            budget.tasks[name].model_copy(update={"languages": []}),
            tokenizer,
            budget.pairs,
            seed,
        )
        for name in params.settings[setting].tasks
        if not TASKS[name].probe
    }


def choose(records: Iterable[dict]) -> dict[str, float]:
    """Per method, the learning rate with the highest mean over settings and students of its development mean.

    A rate is out at which any student diverged or ended with a held-out loss above the one it began with: few steps on
    few examples may not show downstream what more steps at such a rate do.

    Args:
        records: what :func:`tune` wrote, any number of methods, settings and students.

    Raises:
        StudyError: every rate of a method is out.

    Source: this study's choice.
    """
    scores, out = defaultdict(lambda: defaultdict(list)), defaultdict(set)
    for record in records:
        for candidate in record["tried"]:
            method, rate = record["method"], candidate["learning_rate"]
            if "diverged" in candidate or candidate["held_out_loss"] > candidate["held_out_loss_before"]:
                out[method].add(rate)
            scores[method][rate].append(candidate.get("development_mean", 0.0))
    chosen = {}
    for method, rates in scores.items():
        left = [rate for rate in rates if rate not in out[method]]
        if not left:
            raise StudyError(
                f"{method}: diverged, or its loss rose, at every learning rate of {list(rates)}; lower"
                " tuning.learning_rates"
            )
        chosen[method] = max(left, key=lambda rate: mean(rates[rate]))
    return chosen
