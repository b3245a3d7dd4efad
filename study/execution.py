"""Executing a notebook with parameters, by papermill."""

from __future__ import annotations

import ast
import os
import signal
import sys
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from study.files import StudyError, find_root, make_folder, write_file

#: Variables that launchers of distributed training set.
LAUNCHERS = ("LOCAL_RANK", "RANK", "WORLD_SIZE", "LOCAL_WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT", "GROUP_RANK")
#: Environment variable with the process id of the command that started all of this (the Makefile sets it).
STARTER = "STUDY_STARTER"
#: Environment variable with the number of a command among those that run side by side (the Makefile sets it).
JOB = "STUDY_JOB"


def run_notebook(notebook: Path, executed: Path, parameters: dict[str, Any], root: Path | None = None) -> None:
    """Execute a copy of ``notebook`` with papermill, in the study's folder ``notebooks/``, and keep it at ``executed``.

    What its cells print appears here as it is printed.

    Args:
        root: the study's folder; by default found from the working folder.

    Raises:
        StudyError: no such notebook, one that cannot be read, a parameter its ``parameters`` cell does not have or has
            with another type, a description that changes meanwhile, or a failure inside it (for a StudyError in there
            its own line, else the exception and where the executed copy with the traceback is; for a dead process the
            signal that ended it).
    """
    import papermill
    from jupyter_client.manager import AsyncKernelManager
    from nbclient.exceptions import DeadKernelError

    _check_parameters(notebook, parameters)
    root = (root or find_root()).resolve()
    code = Path(__file__).resolve().parents[1]
    if (root / "study").is_dir() and code != root:
        raise StudyError(f"the environment in use runs the code of {code}; allowed: that of {root} (make environment)")
    make_folder(executed.parent)
    _set_environment()
    codes: list[int] = []

    class Kernel(AsyncKernelManager):
        """Keeps the exit code, which is gone once nbclient has cleaned up."""

        async def _async_is_alive(self) -> bool:
            code = await self.provisioner.poll() if self.has_kernel and self.provisioner else None
            codes.extend([] if code is None else [code])
            return self.has_kernel and code is None

        is_alive = _async_is_alive

    try:
        with unchanged(root / "notebooks" / str(parameters.get("description", ""))):
            papermill.execute_notebook(
                str(notebook),
                str(executed),
                parameters=parameters,
                kernel_name="python3",
                language="python",
                cwd=str(root / "notebooks"),
                progress_bar=False,
                stdout_file=sys.stdout,
                stderr_file=sys.stderr,
                extra_arguments=["--IPKernelApp.log_level=50"],
                kernel_manager_class=Kernel,
                shutdown_kernel="immediate",  # all is written by then; being asked, a kernel takes seconds to end
            )
    except papermill.PapermillExecutionError as error:
        told = " ".join(str(error.evalue).split())
        raise StudyError(told if error.ename == "StudyError" else f"{error.ename}: {told} (see {executed})") from None
    except DeadKernelError:
        raise StudyError(f"{notebook.name}: the notebook's process {_ending(codes)}") from None


def write_code(notebooks: Path, folder: Path) -> None:
    """Keep the code of every notebook of a folder, with the tags of its cells, as ``folder/<name>.py``.

    Files that hold it already are left alone, so that what began before is not older than what it depends on.

    Raises:
        StudyError: a notebook cannot be read, or the folder cannot be written.
    """
    codes = {f"{path.stem}.py": _code(path) for path in sorted(notebooks.glob("*.ipynb"))}
    make_folder(folder)
    for path in folder.iterdir():
        if path.name not in codes:
            path.unlink()
    for name, code in codes.items():
        path = folder / name
        if not path.is_file() or path.read_text() != code:
            write_file(path, code)


def _code(notebook: Path) -> str:
    cells = [cell for cell in _cells(notebook) if cell.cell_type == "code"]
    tags = ["".join(f"# tag: {tag}\n" for tag in cell.metadata.get("tags", [])) for cell in cells]
    return "\n\n".join(tag + cell.source for tag, cell in zip(tags, cells, strict=True)) + "\n"


@contextmanager
def unchanged(description: Path) -> Iterator[None]:
    """Refuse what was made while the description of it was changed: DVC would take it for what the new one asks for.

    Raises:
        StudyError: the file is another than before.
    """
    before = description.read_bytes() if description.is_file() else None
    yield
    if before is not None and (not description.is_file() or description.read_bytes() != before):
        raise StudyError(
            f"{description.resolve()}: changed while it was run, so that the outcome is that of the description before;"
            " run it again"
        )


def declared_parameters(notebook: Path) -> dict[str, str]:
    """The parameters of a notebook's ``parameters`` cell: name -> default, as it is written there.

    Raises:
        StudyError: no such notebook, or one that cannot be read.
    """
    from papermill.translators import PythonTranslator

    declared = [cell for cell in _cells(notebook) if "parameters" in cell.metadata.get("tags", [])]
    return {own.name: own.default for cell in declared for own in PythonTranslator.inspect(cell)}


def _cells(notebook: Path) -> list[Any]:
    import nbformat

    if not notebook.is_file():
        raise StudyError(f"{notebook}: no such notebook")
    try:
        return nbformat.read(notebook, as_version=4).cells
    except (ValueError, AttributeError, KeyError, TypeError, nbformat.ValidationError) as error:
        raise StudyError(f"{notebook}: not a notebook: {str(error).splitlines()[0][:100]}") from None


