"""Seconds per part of a training step."""

from __future__ import annotations

import time
from collections.abc import Callable
from typing import Any

import torch
from transformers import TrainerCallback

from study.distillation.objectives import Objective

PARTS = ("data", "teacher forward", "student forward", "loss", "backward", "optimiser")


class StepTimer(TrainerCallback):
    """Seconds per part of every step, taken around the objective's own methods and at the Trainer's events.

    Attributes:
        steps: one dict per step, :data:`PARTS` -> seconds; ``backward`` includes clipping of gradients.
    """

    def __init__(self, objective: Objective):
        self.steps: list[dict[str, float]] = []
        self._current: dict[str, float] | None = None
        self._last = 0.0
        for name, part in (
            ("read_teacher", "teacher forward"),
            ("read_student", "student forward"),
            ("loss", "loss"),
        ):
            setattr(objective, name, self._timed(getattr(objective, name), part))

    def _timed(self, function: Callable[..., Any], part: str) -> Callable[..., Any]:
        def timed(*arguments: Any) -> Any:
            self._lap("between")
            result = function(*arguments)
            self._lap(part)
            return result

        return timed

    def _lap(self, part: str) -> None:
        if torch.cuda.is_available():
            torch.cuda.synchronize()
        now = time.perf_counter()
        if self._current is not None:
            self._current[part] = self._current.get(part, 0.0) + now - self._last
        self._last = now

    def on_train_begin(self, args, state, control, **kwargs):
        self._current = dict.fromkeys(PARTS, 0.0)
        self._lap("data")

    def on_step_begin(self, args, state, control, **kwargs):
        self._lap("data")

    def on_pre_optimizer_step(self, args, state, control, **kwargs):
        self._lap("backward")

    def on_step_end(self, args, state, control, **kwargs):
        self._lap("optimiser")
        assert self._current is not None
        self._current["optimiser"] += self._current.pop("between", 0.0)
        self.steps.append(self._current)
        self._current = dict.fromkeys(PARTS, 0.0)
