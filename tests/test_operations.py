"""Operations of a step against matrix products counted by hand, and the steps of equal compute."""

from __future__ import annotations

import pytest
import tiny
import torch

from study.distillation.operations import count_operations, equal_steps
from study.sections import Encoder

STUDENT = Encoder(layers=2, width=12, heads=4, intermediate=24)
SEQUENCES, TOKENS, MASKED, VOCABULARY = 4, 16, 2, 60
POSITIONS = SEQUENCES * TOKENS

# Multiplications per token of a layer of width W, feed-forward width I: 4 W^2 of queries, keys, values and output,
# 2 W I of the feed-forward part, 2 T W of attention. The head of a masked token: W^2 and W V.
STUDENT_LAYER = 4 * 12 * 12 + 2 * 12 * 24 + 2 * TOKENS * 12
TEACHER_LAYER = 4 * 24 * 24 + 2 * 24 * 48 + 2 * TOKENS * 24
STUDENT_HEAD = SEQUENCES * MASKED * (12 * 12 + 12 * VOCABULARY)
TEACHER_HEAD = SEQUENCES * MASKED * (24 * 24 + 24 * VOCABULARY)
# Four layers for the last hidden state; two and the projections of the third for its queries, keys and values.
TEACHER_STATES = POSITIONS * 4 * TEACHER_LAYER
TEACHER_QKV = POSITIONS * (2 * TEACHER_LAYER + 3 * 24 * 24)
STUDENT_STATES = POSITIONS * 2 * STUDENT_LAYER
STUDENT_QKV = POSITIONS * (STUDENT_LAYER + 3 * 12 * 12)
PROJECTION = POSITIONS * 12 * 24  # the student's 12 channels to the teacher's 24
RELATIONS = 3 * SEQUENCES * TOKENS**2  # of Q, K and V, per channel
#: Method -> multiplications of what is trained, which backward makes twice more, and of the teacher.
BY_HAND = {
    "mlm": (STUDENT_STATES + STUDENT_HEAD, 0),
    "od": (STUDENT_STATES + STUDENT_HEAD, TEACHER_STATES + TEACHER_HEAD),
    "hs-uniform+last": (STUDENT_STATES + 3 * PROJECTION, TEACHER_STATES),  # layers 1 to 2 and 3, 2 to 4
    "hs-last": (STUDENT_STATES + PROJECTION, TEACHER_STATES),
    "mha-minilmv2": (STUDENT_QKV + RELATIONS * 12, TEACHER_QKV + RELATIONS * 24),
    "mha-direct": (STUDENT_QKV + 3 * PROJECTION, TEACHER_QKV),
    "od+hs": (STUDENT_STATES + STUDENT_HEAD + PROJECTION, TEACHER_STATES + TEACHER_HEAD),  # one pass of each
    "se-mse": (STUDENT_STATES + SEQUENCES * 12 * 24, TEACHER_STATES),  # one map a sequence
}


def operations_by_hand(method: str) -> int:
    trained, frozen = BY_HAND[method]
    return 2 * (3 * trained + frozen)


@pytest.fixture
def batch() -> dict[str, torch.Tensor]:
    tokens = torch.from_numpy(tiny.sequences(SEQUENCES, 1).astype(int))
    positions = torch.tensor([[1, 5]] * SEQUENCES)
    return {
        "input_ids": tokens,
        "masked_input_ids": tokens,
        "positions": positions,
        "labels": tokens.gather(1, positions),
        "item": torch.arange(SEQUENCES),
    }


@pytest.mark.parametrize("attention", ["eager", "sdpa"])
@pytest.mark.parametrize("family", tiny.FAMILIES)
@pytest.mark.parametrize("method", BY_HAND)
def test_operations_are_those_of_the_matrix_products(tmp_path, batch, method, family, attention):
    teacher = tiny.masked_language_model(family, attention)
    before = tiny.snapshot(teacher)
    options = tiny.parameters(tmp_path).methods[method]
    assert count_operations(teacher, STUDENT, options, batch) == operations_by_hand(method)
    assert teacher.config._attn_implementation == attention and tiny.identical(before, tiny.snapshot(teacher))
    assert all(parameter.requires_grad and parameter.grad is None for parameter in teacher.parameters())


@pytest.mark.parametrize("method", BY_HAND)
def test_steps_of_equal_compute_cost_what_those_of_the_reference_cost(tmp_path, batch, method):
    options = tiny.parameters(tmp_path).methods[method].model_dump() | {"equal_compute": "od"}
    budget = {"steps": 150, "warmup_fraction": 0.0}
    run, _ = tiny.run(tmp_path, "equal", "L2-H12", methods={"equal": options}, distillation=budget)
    assert run.equal_compute.method == "od" and run.equal_compute.steps == 150
    expected = round(150 * operations_by_hand("od") / operations_by_hand(method))
    assert equal_steps(run, tiny.masked_language_model(), batch) == expected
    assert (expected == 150) == (method == "od")


def test_steps_are_at_least_one_and_without_equal_compute_a_runs_own(tmp_path, batch):
    teacher = tiny.masked_language_model()
    run, _ = tiny.run(tmp_path, "mlm", "L2-H12", distillation={"steps": 7})
    assert equal_steps(run, teacher, batch) == 7
    options = tiny.parameters(tmp_path).methods["od"].model_dump() | {"equal_compute": "mlm"}
    run, _ = tiny.run(tmp_path, "equal", "L2-H12", methods={"equal": options}, distillation={"steps": 1})
    assert equal_steps(run, teacher, batch) == 1  # a third of a step would do
