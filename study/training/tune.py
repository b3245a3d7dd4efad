"""Choosing a method's learning rate on development data."""

from __future__ import annotations

import tempfile
from collections import defaultdict
from collections.abc import Iterable
from pathlib import Path
from statistics import mean

import numpy as np
from datasets import Dataset
from scipy.stats import sem
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

    Each candidate trains for ``tuning.steps`` steps. What counts (:func:`choose`) is the main metric of a linear probe
    on the development data of each of the setting's tasks, and the held-out value of the method's own loss. No test
    data is touched, and every method gets the same candidates, steps and examples. Source: this study's choice.

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
        students = params.students | {student: params.students[student].model_copy(update={"learning_rates": {}})}
        candidate = params.model_copy(
            update={
                "methods": params.methods | {method: chosen},
                "distillation": distillation,
                "students": students,
            }
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
    """Per method, the learning rate that fits its own loss best among those that the tasks cannot tell from the best.

    With d the differences, over settings, students and tasks, of a rate's development scores from those of the rate
    with the highest mean, a rate is not told from it if mean(d) <= standard error of mean(d). Among these the one with
    the lowest held-out loss is taken (as a share of the loss before training, mean over settings and students). A rate
    is out at which any student diverged or ended with a held-out loss above the one it began with.

    Probes are few, small and learnt in one language: where they say nothing, how far the method got on all of the
    corpus does. It does not decide alone, since a relation loss may fall while what rests on it gets worse.

    Args:
        records: what :func:`tune` wrote, any number of methods, settings and students. One rate serves them all: those
            of a student with rates of its own (``students.<name>.learning_rates``) are to be chosen by themselves.

    Raises:
        StudyError: every rate of a method is out; one was tried in some settings or on some students only.

    Source: the one-standard-error rule (Hastie, Tibshirani and Friedman, The Elements of Statistical Learning, section
    7.10), on paired differences; the held-out loss in place of the simplest model is this study's choice.
    """
    tried = defaultdict(lambda: defaultdict(list))
    for record in records:
        for candidate in record["tried"]:
            tried[record["method"]][candidate["learning_rate"]].append(candidate)
    chosen = {}
    for method, rates in tried.items():
        often = max(map(len, rates.values()))
        for rate, found in rates.items():
            if len(found) < often:
                raise StudyError(
                    f"reports/tuning: {method} was tried at {rate} {len(found)} times, at others {often}; allowed: the"
                    " same candidates in every setting and on every student (run `make tune` again for each setting)"
                )
        left = {rate: found for rate, found in rates.items() if not any(map(_failed, found))}
        if not left:
            raise StudyError(
                f"{method}: diverged, or its loss rose, at every learning rate of {list(rates)}; lower"
                " tuning.learning_rates"
            )
        scores = {
            rate: np.array([score for candidate in found for score in candidate["development"].values()])
            for rate, found in left.items()
        }
        best = max(scores.values(), key=np.mean)
        behind = {rate: best - scores[rate] for rate in left}
        level = [rate for rate, d in behind.items() if d.mean() <= (sem(d) if len(d) > 1 else 0)]
        chosen[method] = min(
            level, key=lambda rate: mean(c["held_out_loss"] / c["held_out_loss_before"] for c in left[rate])
        )
    return chosen


def _failed(candidate: dict) -> bool:
    return "diverged" in candidate or candidate["held_out_loss"] > candidate["held_out_loss_before"]
