"""Operations of a training step, counted: what equal compute means."""

from __future__ import annotations

import copy

from torch import Tensor
from torch.utils.flop_counter import FlopCounterMode
from transformers import PreTrainedModel

from study.descriptions import Run
from study.distillation.objectives import OBJECTIVES
from study.distillation.students import create_student
from study.methods import Method, Untrained
from study.sections import Encoder


def equal_steps(run: Run, teacher: PreTrainedModel, batch: dict[str, Tensor]) -> int:
    """The steps of ``run`` that cost what the steps of the method cost that it is compared with; at least 1.

    steps = round(n x f / g) with n steps of f operations and g operations of a step of ``run``, teacher included. Where
    ``run`` has no ``equal_compute``, the steps are its own.
    """
    if run.equal_compute is None:
        return run.distillation.steps
    reference, step = (
        count_operations(teacher, run.sizes, method, batch) for method in (run.equal_compute.objective, run.objective)
    )
    return max(1, round(run.equal_compute.steps * reference / step))


def count_operations(teacher: PreTrainedModel, sizes: Encoder, method: Method, batch: dict[str, Tensor]) -> int:
    """Floating-point operations of the matrix products of one step on ``batch``: forward and backward, no optimiser.

    PyTorch counts a multiplication and an addition as two. Models are random ones of the same shapes, with eager
    attention, since the counter does not know the fused one of processors, and losses those of
    :mod:`study.distillation.losses`: fast paths and the implementation of attention do not change the count. Random
    number generators are reset.

    Args:
        teacher: only its configuration is used.
        sizes: of the student.
    """
    assert not isinstance(method, Untrained)
    teacher = type(teacher)._from_config(copy.deepcopy(teacher.config), attn_implementation="eager")
    student = create_student(teacher, sizes, "random")
    objective = OBJECTIVES[method.objective](student, teacher, method, fused=False)
    with FlopCounterMode(display=False) as counter:
        objective(**batch)["loss"].backward()
    return counter.get_total_flops()
