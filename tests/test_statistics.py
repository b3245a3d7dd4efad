"""Statistics over seeds agree with hand computations and scipy; intervals cover at about their nominal rate."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
from constructed_results import named, results_of_scores
from scipy import stats

from study import StudyError
from study.analysis.numbers import statistics
from study.analysis.numbers.analysis import Analysis

pytestmark = pytest.mark.fast
TASK_NOISE = 0.02 * np.linspace(0.2, 1.8, 5)[:, None, None]  # tasks differ in how much fine-tuning moves them
TASK_MEANS = np.linspace(0.5, 0.9, 5)[:, None, None]


def simulated(generator, replications, students, seeds, finetunings, seed_noise=0.01, draw_noise=0.01):
    """Scores (replications, students, 5 tasks, seeds, finetunings) around zero: distilled models, then fine-tunings.

    A distilled model's chance is partly common to its tasks, partly the task's own; fine-tuning's comes on top: the
    model's own, and that of a draw of training examples, which students share (what a draw does to one method more
    than to another; what it does to all alike is gone from paired differences).
    """
    shape = (replications, students, 5, seeds, finetunings)
    scores = generator.normal(size=shape) * TASK_NOISE
    scores += draw_noise * generator.normal(size=(replications, 1, *shape[2:]))
    common = generator.normal(size=(replications, students, 1, seeds, 1))
    own = generator.normal(size=(*shape[:-1], 1))
    return named(scores + seed_noise * (common + 0.5 * own))


def coverage(values, truth=0.0):
    low, high = statistics.estimate(values).interval()
    return ((low <= truth) & (truth <= high)).mean()


@pytest.mark.parametrize(("students", "seeds", "finetunings"), [(2, 2, 2), (3, 3, 3), (1, 5, 2)])
def test_intervals_of_several_distillation_seeds_cover(students, seeds, finetunings):
    """4000 replications: a true rate of 0.95 is seen within 0.01. Few seeds make the interval a little too wide."""
    scores = simulated(np.random.default_rng(0), 4000, students, seeds, finetunings)
    values = statistics.replicates(scores)
    assert values.shape == (4000, 1, seeds)
    assert 0.94 < coverage(values) < 0.985
    found = statistics.estimate(values)
    for p_values in (found.p_above(0), found.p_below(0)):
        assert 0.005 < (p_values <= 0.025).mean() < 0.032
    # The same simulation shows what taking fine-tunings of one model for independent runs would do.
    pooled = scores.to_numpy().mean(axis=(1, 2)).reshape(4000, 1, seeds * finetunings)
    assert coverage(pooled) < 0.92


def test_intervals_of_one_distillation_seed_cover_fine_tuning_alone():
    generator = np.random.default_rng(1)
    for finetunings in (2, 3):
        values = statistics.replicates(simulated(generator, 4000, 2, 1, finetunings, seed_noise=0))
        assert values.shape == (4000, 5, finetunings)
        assert 0.94 < coverage(values) < 0.985
    chance_of_distillation = simulated(generator, 4000, 2, 1, 3)
    assert coverage(statistics.replicates(chance_of_distillation)) < 0.88  # so no verdict may rest on them


def test_fine_tuning_draws_shared_by_all_distillation_seeds_would_not_be_covered():
    """Why every distillation seed draws its own: the same two draws for all are in the spread between them nowhere."""
    generator = np.random.default_rng(3)
    scores = simulated(generator, 4000, 1, 3, 2, draw_noise=0)
    scores = scores + 0.03 * generator.normal(size=(4000, 1, 5, 1, 2))
    assert coverage(statistics.replicates(scores)) < 0.90
    own = simulated(generator, 4000, 1, 3, 2, draw_noise=0.03)
    assert 0.94 < coverage(statistics.replicates(own)) < 0.985


@pytest.mark.parametrize(
    ("tasks", "seeds", "seed_noise"), [(5, 1, 0), (2, 1, 0), (5, 3, 0.01), (2, 3, 0.01), (2, 3, 0.001)]
)
def test_intervals_of_the_share_of_the_teacher_cover(tasks, seeds, seed_noise):
    """Half of what a draw of examples does happens to student and teacher alike, with one distillation seed."""
    generator = np.random.default_rng(4)
    student = 0.6 + simulated(generator, 4000, 1, seeds, 2, seed_noise)[:, :, :tasks]
    teacher = 0.8 + simulated(generator, 4000, 1, 1, 2, 0)[:, :, :tasks]
    if seeds == 1:
        teacher = 0.8 + (teacher - 0.8 + student - 0.6) / 2**0.5
    of_teacher = teacher.squeeze(["student", "distillation_seed"], drop=True)
    low, high = statistics.share_of_teacher(student, of_teacher).interval()
    assert 0.935 < ((low <= 0.75) & (high >= 0.75)).mean() < 0.99
    paired = statistics.estimate(statistics.replicates(student - 0.6 + 0.02)).interval()
    assert 0.935 < ((paired[0] <= 0.02) & (paired[1] >= 0.02)).mean() < 0.99


@pytest.mark.parametrize(("students", "seeds", "finetunings", "noise"), [(3, 3, 2, 0.01), (2, 1, 3, 0.0)])
def test_bootstrap_intervals_of_the_interquartile_mean_cover(students, seeds, finetunings, noise):
    """600 replications: a true rate of 0.95 is seen within 0.02. The truth is the mean of the estimates."""
    generator = np.random.default_rng(2)
    scores = named(TASK_MEANS + simulated(generator, 600, students, seeds, finetunings, noise).to_numpy())
    found = np.array([statistics.interquartile_mean(own, generator, resamples=200) for own in scores])
    truth = found[:, 0].mean()
    assert 0.90 < ((found[:, 1] <= truth) & (truth <= found[:, 2])).mean() < 0.98
    assert ((found[:, 1] <= found[:, 0]) & (found[:, 0] <= found[:, 2])).all()


def test_one_stratum_gives_the_paired_t_test():
    first, second = np.random.default_rng(0).normal(size=(2, 6))
    found, known = statistics.estimate((first - second)[None]), stats.ttest_rel(first, second)
    assert found.mean == pytest.approx((first - second).mean()) and found.freedom == pytest.approx(5)
    assert 2 * min(found.p_above(0), found.p_below(0)) == pytest.approx(known.pvalue)
    interval = known.confidence_interval()
    assert found.interval() == pytest.approx((interval.low, interval.high))
    assert found.p_above(-0.5) == pytest.approx(stats.ttest_rel(first + 0.5, second, alternative="greater").pvalue)


def test_two_strata_of_unlike_spread_give_welchs_test():
    first, second = np.random.default_rng(0).normal(size=(2, 5)) * [[1], [10]]
    found, known = statistics.estimate(np.stack([first, second])), stats.ttest_ind(first, -second, equal_var=False)
    assert found.freedom == pytest.approx(known.df) and known.df < 6
    assert found.p_above(0) == pytest.approx(stats.t.sf(known.statistic, known.df))


def test_differences_without_spread_are_sure_and_single_runs_are_not():
    sure = statistics.estimate(np.full((2, 3), 0.5))
    assert sure.interval() == (0.5, 0.5) and (sure.p_above(0), sure.p_below(0)) == (0, 1)
    single = statistics.estimate(np.array([[0.5], [0.7]]))
    assert single.mean == pytest.approx(0.6) and np.isnan([*single.interval(), single.p_above(0)]).all()


def test_fine_tunings_of_one_model_are_not_replicates_of_its_distillation():
    """Fine-tunings are far apart, but their means per distilled model are equal: distillation's chance is nil."""
    scores = np.zeros((1, 2, 3, 2)) + [0.1, -0.1]
    assert statistics.estimate(statistics.replicates(named(scores))).standard_error == pytest.approx(0, abs=1e-12)
    assert statistics.estimate(statistics.replicates(named(scores[:, :, :1]))).standard_error == pytest.approx(
        0.1 / 2**0.5
    )


