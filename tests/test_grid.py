"""The stages of a study on a local Ray: what `dvc repro` leaves, also where workers are killed; refusals."""

from __future__ import annotations

import os
import shutil
import socket
import sys
from types import SimpleNamespace

import pytest
from test_cells import names, shell, study_of

from study import StudyError, grid
from study.cells import Cells
from study.grid import Request, run_grid
from study.params import read_yaml

try:
    import ray
except ImportError:
    ray = None
on_ray = pytest.mark.skipif(ray is None, reason="Ray is not installed (pip install --constraint constraints.txt ray)")

#: `crash` leaves a checkpoint and kills its worker, as often as `kills` says; `wrong` fails; `timed` runs alone.
PIPELINE = """
stages:
  distill:
    foreach: [one, two]
    do:
      cmd: mkdir -p out/${item} && tr a-z A-Z < plan/${item}.json > out/${item}/text
      deps: ["plan/${item}.json"]
      outs: ["out/${item}"]
  crash:
    cmd: >-
      mkdir -p made && if [ -f checkpoint ]; then cat checkpoint > made/crash; else echo half > checkpoint;
      echo partial > made/crash; kill -9 $STUDY_STARTER; sleep 1; exit 1; fi
    deps: [plan/one.json]
    outs: [made/crash]
  latency:
    cmd: ls scratch/cells/*.started | wc -l | tr -d ' ' > alone
    deps: [plan/one.json]
    outs:
      - alone: {cache: false}
  join:
    cmd: cat out/*/text made/crash > all.txt
    deps: [out, made/crash]
    outs:
      - all.txt: {cache: false}
"""


@pytest.fixture(scope="module")
def local():
    """A Ray of this machine with two processors."""
    ray.init(num_cpus=2, include_dashboard=False, log_to_driver=False, logging_level="error")
    yield
    ray.shutdown()


@pytest.fixture
def study(tmp_path, monkeypatch) -> Cells:
    return study_of(tmp_path, monkeypatch, PIPELINE)


@on_ray
def test_a_grid_on_ray_leaves_what_dvc_repro_leaves_and_a_second_call_does_nothing(local, study, capsys):
    whole = study.plan.root.parent / "whole"
    shutil.copytree(study.plan.root, whole)
    (whole / "profiles" / "small" / "checkpoint").write_text("half\n")
    (whole / "profiles" / "small" / "scratch" / "cells").mkdir(parents=True)
    (whole / "profiles" / "small" / "scratch" / "cells" / "x.started").touch()
    assert shell(whole / "profiles" / "small", "dvc repro").returncode == 0
    run_grid(study, Request())
    told = capsys.readouterr().out
    locks = [read_yaml(root / "profiles" / "small" / "dvc.lock") for root in (study.plan.root, whole)]
    assert locks[0] == locks[1]  # in the order in which stages ended
    for name in ("all.txt", "out/one/text", "made/crash", "alone"):
        files = [root / "profiles" / "small" / name for root in (study.plan.root, whole)]
        assert files[0].read_bytes() == files[1].read_bytes(), name
    assert told.count("| done\n") == 5 and "failed 0" in told.splitlines()[-1]
    assert b"up to date" in shell(study.plan.folder, "dvc status").stdout
    assert not list(study.marks.glob("*.??????"))  # folders of tasks, the killed one's too
    run_grid(study, Request())
    assert capsys.readouterr().out == "nothing is stale\n"


@on_ray
def test_failures_are_named_all_else_runs_and_only_what_is_missing_runs_again(local, study, capsys):
    plan = study.plan.folder / "plan" / "two.json"
    (study.plan.folder / "checkpoint").write_text("half\n")
    text = plan.read_text()
    (study.plan.folder / "dvc.yaml").write_text(PIPELINE.replace("tr a-z A-Z <", "grep -v two"))
    with pytest.raises(StudyError, match=r"^distill@two: exit code 1 \(.*distill@two.log\)$"):
        run_grid(study, Request())
    assert "failed 1" in capsys.readouterr().out and not (study.plan.folder / "all.txt").exists()
    assert (study.plan.folder / "out" / "one").is_dir() and not (study.plan.folder / "out" / "two").exists()
    plan.write_text(text + "more\n")
    run_grid(study, Request())
    assert [line.split(" ")[0] for line in capsys.readouterr().out.splitlines() if line.endswith("| done")] == [
        "distill@two",
        "join",
    ]


