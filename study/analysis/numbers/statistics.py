"""What seeds can tell: paired differences, interquartile means, probability of improvement, performance profiles.

Scores are xarray.DataArrays with the dimensions method, student, task, distillation_seed (D values) and finetuning_seed
(F values); a function says which of them it needs. Differences are paired by all of them, and refused where the
coordinates of the two sides are not the same. The two kinds of seed are kept apart: fine-tunings of one distilled model
share what its distillation happened to give, so with several distillation seeds these are the replicates (each the mean
of its fine-tunings, one model for all tasks); with one, the fine-tuning seeds are, and nothing is known of
distillation's own chance. Every distillation seed has fine-tuning draws of its own (study/evaluation/scores.py), the
same for all methods: what a draw does to one method more than to another is in the spread between distillation seeds.
Students and tasks are those of the grid, not drawn at random: conclusions are about them. No statistic takes the best
of several runs.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass

import numpy as np
import pandas as pd
import xarray as xr
from scipy import stats
from statsmodels.stats.multitest import multipletests

from study.analysis.numbers.results import FLOOR, Results
from study.descriptions import TEACHER
from study.files import StudyError

LEVEL = 0.95
#: Two methods are told apart where the Holm-corrected p-value of their difference is at most this, over several
#: distillation seeds.
TOLD_APART = 0.05
RESAMPLES = 10_000
PROFILE = (0.80, 0.90, 0.95, 1.00)
FINETUNING_SEEDS = "fine-tuning seeds only"
DISTILLATION_SEEDS = ("distillation and fine-tuning seeds", "distillation seeds, one fine-tuning of each")
#: Dimensions of one method's scores.
AXES = ("student", "task", "distillation_seed", "finetuning_seed")


def score_array(results: Results) -> xr.DataArray:
    """Test scores (main metric, mean over languages) of every method: (method, *AXES), in the order of the grid.

    The teacher (:func:`teacher_array`) and probes are left out, as in the macro score.

    Raises:
        StudyError: a method lacks a student, task or seed that another has.
    """
    return _array(results, ("method", *AXES), results.scores["method"] != TEACHER)


def teacher_array(results: Results) -> xr.DataArray:
    """The teacher's test scores, as :func:`score_array`: (task, finetuning_seed).

    Raises:
        StudyError: it lacks a task or seed.
    """
    return _array(results, ("task", "finetuning_seed"), results.scores["method"] == TEACHER)


def _array(results: Results, dims: tuple[str, ...], chosen: pd.Series) -> xr.DataArray:
    rows = results.scores[results.scores["main"] & chosen]
    return complete_array(rows.groupby(list(dims), sort=False)["test"].mean(), TEACHER)


def complete_array(scores: pd.Series, model: str) -> xr.DataArray:
    """Scores as an array with an axis for each level of their index, in the order in which its values come.

    Raises:
        StudyError: one is missing; ``model``: whose they are, where no level is ``method``.
    """
    dims = [str(name) for name in scores.index.names]
    axes = {name: scores.index.get_level_values(name).unique() for name in dims}
    complete = scores.reindex(pd.MultiIndex.from_product(axes.values(), names=dims))
    if complete.isna().any():
        gap = dict(zip(dims, complete.index[complete.isna()][0], strict=True))
        model = gap.pop("method", model)
        raise StudyError(f"{model} has no score of {', '.join(f'{key} {value}' for key, value in gap.items())}")
    return xr.DataArray(complete.to_numpy().reshape([len(axis) for axis in axes.values()]), axes, dims)


def of_method(scores: xr.DataArray, method: str, student: str | None = None) -> xr.DataArray:
    """One method's scores, AXES; of one student alone if it is named (``sel(method=...)`` means another thing)."""
    chosen = {"method": method} | ({"student": [student]} if student else {})
    return scores.sel(chosen)


def difference(first: xr.DataArray, second: xr.DataArray) -> xr.DataArray:
    """The difference first - second, paired by every dimension.

    Raises:
        ValueError: the two have other dimensions or other coordinates: they were not run on the same things.
    """
    if set(first.dims) != set(second.dims):
        raise ValueError(f"scores by {first.dims} and by {second.dims} cannot be paired")
    with xr.set_options(arithmetic_join="exact"):
        return first - second


