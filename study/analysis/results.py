"""The result files of one profile and setting: loading and checking them, and the macro score."""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path

import pandas as pd
from pydantic import BaseModel, ConfigDict, Field, ValidationError, model_validator

from study.config import Layout, Params, StudyError, find_root

TEACHER = "teacher"
FLOOR = "none"
BASELINE = "mlm"
ENGLISH = "en"
CELL = ["setting", "method", "student"]
RUN = [*CELL, "distillation_seed"]


class Record(BaseModel):
    """Part of a result file; fields that the analysis does not read may be there too. Numbers must be finite."""

    model_config = ConfigDict(allow_inf_nan=False, frozen=True)


class FinetuningRun(Record):
    seed: int
    epoch: int
    development: dict[str, float]
    test: dict[str, float]
    languages: dict[str, dict[str, float]] = {}


class TaskResult(Record):
    metric: str
    learning_rate: float
    train_examples: int
    development_examples: int
    test_examples: int
    language_examples: dict[str, int] = {}
    runs: list[FinetuningRun]

    @model_validator(mode="after")
    def _main_metric_is_there(self):
        for run in self.runs:
            if run.languages.keys() != self.language_examples.keys():
                raise ValueError(
                    f"fine-tuning seed {run.seed} is tested in {list(run.languages)};"
                    f" allowed: {list(self.language_examples)}, as in language_examples"
                )
            scores = {"development": run.development, "test": run.test} | run.languages
            for split, values in scores.items():
                if self.metric not in values:
                    raise ValueError(f"{split} scores of fine-tuning seed {run.seed} lack {self.metric!r}")
        return self


class ProbeResult(Record):
    metric: str
    test_examples: int
    languages: dict[str, dict[str, float]] = Field(min_length=1)

    @model_validator(mode="after")
    def _main_metric_is_there(self):
        for language, values in self.languages.items():
            if self.metric not in values:
                raise ValueError(f"scores in {language!r} lack {self.metric!r}")
        return self


class LanguageModelling(Record):
    loss: float
    accuracy: float


class Size(Record):
    parameters: int
    embedding_parameters: int
    encoder_parameters: int
    flops_per_sequence: float
    sequence_length: int


class CurvePoint(Record):
    step: int
    tokens: int
    seconds: float
    loss: float


class Training(Record):
    objective: str
    learning_rate: float
    method: dict[str, str | int | float | None] = {}
    steps: int
    tokens: int
    seconds: float
    tokens_per_second: float
    initialisation: str | None = None
    inputs: str | None = None
    precision: str
    threads: int
    fast_paths: list[str] = []
    curve: list[CurvePoint] = Field(min_length=1)

    @model_validator(mode="after")
    def _curve_begins_before_training(self):
        if self.curve[0].step != 0:
            raise ValueError(f"curve: begins at step {self.curve[0].step}; allowed: 0, the loss before training")
        return self


class Environment(Record):
    python: str
    torch: str
    transformers: str
    datasets: str
    processor: str
    cores: int
    threads: int
    date: str


class ResultFile(Record):
    """What a file of one profile and setting says of itself."""

    profile: str
    setting: str
    environment: Environment


class RunResult(ResultFile):
    method: str
    student: str
    seed: int
    tasks: dict[str, TaskResult]
    probes: dict[str, ProbeResult] = {}
    masked_language_modelling: LanguageModelling | None
    size: Size
    distillation: Training | None
    evaluation_seconds: float
    commit: str | None = None


class Measurement(Record):
    student: str
    batch_size: int
    threads: int
    median_seconds: float = Field(gt=0)
    lower_quartile_seconds: float
    upper_quartile_seconds: float
    sequences_per_second: float
    speed_up: float


class LatencyResult(ResultFile):
    sequence_length: int
    precision: str
    runs: int
    warmup_runs: int
    measurements: list[Measurement]


class TaskSplit(Record):
    task: str
    split: str
    examples: int
    majority_share: float | None


