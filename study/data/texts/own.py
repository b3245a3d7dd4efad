"""Texts of one's own, as params.yaml declares them."""

from __future__ import annotations

from collections.abc import Iterator
from itertools import islice
from pathlib import Path

from study.data.rows import Row, cell, dataset_rows, documents, file_rows, text_in
from study.declarations import OwnText, format_of, matching


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
    column, wanted = text.column or "", text.where or {}
    for row in rows:
        known = {name: cell(row, name, where) for name in (column, *wanted)}
        if all(str(known[name]) == str(value) for name, value in wanted.items()):
            content = text_in(row, column, where)
            yield content.encode(errors="replace").decode()  # JSON may hold halves of characters
