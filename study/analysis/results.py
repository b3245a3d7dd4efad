"""The result files of one profile and setting as tables: loading, checking, aggregating, writing."""

from __future__ import annotations

import os
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
import pandas as pd
from pydantic import BaseModel, ConfigDict, Field, ValidationError, model_validator

from study.config import Layout, Params, StudyError, find_root
from study.files import write_file, write_json

TEACHER = "teacher"
FLOOR = "none"
BASELINE = "mlm"
ENGLISH = "en"
CELL = ["setting", "method", "student"]
RUN = [*CELL, "distillation_seed"]
RESAMPLES = 10_000


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
        ablations: the same of ``grid.ablations``, with the methods that they vary; None where none are run.
    """

    scores: pd.DataFrame
    runs: pd.DataFrame
    curves: pd.DataFrame
    latency: pd.DataFrame
    probes: pd.DataFrame = field(default_factory=pd.DataFrame)
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
    latency_file = layout.results / "latency.json"
    missing = [str(path.relative_to(root)) for path in (*files, latency_file) if not path.is_file()]
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


def read_result(path: Path, model: type[ResultFile], root: Path, **expected) -> ResultFile:
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


def summary(results: Results) -> pd.DataFrame:
    """One row per method and student (the teacher first): macros averaged over distillation seeds, with intervals.

    Columns: setting, method, student, development, test, test_low, test_high, retained, retained_low, retained_high,
    selected. ``selected`` marks each student's best method, the untrained floor apart, by the *development* macro; the
    test data has no say in it.

    Intervals are 95 % percentile bootstrap intervals with fixed random numbers. With several distillation seeds, whole
    runs are resampled, so that the spread between them counts (it contains that of fine-tuning); with one, the
    fine-tuning seeds are resampled within each task. Deviations from the mean are widened by sqrt(n / (n - 1)), without
    which a bootstrap of n = 2 values has half the variance it should have. For ``retained`` the teacher is resampled
    too. With a single value to resample the interval is undefined (NaN).

    Covered: the chance of the resampled seeds. Not covered: distillation seeds where there is one, the choice of the
    test examples (see :func:`sampling_error`), and that ``selected`` is the best of several.

    Source: this study's choice; the widening after Rao & Wu (1988), "Resampling inference with complex survey data".
    """
    rows = []
    means = macro(results).groupby(CELL, sort=False)[["development", "test", "retained"]].mean()
    ceiling = _resampled(results, TEACHER, TEACHER)
    for (setting, method, student), mean in means.iterrows():
        draws = _resampled(results, method, student)
        low, high = _interval(draws)
        retained_low, retained_high = (np.nan, np.nan) if method == TEACHER else _interval(draws / ceiling)
        rows.append(
            {"setting": setting, "method": method, "student": student, "development": mean["development"]}
            | {"test": mean["test"], "test_low": low, "test_high": high}
            | {"retained": mean["retained"], "retained_low": retained_low, "retained_high": retained_high}
        )
    table = pd.DataFrame(rows)
    trained = table[~table["method"].isin([TEACHER, FLOOR])]
    return table.assign(selected=table.index.isin(trained.groupby("student")["development"].idxmax()))


def _resampled(results: Results, method: str, student: str) -> np.ndarray:
    """Test macros of bootstrap resamples, shape (RESAMPLES,); independent of which other methods are in the grid."""
    generator = np.random.default_rng(list(f"{method} {student}".encode()))
    rows = results.scores.query("main and method == @method and student == @student")
    runs = [tasks for _, tasks in rows.groupby("distillation_seed")]
    if len(runs) > 1:
        return _resampled_means([run.groupby("task")["test"].mean().mean() for run in runs], generator)
    seeds = rows.groupby(["task", "finetuning_seed"], sort=False)["test"].mean()  # over languages
    return np.mean([_resampled_means(task, generator) for _, task in seeds.groupby("task")], axis=0)


def _resampled_means(values, generator: np.random.Generator) -> np.ndarray:
    values = np.asarray(values, dtype=float)
    count = len(values)
    if count == 1:
        return np.full(RESAMPLES, np.nan)
    widened = values.mean() + (values - values.mean()) * np.sqrt(count / (count - 1))
    return widened[generator.integers(count, size=(RESAMPLES, count))].mean(axis=1)


def _interval(draws: np.ndarray) -> tuple[float, float]:
    return tuple(np.quantile(draws, [0.025, 0.975]).tolist())


def sampling_error(results: Results) -> pd.DataFrame:
    """Metric, number of test examples (of all languages) and, for accuracy, the teacher's binomial standard error.

    standard_error = sqrt(p (1 - p) / n), p the teacher's accuracy, n the test examples: how far one accuracy may be off
    because these test examples were drawn and not others. A rough yardstick: two models scored on the same examples
    differ by less chance than that.
    """
    rows = results.scores.query("main and method == @TEACHER")
    rows = rows.groupby(["task", "metric", "finetuning_seed"], sort=False, as_index=False).agg(
        test_examples=("test_examples", "sum"), test=("test", "mean")
    )
    table = rows.groupby("task", sort=False).agg(
        metric=("metric", "first"), test_examples=("test_examples", "first"), accuracy=("test", "mean")
    )
    accuracy = table["accuracy"].where(table["metric"] == "accuracy")
    table["standard_error"] = np.sqrt(accuracy * (1 - accuracy) / table["test_examples"])
    return table.drop(columns="accuracy").reset_index()


def per_task(results: Results) -> pd.DataFrame:
    """Test scores of the main metrics, one row per method and student: one column per task, then those of summary."""
    main = results.scores[results.scores["main"]]
    scores = main.groupby([*CELL, "task"], sort=False)["test"].mean().unstack("task")[list(main["task"].unique())]
    return scores.reset_index().merge(summary(results), on=CELL, how="right").rename(columns={"test": "macro"})


def per_language(results: Results) -> pd.DataFrame:
    """Test scores by language of every task and probe that has several, one row per method, student and task.

    Columns: setting, method, student, task, metric, one per language (means over seeds; empty where a task lacks the
    language), then mean (of all languages tested), mean_without_english and gap = English - mean_without_english.
    Probes compare languages with English: they have no score in it, nor a gap. Empty where no task has several
    languages.
    """
    keys = [*CELL, "task", "metric"]
    scores = results.scores[results.scores["main"]]
    scores = scores[scores.groupby("task")["language"].transform("nunique") > 1]
    rows = pd.concat([scores[[*keys, "language", "test"]], results.probes.reindex(columns=[*keys, "language", "test"])])
    if rows.empty:
        return pd.DataFrame(columns=[*keys, "mean", "mean_without_english", "gap"])
    table = rows.groupby([*keys, "language"], sort=False)["test"].mean().unstack("language")
    table = table[sorted(table.columns, key=lambda language: (language != ENGLISH, language))]
    others = table.drop(columns=ENGLISH, errors="ignore").mean(axis=1)
    english = table.get(ENGLISH, pd.Series(np.nan, index=table.index))
    means = {"mean": table.mean(axis=1), "mean_without_english": others, "gap": english - others}
    order = list(dict.fromkeys(map(tuple, rows[keys].itertuples(index=False, name=None))))
    return table.assign(**means).loc[order].rename_axis(columns=None).reset_index()


def costs(results: Results) -> pd.DataFrame:
    """Size and speed, one row per model and number of threads; latency in milliseconds, throughput in sequences/s.

    Every measured batch size has its own columns. ``speed_up``: how many times the teacher's speed, both
    measured in turn in the same run.
    """
    sizes = (
        results.runs.groupby("student", sort=False)[
            ["parameters", "embedding_parameters", "encoder_parameters", "flops_per_sequence", "sequence_length"]
        ]
        .first()
        .astype(object)
    )
    keys = ["setting", "student", "threads"]
    rows = []
    for (setting, student, threads), measured in results.latency.groupby(keys, sort=False):
        row = {"setting": setting, "student": student, "threads": threads} | sizes.loc[student].to_dict()
        for m in measured.sort_values("batch_size").itertuples():
            row |= {
                f"latency_ms_batch_{m.batch_size}": 1000 * m.median_seconds,
                f"latency_ms_lower_quartile_batch_{m.batch_size}": 1000 * m.lower_quartile_seconds,
                f"latency_ms_upper_quartile_batch_{m.batch_size}": 1000 * m.upper_quartile_seconds,
                f"sequences_per_second_batch_{m.batch_size}": m.sequences_per_second,
                f"speed_up_batch_{m.batch_size}": m.speed_up,
            }
        rows.append(row)
    return pd.DataFrame(rows)


def distillation(results: Results) -> pd.DataFrame:
    """What each training run took, one row per run that trained; the teacher's is its adaptation to MLM.

    ``last_interval_percent``: fall of the held-out loss between its last two evaluations, in percent of its whole fall.
    Near 0 the curve has flattened; at N evaluations a straight line would have 100 / N.
    """
    columns = [*RUN, "objective", "learning_rate", "steps", "tokens", "seconds", "tokens_per_second", "initialisation"]
    columns += ["inputs", "precision", "training_threads", "mlm_loss", "mlm_accuracy"]
    falls = results.curves.groupby(RUN, sort=False)["loss"].agg(
        lambda losses: 100 * (losses.iloc[-2:].iloc[0] - losses.iloc[-1]) / (losses.iloc[0] - losses.iloc[-1])
    )
    falls = falls.rename("last_interval_percent").reset_index()
    table = results.runs.reindex(columns=columns).dropna(subset="objective").merge(falls, how="left", on=RUN)
    return table.astype({"steps": int, "tokens": int, "training_threads": int})


def headline(results: Results) -> dict:
    """Each student's best method, chosen on development data and reported on test data, as plain values for JSON.

    Per student: method, development and test macro, retained_percent with its interval, speed_up at the smallest batch
    size and number of threads, and margin_over_none and margin_over_mlm (difference of test macros in points of 0-100,
    with interval), left out where the grid lacks that baseline. Undefined intervals are None. What intervals cover:
    :func:`summary`.
    """
    table = summary(results)
    latency = results.latency.sort_values(["batch_size", "threads"], kind="stable").groupby("student").first()
    teacher = table.query("method == @TEACHER").iloc[0]
    students = {}
    for best in table[table["selected"]].itertuples():
        values = {
            "method": best.method,
            "development": _rounded(best.development, 4),
            "test": _rounded(best.test, 4),
            "retained_percent": _rounded(100 * best.retained, 1),
            "retained_percent_low": _rounded(100 * best.retained_low, 1),
            "retained_percent_high": _rounded(100 * best.retained_high, 1),
            "speed_up": _rounded(latency.loc[best.student, "speed_up"], 2),
            "latency_ms": _rounded(1000 * latency.loc[best.student, "median_seconds"], 2),
        }
        for baseline in (FLOOR, BASELINE):
            reference = table[(table["method"] == baseline) & (table["student"] == best.student)]
            if reference.empty or baseline == best.method:
                continue
            draws = _resampled(results, best.method, best.student) - _resampled(results, baseline, best.student)
            low, high = _interval(draws)
            values |= {
                f"margin_over_{baseline}": _rounded(100 * (best.test - reference["test"].item()), 2),
                f"margin_over_{baseline}_low": _rounded(100 * low, 2),
                f"margin_over_{baseline}_high": _rounded(100 * high, 2),
            }
        students[best.student] = values
    return {
        "profile": results.runs["profile"].iloc[0],
        "setting": teacher["setting"],
        "teacher": {"development": _rounded(teacher["development"], 4), "test": _rounded(teacher["test"], 4)},
        "students": students,
    }


def _rounded(value: float, digits: int) -> float | None:
    return None if np.isnan(value) else round(float(value), digits)


def write_tables(results: Results, folder: str | os.PathLike) -> list[Path]:
    """Write per_task.csv, costs.csv and distillation.csv into ``folder`` and return their paths.

    Also per_language.csv, where a task has several languages.

    Scores are fractions, ``retained_percent`` is in percent of the teacher's test macro.

    Raises:
        StudyError: the folder cannot be written.
    """
    scores = per_task(results)
    for column in ("retained", "retained_low", "retained_high"):
        scores[column.replace("retained", "retained_percent")] = (100 * scores.pop(column)).round(1)
    tables = {
        "per_task": scores.round(4),
        "costs": costs(results).round(3),
        "distillation": distillation(results).round({"mlm_loss": 4, "mlm_accuracy": 4, "last_interval_percent": 2}),
    }
    languages = per_language(results)
    if not languages.empty:
        tables["per_language"] = languages.round(4)
    paths = []
    for name, table in tables.items():
        paths.append(Path(folder) / f"{name}.csv")
        write_file(paths[-1], table.to_csv(index=False, lineterminator="\n"))
    return paths


def write_headline(results: Results, path: str | os.PathLike) -> dict:
    """Write :func:`headline` as a JSON file that `dvc metrics show` reads, and return it."""
    values = headline(results)
    write_json(path, values)
    return values
