"""Result files with known numbers, for the tests of the analyses; the study itself never makes any up."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

import numpy as np
import pandas as pd
import xarray as xr
from ruamel.yaml import YAML

from study import resolve
from study.analysis.numbers.analysis import Analysis
from study.analysis.numbers.results import Results, load_results
from study.analysis.numbers.statistics import AXES
from study.descriptions import Comparison
from study.files import Layout
from study.methods import Membership
from study.params import read_yaml
from study.plan import Plan
from study.sections import Encoder, Teacher

FIXTURES = Path(__file__).parent / "fixtures"
METRICS = {"sentiment": "accuracy", "sts-b": "spearman", "boolq": "accuracy"}
METRICS |= {"privacy-qa": "accuracy", "topic": "macro_f1"}
ENVIRONMENT = {"python": "3.11.7", "torch": "2.13.0", "transformers": "5.23.0", "datasets": "5.2.0"}
ENVIRONMENT |= {"processor": "AMD EPYC", "cores": 2, "threads": 1, "date": "2026-11-22"}
HEAD = {"schema": 2, "profile": "laptop", "setting": "english", "environment": ENVIRONMENT, "hashes": {}}
METHODS = ["none", "mlm", "od", "hs-last", "hs-top", "hs-uniform", "hs-uniform-consecutive", "hs-uniform+last"]
METHODS += ["mha-minilmv2", "mha-direct"]


class Study(NamedTuple):
    """A folder with parameters of the fixtures: its plan, and the comparison and files of its setting."""

    plan: Plan
    comparison: Comparison
    layout: Layout

    def load(self) -> Results:
        return load_results(self.comparison, self.layout)

    def analyse(self) -> Analysis:
        return Analysis(self.load())


def make_study(
    root: Path,
    methods: Sequence[str] | None = None,
    students: Sequence[str] = ("L3-H384", "L3-H192"),
    seeds: Sequence[int] = (1,),
    variants: Sequence[str] = (),
    ablated_students: Sequence[str] = (),
) -> Study:
    """A folder with the fixtures' params.yaml and the given grid."""
    values = read_yaml(FIXTURES / "params.yaml")
    values["settings"]["english"]["tasks"] = list(METRICS)
    values["finetuning"]["seeds"] = [1, 2]
    values["latency"] |= {"batch_sizes": [1, 32], "threads": [1]}
    values["grid"] = {
        "settings": ["english"],
        "methods": list(methods or METHODS),
        "students": {"english": list(students)},
        "seeds": list(seeds),
        "ablations": {"english": {"variants": list(variants), "students": list(ablated_students)}},
    }
    yaml = YAML(typ="safe")
    yaml.dump(values, root / "params.yaml")
    (root / "notebooks").mkdir(exist_ok=True)
    plan = resolve(root=root)
    (comparison,) = plan.of(Comparison)
    return Study(plan, comparison, plan.layout("english"))


def run_result(method: str, student: str, seed: int, test: float, development: float | None = None) -> dict:
    """A run whose macro over tasks is ``test``: tasks lie at -0.02 .. +0.02 around it, fine-tuning seeds at -+0.01."""
    development = test if development is None else development
    tasks = {}
    for place, (task, metric) in enumerate(METRICS.items()):
        shift = 0.01 * (place - 2)
        tasks[task] = {
            "metric": metric,
            "learning_rate": 3e-4,
            "train_examples": 1500,
            "development_examples": 500,
            "test_examples": 1000,
            "runs": [
                {
                    "seed": finetuning_seed,
                    "epoch": 2,
                    "development": {metric: development + shift + noise, "extra": 0.5},
                    "test": {metric: test + shift + noise, "extra": 0.5},
                }
                for finetuning_seed, noise in ((1, -0.01), (2, 0.01))
            ],
        }
    trained = method != "none"
    start = 1.0 + len(method)
    curve = [
        {"step": step, "tokens": 2048 * step, "seconds": 0.9 * step, "loss": start * 0.99 ** (step * start / 20)}
        for step in (0, 50, 100, 200)
    ]
    return HEAD | {
        "commit": None,
        "method": method,
        "student": student,
        "seed": seed,
        "tasks": tasks,
        "masked_language_modelling": {"loss": 3.6, "accuracy": 0.41} if method in ("teacher", "mlm", "od") else None,
        "size": {
            "parameters": 17_000_000,
            "embedding_parameters": 11_700_000,
            "encoder_parameters": 5_300_000,
            "flops_per_sequence": 1.4e9,
            "sequence_length": 128,
        },
        "distillation": {
            "objective": "some_objective",
            "learning_rate": 6e-4,
            "steps": 200,
            "tokens": 409_600,
            "seconds": 190.2,
            "tokens_per_second": 2153.0 + 100 * len(method),
            "initialisation": "teacher-layers",
            "inputs": "masked",
            "precision": "bf16",
            "threads": 1,
            "curve": curve,
            "options": {},
            "training_curve": [{"step": 10, "tokens": 20480, "seconds": 9.0, "loss": 4.0}],
        }
        if trained
        else None,
        "evaluation_seconds": 140.0,
    }


