"""All that was run on a setting's teacher side by side: what it needs, costs and keeps, and how fast it is."""

from __future__ import annotations

from collections import defaultdict
from statistics import fmean, median
from typing import Any

import pandas as pd

from study.analysis.numbers.budgets import score_rows, standing
from study.analysis.numbers.neighbours import called, over_seeds
from study.analysis.numbers.text import millions
from study.descriptions import TEACHER, Comparison, model_name, open_description
from study.files import Layout, StudyError
from study.records import ResultFile, RunResult, read_record
from study.records_beside import NeighbourResult
from study.sections import BASE_BUDGET

NOT_RUN, NOT_MEASURED = "not run", "not measured"
START = "weights, as a start"
#: Objective -> what it reads of the teacher while it trains.
READ = {
    "output_distribution": "output distribution",
    "hidden_state": "hidden states",
    "attention_relation": "queries, keys, values",
    "direct_attention": "queries, keys, values",
    "attention_distribution": "attention distributions, values",
    "attention_score": "attention scores",
    "sum": "what its parts read",
    "sentence_embedding": "sentence embeddings",
    "masked_language_modelling": START,
    None: START,
}
#: Rows that every reader asks for, shown as not run where there is no result -> what they read of the teacher.
ASKED_FOR = {
    "pruned-hs": "weights, hidden states",
    "static-256": "output for its vocabulary",
    "paraphrase-minilm-l3": "nothing: published by others",
}
#: System -> what it reads of the teacher, labels, task, and the arm that it is compared with.
SYSTEMS = {
    "prequant": ("weights", "of the task", "one", "full"),
    "cr-ild": ("all states, logits, fine-tuned", "of the task", "one", "teacher"),
    "xtremedistil": ("all states, logits, fine-tuned", "of a source", "a source", "start"),
    "miniend": ("queries, keys, values, output distribution", "none", "none", "teacher"),
}


def overview(results: list[NeighbourResult], layout: Layout) -> pd.DataFrame:
    """One row for the teacher, each method at its best-founded budget, rows that are asked for, and each system.

    Columns: row; kind (``teacher``, ``method``, ``system``); teacher, labels, task: what it needs; tokens (in words,
    that students of a method read, where that is not the most); cost; kept, with its 95 % interval over seeds, low to
    high, in percent; of: of what; latency in ms. NaN where nothing was measured.

    A method keeps the share of the teacher's mean over all tasks of the setting, at its budget to read first. A system
    keeps the share of its own reference's first measure, where both are scores; NaN where that is 0. Latency is that of
    texts one by one in eager PyTorch on one thread, and that of a system what a model of the same shape takes.

    Raises:
        StudyError: the plan or a result file is damaged, or a system is not in SYSTEMS.
    """
    comparison, _ = open_description(layout.folder / "plan" / Comparison.stage / f"{layout.setting}.json", Comparison)
    latency, runs = _latency(layout), _runs(comparison, layout)
    teacher = runs.pop((TEACHER, TEACHER), None)
    known = _scores(teacher, comparison)[0] if teacher else float("nan")
    rows: list[dict[str, Any]] = [_row("teacher", "teacher", ("all of it", "none", "none"), latency.get(TEACHER))]
    rows[0] |= {"kept": 100.0, "of": "itself"} if teacher else {}
    most = millions(max(map(_tokens, runs.values()), default=0))
    for (method, student), own in runs.items():
        trained = own[0].distillation
        needs = READ.get(trained.objective if trained else None, trained.objective if trained else START)
        needs = ASKED_FOR.get(method, needs)
        row = _row(f"{method}, {student}", "method", (needs, "none", "none"), latency.get(student))
        rows.append(row | over_seeds([100 * score / known for score in _scores(own, comparison)]).named("kept"))
        rows[-1] |= {"of": "teacher, all tasks", "cost": _cost(own)}
        read = millions(_tokens(own))
        rows[-1]["tokens"] = read if trained and read != most else ""
    there = {method for method, _ in runs}
    rows += [
        _row(name, "method", (needs, "none", "none"), None) | {"of": NOT_RUN}
        for name, needs in ASKED_FOR.items()
        if name not in there
    ]
    return pd.DataFrame([*rows, *(_system(own, comparison, latency) for own in results)])


def _row(name: str, kind: str, needs: tuple[str, str, str], latency: float | None) -> dict[str, Any]:
    nothing = dict.fromkeys(("kept", "low", "high"), float("nan"))
    own = dict(zip(("teacher", "labels", "task"), needs, strict=True))
    measured = float("nan") if latency is None else latency
    return (
        {"row": name, "kind": kind}
        | own
        | {"tokens": "", "cost": "", "latency": measured, "of": NOT_MEASURED}
        | nothing
    )


