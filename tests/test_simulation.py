"""The simulated grid against schedules by hand, and against what no schedule can beat or, if greedy, exceed."""

from __future__ import annotations

from math import inf
from types import SimpleNamespace

import numpy as np
import pytest
from test_cells import PIPELINE, names, run, study_of

from study.speed.simulation import Driver, Job, Machines, bounds, clusters, jobs_of, simulate


def drawn(*values):
    """What attempts meet, in the order in which they start; all others are plain."""
    left = list(values)
    return lambda name: left.pop(0) if left else (1.0, inf)


def test_two_machines_three_jobs_and_one_failure_by_hand():
    """a ends at 10. b (8 s, a checkpoint every 3) is lost at 7 with 6 saved, and waits; its machine is back at 12.

    At 10 the machine of a takes b again (2 s left, ends at 12); c, which waits for both, then takes 5: 17.
    """
    jobs = [Job("a", 10), Job("b", 8, saved=3), Job("c", 5, ("a", "b"))]
    schedule = simulate(jobs, Machines(2, restart=5), Driver(), drawn((1.0, inf), (1.0, 7.0)))
    assert schedule.recorded == {"a": 10, "b": 12, "c": 17}
    assert schedule.gpus == 10 + 7 + 2 + 5 and schedule.failed == [] and schedule.driver == 0
    unsaved = [Job("a", 10), Job("b", 8), Job("c", 5, ("a", "b"))]
    assert simulate(unsaved, Machines(2, restart=5), Driver(), drawn((1, inf), (1, 7))).seconds == 10 + 8 + 5


def test_stragglers_take_longer_and_what_is_lost_too_often_is_given_up():
    schedule = simulate([Job("a", 4), Job("b", 2)], Machines(1), Driver(), drawn((3.0, inf)))
    assert schedule.recorded == {"a": 12, "b": 14}
    jobs = [Job("a", 4), Job("b", 2), Job("c", 1, ("a",))]
    schedule = simulate(jobs, Machines(2, restart=0), Driver(), lambda name: (1.0, 1.0 if name == "a" else inf))
    assert schedule.failed == ["a"] and schedule.recorded == {"b": 2} and schedule.gpus == 4 * 1 + 2


def test_the_driver_is_serial_and_records_what_ended_meanwhile_together_or_one_by_one():
    """Turn: 1, and 0.5 a stage on record for reading, 2 for a writing.

    Turn of the start: 1. Four jobs of 10 end at 11: reading of 4 and one writing (1 + 4 x 2.5) or four (1 + 4 x 8.5).
    """
    jobs = [Job(name, 10) for name in "abcd"]
    for together, seconds in ((True, 11), (False, 35)):
        schedule = simulate(jobs, Machines(4), Driver(1, 0.5, 2, together))
        assert set(schedule.recorded.values()) == {11 + seconds} and schedule.driver == 1 + seconds


def test_what_is_measured_runs_alone():
    """As on Ray: after all that can run beside others, and nothing else meanwhile."""
    jobs = [Job("latency@a", 3), Job("latency@b", 3), Job("x", 5), Job("y", 1, ("latency@a",))]
    assert simulate(jobs, Machines(4), Driver()).recorded == {"x": 5, "latency@a": 8, "y": 9, "latency@b": 12}


@pytest.mark.parametrize("gpus", [1, 2, 7, 64])
def test_no_schedule_beats_the_bounds_and_a_greedy_one_stays_below_grahams(gpus):
    random = np.random.default_rng(gpus)
    for _ in range(20):
        jobs = []
        for i in range(40):
            after = random.choice(i, size=min(i, int(random.integers(3))), replace=False) if i else []
            jobs.append(Job(f"j{i}", float(random.exponential(10)), tuple(f"j{k}" for k in after)))
        chain, work = bounds(jobs, gpus)
        schedule = simulate(jobs, Machines(gpus), Driver())
        assert max(chain, work) <= schedule.seconds * (1 + 1e-9)
        assert schedule.seconds <= (work + (1 - 1 / gpus) * chain) * (1 + 1e-9)
        assert schedule.gpus == pytest.approx(gpus * work) and len(schedule.recorded) == 40
        worse = simulate(jobs, Machines(gpus, failures=30, restart=1, stragglers=0.2), Driver())
        assert worse.gpus > schedule.gpus


def test_stages_and_what_they_wait_for_are_those_of_the_pipeline(tmp_path, monkeypatch):
    study = study_of(tmp_path, monkeypatch, PIPELINE)
    jobs = {job.name: job for job in jobs_of(study, {"join": 5.0}, {"make@one": 2.0}, otherwise=1.0)}
    assert set(jobs["join"].after) == {"make@one", "make@two"} and jobs["join"].seconds == 5.0
    assert jobs["make@one"] == Job("make@one", 1.0, (), 2.0) and list(jobs)[-1] == "join"


def test_many_that_ended_are_put_on_record_in_one_writing(tmp_path, monkeypatch):
    """The part of the driver that the simulation names."""
    from dvc.dvcfile import Lockfile

    written, original = [], Lockfile.dump_stages
    monkeypatch.setattr(Lockfile, "dump_stages", lambda *a, **k: written.append(names(a[1])) or original(*a, **k))
    study = study_of(tmp_path, monkeypatch, PIPELINE)
    assert [run(study, stage) for stage in study.ready()[0]] == [0, 0]
    assert study.record() == (["make@one", "make@two"], {}) and written == [["make@one", "make@two"]]


def test_the_table_of_a_study_has_its_bounds_and_names_the_greatest():
    """A teacher of an hour, then 16 students of half an hour each, on 8, 64 and 512 GPUs."""
    names = [f"distill@{number}" for number in range(16)]
    graph = {"teacher@one": [], **{name: ["teacher@one"] for name in names}}
    cells = SimpleNamespace(graph=lambda: graph, plan=SimpleNamespace(profile="own"))
    seconds = {"teacher@one": 3600.0, **dict.fromkeys(names, 1800.0)}
    rows = clusters(cells, seconds, {"free": Driver()}, 1, Machines(gpus=1)).set_index("gpus")
    assert rows["hours"].to_dict() == {8: 2.0, 64: 1.5, 512: 1.5}
    assert rows["longest chain (hours)"].tolist() == [1.5] * 3 and rows.loc[8, "GPUs (hours)"] == 9 / 8
    assert rows.loc[8, "busy_percent"] == pytest.approx(100 * 9 / 16) and set(rows["bottleneck"]) == {"longest chain"}
    shared = clusters(cells, seconds, {"free": Driver()}, 8, Machines(gpus=1)).set_index("gpus")
    assert shared.loc[8, "hours"] == 9.0 and shared.loc[8, "bottleneck"] == "GPUs"  # one at a time
    assert set(rows["study"]) == {"own"} and set(shared["study"]) == {"own, 8 a run"}
