"""params.yaml as one validated model: its sections, and the rules that span them."""

from __future__ import annotations

import re
from collections.abc import Collection, Iterable, Iterator
from itertools import product
from typing import Literal, get_args

from study.declarations import NUMBER_METRICS, OwnTask
from study.families import AS_BERT, FAMILIES
from study.methods import (
    PRUNING,
    TAKEN,
    AttentionDistribution,
    AttentionRelation,
    AttentionScore,
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
from study.neighbours_options import DECODERS, TEACHER, CrIld, MiniEnd, Neighbour, XtremeDistil
from study.sections import (
    BASE_BUDGET,
    OF_NUMBERS,
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
NOT_TRAINED = "is unknown or not trained"


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

    def tuned_variants(self, setting: str) -> list[tuple[str, str]]:
        """Of the setting's ablations, the trained methods and students for which `make tune` chooses a rate.

        A variant's rate stands among those of a student, so that only students with rates of their own are tried.
        """
        ablations = self.grid.ablations.get(setting)
        tuned = set(self.tuning.students.get(setting, []))
        students = [name for name in ablations.students if name in tuned] if ablations else []
        return [
            (method, student)
            for method in self.ablated(setting)
            if isinstance(self.methods[method], Trained) and "learning_rate" not in self.memberships[method].changes
            for student in students
            if self.students[student].learning_rates
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

    def learnt_tasks(self, setting: str) -> list[str]:
        """The setting's tasks that models are fine-tuned on, those that are probes left out."""
        own = self.settings[setting].tasks
        return [t for t in own if t not in PROBES and not self.is_retrieval(t)]

    def is_retrieval(self, task: str) -> bool:
        """Whether a task looks for translations."""
        return task == "retrieval" or (task in self.tasks and self.tasks[task].retrieval)

    def problems(self) -> Iterator[str]:
        """What is wrong between sections; what comes later rests on what comes before it."""
        yield from self._problems_of_names()
        yield from self._problems_of_tasks()
        yield from self._problems_of_seeds()
        grid = self.grid
        for setting in grid.settings:
            yield from self._problems_of_adaptation(setting)
            for student in grid.students[setting]:
                yield from self._problems_of_student(student, setting)
                for method in grid.methods:
                    yield from self._problems_of_method(method, student, setting)
        for setting, students in self.tuning.students.items():
            for student in students:
                yield from self._problems_of_student(student, setting)
        for setting, ablations in grid.ablations.items():
            yield from self._problems_of_ablations(setting, ablations)
        for setting in grid.settings:
            if self.initialisation in PRUNING and (candidates := self.settings[setting].candidates):
                why = f"admission's floor is not pruned; allowed: [] under initialisation = {self.initialisation}"
                yield f"settings.{setting}.candidates = {candidates}: {why}"
        for setting, names in grid.references.items():
            width = self.settings[setting].teacher.width
            for name in names:
                own = self.references[name]
                if isinstance(own, Static) and own.width > width:
                    yield f"references.{name}.width = {own.width}; allowed: at most {width}, as the teacher has"
        for setting, names in grid.neighbours.items():
            yield from self._problems_of_neighbours(names, setting)

    def _problems_of_names(self) -> Iterator[str]:
        grid, trained = self.grid, [name for name, own in self.methods.items() if isinstance(own, Trained)]
        for key in ("settings", "students", "tasks", "methods", "budgets", "references", "neighbours"):
            for name in getattr(self, key):
                if not NAME.fullmatch(name):
                    yield f"{key}: the name {name!r} cannot stand in names of files and stages; allowed: {NAMES}"
        if "reference" in self.students:
            yield "students: 'reference' stands for rows beside the students; allowed: any other name"
        if BASE_BUDGET in self.budgets:
            yield f"budgets.{BASE_BUDGET}: `distillation` itself has this name; allowed: any other name"
        by_setting: list[tuple[str, dict[str, list[str]], Collection[str]]] = [
            ("grid.students", grid.students, self.students),
            ("tuning.students", self.tuning.students, self.students),
            ("grid.budgets", grid.budgets, self.budgets),
            ("grid.references", grid.references, self.references),
            ("grid.neighbours", grid.neighbours, self.neighbours),
        ]
        lists: list[tuple[str, Iterable[str], Collection[str]]] = [
            ("grid.settings", grid.settings, self.settings),
            ("grid.methods", grid.methods, self.methods),
            ("grid.ablations", grid.ablations, self.settings),
            *((key, named, self.settings) for key, named, _ in by_setting),
            *((f"{key}.{setting}", own, known) for key, named, known in by_setting for setting, own in named.items()),
        ]
        for name, budget in self.budgets.items():
            lists.append((f"budgets.{name}.methods", budget.methods or [], grid.methods))
            lists.append((f"budgets.{name}.learning_rates", budget.learning_rates, trained))
        lists.append(("tuning.budgets", self.tuning.budgets, [BASE_BUDGET, *self.budgets]))
        for name, own in grid.ablations.items():
            lists.append((f"grid.ablations.{name}.variants", own.variants, [*self.variants, *self.memberships]))
            lists.append((f"grid.ablations.{name}.students", own.students, self.students))
        for key, names, known in lists:
            yield from _strangers(key, names, known)
        for name, student in self.students.items():
            yield from _strangers(f"students.{name}.learning_rates", student.learning_rates, trained, NOT_TRAINED)
        yield from _strangers("benchmark.methods", self.benchmark.methods, trained, NOT_TRAINED)
        for name, method in self.methods.items():
            if compared := getattr(method, "equal_compute", None):
                yield from _strangers(f"methods.{name}.equal_compute", [compared], trained, NOT_TRAINED)
        asked = [f"grid.budgets.{setting} = {own}" for setting, own in grid.budgets.items() if own]
        if "budgets" in (grid.analyses or ()):
            asked.append(f"grid.analyses = {grid.analyses}")
        if asked and "none" not in grid.methods:
            why = f"lacks 'none', the floor of budgets, which {asked[0]} asks for"
            yield f"grid.methods {why}; allowed: none and any of {', '.join(trained)}"
        for name in self.settings:
            if name in grid.settings and not grid.students.get(name):
                yield f"grid.students.{name} = {grid.students.get(name)}; allowed: at least one student"

    def _problems_of_tasks(self) -> Iterator[str]:
        embedded, budgets = get_args(TaskName), self.finetuning.tasks
        for name, own in self.tasks.items():
            if name in embedded:
                yield f"tasks.{name}: an embedded task has this name; allowed: any other name"
            first, *others = own.languages
            languages = self.task_budget(name).languages
            if languages and (first not in languages or not {*languages} <= {*own.languages}):
                allowed = f"{first} and any of {', '.join(others) or 'no other'}"
                yield f"finetuning.tasks.{name}.languages = {languages}; allowed: {allowed}"
        known = [*embedded, *self.tasks]
        yield from _strangers("finetuning.tasks", budgets, known)
        for setting, chosen in self.settings.items():
            key, beside = f"settings.{setting}.tasks", f"settings.{setting}.candidates"
            for where, name in (*product([key], chosen.tasks), *product([beside], chosen.candidates)):
                for problem in _strangers(where, [name], known):
                    yield f"{problem} (`tasks` declares others)"
                if name in embedded and name not in budgets and setting in self.grid.settings:
                    yield f"{where}: {name!r} has no entry under finetuning.tasks"
            if not self.learnt_tasks(setting):
                yield f"{key} = {chosen.tasks} are probes alone; allowed: at least one task that is learnt"

    def _problems_of_seeds(self) -> Iterator[str]:
        """Rates are chosen on a seed that judges no student; students are set against the floor of their own seed."""
        run = {"grid.seeds": self.grid.seeds}
        named = dict.fromkeys(name for names in self.grid.budgets.values() for name in names)
        run |= {f"budgets.{name}.seeds": self.budgets[name].seeds or [] for name in named}
        for key, seeds in run.items():
            if self.tuning.seed in seeds:
                yield f"tuning.seed = {self.tuning.seed} is one of {key} = {seeds}; allowed: any other seed"
            if others := [seed for seed in seeds if seed not in self.grid.seeds]:
                yield f"{key} = {seeds}: {others[0]} is not in grid.seeds; allowed: some of {self.grid.seeds}"

    def _problems_of_adaptation(self, setting: str) -> Iterator[str]:
        """Of the adaptation of a setting's teacher, unless it is taken with its own head."""
        own, shared = self.settings[setting].adaptation, self.adaptation
        steps, warmup = own.steps or shared.steps, own.warmup_steps
        key = "adaptation" if warmup is None else f"settings.{setting}.adaptation"
        warmup = shared.warmup_steps if warmup is None else warmup
        if warmup >= steps and self.settings[setting].teacher.head != "own":
            where = f"settings.{setting}.adaptation" if own.steps else "adaptation"
            yield f"{key}.warmup_steps = {warmup}: {where}.steps = {steps}; allowed: 0 to {steps - 1}"

    def _problems_of_ablations(self, setting: str, ablations: Ablations) -> Iterator[str]:
        where, grid = f"grid.ablations.{setting}", self.grid
        variants, students = ablations.variants, ablations.students
        if bool(variants) != bool(students):
            yield f"{where}: variants = {variants}, students = {students}; allowed: both, or both []"
        for student in students:
            yield from _strangers(f"{where}.students", [student], grid.students.get(setting, []), "is not in the grid")
            for method in self.ablated(setting):
                if method in grid.methods:
                    yield f"{where}.variants: {method!r} is in grid.methods already; allowed: other methods"
                yield from self._problems_of_method(method, student, setting)
        for method in self.ablated(setting):
            if (base := self.memberships[method].extends) not in grid.methods:
                yield f"{where}.variants: {method!r} extends {base!r}, which is not in grid.methods"

    def _problems_of_neighbours(self, names: list[str], setting: str) -> Iterator[str]:
        learnt, learns = self.learnt_tasks(setting), f"that settings.{setting} learns"
        for name in names:
            own, key = self.neighbours[name], f"neighbours.{name}"
            yield from _strangers(f"{key}.tasks", own.tasks or (), learnt, f"is none {learns}")
            tasks, source = own.tasks or learnt, getattr(own, "source", None)
            if source and (source not in tasks or len(tasks) == 1):
                why = f"has to be one of at least two tasks {learns} and {name} looks at"
                yield f"{key}.source: {source!r} {why}; allowed: {', '.join(tasks)}"
            if source and self._of_numbers(source):
                classes = [task for task in tasks if not self._of_numbers(task)]
                yield f"{key}.source: labels of {source!r} are numbers; allowed: {', '.join(classes) or 'none here'}"
            family = self._family(own.model, setting)
            compared = isinstance(own, CrIld) and "attention" in own.objects
            compared |= isinstance(own, XtremeDistil) and {*own.variants} != {"cls"}
            if compared and family not in AS_BERT:
                allowed = f"a model of {', '.join(AS_BERT)}"
                yield f"{key}.model = {own.model}: {family} has no scores of queries and keys alone; allowed: {allowed}"
            if isinstance(own, MiniEnd) and family not in DECODERS:
                yield f"{key}.model = {own.model}: {family} has no decoder; allowed: a model of {', '.join(DECODERS)}"

    def _of_numbers(self, task: str) -> bool:
        return self.tasks[task].metric in NUMBER_METRICS if task in self.tasks else task in OF_NUMBERS

    def _family(self, model: str, setting: str) -> str:
        """Of the teacher or, by the name of a run, of a student; embedded teachers that are BERT do not say theirs."""
        student = self.students.get(model.split("_")[1]) if model != TEACHER and "_" in model else None
        return (student and student.family) or self.settings[setting].teacher.family or "bert"

    def _problems_of_student(self, name: str, setting: str) -> Iterator[str]:
        student, teacher = self.students[name], self.settings[setting].teacher
        for size in ("layers", "width", "intermediate"):
            own, most, key = getattr(student, size), getattr(teacher, size), f"settings.{setting}.teacher.{size}"
            if own > most:
                yield f"students.{name}.{size} = {own} exceeds {key}; allowed: at most {most}"
        head = student.width // student.heads
        if (student.family or teacher.family) == "modernbert" and head % 2:
            allowed = "an even number, since modernbert rotates pairs"
            yield f"students.{name}: width / heads = {head}; allowed: {allowed}"

    def _problems_of_start(self, name: str, teacher: Teacher, initialisation: str) -> Iterator[str]:
        """Of layers that are taken out of the teacher."""
        own, family = self.students[name], teacher.family or "bert"  # embedded teachers do not say theirs
        key, start = f"students.{name}", f"initialisation {initialisation!r}"
        others = "'teacher-embeddings' and 'random'"
        pruned, left = initialisation in PRUNING, teacher.layers - TAKEN.get(initialisation, 0)
        if own.layers > left:
            why = f"{start} takes its layers from {left} of the teacher's"
            yield f"{key}.layers = {own.layers}: {why}; allowed: at most {left}"
        if own.family and own.family != family:
            yield f"{key}.family = {own.family}: {start} needs the teacher's family, {family}; allowed: {others}"
        if FAMILIES[family].copied is None:
            yield f"{key}: {start} cannot take layers of {family} out of their places; allowed: {others}"
        if pruned and own.width != teacher.width:
            allowed = f"{teacher.width} ('teacher-layers' gives narrower students a start)"
            yield f"{key}.width = {own.width}: {start} keeps the width; allowed: {allowed}"
        fewer = pruned and family != "mpnet"  # whose heads share biases across layers
        if own.heads > teacher.heads or (own.heads < teacher.heads and not fewer):
            needed = f"{'at most ' * fewer}{teacher.heads} heads, as the teacher has"
            yield f"{key}.heads = {own.heads}: {start} needs {needed}"

    def _problems_of_method(self, name: str, student_name: str, setting: str) -> Iterator[str]:
        method, student, teacher = self.methods[name], self.students[student_name], self.settings[setting].teacher
        initialisation = method.initialisation or self.initialisation
        if initialisation in TAKEN or initialisation in PRUNING:
            yield from self._problems_of_start(student_name, teacher, initialisation)
        rated = self.memberships[name].extends if name in self.memberships else name
        if student.learning_rates and isinstance(method, Trained) and rated not in student.learning_rates:
            allowed = "a rate for every method the student is trained with, or none at all (the methods' own)"
            yield f"students.{student_name}.learning_rates: {rated} is missing; allowed: {allowed}"
        key, top = f"methods.{name}", teacher.layers - 1
        for own in parts_of(method):
            if isinstance(own, SentenceEmbedding) and own.distance == "relational":
                yield from self._problems_of_batches(key)
            if isinstance(own, AttentionScore | AttentionDistribution) and student.heads != teacher.heads:
                why = f"{key} compares attention head by head; allowed: {teacher.heads}, as the teacher has"
                yield f"students.{student_name}.heads = {student.heads}: {why}"
            if isinstance(own, AttentionScore | AttentionDistribution):
                of_teacher = teacher.family or "bert"
                for where, family in ((setting, of_teacher), (student_name, student.family or of_teacher)):
                    if family not in AS_BERT:
                        why = f"{where} is {family}, which has no scores of queries and keys alone"
                        yield f"{key}: objective {own.objective}: {why}; allowed: {', '.join(AS_BERT)}"
            if (below := getattr(own, "teacher_layer_from_top", 0)) > top:
                yield f"{key}.teacher_layer_from_top = {below} leaves no teacher layer; allowed: 0 to {top}"
            for width in (teacher.width, student.width) if isinstance(own, AttentionRelation) else ():
                if width % own.relation_heads:
                    widths = f"(teacher {teacher.width}, students.{student_name} {student.width})"
                    why = f"does not divide width {width} {widths}; allowed: a divisor of both"
                    yield f"{key}.relation_heads = {own.relation_heads} {why}"

    def _problems_of_batches(self, method: str) -> Iterator[str]:
        """Similarities within a batch need two sequences, and are others where a batch is accumulated from parts."""
        if (parts := self.distillation.accumulation_steps) > 1:
            why = f"{method} compares the sequences of a batch, which has to be read at once; allowed: 1"
            yield f"distillation.accumulation_steps = {parts}: {why}"
        budgets = {"distillation": self.distillation.batch_size}
        budgets |= {f"budgets.{key}": own.batch_size for key, own in self.budgets.items() if own.batch_size}
        for key, sequences in budgets.items():
            if sequences < 2:
                yield f"{key}.batch_size = {sequences}: {method} needs similarities; allowed: at least 2"


def _strangers(key: str, names: Iterable[str], known: Collection[str], what: str = "is unknown") -> Iterator[str]:
    return (f"{key}: {name!r} {what}; allowed: {', '.join(known)}" for name in names if name not in known)