def test_holm_by_hand():
    """Three tests: 0.01 x 3, 0.03 x 2, and 0.04 x 1, raised to the one before it."""
    assert statistics.holm([0.04, 0.01, np.nan, 0.03]) == pytest.approx([0.06, 0.03, np.nan, 0.06], nan_ok=True)
    assert statistics.holm([0.5, 0.9]).tolist() == [1, 1] and len(statistics.holm([])) == 0


@pytest.mark.parametrize("shape", [(1, 4, 2, 1), (1, 4, 1, 2)])
def test_interquartile_mean_by_hand(shape):
    """The middle half of 1 ... 7 and one far away is 3 ... 6, wherever that one lies."""
    values = named(np.array([1, 2, 3, 4, 5, 6, 7, 1000.0]).reshape(shape))
    value, low, high = statistics.interquartile_mean(values, np.random.default_rng(0))
    assert value == 4.5 and low < 4.5 < high
    single = statistics.interquartile_mean(values[:, :, :1, :1], np.random.default_rng(0))
    assert np.isnan(single[1:]).all()


def test_bootstrap_resamples_whole_models():
    """A seed moves all tasks by 0.1 alike: the interval is that of its mean, not narrower by the number of tasks.

    Three seeds at -0.1, 0, 0.1 of one student, widened by sqrt(3/2) t / z with two degrees of freedom: one resample in
    27 takes the lowest thrice, which is more than 2.5 %.
    """
    scores = named(np.zeros((1, 8, 3, 2)) + np.array([-0.1, 0, 0.1])[:, None])
    value, low, high = statistics.interquartile_mean(scores, np.random.default_rng(0))
    end = 0.1 * 1.5**0.5 * stats.t.ppf(0.975, 2) / stats.norm.ppf(0.975)
    assert (value, low, high) == pytest.approx((0, -end, end))


