"""Options of the neighbours: systems of other papers that are no rows of the grid, each a stage of its own."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Annotated, Literal

from pydantic import Discriminator, Field

from study.methods import Fraction, LearningRate, Positive, Section, Seed, Sparse, Weight
from study.sections import Encoder

#: Families of which transformers has a decoder that attends to an encoder.
DECODERS = ("bert", "roberta", "xlm-roberta", "camembert", "ernie", "electra")
#: The model that a neighbour works on unless it names a student.
TEACHER = "teacher"


class NeighbourOptions(Sparse):
    """What every system has.

    ``model``: ``teacher``, or a student's run: ``<method>_<student>_<seed>``, then the budget if not the base.
    ``tasks``: some of the setting's that are learnt; None: all of them. ``train``, ``development``, ``test``: at most
    so many examples of each, where the study's own numbers take too long.
    """

    seeds: list[Seed] = Field(min_length=1)
    model: str = TEACHER
    tasks: list[str] | None = Field(default=None, min_length=1)
    train: Positive | None = None
    development: Positive | None = None
    test: Positive | None = None
    max_length: Annotated[int, Field(ge=8)] | None = None


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

    def problems(self) -> Iterator[str]:
        needed = {"outliers", *({"biases", "lora"} & {*self.tuned}), *["full"] * self.finetuned}
        if missing := sorted(needed - self.learning_rates.keys()):
            yield f"learning_rates lacks {', '.join(missing)}; allowed: a rate for each that is tuned"
        if self.compared_bits not in self.bits:
            yield f"compared_bits = {self.compared_bits}; allowed: one of bits = {self.bits}"


Compared = Literal["attention", "hidden", "query", "key", "value"]


CrIldArm = Literal[
    "last-task",
    "uniform-task",
    "last-supplementary",
    "uniform-supplementary",
    "last-task-regularised",
    "last-supplementary-regularised",
]


class Stage(Section):
    """A stage of training."""

    epochs: Positive
    batch_size: Positive
    learning_rate: LearningRate


class CrIld(NeighbourOptions):
    """Source: 2302.01530. The student is the ``layers`` at the bottom of the model.

    ``objects``: what is compared of a layer. ``arms``: layers, text and, of the last layer, the regularisers;
    the first is the system's own.
    ``intermediate`` and ``logits``: its stages. ``consistency``: weight that this term would reach after all epochs.
    ``noise``: share of the training labels that are wrong.
    """

    system: Literal["cr-ild"]
    layers: Positive
    objects: list[Compared] = Field(min_length=1)
    arms: list[CrIldArm] = Field(min_length=1)
    intermediate: Stage
    logits: Stage
    consistency: Weight
    weight_decay: Weight
    noise: Annotated[Fraction, Field(lt=1)]


class XtremeDistil(NeighbourOptions):
    """Source: 2106.04563. A ``student`` is distilled on the ``source`` task and used for the other ``tasks``.

    ``variants``: what the first stage compares; ``embeddings``: compressed from the teacher's, or random. The first of
    each is the system's own. ``transfer``: texts of the source that are read without labels. ``representation``,
    ``logits``, ``labels``: its stages; the epochs of the last two are those of each unfreezing.
    """

    system: Literal["xtremedistil"]
    source: str
    student: Encoder
    variants: list[Literal["topmost", "cls", "uniform"]] = Field(min_length=1)
    embeddings: list[Literal["pca", "random"]] = Field(min_length=1)
    transfer: Positive
    representation: Stage
    logits: Stage
    labels: Stage


class MiniEnd(NeighbourOptions):
    """Source: 2305.12330; :mod:`study.neighbours.miniend` says what of it is our reading.

    An encoder-decoder made of the model learns to fill spans and teaches a ``student`` that starts at random, whose
    sizes are those of its encoder and of its decoder. ``arms``: what the teacher adds to the loss of spans.
    ``sequences`` of the corpus, cut to ``max_length`` tokens, of which the share ``corrupted`` is taken out in spans of
    ``span`` on the mean; ``development`` of them are held out. ``adaptation``, ``distillation``, ``summaries``: stages;
    ``train`` and ``test``: summaries.
    """

    system: Literal["miniend"]
    student: Encoder
    arms: list[Literal["scratch", "od", "self", "od+self", "od+self+cross"]] = Field(min_length=1)
    relation_heads: Positive
    temperature: Annotated[float, Field(gt=0)]
    sequences: Positive
    corrupted: Annotated[float, Field(gt=0, lt=1)]
    span: Positive
    adaptation: Stage
    distillation: Stage
    summaries: Stage
    summary_length: Annotated[int, Field(ge=8)]
    train: Positive
    development: Positive
    test: Positive
    max_length: Annotated[int, Field(ge=8)]


#: One of the classes above, chosen by ``system``.
Neighbour = Annotated[PreQuant | CrIld | XtremeDistil | MiniEnd, Discriminator("system")]
#: System -> the notebook that runs it.
NOTEBOOKS = {name: f"48_{name.replace('-', '_')}" for name in ("prequant", "cr-ild", "xtremedistil", "miniend")}
