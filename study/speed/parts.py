"""How seconds are taken: of calls, of whole training steps, and of their parts."""

from __future__ import annotations

import time
from collections.abc import Callable
from typing import Any

import torch
from transformers import TrainerCallback

from study.distillation.objectives import Objective
from study.runtime import PROCESSOR, compute_device

PARTS = ("data", "teacher forward", "student forward", "loss", "backward", "optimiser")


def idle(device: torch.device) -> float:
    """The time at which a device has done all that it was given."""
    if device.type == "cuda":
        torch.cuda.synchronize()
    return time.perf_counter()


def timed(call: Callable[[], Any], repeats: int, device: torch.device = PROCESSOR) -> list[float]:
    """Seconds of each of several calls, the device idle before and behind it."""
    seconds = []
    for _ in range(repeats):
        began = idle(device)
        call()
        seconds.append(idle(device) - began)
    return seconds


class WholeSteps(TrainerCallback):
    """Seconds of every step from the end of the one before, the device idle at both."""

    def __init__(self) -> None:
        self.seconds: list[float] = []

    def on_train_begin(self, args, state, control, **kwargs):
        self.last = idle(compute_device())

    def on_step_end(self, args, state, control, **kwargs):
        now = idle(compute_device())
        self.seconds.append(now - self.last)
        self.last = now


class StepTimer(TrainerCallback):
    """Seconds per part of every step, taken around the objective's own methods and at the Trainer's events.

    Attributes:
        steps: one dict per step, :data:`PARTS` -> seconds; ``backward`` includes clipping of gradients.
    """

    def __init__(self, objective: Objective):
        self.steps: list[dict[str, float]] = []
        self._current: dict[str, float] = {}
        self._last = 0.0
        for name, part in {
            "read_teacher": "teacher forward",
            "read_student": "student forward",
            "loss": "loss",
        }.items():
            setattr(objective, name, self._timed(getattr(objective, name), part))

    def _timed(self, function: Callable[..., Any], part: str) -> Callable[..., Any]:
        def timed(*arguments: Any) -> Any:
            self._lap("between")
            result = function(*arguments)
            self._lap(part)
            return result

        return timed

    def _lap(self, part: str) -> None:
        now = time.perf_counter()
        self._current[part] = self._current.get(part, 0.0) + now - self._last
        self._last = now

    def on_train_begin(self, args, state, control, **kwargs):
        self._current, self._last = dict.fromkeys(PARTS, 0.0), time.perf_counter()

    def on_step_begin(self, args, state, control, **kwargs):
        self._lap("data")

    def on_pre_optimizer_step(self, args, state, control, **kwargs):
        self._lap("backward")

    def on_step_end(self, args, state, control, **kwargs):
        self._lap("optimiser")
        self._current["optimiser"] += self._current.pop("between", 0.0)
        self.steps.append(self._current)
        self._current = dict.fromkeys(PARTS, 0.0)
