"""Work for other processes, in a module that is imported at once."""

from __future__ import annotations

import os

from study.files import StudyError


def process_of(shared: int, item: int) -> tuple[int, int, int]:
    """The two, and the process it was done in."""
    if item == 13:
        raise StudyError("item 13 is bad")
    if item == 14:
        os._exit(1)
    return shared, item, os.getpid()