def latency_result(students) -> dict:
    seconds = {"teacher": 0.020, "L3-H384": 0.010, "L3-H192": 0.005, "L6-H192": 0.009}
    return HEAD | {
        "sequence_length": 128,
        "precision": "bf16",
        "runs": 30,
        "warmup_runs": 5,
        "measurements": [
            {
                "student": model,
                "batch_size": size,
                "threads": 1,
                "median_seconds": seconds[model] * size,
                "lower_quartile_seconds": 0.95 * seconds[model] * size,
                "upper_quartile_seconds": 1.05 * seconds[model] * size,
                "sequences_per_second": 1 / seconds[model],
                "teacher_median_seconds": seconds["teacher"] * size,
                "speed_up": seconds["teacher"] / seconds[model],
            }
            for model in ("teacher", *students)
            for size in (1, 32)
        ],
    }


SHARES = {"sentiment": 0.5, "boolq": 0.62, "privacy-qa": 0.5, "topic": 0.2, "sts-b": None}
SPLITS = HEAD | {
    "splits": [
        {"task": task, "split": split, "examples": 2000, "metric": "accuracy", "majority_share": share}
        for split in ("train", "development", "test")
        for task, share in SHARES.items()
    ]
}


def write_grid(study: Study, scores: dict | None = None) -> Path:
    """Write every model's file; ``scores`` maps (method, student) to test, or to (test, development). Teacher: 0.80.

    Others score 0.60 + 0.01 x the method's place in the grid, 0.05 less for every student after the first.
    Returns the folder.
    """
    comparison, layout = study.comparison, study.layout
    layout.results.mkdir(parents=True)
    write(layout.result("teacher"), run_result("teacher", "teacher", 0, 0.80))
    for method, student, seed in comparison.cells():
        place, row = comparison.methods.index(method), list(comparison.students).index(student)
        value = (scores or {}).get((method, student), 0.60 + 0.01 * place - 0.05 * row)
        test, development = value if isinstance(value, tuple) else (value, value)
        shift = 0.004 * (seed - 1)
        run = run_result(method, student, seed, test + shift, development + shift)
        write(layout.result(f"{method}_{student}_{seed}"), run)
    write(layout.results / "latency.json", latency_result(comparison.students))
    write(layout.results / "tasks.json", SPLITS)
    write(layout.representations, representations_result(comparison))
    return layout.results


def representations_result(comparison: Comparison) -> dict:
    """Students of 2 layers, a teacher of 4: the k-th method's last layers have a CKA of 0.5 + 0.04 k, others 0.3.

    Its last layer adds k - 1 points to a probe, two more or less by task.
    """
    models = []
    for method, student, seed in comparison.cells():
        place = comparison.methods.index(method)
        cka = np.full((2, 4), 0.3)
        cka[0, 1], cka[1, 3] = 0.4, 0.5 + 0.04 * place
        divergence = {name: (shift + 1 - cka).tolist() for name, shift in (("query", 0), ("key", 1), ("value", 2))}
        models.append({"method": method, "student": student, "seed": seed, "cka": cka.tolist()})
        models[-1]["relation_divergence"] = divergence
        adds = 0.01 * (place - 1)
        probes = (("boolq", 0.02), ("topic", -0.02))
        models[-1]["probes"] = {task: {"last": 0.5 + adds + shift, "last_but_one": 0.5} for task, shift in probes}
    return HEAD | {"sequences": 64, "relation_sequences": 16, "relation_heads": 12, "models": models}


