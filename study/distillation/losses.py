"""The distillation objectives: pure functions of tensors. B = batch, T = tokens, H = width, A = relation heads."""

from __future__ import annotations

import math

import torch
from torch import Tensor
from torch.nn import functional as F


def output_distribution(student_logits: Tensor, teacher_logits: Tensor, temperature: float = 1.0) -> Tensor:
    r"""Output-distribution (OD) transfer: divergence of the two distributions over the vocabulary.

    .. math:: \frac{\tau^2}{N} \sum_{n=1}^{N} KL(softmax(z^T_n / \tau) \,\|\, softmax(z^S_n / \tau))

    N runs over all positions given; choose them (e.g. the masked ones) before the call. The paper's cross-entropy
    differs by the teacher's entropy, a constant: gradients at temperature 1 are the same.

    Args:
        student_logits, teacher_logits: (..., vocabulary), same shape; computed in float32.
        temperature: tau > 0; the factor tau^2 keeps gradients comparable across temperatures.

    Raises:
        ValueError: different shapes, or a temperature that is not positive.

    Source: Udagawa et al. (2310.08797), section 2.1; tau and tau^2 after DistilBERT (1910.01108).
    """
    check_logits(student_logits, teacher_logits, temperature)
    student = F.log_softmax(student_logits.float() / temperature, dim=-1)
    teacher = F.log_softmax(teacher_logits.float() / temperature, dim=-1)
    positions = max(student[..., 0].numel(), 1)
    return temperature**2 * F.kl_div(student, teacher, reduction="sum", log_target=True) / positions


def hidden_state(projected_student: Tensor, teacher: Tensor, attention_mask: Tensor | None = None) -> Tensor:
    r"""Hidden-state (HS) transfer for one mapped pair of layers: mean squared error over non-padding tokens.

    .. math:: \frac{1}{N H} \sum_{n=1}^{N} \| W h^S_n - h^T_n \|^2

    N counts the non-padding tokens of the whole batch, H is the teacher's width.

    Args:
        projected_student: (B, T, H), the student's states already mapped by W to the teacher's width.
        teacher: (B, T, H).
        attention_mask: (B, T), nonzero at real tokens; None means no padding.

    Raises:
        ValueError: shapes that do not agree.

    Source: Udagawa et al. (2310.08797), section 2.2; the mean over non-padding tokens is this study's choice.
    """
    return _masked_mean_squared_error(projected_student, teacher, attention_mask)


def direct_attention(projected_student: Tensor, teacher: Tensor, attention_mask: Tensor | None = None) -> Tensor:
    r"""DirectMiniLM for one of Q, K or V: mean squared error between projected student and teacher vectors.

    .. math:: \frac{1}{N H} \sum_{n=1}^{N} \| W_X x^S_n - x^T_n \|^2, \quad X \in \{Q, K, V\}

    The same form as :func:`hidden_state` on purpose: it is the paper's control for what is transferred, not how.

    Args, Raises: as :func:`hidden_state`, with queries, keys or values (all heads side by side) for hidden states.

    Source: Udagawa et al. (2310.08797), section 2.3 (full vectors; maps per head are an open point).
    """
    return _masked_mean_squared_error(projected_student, teacher, attention_mask)


def attention_relation(
    student: Tensor, teacher: Tensor, relation_heads: int, attention_mask: Tensor | None = None
) -> Tensor:
    r"""MiniLMv2 for one of Q, K or V: divergence of the self-attention relations.

    .. math:: R_a = softmax(X_a X_a^\top / \sqrt{d}), \quad
              \frac{1}{B} \sum_b \frac{1}{A\,|x_b|} \sum_{a=1}^{A} \sum_{t \in x_b} KL(R^T_{a,t} \,\|\, R^S_{a,t})

    X_a is the a-th of A equal slices of the width, d that slice's width in the model at hand (H / A, so student and
    teacher differ), and |x_b| the number of non-padding tokens. Padding is left out as query and as key; a sequence of
    nothing but padding does not count in the mean. Scores and softmax are float32 whatever the input and autocast.

    Args:
        student: (B, T, H_S). teacher: (B, T, H_T). All attention heads side by side; widths and head counts may differ.
        relation_heads: A, a divisor of both widths.
        attention_mask: (B, T), nonzero at real tokens; None means no padding.

    Raises:
        ValueError: shapes that do not agree, or a width that ``relation_heads`` does not divide.

    Source: MiniLMv2 (2012.15828), section 3.2, with the reduction of its published code.
    """
    check_relation(student, teacher, relation_heads, attention_mask)
    valid = None if attention_mask is None else attention_mask.bool()
    with torch.autocast(student.device.type, enabled=False):
        student_relation = _relation_log_probabilities(student, relation_heads, valid)  # (B, A, T, T)
        teacher_relation = _relation_log_probabilities(teacher, relation_heads, valid)
        if valid is None:
            total = F.kl_div(student_relation, teacher_relation, reduction="sum", log_target=True)
            return total / (relation_heads * student.shape[1] * student.shape[0])
        divergence = teacher_relation.exp() * (teacher_relation - student_relation)
        pairs = valid[:, None, :, None] & valid[:, None, None, :]  # query and key are both real tokens
        per_sequence = divergence.masked_fill(~pairs, 0.0).sum(dim=(1, 2, 3))
        lengths = valid.sum(dim=1)
        return (per_sequence / (relation_heads * lengths.clamp(min=1))).sum() / (lengths > 0).sum().clamp(min=1)


