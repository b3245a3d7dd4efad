"""Students: their configuration, and the three ways to initialise them from a teacher."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from transformers import PreTrainedModel, set_seed

from study.distillation.heads import dense_of_head, language_modelling_head, norm_of_head
from study.distillation.mappings import layer_mapping
from study.sections import Encoder


def create_student(
    teacher: PreTrainedModel, sizes: Encoder, initialisation: str, sample: Tensor | None = None, seed: int = 0
) -> PreTrainedModel:
    """A student of the teacher's family, with its vocabulary and a language-modelling head.

    Args:
        teacher: a masked language model.
        sizes: layers, width, heads and feed-forward width of the student.
        initialisation: ``random`` (the family's own), ``teacher-embeddings`` (word embeddings of the teacher,
            projected on their leading right-singular vectors when the student is narrower, the rest random) or
            ``teacher-layers`` (also the layers of the ``uniform`` mapping and the head: copied where all widths match,
            else projected, see :func:`project_teacher`).
        sample: (sequences, tokens) of corpus text, needed only where layers are projected.
        seed: of the random part.

    Source: copied layers after DistilBERT (1910.01108); the projections are this study's choice.
    """
    set_seed(seed)
    config = type(teacher.config)(
        **{
            **teacher.config.to_dict(),
            "num_hidden_layers": sizes.layers,
            "hidden_size": sizes.width,
            "num_attention_heads": sizes.heads,
            "intermediate_size": sizes.intermediate,
        }
    )
    student = type(teacher)._from_config(config, attn_implementation=teacher.config._attn_implementation)
    if initialisation == "teacher-embeddings":
        _copy_word_embeddings(student, teacher)
    elif initialisation == "teacher-layers":
        layers = {i: j for i, (j,) in layer_mapping("uniform", teacher.config.num_hidden_layers, sizes.layers).items()}
        if (sizes.width, sizes.intermediate) == (teacher.config.hidden_size, teacher.config.intermediate_size):
            _copy_layers(student, teacher, layers)
        else:
            assert sample is not None
            project_teacher(student, teacher, layers, sample)
    return student


def _encoder(model: PreTrainedModel) -> Any:
    """The encoder of a model of any family, whose parts have the same names in all of them."""
    return model.base_model


def _word_embeddings(model: PreTrainedModel) -> Tensor:
    return _encoder(model).get_input_embeddings().weight


@torch.no_grad()
def _copy_word_embeddings(student: PreTrainedModel, teacher: PreTrainedModel) -> None:
    embeddings, width = _word_embeddings(teacher), student.config.hidden_size
    if width < embeddings.shape[1]:
        directions = torch.linalg.eigh(embeddings.T @ embeddings).eigenvectors[:, -width:]  # right-singular vectors
        embeddings = embeddings @ directions
    _word_embeddings(student).copy_(embeddings)


@torch.no_grad()
def _copy_layers(student: PreTrainedModel, teacher: PreTrainedModel, layers: Mapping[int, int]) -> None:
    _encoder(student).embeddings.load_state_dict(_encoder(teacher).embeddings.state_dict())
    for i, j in layers.items():
        _encoder(student).encoder.layer[i - 1].load_state_dict(_encoder(teacher).encoder.layer[j - 1].state_dict())
    dense_of_head(student).load_state_dict(dense_of_head(teacher).state_dict())
    norm_of_head(student).load_state_dict(norm_of_head(teacher).state_dict())
    student.get_output_embeddings().bias.copy_(teacher.get_output_embeddings().bias)


@torch.no_grad()
def project_teacher(
    student: PreTrainedModel, teacher: PreTrainedModel, layers: Mapping[int, int], sample: Tensor
) -> None:
    r"""Write teacher weights, mapped through one shared projection of the residual stream, into a narrower student.

    Let P (H_S x H_T) hold the leading principal directions of the teacher's hidden states on ``sample`` (all layers,
    uncentred), so that s = P h stands for h, with E[s s^T] = diag(l). Then, per student layer i and teacher layer
    ``layers[i]``:

    * embeddings: E P^T; the head's dense layer: P W P^T; their biases: P b;
    * queries and keys: per head, the bilinear form P (W_Q, b_Q)^T W_K P^T of the attention scores is cut to the
      student's head size by a singular value decomposition weighted by diag(l)^(1/2) on both sides (a constant per
      query does not change attention, so b_K drops out); values and output projection likewise through P W_O W_V P^T,
      where b_V moves into the output bias because attention weights sum to one;
    * feed-forward: the neurons with the largest E[activation^2] * |P w_out|^2; the mean of the others moves into the
      bias;
    * layer norms: per channel, the least-squares scale and shift from the student's normalised input to P times the
      teacher's output.

    Args:
        layers: student layer -> teacher layer, 1-based. sample: (sequences, tokens).

    Source: this study's choice; it gives narrower students the same kind of start as copied layers give equal widths.
    """
    hidden, norms, activations = _observe(teacher, sample, layers)
    width = student.config.hidden_size
    moments, directions = torch.linalg.eigh(sum(h.T @ h for h in hidden) / sum(len(h) for h in hidden))
    projection = directions[:, -width:].flip(1).T  # P, (H_S, H_T)
    scale = moments[-width:].flip(0).clamp(min=0).sqrt()  # l^(1/2), (H_S,)
    scale = scale.where(scale > 1e-6 * scale.max(), 0.0)  # a direction without variance carries nothing

    pairs = zip(_encoder(teacher).embeddings.modules(), _encoder(student).embeddings.modules(), strict=True)
    for source, target in pairs:
        if isinstance(source, nn.Embedding):
            target.weight.copy_(source.weight @ projection.T)
    _fit_norm(_encoder(student).embeddings.LayerNorm, norms[_encoder(teacher).embeddings.LayerNorm], projection)
    for i, j in layers.items():
        source, target = _encoder(teacher).encoder.layer[j - 1], _encoder(student).encoder.layer[i - 1]
        _project_attention(target.attention, source.attention, projection, scale)
        _fit_norm(target.attention.output.LayerNorm, norms[source.attention.output.LayerNorm], projection)
        _project_feed_forward(target, source, projection, activations[source.output.dense])
        _fit_norm(target.output.LayerNorm, norms[source.output.LayerNorm], projection)
    dense_of_head(student).weight.copy_(projection @ dense_of_head(teacher).weight @ projection.T)
    dense_of_head(student).bias.copy_(projection @ dense_of_head(teacher).bias)
    _fit_norm(norm_of_head(student), norms[norm_of_head(teacher)], projection)
    student.get_output_embeddings().bias.copy_(teacher.get_output_embeddings().bias)


def _observe(teacher: PreTrainedModel, sample: Tensor, layers: Mapping[int, int]):
    """Run the teacher once and keep hidden states, layer norms' (input, output) and feed-forward activations."""
    blocks = [_encoder(teacher).encoder.layer[j - 1] for j in set(layers.values())]
    observed = [_encoder(teacher).embeddings.LayerNorm, norm_of_head(teacher)]
    observed += [norm for block in blocks for norm in (block.attention.output.LayerNorm, block.output.LayerNorm)]
    norms, activations, hidden = {}, {}, []
    hooks = [
        norm.register_forward_hook(
            lambda module, inputs, output: norms.update({module: (inputs[0].flatten(0, -2), output.flatten(0, -2))})
        )
        for norm in observed
    ]
    hooks += [
        block.output.dense.register_forward_hook(
            lambda module, inputs, output: activations.update({module: inputs[0].flatten(0, -2)})
        )
        for block in blocks
    ]
    hooks += [
        module.register_forward_hook(
            lambda module, inputs, output: hidden.append(
                (output[0] if isinstance(output, tuple) else output).flatten(0, -2)
            )
        )
        for module in (_encoder(teacher).embeddings, *_encoder(teacher).encoder.layer)
    ]
    was_training = teacher.training
    try:
        states = _encoder(teacher).eval()(input_ids=sample).last_hidden_state
        language_modelling_head(teacher)(states[:, ::16])  # logits are large, a share of the tokens suffices
    finally:
        teacher.train(was_training)
        for hook in hooks:
            hook.remove()
    return hidden, norms, activations


