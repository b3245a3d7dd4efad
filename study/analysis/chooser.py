"""``explore.html``: readers choose a student by what matters to them, offline and without a server."""

from __future__ import annotations

import json
import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import jinja2
import numpy as np
import pandas as pd
from scipy import stats

from study.analysis.figures.style import label, millions
from study.analysis.numbers.analysis import Analysis
from study.analysis.numbers.budgets import Budgets
from study.analysis.numbers.results import FLOOR, MODEL, TEACHER
from study.analysis.numbers.selection import RULES, signals
from study.analysis.numbers.statistics import LEVEL
from study.descriptions import model_name
from study.files import Layout, write_file
from study.plan import Plan

#: Student's quantiles lie on a grid of this many steps of 1 / degrees of freedom, between which the page interpolates.
STEPS = 400
#: What is known of a model at a budget -> the rule of :mod:`selection` that goes by it.
RULE_OF = {"development": "development", "score": "oracle"}


def page_data(analysis: Analysis, layout: Layout) -> dict[str, Any]:
    """All that the page computes from, of one setting.

    ``scores`` of a model: task -> language -> a list per distillation seed of test scores (0-1) per fine-tuning seed.
    ``signals``: what rules of :mod:`selection` go by; of trained methods alone. ``curve``: million tokens and held-out
    loss as a share of that before training, means over distillation seeds.
    """
    results = analysis.results
    rows = results.scores[results.scores["main"]]
    timed = results.latency.sort_values(["batch_size", "threads"], kind="stable").groupby("student").first()
    seen = signals(results, analysis.summary).set_index(["method", "student"])
    models = []
    for (_, method, student), table in rows.groupby(MODEL, sort=False):
        model = {"method": method, "label": "the teacher" if method == TEACHER else label(method), "student": student}
        model["milliseconds"] = round(1000 * float(timed.loc[student, "median_seconds"]), 3)
        model["scores"] = _scores(table)
        if (method, student) in seen.index:
            known = seen.loc[(method, student), list(RULES)].dropna()
            model["signals"] = {rule: round(float(value), 6) for rule, value in known.items()}
        if method != TEACHER:
            model |= _place(layout, model_name(method, student, table["distillation_seed"].iloc[0]))
            model["curve"] = _curve(results.curves.query("method == @method and student == @student"))
        models.append(model)
    return {"setting": analysis.setting, "floor": FLOOR, "teacher": TEACHER, "models": models}


def budgets_data(budgets: Budgets, layout: Layout) -> dict[str, Any]:
    """As :func:`page_data`, of a setting that was run at several budgets of tokens; nothing of it is timed.

    ``budgets``: name -> words, in rising order; ``budget``: the one shown first, the largest of those with most seeds.
    Trained models have a ``budget``. ``fixed``: intervals leave out the teacher's chance, as those of the gap do.
    """
    models, seeds = [], dict[str, int]()
    trained = budgets.training.groupby(["method", "student", "budget"])
    for (method, student, budget), rows in budgets.scores.groupby(["method", "student", "budget"], sort=False):
        model = {"method": method, "label": "the teacher" if method == TEACHER else label(method), "student": student}
        flat = [
            {"task": row.task, "distillation_seed": row.seed, "finetuning_seed": row.finetuning_seed}
            | {"language": language, "test": test}
            for row in rows.itertuples()
            for language, test in row.languages.items()
        ]
        model["scores"] = _scores(pd.DataFrame(flat))
        if method not in (TEACHER, FLOOR):
            of_task = rows.groupby("task")[["development", "score"]].mean().mean(skipna=False).dropna()
            model |= {"budget": budget, "signals": {RULE_OF[name]: round(v, 6) for name, v in of_task.items()}}
            model |= _place(layout, model_name(method, student, rows["seed"].iloc[0], budget))
            points = [point for curve in trained.get_group((method, student, budget))["curve"] for point in curve]
            model["curve"] = _curve(pd.DataFrame(points, columns=["tokens", "loss"]))
            seeds[budget] = max(seeds.get(budget, 0), rows["seed"].nunique())
        models.append(model)
    words = {name: f"{millions(tokens)} tokens" for name, tokens in budgets.tokens.items() if name in seeds}
    first = max(words, key=lambda name: (seeds[name], budgets.tokens[name]))
    shared = {"setting": layout.setting, "floor": FLOOR, "teacher": TEACHER, "models": models}
    return shared | {"budgets": words, "budget": first, "fixed": True}


def _place(layout: Layout, model: str) -> dict[str, str]:
    path = layout.student(model).relative_to(layout.folder).as_posix()
    return {"path": path, "stage": f"distill@{layout.setting}_{model}"}


def _scores(rows: pd.DataFrame) -> dict[str, dict[str, list[list[float]]]]:
    scores: dict[str, dict[str, list[list[float]]]] = {}
    for (task, language), table in rows.groupby(["task", "language"], sort=False):
        wide = table.pivot(index="distillation_seed", columns="finetuning_seed", values="test")
        scores.setdefault(str(task), {})[str(language)] = wide.round(6).to_numpy().tolist()
    return scores


def _curve(rows: pd.DataFrame) -> list[list[float]]:
    if rows.empty:
        return []
    means = rows.groupby("tokens")["loss"].mean()
    return [[round(tokens / 1e6, 4), round(loss / means.iloc[0], 4)] for tokens, loss in means.items()]


def template(name: str) -> jinja2.Template:
    """One of the templates of this folder; all extend page.html."""
    loader = jinja2.FileSystemLoader(Path(__file__).parent)
    return jinja2.Environment(autoescape=True, trim_blocks=True, loader=loader).get_template(name)


def embedded(data: Any) -> str:
    """Data as JSON that a page may hold."""
    return json.dumps(data, ensure_ascii=True, separators=(",", ":"), allow_nan=False).replace("<", "\\u003c")


def write_chooser(
    plan: Plan, analyses: Sequence[Analysis | Budgets], path: Path, nav: dict[str, dict[str, str]]
) -> Path:
    """Write the page to ``path``; the same results give the same bytes.

    Args:
        analyses: of each setting its comparison, or its budgets.
        nav: group -> name of file -> title of the report's pages, which it leads to.

    Raises:
        StudyError: scores are incomplete, or the file cannot be written.
    """
    shares = np.arange(STEPS + 1) / STEPS
    with np.errstate(divide="ignore"):
        quantiles = stats.t.ppf((1 + LEVEL) / 2, 1 / shares)
    quantiles[0] = stats.norm.ppf((1 + LEVEL) / 2)
    layouts = [plan.layout(own.comparison.setting) for own in analyses]
    data = {
        "profile": plan.profile,
        "settings": [
            budgets_data(own, layout) if isinstance(own, Budgets) else page_data(own, layout)
            for own, layout in zip(analyses, layouts, strict=True)
        ],
        "rules": {name: {"words": rule.words, "usable": rule.usable} for name, rule in RULES.items()},
        "quantiles": [round(float(value), 5) for value in quantiles],
    }
    pictures = [
        layout.analysis(name) / f"{picture}.png"
        for own, layout in zip(analyses, layouts, strict=True)
        for name, picture in [
            ("budgets", "gap_closed") if isinstance(own, Budgets) else ("comparison", "quality_latency")
        ]
    ]
    content = template("chooser.html").render(
        title=f"Choose a student: profile {plan.profile}",
        profile=plan.profile,
        nav=nav,
        here=path.name,
        pictures=[Path(os.path.relpath(picture, path.parent)).as_posix() for picture in pictures],
        data=embedded(data),
    )
    write_file(path, content + "\n")
    return path
