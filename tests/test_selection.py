"""Rules that choose a method, on a table small enough to judge by hand."""

from __future__ import annotations

import json

import pandas as pd
import pytest
from constructed_results import add_languages, change, make_study, several_languages, write_grid

from study.analysis import presentation
from study.analysis.advice import cards, table
from study.analysis.numbers.selection import selection
from study.analysis.numbers.tables import write_comparison
from study.files import StudyError

pytestmark = pytest.mark.fast

#: method -> development, test (of a teacher of 0.8), retrieval.
METHODS = {"none": (0.99, 0.4, 0.9), "mlm": (0.6, 0.3, 0.1), "od": (0.9, 0.5, 0.2), "hs-last": (0.7, 0.6, 0.3)}


def picked(probed: bool = True, **changes: tuple[float, float, float]) -> pd.DataFrame:
    model = {"setting": "several", "student": "L3-H384"}
    rows = [
        model | {"method": m, "development": d, "test": t, "retained": t / 0.8, "retrieval_development": r}
        for m, (d, t, r) in (METHODS | changes).items()
    ]
    teacher = model | {"student": "teacher", "method": "teacher", "development": 1.0, "test": 0.8, "retained": 1.0}
    table = pd.DataFrame([*rows, teacher])
    return selection(table if probed else table.drop(columns="retrieval_development")).set_index("rule")


def test_each_rule_picks_by_its_own_signal_and_its_regret_is_what_the_best_one_keeps_more():
    table = picked()
    assert table["method"].to_dict() == {"development": "od", "retrieval_development": "hs-last", "oracle": "hs-last"}
    assert table["retained"].tolist() == pytest.approx([62.5, 75, 75])
    assert table["regret"].tolist() == pytest.approx([12.5, 0, 0])
    assert table["floor"].tolist() == pytest.approx([50] * 3)  # the untrained student is never picked
    assert table["rank_correlation"].tolist() == pytest.approx([0.5, 1, 1])  # ranks 1 3 2 against 1 2 3


def test_retrieval_is_in_use_where_every_trained_method_has_it():
    assert picked()["in_use"].to_dict() == {"development": False, "retrieval_development": True, "oracle": False}
    one_without = picked(od=(0.9, 0.5, float("nan")))
    assert one_without["in_use"].to_dict() == {"development": True, "oracle": False}


def test_a_rule_without_its_signal_is_left_out():
    table = picked(probed=False)
    assert table["in_use"].to_dict() == {"development": True, "oracle": False}


def test_equal_values_have_no_rank_correlation_and_the_first_of_the_grid_is_picked():
    table = picked(mlm=(0.7, 0.3, 0.1), od=(0.7, 0.5, 0.2))
    assert table.loc["development", "method"] == "mlm" and table["rank_correlation"].isna().tolist()[0]


def test_retrieval_of_development_sentences_decides_what_is_reported(tmp_path):
    """Development and test scores prefer MLM; a tenth more of translations is found by OD."""
    scores = {("none", "L3-H384"): 0.5, ("mlm", "L3-H384"): 0.7, ("od", "L3-H384"): 0.6}
    made = make_study(tmp_path, ["none", "mlm", "od"], ["L3-H384"])
    folder = write_grid(made, scores)
    add_languages(folder)  # of test sentences alone: these choose nothing
    before = several_languages(made).analyse()
    assert before.headline["rule"] == "development" and before.headline["students"]["L3-H384"]["method"] == "mlm"
    assert "retrieval_development" not in before.summary and set(before.selection["rule"]) == {"development", "oracle"}
    add_languages(folder, found={"none": 0.9, "mlm": 0.4, "od": 0.5})
    own = several_languages(made).analyse()
    of_method = own.summary.set_index("method")
    assert of_method["retrieval_development"].to_dict() == pytest.approx(
        {"teacher": 0.75, "none": 0.675, "mlm": 0.3, "od": 0.375}
    )
    assert own.headline["rule"] == "retrieval_development" and own.headline["students"]["L3-H384"]["method"] == "od"
    picks = own.selection.set_index("rule")
    assert picks["method"].to_dict() == {"development": "mlm", "retrieval_development": "od", "oracle": "mlm"}
    assert picks["regret"].tolist() == pytest.approx([0, 100 * 0.1 / of_method.loc["teacher", "test"], 0])
    advised = own.recommendation
    assert advised[["method", "rule"]].values.tolist() == [
        ["teacher", "retrieval_development"],
        ["od", "retrieval_development"],
    ]
    words = "retrieval of translations"
    assert f"Methods were chosen by {words}. " in table(advised).to_html()
    both = pd.concat([advised.assign(setting="several"), before.recommendation])
    assert f"chosen by {words} (Several) and development scores (English). " in table(both).to_html()
    said = cards(made.plan, advised.assign(recommended=True)).data
    assert "of 2 methods the best at retrieval on development data" in said
    assert "best at retrieval on development data" in presentation.headline([own]).to_html()
    learnt = [task for task in made.comparison.tasks if task != "retrieval"]
    assert [name for name in presentation.scores(own).data if name in (*learnt, "retrieval")] == learnt
    files = write_comparison(own, tmp_path / "written")
    assert all(path.is_file() for path in files)


def test_a_model_of_the_grid_without_the_development_pairs_of_the_teacher_is_refused(tmp_path):
    made = make_study(tmp_path, ["none", "mlm"], ["L3-H384"])
    folder = write_grid(made)
    add_languages(folder, found={})
    path = folder / "mlm_L3-H384_1.json"
    content = json.loads(path.read_text())
    del content["probes"]["retrieval"]["development"]
    change(path, probes=content["probes"])
    with pytest.raises(StudyError, match=r"mlm_L3-H384_1.json: probes.retrieval.development = \[\]; allowed: \['es'"):
        several_languages(made).analyse()
