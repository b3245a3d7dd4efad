"""Scores against training tokens: what share of the gap between floor and teacher a method closes at each budget."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

import numpy as np
import pandas as pd
import xarray as xr

from study.analysis.numbers import claims
from study.analysis.numbers.results import FLOOR, check_mixture, check_there, check_versions
from study.analysis.numbers.statistics import AXES, Estimate, complete_array, difference, estimate, replicates
from study.descriptions import TEACHER, Comparison, model_name
from study.files import Layout, StudyError
from study.records import RunResult, read_record, short_name
from study.sections import BASE_BUDGET

#: Groups of tasks -> the tasks that belong to them; ``all`` is the mean of all tasks.
GROUPS = ("context", "sentence", "all")
#: Of the gap between floor and teacher: differences smaller than this count as none. Source: this study's choice.
MARGIN = 5.0
#: A held-out loss that ends above this share of its start has not been learnt.
LEARNT = 0.95
#: Points (0-100) by which the teacher has to be above the untrained student: else there is no gap to close.
GAP = 1.0
NOT_TESTABLE = "not testable"
_PLACE = ["group", "budget", "tokens", "claim"]


@dataclass(frozen=True)
class Budgets:
    """Every run of a setting, whatever its budget.

    Attributes:
        comparison: whose runs they are.
        scores: one row per run, task and fine-tuning seed: budget, tokens, method, student, seed, group, task,
            finetuning_seed, score (main metric on test data, mean over languages), languages (language -> score),
            development. Untrained students have the budget ``base``, the teacher that, too.
        training: one row per trained run: budget, tokens, method, student, seed, learning_rate, curve (pairs of tokens
            and held-out loss), loss_share (the last of these as a share of the one before training).
    """

    comparison: Comparison
    scores: pd.DataFrame
    training: pd.DataFrame

    @property
    def tokens(self) -> dict[str, int]:
        """Budget -> tokens that a run reads, in rising order."""
        tokens = {BASE_BUDGET: self.comparison.tokens} | {n: b.tokens for n, b in self.comparison.budgets.items()}
        return dict(sorted(tokens.items(), key=lambda item: item[1]))

    @property
    def first(self) -> str:
        """The budget to read first, by :func:`standing`."""
        trained = self.scores[~self.scores["method"].isin([TEACHER, FLOOR])]
        seeds = trained.groupby("budget")["seed"].nunique()
        return max(seeds.index, key=lambda name: standing(seeds[name], self.tokens[name]))


def standing(seeds: int, tokens: int) -> tuple[bool, int]:
    """What orders budgets: of those run with several distillation seeds the one of most tokens is read first."""
    return seeds > 1, tokens


def load_budgets(comparison: Comparison, layout: Layout) -> Budgets:
    """Read the result files of every budget.

    Raises:
        StudyError: files are missing, invalid, of another run than their place says, or were made with
            other package versions than most.
    """
    cells = [(TEACHER, TEACHER, 0, BASE_BUDGET), *comparison.every_cell()]
    paths = [layout.result(model_name(*cell)) for cell in cells]
    check_there(paths, layout)
    scores: list[dict[str, Any]] = []
    training: list[dict[str, Any]] = []
    records: dict[str, RunResult] = {}
    for path, (method, student, seed, budget) in zip(paths, cells, strict=True):
        where = {"profile": comparison.profile, "setting": comparison.setting, "budget": budget}
        record = read_record(path, RunResult, **where, method=method, student=student, seed=seed)
        records[short_name(path)] = record
        trained = record.distillation if method != TEACHER else None
        tokens = trained.tokens if trained else 0
        run = {"budget": budget, "tokens": tokens, "method": method, "student": student, "seed": seed}
        scores += [run | row for row in score_rows(record, comparison)]
        if trained:
            share = trained.curve[-1].loss / trained.curve[0].loss
            curve = [(point.tokens, point.loss) for point in trained.curve]
            training.append(run | {"learning_rate": trained.learning_rate, "curve": curve, "loss_share": share})
    check_versions({f"{name}: environment": record.environment for name, record in records.items()})
    check_mixture(records)
    return Budgets(comparison, pd.DataFrame(scores), pd.DataFrame(training))


def score_rows(record: RunResult, comparison: Comparison) -> Iterable[dict[str, Any]]:
    """A row for each task and fine-tuning seed of a run: the columns of :attr:`Budgets.scores` behind ``seed``.

    Raises:
        StudyError: a task is missing.
    """
    for task in comparison.tasks:
        if task in record.tasks:
            tuned = record.tasks[task]
            place, metric = {"group": tuned.group, "task": task}, tuned.metric
            runs = [(r.seed, {tuned.language: r.test} | r.languages, r.development[metric]) for r in tuned.runs]
        elif task in record.probes:
            probe = record.probes[task]
            place, metric = {"group": probe.group, "task": task}, probe.metric
            development = float(np.mean(list(probe.development.values()))) if probe.development else np.nan
            runs = [(seed, probe.languages, development) for seed in comparison.finetuning_seeds]  # one score for all
        else:
            raise StudyError(f"{record.method} {record.student}: task {task!r} is missing")
        for seed, languages, development in runs:
            tests = {language: values[metric] for language, values in languages.items()}
            score = float(np.mean([*tests.values()]))
            yield place | {"finetuning_seed": seed, "languages": tests, "score": score, "development": development}


def groups(budgets: Budgets) -> list[str]:
    """Those of GROUPS that the results have tasks of, and in which the teacher is above the untrained student.

    Raises:
        StudyError: there is none.
    """
    there = [group for group in GROUPS if group in {*budgets.scores["group"], "all"}]
    macros = {group: of_group(budgets, group).groupby("method")["score"].mean() for group in there}
    wide = [group for group in there if 100 * (macros[group][TEACHER] - macros[group][FLOOR]) > GAP]
    wide = wide if set(there) - {"all"} <= set(wide) else [group for group in wide if group != "all"]
    if not wide:
        raise StudyError(
            f"{budgets.comparison.setting}: the teacher is at most {GAP:g} point above the untrained student in all"
            " groups of tasks; allowed: a gap that methods can close"
        )
    return wide


def of_group(budgets: Budgets, group: str) -> pd.DataFrame:
    """The scores of a group of tasks."""
    return budgets.scores if group == "all" else budgets.scores[budgets.scores["group"] == group]


def gap_closed(budgets: Budgets, budget: str, group: str) -> dict[str, xr.DataArray]:
    """Method -> scores at a budget as shares of the gap between floor and teacher, AXES.

    Share = (score - F) / (T - F), with T and F the macro scores of the teacher and of the untrained student over the
    tasks of the group: the mean over tasks of what is returned is the share of the gap that the macro closes.

    Raises:
        StudyError: a method lacks a task or seed that another has.
    """
    rows = of_group(budgets, group)
    return _shares(rows, rows[(rows["budget"] == budget) & ~rows["method"].isin([TEACHER, FLOOR])])


def _shares(rows: pd.DataFrame, own: pd.DataFrame) -> dict[str, xr.DataArray]:
    """Of the methods of some rows, by the teacher and the floor of others."""
    ceiling = rows.loc[rows["method"] == TEACHER, "score"].mean()
    floors = rows[rows["method"] == FLOOR].groupby("student")["score"].mean().rename_axis("student").to_xarray()
    shares = {}
    for method, array in _arrays(own).items():
        floor = floors.sel(student=array["student"])
        shares[method] = ((array - floor) / (ceiling - floor)).transpose(*AXES)
    return shares


def _arrays(own: pd.DataFrame) -> dict[str, xr.DataArray]:
    """Method -> scores, AXES, of rows of one budget."""
    arrays = {}
    for method, runs in own.groupby("method", sort=False):
        scores = runs.rename(columns={"seed": "distillation_seed"}).set_index(list(AXES))["score"]
        arrays[str(method)] = complete_array(scores, f"{method} at budget {runs['budget'].iloc[0]}")
    return arrays


def _over_floor(values: xr.DataArray, floor: xr.DataArray) -> Estimate:
    """The mean of a method's values, times 100, with the chance of its own seeds and of the floor's, seed by seed.

    Args:
        values: AXES, less the mean of the floor. floor: its own values on the same scale, AXES.
    """
    own = floor.sel({axis: values[axis] for axis in AXES})
    chance = own - own.mean([axis for axis in AXES if axis != "student"])
    return estimate(replicates(100 * difference(values, chance)))


#: (group, budget) -> what methods close of the gap, as of :func:`gap_closed`.
Closed = dict[tuple[str, str], dict[str, xr.DataArray]]


def all_closed(budgets: Budgets) -> Closed:
    """:func:`gap_closed` of every group and budget."""
    return {(g, budget): gap_closed(budgets, budget, g) for g in groups(budgets) for budget in budgets.tokens}


def table(budgets: Budgets, closed: Closed) -> pd.DataFrame:
    """One row per group, budget and method: what it closes of the gap, in percent, with its 95 % interval.

    The interval holds the chance of the method and of the floor, paired by seeds (:func:`statistics.estimate`); the
    teacher's is left out.

    Columns: group, budget, tokens, method, closed, low, high (NaN of one model), score
    (macro, 0-100), retained (of the teacher's, percent), models (distilled), learning_rate, loss_share, rank (within
    group and budget, 1 is best), learnt (held-out loss ended below LEARNT of its start, and the mean of the group's
    tasks lies above the floor's). A start that is not trained has no rate and no loss: its scores alone count.

    Args:
        closed: :func:`all_closed`.
    """
    listed = []
    training = budgets.training.groupby(["budget", "method"])
    rates, losses = training["learning_rate"].first(), training["loss_share"].mean()
    macros = {g: of_group(budgets, g).groupby(["budget", "method"])["score"].mean() for g in groups(budgets)}
    floors = {}
    for group in groups(budgets):
        rows = of_group(budgets, group)
        floors[group] = _shares(rows, rows[rows["method"] == FLOOR])[FLOOR]
    for (group, budget), methods in closed.items():
        for method, shares in methods.items():
            macro = macros[group][budget, method]
            listed.append(
                {"group": group, "budget": budget, "tokens": budgets.tokens[budget], "method": method}
                | _over_floor(shares, floors[group]).named("closed")
                | {"score": 100 * macro}
                | {"retained": 100 * macro / macros[group][BASE_BUDGET, TEACHER], "models": claims.models(shares)}
                | {"learning_rate": rates.get((budget, method)), "loss_share": losses.get((budget, method))}
            )
    rows = pd.DataFrame(listed).astype({"learning_rate": float, "loss_share": float})
    rows["rank"] = rows.groupby(["group", "budget"])["closed"].rank(ascending=False).astype(int)
    return rows.assign(learnt=~(rows["loss_share"] >= LEARNT) & (rows["closed"] > 0))


def gains(budgets: Budgets) -> pd.DataFrame:
    """What a method's students score above the untrained one, in points (0-100), whether there is a gap or not.

    One row per group of tasks (but the mean of all), budget and method: group, budget, tokens, method, gain (macro test
    score less the untrained student's mean), low, high (95 %, as of :func:`table`; NaN of one model), models.
    """
    rows = []
    for group in [name for name in GROUPS if name in set(budgets.scores["group"])]:
        own = of_group(budgets, group)
        floor = _arrays(own[own["method"] == FLOOR])[FLOOR]
        means = floor.mean([axis for axis in AXES if axis != "student"])
        for budget, runs in own[~own["method"].isin([TEACHER, FLOOR])].groupby("budget", sort=False):
            for method, scores in _arrays(runs).items():
                gain = _over_floor(scores - means.sel(student=scores["student"]), floor).named("gain")
                place = {"group": group, "budget": budget, "tokens": budgets.tokens[str(budget)], "method": method}
                rows.append(place | gain | {"models": claims.models(scores)})
    return pd.DataFrame(rows)


def references(budgets: Budgets) -> pd.DataFrame:
    """Test scores (0-100) of the teacher and of the untrained student by task: the two ends of the gap."""
    rows = budgets.scores[budgets.scores["method"].isin([TEACHER, FLOOR])]
    means = 100 * rows.groupby(["group", "task", "method"], sort=False)["score"].mean().unstack("method")
    return means[[FLOOR, TEACHER]].rename_axis(columns=None).reset_index()


def verdicts(budgets: Budgets, closed: Closed, gap: pd.DataFrame) -> tuple[pd.DataFrame, pd.DataFrame]:
    """The paper's claims judged at every budget and by every group of tasks, and the contrasts behind that.

    Effects and margins are in percent of the gap between floor and teacher. Standard errors pool the chance that
    methods share (:class:`statistics.Pooled`). A claim that rests on a method that did not learn, by the group's own
    tasks, is not testable. Claims are judged on the methods that were run at the budget; where these judge none, both
    tables are empty.

    Args:
        closed: :func:`all_closed`. gap: :func:`table`.

    Returns:
        Verdicts, as :func:`claims.verdicts`, and contrasts, as :func:`claims.contrasts`; both with the columns group,
        budget and tokens first.
    """
    judged: list[pd.DataFrame] = []
    compared: list[pd.DataFrame] = []
    learnt = gap.set_index(["group", "budget", "method"])["learnt"]
    for (group, budget), scores in closed.items():
        own = claims.judged_on(scores.keys(), MARGIN)
        if not own:
            continue
        contrasts = claims.contrasts(scores, own)
        outcome = claims.verdicts(scores, contrasts, own).set_index("claim")
        for claim in own:
            named = dict.fromkeys(method for contrast in claim.contrasts for method in contrast.methods)
            failed = [method for method in named if not learnt[group, budget, method]]
            if failed:
                outcome.loc[claim.id, ["verdict", "reason"]] = [NOT_TESTABLE, f"did not learn: {', '.join(failed)}"]
        place = {"group": group, "budget": budget, "tokens": budgets.tokens[budget]}
        judged.append(_placed(outcome.reset_index(), place))
        compared.append(_placed(contrasts, place))
    if not judged:
        return pd.DataFrame(columns=_PLACE), pd.DataFrame(columns=_PLACE)
    return pd.concat(judged, ignore_index=True), pd.concat(compared, ignore_index=True)


def _placed(rows: pd.DataFrame, place: dict[str, Any]) -> pd.DataFrame:
    return rows.assign(**place)[[*place, *rows.columns]]
