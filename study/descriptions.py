"""Descriptions of stages: all that decides what a stage computes, given its data. :mod:`study.plan` makes them."""

from __future__ import annotations

from pathlib import Path
from typing import ClassVar, Literal, TypeVar

from pydantic import ValidationError

from study.declarations import Declared, Hashes, OwnTask, OwnText, hashes_of
from study.files import Layout, StudyError
from study.methods import FastPath, Initialisation, Membership, Method, Reference, Section, Sparse
from study.neighbours_options import TEACHER, Neighbour
from study.params import one_line
from study.sections import (
    BASE_BUDGET,
    Adaptation,
    Corpus,
    Distillation,
    Encoder,
    Finetuning,
    Latency,
    Masking,
    Reading,
    Representations,
    TaskBudget,
    Teacher,
)

#: The student that a result file of a reference names: it has the shape of none.
REFERENCE = "reference"


class Description(Section):
    """What one stage computes in one setting; ``stage`` is its name in dvc.yaml, ``name`` that of its file."""

    stage: ClassVar[str]
    setting: str
    revisions: dict[str, int]

    @property
    def name(self) -> str:
        """Name of the description among those of its stage."""
        return self.setting


class OfProfile(Description):
    """What also depends on the profile that asks for it: its results say which."""

    profile: str


class OfModel(Description):
    """What one model is: a student, or what stands in the place of one."""

    method: str
    student: str
    seed: int
    budget: str = BASE_BUDGET

    @property
    def model(self) -> str:
        """Name of its folder and of its result file: :func:`model_name`."""
        return model_name(self.method, self.student, self.seed, self.budget)

    @property
    def name(self) -> str:
        return f"{self.setting}_{self.model}"

    @property
    def title(self) -> str:
        """How its stage announces itself."""
        if self.method == TEACHER:
            return f"{self.setting} {TEACHER}"
        return f"{self.setting} {at_budget(f'{self.method} {self.student}', self.budget, ' ')} seed {self.seed}"


class Precision(Section):
    """How models are run: the values of all stages that run one."""

    precision: str
    attention_implementation: str
    fast_paths: list[FastPath]


class TaskData(Description, Sparse):
    """``declared``: those of one's own among ``tasks``; ``hashes``: what was in their files."""

    stage = "tasks"
    tasks: list[str]
    declared: dict[str, OwnTask] | None = None
    hashes: Hashes | None = None


class CorpusData(Description, Sparse):
    """``tasks``: those whose held-out texts stay out of the corpus.

    ``teacher_files``: hash of a local teacher's files; ``hashes``: what was in the files of own texts.
    """

    stage = "corpus"
    teacher: Teacher
    vocabulary: str
    texts: list[str | OwnText]
    tasks: list[str]
    corpus: Corpus
    teacher_files: str | None = None
    hashes: Hashes | None = None


class TeacherAdaptation(Description, Precision, Sparse):
    """``head``: ``own`` where the teacher is taken as it is, with its own language-modelling head."""

    stage = "teacher"
    adaptation: Adaptation
    masking: Masking
    head: Literal["own"] | None = None


class Admission(OfProfile, Precision):
    """``tasks``: those of the setting and its candidates; ``sizes``, ``initialisation``: of the untrained students."""

    stage = "admit"
    tasks: dict[str, TaskBudget]
    finetuning: Reading
    sizes: Encoder
    initialisation: Initialisation


class EqualCompute(Section):
    """A method and its steps: training takes as many steps as cost the operations of these."""

    method: str
    objective: Method
    steps: int


class Run(OfModel, Precision, Sparse):
    """One student: the method and everything else that decides its weights, given teacher and corpus.

    ``objective`` has the learning rate in force; what it may set instead of the value that all methods share is in
    ``initialisation`` and ``distillation``.
    """

    stage = "distill"
    objective: Method
    sizes: Encoder
    initialisation: Initialisation
    distillation: Distillation
    equal_compute: EqualCompute | None = None
    masking: Masking


