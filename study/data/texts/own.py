"""Texts of one's own, as params.yaml declares them."""

from __future__ import annotations

from collections.abc import Iterator
from itertools import islice
from pathlib import Path

from study.data.rows import Row, dataset_rows, documents, file_rows
from study.declarations import OwnText, format_of, matching
from study.files import StudyError


def read_own(text: OwnText, root: Path) -> Iterator[str]:
    """Documents of a text, one after another; empty ones are left out.

    Args:
        root: the study's folder, which paths are relative to.

    Raises:
        StudyError: nothing matches, something cannot be read, or a row has no such column or no text in it.
    """
    return islice((content for content in _all(text, root) if content), text.limit)


def _all(text: OwnText, root: Path) -> Iterator[str]:
    if text.dataset:
        yield from _column(
            text, f"{text.dataset} {text.split}", dataset_rows(text, text.split or "", root, whole=False)
        )
    for file in matching(text.files, root) if text.files else ():
        yield from documents(file) if format_of(file) == ".txt" else _column(text, str(file), file_rows(file))


def _column(text: OwnText, where: str, rows: Iterator[Row]) -> Iterator[str]:
    for row in rows:
        for column in (text.column or "", *(text.where or {})):
            if column not in row:
                raise StudyError(f"{where}: no column {column!r}; allowed: {', '.join(row)}")
        if all(str(row[column]) == str(value) for column, value in (text.where or {}).items()):
            content = row[text.column or ""]
            if not isinstance(content, str | None):
                raise StudyError(f"{where}: {text.column} = {str(content)[:40]!r} is no text; allowed: strings")
            yield (content or "").encode(errors="replace").decode()  # JSON may hold halves of characters
