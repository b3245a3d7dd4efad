"""What the machine offers and what a run leaves on record about it."""

from __future__ import annotations

import ctypes
import os
import platform
import subprocess
import sys
from datetime import date
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch

from study.files import StudyError

#: Where latency and steps of `make benchmark` are measured.
PROCESSOR = torch.device("cpu")


def compute_device() -> torch.device:
    """Where models are trained and read: the GPU in use (the first that is visible, unless set), else the processor."""
    return torch.device("cuda", torch.cuda.current_device()) if torch.cuda.is_available() else torch.device("cpu")


def one_device(arguments: Any) -> Any:
    """Arguments of transformers' Trainer that never divide a batch over the GPUs of a process (DataParallel)."""
    arguments._n_gpu = min(1, arguments.n_gpu)  # what it sets when it is first asked
    return arguments


def use_bf16(precision: str, device: torch.device | None = None) -> bool:
    """Whether to run under bf16 autocast: ``auto`` means where the device has bf16 instructions of its own.

    Raises:
        StudyError: ``bf16`` where it has none: it would be emulated, slower than fp32 and no more exact.
    """
    device = device or compute_device()
    if precision == "bf16" and not has_bf16(device):
        raise StudyError(f"precision = bf16: {_processor(device)} has no bf16 instructions; allowed: auto, fp32")
    return precision == "bf16" or (precision == "auto" and has_bf16(device))


def has_bf16(device: torch.device) -> bool:
    """Whether a device multiplies in bf16 by instructions of its own."""
    if device.type == "cuda":
        return torch.cuda.is_bf16_supported(including_emulation=False)
    return torch.cpu._is_avx512_bf16_supported() or torch.cpu._is_amx_tile_supported()


def autocast(device: torch.device, bf16: bool) -> torch.autocast:
    """Matrix products in bfloat16 on ``device``, or as the weights are."""
    return torch.autocast(device.type, dtype=torch.bfloat16, enabled=bf16)


def keep_freed_memory() -> bool:
    """Let the C library hand freed memory out again instead of returning it to the system; whether it could.

    A training step frees and takes the same large tensors over and over. By default glibc unmaps them, and every page
    of the next ones has to be faulted in and zeroed again, which can take longer than the arithmetic. The peak of
    memory in use stays, by construction, what the process needed at some time. Only glibc has this setting.
    """
    try:
        library = ctypes.CDLL(None)
        return bool(library.mallopt(_MMAP_MAX, 0) and library.mallopt(_TRIM_THRESHOLD, -1))
    except (AttributeError, OSError, TypeError):  # another C library, or none to be found by that name
        return False


_TRIM_THRESHOLD, _MMAP_MAX = -1, -4  # parameters of mallopt(3)


def cores() -> int:
    """Cores that this process may use."""
    return len(os.sched_getaffinity(0)) if sys.platform == "linux" else os.cpu_count() or 1


def loaders() -> int:
    """Processes that prepare batches ahead of training: ``$STUDY_LOADERS``, else none. Batches are the same.

    Raises:
        StudyError: it is no number from 0 on.
    """
    text = os.environ.get("STUDY_LOADERS") or "0"
    if not text.isdecimal():
        raise StudyError(f"STUDY_LOADERS = {text}; allowed: a number of processes, 0 for none")
    return int(text)


def switched_on(name: str) -> bool:
    """Whether an environment variable asks for what it names: 1, not 0 or nothing.

    Raises:
        StudyError: it is something else.
    """
    text = os.environ.get(name) or "0"
    if text not in ("0", "1"):
        raise StudyError(f"{name} = {text}; allowed: 1, 0 or nothing")
    return text == "1"


def environment(device: torch.device | None = None) -> dict[str, Any]:
    """Versions, processor, threads and date: the fields of :class:`study.records.Environment`.

    Args:
        device: what was computed on, whose name is given; by default where models are trained.
    """
    device = device or compute_device()
    return {
        "python": platform.python_version(),
        **{package: version(package) for package in ("torch", "transformers", "datasets")},
        "processor": _processor(device),
        "instructions": torch.backends.cpu.get_cpu_capability() + (", bf16" if use_bf16("auto", device) else ""),
        "cores": cores(),
        "threads": torch.get_num_threads(),
        "date": date.today().isoformat(),
    }


def commit(folder: Path) -> str | None:
    """The first 12 digits of the commit that the study's code comes from, with a + where it was changed since.

    None where the study is not in a repository of its own: outside any, or unpacked inside another one.

    Raises:
        StudyError: git refuses to read a repository that belongs to another user.
    """
    top = _git(folder, "rev-parse", "--show-toplevel")
    if top is None or not (Path(top) / "study" / "runtime.py").is_file():
        return None
    head = _git(folder, "rev-parse", "HEAD")
    changed = _git(Path(top), "status", "--porcelain", "--untracked-files=no", "--", "study", "notebooks")
    return head and head[:12] + ("+" if changed else "")


def _git(folder: Path, *arguments: str) -> str | None:
    """What a git command prints; None where it fails or git is not there."""
    try:
        outcome = subprocess.run(["git", *arguments], cwd=folder, capture_output=True, text=True)
    except OSError:
        return None
    if "dubious ownership" in outcome.stderr:
        advice = "see `git config --global --add safe.directory`"
        raise StudyError(f"{folder}: git says dubious ownership: it belongs to another user ({advice})")
    return outcome.stdout.strip() if outcome.returncode == 0 else None


def _processor(device: torch.device) -> str:
    if device.type == "cuda":
        return torch.cuda.get_device_name(device)
    information = Path("/proc/cpuinfo")
    if information.is_file():
        for line in information.read_text().splitlines():
            if line.startswith("model name"):
                return line.partition(":")[2].strip()
    return platform.processor() or platform.machine()
