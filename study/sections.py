"""Sections of params.yaml: every key, its type and its bounds."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Annotated, Literal, get_args

from pydantic import Discriminator, Field, Tag

from study.declarations import OwnText
from study.families import FamilyName, StudentFamily
from study.methods import Fraction, Inputs, LearningRate, Positive, Section, Seed, Sparse, TaskName, TextName, Weight

#: The budget that `distillation` itself states.
BASE_BUDGET = "base"

#: Tasks that guess masked words; these and retrieval are probes of the encoder as it is.
MASKED_WORDS = ("masked-word", "masked-word-multilingual")
PROBES = (*MASKED_WORDS, "retrieval")
#: Embedded tasks whose labels are numbers.
OF_NUMBERS = ("sts-b",)

AnalysisName = Literal["comparison", "ablations", "representations", "budgets", "neighbours"]
#: Name of an analysis, of its folder in reports/ and of its figures' module -> its notebook.
ANALYSES: dict[AnalysisName, str] = {
    "comparison": "50_compare",
    "ablations": "52_ablations",
    "representations": "54_representations",
    "budgets": "56_budgets",  # of profiles that have budgets beside the base
    "neighbours": "58_neighbours",  # of settings that run one
}
#: Languages each task has data in, English first; tasks that are not named here have English alone.
TASK_LANGUAGES = {
    "topic-multilingual": ("en", "es", "fr"),
    "bigram-shift-multilingual": ("en", "es", "fr"),
    "sentence-order-multilingual": ("en", "es", "fr"),
    "masked-word-multilingual": ("en", "es", "fr"),
    "intents": ("en", "ar", "bg", "de", "el", "es", "fr", "hi", "ru", "th", "vi", "zh"),
    "retrieval": ("en", "ar", "bg", "de", "el", "es", "fr", "hi", "vi", "zh"),
}


#: Share of a schedule's steps; the rest of them are those of the decay.
WarmUp = Annotated[float, Field(ge=0, lt=1)]
#: A name, or a declaration of one's own.
Text = Annotated[
    Annotated[TextName, Tag("embedded")] | Annotated[OwnText, Tag("own")],
    Discriminator(lambda value: "embedded" if isinstance(value, str) else "own"),
]


class Encoder(Sparse):
    """Shape of a Transformer encoder; ``width`` is the hidden size, ``intermediate`` the feed-forward width.

    ``family``: of a student, if it is not that of its teacher.
    """

    layers: Positive
    width: Positive
    heads: Positive
    intermediate: Positive
    family: FamilyName | None = None

    def problems(self) -> Iterator[str]:
        if self.width % self.heads:
            yield f"heads = {self.heads} does not divide width = {self.width}; allowed: a divisor of the width"


class Teacher(Encoder):
    """A teacher as :func:`study.teachers.complete` gives it: with what its files tell of it.

    ``head``: ``own``, the checkpoint's language-modelling head as it is; ``fit``, a new one on the frozen encoder;
    ``adapt``, a new one, encoder and all trained; None: as ``adaptation`` says. ``pooling``: of a sentence encoder.
    """

    name: str
    head: Literal["own", "fit", "adapt"] | None = None
    pooling: str | None = None


class Student(Encoder):
    """A student's shape, and the learning rates it was tuned for, by method, in place of the methods' own."""

    learning_rates: dict[str, LearningRate] = {}
    family: StudentFamily | None = None


class Adaptation(Sparse):
    """``head_only``: the encoder, word embeddings too, stays as it is and the head alone is fitted."""

    steps: Positive
    batch_size: Positive
    learning_rate: LearningRate
    warmup_steps: Annotated[int, Field(ge=0)]
    weight_decay: Weight
    evaluate_every: Positive
    patience: Positive
    min_improvement: Weight
    head_only: bool | None = None


class AdaptationChanges(Sparse):
    """What a setting changes of ``adaptation``."""

    steps: Positive | None = None
    batch_size: Positive | None = None
    learning_rate: LearningRate | None = None
    warmup_steps: Annotated[int, Field(ge=0)] | None = None
    evaluate_every: Positive | None = None
    head_only: bool | None = None


class Setting(Section):
    """``candidates``: tasks that admission looks at beside ``tasks``; neither's texts are part of the corpus."""

    teacher: Teacher
    vocabulary: Literal["full", "trimmed"]
    texts: list[Text] = Field(min_length=1)
    tasks: list[str] = Field(min_length=1)
    candidates: list[str] = []
    adaptation: AdaptationChanges = AdaptationChanges()

    def problems(self) -> Iterator[str]:
        labels = [text if isinstance(text, str) else text.label for text in self.texts]
        for label in labels:
            if labels.count(label) > 1:
                yield f"texts: {label!r} is there twice; allowed: each once (`name:` gives one another name)"
        for task in self.candidates:
            if task in self.tasks:
                yield f"candidates: {task!r} is one of the tasks already; allowed: other tasks"
        head, fit = self.teacher.head, self.adaptation.head_only
        if head and fit is not None:
            allowed = "teacher.head alone (fit is head_only)"
            yield f"adaptation.head_only = {fit} beside teacher.head = {head}; allowed: {allowed}"


class Ablations(Section):
    """Variants compared with the methods of the grid: names under ``variants``, or of single methods that they give."""

    variants: list[str]
    students: list[str]


class Grid(Section):
    """What is run and shown.

    ``references``: by setting, rows beside the students that are evaluated alike. ``neighbours``: by setting, systems
    that are no such rows. ``analyses``: what the report shows, where not all that a study has; None: all.
    """

    settings: list[str] = Field(min_length=1)
    methods: list[str] = Field(min_length=1)
    students: dict[str, list[str]]
    seeds: list[Seed] = Field(min_length=1)
    budgets: dict[str, list[str]] = {}
    ablations: dict[str, Ablations] = {}
    references: dict[str, list[str]] = {}
    neighbours: dict[str, list[str]] = {}
    analyses: list[AnalysisName] | None = Field(default=None, min_length=1)


