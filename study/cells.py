"""The cells of a study for whatever runs them (Slurm, a shell, ...): commands of what is stale, outcomes put on record.

DVC says what is stale and keeps the record; a command does what DVC would do for one stage, without its lock. It leaves
a mark in ``scratch/cells``: ``<stage>.started`` when it begins, renamed to ``<stage>.finished`` when it has succeeded.
"""

from __future__ import annotations

import shlex
from collections.abc import Iterator
from contextlib import chdir, contextmanager
from pathlib import Path
from typing import Any

from study.files import StudyError
from study.plan import Plan
from study.plan_files import write_plan

MARKS = Path("scratch", "cells")


class Cells:
    """Stages of a profile, with its plan written anew."""

    def __init__(self, plan: Plan):
        write_plan(plan)
        self.plan, self.marks = plan, plan.folder / MARKS

    def ready(self, kind: str | None = None) -> tuple[list[Any], list[Any]]:
        """Stale stages whose inputs are there, which may run side by side, and those that wait for others.

        Args:
            kind: one kind of stage alone, such as ``distill``.
        """
        with self._repository() as (repository, stages):
            with repository.lock:
                stale = [stage for stage in stages if stage.status()]
            made = {id(stage): _paths(stage.outs) for stage in stale}
            waiting = {
                id(stage)
                for stage in stale
                for other in stale
                if other is not stage and _touch(_paths(stage.deps), made[id(other)])
            }
            chosen = _of_kind(stale, kind, stages)
        return [s for s in chosen if id(s) not in waiting], [s for s in chosen if id(s) in waiting]

    def all(self, kind: str | None = None) -> list[Any]:
        """Every stage, or every one of a kind, in the order of dvc.yaml."""
        with self._repository() as (_, stages):
            return _of_kind(stages, kind, stages)

    def state(self, stage: Any) -> str:
        """``finished`` and not on record yet, ``started`` (running or failed), or ``not started``."""
        states = (state for state in ("finished", "started") if self._mark(stage.name, state).is_file())
        return next(states, "not started")

    def command(self, stage: Any) -> str:
        """One line that runs a stage from the study's folder, as often as it is needed."""
        started, finished = (MARKS / f"{stage.name}.{state}" for state in ("started", "finished"))
        outs = [str(path.relative_to(self.plan.folder.resolve())) for path in _paths(stage.outs)]
        first = [f"mkdir -p {MARKS}", f"rm -f {finished}", f"touch {started}", f"rm -rf {shlex.join(outs)}"]
        here = self.plan.folder.relative_to(self.plan.root)
        inside = [] if here == Path() else [f"cd {shlex.quote(str(here))}"]
        return " && ".join([*inside, *first, " ".join(stage.cmd.split()), f"mv {started} {finished}"])

    def record(self) -> list[str]:
        """Put finished stages on record, one at a time; their names.

        Raises:
            StudyError: something that a stage depends on has changed since it began: that one is to be run again.
        """
        recorded, changed = [], []
        with self._repository() as (repository, stages):
            for stage in stages:
                mark = self._mark(stage.name, "finished")
                if not mark.is_file():
                    continue
                newer = [path for path in _paths(stage.deps) if _newest(path) > mark.stat().st_mtime_ns]
                if newer:
                    changed.append(f"{stage.name} ({newer[0].name})")
                else:
                    repository.commit(stage.name, force=True)
                    recorded.append(stage.name)
                mark.unlink()
        if changed:
            raise StudyError(f"inputs changed after these began, run them again: {', '.join(changed)}")
        return recorded

    def _mark(self, name: str, state: str) -> Path:
        return self.marks / f"{name}.{state}"

    @contextmanager
    def _repository(self) -> Iterator[tuple[Any, list[Any]]]:
        from dvc.exceptions import DvcException
        from dvc.repo import Repo

        try:
            with chdir(self.plan.folder), Repo() as repository:  # names of stages are those of the working folder
                yield repository, list(repository.stage.load_all())
        except DvcException as error:
            raise StudyError(f"DVC: {' '.join(str(error).split())}") from None


def _of_kind(chosen: list[Any], kind: str | None, stages: list[Any]) -> list[Any]:
    kinds = dict.fromkeys(stage.name.partition("@")[0] for stage in stages)
    if kind is not None and kind not in kinds:
        raise StudyError(f"stage {kind!r} is unknown; allowed: {', '.join(kinds)}")
    return [stage for stage in chosen if kind in (None, stage.name.partition("@")[0])]


def _paths(entries: list[Any]) -> list[Path]:
    return [Path(entry.fs_path) for entry in entries]


def _touch(inputs: list[Path], outputs: list[Path]) -> bool:
    """Whether one of the inputs is an output, lies in one or holds one."""
    return any(a == b or a in b.parents or b in a.parents for a in inputs for b in outputs)


def _newest(path: Path) -> int:
    files = [path] if path.is_file() else [file for file in path.rglob("*") if file.is_file()]
    return max((file.stat().st_mtime_ns for file in files), default=0)