def _latency(layout: Layout) -> dict[str, float]:
    """Model -> median milliseconds, of what ``make runtimes`` wrote; nothing where it was not run."""
    file = layout.reports / "runtimes" / layout.setting / "timings.csv"
    if not file.is_file():
        return {}
    rows = pd.read_csv(file, dtype={"input": str})
    asked = (rows["runtime"] == "eager") & (rows["input"] == "texts") & (rows["batch_size"] == 1)
    return rows[asked & (rows["threads"] == 1)].set_index("model")["p50"].to_dict()


def _runs(comparison: Comparison, layout: Layout) -> dict[tuple[str, str], list[RunResult]]:
    """Method and student -> its runs at the budget that is shown, in the order of params.yaml; those there are."""
    chosen: dict[tuple[str, str], list[RunResult]] = {}
    beside = [(*cell, BASE_BUDGET) for cell in [*comparison.ablation_cells(), *comparison.reference_cells()]]
    cells = dict.fromkeys([(TEACHER, TEACHER, 0, BASE_BUDGET), *comparison.every_cell(), *beside])
    wanted = (TEACHER, *comparison.methods, *ASKED_FOR, *(comparison.references or {}))
    for method in dict.fromkeys(wanted):
        budgets: dict[tuple[str, str], list[RunResult]] = defaultdict(list)
        for cell in (cell for cell in cells if cell[0] == method):
            path, (_, student, seed, budget) = layout.result(model_name(*cell)), cell
            if path.is_file():
                where = {"profile": comparison.profile, "setting": comparison.setting, "budget": budget}
                record = read_record(path, RunResult, **where, method=method, student=student, seed=seed)
                budgets[student, budget].append(record)
        ranked = sorted(budgets.values(), key=lambda own: standing(len(own), _tokens(own)))
        chosen |= {(method, own[0].student): own for own in ranked}  # the last, the highest, stays
    return chosen


def _tokens(runs: list[RunResult]) -> int:
    return runs[0].distillation.tokens if runs[0].distillation else 0


def _scores(runs: list[RunResult], comparison: Comparison) -> list[float]:
    """The mean over all tasks of each run."""
    return [fmean(row["score"] for row in score_rows(run, comparison)) for run in runs]


def _cost(runs: list[RunResult]) -> str:
    trained = [run.distillation for run in runs if run.distillation]
    if not trained:
        return "no training"
    seconds = median(own.seconds for own in trained)
    return f"{trained[0].tokens / 1e6:.2g} M tokens, {seconds:,.0f} s, {_device(runs[0])}"


def _device(result: ResultFile) -> str:
    """What it was computed on, in a word."""
    return "GPU" if result.environment and "NVIDIA" in result.environment.processor else "CPU"


def _system(result: NeighbourResult, comparison: Comparison, latency: dict[str, float]) -> dict[str, Any]:
    if result.system not in SYSTEMS:
        known = ", ".join(SYSTEMS)
        raise StudyError(f"{result.neighbour}.system = {result.system}; overview.SYSTEMS lacks it: {known}")
    *needs, reference = SYSTEMS[result.system]
    arms = {arm.name: arm.values for arm in result.arms}
    (own, *_), measure = arms, next(iter(result.measures))
    sizes, shape = result.options.get("student"), None
    if result.system == "prequant":
        shape = TEACHER if result.model == TEACHER else result.model.split("_")[1]
    elif sizes and result.system == "xtremedistil":
        same = [n for n, one in comparison.students.items() if all(getattr(one, k) == v for k, v in sizes.items() if v)]
        shape = same[0] if same else None
    row = _row(called(result), "system", (needs[0], needs[1], needs[2]), latency.get(shape or ""))
    counts = f"{len(result.arms)} arms, {len(result.seeds)} seeds"
    row["cost"] = f"{result.seconds / 60:,.0f} min, {counts}, {_device(result)}"
    if reference not in arms or measure not in arms[reference]:
        return row
    pair = [arms[name][measure] for name in (own, reference)]
    words = next(arm.words for arm in result.arms if arm.name == reference)
    if reference == "start" or max(pair[1]) > 1:  # no score of a teacher
        means = [fmean(values) * (1 if max(pair[1]) > 1 else 100) for values in pair]
        return row | {"of": f"{measure} {means[0]:.1f}, {words} {means[1]:.1f}"}
    shares = [100 * a / b if b else float("nan") for a, b in zip(*pair, strict=True)]
    return row | over_seeds(shares).named("kept") | {"of": words}