def hidden_state_cosine(projected_student: Tensor, teacher: Tensor) -> Tensor:
    r"""Cosine distance of hidden states, :math:`\frac{1}{N} \sum_n (1 - \cos(W h^S_n, h^T_n))`, over all N tokens.

    Args, Raises: as :func:`hidden_state`; there is no padding.

    Source: DistilBERT (1910.01108), its public code.
    """
    _check_states(projected_student, teacher, None, same_width=True)
    return 1 - F.cosine_similarity(projected_student.float(), teacher.float(), dim=-1).mean()


def attention_scores(query: Tensor, key: Tensor, heads: int) -> Tensor:
    r"""Unnormalised attention scores :math:`Q_a K_a^\top / \sqrt{d}` of (B, T, H): (B, A, T, T), in float32.

    Raises:
        ValueError: ``heads`` does not divide the width.
    """
    if heads < 1 or query.shape[-1] % heads:
        raise ValueError(f"{heads} heads do not divide the width {query.shape[-1]}")
    with torch.autocast(query.device.type, enabled=False):
        q, k = (x.float().unflatten(-1, (heads, -1)).transpose(1, 2) for x in (query, key))
        return (q / math.sqrt(q.shape[-1])) @ k.transpose(-1, -2)


def attention_score(student: Tensor, teacher: Tensor) -> Tensor:
    r"""Mean squared error of the unnormalised attention scores of one pair of layers.

    .. math:: \frac{1}{B A T^2} \sum_{b,a} \| A^S_{b,a} - A^T_{b,a} \|^2

    Args:
        student, teacher: (B, A, T, T), of :func:`attention_scores`; there is no padding.

    Raises:
        ValueError: different shapes.

    Source: TinyBERT (1909.10351), its attention-based distillation.
    """
    _check_scores(student, teacher)
    return F.mse_loss(student, teacher)


def attention_distribution(student: Tensor, teacher: Tensor) -> Tensor:
    r"""Divergence of the attention distributions of one pair of layers.

    .. math:: \frac{1}{B A T} \sum_{b,a,t} KL(softmax(A^T_{b,a,t}) \,\|\, softmax(A^S_{b,a,t}))

    Args, Raises: as :func:`attention_score`.

    Source: MiniLM (2002.10957), its self-attention distribution transfer.
    """
    _check_scores(student, teacher)
    own, target = F.log_softmax(student, dim=-1), F.log_softmax(teacher, dim=-1)
    return F.kl_div(own, target, reduction="sum", log_target=True) / max(student[..., 0].numel(), 1)


def _check_scores(student: Tensor, teacher: Tensor) -> None:
    if student.shape != teacher.shape:
        raise ValueError(f"scores differ in shape: student {tuple(student.shape)}, teacher {tuple(teacher.shape)}")


