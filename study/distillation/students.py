"""Students: their configuration, and the ways to initialise them from a teacher."""

from __future__ import annotations

from collections.abc import Mapping
from contextlib import ExitStack
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from transformers import AutoConfig, AutoModelForMaskedLM, PreTrainedModel, set_seed

from study.distillation.heads import dense_of_head, language_modelling_head, norm_of_head
from study.distillation.mappings import layer_mapping
from study.distillation.pruning import Importance, kept_layers, prune_layers
from study.distillation.taps import state_of
from study.families import FAMILIES, Block, family_of, part, positions
from study.files import StudyError
from study.methods import PRUNING, TAKEN
from study.sections import Encoder

#: Positions of a student of another family than its teacher's, at most. Source: BERT.
POSITIONS = 512


def create_student(
    teacher: PreTrainedModel,
    sizes: Encoder,
    initialisation: str,
    sample: Tensor | None = None,
    seed: int = 0,
    importance: Importance | None = None,
) -> PreTrainedModel:
    """A student with the teacher's vocabulary and a language-modelling head tied to its word embeddings.

    It is of the teacher's family, or of ``sizes.family``: then in that family's own configuration.

    Args:
        teacher: a masked language model.
        sizes: layers, width, heads and feed-forward width of the student.
        initialisation: ``random`` (the family's own), ``teacher-embeddings`` (word embeddings of the teacher,
            projected on their leading right-singular vectors when the student is narrower, the rest random),
            ``teacher-layers`` (also the layers of the ``uniform`` mapping and the head: copied where all widths match,
            else projected, see :func:`project_teacher`), ``teacher-layers-but-last`` (the same mapping onto the
            teacher's layers without its last, so that the student's last begins as L_T - 1) or ``pruned-...`` (also
            layers and the head, with fewer heads and neurons, see :func:`study.distillation.pruning.prune_layers`).
        sample: (sequences, tokens) of corpus text, needed only where layers are projected.
        seed: of the random part.
        importance: of the teacher's heads and neurons, needed only where some are pruned.

    Raises:
        StudyError: an initialisation that these two models do not have.

    Source: copied layers after DistilBERT (1910.01108); the projections are this study's choice.
    """
    set_seed(seed)
    config = _configuration(teacher.config, sizes)
    attention = teacher.config._attn_implementation
    if type(config) is type(teacher.config):
        student = type(teacher)._from_config(config, attn_implementation=attention)
    else:
        student = AutoModelForMaskedLM.from_config(config, attn_implementation=attention)
    if initialisation == "teacher-embeddings":
        _copy_word_embeddings(student, teacher)
    elif initialisation in TAKEN:
        _layers_can_be_taken(student, teacher, initialisation)
        depth = teacher.config.num_hidden_layers - TAKEN[initialisation]
        layers = {i: j for i, (j,) in layer_mapping("uniform", depth, sizes.layers).items()}
        if (sizes.width, sizes.intermediate) == _widths(teacher):
            _copy_layers(student, teacher, layers)
        else:
            assert sample is not None
            project_teacher(student, teacher, layers, sample)
    elif initialisation in PRUNING:
        _layers_can_be_taken(student, teacher, initialisation)
        _copy_around_layers(student, teacher)
        depth = getattr(teacher.config, family_of(teacher).sizes[0])
        prune_layers(student, teacher, kept_layers(initialisation, depth, sizes.layers), importance)
    return student


def prunes_within_layers(teacher: PreTrainedModel, sizes: Encoder, initialisation: str) -> bool:
    """Whether a student's start needs the importance of the teacher's heads and neurons."""
    _, _, heads, intermediate = (getattr(teacher.config, key) for key in family_of(teacher).sizes)
    return initialisation in PRUNING and (sizes.heads, sizes.intermediate) != (heads, intermediate)


def _configuration(teacher: Any, sizes: Encoder) -> Any:
    shape = (sizes.layers, sizes.width, sizes.heads, sizes.intermediate)
    if sizes.family not in (None, teacher.model_type):
        family = FAMILIES[sizes.family]
        tokens = {key: value for key, value in teacher.to_dict().items() if key.endswith("_token_id")}
        before = teacher.pad_token_id + 1 if family.offset is None else family.offset
        own = {"vocab_size": teacher.vocab_size, "max_position_embeddings": min(positions(teacher), POSITIONS) + before}
        return AutoConfig.for_model(sizes.family, **dict(zip(family.sizes, shape, strict=True)), **own, **tokens)
    own = teacher.to_dict() | dict(zip(family_of(teacher).sizes, shape, strict=True)) | {"tie_word_embeddings": True}
    if own.get("embedding_size") == teacher.hidden_size:  # ELECTRA: not factorised
        own["embedding_size"] = sizes.width
    if own.get("layer_types"):  # ModernBERT: local and global attention in turn
        own["layer_types"] = own["layer_types"][: sizes.layers]
    return type(teacher)(**own)


