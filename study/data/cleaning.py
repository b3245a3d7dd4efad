"""Cleaning the texts of a corpus: paragraph by paragraph, without duplicates and without held-out texts of tasks."""

from __future__ import annotations

import html
import re
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import NamedTuple

from study.data.strings import collapse, words
from study.data.texts import TEXTS
from study.data.texts.own import read_own
from study.declarations import OwnText

#: Paragraphs of fewer words are headings, signatures and stock phrases. Source: this study's choice.
SHORTEST = 8

#: Paragraphs with a smaller share of letters are tables. Source: this study's choice.
LETTERS = 0.5

_MARKUP = re.compile(r"</?[a-z]+\b[^>]*>|\[(?:see APP Note|laughter|applause|\d+)\]", re.IGNORECASE)

#: Scripts without spaces, where each character counts as a word: Chinese characters and Japanese syllables.
_UNSPACED = re.compile(r"[\u3040-\u30ff\u3400-\u4dbf\u4e00-\u9fff]")


class Document(NamedTuple):
    """Cleaned content, and the name of the text that it is from."""

    text: str
    content: str

    @property
    def language(self) -> str:
        return self.text.partition("-")[2] or "en"


class Overlap:
    """Recognises passages that share running words with held-out texts.

    Words are runs of letters and digits, casefolded; in scripts without spaces, single characters. A passage overlaps
    when ``longest`` consecutive words of it also follow each other in a held-out text. Held-out texts of SHORTEST to
    ``longest`` - 1 words must occur whole; shorter ones are too common to be told from chance, and no paragraph as
    short as that enters the corpus.

    Source: GPT-3 (2005.14165), appendix C, for runs of 13 words; the rest is this study's choice.
    """

    def __init__(self, heldout: Iterable[str], longest: int):
        self._runs: dict[int, set[tuple[str, ...]]] = {length: set() for length in range(SHORTEST, longest + 1)}
        for text in heldout:
            sequence = words(_spaced(text))
            if len(sequence) >= SHORTEST:
                length = min(len(sequence), longest)
                self._runs[length].update(_windows(sequence, length))

    def __contains__(self, passage: str) -> bool:
        sequence = words(_spaced(passage))
        return any(not runs.isdisjoint(_windows(sequence, length)) for length, runs in self._runs.items() if runs)


def clean(
    texts: Iterable[str | OwnText], overlap: Overlap, root: Path = Path()
) -> tuple[list[Document], dict[str, dict[str, int]]]:
    """Documents of texts, by name or declared, cleaned, and counts of what was kept and left out.

    Paragraph by paragraph: markup and footnote marks removed, whitespace collapsed; left out when shorter than SHORTEST
    words or mostly not letters ("short"), when seen before in any text, case aside ("duplicates"), or when it shares
    words with a held-out text ("overlaps"). What remains of a document is joined again; should a run of held-out words
    have formed across two paragraphs, the whole document goes.

    Args:
        root: the study's folder, where declared texts are looked for.

    Returns:
        The documents in reading order, and per text: documents, paragraphs, short, duplicates, overlaps.
    """
    documents: list[Document] = []
    counts: dict[str, dict[str, int]] = {}
    seen: set[str] = set()
    for text in texts:
        name = text if isinstance(text, str) else text.label
        count = counts[name] = dict.fromkeys(("documents", "paragraphs", "short", "duplicates", "overlaps"), 0)
        for content in TEXTS[text]() if isinstance(text, str) else read_own(text, root):
            kept = []
            for paragraph in paragraphs(content):
                key, length = paragraph.casefold(), len(_spaced(paragraph).split())
                if length < SHORTEST or sum(map(str.isalpha, paragraph)) < LETTERS * len(paragraph):
                    count["short"] += 1
                elif key in seen:
                    count["duplicates"] += 1
                elif paragraph in overlap:
                    count["overlaps"] += 1
                else:
                    kept.append(paragraph)
                seen.add(key)
            joined = " ".join(kept)
            if len(kept) > 1 and joined in overlap:
                count["overlaps"] += len(kept)
            elif kept:
                documents.append(Document(name, joined))
                count["documents"] += 1
                count["paragraphs"] += len(kept)
        print(f"corpus: {name}: " + ", ".join(f"{key} {value:,}" for key, value in count.items()), flush=True)
    return documents, counts


def paragraphs(content: str) -> Iterator[str]:
    """The lines of a document without markup, footnote marks and surplus whitespace; empty ones are left out."""
    for line in content.split("\n"):
        paragraph = collapse(_MARKUP.sub(" ", html.unescape(line)))
        if paragraph:
            yield paragraph


def _spaced(text: str) -> str:
    return _UNSPACED.sub(r" \g<0> ", text)


def _windows(sequence: list[str], length: int) -> Iterator[tuple[str, ...]]:
    return zip(*(sequence[start:] for start in range(length)), strict=False)