def _project_attention(target: Any, source: Any, projection: Tensor, scale: Tensor) -> None:
    heads = source.self.num_attention_heads
    large, small = source.self.attention_head_size, target.self.attention_head_size
    q_weight, k_weight, v_weight = (
        (getattr(source.self, name).weight @ projection.T).view(heads, large, -1) for name in ("query", "key", "value")
    )
    q_bias = source.self.query.bias.view(heads, large, 1)
    divisor = scale.where(scale > 0, torch.inf)  # weights of what carries nothing are zero
    queries = torch.cat([q_weight * scale, q_bias], dim=2)  # (heads, large, H_S + 1): the last column is the constant
    temper = (small / large) ** 0.5  # both models divide their scores by the root of their own head size
    left, right = _cut(queries * temper, k_weight * scale, small)
    target.self.query.weight.copy_((left[:, :, :-1] / divisor).flatten(0, 1))
    target.self.query.bias.copy_(left[:, :, -1].flatten())
    target.self.key.weight.copy_((right / divisor).flatten(0, 1))
    target.self.key.bias.zero_()

    o_weight = projection @ source.output.dense.weight  # (H_S, H_T)
    per_head = o_weight.view(len(projection), heads, large).permute(1, 2, 0)  # (heads, large, H_S)
    left, right = _cut(per_head, v_weight * scale, small)
    target.output.dense.weight.copy_(left.flatten(0, 1).T)
    target.self.value.weight.copy_((right / divisor).flatten(0, 1))
    target.self.value.bias.zero_()
    target.output.dense.bias.copy_(o_weight @ source.self.value.bias + projection @ source.output.dense.bias)


