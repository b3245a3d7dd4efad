"""params.yaml as validated models: every key, its type and its bounds."""

from __future__ import annotations

import re
from collections.abc import Collection, Iterable
from typing import Annotated, Literal

from pydantic import Field, model_validator

from study.methods import (
    AttentionRelation,
    DirectAttention,
    FastPath,
    Fraction,
    Initialisation,
    Inputs,
    LearningRate,
    Membership,
    Method,
    Positive,
    Section,
    Seed,
    Sparse,
    TaskName,
    TextName,
    Trained,
    Variant,
    Weight,
)

#: What names of settings, students, methods and budgets are made of: no underscore, which joins them in names of files.
NAME, NAMES = re.compile(r"[A-Za-z0-9][A-Za-z0-9.+-]*"), "a letter or digit, then letters, digits and . + -"

#: The budget that `distillation` itself states.
BASE_BUDGET = "base"

#: Tasks that guess masked words; these and retrieval are probes of the encoder as it is.
MASKED_WORDS = ("masked-word", "masked-word-multilingual")
PROBES = (*MASKED_WORDS, "retrieval")

#: Languages each task has data in, English first; tasks that are not named here have English alone.
TASK_LANGUAGES = {
    "topic-multilingual": ("en", "es", "fr"),
    "bigram-shift-multilingual": ("en", "es", "fr"),
    "sentence-order-multilingual": ("en", "es", "fr"),
    "masked-word-multilingual": ("en", "es", "fr"),
    "intents": ("en", "ar", "bg", "de", "el", "es", "fr", "hi", "ru", "th", "vi", "zh"),
    "retrieval": ("en", "ar", "bg", "de", "el", "es", "fr", "hi", "vi", "zh"),
}


class Encoder(Section):
    """Shape of a Transformer encoder; ``width`` is the hidden size, ``intermediate`` the feed-forward width."""

    layers: Positive
    width: Positive
    heads: Positive
    intermediate: Positive

    @model_validator(mode="after")
    def _heads_divide_width(self):
        if self.width % self.heads:
            raise ValueError(
                f"heads = {self.heads} does not divide width = {self.width}; allowed: a divisor of the width"
            )
        return self


class Teacher(Encoder):
    name: str


class Student(Encoder):
    """A student's shape, and the learning rates it was tuned for, by method, in place of the methods' own."""

    learning_rates: dict[str, LearningRate] = {}


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
    texts: list[TextName] = Field(min_length=1)
    tasks: list[TaskName] = Field(min_length=1)
    candidates: list[TaskName] = []
    adaptation: AdaptationChanges = AdaptationChanges()

    @model_validator(mode="after")
    def _candidates_are_others(self):
        for task in self.candidates:
            if task in self.tasks:
                raise ValueError(f"candidates: {task!r} is one of the tasks already; allowed: other tasks")
        return self

    @model_validator(mode="after")
    def _something_is_learnt(self):
        if set(self.tasks) <= set(PROBES):
            raise ValueError(f"tasks = {self.tasks} are probes alone; allowed: at least one task that is learnt")
        return self


class Ablations(Section):
    """Variants compared with the methods of the grid: names under ``variants``, or of single methods that they give."""

    variants: list[str]
    students: list[str]


class Grid(Section):
    settings: list[str] = Field(min_length=1)
    methods: list[str] = Field(min_length=1)
    students: dict[str, list[str]]
    seeds: list[Seed] = Field(min_length=1)
    budgets: dict[str, list[str]] = {}
    ablations: dict[str, Ablations] = {}


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

    @model_validator(mode="after")
    def _shares_fit(self):
        if self.mask_token + self.random_token > 1:
            raise ValueError(f"mask_token + random_token = {self.mask_token + self.random_token}; allowed: at most 1")
        return self


