"""What a system beside the grid has to say of itself, and what runs it: arms x seeds, continued where it was killed."""

from __future__ import annotations

import shutil
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from pydantic import ValidationError

from study.descriptions import NeighbourSystem
from study.distillation.trainer import digest
from study.evaluation.provenance import input_hashes, provenance, weights_hash
from study.files import Layout, StudyError, write_file
from study.records import Record, write_record
from study.records_beside import Arm, Check, NeighbourResult

#: Arm -> measure -> value.
Measured = dict[str, dict[str, float]]


@dataclass(frozen=True)
class System:
    """A system: what is known of it, and how its arms are run.

    ``standing``: ``code-exact`` where its public code was read, ``published`` where its text was, ``our reading`` where
    parts of the source could not be had; ``unknown`` says which. ``equation``: in plain text, as pages show it.
    ``jobs``: what is run at every seed; ``run`` does one job with one seed and measures an arm by it, or several.
    ``words``: an arm's name in words. ``measures``: measure -> words, of a description's tasks; the first is the one
    that figures show. ``checks``: ordinal claims; those whose arms were not run are left out.
    """

    title: str
    source: str
    standing: Literal["code-exact", "published", "our reading"]
    equation: str
    reproduced: str
    unknown: tuple[str, ...]
    jobs: Callable[[Any], list[str]]
    run: Callable[[NeighbourSystem, Layout, str, int], Measured]
    words: Callable[[str], str]
    measures: Callable[[NeighbourSystem], dict[str, str]]
    checks: Callable[[Any], list[Check]]


class Finished(Record):
    """What one job measured at one seed, and the seconds it took."""

    seconds: float
    measured: Measured


def run_system(system: System, description: NeighbourSystem, layout: Layout, output: Path) -> NeighbourResult:
    """Run every job of a system at every seed and write the result file.

    Finished jobs are kept in ``scratch``, by the description and the hashes of what they read: a run that was killed
    goes on behind them.

    Raises:
        StudyError: the model, tasks or corpus are missing, or the file cannot be written.
    """
    options = description.options
    hashes = input_hashes(layout) | {"weights": weights_hash(description.folder(layout))}
    kept = layout.checkpoints / digest({"neighbour": description.model_dump(mode="json"), "inputs": hashes})
    todo = [(job, seed) for job in system.jobs(options) for seed in options.seeds]
    finished: dict[tuple[str, int], Finished] = {}
    for place, (job, seed) in enumerate(todo, start=1):
        file = kept / f"{job}_{seed}.json"
        finished[job, seed] = own = _kept(file) or _run(system, description, layout, (job, seed), file)
        print(
            f"{description.setting} {description.neighbour} | {job} seed {seed} | {own.seconds:.0f} s"
            f" | {len(todo) - place} of {len(todo)} left",
            flush=True,
        )
    measures = system.measures(description)
    names = dict.fromkeys(name for own in finished.values() for name in own.measured)
    arms = [_arm(name, system, finished, options.seeds) for name in names]
    measured = {(arm.name, measure) for arm in arms for measure in arm.values}
    result = NeighbourResult(
        **provenance(description, layout, hashes),
        neighbour=description.neighbour,
        system=options.system,
        title=system.title,
        source=system.source,
        standing=system.standing,
        equation=system.equation,
        reproduced=system.reproduced,
        unknown=list(system.unknown),
        model=options.model,
        options=options.model_dump(mode="json"),
        revisions=description.revisions,
        seeds=options.seeds,
        measures=measures,
        arms=arms,
        checks=[c for c in system.checks(options) if {(c.first, c.measure), (c.second, c.measure)} <= measured],
        seconds=round(sum(own.seconds for own in finished.values()), 1),
    )
    write_record(output, result)
    shutil.rmtree(kept, ignore_errors=True)
    return result


def _kept(file: Path) -> Finished | None:
    try:
        return Finished.model_validate_json(file.read_bytes())
    except (OSError, ValidationError):
        return None


def _run(system: System, description: NeighbourSystem, layout: Layout, job: tuple[str, int], file: Path) -> Finished:
    began = time.monotonic()
    measured = system.run(description, layout, *job)
    try:
        finished = Finished(seconds=time.monotonic() - began, measured=measured)
    except ValidationError:  # numbers of results are finite
        raise StudyError(f"{description.name}: {job[0]} seed {job[1]}: values are not finite, no result") from None
    write_file(file, finished.model_dump_json())
    return finished


def _arm(name: str, system: System, finished: Mapping[tuple[str, int], Finished], seeds: list[int]) -> Arm:
    by_seed = {seed: own.measured[name] for (_, seed), own in finished.items() if name in own.measured}
    first = by_seed[seeds[0]]
    return Arm(name=name, words=system.words(name), values={m: [by_seed[s][m] for s in seeds] for m in first})