class TaskSplits(Record):
    """Every split in full, before fine-tuning draws its budget from it."""

    profile: str
    setting: str
    splits: list[TaskSplit]


class Candidate(Record):
    learning_rate: float
    diverged: str | None = None
    development_mean: float | None = None
    held_out_loss_before: float | None = None
    held_out_loss: float | None = None


class Tuning(Record):
    """What `make tune` tried on one method and student (:func:`study.training.tune.tune`)."""

    setting: str
    method: str
    student: str
    steps: int
    tried: list[Candidate]


@dataclass(frozen=True)
class Results:
    """Every number of one profile and setting, in the order of the grid, the teacher first.

    Attributes:
        scores: one row per run, task, metric, fine-tuning seed and language of the test data: setting, method, student,
            distillation_seed, task, metric, main (the task's main metric?), finetuning_seed, language, development,
            test, development_examples, test_examples. Development data are in English whatever the language.
        runs: one row per run (teacher included): profile, setting, method, student, distillation_seed, its size, its
            masked-language-modelling loss, what its distillation took, ``options`` (a dict: the method's own
            parameters, as recorded), and the machine and versions it ran on.
        curves: setting, method, student, distillation_seed, step, tokens, seconds, loss: held-out value of the
            method's own loss; losses of different methods are not comparable.
        latency: one row per model (column ``student``, which may be "teacher"), batch size and number of threads.
        probes: one row per run, probe and language, empty where a setting has no probes: setting, method, student,
            distillation_seed, task, metric, language, test (the main metric), test_examples, and the probe's other
            scores.
        majority: share of the commonest label in a task's whole test split by task, where it is classification.
        ablations: the same of ``grid.ablations``, with the methods that they vary; None where none are run.
    """

    scores: pd.DataFrame
    runs: pd.DataFrame
    curves: pd.DataFrame
    latency: pd.DataFrame
    probes: pd.DataFrame = field(default_factory=pd.DataFrame)
    majority: dict[str, float] = field(default_factory=dict)
    ablations: Results | None = None


def load_results(params: Params, setting: str, root: Path | None = None) -> Results:
    """Read the result files that ``params.grid`` asks for, ablations included; others in their folder are left alone.

    Args:
        params: the study's parameters; their profile names the folder.
        setting: one of ``params.settings``.
        root: the study's folder; by default found from the working folder.

    Raises:
        StudyError: files are missing (all are named), or one is cut short, is invalid, belongs to another profile,
            setting or run than its place says, or lacks a task, a fine-tuning seed or a latency measurement.
    """
    root = root or find_root()
    layout = Layout(params, setting, root)
    grid = params.grid
    cells = [(TEACHER, TEACHER, 0)]
    cells += grid.cells(setting)
    files = {layout.result(*cell): cell for cell in cells}
    latency_file, splits_file = layout.results / "latency.json", layout.results / "tasks.json"
    missing = [str(path.relative_to(root)) for path in (*files, latency_file, splits_file) if not path.is_file()]
    if missing:
        raise StudyError(f"{len(missing)} result files are missing (`dvc repro` makes them): {', '.join(missing)}")

    scores, probes, runs, curves = [], [], [], []
    teacher = None
    for path, (method, student, seed) in files.items():
        expected = {"method": method, "student": student, "seed": seed}
        result = read_result(path, RunResult, root, profile=params.profile, setting=setting, **expected)
        teacher = teacher or result
        _check_tasks(path.relative_to(root), result, teacher, params)
        run = {"setting": setting, "method": method, "student": student, "distillation_seed": seed}
        scores += _score_rows(run, result, params.settings[setting].tasks)
        probes += _probe_rows(run, result, params.settings[setting].tasks)
        training = result.distillation.model_dump(exclude={"curve", "method"}) if result.distillation else {}
        training = {f"{'training_' * (key == 'threads')}{key}": value for key, value in training.items()}
        modelling = result.masked_language_modelling
        runs.append(
            {"profile": params.profile}
            | run
            | result.size.model_dump()
            | {"mlm_loss": modelling and modelling.loss, "mlm_accuracy": modelling and modelling.accuracy}
            | training
            | {"options": result.distillation.method if result.distillation else _untrained(params, method)}
            | {"evaluation_seconds": result.evaluation_seconds, "commit": result.commit}
            | result.environment.model_dump()
        )
        curves += [run | point.model_dump() for point in (result.distillation.curve if result.distillation else [])]

    latency = read_result(latency_file, LatencyResult, root, profile=params.profile, setting=setting)
    _check_latency(latency_file.relative_to(root), latency, params)
    splits = read_result(splits_file, TaskSplits, root, profile=params.profile, setting=setting).splits
    common = {"setting": setting} | latency.model_dump(include={"sequence_length", "precision", "runs", "warmup_runs"})
    models = (TEACHER, *grid.students[setting])
    measurements = sorted(
        (m for m in latency.measurements if m.student in models), key=lambda m: models.index(m.student)
    )
    return Results(
        scores=pd.DataFrame(scores),
        runs=pd.DataFrame(runs),
        curves=pd.DataFrame(curves),
        latency=pd.DataFrame([common | m.model_dump() for m in measurements]),
        probes=pd.DataFrame(probes),
        majority={row.task: row.majority_share for row in splits if row.split == "test" and row.majority_share},
        ablations=load_results(ablated, setting, root) if (ablated := params.of_ablations(setting)) else None,
    )