def _check_parameters(notebook: Path, parameters: dict[str, Any]) -> None:
    """Names and types of ``parameters`` are those of the notebook's ``parameters`` cell."""
    known = declared_parameters(notebook)
    for name, value in parameters.items():
        if name not in known:
            raise StudyError(f"{notebook.name}: parameter {name!r} is unknown; allowed: {', '.join(known)}")
        try:
            default = ast.literal_eval(known[name])
        except (ValueError, SyntaxError):
            continue  # computed: any value may be right
        fits = type(value) is type(default) or (type(default) is float and type(value) is int)
        if default is not None and not fits:
            allowed = f"{type(default).__name__}, such as {default!r}"
            raise StudyError(f"{notebook.name}: parameter {name} = {value!r}; allowed: {allowed}")


def _ending(codes: list[int]) -> str:
    code = codes[0] if codes else 0
    if code >= 0:
        return f"ended with exit code {code}"
    why = " (often: not enough memory)" if -code == signal.SIGKILL else ""
    return f"was ended by {signal.Signals(-code).name}{why}"


def launched() -> bool:
    """Whether torchrun, or accelerate launch, started this process as one of several."""
    return "TORCHELASTIC_RUN_ID" in os.environ and os.environ.get("WORLD_SIZE", "1") != "1"


def take_one_gpu() -> None:
    """Leave this process, and those that it starts, one GPU: of the visible ones that of its job number, in turn.

    To be called before CUDA starts. One of several processes sees all: :func:`study.distillation.processes.join`
    takes its own. Without it, transformers' Trainer would divide batches over all GPUs (DataParallel).
    """
    visible = [] if launched() else visible_gpus()
    if len(visible) > 1:
        job = os.environ.get(JOB, "")
        os.environ["CUDA_VISIBLE_DEVICES"] = visible[int(job if job.isdigit() else 0) % len(visible)]


def visible_gpus() -> list[str]:
    """The GPUs that CUDA would see, as CUDA_VISIBLE_DEVICES names them or by number."""
    named = os.environ.get("CUDA_VISIBLE_DEVICES")
    if named is not None:
        return [name.strip() for name in named.split(",") if name.strip()]
    if not any(Path("/dev").glob("nvidia[0-9]*")):  # nothing heavy is loaded where there are none
        return []
    import torch  # counts them without starting CUDA

    return [str(number) for number in range(torch.cuda.device_count())]


def forget_launchers(alone: bool = True) -> None:
    """Take out the variables by which launchers of distributed training steer accelerate and PyTorch.

    Args:
        alone: also those that make this process one of several.
    """
    for name in list(os.environ):
        several = name in LAUNCHERS or name.startswith("TORCHELASTIC_")
        if name.startswith("ACCELERATE_") or (alone and several):
            del os.environ[name]


def be_quiet() -> None:
    """Keep libraries of models and data from showing warnings and progress of their own."""
    os.environ.update(
        TRANSFORMERS_VERBOSITY="error",
        HF_HUB_VERBOSITY="error",
        HF_HUB_DISABLE_PROGRESS_BARS="1",
        HF_DATASETS_DISABLE_PROGRESS_BARS="1",
    )


def _set_environment() -> None:
    """What a notebook's process inherits: params decide, whatever a launcher, an IDE or another project left there.

    Its Python and packages are those of this process, and its figures are drawn into the notebook.
    """
    forget_launchers()
    take_one_gpu()
    if os.environ.get("STUDY_SOURCES"):  # a kernel works in another folder than the command
        os.environ["STUDY_SOURCES"] = str(Path(os.environ["STUDY_SOURCES"]).expanduser().resolve())
    be_quiet()
    os.environ.update(
        MPLBACKEND="module://matplotlib_inline.backend_inline",
        JUPYTER_PATH=str(Path(sys.prefix) / "share" / "jupyter"),
        JUPYTER_PREFER_ENV_PATH="1",
        PYTHONPATH=str(Path(__file__).resolve().parents[1]),
    )


def end_with_starter(seconds: float = 1.0) -> None:
    """End this process, and with it its notebook, soon after the process named by ``STUDY_STARTER`` has ended.

    A killed `make` or driver so leaves no cell running behind it. Where it has ended already, this process ends at
    once with exit status 255: xargs then starts no more. Without the variable nothing is watched. One of several
    processes ends with their launcher instead.
    """
    starter = str(os.getppid()) if launched() else os.environ.get(STARTER, "")
    if starter.isdigit():
        if not runs(int(starter)):
            print(f"error: {STARTER} = {starter}, the process that this one works for, has ended", file=sys.stderr)
            sys.exit(255)
        threading.Thread(target=_watch, args=(int(starter), seconds), daemon=True).start()


def _watch(starter: int, seconds: float) -> None:
    while runs(starter):
        time.sleep(seconds)
    os.kill(os.getpid(), signal.SIGINT)  # papermill ends its kernel
    time.sleep(10)
    os.kill(os.getpid(), signal.SIGKILL)  # ipykernel ends by itself when its parent is gone


def runs(process: int) -> bool:
    """Whether a process of this machine with that number is there."""
    try:
        os.kill(process, 0)
    except ProcessLookupError:
        return False
    except PermissionError:
        return True
    return True
