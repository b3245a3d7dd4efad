"""What a plan costs on GPUs: every objective is counted, and numbers follow devices, memory and candidates."""

from __future__ import annotations

import json
from dataclasses import replace

import pandas as pd
import pytest
import tiny

import study
from study import StudyError
from study.descriptions import Run
from study.methods import METHOD, PARTS
from study.speed import cost
from study.speed.grid_cost import (
    H100,
    checks,
    compared,
    fit_traffic,
    grid_cost,
    known_results,
    measured_stages,
    predicted_stages,
    shared_card_steps,
    workload_of,
)
from study.speed.tables import predictions, waits

CARD = cost.Device("made up", 1e12, 1e11, memory=1e9, link=1e10, price=3.6)
OPTIONS = {
    "hidden_state": {"mapping": "top"},
    "attention_score": {"mapping": "top"},
    "attention_relation": {"relation_heads": 4},
}
OWN = {name: {"objective": name, "learning_rate": 1e-3, **OPTIONS.get(name, {})} for name in PARTS}
OWN["sampled"] = {"objective": "output_distribution", "learning_rate": 1e-3, "positions": "sampled"}
OWN["sum"] = {"objective": "sum", "learning_rate": 1e-3, "parts": [{"objective": "masked_language_modelling"}]}


@pytest.mark.parametrize("name", OWN)
def test_every_objective_is_counted(tmp_path, name):
    (run, *_) = tiny.plan(tmp_path, grid={"methods": ["mlm"]}).of(Run)
    run = run.model_copy(update={"objective": METHOD.validate_python(OWN[name])})
    work = workload_of(tiny.plan(tmp_path), run, 60)
    counted = cost.count(work)
    assert min(counted.flops, counted.bytes, counted.memory) > 0
    assert cost.count(replace(work, batch_size=2 * work.batch_size)).flops == 2 * counted.flops


