"""Rows of files and data sets of one's own, one after another, and what is known of their columns."""

from __future__ import annotations

import csv
import gzip
import json
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, TextIO

import pyarrow.parquet
from datasets import Features, config, load_dataset, load_dataset_builder
from pyarrow import ArrowException

from study.declarations import Origin, folder_of, format_of
from study.files import StudyError, UnreachableError

#: A file of plain text is one document up to this many characters; longer ones are cut at a line's end, if one comes.
LONGEST = 1_000_000
_ONE_A_LINE = "allowed: one JSON object a line"

Row = dict[str, Any]


def documents(file: Path) -> Iterator[str]:
    """A file of plain text, in pieces of about :data:`LONGEST` characters.

    Raises:
        StudyError: it cannot be read, or is not UTF-8.
    """
    with _reading(file), _opened(file) as stream:
        while piece := stream.read(LONGEST):
            yield piece + stream.readline(LONGEST)


def file_rows(file: Path) -> Iterator[Row]:
    """The rows of a file by its format: column -> value; an empty cell is None or "".

    .csv: a header, commas, quotes (RFC 4180); .tsv: a header, tabs, no quotes; .jsonl: an object a line.

    Raises:
        StudyError: it cannot be read, is not UTF-8, or a row does not fit the header.
    """
    kind = format_of(file)
    with _reading(file):
        if kind == ".parquet":
            for batch in pyarrow.parquet.ParquetFile(file).iter_batches(batch_size=1000):
                yield from batch.to_pylist()
            return
        with _opened(file, newline="" if kind == ".csv" else None) as stream:
            yield from _lines(file, stream) if kind == ".jsonl" else _table(file, stream, kind)


def file_features(file: Path) -> Features | None:
    """What a Parquet file says of its columns (names of classes among it); None of other formats."""
    if format_of(file) != ".parquet":
        return None
    with _reading(file):
        return Features.from_arrow_schema(pyarrow.parquet.read_schema(file))


def dataset_rows(origin: Origin, part: str, root: Path, whole: bool) -> Iterator[Row]:
    """The rows of a split of a data set.

    Args:
        part: ``split`` or ``config/split``.
        whole: load it once instead of streaming it; without a connection, what the hub's cache holds is used.

    Raises:
        StudyError: it cannot be reached or has no such configuration or split.
    """
    folder, (name, split) = folder_of(origin, root), _part(origin, part)
    streaming = folder is not None or not (whole or config.HF_HUB_OFFLINE)
    with _reading(f"{origin.dataset} {part}"):
        place, options = str(folder or origin.dataset), {"revision": origin.revision, "streaming": streaming}
        yield from load_dataset(place, name, split=split, **options)


def dataset_features(origin: Origin, part: str, root: Path) -> Features | None:
    """What is known of the columns of a data set without its rows.

    Raises:
        StudyError: it cannot be reached or has no such configuration or split.
    """
    name, split = _part(origin, part)
    with _reading(f"{origin.dataset} {part}"):
        folder = folder_of(origin, root)
        builder = load_dataset_builder(str(folder or origin.dataset), name, revision=origin.revision)
        known = list(builder.info.splits or builder.config.data_files or ())
        if known and split not in known:
            raise ValueError(f"split {split!r} is unknown; allowed: {', '.join(map(str, known))}")
        if builder.info.features is not None or folder is None:
            return builder.info.features
        return load_dataset(str(folder), name, split=split, streaming=True).features


def cell(row: Row, column: str, where: str) -> Any:
    """What a row has in a column; ``where`` names its file in errors.

    Raises:
        StudyError: no such column.
    """
    if column not in row:
        raise StudyError(f"{where}: no column {column!r}; allowed: {', '.join(row)}")
    return row[column]


def text_in(row: Row, column: str, where: str) -> str:
    """The text that a row has in a column, "" where it has none.

    Raises:
        StudyError: no such column, or no text in it.
    """
    value = cell(row, column, where)
    if not isinstance(value, str | None):
        raise StudyError(f"{where}: {column} = {str(value)[:40]!r} is no text; allowed: strings")
    return value or ""


def _part(origin: Origin, part: str) -> tuple[str | None, str]:
    name, slash, split = part.rpartition("/")
    return (name if slash else origin.config), split


def _opened(file: Path, newline: str | None = None) -> TextIO:
    opened: Any = gzip.open if file.suffix == ".gz" else open
    return opened(file, "rt", encoding="utf-8-sig", newline=newline)


def _lines(file: Path, stream: TextIO) -> Iterator[Row]:
    for number, line in enumerate(stream, start=1):
        if line.strip():
            try:
                row = json.loads(line)
            except json.JSONDecodeError as error:
                raise StudyError(f"{file}: line {number} is no JSON ({error.msg}); {_ONE_A_LINE}") from None
            if not isinstance(row, dict):
                raise StudyError(f"{file}: line {number} is no object; {_ONE_A_LINE}")
            yield row


def _table(file: Path, stream: TextIO, kind: str) -> Iterator[Row]:
    csv.field_size_limit(2**31 - 1)
    looks: dict[str, Any] = {"delimiter": "\t", "quoting": csv.QUOTE_NONE} if kind == ".tsv" else {"strict": True}
    reader = csv.reader(stream, **looks)
    header = next(reader, [])
    if len(header) > len(set(header)):
        raise StudyError(f"{file}: the header names a column twice; allowed: each once")
    for cells in reader:
        if len(cells) != len(header):
            if not any(cells):
                continue
            raise StudyError(
                f"{file}: line {reader.line_num} has {len(cells)} cells; allowed: {len(header)}, as the header has"
            )
        yield dict(zip(header, cells, strict=True))


@contextmanager
def _reading(what: Path | str) -> Iterator[None]:
    """Tells what goes wrong while something is read in one line that names it."""
    try:
        yield
    except ConnectionError:
        reason = "HF_HUB_OFFLINE is set, and the hub's cache lacks it" if config.HF_HUB_OFFLINE else "no connection"
        raise UnreachableError(f"{what}: cannot be reached: {reason}") from None
    except (OSError, ValueError, csv.Error, ArrowException, EOFError) as error:
        lines = str(error).splitlines() or [type(error).__name__]
        allowed = "; allowed: UTF-8" if isinstance(error, UnicodeDecodeError) else ""
        raise StudyError(f"{what}: cannot be read: {lines[0]}{allowed}") from None