def test_probability_of_improvement_is_mann_whitneys():
    first, second = np.random.default_rng(0).integers(5, size=(2, 2, 3, 4, 1)).astype(float)
    pairs = zip(first.reshape(6, 4), second.reshape(6, 4), strict=True)
    known = [stats.mannwhitneyu(a, b).statistic / 16 for a, b in pairs]
    first, second = named(first), named(second)
    assert statistics.probability_of_improvement(first, second) == pytest.approx(np.mean(known))
    assert statistics.probability_of_improvement(first, first) == 0.5
    assert statistics.probability_of_improvement(first + 10, second) == 1


def test_performance_profile_by_hand():
    scores = named(np.array([0.5, 0.7, 0.9, 0.9]).reshape(1, 2, 1, 2))
    assert statistics.performance_profile(scores, (0.4, 0.5, 0.8, 0.9)).tolist() == [1, 0.75, 0.5, 0]


def test_scores_keep_their_places():
    scores = np.random.default_rng(0).random((2, 3, 4, 2))
    results = results_of_scores({"od": scores, "mlm": scores / 2})
    array, teacher = statistics.score_array(results), statistics.teacher_array(results)
    assert array["method"].to_numpy().tolist() == ["od", "mlm"] and array.dims == ("method", *statistics.AXES)
    assert teacher.dims == ("task", "finetuning_seed") and teacher.shape == (3, 2)
    assert statistics.of_method(array, "od").to_numpy().tolist() == scores.tolist()
    assert statistics.of_method(array, "mlm").to_numpy().tolist() == (scores / 2).tolist()
    alone = statistics.of_method(array, "od", "student 1")
    assert alone.to_numpy().tolist() == scores[1:].tolist() and alone["student"].item() == "student 1"


def test_scores_of_other_students_are_never_subtracted():
    """Broadcasting would take a floor of two students from a method that was run on one of them."""
    array = statistics.score_array(results_of_scores({m: np.ones((2, 2, 3, 2)) for m in ("none", "od")}))
    floor, method = statistics.of_method(array, "none"), statistics.of_method(array, "od", "student 0")
    with pytest.raises(ValueError, match="student"):
        statistics.difference(method, floor)
    assert (statistics.difference(method, statistics.of_method(array, "none", "student 0")) == 0).all()


def test_an_incomplete_grid_is_refused():
    results = results_of_scores(dict.fromkeys(("od", "mlm"), np.ones((1, 2, 2, 2))))
    gone = results.scores.query("method == 'od' and task == 'task 1' and distillation_seed == 2").index
    results = replace(results, scores=results.scores.drop(index=gone))
    with pytest.raises(StudyError, match="od has no score of student student 0, task task 1, distillation_seed 2"):
        statistics.score_array(results)


def test_tables_of_methods_and_of_their_differences():
    noise = 0.01 * np.random.default_rng(0).normal(size=(3, 2, 5, 3, 2))
    levels = {"mlm": 0.4, "od": 0.6, "hs-last": 0.6}
    results = results_of_scores({method: levels[method] + own for method, own in zip(levels, noise, strict=True)})
    analysis = Analysis(results)
    table = analysis.aggregates.set_index("method")
    assert table["runs"].tolist() == [6, 6, 6] and set(table["covers"]) == {statistics.DISTILLATION_SEEDS[0]}
    assert table.loc["od", "iqm"] == pytest.approx(75, abs=1)  # 0.60 / 0.80
    assert (table["iqm_low"] < table["iqm"]).all() and (table["iqm"] < table["iqm_high"]).all()
    assert table["improvement_over_mlm"].tolist() == pytest.approx([np.nan, 1, 1], nan_ok=True)
    assert (table[["above_80", "above_100"]] == 0).all(axis=None)
    every = analysis.differences
    assert every.groupby("student", sort=False).size().to_dict() == dict.fromkeys(["student 0", "student 1", "mean"], 3)
    pairs = every[every["student"] == "mean"].set_index(["first", "second"])
    assert pairs.loc[("mlm", "od"), "effect"] == pytest.approx(100 * (noise[0] - noise[1]).mean() - 20)
    assert (pairs.loc["mlm", "p_holm"] < 0.001).all() and pairs.loc[("od", "hs-last"), "p_holm"] > 0.05
    assert (pairs["p_holm"] >= pairs["p"]).all()
    assert len(Analysis(results_of_scores({"od": np.ones((1, 2, 1, 2))})).differences) == 0
