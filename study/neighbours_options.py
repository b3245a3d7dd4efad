"""Options of the neighbours: systems of other papers that are no rows of the grid, each a stage of its own."""

from __future__ import annotations

from typing import Annotated, Literal

from pydantic import Field, model_validator

from study.methods import Fraction, LearningRate, Positive, Seed, Sparse

#: The model that a neighbour works on unless it names a student.
TEACHER_MODEL = "teacher"


class NeighbourOptions(Sparse):
    """What every system has.

    ``model``: ``teacher``, or a student's run: ``<method>_<student>_<seed>``, then the budget if not the base.
    ``tasks``: some of the setting's that are learnt; None: all of them. ``train``, ``development``, ``test``: at most
    so many examples of each, where the study's own numbers take too long.
    """

    seeds: list[Seed] = Field(min_length=1)
    model: str = TEACHER_MODEL
    tasks: list[str] | None = Field(default=None, min_length=1)
    train: Positive | None = None
    development: Positive | None = None
    test: Positive | None = None


Bits = Annotated[int, Field(ge=2, le=8)]
Scaling = Literal["row", "mse", "minmax"]
Tuned = Literal["outliers", "random", "error", "biases", "lora"]


class PreQuant(NeighbourOptions):
    """Source: 2306.00014; :mod:`study.neighbours.prequant` says what of it is our reading.

    ``bits``: at which outliers are tuned. At ``compared_bits`` alone the other ``scalings`` and the other entries of
    ``tuned`` stand beside them; the first of each list is the system's own. ``share``: of the weights of linear maps
    that are tuned. ``finetuned``: with fine-tuning in fp32, as it is and quantised afterwards.
    """

    system: Literal["prequant"]
    bits: list[Bits] = Field(min_length=1)
    compared_bits: Bits
    scalings: list[Scaling] = Field(min_length=1)
    tuned: list[Tuned] = Field(min_length=1)
    share: Annotated[Fraction, Field(gt=0, lt=1)]
    finetuned: bool
    learning_rates: dict[Literal["outliers", "biases", "lora", "full"], LearningRate]

    @model_validator(mode="after")
    def _rates_are_there(self):
        needed = {own if own in ("biases", "lora") else "outliers" for own in self.tuned}
        needed |= {"outliers", *["full"] * self.finetuned}
        if missing := sorted(needed - self.learning_rates.keys()):
            raise ValueError(f"learning_rates lacks {', '.join(missing)}; allowed: a rate for each that is tuned")
        if self.compared_bits not in self.bits:
            raise ValueError(f"compared_bits = {self.compared_bits}; allowed: one of bits = {self.bits}")
        return self


#: One of the classes above, chosen by ``system``; one alone needs no discriminator.
Neighbour = PreQuant
#: System -> the notebook that runs it.
NOTEBOOKS = {"prequant": "48_prequant"}
