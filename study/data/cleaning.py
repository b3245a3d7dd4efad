"""Cleaning the texts of a corpus: paragraph by paragraph, without duplicates and without held-out texts of tasks."""

from __future__ import annotations

import os
import tempfile
import time
from array import array
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any, NamedTuple

import numpy

from study.data.passages import Examined, Overlap, examine, hash64, within
from study.data.pool import Pool
from study.data.texts import TEXTS
from study.data.texts.own import read_own
from study.declarations import OwnText, language_of

#: Characters that a process is given at once.
BATCH = 500_000

#: Seconds between two lines that say how far a text was read.
EVERY = 20.0

#: Per text or language, what there is of it.
Counts = dict[str, dict[str, int]]


class Document(NamedTuple):
    """Cleaned content, and the name of the text that it is from."""

    text: str
    content: str

    @property
    def language(self) -> str:
        return language_of(self.text)


class Documents:
    """Documents in a file without a name, which is gone with the process; of each, 18 bytes are in memory.

    Args:
        folder: on whose disk they are; None: where temporary files are.
    """

    def __init__(self, folder: Path | None = None):
        self._file: Any = tempfile.TemporaryFile(dir=folder, buffering=2**20)  # noqa: SIM115
        self._names: list[str] = []
        self._texts, self._ends, self._hashes = array("H"), array("Q", [0]), array("Q")

    def append(self, document: Document) -> None:
        """Put one behind the others."""
        if document.text not in self._names:
            self._names.append(document.text)
        self._texts.append(self._names.index(document.text))
        self._ends.append(self._ends[-1] + self._file.write(document.content.encode()))
        self._hashes.append(hash64("\n".join(document)))

    def __len__(self) -> int:
        return len(self._texts)

    def __getitem__(self, place: int) -> Document:
        self._file.flush()
        first, last = self._ends[place], self._ends[range(len(self))[place] + 1]
        return Document(self.name(place), os.pread(self._file.fileno(), last - first, first).decode())

    def name(self, place: int) -> str:
        """Name of the text that a document is from."""
        return self._names[self._texts[place]]

    def by_language(self, places: numpy.ndarray) -> dict[str, numpy.ndarray]:
        """Those of the ``places`` in each language, in their order; languages in the order in which they come."""
        languages = [language_of(name) for name in self._names]
        texts = numpy.array(self._texts)[places]
        found = dict.fromkeys(languages[text] for text in texts[numpy.sort(numpy.unique(texts, return_index=True)[1])])
        same = {name: [text for text, own in enumerate(languages) if own == name] for name in found}
        return {name: places[numpy.isin(texts, own)] for name, own in same.items()}

    def sizes(self) -> numpy.ndarray:
        """Bytes (UTF-8) of each document."""
        return numpy.diff(numpy.array(self._ends, dtype=numpy.int64))

    def hashes(self) -> numpy.ndarray:
        """64 bits of each document's text and content."""
        return numpy.array(self._hashes)


class Seen:
    """The 64-bit keys that were there before: 8 bytes each, and as much again while they are put in order."""

    def __init__(self) -> None:
        self._parts: list[numpy.ndarray] = []  # each in order, and at least twice as long as the next

    def first(self, keys: Iterable[int]) -> list[bool]:
        """Whether each key is there for the first time; then it is known."""
        own = numpy.array(keys, dtype=numpy.uint64)
        unique, places = numpy.unique(own, return_index=True)
        fresh = numpy.ones(len(unique), bool)
        for part in self._parts:
            fresh &= ~within(part, unique)
        new = unique[fresh]
        while len(new) and self._parts and len(self._parts[-1]) < 2 * len(new):
            new = numpy.sort(numpy.concatenate([self._parts.pop(), new]))
        self._parts += [new] * (len(new) > 0)
        found = numpy.zeros(len(own), bool)
        found[places[fresh]] = True
        return found.tolist()


def clean(
    texts: Iterable[str | OwnText],
    overlap: Overlap,
    root: Path = Path(),
    folder: Path | None = None,
    processes: int | None = None,
) -> tuple[Documents, Counts]:
    """Documents of texts, by name or declared, cleaned, and counts of what was kept and left out.

    Paragraph by paragraph: markup and footnote marks removed, whitespace collapsed; left out when shorter than SHORTEST
    words or mostly not letters ("short"), when seen before in any text, case aside ("duplicates"), or when it shares
    words with a held-out text ("overlaps"). What remains of a document is joined again; should a run of held-out words
    have formed across two paragraphs, the whole document goes.

    Paragraphs seen before are told by 64-bit hashes: of n, one is taken for another with a probability of n^2 / 2^65.

    Args:
        root: the study's folder, where declared texts are looked for. folder: as of :class:`Documents`.
        processes: None: one for each core. The result is the same.

    Returns:
        The documents in reading order, and per text: documents, paragraphs, short, duplicates, overlaps.
    """
    documents, seen, counts = Documents(folder), Seen(), Counts()
    with Pool(examine, overlap, processes) as pool:
        for text in texts:
            name = text if isinstance(text, str) else text.label
            count = counts[name] = dict.fromkeys(("documents", "paragraphs", "short", "duplicates", "overlaps"), 0)
            read = TEXTS[text]() if isinstance(text, str) else read_own(text, root)
            for batch in pool.map(batched(_told(read, name), BATCH)):
                first = iter(seen.first([key for one in batch for key in one.keys]))
                for one in batch:
                    content = _kept(one, first, overlap, count)
                    if content:
                        documents.append(Document(name, content))
            print(f"corpus: {name}: " + ", ".join(f"{key} {value:,}" for key, value in count.items()), flush=True)
    return documents, counts


def _kept(one: Examined, first: Iterator[bool], overlap: Overlap, count: dict[str, int]) -> str | None:
    """What a document's paragraphs are worth, joined; None where nothing is left."""
    kept, joined = [], one.joined
    for paragraph, short, overlaps in zip(one.paragraphs, one.short, one.overlaps, strict=True):
        new = next(first)
        if short:
            count["short"] += 1
        elif not new:
            count["duplicates"] += 1
        elif overlaps:
            count["overlaps"] += 1
        else:
            kept.append(paragraph)
    content = " ".join(kept)
    if len(kept) < len(one.paragraphs) - sum(one.short) - sum(one.overlaps):  # others follow each other now
        joined = content in overlap
    if len(kept) > 1 and joined:
        count["overlaps"] += len(kept)
        return None
    count["documents"] += bool(kept)
    count["paragraphs"] += len(kept)
    return content or None


def batched(contents: Iterable[str], size: int) -> Iterator[list[str]]:
    """Documents, ``size`` characters or a little more at once."""
    batch, characters = [], 0
    for content in contents:
        batch.append(content)
        characters += len(content)
        if characters >= size:
            yield batch
            batch, characters = [], 0
    if batch:
        yield batch


def _told(contents: Iterable[str], name: str) -> Iterator[str]:
    """Documents as they are read, while it is said how far that is."""
    characters, began = 0, time.monotonic()
    said = began
    for documents, content in enumerate(contents, start=1):
        yield content
        characters += len(content)
        if (now := time.monotonic()) - said >= EVERY:
            said, millions = now, characters / 1e6
            speed = millions / (now - began)
            print(
                f"corpus: {name}: read {documents:,} documents, {millions:,.0f} M characters, {speed:.1f} M/s",
                flush=True,
            )
