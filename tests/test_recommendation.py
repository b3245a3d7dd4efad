"""What is recommended for a budget, on constructed results; published numbers stay what they are."""

from __future__ import annotations

import pandas as pd
import pytest
from constructed_results import SPLITS, latency_result, make_study, run_result, write

from study.analysis.numbers.published import PUBLISHED

#: Test scores; development scores are given apart where they differ.
SCORES = {
    ("none", "L3-H384"): 0.50,
    ("mlm", "L3-H384"): 0.60,
    ("od", "L3-H384"): 0.70,
    ("none", "L3-H192"): 0.50,
    ("mlm", "L3-H192"): 0.66,
    ("od", "L3-H192"): 0.66,
    ("none", "L6-H192"): 0.50,
    ("mlm", "L6-H192"): 0.55,
    ("od", "L6-H192"): 0.79,
}


def recommended(root, development=None) -> pd.DataFrame:
    students = ("L3-H384", "L3-H192", "L6-H192")
    made = make_study(root, ["none", "mlm", "od"], students)
    folder = made.layout.results
    folder.mkdir(parents=True)
    write(folder / "teacher.json", run_result("teacher", "teacher", 0, 0.8))
    write(folder / "latency.json", latency_result(students))
    write(folder / "tasks.json", SPLITS)
    for cell, test in SCORES.items():
        result = run_result(*cell, 1, test, (development or {}).get(cell, test))
        write(folder / f"{cell[0]}_{cell[1]}_1.json", result)
    return made.analyse().recommendation


def test_every_budget_has_its_model_and_the_promise_is_from_test_data(tmp_path):
    """Latencies: L3-H384 10 ms, L6-H192 9 ms, L3-H192 5 ms; on development data the slowest is the best."""
    table = recommended(tmp_path, {("od", "L3-H384"): 0.79, ("od", "L6-H192"): 0.70, ("od", "L3-H192"): 0.67})
    assert table["student"].tolist() == ["teacher", "L3-H384", "L6-H192", "L3-H192"]
    assert table["budget_ms"].tolist() == [20, 10, 9, 5] and table["method"].tolist() == ["teacher", "od", "od", "od"]
    shares = [100 * score / 80 for score in (80, 70, 79, 66)]
    assert table["retained"].tolist() == pytest.approx(shares, abs=0.06)
    assert table["loss"].tolist() == pytest.approx([0, 10, 1, 14])
    assert table["reservation"].tolist() == ["", "", "", "not shown to beat training without a teacher"]
    assert table["alike"].tolist() == [(), (), (), ("mlm",)]


def test_a_student_that_a_faster_one_beats_on_development_data_is_left_out(tmp_path):
    table = recommended(tmp_path, {("od", "L6-H192"): 0.60, ("mlm", "L6-H192"): 0.55, ("od", "L3-H192"): 0.66})
    assert table["student"].tolist() == ["teacher", "L3-H384", "L3-H192"]


def test_published_shares_of_the_teacher():
    (distilbert,) = (row for row in PUBLISHED if row.student == "DistilBERT")
    assert distilbert.retained == pytest.approx(96.86, abs=0.01)
    assert all(row.source and 0 < row.score < 100 for row in PUBLISHED)
