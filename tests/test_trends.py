"""Trends of scores against tokens: slopes, intervals, and where lines meet."""

from __future__ import annotations

import numpy as np
import pytest
import xarray as xr

from study.analysis.numbers.trends import trends

TOKENS = {"small": 300_000, "base": 3_000_000, "large": 30_000_000}
#: Percent of the gap at each budget: od starts below hs and overtakes it, se stays behind.
LINES = {"hs": (20, 30, 40), "od": (10, 30, 50), "se": (0, 5, 10)}
pytestmark = pytest.mark.fast


def shares(percent: float, off: np.ndarray) -> xr.DataArray:
    """Two tasks on either side of the mean, which ``off`` moves by seed."""
    values = percent / 100 + off[None, None, :, None] + np.array([-0.1, 0.1])[None, :, None, None]
    return xr.DataArray(values, dims=("student", "task", "distillation_seed", "finetuning_seed"))


def closed(noise: float, methods=tuple(LINES)) -> dict:
    off = noise * np.array([-1.0, 0.0, 1.0])
    return {
        ("context", budget): {method: shares(LINES[method][place], off) for method in methods}
        for place, budget in enumerate(TOKENS)
    }


def test_slopes_intervals_and_crossings_are_those_of_a_regression_by_hand():
    table = trends(closed(0.02), TOKENS).set_index("method")
    assert table["first"].to_dict() == pytest.approx({"hs": 20, "od": 10, "se": 0})
    assert table["per_decade"].to_dict() == pytest.approx({"hs": 10, "od": 20, "se": 5})
    # Every method: 9 runs, residuals 2 * (-1, 0, 1) at each of three budgets: 24 of squares a method, 72 in all, of
    # 27 - 6 degrees of freedom; the decades 0, 1, 2 three times each have 6 of squares around their mean.
    half = 2.0796 * (72 / 21 / 6) ** 0.5
    assert table.loc["od", "low"] == pytest.approx(20 - half, abs=1e-3)
    assert table.loc["od", "high"] == pytest.approx(20 + half, abs=1e-3)
    assert set(table["leader"]) == {"hs"} and set(table["runs"]) == {9}
    assert table.loc["od", "meets"] == pytest.approx(3_000_000)
    assert np.isnan(table.loc["hs", "meets"]) and np.isnan(table.loc["se", "meets"])


def test_what_a_method_gains_on_the_leader_is_judged_over_tasks():
    """od's lead over hs grows by 10 a decade on the mean; on the first task by 8, on the second by 12."""
    found = closed(0.02)
    apart = xr.DataArray([-0.02, 0.02], dims="task")
    for place, budget in enumerate(TOKENS):
        found["context", budget]["od"] = found["context", budget]["od"] + place * apart
    table = trends(found, TOKENS).set_index("method")
    half = 12.7062 * np.sqrt(2) * 2 / np.sqrt(2)  # Student's of one degree of freedom, standard error 2.83 / sqrt 2
    assert table.loc["od", ["faster", "faster_low", "faster_high"]].to_list() == pytest.approx(
        [10, 10 - half, 10 + half], abs=1e-2
    )
    assert table.loc["hs", ["faster", "faster_low", "faster_high"]].isna().all()
    assert table.loc["se", "faster"] == pytest.approx(-5)


def test_a_method_of_one_budget_has_no_trend_and_neither_has_a_study_of_one():
    found = closed(0.01)
    for budget in ("base", "large"):
        del found["context", budget]["se"]
    assert list(trends(found, TOKENS)["method"]) == ["hs", "od"]
    two = {
        key: {name: own.isel(distillation_seed=[1]) for name, own in methods.items()}
        for key, methods in closed(0.01).items()
        if key[1] != "large"
    }
    assert trends(two, TOKENS)[["low", "high"]].isna().all(axis=None)
    alone = {key: methods for key, methods in closed(0.01).items() if key[1] == "base"}
    assert trends(alone, TOKENS).empty


def test_lines_that_meet_beyond_what_was_run_do_not_meet():
    table = trends({key: own for key, own in closed(0.01).items() if key[1] != "large"}, TOKENS).set_index("method")
    assert table.loc["od", "meets"] == pytest.approx(3_000_000)
    steep = {key: {"hs": own["hs"], "se": own["od"] - 0.3} for key, own in closed(0.01).items()}
    assert np.isnan(trends(steep, TOKENS).set_index("method").loc["se", "meets"])