def covered(scores: xr.DataArray) -> str:
    """The seeds whose chance an interval of these scores covers: FINETUNING_SEEDS or one of DISTILLATION_SEEDS."""
    if scores.sizes["distillation_seed"] == 1:
        return FINETUNING_SEEDS
    several, one = DISTILLATION_SEEDS
    return several if scores.sizes["finetuning_seed"] > 1 else one


def models(scores: xr.DataArray) -> int:
    """The number of distilled models behind the scores of a method."""
    return scores.sizes["student"] * scores.sizes["distillation_seed"]


def replicates(scores: xr.DataArray) -> np.ndarray:
    """What varies by chance, within strata in which all else is fixed.

    Args:
        scores: scores or differences of scores: AXES, and any others, which come first.

    Returns:
        Means over students, which share their seeds. With D > 1: macro scores, one stratum, (..., 1, D). With D = 1:
        scores of single fine-tunings, one stratum per task, whose examples are drawn apart, (..., tasks, F).
    """
    if scores.sizes["distillation_seed"] > 1:
        means = scores.mean(["student", "task", "finetuning_seed"], skipna=False)
        return means.transpose(..., "distillation_seed").to_numpy()[..., None, :]
    means = scores.isel(distillation_seed=0).mean("student", skipna=False)
    return means.transpose(..., "task", "finetuning_seed").to_numpy()


@dataclass(frozen=True)
class Estimate:
    """A mean with its standard error and degrees of freedom; arrays of equal shape, or numbers. NaN: undefined."""

    mean: np.ndarray
    standard_error: np.ndarray
    freedom: np.ndarray

    def interval(self) -> tuple[np.ndarray, np.ndarray]:
        """Bounds mean -+ t(freedom, (1 + LEVEL) / 2) standard_error, Student's interval."""
        half = stats.t.ppf((1 + LEVEL) / 2, self.freedom) * self.standard_error
        return self.mean - half, self.mean + half

    def named(self, name: str) -> dict[str, float]:
        """The mean by a name of its own, and low and high, the bounds of its interval, as plain numbers."""
        low, high = self.interval()
        return {name: float(self.mean), "low": float(low), "high": float(high)}

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


@dataclass(frozen=True)
class Pooled:
    """Scores of methods with the chance of a distillation seed, as far as the methods share it.

    With y the macro scores of M methods on D seeds, r = y - row means - column means + mean the residuals:

    s^2 = sum r^2 / ((M - 1)(D - 1)); a contrast sum_m c_m mean_m, sum_m c_m = 0, has the standard error
    s sqrt(sum_m c_m^2 / D) with (M - 1)(D - 1) degrees of freedom.

    Methods are pooled as long as Cochran's test (5 %) does not find the largest of their variances, sum_d r^2, too
    large a part of the sum; else that method is kept apart, and so on. Contrasts with a method that is not pooled have
    their own variance, and so have all contrasts where one distillation seed is all there is.

    Attributes:
        scores: method -> AXES, pooled or not.
        variance: s^2, in points (0-100) squared. freedom: its degrees of freedom, 0: nothing is pooled.
        methods: those that share it. apart: those whose chance was tested and is not that of the others.
    """

    scores: Mapping[str, xr.DataArray]
    variance: float
    freedom: int
    methods: tuple[str, ...]
    apart: tuple[str, ...]

    def effect(self, first: Sequence[str], second: Sequence[str]) -> Estimate:
        """Mean over ``first`` less that over ``second``, in points (0-100), paired by student, task and seeds."""
        sides = [_mean([self.scores[method] for method in side]) for side in (first, second)]
        own = estimate(replicates(100 * difference(*sides)))
        if not self.freedom or not {*first, *second} <= {*self.methods}:
            return own
        weights = dict.fromkeys([*first, *second], 0.0)
        for methods, sign in ((first, 1.0), (second, -1.0)):
            for method in methods:
                weights[method] += sign / len(methods)
        seeds = sides[0].sizes["distillation_seed"]
        error = np.sqrt(self.variance * sum(c**2 for c in weights.values()) / seeds)
        return Estimate(own.mean, np.asarray(error), np.asarray(float(self.freedom)))