def sentence_embedding(student: Tensor, teacher: Tensor, distance: str = "mse") -> Tensor:
    r"""Embedding transfer: pooled sentence embeddings s of the student to those t of the teacher.

    ========== ==========================================================================================
    distance   loss
    ========== ==========================================================================================
    mse        :math:`\frac{1}{B H} \sum_b \| s_b - t_b \|^2`
    cosine     :math:`\frac{1}{B} \sum_b (1 - \cos(s_b, t_b))`
    relational :math:`\frac{1}{B (B - 1)} \sum_{b \neq c} (\cos(s_b, s_c) - \cos(t_b, t_c))^2`; zero for B = 1
    ========== ==========================================================================================

    Args:
        student: (B, H), mapped to the teacher's width but for ``relational``, where widths may differ.
        teacher: (B, H). Both are computed in float32.

    Raises:
        ValueError: shapes that do not agree, or an unknown distance.

    Source: mse after multilingual sentence distillation (2004.09813), cosine and similarities after Jasper and Stella
    (2412.19048); the reductions are this study's choice.
    """
    if student.dim() != 2 or student.shape[: 1 if distance == "relational" else 2] != (
        teacher.shape[:1] if distance == "relational" else teacher.shape
    ):
        raise ValueError(f"embeddings differ in shape: student {tuple(student.shape)}, teacher {tuple(teacher.shape)}")
    with torch.autocast(student.device.type, enabled=False):
        student, teacher = student.float(), teacher.float()
        if distance == "mse":
            return F.mse_loss(student, teacher)
        student, teacher = F.normalize(student, dim=-1), F.normalize(teacher, dim=-1)
        if distance == "cosine":
            return 1 - (student * teacher).sum(dim=-1).mean()
        if distance == "relational":
            others = 1 - torch.eye(len(student), device=student.device)
            squared = (student @ student.T - teacher @ teacher.T).pow(2) * others
            return squared.sum() / max(len(student) * (len(student) - 1), 1)
    raise ValueError(f"distance {distance!r} is unknown; allowed: mse, cosine, relational")


def check_logits(student_logits: Tensor, teacher_logits: Tensor, temperature: float) -> None:
    """What :func:`output_distribution` raises."""
    if student_logits.shape != teacher_logits.shape:
        raise ValueError(
            f"logits differ in shape: student {tuple(student_logits.shape)}, teacher {tuple(teacher_logits.shape)}"
        )
    if temperature <= 0:
        raise ValueError(f"temperature = {temperature}; allowed: above 0")


def check_relation(student: Tensor, teacher: Tensor, relation_heads: int, attention_mask: Tensor | None) -> None:
    """What :func:`attention_relation` raises."""
    _check_states(student, teacher, attention_mask, same_width=False)
    for name, states in (("student", student), ("teacher", teacher)):
        if relation_heads < 1 or states.shape[-1] % relation_heads:
            raise ValueError(f"relation heads {relation_heads} do not divide the {name}'s width {states.shape[-1]}")


def _relation_log_probabilities(states: Tensor, relation_heads: int, valid: Tensor | None) -> Tensor:
    """(B, T, H) to log softmax of the scaled dot products, (B, A, T, T)."""
    batch, tokens, width = states.shape
    heads = states.float().view(batch, tokens, relation_heads, width // relation_heads).transpose(1, 2)
    scores = (heads / math.sqrt(width // relation_heads)) @ heads.transpose(-1, -2)
    if valid is not None:
        scores = scores.masked_fill(~valid[:, None, None, :], torch.finfo(scores.dtype).min)
    return F.log_softmax(scores, dim=-1)


def _masked_mean_squared_error(student: Tensor, teacher: Tensor, attention_mask: Tensor | None) -> Tensor:
    _check_states(student, teacher, attention_mask, same_width=True)
    if attention_mask is None:
        return F.mse_loss(student.float(), teacher.float())
    valid = attention_mask.bool()
    squared = (student.float() - teacher.float()).pow(2).masked_fill(~valid[..., None], 0.0)
    return squared.sum() / (valid.sum().clamp(min=1) * teacher.shape[-1])


def _check_states(student: Tensor, teacher: Tensor, attention_mask: Tensor | None, same_width: bool) -> None:
    shapes = f"student {tuple(student.shape)}, teacher {tuple(teacher.shape)}"
    if student.dim() != 3 or teacher.dim() != 3 or student.shape[:2] != teacher.shape[:2]:
        raise ValueError(f"expected (batch, tokens, width) with equal batch and tokens, got {shapes}")
    if same_width and student.shape[-1] != teacher.shape[-1]:
        raise ValueError(f"expected the student projected to the teacher's width, got {shapes}")
    if attention_mask is not None and attention_mask.shape != student.shape[:2]:
        raise ValueError(f"attention mask {tuple(attention_mask.shape)} does not fit {shapes}")
