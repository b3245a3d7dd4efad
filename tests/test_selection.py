"""Rules that choose a method, on a table small enough to judge by hand."""

from __future__ import annotations

from types import SimpleNamespace

import pandas as pd
import pytest

from study.analysis.numbers.selection import selection

pytestmark = pytest.mark.fast

#: method -> development, test (of a teacher of 0.8), retrieval.
METHODS = {"none": (0.99, 0.4, 0.9), "mlm": (0.6, 0.3, 0.1), "od": (0.9, 0.5, 0.2), "hs-last": (0.7, 0.6, 0.3)}


def picked(probes: bool = True, **changes: tuple[float, float, float]) -> pd.DataFrame:
    methods = METHODS | changes
    model = {"setting": "several", "student": "L3-H384"}
    summary = [
        model | {"method": m, "development": d, "test": t, "retained": t / 0.8} for m, (d, t, _) in methods.items()
    ]
    teacher = {"setting": "several", "student": "teacher", "method": "teacher"}
    summary.append(teacher | {"development": 1.0, "test": 0.8, "retained": 1.0})
    probed = [
        model | {"method": m, "task": "retrieval", "language": language, "test": value + shift}
        for m, (_, _, value) in methods.items()
        for language, shift in (("de", -0.05), ("fr", 0.05))
    ]
    results = SimpleNamespace(
        comparison=SimpleNamespace(setting="several"), probes=pd.DataFrame(probed if probes else [])
    )
    return selection(results, pd.DataFrame(summary)).set_index("rule")


def test_each_rule_picks_by_its_own_signal_and_its_regret_is_what_the_best_one_keeps_more():
    table = picked()
    assert table["method"].to_dict() == {"development": "od", "retrieval": "hs-last", "oracle": "hs-last"}
    assert table["retained"].tolist() == pytest.approx([62.5, 75, 75])
    assert table["regret"].tolist() == pytest.approx([12.5, 0, 0])
    assert table["floor"].tolist() == pytest.approx([50] * 3)  # the untrained student is never picked
    assert table["rank_correlation"].tolist() == pytest.approx([0.5, 1, 1])  # ranks 1 3 2 against 1 2 3


def test_what_sees_test_data_is_not_usable():
    assert picked()["usable"].to_dict() == {"development": True, "retrieval": False, "oracle": False}


def test_a_rule_without_its_signal_is_left_out():
    assert picked(probes=False).index.tolist() == ["development", "oracle"]


def test_equal_values_have_no_rank_correlation_and_the_first_of_the_grid_is_picked():
    table = picked(mlm=(0.7, 0.3, 0.1), od=(0.7, 0.5, 0.2))
    assert table.loc["development", "method"] == "mlm" and table["rank_correlation"].isna().tolist()[0]
