"""Splits of data on disk: written whole or not at all, then held in memory or mapped from the file."""

from __future__ import annotations

import os
import shutil
import tempfile
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from itertools import chain
from pathlib import Path

import numpy
import pyarrow
from datasets import Dataset, DatasetDict, Features, List, Value, disable_progress_bars, load_from_disk
from datasets.arrow_writer import ArrowWriter

from study.files import StudyError

#: Bytes of tokens of a split that are held in memory to write it: `Dataset.from_dict` takes some 28 times as many.
HELD = 2**24


def save(data: DatasetDict, folder: Path, beside: Mapping[str, str] | None = None) -> None:
    """Write splits to ``folder``, in place of what is there, and only once they are complete.

    Args:
        beside: names and contents of text files that go into the folder, too.

    Raises:
        StudyError: the folder cannot be written.
    """
    with _whole(folder) as complete:
        data.save_to_disk(complete)
        for name, content in (beside or {}).items():
            (complete / name).write_text(content)


def save_sequences(
    splits: Mapping[str, Iterable[numpy.ndarray]], folder: Path, beside: Callable[[], Mapping[str, str]]
) -> None:
    """As :func:`save`, of splits of packed sequences that come in parts (rows, T); they are never all in memory.

    Args:
        splits: column ``input_ids`` of each, all of one type and length. beside: called when all is written.
    """
    with _whole(folder) as complete:
        data, long = {}, {}
        for name, parts in splits.items():
            parts, first, size = iter(parts), [], 0
            while size < HELD and (part := next(parts, None)) is not None:
                first.append(part)
                size += part.nbytes
            rows = numpy.concatenate(first)
            features = Features({"input_ids": List(Value(rows.dtype.name), length=rows.shape[1])})
            data[name] = Dataset.from_dict({"input_ids": rows}, features=features)
            if (part := next(parts, None)) is not None:
                long[name] = complete.parent / f"{name}.arrow"
                with ArrowWriter(features=features, path=str(long[name])) as writer:
                    for rows in chain(first, [part], parts):
                        flat = pyarrow.array(rows.ravel())
                        column = pyarrow.FixedSizeListArray.from_arrays(flat, rows.shape[1])
                        writer.write_table(pyarrow.table({"input_ids": column}))
                    writer.finalize()
        DatasetDict({name: data[name] for name in reversed(data)}).save_to_disk(complete)  # validation first
        for name, file in long.items():  # the whole of it in the place of its beginning
            os.replace(file, complete / name / "data-00000-of-00001.arrow")
        for name, content in beside().items():
            (complete / name).write_text(content)


def load(folder: Path, stage: str, in_memory: bool = True) -> DatasetDict:
    """Splits that :func:`save` or :func:`save_sequences` wrote.

    Args:
        in_memory: so that nothing is ever cached beside them; else mapped from the file, for large ones.

    Raises:
        StudyError: nothing complete is there; names the stage that writes it.
    """
    try:
        return load_from_disk(str(folder), keep_in_memory=in_memory)
    except (FileNotFoundError, NotADirectoryError):
        raise StudyError(f"{folder}: no data there; run the stage `{stage}` first (make repro)") from None


@contextmanager
def _whole(folder: Path) -> Iterator[Path]:
    """A new folder that takes the place of ``folder`` once it is complete."""
    folder = Path(folder)
    disable_progress_bars()
    try:
        folder.parent.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(prefix=f".{folder.name}-", dir=folder.parent) as draft:
            complete = Path(draft) / "data"
            yield complete
            shutil.rmtree(folder, ignore_errors=True)
            os.replace(complete, folder)
    except OSError as error:
        raise StudyError(f"{folder}: cannot be written ({error.strerror})") from None
