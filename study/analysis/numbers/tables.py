"""The tables that figures and pages are made of: scores with intervals, languages, costs, what training took."""

from __future__ import annotations

import itertools
import os
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import pandas as pd
import xarray as xr

from study.analysis.numbers.results import BASELINE, FLOOR, MODEL, RUN, Results
from study.analysis.numbers.selection import RETRIEVAL, in_use, trained
from study.analysis.numbers.statistics import (
    PROFILE,
    by_method,
    covered,
    estimate,
    holm,
    interquartile_mean,
    models,
    of_method,
    performance_profile,
    pool,
    probability_of_improvement,
    replicates,
    share_of_teacher,
    two_sided,
)
from study.analysis.numbers.text import number
from study.descriptions import TEACHER, Comparison
from study.files import write_file, write_json

if TYPE_CHECKING:
    from study.analysis.numbers.analysis import Analysis

#: What stands for a student where it is the mean over all of them.
MEAN = "mean"
#: What the names of a value and of its bounds end in.
ENDS = ("", "_low", "_high")


def summary(macro: pd.DataFrame, scores: xr.DataArray, teacher: xr.DataArray) -> pd.DataFrame:
    """One row per method and student (the teacher first): macros averaged over distillation seeds, with intervals.

    Columns: setting, method, student, development, retrieval_development (where it was measured), test,
    test_low, test_high, retained, retained_low, retained_high, selected. ``selected`` marks each student's best method,
    the untrained floor apart, by the rule of :func:`selection.in_use`; the test data has no say in it.

    Intervals are Student's, 95 %: of ``test`` :func:`statistics.estimate`, of ``retained``
    :func:`statistics.share_of_teacher`, in which the teacher's chance counts, too. With a single value per method,
    student and task they are undefined (NaN).

    Covered: the chance of the seeds, of distillation where there are several (see :func:`statistics.covered`). Not
    covered: the choice of the test examples (see :func:`sampling_error`), and that ``selected`` is the best of several.

    Args:
        macro: :func:`results.macro`. scores: :func:`statistics.score_array`. teacher: :func:`statistics.teacher_array`.
    """
    measured = ["development", *(name for name in [RETRIEVAL] if name in macro and macro[name].notna().any())]
    table = macro.groupby(MODEL, sort=False, as_index=False)[[*measured, "test", "retained"]].mean()
    ends, undefined = [], (np.array(np.nan), np.array(np.nan))
    for model in table.itertuples():
        if model.method == TEACHER:
            of_model, kept = teacher.expand_dims(student=[TEACHER], distillation_seed=[0]), undefined
        else:
            of_model = of_method(scores, model.method, model.student)
            kept = share_of_teacher(of_model, teacher).interval()
        ends.append([float(end) for end in (*estimate(replicates(of_model)).interval(), *kept)])
    table[["test_low", "test_high", "retained_low", "retained_high"]] = ends
    table = table[[*MODEL, *measured, *(f"test{end}" for end in ENDS), *(f"retained{end}" for end in ENDS)]]
    best = trained(table).groupby("student")[in_use(table)].idxmax()
    return table.assign(selected=table.index.isin(best))