def _mean(scores: list[xr.DataArray]) -> xr.DataArray:
    return xr.concat(scores, "method", join="exact", coords="minimal").mean("method", skipna=False)


def by_method(scores: xr.DataArray, student: str | None = None) -> dict[str, xr.DataArray]:
    """Method -> AXES, of one student alone if it is named."""
    return {method: of_method(scores, method, student) for method in scores["method"].to_numpy().tolist()}


def pool(scores: Mapping[str, xr.DataArray], untrained: Collection[str] = (FLOOR,)) -> Pooled:
    """What chance methods share.

    Args:
        scores: method -> AXES; those pooled are of the same students, tasks and seeds.
        untrained: methods that train nothing, whose chance is fine-tuning's alone: never pooled.

    Source: two-way analysis of variance without replication; Cochran (1941), "The distribution of the largest of a set
    of estimated variances as a fraction of their total". With three seeds, tests on absolute deviations (Brown and
    Forsythe) next to never find a spread too large.
    """
    values = {
        method: 100 * own.mean(["student", "task", "finetuning_seed"], skipna=False).to_numpy()
        for method, own in scores.items()
        if method not in untrained
    }
    apart: list[str] = []
    while True:
        kept = tuple(method for method in values if method not in apart)
        table = np.array([values[method] for method in kept])
        if len(kept) < 2 or table.shape[1] < 2:
            return Pooled(scores, np.nan, 0, (), tuple(apart))
        residuals = table - table.mean(axis=1, keepdims=True) - table.mean(axis=0, keepdims=True) + table.mean()
        spread, freedom = (residuals**2).sum(axis=1), (len(kept) - 1) * (table.shape[1] - 1)
        if len(kept) < 3 or spread.max() <= cochran(len(kept), table.shape[1]) * spread.sum():
            return Pooled(scores, float(spread.sum() / freedom), freedom, kept, tuple(apart))
        apart.append(kept[int(spread.argmax())])


def cochran(groups: int, replicates: int, level: float = 0.05) -> float:
    """Critical value of Cochran's C, the largest of N variances of n replicates each as a part of their sum.

    C = 1 / (1 + (N - 1) / F), F the upper level / N quantile of Fisher's distribution with n - 1 and (N - 1)(n - 1)
    degrees of freedom.

    Source: Cochran (1941); in this form 't Lam (2010), "Scrutiny of variance results for outliers: Cochran's test
    optimized".
    """
    freedom = replicates - 1
    return 1 / (1 + (groups - 1) / stats.f.isf(level / groups, freedom, (groups - 1) * freedom))


