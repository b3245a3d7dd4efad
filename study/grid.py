"""The stale stages of a study as tasks of a Ray cluster: one driver submits their commands and alone records outcomes.

A task runs the command of :class:`study.cells.Cells`: what a stage makes is whole or not there, and a task that Ray
starts again continues from the stage's checkpoint. A command ends soon after the process of Ray that started it.
"""

from __future__ import annotations

import logging
import os
import shutil
import socket
import statistics
import sys
import time
import uuid
from collections.abc import Collection, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from study.cells import TRAINS, Cells, kind_of
from study.files import StudyError

#: Kinds of stages that compute with models: they get the GPUs, or parts of one.
WITH_MODELS = ("teacher", "reference", "distill", "admit", "evaluate", "represent", "latency")
#: The kind that measures seconds: such a stage runs while no other does.
ALONE = "latency"
#: How often Ray starts a task again whose worker or machine is lost.
RETRIES = 3
#: Seconds that a probe of the shared folder has to answer.
PATIENCE = 60.0


@dataclass(frozen=True)
class Request:
    """What a task asks for: ``cpus``, which are its threads too; ``gpus`` of stages with models.

    ``gpus`` None: one where the cluster has any; several: a student is trained by a process on each, all else gets one.
    ``address``: ``auto`` or host:port; None: a Ray of this machine alone.
    """

    cpus: int = 1
    gpus: float | None = None
    address: str | None = None


def run_grid(cells: Cells, request: Request) -> None:
    """Run every stale stage and put it on record, until none is left that can run.

    Raises:
        StudyError: Ray is missing or does not answer, the cluster lacks what is asked for or does not share the folder,
            another driver runs, params.yaml changed meanwhile, or stages failed (all others are on record then).
    """
    with cells.alone(), _cluster(request.address) as ray:
        gpus, slots = _granted(ray, request)
        _check_shared(ray, cells.marks)
        Driver(ray, cells, request.cpus, gpus, slots).run()
    shutil.rmtree(cells.plan.folder / "scratch" / "teacher_outputs", ignore_errors=True)


def next_stages(ready: list[Any], running: Collection[Any]) -> list[Any]:
    """Of the stages that can run: all that may do so side by side, or one of those that have to run alone."""
    if any(kind_of(stage) == ALONE for stage in running):
        return []
    together = [stage for stage in ready if kind_of(stage) != ALONE]
    return together or ([] if running else ready[:1])


@dataclass
class Driver:
    """Submits what can run, waits for any of it, records all that has ended, and tells how far it is."""

    ray: Any
    cells: Cells
    cpus: int
    gpus: float
    slots: int
    running: dict[Any, Any] = field(default_factory=dict)
    failed: dict[str, str] = field(default_factory=dict)
    seconds: list[float] = field(default_factory=list)

    def run(self) -> None:
        """See :func:`run_grid`."""
        params, problems = self._params(), []
        while True:
            ready, waiting = self.cells.ready(busy=[stage.name for stage in self.running.values()])
            ready = [stage for stage in ready if stage.name not in self.failed]
            if self._params() != params:
                told = "so that nothing more was started: run it again"
                problems = [f"params.yaml changed while the study was run, {told}"]
            for stage in [] if problems else next_stages(ready, self.running.values()):
                ready.remove(stage)
                self._submit(stage)
            if self.seconds or self.failed or self.running:
                self._tell(len(ready) + len(waiting))
            if not self.running:
                break
            self.ray.wait(list(self.running))
            for reference in self.ray.wait(list(self.running), num_returns=len(self.running), timeout=0.0)[0]:
                self._end(reference)
            _, refused = self.cells.record()  # all that ended meanwhile: the plan is read once, which takes longest
            self.failed |= refused
        problems += [f"{name}: {why} ({self._log(name)})" for name, why in self.failed.items()]
        if problems:
            raise StudyError("; ".join(problems))
        if not self.seconds:
            print("nothing is stale", flush=True)

    def _submit(self, stage: Any) -> None:
        together = max(1, int(self.gpus)) if kind_of(stage) == TRAINS else 1
        gpus = 0 if kind_of(stage) not in WITH_MODELS else together if self.gpus > 1 else self.gpus
        resources = {"num_cpus": self.cpus * together, "num_gpus": gpus}
        log = self._log(stage.name)
        log.unlink(missing_ok=True)
        variables = {
            "PATH": os.pathsep.join([str(Path(sys.executable).parent), os.environ["PATH"]]),
            "OMP_NUM_THREADS": str(self.cpus),
            "TOKENIZERS_PARALLELISM": "false",
        }
        task = self.ray.remote(run_command).options(name=stage.name, max_retries=RETRIES, **resources)
        reference = task.remote(self.cells.command(stage, together), str(self.cells.plan.root), str(log), variables)
        self.running[reference] = stage

    def _end(self, reference: Any) -> None:
        stage = self.running.pop(reference)
        try:
            code, last, seconds = self.ray.get(reference)
            problem = "" if code == 0 else last or f"exit code {code}"
        except self.ray.exceptions.RayError as error:
            problem = f"lost {RETRIES + 1} times: {type(error).__name__}"
        if problem:
            self.failed[stage.name] = problem
        else:
            self.seconds.append(seconds)
        print(f"{stage.name} | {'failed: ' + problem if problem else 'done'}", flush=True)

    def _tell(self, others: int) -> None:
        """Time left supposes that all others take as long as those that ended, and as many at a time."""
        running = min(len(self.running), self.slots)  # the rest of what was submitted has no room yet
        others += len(self.running) - running
        line = f"done {len(self.seconds)} | running {running} | waiting {others} | failed {len(self.failed)}"
        if self.seconds and running:
            left = int(statistics.fmean(self.seconds) * (0.5 + others / running))
            line += f" | about {left // 3600}:{left // 60 % 60:02d}:{left % 60:02d} left"
        print(line, flush=True)

    def _log(self, name: str) -> Path:
        return self.cells.marks / f"{name}.log"

    def _params(self) -> list[bytes]:
        files = {folder / "params.yaml" for folder in (self.cells.plan.root, self.cells.plan.folder)}
        return [file.read_bytes() for file in sorted(files) if file.is_file()]


