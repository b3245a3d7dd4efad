"""Losses against slow loops written from the formulas of the papers, and against numbers worked by hand."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch

from study.distillation.losses import attention_relation, direct_attention, hidden_state, output_distribution

pytestmark = pytest.mark.fast
MASKS = {
    "none": None,
    "full": [[1, 1, 1, 1, 1]] * 3,
    "right": [[1, 1, 1, 0, 0], [1, 1, 1, 1, 1], [1, 0, 0, 0, 0]],
    "left": [[0, 0, 1, 1, 1], [1, 1, 1, 1, 1], [0, 0, 0, 0, 1]],
    "inside": [[1, 0, 1, 0, 1], [0, 1, 1, 1, 0], [1, 1, 0, 1, 1]],
}


def states(*shape: int, seed: int = 0, scale: float = 1.0) -> torch.Tensor:
    return scale * torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def softmax(scores: list[float]) -> list[float]:
    exponentials = [math.exp(score - max(scores)) for score in scores]
    return [value / sum(exponentials) for value in exponentials]


def divergence(p: list[float], q: list[float]) -> float:
    return sum(a * math.log(a / b) for a, b in zip(p, q, strict=True) if a > 0)


def relation_loop(student, teacher, relation_heads, mask) -> float:
    """MiniLMv2: mean over the batch of 1 / (A_r |x|) sum_a sum_t KL(R^T[a,t] || R^S[a,t]), d = own width / A_r."""
    total, sequences = 0.0, 0
    for b in range(len(student)):
        valid = [t for t in range(student.shape[1]) if mask is None or mask[b][t]]
        if not valid:
            continue
        sequences += 1
        summed = 0.0
        for a in range(relation_heads):
            relations = []
            for model in (teacher, student):
                d = model.shape[2] // relation_heads
                x = [[float(model[b, t, a * d + c]) for c in range(d)] for t in valid]
                relations.append(
                    [softmax([sum(u * v for u, v in zip(s, t, strict=True)) / math.sqrt(d) for t in x]) for s in x]
                )
            summed += sum(divergence(p, q) for p, q in zip(*relations, strict=True))
        total += summed / (relation_heads * len(valid))
    return total / sequences


def squared_error_loop(student, teacher, mask) -> float:
    errors = [
        (float(student[b, t, c]) - float(teacher[b, t, c])) ** 2
        for b in range(teacher.shape[0])
        for t in range(teacher.shape[1])
        for c in range(teacher.shape[2])
        if mask is None or mask[b][t]
    ]
    return sum(errors) / len(errors)


@pytest.mark.parametrize("name", MASKS)
@pytest.mark.parametrize(("widths", "relation_heads"), [((12, 24), 4), ((24, 12), 6), ((8, 8), 1), ((6, 6), 6)])
def test_attention_relation_is_the_formula(name, widths, relation_heads):
    student, teacher = states(3, 5, widths[0], seed=1), states(3, 5, widths[1], seed=2)
    mask = MASKS[name]
    loss = attention_relation(student, teacher, relation_heads, None if mask is None else torch.tensor(mask))
    assert loss.item() == pytest.approx(relation_loop(student, teacher, relation_heads, mask), rel=1e-5)


@pytest.mark.parametrize("name", MASKS)
@pytest.mark.parametrize("loss", [hidden_state, direct_attention])
def test_squared_errors_are_the_formula(name, loss):
    student, teacher = states(3, 5, 6, seed=1), states(3, 5, 6, seed=2)
    mask = MASKS[name]
    value = loss(student, teacher, None if mask is None else torch.tensor(mask)).item()
    assert value == pytest.approx(squared_error_loop(student, teacher, mask), rel=1e-5)


@pytest.mark.parametrize("temperature", [0.5, 1.0, 2.0])
@pytest.mark.parametrize("shape", [(7,), (4, 7), (2, 3, 7)])
def test_output_distribution_is_the_formula(temperature, shape):
    student, teacher = states(*shape, seed=1), states(*shape, seed=2)
    rows = list(zip(student.view(-1, 7).tolist(), teacher.view(-1, 7).tolist(), strict=True))
    expected = [
        divergence(softmax([z / temperature for z in t]), softmax([z / temperature for z in s])) for s, t in rows
    ]
    value = output_distribution(student, teacher, temperature).item()
    assert value == pytest.approx(temperature**2 * sum(expected) / len(expected), rel=1e-5)


def test_relation_of_two_tokens_by_hand():
    # Width 1, one relation head, two tokens: X_T = (0, 2), X_S = (0, 0).
    # Student scores are all 0: both rows (1/2, 1/2). Teacher scores: rows (0, 0) and (0, 4).
    # Row 1: KL((1/2, 1/2) || (1/2, 1/2)) = 0.  Row 2: p = 1 / (1 + e^-4) = 0.98201: log 2 + p log p + (1-p) log (1-p).
    p = 1 / (1 + math.exp(-4))
    second = math.log(2) + p * math.log(p) + (1 - p) * math.log(1 - p)
    teacher = torch.tensor([[[0.0], [2.0]]])
    assert attention_relation(torch.zeros(1, 2, 1), teacher, 1).item() == pytest.approx(second / 2, rel=1e-5)


def test_relation_is_scaled_by_each_models_own_head_width():
    # Two tokens. Student: width 4, tokens 0 and (1,1,1,1): scores 4 / sqrt(4) = 2 with itself.
    # Teacher: width 1, tokens 0 and sqrt(2): score 2 / sqrt(1) = 2 with itself. The relations agree: loss 0.
    student = torch.tensor([[[0.0] * 4, [1.0] * 4]])
    teacher = torch.tensor([[[0.0], [math.sqrt(2)]]])
    assert attention_relation(student, teacher, 1).item() == pytest.approx(0, abs=1e-6)


def test_relation_heads_resplit_the_width():
    # Width 4 in 2 relation heads: slices (1,2) and (3,4). Only the second slice differs between models, and with one
    # relation head of zeros in both the first contributes nothing: the value is half of the second's alone.
    student, teacher = torch.zeros(1, 3, 4), torch.zeros(1, 3, 4)
    student[..., 2:], teacher[..., 2:] = states(1, 3, 2, seed=1), states(1, 3, 2, seed=2)
    alone = attention_relation(student[..., 2:], teacher[..., 2:], 1)
    assert attention_relation(student, teacher, 2).item() == pytest.approx(alone.item() / 2, rel=1e-5)


def test_hidden_state_by_hand():
    # Differences (1, 2), (3, 0) and, behind the mask, (9, 9): (1 + 4 + 9 + 0) / (2 tokens x width 2) = 3.5.
    student = torch.tensor([[[1.0, 2.0], [3.0, 0.0], [9.0, 9.0]]])
    mask = torch.tensor([[1, 1, 0]])
    assert hidden_state(student, torch.zeros(1, 3, 2), mask).item() == pytest.approx(3.5)
    assert direct_attention(student, torch.zeros(1, 3, 2), mask).item() == pytest.approx(3.5)


def test_hidden_state_means_over_tokens_not_over_sequences():
    # One sequence of 1 token with error 4, one of 3 tokens without error: 4 / 4 tokens = 1, not mean(4, 0) = 2.
    student = torch.zeros(2, 3, 1)
    student[0, 0] = 2.0
    mask = torch.tensor([[1, 0, 0], [1, 1, 1]])
    assert hidden_state(student, torch.zeros(2, 3, 1), mask).item() == pytest.approx(1.0)


def test_output_distribution_by_hand():
    # p_T = (3/4, 1/4), p_S = (1/2, 1/2): 3/4 log 3/2 + 1/4 log 1/2 = 0.130812.
    teacher, student = torch.tensor([[math.log(3.0), 0.0]]), torch.zeros(1, 2)
    assert output_distribution(student, teacher).item() == pytest.approx(0.130812, rel=1e-5)


@pytest.mark.parametrize("side", ["right", "left"])
def test_relation_of_a_padded_batch_is_the_mean_over_its_sequences_alone(side):
    lengths, mask = (5, 3, 1), torch.zeros(3, 5, dtype=torch.long)
    students, teachers = [states(1, n, 12, seed=n) for n in lengths], [states(1, n, 24, seed=9 + n) for n in lengths]
    student, teacher = (
        states(3, 5, 12, seed=50, scale=1e3),
        states(3, 5, 24, seed=51, scale=1e3),
    )  # rubbish in the padding
    for b, n in enumerate(lengths):
        place = slice(0, n) if side == "right" else slice(5 - n, 5)
        student[b, place], teacher[b, place], mask[b, place] = students[b][0], teachers[b][0], 1
    alone = [attention_relation(s, t, 6).item() for s, t in zip(students, teachers, strict=True)]
    assert attention_relation(student, teacher, 6, mask).item() == pytest.approx(np.mean(alone), rel=1e-5)


@pytest.mark.parametrize("side", ["right", "left"])
@pytest.mark.parametrize("loss", [hidden_state, direct_attention])
def test_squared_error_of_a_padded_batch_is_that_of_its_tokens_alone(side, loss):
    lengths, mask = (5, 3, 1), torch.zeros(3, 5, dtype=torch.long)
    student, teacher = states(3, 5, 6, seed=50, scale=1e3), states(3, 5, 6, seed=51, scale=1e3)
    for b, n in enumerate(lengths):
        place = slice(0, n) if side == "right" else slice(5 - n, 5)
        student[b, place], teacher[b, place], mask[b, place] = states(n, 6, seed=n), states(n, 6, seed=9 + n), 1
    tokens = mask.bool()
    alone = loss(student[tokens][None], teacher[tokens][None])
    assert loss(student, teacher, mask).item() == pytest.approx(alone.item(), rel=1e-5)


LOSSES = {
    "relation": lambda student, teacher, mask: attention_relation(student, teacher, 2, mask),
    "hidden": hidden_state,
    "direct": direct_attention,
}


@pytest.mark.parametrize("name", LOSSES)
@pytest.mark.parametrize("value", [float("nan"), float("inf"), 1e30])
def test_not_even_a_non_finite_padding_position_matters(name, value):
    mask = torch.tensor([[1, 1, 1, 0], [0, 1, 1, 1]])
    student, teacher = states(2, 4, 4, seed=1), states(2, 4, 4, seed=2)
    expected = LOSSES[name](student, teacher, mask).item()
    student, teacher = (tensor.masked_fill(mask[..., None] == 0, value) for tensor in (student, teacher))
    assert LOSSES[name](student, teacher, mask).item() == pytest.approx(expected, rel=1e-6)


@pytest.mark.parametrize("name", LOSSES)
def test_a_sequence_of_nothing_but_padding_counts_for_nothing(name):
    student, teacher = states(3, 4, 4, seed=1).requires_grad_(), states(3, 4, 4, seed=2)
    mask = torch.tensor([[1, 1, 1, 1], [0, 0, 0, 0], [1, 1, 0, 0]])
    loss = LOSSES[name](student, teacher, mask)
    kept = [0, 2]
    assert loss.item() == pytest.approx(LOSSES[name](student[kept], teacher[kept], mask[kept]).item(), rel=1e-6)
    loss.backward()
    assert torch.isfinite(student.grad).all() and (student.grad[1] == 0).all()


@pytest.mark.parametrize("name", LOSSES)
def test_nothing_but_padding_is_zero_and_finite(name):
    student = states(2, 3, 4, seed=1).requires_grad_()
    loss = LOSSES[name](student, states(2, 3, 4, seed=2), torch.zeros(2, 3, dtype=torch.long))
    loss.backward()
    assert loss.item() == 0 and (student.grad == 0).all()


@pytest.mark.parametrize("name", LOSSES)
@pytest.mark.parametrize("mask", ["right", "left", "inside"])
def test_gradients_reach_every_real_token_and_no_padding(name, mask):
    mask = torch.tensor(MASKS[mask])
    student, teacher = states(3, 5, 4, seed=1).requires_grad_(), states(3, 5, 4, seed=2)
    LOSSES[name](student, teacher, mask).backward()
    assert (student.grad[mask == 0] == 0).all()
    lengths = mask.sum(dim=1, keepdim=True).expand_as(mask)
    reached = (mask == 1) & (
        (lengths > 1) | (name != "relation")
    )  # a token alone relates to itself by 1 whatever it is
    assert (student.grad[reached].abs().sum(dim=-1) > 0).all()


@pytest.mark.parametrize("name", [*LOSSES, "output"])
def test_gradients_are_those_of_finite_differences(name):
    loss = LOSSES.get(name, lambda student, teacher, mask: output_distribution(student, teacher, 2.0))
    student, teacher = states(2, 3, 4, seed=1).requires_grad_(), states(2, 3, 4, seed=2)
    mask = torch.tensor([[1, 1, 0], [1, 1, 1]])
    loss(student, teacher, mask).backward()
    step, numerical = 1e-2, torch.zeros_like(student)
    with torch.no_grad():
        for index in np.ndindex(*student.shape):
            shift = torch.zeros_like(student)
            shift[index] = step
            difference = loss(student + shift, teacher, mask) - loss(student - shift, teacher, mask)
            numerical[index] = difference / (2 * step)
    assert student.grad.abs().max() > 1e-2
    torch.testing.assert_close(student.grad, numerical, atol=3e-4, rtol=3e-3)


@pytest.mark.parametrize("name", ["none", "right", "left"])
def test_relation_under_bf16_autocast_is_float32_and_never_negative(name):
    mask = None if MASKS[name] is None else torch.tensor(MASKS[name])
    for seed in range(20):
        teacher = states(3, 5, 24, seed=seed, scale=3).bfloat16()
        student = (
            teacher.float() + states(3, 5, 24, seed=100 + seed, scale=0.01)
        ).bfloat16()  # nearly the same: KL ~ 0
        with torch.autocast("cpu", dtype=torch.bfloat16):
            loss = attention_relation(student, teacher, 6, mask)
        exact = relation_loop(student.double(), teacher.double(), 6, MASKS[name])
        assert loss.dtype == torch.float32
        assert loss.item() >= 0
        assert loss.item() == pytest.approx(exact, rel=1e-3, abs=1e-6)


@pytest.mark.parametrize("name", [*LOSSES, "output"])
def test_bf16_inputs_are_summed_in_float32(name):
    loss = LOSSES.get(name, lambda student, teacher, mask: output_distribution(student, teacher))
    student, teacher = states(8, 64, 24, seed=1).bfloat16(), states(8, 64, 24, seed=2).bfloat16()
    mask = torch.ones(8, 64, dtype=torch.long)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        value = loss(student, teacher, mask)
    assert value.dtype == torch.float32
    assert value.item() == pytest.approx(loss(student.float(), teacher.float(), mask).item(), rel=1e-5)


@pytest.mark.parametrize("name", [*LOSSES, "output"])
def test_zero_for_identical_inputs(name):
    loss = LOSSES.get(name, lambda student, teacher, mask: output_distribution(student, teacher, 2.0))
    same = states(3, 5, 4, seed=1)
    assert loss(same, same.clone(), torch.tensor(MASKS["right"])).item() == pytest.approx(0, abs=1e-6)
    assert loss(same, states(3, 5, 4, seed=2), torch.tensor(MASKS["right"])).item() > 0.01


def test_masks_of_booleans_integers_and_floats_mean_the_same():
    student, teacher, mask = states(3, 5, 4, seed=1), states(3, 5, 4, seed=2), torch.tensor(MASKS["left"])
    for loss in LOSSES.values():
        values = {loss(student, teacher, kind).item() for kind in (mask, mask.bool(), mask.float())}
        assert len(values) == 1


def test_output_distribution_is_cross_entropy_less_the_teachers_entropy():
    student, teacher = states(4, 7, seed=1).requires_grad_(), states(4, 7, seed=2)
    p = torch.softmax(teacher, dim=-1)
    cross_entropy = -(p * torch.log_softmax(student, dim=-1)).sum(dim=-1).mean()
    entropy = -(p * torch.log(p)).sum(dim=-1).mean()
    loss = output_distribution(student, teacher)
    assert loss.item() == pytest.approx((cross_entropy - entropy).item(), rel=1e-5)
    (expected,) = torch.autograd.grad(cross_entropy, student)
    (gradient,) = torch.autograd.grad(loss, student)
    torch.testing.assert_close(gradient, expected)


def test_high_temperatures_approach_the_squared_error_of_centred_logits():
    # tau^2 KL -> 1/2 Var(z_T - z_S) over the vocabulary as tau grows (Hinton et al. 2015, section 2.1).
    student, teacher = states(4, 7, seed=1), states(4, 7, seed=2)
    limit = (teacher - student).var(dim=-1, unbiased=False).mean() / 2
    assert output_distribution(student, teacher, 100.0).item() == pytest.approx(limit.item(), rel=0.03)


SIZES = {
    "batch": ((2, 3, 4), (3, 3, 4), None, ("(2, 3, 4)", "(3, 3, 4)")),
    "tokens": ((2, 3, 4), (2, 5, 4), None, ("(2, 3, 4)", "(2, 5, 4)")),
    "rank": ((3, 4), (3, 4), None, ("(3, 4)",)),
    "mask": ((2, 3, 4), (2, 3, 4), (2, 4), ("(2, 4)", "(2, 3, 4)")),
    "mask of rank 3": ((2, 3, 4), (2, 3, 4), (2, 3, 1), ("(2, 3, 1)",)),
}


@pytest.mark.parametrize("name", LOSSES)
@pytest.mark.parametrize("case", SIZES)
def test_wrong_shapes_are_named(name, case):
    student, teacher, mask, named = SIZES[case]
    with pytest.raises(ValueError) as error:
        LOSSES[name](torch.zeros(student), torch.zeros(teacher), None if mask is None else torch.ones(mask))
    assert all(size in str(error.value) for size in named)


@pytest.mark.parametrize("loss", [hidden_state, direct_attention])
def test_squared_errors_do_not_broadcast_over_widths(loss):
    with pytest.raises(ValueError, match=r"\(2, 3, 1\).*\(2, 3, 4\)"):
        loss(torch.zeros(2, 3, 1), torch.zeros(2, 3, 4))


@pytest.mark.parametrize(("widths", "heads", "named"), [((12, 10), 4, "10"), ((10, 12), 4, "10"), ((12, 12), 0, "12")])
def test_relation_heads_must_divide_both_widths(widths, heads, named):
    with pytest.raises(ValueError, match=rf"{heads} .*{named}"):
        attention_relation(torch.zeros(1, 2, widths[0]), torch.zeros(1, 2, widths[1]), heads)


def test_output_distribution_names_shapes_and_temperature():
    with pytest.raises(ValueError, match=r"\(2, 5\).*\(2, 6\)"):
        output_distribution(torch.zeros(2, 5), torch.zeros(2, 6))
    for temperature in (0.0, -1.0):
        with pytest.raises(ValueError, match=str(temperature)):
            output_distribution(torch.zeros(2, 5), torch.zeros(2, 5), temperature)
