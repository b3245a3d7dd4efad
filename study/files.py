"""Writing files whole or not at all."""

from __future__ import annotations

import json
import os
import tempfile
from pathlib import Path

from study.config import StudyError


def write_json(path: str | os.PathLike, content: dict) -> None:
    """Write a JSON file by :func:`write_file`; numbers must be finite.

    Raises:
        StudyError: the file cannot be written. ValueError: a number that is not finite.
    """
    write_file(path, json.dumps(content, indent=1, allow_nan=False) + "\n")


def write_file(path: str | os.PathLike, content: str | bytes) -> None:
    """Write a file whole or not at all, making its folder if need be.

    Raises:
        StudyError: the file or its folder cannot be written.
    """
    path = Path(path)
    draft = None
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with tempfile.NamedTemporaryFile(dir=path.parent, prefix=f".{path.name}.", delete=False) as stream:
            draft = Path(stream.name)
            stream.write(content.encode() if isinstance(content, str) else content)
        draft.chmod(0o644)
        draft.replace(path)
    except OSError as error:
        raise StudyError(f"{path}: cannot be written: {error.strerror}") from None
    finally:
        if draft is not None:
            draft.unlink(missing_ok=True)