class Distillation(Section):
    """``mask_sets``: how many masks a sequence has, in turn; None: new ones whenever it is read."""

    steps: Positive
    batch_size: Positive
    accumulation_steps: Positive
    inputs: Inputs
    mask_sets: Positive | None
    warmup_fraction: Fraction
    weight_decay: Weight
    adam_epsilon: Annotated[float, Field(gt=0)]
    max_gradient_norm: Annotated[float, Field(gt=0)]
    evaluate_every: Positive
    validation_sequences: Positive
    save_every: Positive

    @model_validator(mode="after")
    def _batch_divides(self):
        if self.batch_size % self.accumulation_steps:
            raise ValueError(
                f"accumulation_steps = {self.accumulation_steps} does not divide batch_size = {self.batch_size}"
            )
        return self


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
    warmup_fraction: Fraction
    weight_decay: Weight
    pad_to_multiple_of: Positive
    pairs: Literal["separate", "joint"]
    tasks: dict[TaskName, TaskBudget]

    @model_validator(mode="after")
    def _languages_have_data(self):
        for name, task in self.tasks.items():
            known, key = TASK_LANGUAGES.get(name, ("en",)), f"tasks.{name}.languages"
            for language in task.languages:
                if language not in known:
                    raise ValueError(f"{key}: {name} has no data in {language!r}; allowed: {', '.join(known)}")
            if known[0] not in task.languages:
                raise ValueError(
                    f"{key} = {task.languages} lacks {known[0]!r}, the language {name} is trained on;"
                    f" allowed: {known[0]} and any of {', '.join(known[1:]) or 'no other'}"
                )
            if name == "retrieval" and task.languages == ["en"]:
                raise ValueError(f"{key} = ['en'] is nothing to compare; allowed: en and any of {', '.join(known[1:])}")
        return self


class Latency(Section):
    sequence_length: Annotated[int, Field(ge=2)]
    batch_sizes: list[Positive] = Field(min_length=1)
    warmup_runs: Annotated[int, Field(ge=0)]
    runs: Annotated[int, Field(ge=3)]
    threads: list[Positive] = Field(min_length=1)


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