def run_command(command: str, root: str, log: str, variables: dict[str, str]) -> tuple[int, str, float]:
    """On a worker: exit code of a shell command, the last line it printed, and its seconds.

    A command of an earlier attempt, which may take seconds to notice that its worker is gone, is waited for.
    """
    import fcntl
    import subprocess

    environment = os.environ | variables | {"STUDY_STARTER": str(os.getpid())}
    with open(f"{log}.lock", "a") as held, open(log, "a") as told:
        fcntl.flock(held, fcntl.LOCK_EX)
        began = time.monotonic()
        shell: dict[str, Any] = {"cwd": root, "env": environment, "pass_fds": [held.fileno()]}
        shell |= {"stdin": subprocess.DEVNULL, "stdout": told, "stderr": subprocess.STDOUT}
        ended = subprocess.run(["sh", "-c", command], **shell)
    lines = [line.strip() for line in Path(log).read_text(errors="replace").splitlines() if line.strip()]
    return ended.returncode, lines[-1] if lines else "", time.monotonic() - began


def probe(file: str, token: str) -> str:
    """On a worker: nothing, or the folder of ``file`` and the machine, where it does not hold ``token``."""
    path = Path(file)
    return "" if path.is_file() and path.read_text() == token else f"{path.parent} of {socket.gethostname()}"


def _check_shared(ray: Any, folder: Path) -> None:
    from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy

    file, token = folder / "probe", uuid.uuid4().hex
    file.write_text(token)
    try:
        there = [NodeAffinitySchedulingStrategy(n["NodeID"], soft=False) for n in ray.nodes() if n["Alive"]]
        tasks = [ray.remote(probe).options(num_cpus=0, scheduling_strategy=node) for node in there]
        wrong = [place for place in ray.get([t.remote(str(file), token) for t in tasks], timeout=PATIENCE) if place]
    except ray.exceptions.RayError as error:
        raise StudyError(f"a task of Ray failed: {' '.join(str(error).split())[-200:]}") from None
    finally:
        file.unlink()
    if wrong:
        raise StudyError(f"{', '.join(wrong)} is not that of {socket.gethostname()}; allowed: a folder that all share")


def _granted(ray: Any, request: Request) -> tuple[float, int]:
    """GPUs of a task with models, and how many of these tasks have room at a time."""
    nodes = [node["Resources"] for node in ray.nodes() if node["Alive"]]
    cpus, gpus = (max(node.get(key, 0) for node in nodes) for key in ("CPU", "GPU"))
    wanted = min(1.0, gpus) if request.gpus is None else request.gpus
    if not 0 <= wanted <= gpus or (wanted > 1 and wanted % 1):
        several = f"0 to 1, or a whole number to {gpus:.0f}, as the largest machine has"
        raise StudyError(f"{wanted:g} GPUs a task; allowed: {several if gpus else '0, since the cluster has none'}")
    together = max(1, int(wanted))
    if not 1 <= request.cpus <= cpus // together:
        allowed = f"1 to {cpus // together:.0f}, as the largest machine has for each of {together} processes"
        raise StudyError(f"{request.cpus} CPUs a task; allowed: {allowed}")
    taken = request.cpus * together
    rooms = [[n.get("CPU", 0) / taken, *([n.get("GPU", 0) / wanted] if wanted else [])] for n in nodes]
    return wanted, sum(int(min(room)) for room in rooms)


@contextmanager
def _cluster(address: str | None) -> Iterator[Any]:
    """Ray: the one that this process is connected to, the one at an address, or one that ends with the driver."""
    os.environ |= {"RAY_USAGE_STATS_ENABLED": "0", "RAY_ACCEL_ENV_VAR_OVERRIDE_ON_ZERO": "1"}
    try:
        import ray
    except ImportError:
        command = "python -m pip install --constraint constraints.txt --editable '.[cluster]'"
        raise StudyError(f"ENGINE=ray: Ray is not installed in this environment; allowed: after `{command}`") from None
    if address is None and ray.is_initialized():
        yield ray
        return
    if address not in (None, "auto"):
        _check_answers(str(address))
    alone: dict[str, Any] = {} if address else {"include_dashboard": False, "object_store_memory": 2**27}
    try:
        ray.init(address=address or "local", log_to_driver=False, logging_level=logging.ERROR, **alone)
    except (ConnectionError, RuntimeError, ValueError) as error:
        told = " ".join(str(error).split())[:200]
        raise StudyError(f"RAY_ADDRESS = {address}: {told}; allowed: auto or host:port of a running Ray") from None
    try:
        yield ray
    finally:
        ray.shutdown()


def _check_answers(address: str) -> None:
    host, _, port = address.rpartition(":")
    try:
        socket.create_connection((host, int(port)), timeout=5.0).close()
    except (OSError, ValueError, OverflowError) as error:
        allowed = "auto or host:port of a running Ray, from one of its machines"
        raise StudyError(f"RAY_ADDRESS = {address} does not answer ({error}); allowed: {allowed}") from None