class Corpus(Section):
    sequence_length: Annotated[int, Field(ge=8)]
    validation_sequences: Positive
    max_tokens: Positive | None
    overlap_words: Annotated[int, Field(ge=8)]
    language_exponent: Fraction
    seed: Seed


class Masking(Section):
    fraction: Annotated[float, Field(gt=0, lt=1)]
    mask_token: Fraction
    random_token: Fraction

    def problems(self) -> Iterator[str]:
        if self.mask_token + self.random_token > 1:
            yield f"mask_token + random_token = {self.mask_token + self.random_token}; allowed: at most 1"


class Distillation(Section):
    """``mask_sets``: how many masks a sequence has, in turn; None: new ones whenever it is read."""

    steps: Positive
    batch_size: Positive
    accumulation_steps: Positive
    inputs: Inputs
    mask_sets: Positive | None
    warmup_fraction: WarmUp
    weight_decay: Weight
    adam_epsilon: Annotated[float, Field(gt=0)]
    max_gradient_norm: Annotated[float, Field(gt=0)]
    evaluate_every: Positive
    validation_sequences: Positive
    save_every: Positive

    def problems(self) -> Iterator[str]:
        if self.batch_size % self.accumulation_steps:
            yield f"accumulation_steps = {self.accumulation_steps} does not divide batch_size = {self.batch_size}"


class Budget(Section):
    """A number of training steps beside that of ``distillation``, and what is run at it: all of the grid by default."""

    steps: Positive
    batch_size: Positive | None = None
    evaluate_every: Positive | None = None
    save_every: Positive | None = None
    learning_rates: dict[str, LearningRate] = {}
    methods: list[str] | None = None
    seeds: list[Seed] | None = None

    @property
    def changes(self) -> dict[str, int]:
        """Keys of ``distillation`` -> their values at this budget."""
        return self.model_dump(exclude={"learning_rates", "methods", "seeds"}, exclude_none=True)


class Tuning(Section):
    """``steps``: None: those of each budget."""

    students: dict[str, list[str]]
    learning_rates: list[LearningRate] = Field(min_length=1)
    budgets: list[str] = [BASE_BUDGET]
    steps: Positive | None
    seed: Seed


class TaskBudget(Section):
    """Examples used. None: all of them; of retrieval's development, which are pairs that its test leaves over, none."""

    train: Positive | None
    development: Positive | None
    test: Positive | None
    max_length: Annotated[int, Field(ge=8)]
    languages: list[str] = ["en"]


class Finetuning(Section):
    seeds: list[Seed] = Field(min_length=1)
    learning_rates: list[LearningRate] = Field(min_length=1)
    epochs: Positive
    batch_size: Positive
    warmup_fraction: WarmUp
    weight_decay: Weight
    pad_to_multiple_of: Positive
    pairs: Literal["separate", "joint"]
    tasks: dict[str, TaskBudget]

    def problems(self) -> Iterator[str]:
        for name, task in self.tasks.items():
            if name not in get_args(TaskName):
                continue  # one's own, or unknown: study.config
            key, languages = f"tasks.{name}.languages", task.languages
            first, *others = known = TASK_LANGUAGES.get(name, ("en",))
            allowed = f"allowed: {first} and any of {', '.join(others) or 'no other'}"
            for language in languages:
                if language not in known:
                    yield f"{key}: {name} has no data in {language!r}; allowed: {', '.join(known)}"
            if first not in languages:
                yield f"{key} = {languages} lacks {first!r}, the language {name} is trained on; {allowed}"
            if name == "retrieval" and languages == ["en"]:
                yield f"{key} = ['en'] is nothing to compare; {allowed}"


class Reading(Section):
    """What of :class:`Finetuning` probes of frozen encoders go by."""

    batch_size: Positive
    pad_to_multiple_of: Positive
    pairs: Literal["separate", "joint"]


class Latency(Sparse):
    """``devices``: where it is measured; None: on the processor. Analyses show the first."""

    sequence_length: Annotated[int, Field(ge=2)]
    batch_sizes: list[Positive] = Field(min_length=1)
    warmup_runs: Annotated[int, Field(ge=0)]
    runs: Annotated[int, Field(ge=3)]
    threads: list[Positive] = Field(min_length=1)
    devices: list[Literal["cpu", "cuda"]] | None = Field(default=None, min_length=1)


class Runtimes(Section):
    """``seconds``: after which an input is done, however few runs were counted."""

    runtimes: list[Literal["eager", "compiled", "bf16", "onnx", "onnx-int8"]]
    lengths: list[Annotated[int, Field(ge=2)]] = Field(min_length=1)
    batch_sizes: list[Positive] = Field(min_length=1)
    threads: list[Positive] = Field(min_length=1)
    texts: Positive
    runs: Annotated[int, Field(ge=5)]
    seconds: Positive

    def problems(self) -> Iterator[str]:
        if "eager" not in self.runtimes:
            yield f"runtimes = {self.runtimes} lacks 'eager'; allowed: eager, which others are compared with"


class Representations(Section):
    sequences: Positive
    relation_sequences: Positive


class Benchmark(Section):
    vocabulary: Annotated[int, Field(ge=1000)]
    teacher: Encoder
    student: Encoder
    sequence_length: Annotated[int, Field(ge=8)]
    batch_size: Positive
    methods: list[str] = Field(min_length=1)
    peers: list[str]
    threads: Positive
    warmup_steps: Positive
    steps: Annotated[int, Field(ge=3)]
    rounds: Positive
