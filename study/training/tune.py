"""Choosing a method's learning rate on development data."""

from __future__ import annotations

import tempfile
from collections import defaultdict
from collections.abc import Iterable
from pathlib import Path
from statistics import mean

from study.config import Params, StudyError
from study.files import write_json
from study.runtime import environment
from study.training.distill import distil


def tune(params: Params, setting: str, method: str, student: str, output: Path) -> dict:
    """Try every candidate learning rate on one method and student, and write what was tried.

    Each candidate trains for ``tuning.steps`` steps; what counts is the held-out value of the method's own loss. No
    downstream task is touched, and every method gets the same candidates and steps. Source: this study's choice.

    Raises:
        StudyError: as :func:`study.training.distill.distil`.
    """
    if method not in params.methods:
        raise StudyError(f"method {method!r} is unknown; allowed: {', '.join(params.methods)}")
    budget, tried = params.tuning, []
    for rate in budget.learning_rates:
        chosen = params.methods[method].model_copy(update={"learning_rate": rate})
        distillation = params.distillation.model_copy(update={"steps": budget.steps, "evaluate_every": budget.steps})
        candidate = params.model_copy(
            update={"methods": {**params.methods, method: chosen}, "distillation": distillation}
        )
        with tempfile.TemporaryDirectory() as folder:
            record = distil(candidate, setting, method, student, budget.seed, Path(folder))
        first, last = record["curve"][0]["loss"], record["curve"][-1]["loss"]
        tried.append({"learning_rate": rate, "held_out_loss_before": first, "held_out_loss": last})
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


def choose(records: Iterable[dict]) -> dict[str, float]:
    """Per method, the learning rate with the lowest mean over students of held-out loss / loss before training.

    Args:
        records: what :func:`tune` wrote, any number of methods and students.

    Source: this study's choice.
    """
    relative = defaultdict(lambda: defaultdict(list))
    for record in records:
        for candidate in record["tried"]:
            ratio = candidate["held_out_loss"] / candidate["held_out_loss_before"]
            relative[record["method"]][candidate["learning_rate"]].append(ratio)
    return {method: min(rates, key=lambda rate: mean(rates[rate])) for method, rates in relative.items()}
