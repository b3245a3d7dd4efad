"""Several processes that train one student together, a share of every batch each, as torchrun starts them.

Ranks take consecutive shares of each batch of the stream: together they read what one process reads, in its order.
Losses are means over sequences of one length with equally many masked tokens, so the mean of the ranks' means is that
of the whole batch, and the average of their gradients its gradient. A loss over pairs of sequences sees those of all
ranks (:func:`gathered`). Rank 0 alone prints, saves and deletes.
"""

from __future__ import annotations

import os
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager, redirect_stdout

import torch
from torch import Tensor, distributed
from torch.distributed.fsdp import FSDPModule, fully_shard
from transformers import PreTrainedModel

from study.execution import forget_launchers, launched
from study.families import family_of, part
from study.files import StudyError
from study.runtime import switched_on

#: Environment variable: 1 lets each process hold only its share of the teacher's parameters.
SHARD_TEACHER = "STUDY_SHARD_TEACHER"


def join() -> None:
    """Join the processes that a launcher started with this one, once; one alone forgets what launchers left there.

    Raises:
        StudyError: more processes on this machine than it has GPUs, if it has any.
    """
    several = launched()
    forget_launchers(alone=not several)
    if not several or joined():
        return
    if torch.cuda.is_available():
        here, devices = int(os.environ["LOCAL_WORLD_SIZE"]), torch.cuda.device_count()
        if here > devices:
            raise StudyError(f"{here} processes on a machine with {devices} GPUs; allowed: at most one process a GPU")
        torch.cuda.set_device(int(os.environ["LOCAL_RANK"]))
    distributed.init_process_group("nccl" if torch.cuda.is_available() else "gloo")


def leave() -> None:
    """Leave what :func:`join` joined."""
    if joined():
        distributed.destroy_process_group()


def joined() -> bool:
    """Whether this process is one of several."""
    return distributed.is_initialized()


def count() -> int:
    """How many processes train the student."""
    return distributed.get_world_size() if joined() else 1


def rank() -> int:
    """The number of this process, from 0."""
    return distributed.get_rank() if joined() else 0


def wait() -> None:
    """Wait until every process is here."""
    if joined():
        distributed.barrier()


@contextmanager
def first_goes_first() -> Iterator[None]:
    """Rank 0 does what is inside, then the others do."""
    if rank():
        wait()
    yield
    if not rank():
        wait()


@contextmanager
def one_voice(seconds: float = 20.0) -> Iterator[None]:
    """Let rank 0 alone print, and tell of a mistake that all find: others wait until the launcher ends them."""
    other = launched() and os.environ["RANK"] != "0"
    with open(os.devnull, "w") as nowhere, redirect_stdout(nowhere if other else sys.stdout):
        try:
            yield
        except StudyError:
            time.sleep(seconds if other else 0.0)
            raise


def share(batch_size: int, accumulation_steps: int) -> int:
    """Sequences that one process reads at once, so that all together read ``batch_size`` a step.

    Raises:
        StudyError: the batch cannot be divided so.
    """
    at_once = batch_size // accumulation_steps
    if at_once % count():
        allowed = ", ".join(str(n) for n in range(1, at_once + 1) if at_once % n == 0)
        raise StudyError(
            f"{count()} processes do not divide distillation.batch_size = {batch_size} in accumulation_steps ="
            f" {accumulation_steps}; allowed: {allowed} processes"
        )
    return at_once // count()


def shards_teacher() -> bool:
    """Whether ``$STUDY_SHARD_TEACHER`` asks for :func:`shard`.

    Raises:
        StudyError: it is neither 0 nor 1, or there is one process alone.
    """
    asked = switched_on(SHARD_TEACHER)
    if asked and count() == 1:
        raise StudyError(f"{SHARD_TEACHER} = 1 with one process; allowed: two or more, started by torchrun")
    return asked


def shard(teacher: PreTrainedModel) -> None:
    """Keep of a frozen teacher's parameters 1 / n on each of n processes; a module has all of its own while it runs.

    Embeddings, every layer and the head are gathered one by one. The head's output matrix is then no longer tied to
    the word embeddings: each process holds a share of both. From here on all processes have to read the teacher
    equally often. Source: fully sharded data parallelism (FSDP, Zhao et al., 2304.11277) as PyTorch has it.
    """
    encoder, family = teacher.base_model, family_of(teacher)
    names = [(encoder, name) for name in family.embedded] + [(teacher, name) for name in family.head]
    around = [getattr(owner, name) for owner, name in names if hasattr(owner, name)]
    for module in (*part(encoder, family.layers), *around, encoder):  # what is inside of another comes first
        fully_shard(module, reshard_after_forward=True)


def release(model: object) -> None:
    """Let a sharded model give back what it gathered for a forward pass that has been broken off."""
    if isinstance(model, FSDPModule):
        model.reset_iter_state()


def gathered(rows: Tensor) -> Tensor:
    """(B, H) of every process, in the order of the batch: (B x processes, H).

    Gradients go to the rows of this process, times the number of processes: the average over them, which training
    takes, is then the gradient of the whole loss, which every process computes.
    """
    if not joined():
        return rows
    own = rows.detach()
    parts = [torch.empty_like(own) for _ in range(count())]
    distributed.all_gather(parts, own.contiguous())
    parts[rank()] = own + count() * (rows - own)
    return torch.cat(parts)


def total(value: Tensor) -> Tensor:
    """The sum of a number over processes."""
    if joined():
        distributed.all_reduce(value)
    return value
