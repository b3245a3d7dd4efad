"""Plain operations on text that sources, tasks and cleaning share."""

from __future__ import annotations

import re
import unicodedata


def collapse(text: str) -> str:
    """Every run of whitespace made one blank, none at the ends."""
    return " ".join(text.split())


def fold(text: str) -> str:
    """Case and accents set aside."""
    return "".join(char for char in unicodedata.normalize("NFKD", text) if not unicodedata.combining(char)).casefold()


def words(text: str) -> list[str]:
    """Its runs of letters and digits, casefolded."""
    return re.findall(r"\w+", text.casefold())


def in_language(name: str, language: str) -> str:
    """Name of a text or split in a language: its own name for English."""
    return name if language == "en" else f"{name}-{language}"
