"""One training step as a CUDA graph: its hundreds of small kernels are started together, not one by one from Python."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from study.distillation.objectives.base import Batch, Objective


class _Step(nn.Module):
    """The loss of an objective as a function of tensors alone, in the order of ``keys``."""

    def __init__(self, objective: Objective, keys: list[str]):
        super().__init__()
        self.objective, self.keys, self.plain = objective, keys, objective.forward

    def forward(self, *tensors: Tensor) -> Tensor:
        return self.plain(**dict(zip(self.keys, tensors, strict=True)))["loss"]


def record_step(objective: Objective, batch: Batch, bf16: bool) -> None:
    """Record forward and backward pass of ``objective`` on ``batch``, and replay them on batches of its shapes.

    Every batch of a training has the same shapes, no objective draws at random and none waits for the device, so the
    recording computes what the step computes. Batches of other shapes, and evaluation, take the usual way.

    Args:
        batch: on the device, where student and teacher are, too.

    Source: this study's choice, by :func:`torch.cuda.make_graphed_callables`.
    """
    objective.train()
    keys, shapes = list(batch), {key: x.shape for key, x in batch.items()}
    step = _Step(objective, keys)
    with torch.autocast("cuda", dtype=torch.bfloat16, enabled=bf16, cache_enabled=False):
        graphed: Any = torch.cuda.make_graphed_callables(step, tuple(batch.values()), allow_unused_input=True)

    def forward(**batch: Tensor) -> dict[str, Tensor]:
        replays = objective.training and torch.is_grad_enabled()
        if replays and {key: x.shape for key, x in batch.items()} == shapes:
            return {"loss": graphed(*(batch[key] for key in keys))}
        return step.plain(**batch)

    objective.forward = forward  # type: ignore[method-assign]
