"""The least time that a step's matrix products take: the same products, alone."""

from __future__ import annotations

import statistics
from collections.abc import Callable
from functools import cache
from typing import Any

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from study.speed.parts import timed

#: Operators that multiply matrices, as PyTorch dispatches them -> where their two matrices stand.
PRODUCTS = {"mm": 0, "bmm": 0, "addmm": 1, "baddbmm": 1, "addmm_": 1, "baddbmm_": 1}

Matrix = tuple[tuple[int, ...], tuple[int, ...], torch.dtype]  # shape, strides and type


def floor(step: Callable[[], Any], repeats: int = 12) -> float:
    """Median seconds of the matrix products of one ``step()`` alone: same shapes, strides, types and order.

    Operands are random and results go to memory that is there already, so that nothing but the products is timed.
    """
    with _Products() as recorded:
        step()

    @cache
    def operand(shape: tuple[int, ...], strides: tuple[int, ...], dtype: torch.dtype) -> Tensor:
        length = 1 + sum((size - 1) * stride for size, stride in zip(shape, strides, strict=True))
        return torch.randn(length).to(dtype).as_strided(shape, strides)

    result, calls = cache(torch.empty), []
    for first, second in recorded.pairs:
        left, right = operand(*first), operand(*second)
        out = result((*left.shape[:-1], right.shape[-1]), dtype=left.dtype)
        calls.append((torch.mm if left.dim() == 2 else torch.bmm, left, right, out))

    def products() -> None:
        for product, left, right, out in calls:
            product(left, right, out=out)

    return statistics.median(timed(products, repeats + 2)[2:])


class _Products(TorchDispatchMode):
    """Records the two matrices of every product."""

    def __init__(self) -> None:
        super().__init__()
        self.pairs: list[tuple[Matrix, Matrix]] = []

    def __torch_dispatch__(self, function: Any, types: Any, arguments: Any = (), keywords: Any = None) -> Any:
        first = PRODUCTS.get(function.overloadpacket.__name__)
        if first is not None:
            left, right = ((tuple(x.shape), x.stride(), x.dtype) for x in arguments[first : first + 2])
            self.pairs.append((left, right))
        return function(*arguments, **(keywords or {}))
