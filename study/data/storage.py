"""Splits of data on disk: written whole or not at all, held in memory when loaded."""

from __future__ import annotations

import os
import shutil
import tempfile
from collections.abc import Mapping
from pathlib import Path

from datasets import DatasetDict, disable_progress_bars, load_from_disk

from study.files import StudyError


def save(data: DatasetDict, folder: Path, beside: Mapping[str, str] | None = None) -> None:
    """Write splits to ``folder``, in place of what is there, and only once they are complete.

    Args:
        beside: names and contents of text files that go into the folder, too.

    Raises:
        StudyError: the folder cannot be written.
    """
    folder = Path(folder)
    disable_progress_bars()
    try:
        folder.parent.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(prefix=f".{folder.name}-", dir=folder.parent) as draft:
            complete = Path(draft) / "data"
            data.save_to_disk(complete)
            for name, content in (beside or {}).items():
                (complete / name).write_text(content)
            shutil.rmtree(folder, ignore_errors=True)
            os.replace(complete, folder)
    except OSError as error:
        raise StudyError(f"{folder}: cannot be written ({error.strerror})") from None


def load(folder: Path, stage: str) -> DatasetDict:
    """Splits that :func:`save` wrote, in memory, so that nothing is ever cached beside them.

    Raises:
        StudyError: nothing complete is there; names the stage that writes it.
    """
    try:
        return load_from_disk(str(folder), keep_in_memory=True)
    except (FileNotFoundError, NotADirectoryError):
        raise StudyError(f"{folder}: no data there; run the stage `{stage}` first (make repro)") from None