class Params(Section):
    """All of params.yaml with a profile laid over it. Rules that span sections are checked here.

    ``methods`` holds those that ``variants`` make, too; ``memberships`` says which these are (:mod:`study.params`).
    """

    precision: Literal["auto", "bf16", "fp32"]
    attention_implementation: Literal["eager", "sdpa"]
    fast_paths: list[FastPath]
    grid: Grid
    settings: dict[str, Setting]
    corpus: Corpus
    masking: Masking
    adaptation: Adaptation
    students: dict[str, Student]
    initialisation: Initialisation
    distillation: Distillation
    budgets: dict[str, Budget] = {}
    tuning: Tuning
    methods: dict[str, Method]
    variants: dict[str, Variant] = {}
    memberships: dict[str, Membership] = {}
    finetuning: Finetuning
    latency: Latency
    representations: Representations
    benchmark: Benchmark

    def budget(self, name: str) -> Budget:
        """What is run at a budget; the base changes nothing of ``distillation``."""
        return Budget(steps=self.distillation.steps) if name == BASE_BUDGET else self.budgets[name]

    def ablated(self, setting: str) -> list[str]:
        """Methods of the setting's ablations, in the order of ``variants``."""
        ablations = self.grid.ablations.get(setting)
        chosen = set(ablations.variants) if ablations else set()
        return [
            name
            for name, membership in self.memberships.items()
            if name in chosen or (membership.variant in chosen and membership.extends in self.grid.methods)
        ]

    @model_validator(mode="after")
    def _sections_agree(self):
        self._names_are_plain()
        self._names_are_known()
        for name in self.grid.settings:
            for task in self.settings[name].tasks:
                if task not in self.finetuning.tasks:
                    raise ValueError(f"settings.{name}.tasks: {task!r} has no entry under finetuning.tasks")
            for student in self.grid.students[name]:
                self._student_fits(student, self.settings[name].teacher, f"settings.{name}.teacher")
                for method in self.grid.methods:
                    self._method_fits(method, student, self.settings[name].teacher)
        for name, students in self.tuning.students.items():
            for student in students:
                self._student_fits(student, self.settings[name].teacher, f"settings.{name}.teacher")
        for name, ablations in self.grid.ablations.items():
            self._ablations_fit(name, ablations)
        return self

    def _names_are_plain(self) -> None:
        named: dict[str, Iterable[str]] = {"settings": self.settings, "students": self.students}
        named |= {"methods": self.methods, "budgets": self.budgets}
        for key, names in named.items():
            for name in names:
                if not NAME.fullmatch(name):
                    raise ValueError(
                        f"{key}: the name {name!r} cannot stand in names of files and stages; allowed: {NAMES}"
                    )

    def _names_are_known(self) -> None:
        grid, trained = self.grid, [name for name, own in self.methods.items() if isinstance(own, Trained)]
        lists: list[tuple[str, Iterable[str], Collection[str]]] = [
            ("grid.settings", grid.settings, self.settings),
            ("grid.methods", grid.methods, self.methods),
            ("grid.students", grid.students, self.settings),
            ("grid.ablations", grid.ablations, self.settings),
            ("grid.budgets", grid.budgets, self.settings),
            ("tuning.students", self.tuning.students, self.settings),
        ]
        for key, by_setting in (("grid.students", grid.students), ("tuning.students", self.tuning.students)):
            lists += [(f"{key}.{name}", own, self.students) for name, own in by_setting.items()]
        lists += [(f"grid.budgets.{name}", own, self.budgets) for name, own in grid.budgets.items()]
        for name, budget in self.budgets.items():
            if name == BASE_BUDGET:
                raise ValueError(f"budgets.{name}: `distillation` itself has this name; allowed: any other name")
            lists.append((f"budgets.{name}.methods", budget.methods or [], grid.methods))
            lists.append((f"budgets.{name}.learning_rates", budget.learning_rates, trained))
        lists.append(("tuning.budgets", self.tuning.budgets, [BASE_BUDGET, *self.budgets]))
        for name, own in grid.ablations.items():
            lists.append((f"grid.ablations.{name}.variants", own.variants, [*self.variants, *self.memberships]))
            lists.append((f"grid.ablations.{name}.students", own.students, self.students))
        for key, names, known in lists:
            for name in names:
                if name not in known:
                    raise ValueError(f"{key}: {name!r} is unknown; allowed: {', '.join(known)}")
        rated = [(f"students.{name}.learning_rates", own.learning_rates) for name, own in self.students.items()]
        compared = [
            (f"methods.{name}.equal_compute", [own.equal_compute])
            for name, own in self.methods.items()
            if isinstance(own, Trained) and own.equal_compute
        ]
        for key, names in (*rated, ("benchmark.methods", self.benchmark.methods), *compared):
            for name in names:
                if name not in trained:
                    raise ValueError(f"{key}: {name!r} is unknown or not trained; allowed: {', '.join(trained)}")
        for name in self.settings:
            if (name in grid.settings) != bool(grid.students.get(name)):
                allowed = "at least one student" if name in grid.settings else "[], or the setting in grid.settings"
                raise ValueError(f"grid.students.{name} = {grid.students.get(name)}; allowed: {allowed}")

    def _ablations_fit(self, setting: str, ablations: Ablations) -> None:
        where, run = f"grid.ablations.{setting}", self.grid.students.get(setting, [])
        if bool(ablations.variants) != bool(ablations.students):
            raise ValueError(
                f"{where}: variants = {ablations.variants}, students = {ablations.students}; allowed: both, or both []"
            )
        for student in ablations.students:
            if student not in run:
                raise ValueError(f"{where}.students: {student!r} is not in the grid; allowed: {', '.join(run)}")
            for method in self.ablated(setting):
                if method in self.grid.methods:
                    raise ValueError(f"{where}.variants: {method!r} is in grid.methods already; allowed: other methods")
                self._method_fits(method, student, self.settings[setting].teacher)
        for method in self.ablated(setting):
            base = self.memberships[method].extends
            if base not in self.grid.methods:
                raise ValueError(f"{where}.variants: {method!r} extends {base!r}, which is not in grid.methods")

    def _student_fits(self, name: str, teacher: Teacher, where: str) -> None:
        student = self.students[name]
        for size in ("layers", "width", "intermediate"):
            own, limit = getattr(student, size), getattr(teacher, size)
            if own > limit:
                raise ValueError(f"students.{name}.{size} = {own} exceeds {where}.{size}; allowed: at most {limit}")

    def _method_fits(self, name: str, student_name: str, teacher: Teacher) -> None:
        method, student = self.methods[name], self.students[student_name]
        if (method.initialisation or self.initialisation) == "teacher-layers" and student.heads != teacher.heads:
            raise ValueError(
                f"students.{student_name}.heads = {student.heads}: initialisation 'teacher-layers' needs"
                f" {teacher.heads} heads, as the teacher has"
            )
        rated = self.memberships[name].extends if name in self.memberships else name
        if student.learning_rates and isinstance(method, Trained) and rated not in student.learning_rates:
            raise ValueError(
                f"students.{student_name}.learning_rates: {rated} is missing; allowed: a rate for every method the"
                " student is trained with, or none at all (the methods' own)"
            )
        if isinstance(method, (AttentionRelation, DirectAttention)) and method.teacher_layer_from_top >= teacher.layers:
            raise ValueError(
                f"methods.{name}.teacher_layer_from_top = {method.teacher_layer_from_top} leaves no teacher layer;"
                f" allowed: 0 to {teacher.layers - 1}"
            )
        if isinstance(method, AttentionRelation):
            for width in (teacher.width, student.width):
                if width % method.relation_heads:
                    raise ValueError(
                        f"methods.{name}.relation_heads = {method.relation_heads} does not divide width {width}"
                        f" (teacher {teacher.width}, students.{student_name} {student.width});"
                        " allowed: a divisor of both"
                    )
