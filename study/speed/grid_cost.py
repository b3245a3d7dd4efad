"""What the runs of a plan cost on GPUs, from steps measured on one, and what of it does not fit.

Measured are runs that shared one card evenly: a card's time for a step of one of n is the step's time over n, as long
as all n are there.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import replace
from typing import Any

import numpy as np
import pandas as pd

from study.analysis.numbers.results import Results, load_results, result_files
from study.descriptions import Comparison, Evaluation, Run, Tuning
from study.files import StudyError
from study.methods import Untrained
from study.plan import Plan
from study.records import RunResult, read_record
from study.speed.cost import Device, Efficiency, count, cross_validate, predict, stage_steps, workload_of

#: Share of a GPU's peak that large matrix products reach: small models cannot tell it. Source: this study's assumption.
PRODUCTS = 0.5
#: Peaks for dense bf16, memory and links are the makers'; dollars an hour of a rented device are assumptions.
H100 = Device("H100 SXM", flops=989e12, bandwidth=3.35e12, memory=80e9, link=450e9, price=3.0)
B200 = Device("B200", flops=2250e12, bandwidth=8e12, memory=180e9, link=900e9, price=5.5)
#: Tokens that the two teachers of the profile `paper` know, by setting.
VOCABULARIES = {"roberta": 50_265, "xlm-r": 250_002}


def known_results(plan: Plan) -> dict[str, Results]:
    """Setting -> its results; empty for a profile that has none yet.

    Raises:
        StudyError: some files of a setting are there, others are missing.
    """
    there = [c for c in plan.of(Comparison) if any(path.is_file() for path in result_files(c, plan.layout(c.setting)))]
    return {c.setting: load_results(c, plan.layout(c.setting)) for c in there}


def shared_card_steps(plan: Plan, setting: str, beside: Mapping[str, int]) -> pd.DataFrame:
    """Steps of a setting's runs that were trained side by side on one card.

    A run's time is that up to its first held-out loss behind the start: then the card is full, while later, when no
    more runs wait, fewer share it: in the committed curves the last runs' steps become 0.6 times as long.

    Args:
        beside: budget -> how many runs shared the card at a time; other budgets are left out.

    Returns:
        columns method, budget, seconds (of the card, a step) and workload.
    """
    rows, layout = [], plan.layout(setting)
    runs = {run.name: run for run in _trained(plan, setting)}
    for evaluation in plan.of(Evaluation, setting):
        run = runs.get(evaluation.name)
        if run is None or evaluation.budget not in beside:
            continue
        record = read_record(layout.results / f"{evaluation.model}.json", RunResult)
        assert record.distillation is not None
        work = workload_of(
            plan, run, round(record.size.embedding_parameters / run.sizes.width), record.distillation.precision
        )
        start, first, *_ = record.distillation.curve
        seconds = (first.seconds - start.seconds) / (first.step - start.step) / beside[evaluation.budget]
        rows.append((run.method, run.budget, seconds, work))
    return pd.DataFrame(rows, columns=["method", "budget", "seconds", "workload"])


def fit_traffic(steps: pd.DataFrame, device: Device, products: float = PRODUCTS) -> Efficiency:
    """The share of memory bandwidth that explains steps best, by relative error, where that of products is given."""
    counts = [count(work) for work in steps["workload"]]
    flops = np.array([c.flops for c in counts]) / (products * device.flops) / steps["seconds"].to_numpy(float)
    moved = np.array([c.bytes for c in counts]) / device.bandwidth / steps["seconds"].to_numpy(float)
    return Efficiency(products, float((moved**2).sum() / (moved * (1 - flops)).sum()))


def compared(
    steps: pd.DataFrame, device: Device, fitted: Callable[[pd.DataFrame, Device], Efficiency] | None = None
) -> pd.DataFrame:
    """Steps with what is ``predicted`` of each from those of all other methods, and its ``error_percent``."""
    predicted = cross_validate(steps, "method", device, fitted)
    return steps.assign(predicted=predicted, error_percent=100 * (predicted / steps["seconds"] - 1))


def checks(plan: Plan, benchmark: pd.DataFrame, machine: Device, card: pd.DataFrame) -> dict[str, pd.DataFrame]:
    """Measured steps as :func:`compared`, by where they were measured.

    Args:
        benchmark: steps of a benchmark on ``machine``. card: steps of one H100.

    Returns:
        ``benchmark``; ``stages``, the profile's distillations, if it has results (their peaks are taken as 1, so only
        the ratio of the two efficiencies matters); ``gpu``.
    """
    checked = {"benchmark": compared(benchmark, machine)}
    if results := known_results(plan):
        stages = [stage_steps(own, plan).assign(setting=setting) for setting, own in results.items()]
        checked["stages"] = compared(pd.concat(stages, ignore_index=True), Device("cores of the stages", 1.0, 1.0))
    return checked | {"gpu": compared(card, H100, fit_traffic)}


def grid_cost(
    plan: Plan, vocabularies: Mapping[str, int], device: Device, efficiency: Efficiency, devices: int = 1
) -> pd.DataFrame:
    """What every training of a plan costs, each by ``devices`` that share its batch; tuning with all candidates.

    Args:
        vocabularies: setting -> tokens of the teacher's tokenizer.

    Returns:
        columns setting, kind (distill or tune), method, student, hours, exchange (share of them), gigabytes_exchanged
        (a step and device), dollars, memory_gigabytes (a device, batch undivided) and accumulation (fewest batches a
        step that fit; None: not even single sequences do).

    Raises:
        StudyError: a setting without a vocabulary.
    """
    rows: list[dict[str, Any]] = []
    runs = [("distill", run, 1) for run in _trained(plan)]
    runs += [("tune", tuning.candidates[0], len(tuning.candidates)) for tuning in plan.of(Tuning)]
    for kind, run, number in runs:
        if run.setting not in vocabularies:
            raise StudyError(f"vocabularies: setting {run.setting!r} is missing; allowed: tokens of every setting")
        work = workload_of(plan, run, vocabularies[run.setting])
        cost = predict(work, device, efficiency, devices)
        share = work.batch_size // devices
        parts = [n for n in range(1, share + 1) if share % n == 0]
        fits = [n for n in parts if count(replace(work, batch_size=share // n)).memory <= device.memory]
        rows.append(
            {"setting": run.setting, "kind": kind, "method": run.method, "student": run.student}
            | {"hours": number * cost["seconds"] / 3600, "exchange": cost["exchange"] / cost["seconds"]}
            | {"gigabytes_exchanged": cost["exchange"] / work.steps * device.link / 1e9}
            | {"dollars": number * cost["dollars"], "memory_gigabytes": cost["memory"] / 1e9}
            | {"accumulation": fits[0] if fits else None}
        )
    return pd.DataFrame(rows)


def measured_stages(plan: Plan) -> dict[str, float]:
    """Name of a stage -> seconds that its training or evaluation took where it ran, from committed result files."""
    seconds: dict[str, float] = {}
    for evaluation in plan.of(Evaluation):
        file = plan.layout(evaluation.setting).results / f"{evaluation.model}.json"
        if file.is_file():
            record = read_record(file, RunResult)
            seconds[f"evaluate@{evaluation.name}"] = record.evaluation_seconds
            if record.distillation is not None:
                seconds[f"distill@{evaluation.name}"] = record.distillation.seconds
    return seconds


def predicted_stages(
    plan: Plan, vocabularies: Mapping[str, int], device: Device, efficiency: Efficiency, devices: int = 1
) -> dict[str, float]:
    """Name of a stage -> seconds of its training, as :func:`grid_cost` has them."""
    works = {run.name: workload_of(plan, run, vocabularies[run.setting]) for run in _trained(plan)}
    return {f"distill@{name}": predict(work, device, efficiency, devices)["seconds"] for name, work in works.items()}


def _trained(plan: Plan, setting: str | None = None) -> list[Run]:
    return [run for run in plan.of(Run, setting) if not isinstance(run.objective, Untrained)]
