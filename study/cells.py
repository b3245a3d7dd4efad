"""The cells of a study for whatever runs them (Slurm, a shell, ...): commands of what is stale, outcomes put on record.

DVC says what is stale and keeps the record; a command does what DVC would do for one stage, without its lock. It writes
into a folder of its own in ``scratch/cells``, or in ``$STUDY_SCRATCH`` (a disk of the node), and moves the outcome in
place when it is whole. It leaves a mark in ``scratch/cells``:
``<stage>.started`` when it begins, renamed to ``<stage>.finished`` when it has succeeded.
"""

from __future__ import annotations

import fcntl
import logging
import os
import re
import shlex
import shutil
import socket
import time
from collections.abc import Collection, Iterator
from contextlib import chdir, contextmanager
from glob import escape
from pathlib import Path
from typing import Any

from networkx import topological_sort

from study.execution import runs
from study.files import StudyError
from study.plan import Plan, write_plan

MARKS = Path("scratch", "cells")
#: The kind of stage that several processes can do together.
TRAINS = "distill"


class Cells:
    """Stages of a profile, with its plan written anew."""

    def __init__(self, plan: Plan):
        write_plan(plan)
        self.plan, self.marks = plan, plan.folder / MARKS

    def ready(self, kind: str | None = None, busy: Collection[str] = ()) -> tuple[list[Any], list[Any]]:
        """Stale stages whose inputs are as they will stay, which may run side by side, and what waits for any of them.

        Whether a stage that waits is stale, its inputs will tell.

        Args:
            kind: one kind of stage alone, such as ``distill``.
            busy: names of stages that are being run: others wait for them.
        """
        from dvc.repo.graph import build_graph

        ready: list[Any] = []
        unsettled: set[Any] = set()
        with self._repository() as (repository, stages):
            graph = build_graph(stages)  # a stage -> those it depends on; no profile depends on another
            with repository.lock:
                for stage in reversed(list(topological_sort(graph))):
                    if unsettled.intersection(graph.successors(stage)) or stage.name in busy:
                        unsettled.add(stage)
                    elif stage.status():
                        unsettled.add(stage)
                        ready.append(stage)
            chosen = [stage for stage in _of_kind(stages, kind) if stage in unsettled and stage.name not in busy]
        return [stage for stage in chosen if stage in ready], [stage for stage in chosen if stage not in ready]

    def all(self, kind: str | None = None) -> list[Any]:
        """Every stage, or every one of a kind, in the order of dvc.yaml."""
        with self._repository() as (_, stages):
            return _of_kind(stages, kind)

    def graph(self) -> dict[str, list[str]]:
        """Name of every stage -> those it depends on, which stand before it."""
        from dvc.repo.graph import build_graph

        with self._repository() as (_, stages):
            graph = build_graph(stages)
            return {s.name: [other.name for other in graph[s]] for s in reversed(list(topological_sort(graph)))}

    def state(self, stage: Any) -> str:
        """``finished`` and not on record yet, ``started`` (running or failed), or ``not started``."""
        states = (state for state in ("finished", "started") if self._mark(stage.name, state).is_file())
        return next(states, "not started")

    def command(self, stage: Any, processes: int = 1) -> str:
        """One line that runs a stage from the study's folder, as often as it is needed.

        Args:
            processes: how many train a student together; its notebook is not executed then.
        """
        started, finished = (shlex.quote(str(MARKS / f"{stage.name}.{state}")) for state in ("started", "finished"))
        outs = [str(path.relative_to(self.plan.folder.resolve())) for path in _paths(stage.outs)]
        command, moved, removed = " ".join(stage.cmd.split()), [], []
        if processes > 1 and kind_of(stage) == TRAINS:
            launcher = f"python -m torch.distributed.run --standalone --nproc-per-node {processes}"
            description = f"plan/{TRAINS}/{stage.name.partition('@')[2]}.json"
            command = f"{launcher} -m study distil {description} --output {outs[0]}"
        for out in outs:
            found = 0
            if "/" in out:  # a bare name may be another word of the command
                command, found = re.subn(rf"(?<![\w.+-]){re.escape(out)}(?![\w.+-])", f"$own/{out}", command)
            moved += [out] * bool(found)
            removed += [out] * (not found)  # its place is not the command's to choose
        lines = [f"mkdir -p {MARKS}", f"rm -f {finished}", f"touch {started}"]
        lines += [f"kept=$(mktemp -d {MARKS}/{shlex.quote(stage.name)}.XXXXXX) && own=$kept/own"]
        lines += ["disk=", """trap 'rm -rf "$disk"' EXIT"""]  # emptied first: a variable of that name may be exported
        there = 'disk=$(mktemp -d "$STUDY_SCRATCH"/study.XXXXXX) && ln -s "$disk" $own'
        lines += [f'if [ "$STUDY_SCRATCH" ]; then {there}; else mkdir $own; fi']
        folders = dict.fromkeys(str(Path(out).parent) for out in moved)
        lines += ["mkdir -p " + " ".join(f'"$own"/{shlex.quote(folder)}' for folder in folders)] if moved else []
        lines += [f"rm -rf {shlex.join(removed)}"] if removed else []
        lines += [command]
        for out in map(shlex.quote, moved):
            lines += [f'mkdir -p $(dirname {out}) "$kept"/$(dirname {out})', f'mv "$own"/{out} "$kept"/{out}']
            lines += [f"rm -rf {out}", f'mv "$kept"/{out} {out}']  # within one file system: whole at once
        here = self.plan.folder.relative_to(self.plan.root)
        inside = [] if here == Path() else [f"cd {shlex.quote(str(here))}"]
        return " && ".join([*inside, *lines, f"mv {started} {finished}"])

    def record(self) -> tuple[list[str], dict[str, str]]:
        """Put finished stages on record, all in one writing of dvc.lock: that costs most, and more the longer it is.

        Returns:
            Names of those on record, and of those that have to be run again -> why: something that they depend on
            changed after they began, or is gone, as their outcome may be.
        """
        from dvc.repo import lock_repo

        recorded: list[Any] = []
        refused: dict[str, str] = {}
        with self._repository() as (repository, stages), lock_repo(repository):
            for stage in stages:
                mark = self._mark(stage.name, "finished")
                if not mark.is_file():
                    continue
                missing = [path for path in _paths([*stage.deps, *stage.outs]) if not path.exists()]
                newer = [path for path in _paths(stage.deps) if _newest(path) > mark.stat().st_mtime_ns]
                if missing:
                    refused[stage.name] = f"{self._short(missing[0])} is missing"
                elif newer:
                    refused[stage.name] = f"{self._short(newer[0])} changed after it began"
                else:  # what `dvc commit -f` does for one
                    stage.save()
                    stage.commit()
                    recorded.append(stage)
            if recorded:
                recorded[0].dvcfile.dump_stages(recorded, update_pipeline=False)
        names = [stage.name for stage in recorded]
        for name in [*names, *refused]:
            self._mark(name, "finished").unlink()
            for own in self.marks.glob(f"{escape(name)}.??????/"):
                shutil.rmtree(own, ignore_errors=True)
        return names, refused

    @contextmanager
    def alone(self) -> Iterator[None]:
        """Refuse a second driver on the study, also one of another machine that shares its folder.

        Raises:
            StudyError: there is one.
        """
        self.marks.mkdir(parents=True, exist_ok=True)
        with (self.marks / "driver").open("a+") as held:
            try:
                fcntl.flock(held, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except OSError:
                held.seek(0)
                other = held.read().strip() or "unknown"
                raise StudyError(f"{self.plan.folder}: a driver runs on this study already: {other}") from None
            held.truncate(0)
            held.write(f"process {os.getpid()} of {socket.gethostname()}")
            held.flush()
            yield

    def _short(self, path: Path) -> Path:
        folder = self.plan.folder.resolve()
        return path.relative_to(folder) if path.is_relative_to(folder) else path

    def _mark(self, name: str, state: str) -> Path:
        return self.marks / f"{name}.{state}"

    @contextmanager
    def _repository(self) -> Iterator[tuple[Any, list[Any]]]:
        from dvc.exceptions import DvcException
        from dvc.repo import Repo

        logging.getLogger("dvc").setLevel(logging.WARNING)  # not every change of the lock file
        try:
            with chdir(self.plan.folder), Repo() as repository:  # names of stages are those of the working folder
                yield repository, list(repository.stage.load_all())
        except DvcException as error:
            raise StudyError(f"DVC: {' '.join(str(error).split())}") from None


def unlock(plan: Plan, seconds: int = 20) -> None:
    """Drop DVC's locks on files of a profile whose processes have ended, which DVC would tell in a warning for each.

    To be called where DVC runs next: it takes processes of other machines for ended, too. Locks of processes that run
    stay, and so do those of other profiles.

    Args:
        seconds: for which a process that writes files of the profile is waited for: what a killed call began ends soon.

    Raises:
        StudyError: such a process runs on, or the file of these locks is damaged.
    """
    file, folder = plan.root / ".dvc" / "tmp" / "rwlock", plan.folder.resolve()
    others = plan.root.resolve() / "profiles"
    if not file.is_file() or file.read_bytes() == b"{}":
        return
    from dvc.exceptions import DvcException
    from dvc.repo import Repo
    from dvc.rwlock import _edit_rwlock

    def own(path: str) -> bool:
        below = Path(path).is_relative_to
        return below(folder) and not (folder == others.parent and below(others))

    def stays(path: str, holder: dict[str, Any]) -> bool:
        return runs(holder["pid"]) or not own(path)

    try:
        with chdir(plan.folder), Repo() as repository:
            hardlink = repository.config["core"].get("hardlink_lock", False)
            for left in range(seconds, -1, -1):
                with _edit_rwlock(repository.tmp_dir, repository.fs, hardlink) as lock:
                    lock["write"] = {path: holder for path, holder in lock["write"].items() if stays(path, holder)}
                    readers = {path: [h for h in held if stays(path, h)] for path, held in lock["read"].items()}
                    lock["read"] = {path: held for path, held in readers.items() if held}
                    writers = [holder for path, holder in lock["write"].items() if own(path)]
                if not writers:
                    return
                time.sleep(min(left, 1))
    except DvcException as error:
        told = " ".join(str(error).split())
        raise StudyError(f"DVC: {told}; delete {file} if no other `make` or `dvc` runs") from None
    who = f"process {writers[0]['pid']} ({writers[0]['cmd']})"
    allowed = f"one at a time (if it is none of DVC's, delete {file})"
    raise StudyError(f"profile {plan.profile}: {who} runs its stages already; allowed: {allowed}")


def _of_kind(stages: list[Any], kind: str | None) -> list[Any]:
    kinds = dict.fromkeys(kind_of(stage) for stage in stages)
    if kind is not None and kind not in kinds:
        raise StudyError(f"stage {kind!r} is unknown; allowed: {', '.join(kinds)}")
    return [stage for stage in stages if kind in (None, kind_of(stage))]


def kind_of(stage: Any) -> str:
    """``distill`` of ``distill@english_od_L3-H192_1``, a stage or its name."""
    return str(getattr(stage, "name", stage)).partition("@")[0]


def _paths(entries: list[Any]) -> list[Path]:
    return [Path(entry.fs_path) for entry in entries]


def _newest(path: Path) -> int:
    files = [path] if path.is_file() else [file for file in path.rglob("*") if file.is_file()]
    return max((file.stat().st_mtime_ns for file in files), default=0)
