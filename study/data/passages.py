"""Paragraphs of texts and the words they share with held-out texts: what many processes do of cleaning."""

from __future__ import annotations

import hashlib
import html
import re
from array import array
from collections.abc import Iterable, Iterator, Sequence
from functools import lru_cache
from string import ascii_letters
from typing import NamedTuple

import numpy

from study.data.strings import collapse, words

#: Paragraphs of fewer words are headings, signatures and stock phrases. Source: this study's choice.
SHORTEST = 8

#: Paragraphs with a smaller share of letters are tables. Source: this study's choice.
LETTERS = 0.5

_MARKUP = re.compile(r"</?[a-z]+\b[^>]*>|\[(?:see APP Note|laughter|applause|\d+)\]", re.IGNORECASE)

#: Scripts without spaces, where each character counts as a word: Chinese characters and Japanese syllables.
_UNSPACED = re.compile(r"[\u3040-\u30ff\u3400-\u4dbf\u4e00-\u9fff]")

#: Odd, so that no word is lost modulo 2^64. Source: the golden ratio, as in multiplicative hashing.
_FACTOR = numpy.uint64(0x9E3779B97F4A7C15)


class Examined(NamedTuple):
    """A document's paragraphs: ``keys`` of all (64 bits, case aside), ``short`` and ``overlaps`` of each.

    ``joined``: whether those that are neither overlap a held-out text when they follow each other.
    """

    paragraphs: list[str]
    keys: list[int]
    short: list[bool]
    overlaps: list[bool]
    joined: bool


class Overlap:
    """Recognises passages that share running words with held-out texts.

    Words are runs of letters and digits, casefolded; in scripts without spaces, single characters. A passage overlaps
    when ``longest`` consecutive words of it also follow each other in a held-out text. Held-out texts of SHORTEST to
    ``longest`` - 1 words must occur whole; shorter ones are too common to be told from chance, and no paragraph as
    short as that enters the corpus.

    Runs are kept as 64-bit hashes, in order: 8 bytes each. Two of different words are taken for the same with a
    probability of held-out runs / 2^64 for each run that is looked at.

    Source: GPT-3 (2005.14165), appendix C, for runs of 13 words; the rest is this study's choice.
    """

    def __init__(self, heldout: Iterable[str], longest: int):
        runs: dict[int, list[numpy.ndarray]] = {}
        for text in heldout:
            sequence = hashes(_spaced(text))
            if len(sequence) >= SHORTEST:
                length = min(len(sequence), longest)
                runs.setdefault(length, []).append(_runs(sequence, length))
                runs.setdefault(-1, []).append(_runs(sequence[: len(sequence) - length + SHORTEST], SHORTEST))
        found = {length: numpy.unique(numpy.concatenate(own)) for length, own in runs.items()}
        self._beginnings = found.pop(-1, numpy.empty(0, numpy.uint64))
        self._runs = found

    def __contains__(self, passage: str) -> bool:
        return len(self.found(hashes(_spaced(passage)))) > 0

    def found(self, sequence: numpy.ndarray) -> numpy.ndarray:
        """Held-out runs in a sequence of words: (R, 2), the first word of each and the one behind its last."""
        starts = numpy.flatnonzero(within(self._beginnings, _runs(sequence, SHORTEST)))  # few, if any
        found = [numpy.empty((0, 2), int)]
        for length, own in self._runs.items() if len(starts) else ():
            fitting = starts[starts + length <= len(sequence)]
            words_of = sequence[fitting[:, None] + numpy.arange(length)].T
            hits = fitting[within(own, _fold(words_of))]
            found.append(numpy.stack([hits, hits + length], axis=1))
        return numpy.concatenate(found)


def examine(overlap: Overlap, contents: Sequence[str]) -> list[Examined]:
    """The paragraphs of documents, and what is to be known of each to decide whether it is kept."""
    examined, sequences, documents = [], [], []
    for content in contents:
        found = list(paragraphs(content))
        spaced = [_spaced(paragraph) for paragraph in found]
        keys = [hash64(paragraph.casefold()) for paragraph in found]
        short = [
            len(own.split()) < SHORTEST or _letters(paragraph) < LETTERS * len(paragraph)
            for own, paragraph in zip(spaced, found, strict=True)
        ]
        examined.append(Examined(found, keys, short, [False] * len(found), False))
        sequences += [hashes(own) for own, left in zip(spaced, short, strict=True) if not left]
        documents.append(len(sequences))
    if sequences:  # all are looked at together, since nearly all are free of held-out words
        runs = overlap.found(numpy.concatenate(sequences))
        ends = numpy.cumsum([len(sequence) for sequence in sequences])
        places = numpy.searchsorted(ends, runs[:, 0], side="right")
        inside = {*places[runs[:, 1] <= ends[places]].tolist()}
        for place in {*numpy.searchsorted(documents, places, side="right").tolist()}:
            first = documents[place - 1] if place else 0
            own = examined[place]
            overlaps = iter([index in inside for index in range(first, documents[place])])
            told = [not left and next(overlaps) for left in own.short]
            kept = [p for p, *out in zip(own.paragraphs, own.short, told, strict=True) if not any(out)]
            examined[place] = own._replace(overlaps=told, joined=len(kept) > 1 and " ".join(kept) in overlap)
    return examined


def paragraphs(content: str) -> Iterator[str]:
    """The lines of a document without markup, footnote marks and surplus whitespace; empty ones are left out."""
    for line in content.split("\n"):
        plain = html.unescape(line)
        paragraph = collapse(_MARKUP.sub(" ", plain) if "<" in plain or "[" in plain else plain)
        if paragraph:
            yield paragraph


def _spaced(text: str) -> str:
    return text if text.isascii() else _UNSPACED.sub(r" \g<0> ", text)


def _letters(text: str) -> int:
    """How many of its characters are letters."""
    if text.isascii():
        return len(text) - len(text.encode().translate(None, ascii_letters.encode()))
    return sum(map(str.isalpha, text))


def hash64(text: str) -> int:
    """64 bits of BLAKE2b, the same on every machine."""
    return int.from_bytes(hashlib.blake2b(text.encode(), digest_size=8).digest())


#: Of a word; those met last are kept.
_hash_of_word = lru_cache(2**18)(hash64)


def hashes(spaced: str) -> numpy.ndarray:
    """Words of a passage, whose characters stand apart in scripts without spaces: (N,) of 64-bit hashes."""
    return numpy.frombuffer(array("Q", map(_hash_of_word, words(spaced))), numpy.uint64)


def _runs(sequence: numpy.ndarray, length: int) -> numpy.ndarray:
    """A hash of every ``length`` consecutive words."""
    count = max(len(sequence) - length + 1, 0)
    return _fold([sequence[place : place + count] for place in range(length)])


def _fold(words_of: Sequence[numpy.ndarray] | numpy.ndarray) -> numpy.ndarray:
    """One hash of words that follow each other: their hashes as digits of a number, modulo 2^64."""
    found = numpy.zeros(len(words_of[0]), numpy.uint64)
    for digits in words_of:
        found *= _FACTOR
        found += digits
    return found


def within(known: numpy.ndarray, values: numpy.ndarray) -> numpy.ndarray:
    """Whether each value is among the known ones, which are in order."""
    if not len(known):
        return numpy.zeros(len(values), bool)
    return known[numpy.minimum(numpy.searchsorted(known, values), len(known) - 1)] == values
