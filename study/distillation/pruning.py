"""Pruning: layers left out, attention heads and feed-forward neurons kept by their importance to the teacher."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from contextlib import ExitStack
from dataclasses import dataclass
from itertools import product
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F
from transformers import PreTrainedModel, default_data_collator

from study.distillation.heads import language_modelling_head
from study.distillation.mappings import layer_mapping
from study.distillation.masking import MaskedSequences
from study.families import Block, family_of, part
from study.methods import PRUNING

#: Of the training stream, from which importance is accumulated, and how many are read at once. Source: this study.
SEQUENCES, BATCH = 64, 8


@dataclass(frozen=True)
class Importance:
    """Of every head (layers, heads) and every feed-forward neuron (layers, intermediate) of a model."""

    heads: Tensor
    neurons: Tensor


def kept_layers(initialisation: str, teacher_layers: int, student_layers: int) -> dict[int, int]:
    """Student layer -> the teacher layer it is, both from 1: ``uniform`` and ``top`` as the mappings, or the bottom."""
    if PRUNING[initialisation] == "bottom":
        return {i: i for i in range(1, student_layers + 1)}
    return {i: j for i, (j,) in layer_mapping(PRUNING[initialisation], teacher_layers, student_layers).items()}


def unit_importance(model: PreTrainedModel, sequences: MaskedSequences) -> Importance:
    r"""What a head or neuron u is worth to a masked language model, to first order.

        I_u = sum over sequences x of | sum over weights w out of u of w dL(x) / dw |,

    L(x) the mean cross-entropy of the masked words of x. The inner sum is the derivative of L(x) by a gate that
    multiplies the output of u, at 1: what the loss would change by were u taken out. Heads are gated before the output
    projection, neurons before the second feed-forward map.

    Source: Michel et al. (1905.10650) for heads; Molchanov et al. (1906.10771) for gates. The loss and sums over
    sequences are this study's choice.
    """
    family = family_of(model)
    gates: dict[tuple[str, int], Tensor] = {}
    totals: dict[tuple[str, int], Tensor] = {}
    layers = part(model.base_model, family.layers)
    kinds = {family.block.attention_output: getattr(model.config, family.sizes[2]), family.block.output: None}
    was_training = model.training
    with ExitStack() as hooks:
        hooks.callback(model.train, was_training)
        for (place, layer), (name, units) in product(enumerate(layers), kinds.items()):
            gate = _gate(gates, (name, place), units)
            hooks.enter_context(part(layer, name).register_forward_pre_hook(gate))
        model.eval()
        for first in range(0, len(sequences), BATCH):
            rows = [sequences[i] for i in range(first, min(first + BATCH, len(sequences)))]
            batch = {key: x.to(model.device) for key, x in default_data_collator(rows).items()}
            states = model.base_model(input_ids=batch["masked_input_ids"]).last_hidden_state
            places = batch["positions"][..., None].expand(-1, -1, states.shape[-1])
            logits = language_modelling_head(model)(states.gather(1, places)).float()  # (B, M, vocabulary)
            loss = F.cross_entropy(logits.flatten(0, 1), batch["labels"].flatten(), reduction="sum")
            gradients = torch.autograd.grad(loss / logits.shape[1], list(gates.values()))
            for key, gradient in zip(gates, gradients, strict=True):
                scores = gradient.flatten(1).abs().sum(dim=0)  # (units,)
                totals[key] = totals[key] + scores if key in totals else scores
    heads, neurons = (torch.stack([totals[name, place] for place in range(len(layers))]) for name in kinds)
    return Importance(heads, neurons)


def _gate(gates: dict[Any, Tensor], key: Any, units: int | None) -> Callable:
    """Multiply what a linear layer reads (B, T, channels) by one gate a sequence and unit, kept under ``key``."""

    def hook(module: Any, inputs: tuple[Tensor]) -> tuple[Tensor]:
        states = inputs[0].unflatten(-1, (units or inputs[0].shape[-1], -1))  # (B, T, units, channels of a unit)
        ones = torch.ones(len(states), 1, states.shape[2], 1, dtype=states.dtype, device=states.device)
        gates[key] = ones.requires_grad_()
        return ((states * gates[key]).flatten(2),)

    return hook


@torch.no_grad()
def prune_layers(
    student: PreTrainedModel, teacher: PreTrainedModel, layers: Mapping[int, int], importance: Importance | None
) -> None:
    """Write the teacher's layers into a student of its width, with the most important heads and neurons alone.

    The student then computes what the teacher does with these layers, all other heads and neurons set to zero. A model
    of transformers has heads of width / heads channels: where heads are fewer, theirs are wider than the teacher's.
    What is added to queries and to the output projection is zero, so that it changes nothing at the start; what is
    added to keys and values stays as it was drawn, so that training can use it. Fewer heads therefore save attention's
    scores, no parameters; fewer neurons save both.

    Args:
        layers: student layer -> teacher layer, from 1. importance: None where nothing within layers is pruned.
    """
    family = family_of(teacher)
    sources, targets = (part(model.base_model, family.layers) for model in (teacher, student))
    count, kept_count = (getattr(model.config, family.sizes[2]) for model in (teacher, student))
    for i, j in layers.items():
        source, target, block = sources[j - 1], targets[i - 1], family.block
        heads, neurons = torch.arange(count), torch.arange(part(source, block.feed_forward).out_features)
        if importance is not None:
            heads = _most_important(importance.heads[j - 1], kept_count)
            neurons = _most_important(importance.neurons[j - 1], part(target, block.feed_forward).out_features)
        _prune_attention(target, source, block, heads, count)
        for name, rows, columns in ((block.feed_forward, neurons, None), (block.output, None, neurons)):
            _copy(part(target, name), part(source, name), rows, columns)
        for name in (block.attention_norm, block.output_norm):
            part(target, name).load_state_dict(part(source, name).state_dict())


def _most_important(scores: Tensor, count: int) -> Tensor:
    """Indices of the ``count`` greatest, in their own order; of equals the first."""
    return scores.argsort(descending=True, stable=True)[:count].sort().values


def _copy(target: Any, source: Any, rows: Tensor | None, columns: Tensor | None) -> None:
    weight, bias = (source.weight, source.bias) if rows is None else (source.weight[rows], source.bias[rows])
    target.weight.copy_(weight if columns is None else weight[:, columns])
    target.bias.copy_(bias)


def _prune_attention(target: Any, source: Any, block: Block, heads: Tensor, count: int) -> None:
    width = part(source, block.attention_output).out_features
    small, large = width // count, width // len(heads)  # channels of a head
    for place, name in enumerate(block.projections):
        own, theirs = part(target, name), part(source, name)
        weight, bias = own.weight.view(len(heads), large, width), own.bias.view(len(heads), large)
        scale = (large / small) ** 0.5 if place == 0 else 1.0  # scores are divided by the root of a head's channels
        if place == 0:
            weight.zero_()
        bias.zero_()
        weight[:, :small] = scale * theirs.weight.view(count, small, width)[heads]
        bias[:, :small] = scale * theirs.bias.view(count, small)[heads]
    own, theirs = part(target, block.attention_output), part(source, block.attention_output)
    own.weight.zero_()
    own.weight.view(width, len(heads), large)[:, :, :small] = theirs.weight.view(width, count, small)[:, heads]
    own.bias.copy_(theirs.bias)