def add_languages(folder, probe: float = 0.5, found: dict[str, float] | None = None) -> None:
    """In every file the task topic gets Spanish scores 0.1 below the English ones, French twice that, and a probe.

    ``found``: method -> the probe's development accuracy in Spanish, half of it in Hindi; the teacher's is 1.
    """
    for path in [folder / "teacher.json", *folder.glob("*_[0-9].json")]:
        content = json.loads(path.read_text())
        topic = content["tasks"]["topic"]
        topic["language_examples"] = {"es": 500, "fr": 250}
        for run in topic["runs"]:
            run["languages"] = {
                language: {name: score - gap for name, score in run["test"].items()}
                for language, gap in (("es", 0.1), ("fr", 0.2))
            }
        accuracies = {"accuracy": probe, "from_english": probe - 0.1, "to_english": probe + 0.1}
        languages = {"es": accuracies, "hi": {name: value / 2 for name, value in accuracies.items()}}
        probes = {"retrieval": {"metric": "accuracy", "test_examples": 300, "languages": languages}}
        if found is not None:
            accuracy = found.get(content["method"], 1.0)
            probes["retrieval"]["development"] = {"es": accuracy, "hi": accuracy / 2}
        change(path, tasks=content["tasks"], probes=probes)


def comparison_of(
    methods: Sequence[str], students: Sequence[str], memberships: dict[str, dict] | None = None
) -> Comparison:
    """A comparison of made-up methods and students."""
    sizes = {"layers": 2, "width": 12, "heads": 4, "intermediate": 24}
    return Comparison(
        setting="english",
        profile="laptop",
        revisions={},
        teacher=Teacher(name="a teacher", **sizes),
        methods=list(methods),
        students={student: Encoder(**sizes) for student in students},
        seeds=[1],
        memberships={name: Membership(**own) for name, own in (memberships or {}).items()},
        ablated_students=list(students) if memberships else [],
        tasks=["topic"],
        finetuning_seeds=[1],
        batch_sizes=[1],
        threads=[1],
        tokens=307_200,
    )


def results_of_scores(
    scores: dict[str, np.ndarray], options: dict[str, dict] | None = None, memberships: dict[str, dict] | None = None
) -> Results:
    """Results with the given test scores of every method, each (students, tasks, distillation and fine-tuning seeds).

    The teacher scores 0.80 in every task; ``options`` are the parameters that result files record of a method. Methods
    with a membership are variants: with any, the results have ablations, of all students.
    """
    memberships = memberships or {}
    grid = _results_of_scores({m: own for m, own in scores.items() if m not in memberships}, options, memberships)
    if not memberships:
        return grid
    ablations = _results_of_scores(scores, options, memberships)
    return Results(grid.comparison, grid.scores, grid.runs, grid.curves, grid.latency, ablations=ablations)


def _results_of_scores(scores: dict[str, np.ndarray], options: dict | None, memberships: dict) -> Results:
    tables, runs = [], []
    teacher = np.full((1, next(iter(scores.values())).shape[1], 1, 2), 0.80)
    students = [f"student {place}" for place in range(len(next(iter(scores.values()))))]
    for method, values in {"teacher": teacher, **scores}.items():
        own = ["teacher"] if method == "teacher" else students[: len(values)]
        axes = {"student": own, "task": [f"task {place}" for place in range(values.shape[1])]}
        axes |= {"distillation_seed": range(1, values.shape[2] + 1), "finetuning_seed": range(1, values.shape[3] + 1)}
        rows = pd.MultiIndex.from_product(axes.values(), names=axes).to_frame(index=False)
        constants = {"setting": "english", "method": method, "metric": "accuracy", "main": True, "language": "en"}
        tables.append(rows.assign(**constants, test=values.ravel(), development=values.ravel()))
        models = rows[["student", "distillation_seed"]].drop_duplicates()
        stated = (options or {}).get(method, {})
        runs.append(models.assign(setting="english", method=method, options=[stated] * len(models)))
    comparison = comparison_of(list(scores), students, memberships)
    empty = pd.DataFrame()
    return Results(comparison, pd.concat(tables, ignore_index=True), pd.concat(runs, ignore_index=True), empty, empty)


def named(scores: np.ndarray) -> xr.DataArray:
    """Scores (..., students, tasks, distillation seeds, fine-tuning seeds) with their names."""
    return xr.DataArray(scores, dims=[*(f"other {place}" for place in range(scores.ndim - 4)), *AXES])


def several_languages(study: Study) -> Study:
    """The study after :func:`add_languages`: with the probe among its tasks."""
    tasks = [*study.comparison.tasks, "retrieval"]
    return study._replace(comparison=study.comparison.model_copy(update={"tasks": tasks}))


def change(path: Path, **values) -> None:
    write(path, json.loads(path.read_text()) | values)


def write(path: Path, values: dict) -> None:
    path.write_text(json.dumps(values))