def _untrained(params: Params, method: str) -> dict:
    return params.methods[method].model_dump(exclude_none=True) if method in params.methods else {}


def _score_rows(run: dict, result: RunResult, tasks: list[str]) -> list[dict]:
    rows = []
    for name in tasks:
        if name in result.probes:
            continue
        task = result.tasks[name]
        examples = {ENGLISH: task.test_examples} | task.language_examples
        rows += [
            run
            | {
                "task": name,
                "metric": metric,
                "main": metric == task.metric,
                "finetuning_seed": finetuning.seed,
                "language": language,
                "development": finetuning.development.get(metric),
                "test": value,
                "development_examples": task.development_examples,
                "test_examples": examples[language],
            }
            for finetuning in task.runs
            for language, values in ({ENGLISH: finetuning.test} | finetuning.languages).items()
            for metric, value in values.items()
        ]
    return rows


def _probe_rows(run: dict, result: RunResult, tasks: list[str]) -> list[dict]:
    return [
        run
        | {"task": task, "metric": probe.metric, "language": language, "test": values[probe.metric]}
        | {"test_examples": probe.test_examples}
        | {name: value for name, value in values.items() if name != probe.metric}
        for task in tasks
        if (probe := result.probes.get(task))
        for language, values in probe.languages.items()
    ]


def read_result(path: Path, model: type[BaseModel], root: Path, **expected) -> BaseModel:
    """One validated result file.

    Raises:
        StudyError: it cannot be read, is invalid, or one of the ``expected`` values is another.
    """
    name = path.relative_to(root)
    try:
        result = model.model_validate_json(path.read_bytes())
    except OSError as error:
        raise StudyError(f"{name}: {error.strerror}") from None
    except ValidationError as error:
        first = error.errors(include_url=False)[0]
        key = ".".join(str(part) for part in first["loc"])
        problem = f"{key}: {first['msg'].removeprefix('Value error, ')}" if key else first["msg"]
        raise StudyError(f"{name}: {problem}; delete the file and run `dvc repro`") from None
    for key, value in expected.items():
        found = getattr(result, key)
        if found != value:
            raise StudyError(f"{name}: {key} = {found!r}; at this place allowed: {value!r}")
    return result


