"""How scores change with the tokens that students read, and where methods change places."""

from __future__ import annotations

import numpy as np
import pandas as pd
import xarray as xr
from statsmodels.formula.api import ols

from study.analysis.numbers.statistics import estimate

_RUN = ("student", "distillation_seed")
COLUMNS = ["group", "method", "first", "per_decade", "low", "high", "runs", "leader", "meets"]
COLUMNS += ["faster", "faster_low", "faster_high"]


def trends(closed: dict[tuple[str, str], dict[str, xr.DataArray]], tokens: dict[str, int]) -> pd.DataFrame:
    r"""Per group of tasks and method, how much of the gap ten times the tokens close.

    .. math:: c_{mr} = a_m + d_m \log_{10}(t_r / t_0) + e_{mr}

    by ordinary least squares over the runs r of a group, c the percent of the gap that a run closes over the group's
    tasks, t its tokens, t_0 those of the smallest budget. Errors have one variance for all methods. A line is a
    summary: a method that levels off lies below it at both ends. Source: this study's choice;
    the analysis of a summary measure by task: Laird and Ware (1982), in its balanced case.

    Args:
        closed: (group, budget) -> method -> shares of the gap, as of
            :func:`study.analysis.numbers.budgets.all_closed`. tokens: budget -> tokens.

    Returns:
        One row per group and method that was run at two budgets or more: first (a, percent), per_decade (d) with its
        95 % interval low to high (NaN where no run is left over for errors), runs, leader (the method with the
        greatest a), meets: tokens at which the line reaches the leader's, within those that were run; NaN where it
        does not, and faster: d less the leader's, with the 95 % interval faster_low to faster_high that tasks give as
        random effects, Student's over the differences of slopes by task (NaN of the leader, bounds with one task).
        Empty without several budgets.
    """
    smallest = min(tokens.values())
    rows = []
    for (group, budget), methods in closed.items():
        for method, shares in methods.items():
            place = {"group": group, "method": method, "decades": np.log10(tokens[budget] / smallest)}
            by_task = shares.mean([axis for axis in shares.dims if axis not in (*_RUN, "task")])
            runs = by_task.stack(run=[axis for axis in _RUN if axis in by_task.dims]).transpose("run", "task")
            rows += [place | {"by_task": 100 * run, "closed": 100 * run.mean()} for run in runs.to_numpy()]
    table = pd.DataFrame(rows)
    several = table.groupby(["group", "method"])["decades"].transform("nunique") > 1
    found = [_lines(str(group), own, smallest) for group, own in table[several].groupby("group", sort=False)]
    return pd.concat(found, ignore_index=True) if found else pd.DataFrame(columns=COLUMNS)


def _lines(group: str, runs: pd.DataFrame, smallest: int) -> pd.DataFrame:
    fitted = ols("closed ~ 0 + C(method) + C(method):decades", runs.drop(columns="by_task")).fit()
    between = fitted.conf_int() if fitted.df_resid else pd.DataFrame(np.nan, fitted.params.index, [0, 1])
    lines, slopes = [], {}
    for method, own in runs.groupby("method", sort=False):
        first, slope = f"C(method)[{method}]", f"C(method)[{method}]:decades"
        line = {"group": group, "method": method, "first": fitted.params[first], "per_decade": fitted.params[slope]}
        lines.append(line | {"low": between.loc[slope, 0], "high": between.loc[slope, 1], "runs": len(own)})
        slopes[method] = np.polyfit(own["decades"], np.stack(own["by_task"].tolist()), deg=1)[0]
    table = pd.DataFrame(lines)
    leader = table.loc[table["first"].idxmax()]
    over = np.stack([slopes[method] - slopes[leader["method"]] for method in table["method"]])
    faster = estimate(over[:, None, :])  # tasks are the replicates
    low, high = faster.interval()
    mean = pd.Series(faster.mean)
    decades = ((leader["first"] - table["first"]) / mean.where(mean > 0)).where(table["method"] != leader["method"])
    reached = decades.where(decades <= runs["decades"].max())
    table = table.assign(faster=mean, faster_low=low, faster_high=high)
    table.loc[table["method"] == leader["method"], ["faster", "faster_low", "faster_high"]] = np.nan
    return table.assign(leader=leader["method"], meets=smallest * 10**reached)[COLUMNS]
