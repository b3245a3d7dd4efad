"""Translated interface text of Home Assistant, from the package homeassistant."""

from __future__ import annotations

import json
import re
from collections.abc import Iterator

from study.data import sources
from study.data.strings import collapse
from study.files import StudyError

#: Languages of the test data that Wikipedia's articles lack and that this source has enough text in.
LANGUAGES = ("bg", "de", "el", "ru", "vi", "zh")

#: A component's strings by their keys, nested.
Strings = dict[str, "str | Strings"]


def read_interface(language: str) -> Iterator[str]:
    """Interface text, one string a line, one document for each component of the program.

    Left out: strings with placeholders, markup or addresses, and those left in English. All but the sentences among
    the rest are too short for :func:`study.data.cleaning.clean`.

    Raises:
        StudyError: a language without data; or see :func:`study.data.sources.fetch`.
    """
    names = sources.members("homeassistant", "homeassistant/components/", ".json")
    locale = "zh-Hans" if language == "zh" else language
    names = [name for name in names if name.endswith(f"/translations/{locale}.json")]
    if not names:
        raise StudyError(f"interface: no text in {language!r}; allowed: {', '.join(sorted(LANGUAGES))}")
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