def test_a_grid_costs_what_its_runs_do(tmp_path):
    grid = {"methods": ["none", "mlm", "hs-last"]}
    plan = tiny.plan(
        tmp_path, grid=grid, tuning={"students": {"english": ["L2-H24"]}, "learning_rates": [0.1, 0.2, 0.3]}
    )
    share = cost.Efficiency(0.5, 0.5)
    table = grid_cost(plan, {"english": 60}, CARD, share)
    assert list(table["kind"] + " " + table["method"]) == ["distill mlm", "distill hs-last", "tune mlm", "tune hs-last"]
    (work,) = (workload_of(plan, run, 60) for run in plan.of(Run) if run.method == "mlm")
    hours = cost.predict(work, CARD, share)["seconds"] / 3600
    assert table["hours"][0] == pytest.approx(hours) and table["dollars"][0] == pytest.approx(3.6 * hours)
    assert table["hours"][2] == pytest.approx(3 * hours * 4 / 6)  # three candidates of four steps instead of six
    assert set(table["accumulation"]) == {1} and set(table["exchange"]) == {0.0}
    both = grid_cost(plan, {"english": 60}, CARD, share, devices=2)
    assert both["gigabytes_exchanged"][0] == pytest.approx(4 * cost.count(work).parameters / 1e9)
    assert (both["hours"] < table["hours"]).all() and (both["dollars"] > table["dollars"]).all()
    half = cost.count(replace(work, batch_size=work.batch_size // 2)).memory
    small = replace(CARD, memory=half)
    assert grid_cost(plan, {"english": 60}, small, share)["accumulation"][0] == 2
    assert grid_cost(plan, {"english": 60}, replace(CARD, memory=1.0), share)["accumulation"].isna().all()
    with pytest.raises(StudyError, match="vocabularies: setting 'english' is missing"):
        grid_cost(plan, {}, CARD, share)
    assert known_results(plan) == {}


def test_the_share_of_bandwidth_comes_back_from_made_up_steps(tmp_path):
    plan = tiny.plan(tmp_path, grid={"methods": ["mlm", "od", "hs-last"]})
    works = [workload_of(plan, run, 60) for run in plan.of(Run)]
    seconds = [c.flops / (0.5 * CARD.flops) + c.bytes / (0.25 * CARD.bandwidth) for c in map(cost.count, works)]
    found = fit_traffic(pd.DataFrame({"workload": works, "seconds": seconds}), CARD)
    assert (found.flops, found.bytes) == pytest.approx((0.5, 0.25))


def test_stages_last_as_long_as_predicted_and_as_their_records_say(tmp_path):
    plan = tiny.plan(tmp_path, grid={"methods": ["none", "mlm"]})
    (run,) = (run for run in plan.of(Run) if run.method == "mlm")
    share = cost.Efficiency(0.5, 0.5)
    seconds = cost.predict(workload_of(plan, run, 60), CARD, share)["seconds"]
    assert predicted_stages(plan, {"english": 60}, CARD, share) == {f"distill@{run.name}": seconds}
    assert measured_stages(plan) == {}
    times = measured_stages(study.resolve("evidence"))  # committed
    assert times["distill@english_hs-last_L3-H192_1"] > 0 and "distill@english_none_L3-H192_1" not in times
    assert len([name for name in times if name.startswith("evaluate@")]) == 149


def test_a_step_on_a_shared_card_is_timed_while_the_card_is_full():
    """On the committed results of one H100; one run from its file: 625 steps beside 14 others."""
    plan = study.resolve("evidence")
    steps = shared_card_steps(plan, "english", {"large": 15})
    assert list(steps["method"].value_counts()) == [3] * 6 and set(steps["budget"]) == {"large"}
    file = plan.layout("english").results / "mlm_L3-H192_1_large.json"
    curve = json.loads(file.read_text())["distillation"]["curve"]
    assert (curve[0]["step"], curve[1]["step"]) == (0, 625)
    expected = (curve[1]["seconds"] - curve[0]["seconds"]) / 625 / 15
    assert steps[steps["method"] == "mlm"]["seconds"].iloc[0] == pytest.approx(expected)
    assert {work.attention for work in steps["workload"]} == {"sdpa"}
    errors = compared(steps, H100, fit_traffic)["error_percent"].abs()
    assert errors.mean() <= 20  # the aim, on methods left out of the fit


def test_the_model_is_checked_where_steps_were_measured(tmp_path):
    """Steps that follow the model are predicted as they are; a profile without results has no stages to check."""
    plan = tiny.plan(tmp_path, grid={"methods": ["mlm", "od", "hs-last"]})
    runs = plan.of(Run)
    works = [workload_of(plan, run, 60) for run in runs]
    seconds = [c.flops / (0.5 * CARD.flops) + c.bytes / (0.25 * CARD.bandwidth) for c in map(cost.count, works)]
    steps = pd.DataFrame({"method": [run.method for run in runs], "workload": works, "seconds": seconds})
    checked = checks(plan, steps, CARD, shared_card_steps(study.resolve("evidence"), "english", {"large": 15}))
    assert list(checked) == ["benchmark", "gpu"] and len(checked["gpu"]) == 18
    assert checked["benchmark"]["predicted"].tolist() == pytest.approx(seconds)
    assert checked["benchmark"]["error_percent"].abs().max() < 1e-6
    panels = predictions(checked).axes
    assert [len(axes.lines[1].get_xdata()) for axes in panels] == [3, 18]
    assert panels[0].lines[1].get_ydata().tolist() == pytest.approx([1e3 * own for own in seconds])


def test_scores_that_stay_on_the_chip_move_and_keep_nothing(tmp_path):
    plan = tiny.plan(tmp_path, grid={"methods": ["hs-last"]})
    (run,) = plan.of(Run)
    eager = workload_of(plan, run, 60)
    fused = replace(eager, attention="sdpa")
    with_scores, without = cost.count(eager), cost.count(fused)
    assert with_scores.flops == without.flops and with_scores.parameters == without.parameters
    layers = 3 * eager.student.layers * eager.student.heads + eager.teacher.layers * eager.teacher.heads
    scores = eager.tokens * eager.sequence_length * 2  # bytes of one head's
    assert with_scores.bytes - without.bytes == cost.SCORE_PASSES * layers * scores
    kept = eager.student.layers * eager.student.heads * scores
    assert with_scores.memory - without.memory == cost.SCORES_KEPT * kept


def test_hours_on_clusters_stand_above_their_bounds():
    rows = [(study, gpus, driver, gpus + 1.0) for study in "ab" for gpus in (8, 64) for driver in ("alone", "at once")]
    table = pd.DataFrame(rows, columns=["study", "gpus", "recorded", "hours"])
    table = table.assign(stages=7, **{"longest chain (hours)": 3.0, "GPUs (hours)": 64 / table["gpus"]})
    first, second = waits(table).axes
    assert (first.get_title(), second.get_title()) == ("a (7 stages)", "b (7 stages)")
    drawn = [(list(line.get_xdata()), list(line.get_ydata())) for line in second.lines]
    assert drawn == [([8, 64], [9, 65])] * 2 + [([8, 64], [3, 3]), ([8, 64], [8, 1])]