def _check_tasks(name: Path, result: RunResult, teacher: RunResult, params: Params) -> None:
    for task in params.settings[result.setting].tasks:
        if task in result.probes and task in teacher.probes:
            found, reference = result.probes[task], teacher.probes[task]
            kind, keys = "probes", ("metric", "test_examples")
            languages = list(found.languages)
            if languages != list(reference.languages):
                raise StudyError(
                    f"{name}: probes.{task}.languages = {languages}; allowed: {list(reference.languages)}, as for the"
                    " teacher"
                )
        elif task in result.tasks and task in teacher.tasks:
            found, reference = result.tasks[task], teacher.tasks[task]
            kind, keys = "tasks", ("metric", "test_examples", "language_examples")
            seeds = [run.seed for run in found.runs]
            if sorted(seeds) != sorted(params.finetuning.seeds):
                raise StudyError(f"{name}: tasks.{task}: fine-tuning seeds {seeds}; allowed: {params.finetuning.seeds}")
        else:
            raise StudyError(f"{name}: tasks: {task!r} is missing; found: {', '.join([*result.tasks, *result.probes])}")
        for key in keys:
            own, ceiling = getattr(found, key), getattr(reference, key)
            if own != ceiling:
                raise StudyError(f"{name}: {kind}.{task}.{key} = {own!r}; allowed: {ceiling!r}, as for the teacher")


def _check_latency(name: Path, latency: LatencyResult, params: Params) -> None:
    found = {(m.student, m.batch_size, m.threads) for m in latency.measurements}
    missing = [
        f"{model} at batch size {size} with {threads} threads"
        for model in (TEACHER, *params.grid.students[latency.setting])
        for size in params.latency.batch_sizes
        for threads in params.latency.threads
        if (model, size, threads) not in found
    ]
    if missing:
        raise StudyError(f"{name}: measurements: missing {', '.join(missing)}")


def load_tuning(setting: str, root: Path | None = None) -> pd.DataFrame:
    """What `make tune` tried in a setting, one row per method, student and learning rate; empty where it never ran.

    Columns: method, student, learning_rate, development (mean over tasks, 0-1), loss (held out, as a share of the loss
    before training); both NaN for a rate that diverged.

    Raises:
        StudyError: a file cannot be read or is invalid.
    """
    root = root or find_root()
    rows = []
    for path in sorted((root / "reports" / "tuning" / setting).glob("*.json")):
        record = read_result(path, Tuning, root, setting=setting)
        for candidate in record.tried:
            row = {"method": record.method, "student": record.student, "learning_rate": candidate.learning_rate}
            row |= {"development": candidate.development_mean, "loss": None}
            if candidate.diverged is None:
                row["loss"] = candidate.held_out_loss / candidate.held_out_loss_before
            rows.append(row)
    columns = ["method", "student", "learning_rate", "development", "loss"]
    return pd.DataFrame(rows, columns=columns).astype({"development": float, "loss": float})


def macro(results: Results, per_seed: bool = False) -> pd.DataFrame:
    """Macro averages, one row per run, or per run and fine-tuning seed if ``per_seed``.

    macro = mean over tasks of the main metric's mean over fine-tuning seeds, for ``development`` and ``test`` data; the
    test score of a task with several languages is their mean, the language trained on included; probes do not count.
    ``retained`` = the row's test macro / the teacher's test macro. The macro averages unlike metrics (accuracy,
    Spearman's rho, macro F1), as GLUE's average does: it ranks models and has no meaning beyond that.
    """
    main = results.scores[results.scores["main"]]
    tasks = main.groupby([*RUN, "finetuning_seed", "task"], sort=False)[["development", "test"]].mean()
    seeds = tasks.groupby([*RUN, "finetuning_seed"], sort=False).mean()
    runs = seeds.groupby(RUN, sort=False).mean()
    table = (seeds if per_seed else runs).reset_index()
    ceiling = runs.xs(TEACHER, level="method")["test"].item()
    return table.assign(retained=table["test"] / ceiling)