def _widths(model: PreTrainedModel) -> tuple[int, int]:
    """Hidden size and feed-forward width."""
    _, width, _, intermediate = (getattr(model.config, key) for key in family_of(model).sizes)
    return width, intermediate


def _layers_can_be_taken(student: PreTrainedModel, teacher: PreTrainedModel, initialisation: str) -> None:
    own, family = teacher.config.model_type, student.config.model_type
    width, inner = teacher.config.hidden_size, _word_embeddings(teacher).shape[1]
    reason = None
    if own != family or family_of(teacher).copied is None:
        reason = f"layers of {own} cannot be taken out of their places into {family}"
    elif width != inner and _widths(student) != _widths(teacher):
        reason = f"embeddings of {inner} channels under layers of {width} cannot be projected"
    if reason:
        raise StudyError(f"initialisation = {initialisation}: {reason}; allowed: teacher-embeddings, random")


def _encoder(model: PreTrainedModel) -> Any:
    """The encoder of a model of any family, whose parts have the same names in all of them."""
    return model.base_model


def _word_embeddings(model: PreTrainedModel) -> Tensor:
    return _encoder(model).get_input_embeddings().weight


@torch.no_grad()
def _copy_word_embeddings(student: PreTrainedModel, teacher: PreTrainedModel) -> None:
    embeddings, width = _word_embeddings(teacher), _word_embeddings(student).shape[1]
    if width > embeddings.shape[1]:
        raise StudyError(
            f"initialisation = teacher-embeddings: the teacher's have {embeddings.shape[1]} channels, the student's"
            f" {width}; allowed: a student that is not wider, or random"
        )
    if width < embeddings.shape[1]:
        directions = torch.linalg.eigh(embeddings.T @ embeddings).eigenvectors[:, -width:]  # right-singular vectors
        embeddings = embeddings @ directions
    _word_embeddings(student).copy_(embeddings)


def _copy_layers(student: PreTrainedModel, teacher: PreTrainedModel, layers: Mapping[int, int]) -> None:
    _copy_around_layers(student, teacher)
    for i, j in layers.items():
        _layers(student)[i - 1].load_state_dict(_layers(teacher)[j - 1].state_dict())


@torch.no_grad()
def _copy_around_layers(student: PreTrainedModel, teacher: PreTrainedModel) -> None:
    _encoder(student).embeddings.load_state_dict(_encoder(teacher).embeddings.state_dict())
    _copy_beside(student, teacher)
    dense_of_head(student).load_state_dict(dense_of_head(teacher).state_dict())
    norm_of_head(student).load_state_dict(norm_of_head(teacher).state_dict())
    student.get_output_embeddings().bias.copy_(teacher.get_output_embeddings().bias)


def _layers(model: PreTrainedModel) -> Any:
    return part(_encoder(model), family_of(model).layers)


def _copy_beside(student: PreTrainedModel, teacher: PreTrainedModel) -> None:
    for path in family_of(teacher).copied or ():
        if hasattr(_encoder(teacher), path.split(".")[0]):
            part(_encoder(student), path).load_state_dict(part(_encoder(teacher), path).state_dict())


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
    family, block = family_of(teacher), family_of(teacher).block
    before = part(_encoder(teacher), family.embedding_norm)
    _fit_norm(part(_encoder(student), family.embedding_norm), norms[before], projection)
    for i, j in layers.items():
        source, target = _layers(teacher)[j - 1], _layers(student)[i - 1]
        heads = getattr(teacher.config, family.sizes[2])
        _project_attention(target, source, block, heads, projection, scale)
        _fit_norm(part(target, block.attention_norm), norms[part(source, block.attention_norm)], projection)
        _project_feed_forward(target, source, block, projection, activations[part(source, block.output)])
        _fit_norm(part(target, block.output_norm), norms[part(source, block.output_norm)], projection)
    _copy_beside(student, teacher)
    dense_of_head(student).weight.copy_(projection @ dense_of_head(teacher).weight @ projection.T)
    dense_of_head(student).bias.copy_(projection @ dense_of_head(teacher).bias)
    _fit_norm(norm_of_head(student), norms[norm_of_head(teacher)], projection)
    student.get_output_embeddings().bias.copy_(teacher.get_output_embeddings().bias)


