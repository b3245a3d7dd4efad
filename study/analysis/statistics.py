"""What seeds can tell: paired differences, interquartile means, probability of improvement, performance profiles.

Scores are arrays of shape (students, tasks, D distillation seeds, F fine-tuning seeds). The two kinds of seed are kept
apart: fine-tunings of one distilled model share what its distillation happened to give, so with several distillation
seeds these are the replicates (each the mean of its fine-tunings, one model for all tasks); with one, the fine-tuning
seeds are, and nothing is known of distillation's own chance. Every distillation seed has fine-tuning draws of its own
(study/evaluation/scores.py), the same for all methods: what a draw does to one method more than to another is in the
spread between distillation seeds. Students and tasks are those of the grid, not drawn at
random: conclusions are about them. No statistic takes the best of several runs.
"""

from __future__ import annotations

import itertools
from dataclasses import dataclass

import numpy as np
import pandas as pd
from scipy import stats
from statsmodels.stats.multitest import multipletests

from study.analysis.results import BASELINE, TEACHER, Results
from study.config import StudyError

LEVEL = 0.95
RESAMPLES = 10_000
PROFILE = (0.80, 0.90, 0.95, 1.00)
BOTH_SEEDS, FINETUNING_SEEDS = "distillation and fine-tuning seeds", "fine-tuning seeds only"


def score_arrays(results: Results) -> dict[str, np.ndarray]:
    """Test scores (main metric, mean over languages) of every method, the teacher first.

    Returns:
        Arrays of shape (students, tasks, distillation seeds, fine-tuning seeds), each axis in the order of the grid;
        the teacher's has one student and one distillation seed. Probes are left out, as in the macro score.

    Raises:
        StudyError: a method lacks a student, task or seed that another has.
    """
    order = ["student", "task", "distillation_seed", "finetuning_seed"]
    main = results.scores[results.scores["main"]]
    scores = main.groupby(["method", *order], sort=False)["test"].mean()
    arrays = {}
    for teacher in (True, False):
        rows = main[(main["method"] == TEACHER) == teacher]
        axes = [rows[name].unique() for name in order]
        every = pd.MultiIndex.from_product(axes, names=order)
        for method in rows["method"].unique():
            own = scores.loc[method].reindex(every)
            if own.isna().any():
                gap = ", ".join(f"{key} {value}" for key, value in zip(order, own.index[own.isna()][0], strict=True))
                raise StudyError(f"{method} has no score of {gap}")
            arrays[method] = own.to_numpy().reshape([len(axis) for axis in axes])
    return arrays


def covered(scores: np.ndarray) -> str:
    """The seeds whose chance an interval of these scores covers."""
    return BOTH_SEEDS if scores.shape[-2] > 1 else FINETUNING_SEEDS


def replicates(scores: np.ndarray) -> np.ndarray:
    """What varies by chance, within strata in which all else is fixed.

    Args:
        scores: scores or differences of scores, (..., students, tasks, D, F).

    Returns:
        Means over students, which share their seeds. With D > 1: macro scores, one stratum, (..., 1, D). With D = 1:
        scores of single fine-tunings, one stratum per task, whose examples are drawn apart, (..., tasks, F).
    """
    if scores.shape[-2] > 1:
        return scores.mean(axis=(-4, -3, -1))[..., None, :]
    return scores[..., 0, :].mean(axis=-3)


@dataclass(frozen=True)
class Estimate:
    """A mean with its standard error and degrees of freedom; arrays of equal shape, or numbers. NaN: undefined."""

    mean: np.ndarray
    standard_error: np.ndarray
    freedom: np.ndarray

    def interval(self, level: float = LEVEL) -> tuple[np.ndarray, np.ndarray]:
        """mean -+ t(freedom, (1 + level) / 2) standard_error, Student's interval."""
        half = stats.t.ppf((1 + level) / 2, self.freedom) * self.standard_error
        return self.mean - half, self.mean + half

    def p_above(self, bound: float) -> np.ndarray:
        """One-sided p-value of the hypothesis that the true mean is at most ``bound``: small if it lies above."""
        with np.errstate(divide="ignore", invalid="ignore"):
            return stats.t.sf((self.mean - bound) / self.standard_error, self.freedom)

    def p_below(self, bound: float) -> np.ndarray:
        """One-sided p-value of the hypothesis that the true mean is at least ``bound``: small if it lies below."""
        with np.errstate(divide="ignore", invalid="ignore"):
            return stats.t.cdf((self.mean - bound) / self.standard_error, self.freedom)