def share_of_teacher(scores: xr.DataArray, teacher: xr.DataArray) -> Estimate:
    r"""Macro score as a share of the teacher's, r = x / y, with the chance of both.

    .. math:: \operatorname{var} r = \operatorname{var}(x - r y) / y^2

    With one distillation seed, student and teacher share their fine-tuning seeds, and x - r y is taken seed by seed.
    With several, the two are taken as independent: var(x) + r^2 var(y), with Satterthwaite's degrees of freedom. Of a
    teacher that was fine-tuned once nothing is known of var(y): it is left out.

    Args:
        scores: those of one student: AXES, and any others. teacher: (task, finetuning_seed), and any of the others.

    Source: the delta method; what makes it an interval: :func:`estimate`.
    """
    teacher = teacher.expand_dims(student=scores["student"].to_numpy(), distillation_seed=[0])
    level = teacher.mean(AXES, skipna=False)
    share = scores.mean(AXES, skipna=False) / level
    scaled = share * teacher
    shares, levels = share.to_numpy(), level.to_numpy()
    if scores.sizes["distillation_seed"] == 1:
        scaled = scaled.assign_coords(distillation_seed=scores["distillation_seed"])
        paired = estimate(replicates(difference(scores, scaled)))
        return Estimate(shares, paired.standard_error / levels, paired.freedom)
    parts = [estimate(replicates(scores))]
    if teacher.sizes["finetuning_seed"] > 1:
        parts.append(estimate(replicates(scaled)))
    total = sum(part.standard_error**2 for part in parts)
    with np.errstate(divide="ignore", invalid="ignore"):
        freedom = total**2 / sum(part.standard_error**4 / part.freedom for part in parts)
    freedom = np.where(np.isnan(freedom), parts[0].freedom, freedom)
    return Estimate(shares, np.sqrt(total) / levels, freedom)


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
    scores: xr.DataArray, generator: np.random.Generator, resamples: int = RESAMPLES
) -> tuple[float, float, float]:
    """Mean of the middle half of all run x task scores, with its stratified 95 % bootstrap interval.

    Resampled are whole distillation seeds, all students and tasks together, where there are several; fine-tuning seeds
    within each task where there is one. The ends' distances from the mean are widened by sqrt(n / (n - 1)) t / z for n
    replicates in each of K strata, with the 97.5 % quantiles of Student's distribution with K (n - 1) degrees of
    freedom and of the normal one: a plain percentile interval of so few seeds is far too narrow.

    Args:
        scores: those of one method, AXES.
        generator: of the resampling.
        resamples: how many.

    Returns:
        The interquartile mean and the ends of its interval (NaN with a single replicate).

    Source: Agarwal et al. (2021), "Deep reinforcement learning at the edge of the statistical precipice" (2108.13264);
    the widening: Hesterberg (2015), "What teachers should know about the bootstrap" (1411.5279).
    """
    several, runs = scores.sizes["distillation_seed"] > 1, _runs(scores)
    students, tasks, count = runs.shape
    value = float(stats.trim_mean(runs.ravel(), 0.25))
    if count == 1:
        return value, np.nan, np.nan
    strata = (1, 1) if several else (1, tasks)  # students share their seeds
    freedom = np.prod(strata) * (count - 1)
    widening = np.sqrt(count / (count - 1)) * stats.t.ppf(0.975, freedom) / stats.norm.ppf(0.975)
    drawn = generator.integers(count, size=(resamples, *strata, count))
    drawn = np.take_along_axis(runs[None], np.broadcast_to(drawn, (resamples, *runs.shape)), axis=-1)
    ends = np.quantile(stats.trim_mean(drawn.reshape(resamples, -1), 0.25, axis=1), [0.025, 0.975])
    low, high = value + widening * (ends - value)
    return value, float(low), float(high)


def _runs(scores: xr.DataArray) -> np.ndarray:
    """Runs by (student, task, run): distillation seeds, means over fine-tunings; with one, its fine-tuning seeds."""
    ordered = scores.transpose(*AXES)
    if scores.sizes["distillation_seed"] > 1:
        return ordered.mean("finetuning_seed", skipna=False).to_numpy()
    return ordered.isel(distillation_seed=0).to_numpy()


def probability_of_improvement(first: xr.DataArray, second: xr.DataArray) -> float:
    """P(a run of ``first`` scores higher than one of ``second``), mean over students and tasks; ties count half.

    Runs: distillation seeds (means over fine-tunings), or fine-tuning seeds where there is one. Every run is compared
    with every run, so 0.5 means no difference; the size of differences does not count.

    Args:
        first, second: AXES, of the same students and tasks.

    Raises:
        ValueError: students, tasks or seeds of the two are not the same.

    Source: Agarwal et al. (2021), 2108.13264, after Mann & Whitney (1947).
    """
    one, other = (_runs(scores) for scores in xr.align(first, second, join="exact"))
    gap = one[..., :, None] - other[..., None, :]
    return float(((gap > 0) + 0.5 * (gap == 0)).mean())


def performance_profile(scores: xr.DataArray, thresholds: Sequence[float] = PROFILE) -> np.ndarray:
    """Share of fine-tuned models (all students, tasks and seeds) that score above each threshold, one value each.

    Source: Dolan & Moré (2002); as distributions of runs in Agarwal et al. (2021), 2108.13264.
    """
    return np.array([(scores.to_numpy() > threshold).mean() for threshold in thresholds])


def two_sided(effect: Estimate) -> float:
    """p-value of the hypothesis that the true mean is zero."""
    return float(2 * np.minimum(effect.p_above(0), effect.p_below(0)))
