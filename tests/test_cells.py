"""Commands of stale stages, run by anything, and their outcomes on record: as `dvc repro` would leave them."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path
from threading import Thread

import pytest

from study import StudyError, cells
from study.cells import Cells, unlock
from study.plan import Plan

PIPELINE = """
stages:
  make:
    foreach: [one, two]
    do:
      cmd: mkdir -p out/${item} && tr a-z A-Z < plan/${item}.json > out/${item}/text
      deps: ["plan/${item}.json"]
      outs: ["out/${item}"]
  join:
    cmd: cat out/*/text > all.txt
    deps: [out]
    outs:
      - all.txt: {cache: false}
"""


def shell(folder: Path, command: str) -> subprocess.CompletedProcess:
    path = os.pathsep.join([str(Path(sys.executable).parent), os.environ["PATH"]])
    return subprocess.run(["sh", "-c", command], cwd=folder, env=os.environ | {"PATH": path}, capture_output=True)


def study_of(tmp_path: Path, monkeypatch, pipeline: str) -> Cells:
    """A profile of some stages under DVC, none of which has run."""
    folder = tmp_path / "study" / "profiles" / "small"
    (folder / "plan").mkdir(parents=True)
    (folder / "dvc.yaml").write_text(pipeline)
    for name in ("one", "two"):
        (folder / "plan" / f"{name}.json").write_text(f"the {name}\n")
    assert shell(tmp_path / "study", "dvc init --no-scm --quiet && dvc config core.analytics false").returncode == 0
    monkeypatch.setattr(cells, "write_plan", lambda plan: 0)  # what it writes stands above
    return Cells(Plan("small", tmp_path / "study", folder, None, []))


@pytest.fixture
def study(tmp_path, monkeypatch) -> Cells:
    return study_of(tmp_path, monkeypatch, PIPELINE)


def names(stages) -> list[str]:
    return [stage.name for stage in stages]


def run(study: Cells, stage) -> int:
    command = study.command(stage)
    assert "\n" not in command
    return shell(study.plan.root, command).returncode


def test_waves_of_commands_leave_what_dvc_repro_leaves(study):
    whole = study.plan.root.parent / "whole"
    shutil.copytree(study.plan.root, whole)
    assert shell(whole / "profiles" / "small", "dvc repro").returncode == 0
    waves = []
    while (wave := study.ready())[0]:
        for stage in reversed(wave[0]):  # in any order
            assert run(study, stage) == 0 and study.state(stage) == "finished"
        waves.append((names(wave[0]), names(wave[1]), study.record()[0]))
    assert waves == [(["make@one", "make@two"], ["join"], ["make@one", "make@two"]), (["join"], [], ["join"])]
    for name in ("dvc.lock", "all.txt", "out/one/text"):
        files = [root / "profiles" / "small" / name for root in (study.plan.root, whole)]
        assert files[0].read_bytes() == files[1].read_bytes()
    assert b"up to date" in shell(study.plan.folder, "dvc status").stdout
    assert study.ready() == ([], []) and study.record() == ([], {})
    assert names(study.all()) == ["make@one", "make@two", "join"] and names(study.all("join")) == ["join"]


def test_a_failed_one_is_not_put_on_record_and_can_be_run_again(study):
    (one, two), _ = study.ready("make")
    text = (study.plan.folder / "plan" / "one.json").read_text()
    (study.plan.folder / "plan" / "one.json").unlink()
    assert run(study, one) != 0 and study.state(one) == "started" and study.state(two) == "not started"
    assert study.record() == ([], {}) and not (study.plan.folder / "out" / "one").exists()  # all in its own
    (study.plan.folder / "plan" / "one.json").write_text(text)
    assert run(study, one) == 0 and study.record() == (["make@one"], {}) and names(study.ready()[0]) == ["make@two"]


def test_what_ran_on_inputs_that_changed_meanwhile_is_not_put_on_record(study):
    (one, two), _ = study.ready()
    assert run(study, one) == run(study, two) == 0
    (study.plan.folder / "plan" / "two.json").write_text("another\n")
    assert study.record() == (["make@one"], {"make@two": "plan/two.json changed after it began"})
    ready, waiting = study.ready()
    assert names(ready) == ["make@two"] and names(waiting) == ["join"]
    assert run(study, ready[0]) == 0 and study.record() == (["make@two"], {})
    assert (study.plan.folder / "out" / "two" / "text").read_text() == "ANOTHER\n"


def test_what_is_gone_is_named_and_all_else_is_put_on_record(study):
    (one, two), _ = study.ready()
    assert run(study, one) == run(study, two) == 0
    (study.plan.folder / "plan" / "one.json").unlink()
    assert study.record() == (["make@two"], {"make@one": "plan/one.json is missing"})
    (study.plan.folder / "plan" / "one.json").write_text("the one\n")
    assert names(study.ready()[0]) == ["make@one"]


def test_what_is_made_on_a_disk_of_the_node_is_put_in_place_whole(study, monkeypatch):
    """The last move is within one file system: readers see all of it or nothing."""
    local, moves = (
        Path(tempfile.mkdtemp(dir="/dev/shm" if Path("/dev/shm").is_dir() else None)),
        study.plan.root / "log",
    )
    wrapper = study.plan.root / "bin" / "mv"
    wrapper.parent.mkdir()
    wrapper.write_text(
        f"#!{sys.executable}\nimport os, shutil, sys\nfrom pathlib import Path\na, b = map(Path, sys.argv[1:])\n"
        f'same = a.stat().st_dev == b.parent.stat().st_dev\nprint(b, same, file=open("{moves}", "a"))\n'
        "shutil.move(a, b)\n"
    )
    wrapper.chmod(0o755)
    monkeypatch.setenv("STUDY_SCRATCH", str(local))
    one, _ = study.ready()[0]
    path = os.pathsep.join([str(wrapper.parent), os.environ["PATH"]])
    done = subprocess.run(["sh", "-c", study.command(one)], cwd=study.plan.root, env=os.environ | {"PATH": path})
    assert done.returncode == 0
    moved = dict(line.split() for line in moves.read_text().splitlines())
    assert moved["out/one"] == moved["scratch/cells/make@one.finished"] == "True" and len(moved) == 3
    assert (study.plan.folder / "out" / "one" / "text").read_text() == "THE ONE\n" and not list(local.iterdir())
    assert study.record() == (["make@one"], {}) and not list(study.marks.glob("*.??????"))
    local.rmdir()


@pytest.mark.parametrize("name", ["local", "disk", "own", "kept"])
def test_a_command_removes_no_folder_that_the_environment_names(study, tmp_path_factory, monkeypatch, name):
    precious = tmp_path_factory.mktemp("precious")
    monkeypatch.setenv(name, str(precious))
    assert run(study, study.ready()[0][0]) == 0
    assert precious.is_dir()


def test_locks_of_ended_processes_are_dropped_without_a_word(study):
    """And no others: of another profile, the lock stays; a process that runs is told before DVC meets it."""
    ended = subprocess.Popen(["true"])
    ended.wait()
    file, out = study.plan.root / ".dvc" / "tmp" / "rwlock", str(study.plan.folder / "out")
    dead, alive = ({"pid": process, "cmd": "dvc repro"} for process in (ended.pid, os.getpid()))
    other = str(study.plan.root / "profiles" / "other" / "out")

    def repro(**write) -> subprocess.CompletedProcess:
        file.write_text(json.dumps({"write": write, "read": {other: [dead], f"{out}/two": [dead]}}))
        return shell(study.plan.folder, "dvc repro make@one")

    assert b"had been killed" in repro(**{f"{out}/one": dead}).stderr
    shutil.rmtree(out)
    held = {"write": {f"{out}/one": dead, other: dead}, "read": {out: [dead, alive], other: [dead]}}
    file.write_text(json.dumps(held))
    unlock(study.plan)
    assert json.loads(file.read_text()) == {"write": {other: dead}, "read": {out: [alive], other: [dead]}}
    file.write_text(json.dumps({"write": {other: alive}, "read": {}}))
    unlock(study.plan)
    outcome = shell(study.plan.folder, "dvc repro make@one")
    assert outcome.returncode == 0 and b"had been killed" not in outcome.stderr
    file.write_text(json.dumps(held | {"write": {f"{out}/one": alive, f"{out}/two": dead}}))
    with pytest.raises(StudyError, match=rf"small: process {os.getpid()} \(dvc repro\) runs its stages already"):
        unlock(study.plan, seconds=0)
    assert json.loads(file.read_text())["write"] == {f"{out}/one": alive}
    ending = subprocess.Popen(["sleep", "1"])  # of a call that was killed
    Thread(target=ending.wait).start()  # else it stays a number without a process
    file.write_text(json.dumps({"write": {f"{out}/one": {"pid": ending.pid, "cmd": "dvc repro"}}, "read": {}}))
    unlock(study.plan)
    assert json.loads(file.read_text()) == {"write": {}, "read": {}}
    file.write_text('{"write": {')
    with pytest.raises(StudyError, match=f"corrupted; delete {file} if no other"):
        unlock(study.plan)


def test_machines_without_a_shared_folder_hand_outcomes_on_by_a_remote_of_dvc(study):
    """One runs and records the first stages and pushes them; the other takes its dvc.lock, pulls, and does the rest."""
    root = study.plan.root
    assert shell(root, f"dvc remote add --default store {root.parent / 'store'}").returncode == 0
    shutil.copytree(root, root.parent / "other")
    folder = root.parent / "other" / "profiles" / "small"
    other = Cells(Plan("small", root.parent / "other", folder, None, []))
    assert [run(study, stage) for stage in study.ready()[0]] == [0, 0] and len(study.record()[0]) == 2
    assert shell(study.plan.folder, "dvc push").returncode == 0
    shutil.copy(study.plan.folder / "dvc.lock", folder)
    assert shell(folder, "dvc pull --allow-missing").returncode == 0
    ready, waiting = other.ready()
    assert (names(ready), waiting) == (["join"], []) and run(other, ready[0]) == 0
    assert other.record() == (["join"], {}) and other.ready() == ([], [])
    assert (folder / "all.txt").read_text() == "THE ONE\nTHE TWO\n"


def test_only_paths_are_put_elsewhere_in_a_command(study):
    """Of the real pipeline: `python -m study plan` writes the folder `plan`."""
    here = Cells(Plan("small", study.plan.root, study.plan.folder, None, []))
    (study.plan.folder / "dvc.yaml").write_text(
        "stages: {plan: {cmd: echo plan > plan, outs: [plan]}, b: {cmd: cp a/b+c a/b && touch a/b.x, outs: [a/b]}}"
    )
    plan, other = here.all()
    assert "rm -rf plan && echo plan > plan && mv " in here.command(plan)
    assert "cp a/b+c $own/a/b && touch a/b.x && mkdir -p" in here.command(other)
