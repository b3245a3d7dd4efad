"""``explore.html``: readers choose a student by what matters to them, offline and without a server."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
from scipy import stats

from study.analysis.figures.style import label, task_words
from study.analysis.numbers.analysis import Analysis
from study.analysis.numbers.budgets import Budgets
from study.analysis.numbers.results import FLOOR, MODEL, TEACHER
from study.analysis.numbers.selection import DEVELOPMENT, ORACLE, RULES, signals
from study.analysis.numbers.statistics import LEVEL
from study.analysis.numbers.text import millions
from study.analysis.pages import Navigation, link, page_title, write_page
from study.analysis.runtimes import LABELS, served
from study.descriptions import model_name
from study.files import Layout
from study.plan import Plan

#: Student's quantiles lie on a grid of this many steps of 1 / degrees of freedom, between which the page interpolates.
STEPS = 400
#: What is known of a model at a budget -> the rule of :mod:`selection` that goes by it.
RULE_OF = {"development": DEVELOPMENT, "score": ORACLE}


def page_data(analysis: Analysis, layout: Layout) -> dict[str, Any]:
    """All that the page computes from, of one setting.

    ``scores`` of a model: task -> language -> a list per distillation seed of test scores (0-1) per fine-tuning seed.
    ``signals``: what rules of :mod:`selection` go by, of trained methods alone. ``curve``: million tokens and held-out
    loss as a share of that before training, means over distillation seeds. ``served``: runtime -> milliseconds of one
    text for student and teacher. ``rule``: the one in use. ``fixed``: intervals leave out the teacher's chance, of
    which one fine-tuning tells nothing.
    """
    results = analysis.results
    rows = results.scores[results.scores["main"]]
    seen = signals(analysis.summary).set_index(["method", "student"])
    models = []
    for (_, method, student), table in rows.groupby(MODEL, sort=False):
        milliseconds = round(1000 * float(analysis.timed.loc[student, "median_seconds"]), 3)
        model = _model(method, student, table, milliseconds=milliseconds)
        if (method, student) in seen.index:
            known = seen.loc[(method, student), list(RULES)].dropna()
            model["signals"] = {rule: round(float(value), 6) for rule, value in known.items()}
        if method != TEACHER:
            model |= _place(layout, model_name(method, student, table["distillation_seed"].iloc[0]), student)
            model["curve"] = _curve(results.curves.query("method == @method and student == @student"))
        models.append(model)
    shared = _shared(analysis.setting, models) | {"rule": analysis.headline["rule"]}
    return shared | {"fixed": len(analysis.comparison.finetuning_seeds) == 1}


def budgets_data(budgets: Budgets, layout: Layout) -> dict[str, Any]:
    """As :func:`page_data`, of a setting that was run at several budgets of tokens.

    Its students have no ``milliseconds``: they are timed as served alone.
    ``budgets``: name -> words, in rising order; ``budget``: the one to read first.
    Trained models have a ``budget``. Intervals leave out the teacher's chance, as those of the gap do.
    """
    models, seen = [], set[str]()
    trained = dict(iter(budgets.training.groupby(["method", "student", "budget"])["curve"]))  # of starts there is none
    for (method, student, budget), rows in budgets.scores.groupby(["method", "student", "budget"], sort=False):
        flat = [
            {"task": row.task, "distillation_seed": row.seed, "finetuning_seed": row.finetuning_seed}
            | {"language": language, "test": test}
            for row in rows.itertuples()
            for language, test in row.languages.items()
        ]
        model = _model(method, student, pd.DataFrame(flat))
        if method not in (TEACHER, FLOOR):
            of_task = rows.groupby("task")[["development", "score"]].mean()  # a probe may lack development data
            known = {RULE_OF[name]: round(value, 6) for name, value in of_task.mean().dropna().items()}
            model |= {"budget": budget, "signals": known}
            model |= _place(layout, model_name(method, student, rows["seed"].iloc[0], budget), student)
            points = [point for curve in trained.get((method, student, budget), ()) for point in curve]
            model["curve"] = _curve(pd.DataFrame(points, columns=["tokens", "loss"]))
            seen.add(budget)
        models.append(model)
    words = {name: f"{millions(tokens)} tokens" for name, tokens in budgets.tokens.items() if name in seen}
    shared = _shared(layout.setting, models) | {"rule": DEVELOPMENT}
    return shared | {"budgets": words, "budget": budgets.first, "fixed": True}


def _shared(setting: str, models: list[dict[str, Any]]) -> dict[str, Any]:
    return {"setting": setting, "tasks": _task_names(models), "floor": FLOOR, "teacher": TEACHER, "models": models}


def _task_names(models: list[dict[str, Any]]) -> dict[str, str]:
    """Task -> its name as readers see it; as params.yaml has it where two would be called the same."""
    words = {task: task_words(task) for model in models for task in model["scores"]}
    return {task: said if [*words.values()].count(said) == 1 else task for task, said in words.items()}


def _place(layout: Layout, model: str, student: str) -> dict[str, Any]:
    path = layout.student(model).relative_to(layout.folder).as_posix()
    times = {LABELS[runtime]: list(pair) for runtime, pair in served(layout, student).items()}
    return {"path": path, "stage": f"distill@{layout.setting}_{model}", "served": times}


def _model(method: str, student: str, rows: pd.DataFrame, **timed: float) -> dict[str, Any]:
    scores: dict[str, dict[str, list[list[float]]]] = {}
    for (task, language), table in rows.groupby(["task", "language"], sort=False):
        wide = table.pivot(index="distillation_seed", columns="finetuning_seed", values="test")
        scores.setdefault(str(task), {})[str(language)] = wide.round(6).to_numpy().tolist()
    words = "the teacher" if method == TEACHER else label(method)
    return {"method": method, "label": words, "student": student} | timed | {"scores": scores}


def _curve(rows: pd.DataFrame) -> list[list[float]]:
    if rows.empty:
        return []
    means = rows.groupby("tokens")["loss"].mean()
    return [[round(tokens / 1e6, 4), round(loss / means.iloc[0], 4)] for tokens, loss in means.items()]


def write_chooser(plan: Plan, analyses: Sequence[Analysis | Budgets], path: Path, nav: Navigation) -> Path:
    """Write the page to ``path``, and return it.

    Args:
        analyses: of each setting its comparison, or its budgets.

    Raises:
        StudyError: scores are incomplete, or the file cannot be written.
    """
    shares = np.arange(STEPS + 1) / STEPS
    with np.errstate(divide="ignore"):
        quantiles = stats.t.ppf((1 + LEVEL) / 2, 1 / shares)
    quantiles[0] = stats.norm.ppf((1 + LEVEL) / 2)
    settings, pictures = [], []
    for own in analyses:
        layout = plan.layout(own.comparison.setting)
        if isinstance(own, Budgets):
            settings.append(budgets_data(own, layout))
            pictures.append(layout.analysis("budgets") / "gap_closed.png")
        else:
            settings.append(page_data(own, layout))
            pictures.append(layout.analysis("comparison") / "quality_latency.png")
    data = {
        "profile": plan.profile,
        "settings": settings,
        "rules": {name: {"words": rule.words} for name, rule in RULES.items()},
        "quantiles": [round(float(value), 5) for value in quantiles],
    }
    beside = [link(picture, path.parent) for picture in pictures]
    title = page_title("Choose a student", "Which student for what you need?", plan)
    write_page(path, "chooser.html", plan, nav, data, title=title, pictures=beside)
    return path