def estimate(values: np.ndarray) -> Estimate:
    """Mean over K strata of n replicates each, with the chance of the replicates.

    mean = (1/K) sum_k mean_k; standard_error = sqrt(sum_k v_k) / K, v_k = s_k^2 / n;
    freedom = (sum_k v_k)^2 / sum_k (v_k^2 / (n - 1)).

    Strata may vary differently; their chance is independent. One replicate has no standard error (NaN).

    Args:
        values: (..., K, n), as from :func:`replicates`.

    Source: Satterthwaite (1946), "An approximate distribution of estimates of variance components"; Welch (1947).
    """
    strata, count = values.shape[-2:]
    mean = values.mean(axis=(-2, -1))
    if count == 1:
        undefined = np.full_like(mean, np.nan)
        return Estimate(mean, undefined, undefined)
    variances = values.var(axis=-1, ddof=1) / count
    total = variances.sum(axis=-1)
    with np.errstate(invalid="ignore"):
        freedom = total**2 / (variances**2 / (count - 1)).sum(axis=-1)
    return Estimate(mean, np.sqrt(total) / strata, np.where(np.isnan(freedom), strata * (count - 1), freedom))


def share_of_teacher(scores: np.ndarray, teacher: np.ndarray) -> Estimate:
    r"""Macro score as a share of the teacher's, r = x / y, with the chance of both.

    .. math:: \operatorname{var} r = \operatorname{var}(x - r y) / y^2

    With one distillation seed, student and teacher share their fine-tuning seeds, and x - r y is taken seed by seed.
    With several, the two are taken as independent: var(x) + r^2 var(y), with Satterthwaite's degrees of freedom.

    Args:
        scores: (..., 1, tasks, D, F) of one student. teacher: (..., 1, tasks, 1, F).

    Source: the delta method; what makes it an interval: :func:`estimate`.
    """
    axes = (-4, -3, -2, -1)
    level = teacher.mean(axis=axes)
    share = scores.mean(axis=axes) / level
    scaled = share[..., None, None, None, None] * teacher
    if scores.shape[-2] == 1:
        found = estimate(replicates(scores - scaled))
        return Estimate(share, found.standard_error / level, found.freedom)
    parts = [estimate(replicates(scores)), estimate(replicates(scaled))]
    total = sum(part.standard_error**2 for part in parts)
    with np.errstate(divide="ignore", invalid="ignore"):
        freedom = total**2 / sum(part.standard_error**4 / part.freedom for part in parts)
    freedom = np.where(np.isnan(freedom), parts[0].freedom, freedom)
    return Estimate(share, np.sqrt(total) / level, freedom)


def holm(p_values) -> np.ndarray:
    """Holm-corrected p-values; NaN (a test that could not be made) stay NaN and are not counted.

    Source: Holm (1979), "A simple sequentially rejective multiple test procedure", as in statsmodels.
    """
    p_values = np.asarray(p_values, dtype=float)
    known, corrected = ~np.isnan(p_values), p_values.copy()
    if known.any():
        corrected[known] = multipletests(p_values[known], method="holm")[1]
    return corrected


def interquartile_mean(
    scores: np.ndarray, generator: np.random.Generator, resamples: int = RESAMPLES
) -> tuple[float, float, float]:
    """Mean of the middle half of all run x task scores, with its stratified 95 % bootstrap interval.

    Resampled are whole distillation seeds, all students and tasks together, where there are several; fine-tuning seeds
    within each task where there is one. Deviations of n replicates from the mean of their K strata are widened by
    sqrt(n / (n - 1)) t / z, with the 97.5 % quantiles of Student's distribution with K (n - 1) degrees of freedom and
    of the normal one: a plain percentile interval of so few seeds is far too narrow.

    Args:
        scores: (students, tasks, D, F).
        generator: of the resampling.
        resamples: how many.

    Returns:
        The interquartile mean and the ends of its interval (NaN with a single replicate).

    Source: Agarwal et al. (2021), "Deep reinforcement learning at the edge of the statistical precipice" (2108.13264);
    the widening: Hesterberg (2015), "What teachers should know about the bootstrap" (1411.5279).
    """
    several = scores.shape[2] > 1
    runs = scores.mean(axis=3) if several else scores[:, :, 0]
    students, tasks, count = runs.shape
    value = float(stats.trim_mean(runs.ravel(), 0.25))
    if count == 1:
        return value, np.nan, np.nan
    strata = (1, 1) if several else (1, tasks)  # students share their seeds
    freedom = np.prod(strata) * (count - 1)
    widening = np.sqrt(count / (count - 1)) * stats.t.ppf(0.975, freedom) / stats.norm.ppf(0.975)
    center = runs.mean(axis=-1, keepdims=True)
    widened = center + widening * (runs - center)
    drawn = generator.integers(count, size=(resamples, *strata, count))
    drawn = np.take_along_axis(widened[None], np.broadcast_to(drawn, (resamples, *runs.shape)), axis=-1)
    low, high = np.quantile(stats.trim_mean(drawn.reshape(resamples, -1), 0.25, axis=1), [0.025, 0.975])
    return value, float(low), float(high)