def sampling_error(results: Results) -> pd.DataFrame:
    """Metric, number of test examples and, for accuracy, standard error and ``majority_share`` of every task.

    Examples are those of all languages; ``majority_share`` is the accuracy of always giving the commonest label of the
    whole test split (in English); the standard error is the teacher's, binomial.

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
    table["majority_share"] = table.index.map(results.majority).where(table["metric"] == "accuracy")
    return table.drop(columns="accuracy").reset_index()


def per_task(results: Results, summary: pd.DataFrame) -> pd.DataFrame:
    """Test scores of the main metrics, one row per method and student.

    Columns: one per task, one more <task>_sd, then those of ``summary``, the table of :func:`summary`.

    sd: standard deviation between distilled models (each the mean of its fine-tunings) where there are several, else
    between fine-tunings of the one; NaN of a single value.
    """
    main, keys = results.scores[results.scores["main"]], [*MODEL, "task"]
    tasks = list(main["task"].unique())
    single = main.groupby([*keys, "distillation_seed", "finetuning_seed"], sort=False)["test"].mean()  # over languages
    models = single.groupby([*keys, "distillation_seed"], sort=False).mean()
    several = models.groupby(keys, sort=False).size() > 1
    spread = models.groupby(keys, sort=False).std().where(several, single.groupby(keys, sort=False).std())
    table = models.groupby(keys, sort=False).mean().unstack("task")[tasks]
    table = table.join(spread.unstack("task")[tasks].add_suffix("_sd"))
    return table.reset_index().merge(summary, on=MODEL, how="right").rename(columns={"test": "macro"})


def per_language(results: Results) -> pd.DataFrame:
    """Test scores by language of every task and probe that has several, one row per method, student and task.

    Columns: setting, method, student, task, metric, one per language (means over seeds; empty where a task lacks the
    language), then mean (of all languages tested), mean_without_english and gap = English - mean_without_english; of
    a task that is learnt in another language, that one stands for English, and the column is mean_of_others.
    Probes compare languages with the first: they have no score in it, nor a gap. Empty where no task has several
    languages.
    """
    keys = [*MODEL, "task", "metric"]
    scores = results.scores[results.scores["main"]]
    scores = scores[scores.groupby("task")["language"].transform("nunique") > 1]
    rows = pd.concat([scores[[*keys, "language", "test"]], results.probes.reindex(columns=[*keys, "language", "test"])])
    if rows.empty:
        return pd.DataFrame(columns=[*keys, "mean", "mean_without_english", "gap"])
    table = rows.groupby([*keys, "language"], sort=False)["test"].mean().unstack("language")
    learnt = scores.groupby("task")["learnt"].first()
    first = table.index.get_level_values("task").map(lambda task: learnt.get(task, "en"))
    table = table[sorted(table.columns, key=lambda language: (language not in set(first), language))]
    own = np.equal.outer(first.to_numpy(), table.columns.to_numpy())  # (rows, languages)
    others, english = table.mask(own).mean(axis=1), table.where(own).mean(axis=1)
    name = "mean_without_english" if set(learnt) <= {"en"} else "mean_of_others"
    means = {"mean": table.mean(axis=1), name: others, "gap": english - others}
    order = list(dict.fromkeys(map(tuple, rows[keys].itertuples(index=False, name=None))))
    return table.assign(**means).loc[order].rename_axis(columns=None).reset_index()


def timed(results: Results) -> pd.DataFrame:
    """The latency of every model (index ``student``) at the smallest batch size and number of threads."""
    return results.latency.sort_values(["batch_size", "threads"], kind="stable").groupby("student").first()


def costs(results: Results) -> pd.DataFrame:
    """Size and speed, one row per model and number of threads; latency in milliseconds, throughput in sequences/s.

    Every measured batch size has its own columns. ``speed_up``: how many times the teacher's speed, both
    measured in turn in the same run.
    """
    keys = ["setting", "student", "threads"]
    sizes = ["parameters", "embedding_parameters", "encoder_parameters", "flops_per_sequence", "sequence_length"]
    known = results.runs.groupby("student", sort=False)[sizes].first()
    ends = {f"{name}_seconds": f"latency_ms_{name}" for name in ("lower_quartile", "upper_quartile")}
    measured = results.latency.rename(columns={"median_seconds": "latency_ms"} | ends)
    times = ["latency_ms", *ends.values()]
    measured[times] *= 1000
    wide = measured.pivot(index=keys, columns="batch_size", values=[*times, "sequences_per_second", "speed_up"])
    wide = wide.sort_index(axis=1, level="batch_size", sort_remaining=False, kind="stable")
    wide.columns = [f"{name}_batch_{size}" for name, size in wide.columns]
    order = measured[keys].drop_duplicates()
    return order.join(known, on="student").join(wide, on=keys).reset_index(drop=True)


def distillation(results: Results) -> pd.DataFrame:
    """What each training run took, one row per run that trained; the teacher's is its adaptation to MLM.

    ``last_interval_percent``: fall of the held-out loss between its last two evaluations, in percent of its whole fall.
    Near 0 the curve has flattened; at N evaluations a straight line would have 100 / N. NaN where the loss ends as it
    began, as that of a head that was measured once.
    """
    columns = [*RUN, "objective", "learning_rate", "steps", "tokens", "seconds", "tokens_per_second", "initialisation"]
    columns += ["inputs", "precision", "training_threads", "mlm_loss", "mlm_accuracy"]
    losses = results.curves.groupby(RUN, sort=False)["loss"]
    last = losses.agg(lambda curve: curve.iloc[-2:].iloc[0] - curve.iloc[-1])
    whole = losses.agg(lambda curve: curve.iloc[0] - curve.iloc[-1])
    falls = (100 * last / whole.where(whole != 0)).rename("last_interval_percent").reset_index()
    table = results.runs.reindex(columns=columns).dropna(subset="objective").merge(falls, how="left", on=RUN)
    return table.astype({"steps": int, "tokens": int, "training_threads": int})


def aggregates(scores: xr.DataArray, teacher: xr.DataArray) -> pd.DataFrame:
    """Every method over all students and tasks, in percent of the teacher's score of the task, one row per method.

    Columns: method, runs (distilled models), covers (the seeds behind the interval), iqm, iqm_low, iqm_high
    (:func:`statistics.interquartile_mean`), improvement_over_mlm (:func:`statistics.probability_of_improvement`; NaN
    without ``mlm``), and above_80 ... above_100: percent of fine-tuned models above that share of the teacher
    (:func:`statistics.performance_profile`).

    Args:
        scores: (method, *AXES). teacher: (task, finetuning_seed).
    """
    ceiling, rows = teacher.mean("finetuning_seed", skipna=False), []
    methods = scores["method"].to_numpy().tolist()
    for method in methods:
        runs = of_method(scores, method)
        with xr.set_options(arithmetic_join="exact"):
            shares = runs / ceiling
            value, low, high = interquartile_mean(100 * runs / ceiling, np.random.default_rng(list(method.encode())))
        compared = method != BASELINE and BASELINE in methods
        over = probability_of_improvement(runs, of_method(scores, BASELINE)) if compared else np.nan
        profile = 100 * performance_profile(shares)
        rows.append(
            {"method": method, "runs": models(runs), "covers": covered(runs)}
            | {"iqm": value, "iqm_low": low, "iqm_high": high, "improvement_over_mlm": over}
            | {f"above_{100 * threshold:.0f}": share for threshold, share in zip(PROFILE, profile, strict=True)}
        )
    return pd.DataFrame(rows)


def differences(scores: xr.DataArray) -> pd.DataFrame:
    """Paired differences of macro test scores between all pairs of methods, in points of 0-100, one row per pair.

    Pairs of each student and, of several, of their mean (``student`` is :data:`MEAN`).

    Columns: student, first, second, effect = first - second (mean over student x task x seeds, paired by all of them),
    low, high (95 %, :class:`statistics.Pooled`), covers, p (two-sided, of no difference), p_holm (corrected over all
    pairs of the student: the family, this study's choice), probability_of_improvement.

    With one distillation seed p is about fine-tuning alone: it does not tell methods apart.

    Args:
        scores: (method, *AXES).
    """
    students = scores["student"].to_numpy().tolist()
    parts = {student: scores.sel(student=[student]) for student in students}
    parts |= {MEAN: scores} if len(students) > 1 else {}
    tables = []
    for student, own in parts.items():
        tables.append(_pairs(own))
        tables[-1].insert(0, "student", student)
    return pd.concat(tables, ignore_index=True)


def _pairs(scores: xr.DataArray) -> pd.DataFrame:
    rows, methods = [], by_method(scores)
    pooled = pool(methods)
    for first, second in itertools.combinations(methods, 2):
        effect = pooled.effect([first], [second])
        rows.append(
            {"first": first, "second": second}
            | effect.named("effect")
            | {"covers": covered(methods[first]), "p": two_sided(effect)}
            | {"probability_of_improvement": probability_of_improvement(methods[first], methods[second])}
        )
    columns = ["first", "second", "effect", "low", "high", "covers", "p"]
    table = pd.DataFrame(rows, columns=[*columns, "probability_of_improvement"])
    table.insert(len(columns), "p_holm", holm(table["p"]))
    return table


def headline(
    comparison: Comparison, summary: pd.DataFrame, scores: xr.DataArray, latency: pd.DataFrame | None = None
) -> dict[str, Any]:
    """Each student's best method, chosen on development data and reported on test data, as plain values for JSON.

    ``rule``: the one of :func:`selection.in_use`. Per student: method, development and test macro, retained_percent
    with its interval, latency_ms and speed_up at the smallest batch size and number of threads, left out where nothing
    is timed, and margin_over_none and margin_over_mlm (difference of test macros in points of 0-100, with interval,
    paired by task and seeds), left out where the grid lacks that baseline. Undefined intervals are None.
    What intervals cover: :func:`summary`.

    Args:
        summary: the table of :func:`summary`. scores: :func:`statistics.score_array`. latency: :func:`timed`.
    """
    teacher = summary[summary["method"] == TEACHER].iloc[0]
    students = {}
    for best in summary[summary["selected"]].itertuples():
        values = {"method": best.method}
        values |= {name: _rounded(getattr(best, name), 4) for name in ("development", "test")}
        values |= {f"retained_percent{end}": _rounded(100 * getattr(best, f"retained{end}"), 1) for end in ENDS}
        if latency is not None:
            values["speed_up"] = _rounded(latency.loc[best.student, "speed_up"], 2)
            values["latency_ms"] = _rounded(1000 * latency.loc[best.student, "median_seconds"], 2)
        for baseline in (FLOOR, BASELINE):
            if baseline in scores["method"] and baseline != best.method:
                values |= _margin(best.method, baseline, best.student, scores)
        students[best.student] = values
    return {
        "profile": comparison.profile,
        "setting": comparison.setting,
        "rule": in_use(summary),
        "teacher": {"development": _rounded(teacher["development"], 4), "test": _rounded(teacher["test"], 4)},
        "students": students,
    }


def _margin(best: str, baseline: str, student: str, scores: xr.DataArray) -> dict[str, float | None]:
    gap = pool(by_method(scores, student)).effect([best], [baseline]).named("gap").values()
    return {f"margin_over_{baseline}{end}": _rounded(value, 2) for end, value in zip(ENDS, gap, strict=True)}


def sentences(analysis: Analysis, named: Callable[[str], str] = str) -> str:
    """What the comparison shows: made from the numbers, so that other results say other things.

    Args:
        named: what methods are called.
    """
    lines = []
    chosen_among = trained(analysis.summary)
    for student, best in analysis.headline["students"].items():
        kept = 100 * chosen_among.loc[chosen_among["student"] == student, "retained"]
        line = (
            f"* {student}: {named(best['method'])}, chosen on development data, keeps {best['retained_percent']} % of"
            f" the teacher's score; methods lie between {kept.min():.1f} and {kept.max():.1f} %."
        )
        for baseline, words in ((FLOOR, "no training, the floor"), (BASELINE, "training without a teacher")):
            if f"margin_over_{baseline}" in best:
                low = best[f"margin_over_{baseline}_low"]
                shown = "above zero" if low is not None and low > 0 else "not above zero"
                margin = number(best[f"margin_over_{baseline}"], 1, "+")
                line += f" Over {words}: {margin} points, its 95 % interval {shown}."
        lines.append(line)
    falls = analysis.distillation.loc[analysis.distillation["method"] != TEACHER, "last_interval_percent"]
    if len(falls):
        lines.append(
            f"* In the last interval between two evaluations, held-out losses fell by {number(falls.median(), 1)} % of"
            f" their whole fall (median of {len(falls)} runs; {number(falls.min(), 1)} to {number(falls.max(), 1)}):"
            " 0 would be flat."
        )
    return "\n".join(["**Found.**", "", *lines])


def _rounded(value: float, digits: int) -> float | None:
    return None if np.isnan(value) else round(float(value), digits)


def comparison_tables(analysis: Analysis) -> dict[str, pd.DataFrame]:
    """The tables of the comparison by name, rounded as they are written; per_language where a task has several.

    Scores are fractions, ``retained_percent`` is in percent of the teacher's test macro, effects are in points.
    """
    scores = analysis.per_task.copy()
    for column in ("retained", "retained_low", "retained_high"):
        scores[column.replace("retained", "retained_percent")] = (100 * scores.pop(column)).round(1)
    digits = {
        "costs": 3,
        "distillation": {"mlm_loss": 4, "mlm_accuracy": 4, "last_interval_percent": 2},
        "selection": {"retained": 1, "floor": 1, "regret": 1, "rank_correlation": 2},
    }
    digits |= {} if analysis.per_language.empty else {"per_language": 4}
    digits |= dict.fromkeys(("verdicts", "contrasts", "differences", "aggregates", "recommendation"), 4)
    return {"per_task": scores.round(4)} | {name: getattr(analysis, name).round(d) for name, d in digits.items()}


def write_comparison(analysis: Analysis, folder: str | os.PathLike[str]) -> list[Path]:
    """Write every one of :func:`comparison_tables` as <name>.csv, and headline.json (for `dvc metrics show`).

    Returns:
        The paths, headline.json last.

    Raises:
        StudyError: scores are incomplete, or the folder cannot be written.
    """
    paths = write_tables(folder, comparison_tables(analysis))
    paths.append(Path(folder) / "headline.json")
    write_json(paths[-1], analysis.headline)
    return paths


def write_tables(folder: str | os.PathLike[str], tables: Mapping[str, pd.DataFrame]) -> list[Path]:
    """Write every table as <name>.csv into ``folder``, and return their paths.

    Raises:
        StudyError: the folder cannot be written.
    """
    paths = {name: Path(folder) / f"{name}.csv" for name in tables}
    for name, path in paths.items():
        write_file(path, tables[name].to_csv(index=False, lineterminator="\n"))
    return [*paths.values()]
