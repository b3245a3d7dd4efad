"""The grid of a study on clusters larger than those at hand: queues, stragglers, failures and a serial driver.

It follows :mod:`study.grid`: one driver reads the plan, submits what can run and waits; when stages have ended it puts
all of them on record, reads the plan again and submits what they set free. Ray starts what was submitted in that order.
"""

from __future__ import annotations

import heapq
import itertools
from collections import deque
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, replace
from math import inf

import numpy as np
import pandas as pd

from study.cells import Cells
from study.grid import RETRIES, next_stages


@dataclass(frozen=True)
class Job:
    """A stage: seconds on one GPU, names of those that it waits for, and seconds from checkpoint to checkpoint."""

    name: str
    seconds: float
    after: tuple[str, ...] = ()
    saved: float = inf


@dataclass(frozen=True)
class Driver:
    """Seconds of one turn: ``turn``, ``read`` a stage on record, and ``write`` a stage on record for each writing.

    ``together``: all that have ended are put on record in one writing of dvc.lock, else each in one of its own.
    """

    turn: float = 0.0
    read: float = 0.0
    write: float = 0.0
    together: bool = True

    def seconds(self, recorded: int, ended: int) -> float:
        """Of a turn that puts ``ended`` stages on record."""
        writings = min(ended, 1) if self.together else ended
        return self.turn + (recorded + ended) * (self.read + self.write * writings)


@dataclass(frozen=True)
class Machines:
    """``failures``: of a GPU in an hour at work; ``restart``: seconds that it is gone then.

    ``stragglers``: share of attempts that take ``slowness`` times as long.
    """

    gpus: int
    failures: float = 0.0
    restart: float = 300.0
    stragglers: float = 0.0
    slowness: float = 2.0

    def draw(self, random: np.random.Generator) -> tuple[float, float]:
        """Of an attempt: how many times as long it takes, and the seconds after which it is lost."""
        lost = random.exponential(3600 / self.failures) if self.failures else inf
        return (self.slowness if random.random() < self.stragglers else 1.0), lost


@dataclass
class Schedule:
    """What came of it: seconds when each stage was on record, those given up, and seconds at work."""

    recorded: dict[str, float] = field(default_factory=dict)
    failed: list[str] = field(default_factory=list)
    gpus: float = 0.0
    driver: float = 0.0

    @property
    def seconds(self) -> float:
        """Until the last stage was on record."""
        return max(self.recorded.values(), default=0.0)


def simulate(
    jobs: list[Job], machines: Machines, driver: Driver, draw: Callable[[str], tuple[float, float]] | None = None
) -> Schedule:
    """Run ``jobs`` once. ``draw``: for a stage's attempt, as :meth:`Machines.draw`; by default that one, of seed 0."""
    random, order = np.random.default_rng(0), itertools.count()
    draw = draw or (lambda name: machines.draw(random))
    schedule, left = Schedule(), {job.name: job.seconds for job in jobs}
    waiting, attempts = list(jobs), dict.fromkeys(left, 0)
    free, in_turn = machines.gpus, False
    queue: deque[Job] = deque()
    submitted: set[str] = set()  # and not on record yet
    ended: list[Job] = []
    events: list[tuple[float, int, str, tuple[Job, ...]]] = [(0.0, next(order), "begin", ())]

    def at(seconds: float, kind: str, *what: Job) -> None:
        heapq.heappush(events, (seconds, next(order), kind, what))

    while events:
        now, _, kind, what = heapq.heappop(events)
        if kind in ("end", "gone"):
            free, ended = free + (kind == "end"), [*ended, *what]
        elif kind == "lost":  # Ray submits the stage again
            queue.extend(what)
        elif kind == "back":
            free += 1
        elif kind == "turn":
            in_turn = False
            schedule.recorded |= {job.name: now for job in what if job.name not in schedule.failed}
            submitted -= {job.name for job in what}
            ready = [job for job in waiting if schedule.recorded.keys() >= set(job.after)]
            chosen = next_stages(ready, submitted)
            queue.extend(chosen)
            submitted |= {job.name for job in chosen}
            waiting = [job for job in waiting if job not in chosen]
        while free and queue:
            job, free = queue.popleft(), free - 1
            slow, lost = draw(job.name)
            attempts[job.name] += 1
            needed = left[job.name] * slow
            schedule.gpus += min(needed, lost)
            if lost >= needed:
                at(now + needed, "end", job)
                continue
            at(now + lost + machines.restart, "back")
            if attempts[job.name] <= RETRIES:
                left[job.name] -= lost / slow // job.saved * job.saved if job.saved < inf else 0.0
                at(now + lost, "lost", job)
            else:
                schedule.failed.append(job.name)
                at(now + lost, "gone", job)
        at_once = events and events[0][0] == now  # looked at first: they are of the same turn
        if not in_turn and not at_once and (ended or kind == "begin"):
            taken, in_turn = driver.seconds(len(schedule.recorded), len(ended)), True
            schedule.driver += taken
            at(now + taken, "turn", *ended)
            ended = []
    return schedule


def bounds(jobs: list[Job], gpus: int) -> tuple[float, float]:
    """Seconds below which no schedule ends: the longest chain of stages, and all work over all GPUs."""
    chains: dict[str, float] = {}
    for job in jobs:  # those that a job waits for stand before it
        chains[job.name] = job.seconds + max((chains[name] for name in job.after), default=0.0)
    return max(chains.values()), sum(job.seconds for job in jobs) / gpus


def jobs_of(cells: Cells, seconds: Mapping[str, float], saved: Mapping[str, float], otherwise: float) -> list[Job]:
    """The stages of a study; those without measured or predicted ``seconds`` take ``otherwise``."""
    return [
        Job(name, seconds.get(name, otherwise), tuple(after), saved.get(name, inf))
        for name, after in cells.graph().items()
    ]


def clusters(
    cells: Cells, seconds: Mapping[str, float], drivers: Mapping[str, Driver], devices: int, machines: Machines
) -> pd.DataFrame:
    """The grid of a study on 8, 64 and 512 GPUs under each driver, one row each, and what it waits for.

    Columns: study, stages, gpus, recorded (name of the driver), hours, busy_percent (of the GPUs), hours of the longest
    chain, of all work over all GPUs and of the driver, bottleneck (the longest of these), failed (stages given up).

    Args:
        seconds: of stages, with a checkpoint at every hundredth of each; what is not known takes a minute. devices:
            GPUs that a stage takes. machines: their failures and stragglers, of one GPU; their number is not read.
    """
    jobs = jobs_of(cells, seconds, {job: own / 100 for job, own in seconds.items()}, otherwise=60.0)
    name = cells.plan.profile + (f", {devices} a run" if devices > 1 else "")
    rows = []
    for gpus, (recorded, driver) in itertools.product((8, 64, 512), drivers.items()):
        groups = replace(machines, gpus=gpus // devices, failures=devices * machines.failures)
        outcome, (chain, work) = simulate(jobs, groups, driver), bounds(jobs, groups.gpus)
        limits = {"longest chain": chain, "GPUs": work, "driver": outcome.driver}
        busy = 100 * outcome.gpus / outcome.seconds / groups.gpus
        rows.append(
            {"study": name, "stages": len(jobs), "gpus": gpus, "recorded": recorded}
            | {"hours": outcome.seconds / 3600, "busy_percent": busy}
            | {f"{limit} (hours)": own / 3600 for limit, own in limits.items()}
            | {"bottleneck": max(limits, key=lambda limit: limits[limit]), "failed": len(outcome.failed)}
        )
    return pd.DataFrame(rows)
