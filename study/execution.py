"""Executing a notebook with parameters, by papermill."""

from __future__ import annotations

import os
import signal
import sys
import threading
import time
from pathlib import Path
from typing import Any

from study.files import StudyError, find_root, make_folder

#: Environment variable with the process id of the command that started all of this (the Makefile sets it).
STARTER = "STUDY_STARTER"


def run_notebook(notebook: Path, executed: Path, parameters: dict[str, Any], root: Path | None = None) -> None:
    """Execute a copy of ``notebook`` with papermill, in the study's folder ``notebooks/``, and keep it at ``executed``.

    What its cells print appears here as it is printed.

    Args:
        root: the study's folder; by default found from the working folder.

    Raises:
        StudyError: no such notebook, a parameter its ``parameters`` cell does not have, or a failure inside it (for a
            StudyError in there its own line, else the exception and where the executed copy with the traceback is).
    """
    import nbformat
    import papermill
    from nbclient.exceptions import DeadKernelError
    from papermill.translators import PythonTranslator

    if not notebook.is_file():
        raise StudyError(f"{notebook}: no such notebook")
    cells = nbformat.read(notebook, as_version=4).cells
    declared = [cell for cell in cells if "parameters" in cell.metadata.get("tags", [])]
    known = [parameter.name for cell in declared for parameter in PythonTranslator.inspect(cell)]
    for name in parameters:
        if name not in known:
            raise StudyError(f"{notebook.name}: parameter {name!r} is unknown; allowed: {', '.join(known)}")
    make_folder(executed.parent)
    os.environ.update(
        TRANSFORMERS_VERBOSITY="error", HF_HUB_DISABLE_PROGRESS_BARS="1", HF_DATASETS_DISABLE_PROGRESS_BARS="1"
    )
    try:
        papermill.execute_notebook(
            str(notebook),
            str(executed),
            parameters=parameters,
            kernel_name="python3",
            language="python",
            cwd=str((root or find_root()) / "notebooks"),
            progress_bar=False,
            stdout_file=sys.stdout,
            stderr_file=sys.stderr,
            extra_arguments=["--IPKernelApp.log_level=50"],
            shutdown_kernel="immediate",  # all is written by then; being asked, a kernel takes seconds to end
        )
    except papermill.PapermillExecutionError as error:
        reason = error.evalue if error.ename == "StudyError" else f"{error.ename}: {error.evalue} (see {executed})"
        raise StudyError(reason) from None
    except DeadKernelError:
        raise StudyError(f"{notebook.name}: the notebook's process was killed (often: not enough memory)") from None


def end_with_starter(seconds: float = 1.0) -> None:
    """End this process, and with it its notebook, soon after the process named by ``STUDY_STARTER`` has ended.

    A killed `make` or driver so leaves no cell running behind it. Without the variable nothing is watched.
    """
    starter = os.environ.get(STARTER, "")
    if starter.isdigit():
        threading.Thread(target=_watch, args=(int(starter), seconds), daemon=True).start()


def _watch(starter: int, seconds: float) -> None:
    while _runs(starter):
        time.sleep(seconds)
    os.kill(os.getpid(), signal.SIGINT)  # papermill ends its kernel
    time.sleep(10)
    os.kill(os.getpid(), signal.SIGKILL)  # ipykernel ends by itself when its parent is gone


def _runs(process: int) -> bool:
    try:
        os.kill(process, 0)
    except ProcessLookupError:
        return False
    except PermissionError:
        return True
    return True