class ReferenceModel(Description):
    """A row beside the students: ``options`` say what its model is."""

    stage = "reference"
    reference: str
    options: Reference

    @property
    def model(self) -> str:
        """Name of its folder and of its result file."""
        return model_name(self.reference, REFERENCE, 0)

    @property
    def name(self) -> str:
        return f"{self.setting}_{self.model}"


class Evaluation(OfModel, OfProfile, Precision):
    """One model's evaluation: of a student, or of the teacher (then all three names are its, and the seed is 0).

    A reference is the method of the student REFERENCE, seed 0.
    """

    stage = "evaluate"
    tasks: dict[str, TaskBudget]
    finetuning: Finetuning
    masking: Masking
    sequence_length: int

    def folder(self, layout: Layout) -> Path:
        """Where the model is saved."""
        if self.student == REFERENCE:
            return layout.reference(self.model)
        return layout.teacher if self.method == TEACHER else layout.student(self.model)


class LatencyMeasurement(OfProfile, Precision, Sparse):
    stage = "latency"
    students: dict[str, Encoder]
    references: dict[str, Reference] | None = None
    latency: Latency


class LayerComparison(OfProfile, Precision):
    """``runs`` are compared with the teacher and probed on ``tasks``, by training examples drawn with ``seed``.

    ``relation_heads``: as many as the teacher has, or the most of which both that and every student's width are
    multiples.
    """

    stage = "represent"
    runs: list[Run]
    representations: Representations
    relation_heads: int
    tasks: dict[str, TaskBudget]
    finetuning: Reading
    seed: int


class Tuning(OfProfile, Precision):
    """One method and student at every candidate learning rate, and the tasks that judge them."""

    stage = "tune"
    method: str
    student: str
    budget: str = BASE_BUDGET
    candidates: list[Run]
    tasks: dict[str, TaskBudget]
    finetuning: Reading

    @property
    def name(self) -> str:
        return f"{self.setting}_{self.file}"

    @property
    def file(self) -> str:
        """Name of its result file: method, student, and the budget if not the base."""
        return at_budget(f"{self.method}_{self.student}", self.budget)


class NeighbourSystem(OfProfile, Precision, Sparse):
    """A system beside the grid, on one model: ``options`` say which and how."""

    stage = "neighbour"
    neighbour: str
    options: Neighbour
    tasks: dict[str, TaskBudget]
    finetuning: Finetuning

    @property
    def name(self) -> str:
        return f"{self.setting}_{self.neighbour}"

    def folder(self, layout: Layout) -> Path:
        """Where the model is saved that it works on."""
        return layout.teacher if self.options.model == TEACHER else layout.student(self.options.model)


class Neighbours(OfProfile):
    """The systems that stand beside the grid of a setting, in the order of params.yaml."""

    stage = "neighbours"
    neighbours: list[str]


class BudgetCells(Section):
    """What is run at a budget other than that of ``distillation``."""

    tokens: int
    methods: list[str]
    seeds: list[int]


