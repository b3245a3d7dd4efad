"""Result files with known numbers, for the tests of the analysis; the study itself never makes any up."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pandas as pd
from ruamel.yaml import YAML

from study import load_params
from study.analysis.results import Results, load_results
from study.config import Layout, Params

REPOSITORY = Path(__file__).parent.parent
METRICS = {"sentiment": "accuracy", "sts-b": "spearman", "boolq": "accuracy"}
METRICS |= {"privacy-qa": "accuracy", "topic": "macro_f1"}
ENVIRONMENT = {"python": "3.11.7", "torch": "2.13.0", "transformers": "5.23.0", "datasets": "5.2.0"}
ENVIRONMENT |= {"processor": "AMD EPYC", "cores": 2, "threads": 1, "date": "2026-11-22"}


def make_study(root: Path, methods=None, students=("L3-H384", "L3-H192"), seeds=(1,)) -> Params:
    """A folder with the repository's params.yaml and the given grid; returns its parameters."""
    yaml = YAML(typ="safe")
    values = yaml.load(REPOSITORY / "params.yaml")
    values["profile"] = "laptop"
    values["settings"]["english"]["tasks"] = list(METRICS)
    values["finetuning"]["seeds"] = [1, 2]
    values["latency"] |= {"batch_sizes": [1, 32], "threads": [1]}
    values["grid"] = {
        "settings": ["english"],
        "methods": list(methods or values["grid"]["methods"]),
        "students": {"english": list(students)},
        "seeds": list(seeds),
    }
    yaml.dump(values, root / "params.yaml")
    (root / "dvc.yaml").touch()
    return load_params(root / "params.yaml")


def change_params(root: Path, **grid) -> Params:
    yaml = YAML(typ="safe")
    values = yaml.load(root / "params.yaml")
    values["grid"] |= grid
    yaml.dump(values, root / "params.yaml")
    return load_params(root / "params.yaml")


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
    return {
        "profile": "laptop",
        "setting": "english",
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
            "training_curve": [{"step": 10, "loss": 4.0}],
        }
        if trained
        else None,
        "evaluation_seconds": 140.0,
        "environment": ENVIRONMENT,
    }


def latency_result(students) -> dict:
    seconds = {"teacher": 0.020, "L3-H384": 0.010, "L3-H192": 0.005, "L6-H192": 0.009}
    return {
        "profile": "laptop",
        "setting": "english",
        "environment": ENVIRONMENT,
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
SPLITS = {
    "profile": "laptop",
    "setting": "english",
    "splits": [
        {"task": task, "split": split, "examples": 2000, "metric": "accuracy", "majority_share": share}
        for split in ("train", "development", "test")
        for task, share in SHARES.items()
    ],
}


def write_grid(root: Path, params: Params, scores: dict | None = None) -> Path:
    """Write every cell's file; ``scores`` maps (method, student) to test, or to (test, development). Teacher: 0.80.

    Other cells score 0.60 + 0.01 x the method's place in the grid, 0.05 less for every student after the first.
    Returns the folder.
    """
    layout = Layout(params, "english", root)
    layout.results.mkdir(parents=True)
    write(layout.result("teacher", "teacher", 0), run_result("teacher", "teacher", 0, 0.80))
    for row, student in enumerate(params.grid.students["english"]):
        for place, method in enumerate(params.grid.methods):
            value = (scores or {}).get((method, student), 0.60 + 0.01 * place - 0.05 * row)
            test, development = value if isinstance(value, tuple) else (value, value)
            for seed in params.grid.seeds:
                shift = 0.004 * (seed - 1)
                run = run_result(method, student, seed, test + shift, development + shift)
                write(layout.result(method, student, seed), run)
    write(layout.results / "latency.json", latency_result(params.grid.students["english"]))
    write(layout.results / "tasks.json", SPLITS)
    write(layout.representations, representations_result(params))
    return layout.results


def representations_result(params: Params) -> dict:
    """Students of 2 layers, a teacher of 4: the k-th method's last layers have a CKA of 0.5 + 0.04 k, others 0.3.

    Its last layer adds k - 1 points to a probe, two more or less by task.
    """
    models = []
    for method, student, seed in params.grid.cells("english"):
        cka = np.full((2, 4), 0.3)
        cka[0, 1], cka[1, 3] = 0.4, 0.5 + 0.04 * params.grid.methods.index(method)
        divergence = {name: (shift + 1 - cka).tolist() for name, shift in (("query", 0), ("key", 1), ("value", 2))}
        models.append({"method": method, "student": student, "seed": seed, "cka": cka.tolist()})
        models[-1]["relation_divergence"] = divergence
        adds = 0.01 * (params.grid.methods.index(method) - 1)
        probes = (("boolq", 0.02), ("topic", -0.02))
        models[-1]["probes"] = {task: {"last": 0.5 + adds + shift, "last_but_one": 0.5} for task, shift in probes}
    common = {"profile": "laptop", "setting": "english", "environment": ENVIRONMENT}
    return common | {"sequences": 64, "relation_sequences": 16, "relation_heads": 12, "models": models}


def add_languages(folder, probe: float = 0.5) -> None:
    """In every file the task topic gets Spanish scores 0.1 below the English ones, French twice that, and a probe."""
    for path in folder.glob("*_[0-9].json"):
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
        change(path, tasks=content["tasks"], probes=probes)


def results_of_scores(scores: dict[str, np.ndarray], options: dict[str, dict] | None = None) -> Results:
    """Results with the given test scores of every method, each (students, tasks, distillation and fine-tuning seeds).

    The teacher scores 0.80 in every task; ``options`` are the parameters that result files record of a method.
    """
    tables, runs = [], []
    teacher = np.full((1, next(iter(scores.values())).shape[1], 1, 2), 0.80)
    for method, values in {"teacher": teacher, **scores}.items():
        students = ["teacher"] if method == "teacher" else [f"student {place}" for place in range(len(values))]
        axes = {"student": students, "task": [f"task {place}" for place in range(values.shape[1])]}
        axes |= {"distillation_seed": range(1, values.shape[2] + 1), "finetuning_seed": range(1, values.shape[3] + 1)}
        rows = pd.MultiIndex.from_product(axes.values(), names=axes).to_frame(index=False)
        constants = {"setting": "english", "method": method, "metric": "accuracy", "main": True, "language": "en"}
        tables.append(rows.assign(**constants, test=values.ravel(), development=values.ravel()))
        models = rows[["student", "distillation_seed"]].drop_duplicates()
        own = (options or {}).get(method, {})
        runs.append(models.assign(setting="english", method=method, options=[own] * len(models)))
    empty = pd.DataFrame()
    return Results(pd.concat(tables, ignore_index=True), pd.concat(runs, ignore_index=True), empty, empty)


def several_languages(root: Path, params: Params) -> Results:
    """The results of a study after :func:`add_languages`."""
    english = params.settings["english"]
    english = english.model_copy(update={"tasks": [*english.tasks, "retrieval"]})
    return load_results(params.model_copy(update={"settings": {"english": english}}), "english", root)


def change(path: Path, **values) -> None:
    write(path, json.loads(path.read_text()) | values)


def write(path: Path, values: dict) -> None:
    path.write_text(json.dumps(values))
