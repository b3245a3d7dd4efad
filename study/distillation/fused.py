"""Fast equals of two losses: value and student gradient in one pass, block by block.

With respect to the student's scores, the divergence of two softmaxes has the gradient softmax(student) -
softmax(teacher). So no graph is needed, and the scores of a block, small enough for the processor's caches, are
overwritten by the next. Tests compare values and gradients with :mod:`study.distillation.losses`, which is used instead
where ``fast_paths`` in params.yaml leaves out ``fused-losses``. Source: this study's choice.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from study.distillation.losses import check_logits, check_relation

#: Scores held at once, by device type: as many as a processor's caches hold; elsewhere enough to keep a device busy.
BLOCK = {"cpu": 2**20}
LARGE_BLOCK = 2**27


def output_distribution(student_logits: Tensor, teacher_logits: Tensor, temperature: float = 1.0) -> Tensor:
    """Equal to :func:`study.distillation.losses.output_distribution`; the teacher gets no gradient.

    Args, Raises: as there.
    """
    check_logits(student_logits, teacher_logits, temperature)
    return _OutputDistribution.apply(student_logits, teacher_logits.detach(), temperature)


def attention_relation(
    student: Tensor, teacher: Tensor, relation_heads: int, attention_mask: Tensor | None = None
) -> Tensor:
    """Equal to :func:`study.distillation.losses.attention_relation`; the teacher gets no gradient.

    Args, Raises: as there.
    """
    check_relation(student, teacher, relation_heads, attention_mask)
    return _AttentionRelation.apply(student, teacher.detach(), relation_heads, attention_mask)


class _OutputDistribution(torch.autograd.Function):
    @staticmethod
    def forward(ctx, student_logits, teacher_logits, temperature):
        vocabulary = student_logits.shape[-1]
        student, teacher = student_logits.reshape(-1, vocabulary), teacher_logits.reshape(-1, vocabulary)
        gradient = torch.empty_like(student) if ctx.needs_input_grad[0] else None  # None in evaluation
        positions = max(len(student), 1)
        total = torch.zeros((), device=student.device)
        for block, scores, targets, spare in _blocks(len(student), (vocabulary,), student.device):
            torch.mul(student[block], 1 / temperature, out=scores)
            torch.mul(teacher[block], 1 / temperature, out=targets)
            total += _divergence(scores, targets, spare).sum()
            if gradient is not None:
                gradient[block] = scores.mul_(temperature / positions)
        if gradient is not None:
            ctx.save_for_backward(gradient.view_as(student_logits))
        return total * (temperature**2 / positions)

    @staticmethod
    @once_differentiable
    def backward(ctx, upstream):
        return ctx.saved_tensors[0] * upstream, None, None


class _AttentionRelation(torch.autograd.Function):
    @staticmethod
    def forward(ctx, student, teacher, relation_heads, attention_mask):
        batch, tokens, width = student.shape
        own, targets = (_scaled_heads(states, relation_heads) for states in (student, teacher))  # (B, A, d, T)
        gradient = torch.empty_like(own) if ctx.needs_input_grad[0] else None  # None in evaluation
        padding = None if attention_mask is None else ~attention_mask.bool()  # (B, T)
        if padding is None:
            weights = own.new_full((batch, 1, 1), 1 / (relation_heads * tokens * batch))
        else:
            lengths = (~padding).sum(dim=1)
            weights = ~padding / (relation_heads * lengths.clamp(min=1) * (lengths > 0).sum().clamp(min=1))[:, None]
            weights = weights[:, None]  # (B, 1, T), of every query
        total = torch.zeros((), device=student.device)
        with torch.autocast(student.device.type, enabled=False):
            for block, *spaces in _blocks(batch, (relation_heads, tokens, tokens), student.device):
                heads = own[block].flatten(0, 1)  # (b A, d, T)
                for x, scores in zip((heads, targets[block].flatten(0, 1)), spaces, strict=False):
                    torch.bmm(x.transpose(1, 2), x, out=scores.flatten(0, 1))
                    if padding is not None:
                        scores.masked_fill_(padding[block, None, None, :], torch.finfo(scores.dtype).min)
                total += (_divergence(*spaces) * weights[block]).sum()
                if gradient is None:
                    continue
                difference = spaces[0].flatten(0, 1)
                if padding is not None:
                    spaces[0].masked_fill_(padding[block, None, :, None], 0.0)
                part = torch.bmm(heads, difference).baddbmm_(heads, difference.transpose(1, 2))  # (b A, d, T)
                gradient[block] = part.view(-1, *gradient.shape[1:]) * weights[block].amax(dim=2)[..., None, None]
        if gradient is not None:
            gradient = gradient.mul_((width // relation_heads) ** -0.25).permute(0, 3, 1, 2).reshape(student.shape)
            ctx.save_for_backward(gradient.to(student.dtype))
        return total

    @staticmethod
    @once_differentiable
    def backward(ctx, upstream):
        return ctx.saved_tensors[0] * upstream, None, None, None


def _blocks(items: int, shape: tuple[int, ...], device: torch.device):
    """Yield (slice of the items, and three float32 tensors of that many items of ``shape``, used again each time)."""
    step = max(1, min(items, BLOCK.get(device.type, LARGE_BLOCK) // math.prod(shape)))
    spaces = torch.empty(3, step, *shape, device=device)  # new memory for each block would cost more than the work
    for first in range(0, items, step):
        yield slice(first, first + step), *spaces[:, : min(step, items - first)]


def _scaled_heads(states: Tensor, relation_heads: int) -> Tensor:
    """(B, T, H) to (B, A, d, T) in float32, times d^(-1/4): products of two such are scaled scores."""
    batch, tokens, width = states.shape
    heads = states.detach().float().view(batch, tokens, relation_heads, -1).permute(0, 2, 3, 1)
    return heads.contiguous() * (width // relation_heads) ** -0.25


def _divergence(scores: Tensor, targets: Tensor, spare: Tensor) -> Tensor:
    """KL(softmax(targets) || softmax(scores)) of each row (..., n) to (...); leaves softmax - softmax in ``scores``.

    KL = sum_k p_k (target_k - score_k) - log Z_target + log Z_score, where log Z = max score - log max softmax.
    """
    difference = torch.sub(targets, scores, out=spare)
    log_normaliser = scores.amax(dim=-1) - targets.amax(dim=-1)
    torch.softmax(scores, dim=-1, out=scores)
    torch.softmax(targets, dim=-1, out=targets)
    log_normaliser -= scores.amax(dim=-1).log() - targets.amax(dim=-1).log()
    scores.sub_(targets)
    return difference.mul_(targets).sum(dim=-1).add_(log_normaliser)
