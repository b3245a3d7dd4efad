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

from study.analysis.figures.style import label
from study.analysis.numbers.analysis import Analysis
from study.analysis.numbers.results import FLOOR, MODEL, TEACHER
from study.analysis.numbers.selection import RULES, signals
from study.analysis.numbers.statistics import LEVEL
from study.files import Layout, write_file
from study.plan import Plan

#: Student's quantiles lie on a grid of this many steps of 1 / degrees of freedom, between which the page interpolates.
STEPS = 400


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
            seed = table["distillation_seed"].iloc[0]
            model["path"] = layout.student(f"{method}_{student}_{seed}").relative_to(layout.folder).as_posix()
            model["stage"] = f"distill@{analysis.setting}_{method}_{student}_{seed}"
            model["curve"] = _curve(results.curves.query("method == @method and student == @student"))
        models.append(model)
    return {"setting": analysis.setting, "floor": FLOOR, "teacher": TEACHER, "models": models}


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


def write_chooser(plan: Plan, analyses: Sequence[Analysis], path: Path, nav: dict[str, dict[str, str]]) -> Path:
    """Write the page to ``path``; the same results give the same bytes.

    Args:
        nav: group -> name of file -> title of the report's pages, which it leads to.

    Raises:
        StudyError: scores are incomplete, or the file cannot be written.
    """
    shares = np.arange(STEPS + 1) / STEPS
    with np.errstate(divide="ignore"):
        quantiles = stats.t.ppf((1 + LEVEL) / 2, 1 / shares)
    quantiles[0] = stats.norm.ppf((1 + LEVEL) / 2)
    data = {
        "profile": plan.profile,
        "settings": [page_data(analysis, plan.layout(analysis.setting)) for analysis in analyses],
        "rules": {name: {"words": rule.words, "usable": rule.usable} for name, rule in RULES.items()},
        "quantiles": [round(float(value), 5) for value in quantiles],
    }
    pictures = [plan.layout(a.setting).analysis("comparison") / "quality_latency.png" for a in analyses]
    content = template("chooser.html").render(
        title=f"Choose a student: profile {plan.profile}",
        profile=plan.profile,
        nav=nav,
        here=path.name,
        pictures=[Path(os.path.relpath(picture, path.parent)).as_posix() for picture in pictures],
        data=json.dumps(data, ensure_ascii=True, separators=(",", ":"), allow_nan=False).replace("<", "\\u003c"),
    )
    write_file(path, content + "\n")
    return path
