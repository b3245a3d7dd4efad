"""Reading hidden states and queries, keys, values out of unmodified encoders, computing no more than is read."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from contextlib import ExitStack, suppress
from dataclasses import dataclass, field
from itertools import product
from typing import Any

import torch
from torch import Tensor, nn

from study.distillation import processes
from study.families import Family, family_of, part

PROJECTIONS = ("query", "key", "value")

#: Layers to read, as keyword arguments of :func:`read_activations`: ``hidden_layers`` and ``attention_layers``.
Layers = dict[str, set[int]]


@dataclass
class Activations:
    """What was read, by layer (1-based; layer 0 is the embedding output). Every tensor is (batch, tokens, width)."""

    hidden: dict[int, Tensor] = field(default_factory=dict)
    attention: dict[int, dict[str, Tensor]] = field(default_factory=dict)

    def to(self, dtype: torch.dtype) -> Activations:
        """The same in another type of numbers."""
        return Activations(
            {layer: states.to(dtype) for layer, states in self.hidden.items()},
            {layer: {name: x.to(dtype) for name, x in parts.items()} for layer, parts in self.attention.items()},
        )


class _Complete(Exception):
    """Everything asked for has been read; the rest of the forward pass is not needed."""


def read_activations(
    model: nn.Module,
    input_ids: Tensor,
    attention_mask: Tensor | None = None,
    hidden_layers: Iterable[int] = (),
    attention_layers: Iterable[int] = (),
) -> Activations:
    """Run the encoder of ``model`` as far as needed and return what was asked for.

    The forward pass ends at the deepest reading: after the last hidden state asked for, or inside a layer right after
    its query, key and value projections (before attention itself). Forward hooks do the reading, so any attention
    implementation works, and gradients flow to what was computed. Queries and keys are read as they are projected,
    before any rotation by position. The last hidden state is what the head reads: behind a final norm, if any.

    Args:
        model: a transformers model of one of :data:`study.families.FAMILIES`, with or without a head.
        input_ids: (batch, tokens). attention_mask: (batch, tokens) or None.
        hidden_layers: layers whose output hidden states to read, 0 for the embedding output.
        attention_layers: layers whose query, key and value projections to read (all heads side by side).

    Raises:
        ValueError: nothing is asked for, or a layer the model does not have.
    """
    encoder: Any = model.base_model
    family = family_of(encoder)
    hidden_layers, attention_layers = set(hidden_layers), set(attention_layers)
    layers = part(encoder, family.layers)
    depth = len(layers)
    impossible = [i for i in hidden_layers if not 0 <= i <= depth] + [
        i for i in attention_layers if not 1 <= i <= depth
    ]
    if impossible:
        raise ValueError(f"layers {sorted(impossible)} cannot be read from an encoder of {depth} layers")
    missing = len(hidden_layers) + len(family.block.projections) * len(attention_layers)
    if not missing:
        raise ValueError("nothing to read: give hidden_layers or attention_layers")
    activations = Activations(attention={layer: {} for layer in sorted(attention_layers)})

    def keep(store: dict, *keys: int | str) -> Callable[..., None]:
        def hook(module: nn.Module, arguments: tuple, output: Tensor | tuple[Tensor, ...]) -> None:
            nonlocal missing
            states = output[0] if isinstance(output, tuple) else output
            store.update(zip(keys, states.chunk(len(keys), dim=-1), strict=True))
            missing -= 1
            if not missing:
                raise _Complete

        return hook

    read = [(state_of(encoder, family, i, depth), keep(activations.hidden, i)) for i in hidden_layers]
    names = family.block.projections
    each = [PROJECTIONS] if len(names) == 1 else [(name,) for name in PROJECTIONS]
    for i, (path, kept) in product(attention_layers, zip(names, each, strict=True)):
        read.append((part(layers[i - 1], path), keep(activations.attention[i], *kept)))
    with ExitStack() as hooks, suppress(_Complete):
        for module, hook in read:
            hooks.enter_context(module.register_forward_hook(hook))
        encoder(input_ids=input_ids, attention_mask=attention_mask)
        return activations
    processes.release(encoder)
    return activations


def state_of(encoder: Any, family: Family, layer: int, depth: int) -> Any:
    """The module of an encoder of ``depth`` layers whose output is the hidden state of a layer, 0 to ``depth``."""
    if layer == 0:
        return [getattr(encoder, name) for name in family.embedded if hasattr(encoder, name)][-1]
    if layer == depth and family.last:
        return part(encoder, family.last)
    return part(encoder, family.layers)[layer - 1]
