"""What the page explore.html is made of: every score of a profile, and the page that ranks students by them."""

from __future__ import annotations

import json
from typing import Any

import jinja2
import pandas as pd
from markupsafe import Markup

from study.analysis.figures.style import METRICS, label
from study.analysis.numbers.analysis import Analysis, analyse
from study.analysis.numbers.results import MODEL, RUN, probe_rows, score_rows
from study.descriptions import TEACHER, Comparison, model_name
from study.files import Layout
from study.plan import Plan
from study.records import RunResult, read_record
from study.sections import BASE_BUDGET

#: Decimals of a score: more than a table shows, so that means of them round as the table's do.
DIGITS = 6


def explorer(template: str, plan: Plan) -> Markup:
    """The content of the page: the template with the data inside, which closes no tag of it.

    Raises:
        StudyError: as :func:`study.analysis.numbers.analysis.analyse` and :func:`choices`.
    """
    settings = [(comparison, plan.layout(comparison.setting)) for comparison in plan.of(Comparison)]
    data = {comparison.setting: choices(analyse(comparison, layout), layout) for comparison, layout in settings}
    folder = plan.folder.relative_to(plan.root).as_posix()
    shared = {"profile": plan.profile, "folder": folder, "settings": data}
    text = json.dumps(shared, ensure_ascii=False, separators=(",", ":"), allow_nan=False).replace("<", r"\u003c")
    page = jinja2.Environment(autoescape=True, trim_blocks=True).from_string(template)
    return Markup(page.render(data=Markup(text), settings=list(data)))


def choices(analysis: Analysis, layout: Layout) -> dict[str, Any]:
    """Everything to choose from in one setting, as plain values for JSON.

    ``models`` has an entry per method, student and budget, untrained ones at the base budget; ``scores`` of a model:
    task -> language -> test scores (0-1, main metric), a list per distillation seed of those per fine-tuning seed. A
    probe is not fine-tuned: it has the same score beside every fine-tuning seed. Latency: milliseconds, median of the
    smallest batch and number of threads, as in :func:`tables.headline`.

    Raises:
        StudyError: a result file of a budget is missing or is not of the run that its place says.
    """
    results, comparison = analysis.results, analysis.comparison
    latency = results.latency.sort_values(["batch_size", "threads"], kind="stable").groupby("student").first()
    first = latency.loc[TEACHER]
    threads = f"{first['threads']} thread{'s' if first['threads'] != 1 else ''}"
    scores = {BASE_BUDGET: _scores(analysis, results.scores, results.probes)}
    for budget in comparison.budgets:
        scores[budget] = _scores(analysis, *_at_budget(analysis, layout, budget))
    main = results.scores[results.scores["main"]]
    metrics = dict(zip(main["task"], main["metric"], strict=True))
    if len(results.probes):
        metrics |= dict(zip(results.probes["task"], results.probes["metric"], strict=True))
    of_teacher = scores[BASE_BUDGET].pop((TEACHER, TEACHER))["scores"]
    selected = analysis.summary[analysis.summary["selected"]]
    chosen = set(zip(selected["method"], selected["student"], strict=True))
    return {
        "teacher": {"name": comparison.teacher.name, "ms": _milliseconds(first), "scores": of_teacher},
        "students": {
            name: {"ms": _milliseconds(latency.loc[name]), "speed_up": round(float(latency.loc[name, "speed_up"]), 2)}
            for name in comparison.students
        },
        "timed": f"batch of {first['batch_size']}, {first['sequence_length']} tokens, {threads}",
        "tasks": {
            task: {"metric": METRICS.get(metric, metric), "probe": task not in set(main["task"])}
            for task, metric in metrics.items()
        },
        "languages": list(dict.fromkeys(name for by_language in of_teacher.values() for name in by_language)),
        "budgets": {BASE_BUDGET: comparison.tokens} | {name: own.tokens for name, own in comparison.budgets.items()},
        "models": [
            {"method": method, "label": label(method), "student": student, "budget": budget}
            | {"names": [model_name(method, student, seed, budget) for seed in own["seeds"]]}
            | {"chosen": budget == BASE_BUDGET and (method, student) in chosen, "scores": own["scores"]}
            for budget, models in scores.items()
            for (method, student), own in models.items()
        ],
    }


def _milliseconds(measured: pd.Series) -> float:
    return round(1000 * float(measured["median_seconds"]), 3)


def _scores(analysis: Analysis, scores: pd.DataFrame, probes: pd.DataFrame) -> dict[tuple[str, str], dict[str, Any]]:
    """Method and student -> its distillation seeds, and its scores by task, language and seeds."""
    keys = [*RUN, "task", "language"]
    table = scores[scores["main"]]
    if len(probes):
        seeds = pd.DataFrame({"finetuning_seed": analysis.comparison.finetuning_seeds})
        table = pd.concat([table, probes.merge(seeds, how="cross")])
    models: dict[tuple[str, str], dict[str, Any]] = {}
    for (_, method, student, seed, task, language), rows in table.groupby(keys, sort=False):
        own = models.setdefault((method, student), {"seeds": [], "scores": {}})
        if seed not in own["seeds"]:
            own["seeds"].append(int(seed))
        values = rows.sort_values("finetuning_seed", kind="stable")["test"].round(DIGITS).tolist()
        own["scores"].setdefault(task, {}).setdefault(language, []).append(values)
    return models


def _at_budget(analysis: Analysis, layout: Layout, budget: str) -> tuple[pd.DataFrame, pd.DataFrame]:
    """Scores and probes of the runs at a budget other than the base."""
    comparison = analysis.comparison
    scores: list[dict[str, Any]] = []
    probes: list[dict[str, Any]] = []
    for method, student, seed in comparison.budget_cells(budget):
        where = {"profile": comparison.profile, "setting": comparison.setting, "budget": budget}
        path = layout.result(model_name(method, student, seed, budget))
        record = read_record(path, RunResult, **where, method=method, student=student, seed=seed)
        run = dict(zip(MODEL, (comparison.setting, method, student), strict=True)) | {"distillation_seed": seed}
        scores += score_rows(run, record, comparison.tasks)
        probes += probe_rows(run, record, comparison.tasks)
    return pd.DataFrame(scores), pd.DataFrame(probes)