@on_ray
def test_a_study_whose_parameters_change_meanwhile_starts_nothing_more(local, study):
    (study.plan.root / "params.yaml").write_text("a: 1\n")
    (study.plan.folder / "checkpoint").write_text("half\n")
    changing = PIPELINE.replace(
        "cat checkpoint > made/crash", "cat checkpoint > made/crash; echo b >> ../../params.yaml"
    )
    (study.plan.folder / "dvc.yaml").write_text(changing)
    with pytest.raises(StudyError, match="params.yaml changed while the study was run"):
        run_grid(study, Request())
    assert names(study.ready()[0]) == ["latency", "join"]  # what ran is on record


@pytest.mark.parametrize(
    ("gpus", "cpus", "granted"),
    [
        (None, 4, (1.0, 10)),  # 8 on one machine, 2 on the other
        (0.5, 2, (0.5, 20)),
        (4.0, 4, (4.0, 2)),
        (2.5, 1, "2.5 GPUs a task; allowed: 0 to 1, or a whole number to 8"),
        (16.0, 1, "16 GPUs a task; allowed: 0 to 1, or a whole number to 8"),
        (8.0, 5, "5 CPUs a task; allowed: 1 to 4, as the largest machine has for each of 8 processes"),
    ],
)
def test_what_tasks_get_of_two_machines(gpus, cpus, granted):
    machines = [{"Alive": True, "Resources": {"CPU": 4.0 * n, "GPU": float(n)}} for n in (8, 2)]
    ray = SimpleNamespace(nodes=lambda: machines)
    if isinstance(granted, tuple):
        assert grid._granted(ray, Request(cpus, gpus)) == granted
    else:
        with pytest.raises(StudyError, match=granted):
            grid._granted(ray, Request(cpus, gpus))


@on_ray
@pytest.mark.parametrize(
    ("request_", "told"),
    [(Request(cpus=10_000), "10000 CPUs a task; allowed: 1 to "), (Request(gpus=2), "2 GPUs a task; allowed: 0")],
)
def test_what_a_cluster_does_not_have_is_told_in_one_line(local, study, request_, told):
    with pytest.raises(StudyError, match=told) as error:
        run_grid(study, request_)
    assert "\n" not in str(error.value) and names(study.ready()[0])


def test_a_second_driver_is_refused_and_says_which_is_the_first(study):
    with study.alone(), pytest.raises(StudyError, match=rf"already: process {os.getpid()} of {socket.gethostname()}"):
        run_grid(Cells(study.plan), Request())
    with study.alone():  # the first is gone
        pass


def test_without_ray_or_at_an_address_that_does_not_answer_one_line_says_so(study, monkeypatch):
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]  # nothing listens
        if ray is not None:
            for address in (f"127.0.0.1:{port}", "nowhere", "host:port"):
                with pytest.raises(StudyError, match=f"RAY_ADDRESS = {address} does not answer"):
                    run_grid(study, Request(address=address))
    monkeypatch.setitem(sys.modules, "ray", None)
    with pytest.raises(StudyError, match=r"Ray is not installed .* constraints.txt --editable '.\[cluster\]'"):
        run_grid(study, Request())


@on_ray
def test_a_machine_that_does_not_share_the_folder_stops_the_grid(local, study, monkeypatch):
    """Its probe reads a folder of the same name that is another."""
    probe = grid.probe
    monkeypatch.setattr(grid, "probe", lambda file, token: probe(f"{file}-elsewhere", token))
    with pytest.raises(
        StudyError, match=rf"of {socket.gethostname()} is not that of .*allowed: a folder that all share"
    ):
        run_grid(study, Request())
    assert len(names(study.ready()[0])) == 4 and not (study.marks / "probe").exists()


def test_a_folder_that_is_not_shared_is_found(tmp_path):
    (tmp_path / "probe").write_text("token")
    assert grid.probe(str(tmp_path / "probe"), "token") == ""
    assert grid.probe(str(tmp_path / "probe"), "of another study") == f"{tmp_path} of {socket.gethostname()}"
    assert grid.probe(str(tmp_path / "elsewhere" / "probe"), "token").startswith(str(tmp_path / "elsewhere"))