class Comparison(OfProfile, Sparse):
    """What the analyses compare in a setting; methods, students, seeds and tasks in the order of params.yaml.

    ``memberships``: methods of the ablations -> what they extend and change; they were run on ``ablated_students``.
    ``tokens``: what a run of the grid reads; ``budgets``: other numbers of tokens, by name.
    """

    stage = "compare"
    teacher: Teacher
    methods: list[str]
    students: dict[str, Encoder]
    seeds: list[int]
    memberships: dict[str, Membership]
    ablated_students: list[str]
    tasks: list[str]
    finetuning_seeds: list[int]
    batch_sizes: list[int]
    threads: list[int]
    tokens: int
    budgets: dict[str, BudgetCells] = {}
    references: dict[str, Reference] | None = None

    def cells(self) -> list[tuple[str, str, int]]:
        """Method, student and seed of every run of the grid, ablations left out."""
        return [(m, s, seed) for s in self.students for m in self.methods for seed in self.seeds]

    def ablation_cells(self) -> list[tuple[str, str, int]]:
        """Method, student and seed of every run of the ablations."""
        return [
            (m, student, seed) for student in self.ablated_students for m in self.memberships for seed in self.seeds
        ]

    def reference_cells(self) -> list[tuple[str, str, int]]:
        """As :meth:`cells`, of the rows beside the students."""
        return [(name, REFERENCE, 0) for name in self.references or {}]

    def budget_cells(self, budget: str) -> list[tuple[str, str, int]]:
        """Method, student and seed of every run that is trained at one of ``budgets``."""
        cells = self.budgets[budget]
        return [(m, s, seed) for s in self.students for m in cells.methods for seed in cells.seeds]

    def every_cell(self) -> list[tuple[str, str, int, str]]:
        """Method, student, seed and budget of every run of the grid, at the base first; ablations are left out."""
        budgets = {name: self.budget_cells(name) for name in self.budgets}
        return [(*cell, name) for name, cells in ({BASE_BUDGET: self.cells()} | budgets).items() for cell in cells]


def model_name(method: str, student: str, seed: int, budget: str = BASE_BUDGET) -> str:
    """Name of a model's folder and result file: ``<method>_<student>_<seed>``, then the budget if not the base."""
    return TEACHER if method == TEACHER else at_budget(f"{method}_{student}_{seed}", budget)


def at_budget(name: str, budget: str, joint: str = "_") -> str:
    """A name, followed by the budget unless it is the base."""
    return name if budget == BASE_BUDGET else f"{name}{joint}{budget}"


D = TypeVar("D", bound=Description)


def open_description(path: str | Path, kind: type[D]) -> tuple[D, Layout]:
    """A description that ``python -m study plan`` wrote, and where the files of its profile and setting are.

    Args:
        path: ``<folder of the profile>/plan/<stage>/<name>.json``.
        kind: the class of the stage's descriptions.

    Raises:
        StudyError: the file is missing, damaged, or of another stage.
    """
    path = Path(path).resolve()
    try:
        content = path.read_bytes()
    except OSError as error:
        raise StudyError(f"{path}: {error.strerror}; `python -m study plan` writes it") from None
    try:
        description = kind.model_validate_json(content)
    except ValidationError as error:
        raise StudyError(
            f"{path}: no description of stage {kind.stage} ({one_line(error)}); `python -m study plan` writes it anew"
        ) from None
    return description, Layout(path.parents[2], description.setting)


def runs_beside(path: str | Path) -> list[Run]:
    """The runs of the plan in the setting of a run's description, that run among them, by name.

    Raises:
        StudyError: one of them is missing or damaged (:func:`open_description`).
    """
    return _beside(path, Run)


def candidates_beside(path: str | Path) -> list[Run]:
    """What a plan's tuning tries in the setting of one of its descriptions, all methods together.

    Raises:
        StudyError: a description is missing or damaged (:func:`open_description`).
    """
    return [run for tuning in _beside(path, Tuning) for run in tuning.candidates]


def _beside(path: str | Path, kind: type[D]) -> list[D]:
    own, _ = open_description(path, kind)
    files = sorted(Path(path).resolve().parent.glob(f"{own.setting}_*.json"))
    return [other for other, _ in (open_description(file, kind) for file in files) if other.setting == own.setting]


def own_data(description: Description) -> dict[str, Declared]:
    """Texts and tasks of one's own that a description names, by name."""
    if isinstance(description, TaskData):
        return dict(description.declared or {})
    texts = description.texts if isinstance(description, CorpusData) else []
    return {text.label: text for text in texts if isinstance(text, OwnText)}


def with_hashes(description: Description, root: Path) -> Description:
    """The description with what is in the files of texts and tasks of one's own now."""
    declared = own_data(description)
    return description.model_copy(update={"hashes": hashes_of(declared, root)}) if declared else description
