"""The result files of one profile and setting: loading and checking them, and the macro score."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd

from study.descriptions import REFERENCE, TEACHER, Comparison
from study.files import Layout, StudyError, find_root, tuning_folder
from study.methods import Membership
from study.records import Environment, LatencyResult, RunResult, TaskSplits, Tuning, read_record, short_name
from study.sections import BASE_BUDGET, MASKED_WORDS

FLOOR = "none"
BASELINE = "mlm"
MODEL = ["setting", "method", "student"]
RUN = [*MODEL, "distillation_seed"]
#: Keys of a variant that a run records beside the options of its objective.
SHARED = ("learning_rate", "inputs", "initialisation", "steps")
#: What files of one comparison have to be made with the same versions of.
PACKAGES = ("python", "torch", "transformers", "datasets")
#: Place that an error names -> what was made there with which versions; None: not known.
Environments = dict[str, Environment | None]


@dataclass(frozen=True)
class Results:
    """Every number of one profile and setting, in the order of the grid, the teacher first.

    Attributes:
        comparison: what is compared: the description that the files were loaded for.
        scores: one row per run, task, metric, fine-tuning seed and language of the test data: setting, method, student,
            distillation_seed, task, metric, main (the task's main metric?), finetuning_seed, language, development,
            test, development_examples, test_examples, learnt (the language of training and development data).
        runs: one row per run (teacher included): profile, setting, method, student, distillation_seed, its size, its
            masked-language-modelling loss, what its distillation took, ``options`` (a dict: the method's own
            parameters, as recorded), and the machine and versions it ran on.
        curves: setting, method, student, distillation_seed, step, tokens, seconds, loss: held-out value of the
            method's own loss; losses of different methods are not comparable.
        latency: one row per model (column ``student``, which may be "teacher"), batch size and number of threads.
        probes: one row per run, probe and language, empty where a setting has no probes: setting, method, student,
            distillation_seed, task, metric, language, test (the main metric), test_examples, development (NaN without
            such data), and the probe's other scores.
        majority: share of the commonest label in a task's whole test split by task, where it is classification.
        ablations: the same of the ablated students alone, with variants beside the methods of the grid; None where no
            variant is run.
        references: the same of rows beside the students: each a method of the one student REFERENCE, in ``latency`` by
            its own name; None where there are none.
    """

    comparison: Comparison
    scores: pd.DataFrame
    runs: pd.DataFrame
    curves: pd.DataFrame
    latency: pd.DataFrame
    probes: pd.DataFrame = field(default_factory=pd.DataFrame)
    majority: dict[str, float] = field(default_factory=dict)
    ablations: Results | None = None
    references: Results | None = None


@dataclass(frozen=True)
class _Files:
    """The validated files of a comparison: of every model by method, student and seed, and of all models together."""

    models: dict[tuple[str, str, int], RunResult]
    latency: LatencyResult
    splits: TaskSplits


def result_files(comparison: Comparison, layout: Layout) -> dict[Path, tuple[str, str, int]]:
    """The result file of every model -> method, student and seed: the teacher, the grid, ablations, references."""
    students = [*comparison.cells(), *comparison.ablation_cells(), *comparison.reference_cells()]
    files = {layout.result(f"{method}_{student}_{seed}"): (method, student, seed) for method, student, seed in students}
    return {layout.result(TEACHER): (TEACHER, TEACHER, 0)} | files


def load_results(comparison: Comparison, layout: Layout) -> Results:
    """Read the result files of a comparison, ablations included; others in their folder are left alone.

    Args:
        comparison: which models there are, and what of them.
        layout: where the files of the comparison's profile and setting are.

    Raises:
        StudyError: files are missing, or one is cut short, is invalid, of another schema, belongs to
            another profile, setting or run than its place says, lacks a task, a fine-tuning seed or a latency
            measurement, was made with other package versions than the others, or is of another variant than its name.
    """
    files = _read(comparison, layout)
    ablated = beside = None
    if comparison.memberships:
        methods = [*comparison.methods, *comparison.memberships]
        shapes = {name: comparison.students[name] for name in comparison.ablated_students}
        ablated = _results(_part(comparison, methods=methods, students=shapes), files)
    if comparison.references:
        shapes = {REFERENCE: comparison.teacher}  # whatever it is: scores do not ask for it
        methods = [*comparison.references]
        beside = _results(_part(comparison, methods=methods, students=shapes, seeds=[0]), files)
    return _results(comparison, files, ablated, beside)


def _part(comparison: Comparison, **update: Any) -> Comparison:
    return comparison.model_copy(update=update | {"ablated_students": []})


def check_there(paths: Iterable[Path], layout: Layout) -> None:
    """Refuse where result files are missing; some are named."""
    if missing := [path.relative_to(layout.folder).as_posix() for path in paths if not path.is_file()]:
        named = ", ".join(missing[:5]) + (f" and {len(missing) - 5} more" if len(missing) > 5 else "")
        raise StudyError(f"result files are missing (`make repro` makes them): {named}")


def _read(comparison: Comparison, layout: Layout) -> _Files:
    paths = result_files(comparison, layout)
    latency_file, splits_file = layout.results / "latency.json", layout.results / "tasks.json"
    check_there((*paths, latency_file, splits_file), layout)
    where = {"profile": comparison.profile, "setting": comparison.setting}
    models: dict[tuple[str, str, int], RunResult] = {}
    named: dict[str, RunResult] = {}
    for path, (method, student, seed) in paths.items():
        name = short_name(path)
        record = read_record(path, RunResult, **where, method=method, student=student, seed=seed)
        models[method, student, seed] = named[name] = record
        _check_tasks(name, record, models[TEACHER, TEACHER, 0], comparison)
        if method in comparison.memberships:
            _check_variant(name, record, comparison.memberships[method])
    latency = read_record(latency_file, LatencyResult, **where)
    _check_latency(short_name(latency_file), latency, comparison)
    splits = read_record(splits_file, TaskSplits, **where)
    environments: Environments = {f"{short_name(latency_file)}: environment": latency.environment}
    environments[f"{short_name(splits_file)}: environment"] = splits.environment
    for name, record in named.items():
        environments[f"{name}: environment"] = record.environment
        if record.distillation:
            environments[f"{name}: distillation.environment"] = record.distillation.environment
    check_versions(environments)
    check_mixture(named)
    return _Files(models, latency, splits)


def _results(
    comparison: Comparison, files: _Files, ablations: Results | None = None, references: Results | None = None
) -> Results:
    scores, probes, runs, curves = [], [], [], []
    for method, student, seed in [(TEACHER, TEACHER, 0), *comparison.cells()]:
        record = files.models[method, student, seed]
        run = {"setting": comparison.setting, "method": method, "student": student, "distillation_seed": seed}
        scores += _score_rows(run, record, comparison.tasks)
        probes += _probe_rows(run, record, comparison.tasks)
        runs.append({"profile": comparison.profile} | run | _run_columns(comparison, record))
        curves += [run | point.model_dump() for point in (record.distillation.curve if record.distillation else [])]
    latency = files.latency
    shared = latency.model_dump(include={"sequence_length", "precision", "runs", "warmup_runs"})
    shared = {"setting": comparison.setting} | shared
    names = comparison.references if REFERENCE in comparison.students else comparison.students
    models = (TEACHER, *(names or ()))
    shown = [m for m in latency.measurements if m.student in models and m.device == latency.measurements[0].device]
    measurements = sorted(shown, key=lambda m: models.index(m.student))
    return Results(
        comparison=comparison,
        scores=pd.DataFrame(scores),
        runs=pd.DataFrame(runs),
        curves=pd.DataFrame(curves),
        latency=pd.DataFrame([shared | m.model_dump() for m in measurements]),
        probes=pd.DataFrame(probes),
        majority={r.task: r.majority_share for r in files.splits.splits if r.split == "test" and r.majority_share},
        ablations=ablations,
        references=references,
    )


def _run_columns(comparison: Comparison, record: RunResult) -> dict[str, Any]:
    training = record.distillation
    took: dict[str, Any] = {}
    if training:
        took = training.model_dump(exclude={"curve", "training_curve", "options", "revisions", "environment"})
        took = {f"{'training_' * (key == 'threads')}{key}": value for key, value in took.items()}
    membership = comparison.memberships.get(record.method)
    untrained = {"objective": FLOOR} | (membership.changes if membership else {})
    modelling = record.masked_language_modelling
    columns = {"mlm_loss": modelling and modelling.loss, "mlm_accuracy": modelling and modelling.accuracy} | took
    columns |= {"options": training.options if training else untrained, "commit": record.commit}
    columns |= {"evaluation_seconds": record.evaluation_seconds}
    return record.size.model_dump() | columns | record.environment.model_dump()


def _score_rows(run: dict[str, Any], record: RunResult, tasks: list[str]) -> list[dict[str, Any]]:
    rows = []
    for name in tasks:
        if name in record.probes:
            continue
        task = record.tasks[name]
        examples = {task.language: task.test_examples} | task.language_examples
        rows += [
            run
            | {"task": name, "metric": metric, "main": metric == task.metric, "finetuning_seed": finetuning.seed}
            | {"language": language, "learnt": task.language, "test": value, "test_examples": examples[language]}
            | {"development": finetuning.development.get(metric), "development_examples": task.development_examples}
            for finetuning in task.runs
            for language, values in ({task.language: finetuning.test} | finetuning.languages).items()
            for metric, value in values.items()
        ]
    return rows


def _probe_rows(run: dict[str, Any], record: RunResult, tasks: list[str]) -> list[dict[str, Any]]:
    return [
        run
        | {"task": task, "metric": probe.metric, "language": language, "test": values[probe.metric]}
        | {"test_examples": probe.test_examples, "development": probe.development.get(language, np.nan)}
        | {name: value for name, value in values.items() if name != probe.metric}
        for task in tasks
        if (probe := record.probes.get(task))
        for language, values in probe.languages.items()
    ]


def _check_tasks(name: str, record: RunResult, teacher: RunResult, comparison: Comparison) -> None:
    for task in comparison.tasks:
        if task in record.probes and task in teacher.probes:
            part, keys = "probes", ["languages", "metric", "test_examples"]
            if record.method in comparison.methods:  # variants are not chosen among
                keys.append("development")
        elif task in record.tasks and task in teacher.tasks:
            part, keys = "tasks", ["metric", "test_examples", "language_examples"]
            seeds, allowed = [run.seed for run in record.tasks[task].runs], comparison.finetuning_seeds
            if sorted(seeds) != sorted(allowed):
                raise StudyError(f"{name}: tasks.{task}: fine-tuning seeds {seeds}; allowed: {allowed}")
        else:
            there = ", ".join([*record.tasks, *record.probes])
            raise StudyError(f"{name}: tasks: {task!r} is missing; those there: {there}")
        for key in keys:
            value, allowed = (getattr(getattr(model, part)[task], key) for model in (record, teacher))
            if key in ("languages", "development"):
                value, allowed = list(value), list(allowed)
            if value != allowed:
                raise StudyError(f"{name}: {part}.{task}.{key} = {value!r}; allowed: {allowed!r}, as for the teacher")


def _check_variant(name: str, record: RunResult, membership: Membership) -> None:
    training = record.distillation
    if training is None:
        return
    recorded = training.options | {key: getattr(training, key) for key in SHARED}
    for key, allowed in membership.changes.items():
        if key in recorded and recorded[key] != allowed:
            raise StudyError(
                f"{name}: distillation: {key} = {recorded[key]!r}; allowed: {allowed!r}, as the variant"
                f" {membership.variant} says"
            )


def _check_latency(name: str, latency: LatencyResult, comparison: Comparison) -> None:
    measured = {(m.student, m.batch_size, m.threads) for m in latency.measurements}
    missing = [
        f"{model} at batch size {size} with {threads} threads"
        for model in (TEACHER, *comparison.students, *(comparison.references or ()))
        for size in comparison.batch_sizes
        for threads in comparison.threads
        if (model, size, threads) not in measured
    ]
    if missing:
        raise StudyError(f"{name}: measurements: missing {', '.join(missing)}")


def check_versions(environments: Environments) -> None:
    """Refuse what was made with other versions than most: numbers would not differ by the method alone."""
    _check_alike({place: _versions(environment) for place, environment in environments.items() if environment})


def check_mixture(records: dict[str, RunResult]) -> None:
    """Refuse models of other data, another precision or other revisions of behaviour than most, by their file's name.

    Raises:
        StudyError: the first that differs; one line.
    """
    places: dict[str, dict[str, Any]] = {}
    for place, record in records.items():
        data = {part: value for part, value in record.hashes.items() if part in ("corpus", "tasks", "teacher")}
        places[place] = {f"hashes.{part}": value for part, value in sorted(data.items())}
        if training := record.distillation:
            places[place]["distillation.precision"] = training.precision
            places[place] |= {f"distillation.revisions.{k}": v for k, v in training.revisions.items()}
    _check_alike(places)


def _check_alike(places: dict[str, dict[str, Any]]) -> None:
    for fact in dict.fromkeys(fact for facts in places.values() for fact in facts):
        stated = {place: facts[fact] for place, facts in places.items() if fact in facts}
        (usual, count), *others = Counter(stated.values()).most_common()
        if others:
            place = next(place for place, value in stated.items() if value != usual)
            raise StudyError(
                f"{place}.{fact} = {stated[place]}; allowed: {usual}, as in {count} of {len(stated)}"
                " places of the comparison; delete the file and run `dvc repro`"
            )


def _versions(environment: Environment) -> dict[str, str]:
    """Versions that have to agree: Python's without its patch, packages' without the label of their build (+cpu)."""
    stated = {package: getattr(environment, package).partition("+")[0] for package in PACKAGES}
    return stated | {"python": ".".join(environment.python.split(".")[:2])}


def load_tuning(layout: Layout) -> pd.DataFrame:
    """What `make tune` tried in a setting, one row per method, student and learning rate; empty where it never ran.

    Columns: method, student, learning_rate, development (mean over tasks, 0-1), loss (held out, as a share of the loss
    before training); both NaN for a rate that diverged. A profile without files of its own shares the study's.

    Raises:
        StudyError: a file cannot be read or is invalid.
    """
    folder = tuning_folder(layout.folder, find_root(layout.folder)) / layout.setting
    records = [read_record(path, Tuning, setting=layout.setting) for path in sorted(folder.glob("*.json"))]
    rows = [
        (
            record.method,
            record.student,
            own.learning_rate,
            own.development_mean,
            own.held_out_loss,
            own.held_out_loss_before,
        )
        for record in records
        if record.budget == BASE_BUDGET
        for own in record.tried
    ]
    table = pd.DataFrame(rows, columns=["method", "student", "learning_rate", "development", "loss", "before"])
    table = table.astype({"development": float, "loss": float, "before": float})
    return table.assign(loss=table["loss"] / table.pop("before"))


def macro(results: Results) -> pd.DataFrame:
    """Macro averages, one row per run.

    macro = mean over tasks of the main metric's mean over fine-tuning seeds, for ``development`` and ``test`` data; the
    test score of a task with several languages is their mean, the language trained on included; probes do not count.
    ``retrieval_development`` = the mean over languages and tasks of retrieval's development accuracies, NaN without.
    ``retained`` = the row's test macro / the teacher's test macro. The macro averages unlike metrics (accuracy,
    Spearman's rho, macro F1), as GLUE's average does: it ranks models and has no meaning beyond that.
    """
    main = results.scores[results.scores["main"]]
    tasks = main.groupby([*RUN, "finetuning_seed", "task"], sort=False)[["development", "test"]].mean()
    seeds = tasks.groupby([*RUN, "finetuning_seed"], sort=False).mean()
    runs = seeds.groupby(RUN, sort=False).mean()
    ceiling = runs.xs(TEACHER, level="method")["test"].item()
    runs = runs.assign(retained=runs["test"] / ceiling, retrieval_development=np.nan)
    if not results.probes.empty:
        found = results.probes[~results.probes["task"].isin(MASKED_WORDS)]
        runs["retrieval_development"] = found.groupby(RUN)["development"].mean()
    return runs.reset_index()