def probability_of_improvement(first: np.ndarray, second: np.ndarray) -> float:
    """P(a run of ``first`` scores higher than one of ``second``), mean over students and tasks; ties count half.

    Runs: distillation seeds (means over fine-tunings), or fine-tuning seeds where there is one. Every run is compared
    with every run, so 0.5 means no difference; the size of differences does not count.

    Args:
        first, second: (students, tasks, D, F).

    Source: Agarwal et al. (2021), 2108.13264, after Mann & Whitney (1947).
    """
    pair = [scores.mean(axis=3) if scores.shape[2] > 1 else scores[:, :, 0] for scores in (first, second)]
    difference = pair[0][..., :, None] - pair[1][..., None, :]
    return float(((difference > 0) + 0.5 * (difference == 0)).mean())


def performance_profile(scores: np.ndarray, thresholds=PROFILE) -> np.ndarray:
    """Share of fine-tuned models (all students, tasks and seeds) that score above each threshold, one value each.

    Source: Dolan & Moré (2002); as distributions of runs in Agarwal et al. (2021), 2108.13264.
    """
    return np.array([(scores > threshold).mean() for threshold in thresholds])


def aggregates(results: Results) -> pd.DataFrame:
    """Every method over all students and tasks, in percent of the teacher's score of the task, one row per method.

    Columns: setting, method, runs (distilled models), covers (the seeds behind the interval), iqm, iqm_low, iqm_high
    (:func:`interquartile_mean`), improvement_over_mlm (:func:`probability_of_improvement`; NaN without ``mlm``), and
    above_80 ... above_100: percent of fine-tuned models above that share of the teacher (:func:`performance_profile`).

    Raises:
        StudyError: scores are incomplete (:func:`score_arrays`).
    """
    arrays = score_arrays(results)
    teacher = arrays.pop(TEACHER).mean(axis=(0, 2, 3))[:, None, None]
    rows = []
    for method, scores in arrays.items():
        generator = np.random.default_rng(list(method.encode()))
        value, low, high = interquartile_mean(100 * scores / teacher, generator)
        compared = method != BASELINE and BASELINE in arrays
        over = probability_of_improvement(scores, arrays[BASELINE]) if compared else np.nan
        profile = 100 * performance_profile(scores / teacher)
        rows.append(
            {"setting": results.runs["setting"].iloc[0], "method": method, "runs": scores.shape[0] * scores.shape[2]}
            | {"covers": covered(scores), "iqm": value, "iqm_low": low, "iqm_high": high, "improvement_over_mlm": over}
            | {f"above_{100 * threshold:.0f}": share for threshold, share in zip(PROFILE, profile, strict=True)}
        )
    return pd.DataFrame(rows)


def differences(results: Results) -> pd.DataFrame:
    """Paired differences of macro test scores between all pairs of methods, in points of 0-100, one row per pair.

    Columns: setting, first, second, effect = first - second (mean over student x task x seeds, paired by all of them),
    low, high (95 %, :func:`estimate`), covers, p (two-sided, of no difference), p_holm (corrected over all pairs of the
    setting: the family, this study's choice), probability_of_improvement.

    With one distillation seed p is about fine-tuning alone: it does not tell methods apart.

    Raises:
        StudyError: scores are incomplete (:func:`score_arrays`).
    """
    arrays = score_arrays(results)
    del arrays[TEACHER]
    rows = []
    for first, second in itertools.combinations(arrays, 2):
        found = estimate(replicates(100 * (arrays[first] - arrays[second])))
        low, high = found.interval()
        rows.append(
            {"setting": results.runs["setting"].iloc[0], "first": first, "second": second}
            | {"effect": float(found.mean), "low": float(low), "high": float(high), "covers": covered(arrays[first])}
            | {"p": float(2 * np.minimum(found.p_above(0), found.p_below(0)))}
            | {"probability_of_improvement": probability_of_improvement(arrays[first], arrays[second])}
        )
    columns = ["setting", "first", "second", "effect", "low", "high", "covers", "p"]
    table = pd.DataFrame(rows, columns=[*columns, "probability_of_improvement"])
    table.insert(len(columns), "p_holm", holm(table["p"]))
    return table
