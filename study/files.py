"""Errors, paths, and writing files whole or not at all: what every part of the study may use."""

from __future__ import annotations

import hashlib
import json
import os
import tempfile
from pathlib import Path

#: Name of the profile that is the study's folder itself.
DEFAULT_PROFILE = "laptop"


class StudyError(Exception):
    """A mistake a user can mend; shown as one line, without a traceback."""


class UnreachableError(StudyError):
    """Something of the hub of which nothing is on this machine, while the hub cannot be reached."""


def find_root(start: Path | None = None) -> Path:
    """The study's folder: the nearest one upward from ``start`` (default: here) with params.yaml beside notebooks/.

    Raises:
        StudyError: there is none.
    """
    start = (start or Path.cwd()).resolve()
    for folder in (start, *start.parents):
        if (folder / "params.yaml").is_file() and (folder / "notebooks").is_dir():
            return folder
    raise StudyError(f"no params.yaml beside notebooks/ in {start} or above; run this inside the study's folder")


def profile_folder(profile: str, root: Path | None = None) -> Path:
    """The folder of a profile: ``profiles/<profile>``, or the study's own for the default one.

    Raises:
        StudyError: no such folder, or one without params.yaml.
    """
    root = root or find_root()
    if profile == DEFAULT_PROFILE:
        return root
    folder = root / "profiles" / profile
    if "/" in profile or profile.startswith("."):
        raise StudyError(f"profile {profile!r} is no name; allowed: that of a folder in profiles/")
    if not (folder / "params.yaml").is_file():
        known = sorted(path.parent.name for path in (root / "profiles").glob("*/params.yaml"))
        problem = "has no params.yaml" if folder.is_dir() else "is unknown"
        raise StudyError(
            f"profile {profile!r} {problem} (profiles/{profile}/params.yaml); allowed:"
            f" {', '.join([DEFAULT_PROFILE, *known])}"
        )
    return folder


def profile_of(folder: Path) -> str:
    """The name of the profile that a folder belongs to, as :func:`profile_folder` takes it."""
    folder = Path(folder).resolve()
    return DEFAULT_PROFILE if (folder / "notebooks").is_dir() else folder.name


class Layout:
    """Where the files of one profile and setting are, below the profile's folder.

    ``plan/`` holds the descriptions of stages, ``runs/`` what DVC caches (models, data), ``reports/`` what git keeps
    (small results, figures, pages), ``scratch/`` what nobody keeps.
    """

    def __init__(self, folder: Path, setting: str):
        self.folder, self.setting = Path(folder), setting
        self.runs = self.folder / "runs" / setting
        self.tasks = self.runs / "tasks"
        self.corpus = self.runs / "corpus"
        self.encoder = self.runs / "encoder"
        self.teacher = self.runs / "teacher"
        self.reports = self.folder / "reports"
        self.results = self.reports / "results" / setting
        self.representations = self.results / "representations.json"
        self.systems = self.reports / "systems" / setting
        self.checkpoints = self.folder / "scratch" / "checkpoints"
        self.teacher_outputs = self.folder / "scratch" / "teacher_outputs"

    def student(self, name: str) -> Path:
        """The folder of a student's model; ``name`` as :attr:`study.descriptions.Run.model`."""
        return self.runs / "students" / name

    def reference(self, name: str) -> Path:
        """The folder of the model of a row beside the students."""
        return self.runs / "references" / name

    def analysis(self, name: str) -> Path:
        """The folder of an analysis's figures and tables; ``name`` as in :data:`study.sections.ANALYSES`."""
        return self.reports / name / self.setting

    def result(self, name: str) -> Path:
        """The result file of a model: a run's name, or ``teacher``."""
        return self.results / f"{name}.json"


def tuning_folder(folder: Path, root: Path) -> Path:
    """Where the learning rates of a profile come from: its own folder if it tuned any, else the study's."""
    own = own_tuning_folder(folder)
    return own if own.is_dir() else own_tuning_folder(root)


def own_tuning_folder(folder: Path) -> Path:
    """Where a profile's own tuning is kept."""
    return folder / "reports" / "tuning"


def write_json(path: str | os.PathLike, content: dict) -> None:
    """Write a JSON file by :func:`write_file`; numbers must be finite.

    Raises:
        StudyError: the file cannot be written. ValueError: a number that is not finite.
    """
    write_file(path, json.dumps(content, indent=1, allow_nan=False) + "\n")


def write_file(path: str | os.PathLike, content: str | bytes) -> None:
    """Write a file whole or not at all, making its folder if need be.

    Raises:
        StudyError: the file or its folder cannot be written.
    """
    path = Path(path)
    draft = None
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with tempfile.NamedTemporaryFile(dir=path.parent, prefix=f".{path.name}.", delete=False) as stream:
            draft = Path(stream.name)
            stream.write(content.encode() if isinstance(content, str) else content)
        draft.chmod(0o644)
        draft.replace(path)
    except OSError as error:
        raise StudyError(f"{path}: cannot be written: {error.strerror}") from None
    finally:
        if draft is not None:
            draft.unlink(missing_ok=True)


def make_folder(folder: Path) -> None:
    """Make a folder and those above it.

    Raises:
        StudyError: it cannot be made.
    """
    try:
        Path(folder).mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise StudyError(f"{folder}: cannot be written ({error.strerror})") from None


def content_hash(path: Path) -> str:
    """SHA-256 over relative names and contents of a file or of all files below a folder, compiled code left out."""
    digest = hashlib.sha256()
    files = [path] if path.is_file() else sorted(p for p in path.rglob("*") if p.is_file() and p.suffix != ".pyc")
    for file in files:
        with file.open("rb") as stream:
            digest.update(str(file.relative_to(path)).encode() + b"\0" + hashlib.file_digest(stream, "sha256").digest())
    return digest.hexdigest()


def file_hash(path: Path) -> str:
    """SHA-256 of a file's content.

    Raises:
        StudyError: the file cannot be read.
    """
    try:
        with path.open("rb") as stream:
            return hashlib.file_digest(stream, "sha256").hexdigest()
    except OSError as error:
        raise StudyError(f"{path}: cannot be read: {error.strerror}") from None
