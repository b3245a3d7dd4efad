"""Retrieval of translations: a probe of the encoder as it is."""

from __future__ import annotations

import json
from collections import Counter

from study.data import sources
from study.data.strings import collapse, in_language, words
from study.data.tasks.task import Splits, Task

#: Language -> locale in the names of the folders.
LOCALES = {
    "en": "en",
    "ar": "ar",
    "bg": "bg_BG",
    "de": "de",
    "el": "el",
    "es": "es_ES",
    "fr": "fr_FR",
    "hi": "hi_IN",
    "vi": "vi",
    "zh": "zh_Hans",
}


def load_retrieval() -> Splits:
    """English strings of the interface of Kolibri and their translations, the same strings in every language.

    Left out: strings of fewer than four words, with placeholders or markup, or without a translation in one of the
    languages; translations that share a fifth of their words or more with the English string (names, formulas), since
    these need no understanding; and strings of which a language has two, case aside, since either would be right.
    Source: this study's choice.
    """
    strings = {language: _interface(locale) for language, locale in LOCALES.items()}
    others = [language for language in LOCALES if language != "en"]
    keys = [
        key
        for key, english in strings["en"].items()
        if len(english.split()) >= 4
        and all(strings[language].get(key) and not set(strings[language][key]) & set("{}<>") for language in LOCALES)
        and all(_shared_words(english, strings[language][key]) < 0.2 for language in others)
    ]
    times = {language: Counter(strings[language][key].casefold() for key in keys) for language in LOCALES}
    keys = [key for key in keys if all(times[language][strings[language][key].casefold()] == 1 for language in LOCALES)]
    return {
        in_language("test", other): [{"text": strings["en"][key], "text_pair": strings[other][key]} for key in keys]
        for other in others
    }


def _interface(locale: str) -> dict[str, str]:
    folder = f"kolibri/locale/{locale}/LC_MESSAGES/"
    return {
        key: collapse(string)
        for member in sources.members("kolibri", folder, "-messages.json")
        for key, string in json.loads(sources.read_member("kolibri", member)).items()
    }


def _shared_words(first: str, second: str) -> float:
    """Words that two texts share, as a fraction of the words that occur in either."""
    in_first, in_second = set(words(first)), set(words(second))
    return len(in_first & in_second) / len(in_first | in_second)


TASKS = (
    Task(
        name="retrieval",
        loader=load_retrieval,
        labels=None,
        metric="accuracy",
        metrics=("accuracy",),
        pair=True,
        citation="interface text of Kolibri in ten locales",
        languages=tuple(LOCALES),
        kind="retrieval",
    ),
)
