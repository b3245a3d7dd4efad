"""dvc.lock holds the stages of the active profile; those of other profiles wait in ``profiles/<name>.lock``.

DVC reads and writes dvc.lock as a whole after every stage, which with the cells of all profiles in it took longer than
a small stage itself. It never looks at another profile's entries: dvc.yaml has the active profile's stages alone.
"""

from __future__ import annotations

import re
from pathlib import Path

from study.config import StudyError
from study.files import write_file

HEAD = "schema: '2.0'\nstages:"


def switch_lock(root: Path, profile: str) -> None:
    """Bring the entries of ``profile`` into dvc.lock, and those of every other profile to ``profiles/<name>.lock``.

    Entries are moved as the text they are. Where both files have one, that in dvc.lock is the newer. Calling it again
    changes nothing, and completes a call that was interrupted.

    Raises:
        StudyError: a lock file is no dvc.lock of schema 2.0, or cannot be written; nothing is lost then.
    """
    lock = root / "dvc.lock"
    shared: dict[str, str] = {}
    own = {path.stem: {} for path in sorted((root / "profiles").glob("*.yaml"))}
    for path in (*(waiting(root, name) for name in own), lock):
        for stage, entry in _read(path).items():
            belongs = re.match(r"[\w-]+@([a-z]+)(-|$)", stage)
            (own[belongs[1]] if belongs and belongs[1] in own else shared)[stage] = entry
    for name, entries in own.items():
        if name != profile and entries:
            write_file(waiting(root, name), _text(entries))
    if active := shared | own[profile]:
        write_file(lock, _text(active))
    waiting(root, profile).unlink(missing_ok=True)


def waiting(root: Path, profile: str) -> Path:
    """Where the entries of a profile are while another one is active."""
    return root / "profiles" / f"{profile}.lock"


def check_lock(root: Path, profile: str) -> None:
    """Raise a StudyError if the active profile's entries are not in dvc.lock: every stage of it would run again."""
    if (file := waiting(root, profile)).exists():
        raise StudyError(
            f"{file.relative_to(root)} holds the stages of the active profile, which belong into dvc.lock; run"
            f" `make profile PROFILE={profile}`"
        )


def _text(entries: dict[str, str]) -> str:
    return "\n".join([HEAD, *entries.values(), ""])


def _read(path: Path) -> dict[str, str]:
    """Entries by name of stage; each is its lines, name included, without the last line break."""
    if not path.exists():
        return {}
    text = path.read_text().rstrip("\n")
    for place, line in enumerate(text.splitlines()):
        allowed = HEAD.splitlines()[place] if place < 2 else "  "
        if not line.startswith(allowed):
            raise StudyError(f"{path}: line {place + 1} = {line[:40]!r}; allowed: {allowed!r}, as DVC writes it")
    entries = re.split(r"\n(?=  [^\s-])", text.removeprefix(HEAD))[1:]
    return {re.match(r"  (.+?):(\n|$)", entry)[1]: entry for entry in entries}