def _observe(teacher: PreTrainedModel, sample: Tensor, layers: Mapping[int, int]):
    """Run the teacher once and keep hidden states, layer norms' (input, output) and feed-forward activations."""
    family, depth = family_of(teacher), len(_layers(teacher))
    blocks = [_layers(teacher)[j - 1] for j in set(layers.values())]
    observed = [part(_encoder(teacher), family.embedding_norm), norm_of_head(teacher)]
    observed += [
        part(block, name) for block in blocks for name in (family.block.attention_norm, family.block.output_norm)
    ]
    norms, activations, hidden = {}, {}, []

    def keep_norm(module: nn.Module, inputs: tuple[Tensor, ...], output: Tensor) -> None:
        norms[module] = inputs[0].flatten(0, -2), output.flatten(0, -2)

    def keep_activation(module: nn.Module, inputs: tuple[Tensor, ...], output: Tensor) -> None:
        activations[module] = inputs[0].flatten(0, -2)

    def keep_state(module: nn.Module, inputs: tuple[Tensor, ...], output: Any) -> None:
        hidden.append((output[0] if isinstance(output, tuple) else output).flatten(0, -2))

    hooked = [(norm, keep_norm) for norm in observed]
    hooked += [(part(block, family.block.output), keep_activation) for block in blocks]
    hooked += [(state_of(_encoder(teacher), family, layer, depth), keep_state) for layer in range(depth + 1)]
    with ExitStack() as hooks:
        hooks.callback(teacher.train, teacher.training)
        for module, hook in hooked:
            hooks.enter_context(module.register_forward_hook(hook))
        states = _encoder(teacher).eval()(input_ids=sample).last_hidden_state
        language_modelling_head(teacher)(states[:, ::16])  # logits are large, a share of the tokens suffices
    return hidden, norms, activations


def _project_attention(target: Any, source: Any, block: Block, heads: int, projection: Tensor, scale: Tensor) -> None:
    query, key, value = (part(source, name) for name in block.projections)
    large, small = (len(part(layer, block.projections[0]).weight) // heads for layer in (source, target))
    q_weight, k_weight, v_weight = (
        (linear.weight @ projection.T).view(heads, large, -1) for linear in (query, key, value)
    )
    q_bias = query.bias.view(heads, large, 1)
    divisor = scale.where(scale > 0, torch.inf)  # weights of what carries nothing are zero
    queries = torch.cat([q_weight * scale, q_bias], dim=2)  # (heads, large, H_S + 1): the last column is the constant
    temper = (small / large) ** 0.5  # both models divide their scores by the root of their own head size
    left, right = _cut(queries * temper, k_weight * scale, small)
    new_query, new_key, new_value = (part(target, name) for name in block.projections)
    new_query.weight.copy_((left[:, :, :-1] / divisor).flatten(0, 1))
    new_query.bias.copy_(left[:, :, -1].flatten())
    new_key.weight.copy_((right / divisor).flatten(0, 1))
    new_key.bias.zero_()

    output, new_output = (part(layer, block.attention_output) for layer in (source, target))
    o_weight = projection @ output.weight  # (H_S, H_T)
    per_head = o_weight.view(len(projection), heads, large).permute(1, 2, 0)  # (heads, large, H_S)
    left, right = _cut(per_head, v_weight * scale, small)
    new_output.weight.copy_(left.flatten(0, 1).T)
    new_value.weight.copy_((right / divisor).flatten(0, 1))
    new_value.bias.zero_()
    new_output.bias.copy_(o_weight @ value.bias + projection @ output.bias)


def _cut(left: Tensor, right: Tensor, rank: int) -> tuple[Tensor, Tensor]:
    """Best factors (heads, rank, m), (heads, rank, n) of left^T right, for left (heads, r, m), right (heads, r, n)."""
    left_basis, left_factor = torch.linalg.qr(left.transpose(1, 2))
    right_basis, right_factor = torch.linalg.qr(right.transpose(1, 2))
    u, values, vt = torch.linalg.svd(left_factor @ right_factor.transpose(1, 2))
    root = values[:, None, :rank].sqrt()
    left, right = left_basis @ u[:, :, :rank] * root, right_basis @ vt.transpose(1, 2)[:, :, :rank] * root
    return left.transpose(1, 2), right.transpose(1, 2)


def _project_feed_forward(target: Any, source: Any, block: Block, projection: Tensor, activations: Tensor) -> None:
    inner, output = part(source, block.feed_forward), part(source, block.output)
    new_inner, new_output = part(target, block.feed_forward), part(target, block.output)
    outgoing = projection @ output.weight  # (H_S, intermediate)
    importance = activations.pow(2).mean(dim=0) * outgoing.pow(2).sum(dim=0)
    order = importance.argsort(descending=True)
    kept, dropped = order[: new_inner.out_features], order[new_inner.out_features :]
    new_inner.weight.copy_(inner.weight[kept] @ projection.T)
    new_inner.bias.copy_(inner.bias[kept])
    new_output.weight.copy_(outgoing[:, kept])
    mean_of_dropped = outgoing[:, dropped] @ activations[:, dropped].mean(dim=0)
    new_output.bias.copy_(projection @ output.bias + mean_of_dropped)


def _fit_norm(norm: Any, observed: tuple[Tensor, Tensor], projection: Tensor) -> None:
    inputs, outputs = (states @ projection.T for states in observed)
    normalised = F.layer_norm(inputs, inputs.shape[-1:], eps=norm.eps)
    centred = normalised - normalised.mean(dim=0)
    slope = (centred * outputs).mean(dim=0) / centred.pow(2).mean(dim=0).clamp(min=1e-12)
    norm.weight.copy_(slope)
    norm.bias.copy_(outputs.mean(dim=0) - slope * normalised.mean(dim=0))
