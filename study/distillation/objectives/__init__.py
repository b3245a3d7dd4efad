"""The objectives of distillation by name; a family of methods has a module each."""

from __future__ import annotations

from study import methods
from study.distillation.objectives.base import Objective
from study.distillation.objectives.weighted import SINGLE, Sum

#: ``methods.<name>.objective`` in params.yaml -> its module.
OBJECTIVES: dict[str, type[Objective]] = {**SINGLE, methods.objective_of(methods.Sum): Sum}