def _cut(left: Tensor, right: Tensor, rank: int) -> tuple[Tensor, Tensor]:
    """Best factors (heads, rank, m), (heads, rank, n) of left^T right, for left (heads, r, m), right (heads, r, n)."""
    left_basis, left_factor = torch.linalg.qr(left.transpose(1, 2))
    right_basis, right_factor = torch.linalg.qr(right.transpose(1, 2))
    u, values, vt = torch.linalg.svd(left_factor @ right_factor.transpose(1, 2))
    root = values[:, None, :rank].sqrt()
    left, right = left_basis @ u[:, :, :rank] * root, right_basis @ vt.transpose(1, 2)[:, :, :rank] * root
    return left.transpose(1, 2), right.transpose(1, 2)


def _project_feed_forward(target: Any, source: Any, projection: Tensor, activations: Tensor) -> None:
    outgoing = projection @ source.output.dense.weight  # (H_S, intermediate)
    importance = activations.pow(2).mean(dim=0) * outgoing.pow(2).sum(dim=0)
    order = importance.argsort(descending=True)
    kept, dropped = order[: target.intermediate.dense.out_features], order[target.intermediate.dense.out_features :]
    target.intermediate.dense.weight.copy_(source.intermediate.dense.weight[kept] @ projection.T)
    target.intermediate.dense.bias.copy_(source.intermediate.dense.bias[kept])
    target.output.dense.weight.copy_(outgoing[:, kept])
    mean_of_dropped = outgoing[:, dropped] @ activations[:, dropped].mean(dim=0)
    target.output.dense.bias.copy_(projection @ source.output.dense.bias + mean_of_dropped)


def _fit_norm(norm: Any, observed: tuple[Tensor, Tensor], projection: Tensor) -> None:
    inputs, outputs = (states @ projection.T for states in observed)
    normalised = F.layer_norm(inputs, inputs.shape[-1:], eps=norm.eps)
    centred = normalised - normalised.mean(dim=0)
    slope = (centred * outputs).mean(dim=0) / centred.pow(2).mean(dim=0).clamp(min=1e-12)
    norm.weight.copy_(slope)
    norm.bias.copy_(outputs.mean(dim=0) - slope * normalised.mean(dim=0))
