"""params.yaml as one validated model: its sections, and the rules that span them."""

from __future__ import annotations

import re
from collections.abc import Collection, Iterable
from typing import Literal, get_args

from pydantic import model_validator

from study.declarations import OwnTask
from study.families import FAMILIES
from study.methods import (
    PRUNING,
    TAKEN,
    AttentionDistribution,
    AttentionRelation,
    AttentionScore,
    DirectAttention,
    FastPath,
    Initialisation,
    Membership,
    Method,
    Reference,
    Section,
    SentenceEmbedding,
    Static,
    TaskName,
    Trained,
    Variant,
    parts_of,
)
from study.neighbours_options import Neighbour
from study.sections import (
    BASE_BUDGET,
    PROBES,
    Ablations,
    Adaptation,
    Benchmark,
    Budget,
    Corpus,
    Distillation,
    Finetuning,
    Grid,
    Latency,
    Masking,
    Representations,
    Runtimes,
    Setting,
    Student,
    TaskBudget,
    Teacher,
    Tuning,
)

#: What names of settings, students, methods and budgets are made of: no underscore, which joins them in names of files.
NAME, NAMES = re.compile(r"[A-Za-z0-9][A-Za-z0-9.+-]*"), "a letter or digit, then letters, digits and . + -"


class Params(Section):
    """All of params.yaml with a profile laid over it. Rules that span sections are checked here.

    ``methods`` holds those that ``variants`` make, too; ``memberships`` says which these are (:mod:`study.params`).
    """

    precision: Literal["auto", "bf16", "fp32"]
    attention_implementation: Literal["eager", "sdpa"]
    fast_paths: list[FastPath]
    grid: Grid
    settings: dict[str, Setting]
    tasks: dict[str, OwnTask] = {}
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
    references: dict[str, Reference] = {}
    neighbours: dict[str, Neighbour] = {}
    finetuning: Finetuning
    latency: Latency
    runtimes: Runtimes
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

    def task_budget(self, name: str) -> TaskBudget:
        """What is used of a task; of one's own that has no entry, everything in all its languages."""
        own, budget = self.tasks.get(name), self.finetuning.tasks.get(name)
        if own is None:
            return self.finetuning.tasks[name]
        if budget is None:
            budget = TaskBudget(train=None, development=None, test=None, max_length=128)
        return budget if "languages" in budget.model_fields_set else budget.model_copy(
            update={"languages": list(own.languages)})  # fmt: skip

    @model_validator(mode="after")
    def _sections_agree(self):
        self._names_are_plain()
        self._names_are_known()
        self._tasks_are_known()
        for name in self.grid.settings:
            for student in self.grid.students[name]:
                self._student_fits(student, self.settings[name].teacher, f"settings.{name}.teacher")
                for method in self.grid.methods:
                    self._method_fits(method, student, self.settings[name].teacher)
        for name, students in self.tuning.students.items():
            for student in students:
                self._student_fits(student, self.settings[name].teacher, f"settings.{name}.teacher")
        for name, ablations in self.grid.ablations.items():
            self._ablations_fit(name, ablations)
        for setting in self.grid.settings:
            if self.initialisation in PRUNING and self.settings[setting].candidates:
                raise ValueError(
                    f"settings.{setting}.candidates = {self.settings[setting].candidates}: admission's floor is not"
                    f" pruned; allowed: [] under initialisation = {self.initialisation}"
                )
        for setting, names in self.grid.references.items():
            self._references_fit(names, self.settings[setting].teacher.width)
        for setting, names in self.grid.neighbours.items():
            self._neighbours_fit(names, setting)
        return self

    def _references_fit(self, names: list[str], width: int) -> None:
        for name in names:
            own = self.references[name]
            if isinstance(own, Static) and own.width > width:
                raise ValueError(f"references.{name}.width = {own.width}; allowed: at most {width}, as the teacher has")

    def _neighbours_fit(self, names: list[str], setting: str) -> None:
        learnt = self.learnt_tasks(setting)
        for name in names:
            own = self.neighbours[name]
            for task in own.tasks or ():
                if task not in learnt:
                    raise ValueError(
                        f"neighbours.{name}.tasks: {task!r} is none that settings.{setting} learns;"
                        f" allowed: {', '.join(learnt)}"
                    )
            tasks, source = own.tasks or learnt, getattr(own, "source", None)
            if source and (source not in tasks or len(tasks) == 1):
                raise ValueError(
                    f"neighbours.{name}.source: {source!r} has to be one of at least two tasks that settings.{setting}"
                    f" learns and {name} looks at; allowed: {', '.join(tasks)}"
                )

    def learnt_tasks(self, setting: str) -> list[str]:
        """The setting's tasks that models are fine-tuned on, those that are probes left out."""
        own = self.settings[setting].tasks
        return [t for t in own if not (t in PROBES or (t in self.tasks and self.tasks[t].retrieval))]

    def _names_are_plain(self) -> None:
        named: dict[str, Iterable[str]] = {"settings": self.settings, "students": self.students}
        named |= {"tasks": self.tasks, "methods": self.methods, "budgets": self.budgets, "references": self.references}
        named |= {"neighbours": self.neighbours}
        for key, names in named.items():
            for name in names:
                if not NAME.fullmatch(name):
                    raise ValueError(
                        f"{key}: the name {name!r} cannot stand in names of files and stages; allowed: {NAMES}"
                    )
        if "reference" in self.students:
            raise ValueError("students: 'reference' stands for rows beside the students; allowed: any other name")

    def _names_are_known(self) -> None:
        grid, trained = self.grid, [name for name, own in self.methods.items() if isinstance(own, Trained)]
        lists: list[tuple[str, Iterable[str], Collection[str]]] = [
            ("grid.settings", grid.settings, self.settings),
            ("grid.methods", grid.methods, self.methods),
            ("grid.students", grid.students, self.settings),
            ("grid.ablations", grid.ablations, self.settings),
            ("grid.budgets", grid.budgets, self.settings),
            ("grid.references", grid.references, self.settings),
            ("grid.neighbours", grid.neighbours, self.settings),
            ("tuning.students", self.tuning.students, self.settings),
        ]
        for key, by_setting in (("grid.students", grid.students), ("tuning.students", self.tuning.students)):
            lists += [(f"{key}.{name}", own, self.students) for name, own in by_setting.items()]
        lists += [(f"grid.budgets.{name}", own, self.budgets) for name, own in grid.budgets.items()]
        lists += [(f"grid.references.{name}", own, self.references) for name, own in grid.references.items()]
        lists += [(f"grid.neighbours.{name}", own, self.neighbours) for name, own in grid.neighbours.items()]
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
            if name in grid.settings and not grid.students.get(name):
                raise ValueError(f"grid.students.{name} = {grid.students.get(name)}; allowed: at least one student")

    def _tasks_are_known(self) -> None:
        embedded = get_args(TaskName)
        for name, own in self.tasks.items():
            if name in embedded:
                raise ValueError(f"tasks.{name}: an embedded task has this name; allowed: any other name")
            for language in (languages := self.task_budget(name).languages):
                if language not in own.languages or own.languages[0] not in languages:
                    raise ValueError(
                        f"finetuning.tasks.{name}.languages = {languages}; allowed: {own.languages[0]} and any of"
                        f" {', '.join(own.languages[1:]) or 'no other'}"
                    )
        allowed = ", ".join([*embedded, *self.tasks])
        for name in self.finetuning.tasks:
            if name not in embedded and name not in self.tasks:
                raise ValueError(f"finetuning.tasks: {name!r} is unknown; allowed: {allowed}")
        for setting, chosen in self.settings.items():
            for name in (*chosen.tasks, *chosen.candidates):
                if name not in embedded and name not in self.tasks:
                    raise ValueError(
                        f"settings.{setting}.tasks: {name!r} is unknown; allowed: {allowed} (`tasks` declares others)"
                    )
                if name in embedded and name not in self.finetuning.tasks and setting in self.grid.settings:
                    raise ValueError(f"settings.{setting}.tasks: {name!r} has no entry under finetuning.tasks")
            if not self.learnt_tasks(setting):
                raise ValueError(
                    f"settings.{setting}.tasks = {chosen.tasks} are probes alone;"
                    " allowed: at least one task that is learnt"
                )

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
        head = student.width // student.heads
        if (student.family or teacher.family) == "modernbert" and head % 2:
            raise ValueError(
                f"students.{name}: width / heads = {head}; allowed: an even number, since modernbert rotates pairs"
            )

    def _layers_fit(self, name: str, teacher: Teacher, initialisation: str) -> None:
        student, family = self.students[name], teacher.family or "bert"  # embedded teachers do not say theirs
        left = teacher.layers - TAKEN.get(initialisation, 0)
        if student.layers > left:
            raise ValueError(
                f"students.{name}.layers = {student.layers}: initialisation {initialisation!r} takes its layers from"
                f" {left} of the teacher's; allowed: at most {left}"
            )
        others = "'teacher-embeddings' and 'random'"
        if student.family and student.family != family:
            raise ValueError(
                f"students.{name}.family = {student.family}: initialisation {initialisation!r} needs the teacher's"
                f" family, {family}; allowed: {others}"
            )
        if FAMILIES[family].copied is None:
            raise ValueError(
                f"students.{name}: initialisation {initialisation!r} cannot take layers of {family} out of their"
                f" places; allowed: {others}"
            )
        if initialisation in PRUNING and student.width != teacher.width:
            raise ValueError(
                f"students.{name}.width = {student.width}: initialisation {initialisation!r} keeps the width;"
                f" allowed: {teacher.width} ('teacher-layers' gives narrower students a start)"
            )
        prunes_heads = initialisation in PRUNING and family != "mpnet"  # whose heads share biases across layers
        if student.heads > teacher.heads or (student.heads < teacher.heads and not prunes_heads):
            raise ValueError(
                f"students.{name}.heads = {student.heads}: initialisation {initialisation!r} needs"
                f" {'at most ' * prunes_heads}{teacher.heads} heads, as the teacher has"
            )

    def _method_fits(self, name: str, student_name: str, teacher: Teacher) -> None:
        method, student = self.methods[name], self.students[student_name]
        initialisation = method.initialisation or self.initialisation
        if initialisation in TAKEN or initialisation in PRUNING:
            self._layers_fit(student_name, teacher, initialisation)
        rated = self.memberships[name].extends if name in self.memberships else name
        if student.learning_rates and isinstance(method, Trained) and rated not in student.learning_rates:
            raise ValueError(
                f"students.{student_name}.learning_rates: {rated} is missing; allowed: a rate for every method the"
                " student is trained with, or none at all (the methods' own)"
            )
        for own in parts_of(method):
            self._objective_fits(name, own, student_name, teacher)

    def _objective_fits(self, name: str, method: Method, student_name: str, teacher: Teacher) -> None:
        student = self.students[student_name]
        if isinstance(method, SentenceEmbedding) and method.distance == "relational":
            self._batch_has_pairs(name)
        if isinstance(method, AttentionScore | AttentionDistribution) and student.heads != teacher.heads:
            raise ValueError(
                f"students.{student_name}.heads = {student.heads}: methods.{name} compares attention head by head;"
                f" allowed: {teacher.heads}, as the teacher has"
            )
        layered = (AttentionRelation, DirectAttention, AttentionDistribution)
        if isinstance(method, layered) and method.teacher_layer_from_top >= teacher.layers:
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

    def _batch_has_pairs(self, name: str) -> None:
        """Similarities within a batch need two sequences, and are others where a batch is accumulated from parts."""
        if self.distillation.accumulation_steps > 1:
            raise ValueError(
                f"distillation.accumulation_steps = {self.distillation.accumulation_steps}: methods.{name} compares the"
                " sequences of a batch, which has to be read at once; allowed: 1"
            )
        budgets = {"distillation": self.distillation.batch_size}
        budgets |= {f"budgets.{key}": own.batch_size for key, own in self.budgets.items() if own.batch_size}
        for key, sequences in budgets.items():
            if sequences < 2:
                raise ValueError(
                    f"{key}.batch_size = {sequences}: methods.{name} needs similarities; allowed: at least 2"
                )
