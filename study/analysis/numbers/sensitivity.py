"""Whether the verdicts at a budget hang on a single task, or on the tasks and seeds that happened to be drawn."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pandas as pd
import xarray as xr

from study.analysis.numbers import budgets as by_budget
from study.analysis.numbers import claims
from study.analysis.numbers.statistics import RESAMPLES
from study.files import StudyError

_PLACE = ["group", "budget", "tokens", "claim"]
COLUMNS = [*_PLACE, "verdict", "contrast", "effect", "low", "high", "drawn_low", "drawn_high", "tasks", "without"]
#: A verdict without a task whose tasks left have no gap to close.
NO_GAP = "no gap"


def sensitivity(budgets: by_budget.Budgets, closed: by_budget.Closed, judged: pd.DataFrame) -> pd.DataFrame:
    """One row per verdict of a group of two tasks or more, the mean of all aside: what becomes of it.

    Columns: group, budget, tokens, claim, verdict, contrast, effect, low and high as in ``judged``; drawn_low and
    drawn_high (95 % of the decisive contrast's effect when tasks and distillation seeds, these for all methods
    together, are drawn anew with replacement, in percent of the group's gap; NaN with one seed), tasks (of the group),
    without (``task: verdict`` for every task whose omission changes the verdict, joined by commas; both macro scores
    and gap are then of the other tasks, and NO_GAP says that these have none).

    Of few tasks and seeds a bootstrap is a coarse check, narrower than it should be: it judges nothing.

    Args:
        closed: :func:`budgets.all_closed`. judged: the verdicts of :func:`budgets.verdicts`.

    Source: the hierarchical bootstrap and the omission of single tasks as checks are this study's choice.
    """
    if judged.empty:
        return pd.DataFrame(columns=COLUMNS)
    tasks = {g: next(iter(own.values()))["task"].to_numpy().tolist() for (g, _), own in closed.items() if g != "all"}
    several = judged[judged["group"].map(lambda group: len(tasks.get(group, [])) > 1)]
    omitted = {task: _verdicts_without(budgets, task) for own in tasks.values() for task in own}
    own_claims = {key: {c.id: c for c in claims.judged_on(m.keys(), by_budget.MARGIN)} for key, m in closed.items()}
    rows = []
    for row in several.itertuples():
        place = (row.group, row.budget)
        contrast = next(c for c in own_claims[place][row.claim].contrasts if c.label == row.contrast)
        low, high = _drawn(closed[place], contrast)
        changed = {t: omitted[t].get((*place, row.claim), NO_GAP) for t in tasks[row.group]}
        without = ", ".join(f"{task}: {verdict}" for task, verdict in changed.items() if verdict != row.verdict)
        own = {name: getattr(row, name) for name in COLUMNS if name in judged}
        rows.append(own | {"drawn_low": low, "drawn_high": high, "tasks": len(tasks[row.group]), "without": without})
    return pd.DataFrame(rows, columns=COLUMNS)


def _verdicts_without(budgets: by_budget.Budgets, task: str) -> dict[tuple[str, str, str], str]:
    """(group, budget, claim) -> verdict by all other tasks."""
    left = replace(budgets, scores=budgets.scores[budgets.scores["task"] != task])
    try:
        closed = {key: own for key, own in by_budget.all_closed(left).items() if key[0] != "all"}
    except StudyError:  # no group has a gap
        return {}
    judged, _ = by_budget.verdicts(left, closed, by_budget.table(left, closed))
    return judged.set_index(["group", "budget", "claim"])["verdict"].to_dict()


def _drawn(scores: dict[str, xr.DataArray], contrast: claims.Contrast) -> tuple[float, float]:
    """The interval of a contrast with tasks and seeds drawn anew, in percent."""
    sides = [
        sum(scores[method] for method in contrast.members(side)) / len(contrast.members(side))
        for side in (contrast.first, contrast.second)
    ]
    with xr.set_options(arithmetic_join="exact"):
        difference = (sides[0] - sides[1]).mean(["student", "finetuning_seed"]).transpose("task", "distillation_seed")
    values = 100 * difference.to_numpy()
    tasks, seeds = values.shape
    if seeds == 1:
        return np.nan, np.nan
    generator = np.random.default_rng(list(contrast.label.encode()))
    task, seed = (generator.integers(count, size=(RESAMPLES, count)) for count in (tasks, seeds))
    drawn = values[task[:, :, None], seed[:, None, :]].mean(axis=(1, 2))
    low, high = np.quantile(drawn, [0.025, 0.975])
    return float(low), float(high)
