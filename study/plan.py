"""The plan of a study: params.yaml and a profile resolved, once, into one description for each stage.

DVC reruns a stage when its description, its data or its notebook changes. Nothing else in the study resolves a default
or a learning rate, expands a grid, or knows which runs there are.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Collection, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from study.config import Params
from study.declarations import OwnText
from study.descriptions import (
    TEACHER,
    Admission,
    BudgetCells,
    Comparison,
    CorpusData,
    D,
    Description,
    EqualCompute,
    Evaluation,
    LatencyMeasurement,
    LayerComparison,
    Neighbours,
    NeighbourSystem,
    Precision,
    ReferenceModel,
    Run,
    TaskData,
    TeacherAdaptation,
    Tuning,
)
from study.files import DEFAULT_PROFILE, Layout, StudyError, find_root, profile_folder
from study.methods import PRUNING, Method, Trained, Untrained
from study.params import load_params
from study.revisions import revisions
from study.sections import (
    ANALYSES,
    BASE_BUDGET,
    MASKED_WORDS,
    Adaptation,
    AnalysisName,
    Distillation,
    Encoder,
    TaskBudget,
)
from study.teachers import files_hash

#: Families of behaviour that a teacher's stage rests on: its head is its own, or trained.
_OF_HEADS: dict[str | None, tuple[str, ...]] = {
    "own": ("masked_language_modelling", "masking"),
    None: ("head", "masked_language_modelling", "masking", "training"),
}


@dataclass(frozen=True)
class Plan:
    """Every description of a profile, and where its files are."""

    profile: str
    root: Path
    folder: Path
    params: Params
    descriptions: list[Description]

    def of(self, kind: type[D], setting: str | None = None) -> list[D]:
        """The descriptions of one kind, of all settings or of one."""
        return [d for d in self.descriptions if isinstance(d, kind) and setting in (None, d.setting)]

    def analyses(self, setting: str | None = None) -> dict[AnalysisName, str]:
        """What is made of a setting's results (None: of any), in the order of ANALYSES: name -> notebook."""
        grid = self.params.grid
        chosen, without = set(grid.analyses or ANALYSES), set()
        if not any(grid.budgets.values()) and "budgets" not in (grid.analyses or ()):
            without.add("budgets")
        if not any(names for own, names in grid.neighbours.items() if setting in (None, own)):
            without.add("neighbours")
        return {name: own for name, own in ANALYSES.items() if name in chosen - without}

    def layout(self, setting: str) -> Layout:
        """Where the files of a setting are.

        Raises:
            StudyError: the grid does not have the setting.
        """
        known = self.params.grid.settings
        if setting not in known:
            raise StudyError(f"setting {setting!r} is unknown; allowed: {', '.join(known)}")
        return Layout(self.folder, setting)

    def run(self, setting: str, method: str, student: str, seed: int) -> Run:
        """One run, of the grid or not.

        Raises:
            StudyError: an unknown name.
        """
        known: dict[str, Collection[str]] = {
            "setting": self.params.settings,
            "method": self.params.methods,
            "student": self.params.students,
        }
        for key, name in (("setting", setting), ("method", method), ("student", student)):
            if name not in known[key]:
                raise StudyError(f"{key} {name!r} is unknown; allowed: {', '.join(known[key])}")
        return make_run(self.params, setting, method, student, seed)


def resolve(profile: str = DEFAULT_PROFILE, root: Path | None = None) -> Plan:
    """Resolve params.yaml under a profile.

    Raises:
        StudyError: see :func:`study.params.load_params`.
    """
    root = root or find_root()
    params = load_params(profile, root)
    return Plan(profile, root, profile_folder(profile, root), params, list(_descriptions(params, profile, root)))


def make_run(params: Params, setting: str, method: str, student: str, seed: int, budget: str = BASE_BUDGET) -> Run:
    """Everything that decides one student: the method's own options in the place of what all methods share.

    The learning rate is the one that was chosen at the budget, else the one that the student was tuned for, else the
    method's; a variant takes that of the method it extends, unless it changes it.
    """
    options = params.methods[method]
    own = {key: getattr(options, key) for key in ("inputs", "steps") if getattr(options, key, None) is not None}
    compared = getattr(options, "equal_compute", None)
    equal_compute = None
    if compared:
        reference = make_run(params, setting, compared, student, seed, budget)
        equal_compute = EqualCompute(method=compared, objective=reference.objective, steps=reference.distillation.steps)
    return Run(
        setting=setting,
        method=method,
        student=student,
        seed=seed,
        budget=budget,
        objective=_objective(params, method, student, budget),
        sizes=_sizes(params, student),
        initialisation=options.initialisation or params.initialisation,
        distillation=_distillation(params, budget).model_copy(update=own),
        equal_compute=equal_compute,
        masking=params.masking,
        revisions=revisions(*_families(options, params), f"family/{params.settings[setting].teacher.family}"),
        **_precision(params),
    )


def _objective(params: Params, method: str, student: str, budget: str) -> Method:
    options, membership = params.methods[method], params.memberships.get(method)
    resolved = ("initialisation", "inputs", "steps", "equal_compute")  # fields of the run, not of its objective
    update: dict[str, Any] = {key: None for key in resolved if key in type(options).model_fields}
    rated = membership.extends if membership and "learning_rate" not in membership.changes else method
    chosen = params.students[student].learning_rates | params.budget(budget).learning_rates
    if rated in chosen:
        update["learning_rate"] = chosen[rated]
    return options.model_copy(update=update)


def _families(options: Method, params: Params) -> list[str]:
    start = ["start", *["masking", "pruning"] * ((options.initialisation or params.initialisation) in PRUNING)]
    return start if isinstance(options, Untrained) else [options.objective, "masking", *start, "training"]


def _precision(params: Params) -> dict[str, Any]:
    return {key: getattr(params, key) for key in Precision.model_fields}


def _descriptions(params: Params, profile: str, root: Path | None = None) -> Iterator[Description]:
    for setting in params.grid.settings:
        yield from _setting(params, profile, setting, root)


def _setting(params: Params, profile: str, setting: str, root: Path | None) -> Iterator[Description]:
    chosen, grid, precision = params.settings[setting], params.grid, _precision(params)
    tasks: list[str] = [*chosen.tasks]
    examined: list[str] = [*chosen.tasks, *chosen.candidates]
    yield from _prepared(params, setting, examined, root)
    students = {name: _sizes(params, name) for name in grid.students[setting]}
    if chosen.candidates:
        yield Admission(
            setting=setting,
            profile=profile,
            sizes=next(iter(students.values())),
            initialisation=params.initialisation,
            revisions=revisions("admission", "finetuning", "masked_word", "start", *_kinds(params, examined)),
            **_judged(params, setting, examined),
            **precision,
        )
    references = {name: params.references[name] for name in grid.references.get(setting, [])}
    for name, options in references.items():
        family = revisions(f"reference/{options.kind}")
        yield ReferenceModel(setting=setting, reference=name, options=options, revisions=family)
    ablations = grid.ablations.get(setting)
    comparison = Comparison(
        setting=setting,
        profile=profile,
        teacher=chosen.teacher,
        methods=grid.methods,
        students=students,
        seeds=grid.seeds,
        memberships={name: params.memberships[name] for name in params.ablated(setting)},
        ablated_students=ablations.students if ablations else [],
        tasks=tasks,
        finetuning_seeds=params.finetuning.seeds,
        batch_sizes=params.latency.batch_sizes,
        threads=params.latency.threads,
        tokens=_tokens(params),
        budgets={name: _budget_cells(params, name) for name in grid.budgets.get(setting, [])},
        references=references or None,
        revisions={},
    )
    runs = [make_run(params, setting, *cell) for cell in comparison.cells()]
    others = [make_run(params, setting, *cell) for cell in comparison.ablation_cells()]
    at_budgets = [(*cell, name) for name in comparison.budgets for cell in comparison.budget_cells(name)]
    others += [make_run(params, setting, *cell) for cell in at_budgets]
    yield from (*runs, *others)
    yield from _evaluations(params, profile, comparison, at_budgets)
    yield LatencyMeasurement(
        setting=setting,
        profile=profile,
        students=students,
        references=references or None,
        latency=params.latency,
        revisions=revisions("latency"),
        **precision,
    )
    yield LayerComparison(
        setting=setting,
        profile=profile,
        runs=runs,
        representations=params.representations,
        relation_heads=math.gcd(chosen.teacher.heads, *(sizes.width for sizes in students.values())),
        revisions=revisions("representations", "finetuning", *set(_kinds(params, tasks)) - {"masked_word"}),
        **_judged(params, setting),
        **precision,
    )
    yield from _tunings(params, profile, setting)
    yield from _neighbours(params, profile, setting, {run.model for run in (*runs, *others)})
    yield comparison


def _prepared(params: Params, setting: str, examined: list[str], root: Path | None) -> Iterator[Description]:
    """Tasks, corpus and teacher."""
    chosen = params.settings[setting]
    declared = {name: params.tasks[name] for name in examined if name in params.tasks}
    yield TaskData(
        setting=setting,
        tasks=examined,
        declared=declared or None,
        revisions=revisions(
            *("own/task" if name in declared else f"task/{name}" for name in examined), *_kinds(params, [*declared])
        ),
    )
    texts = ["own/text" if isinstance(t, OwnText) else f"text/{t.partition('-')[0]}" for t in chosen.texts]
    own: Literal["own"] | None = "own" if chosen.teacher.head == "own" else None  # all that earlier stages need of it
    yield CorpusData(
        setting=setting,
        teacher=chosen.teacher.model_copy(update={"head": own}),
        vocabulary=chosen.vocabulary,
        texts=[*chosen.texts],
        tasks=examined,
        corpus=params.corpus,
        teacher_files=files_hash(chosen.teacher.name, root),
        revisions=revisions("cleaning", "vocabulary", f"teacher/{chosen.teacher.name}", *texts),
    )
    yield TeacherAdaptation(
        setting=setting,
        adaptation=_adaptation(params, setting),
        masking=params.masking,
        head=own,
        revisions=revisions(*_OF_HEADS[own], f"family/{chosen.teacher.family}"),
        **_precision(params),
    )


def _evaluations(
    params: Params, profile: str, comparison: Comparison, at_budgets: list[tuple[str, str, int, str]]
) -> Iterator[Evaluation]:
    families = ["finetuning", "retrieval", "mlm_score", "size"]
    families += _kinds(params, comparison.tasks)
    cells = [*comparison.reference_cells(), *comparison.cells(), *comparison.ablation_cells()]
    at_base = [(TEACHER, TEACHER, 0), *cells]
    for method, student, seed, budget in [*((*cell, BASE_BUDGET) for cell in at_base), *at_budgets]:
        yield Evaluation(
            setting=comparison.setting,
            profile=profile,
            method=method,
            student=student,
            seed=seed,
            budget=budget,
            masking=params.masking,
            sequence_length=params.latency.sequence_length,
            revisions=revisions(*families),
            **_judged(params, comparison.setting),
            **_precision(params),
        )


def _tunings(params: Params, profile: str, setting: str) -> Iterator[Tuning]:
    budget = params.tuning
    students = budget.students.get(setting, [])
    for at, method, student in itertools.product(budget.budgets, params.grid.methods, students):
        if not isinstance(params.methods[method], Trained):
            continue
        run = make_run(params, setting, method, student, budget.seed, at)
        total = budget.steps or run.distillation.steps
        steps = {"steps": total, "evaluate_every": total}
        distillation = run.distillation.model_copy(update=steps)
        yield Tuning(
            setting=setting,
            profile=profile,
            method=method,
            student=student,
            budget=at,
            candidates=[
                run.model_copy(
                    update={
                        "objective": run.objective.model_copy(update={"learning_rate": rate}),
                        "distillation": distillation,
                    }
                )
                for rate in budget.learning_rates
            ],
            revisions=revisions("finetuning", *_kinds(params, params.settings[setting].tasks)),
            **_judged(params, setting),
            **_precision(params),
        )


def _neighbours(params: Params, profile: str, setting: str, runs: set[str]) -> Iterator[Description]:
    names = params.grid.neighbours.get(setting, [])
    for name in names:
        options = params.neighbours[name]
        if options.model not in (TEACHER, *runs):
            raise StudyError(
                f"neighbours.{name}.model = {options.model!r} is no run of {setting}; allowed: {TEACHER}, or a"
                " student's <method>_<student>_<seed>, then _<budget> if not the base"
            )
        cuts = options.model_dump(include={"train", "development", "test", "max_length"})
        judged = _judged(params, setting, options.tasks or params.learnt_tasks(setting))
        tasks = {task: own.model_copy(update=_least(own, cuts)) for task, own in judged["tasks"].items()}
        yield NeighbourSystem(
            setting=setting,
            profile=profile,
            neighbour=name,
            options=options,
            revisions=revisions(f"neighbour/{options.system}", "finetuning"),
            **judged | {"tasks": tasks},
            **_precision(params),
        )
    if names:
        yield Neighbours(setting=setting, profile=profile, neighbours=names, revisions={})


def _least(budget: TaskBudget, cuts: dict[str, int]) -> dict[str, int]:
    """Of each split the smaller number of examples; None is all."""
    return {split: min(cut, getattr(budget, split) or cut) for split, cut in cuts.items()}


def _kinds(params: Params, tasks: list[str]) -> list[str]:
    """Families of behaviour of tasks that are scored otherwise than by a label."""
    tags = any(name in params.tasks and params.tasks[name].kind == "tokens" for name in tasks)
    return ["masked_word"] * any(name in MASKED_WORDS for name in tasks) + ["tagging"] * tags


def _adaptation(params: Params, setting: str) -> Adaptation:
    chosen = params.settings[setting]
    changes = chosen.adaptation.model_dump()
    if chosen.teacher.head:
        changes["head_only"] = True if chosen.teacher.head == "fit" else None
    return params.adaptation.model_copy(update=changes)


def _distillation(params: Params, budget: str) -> Distillation:
    return params.distillation.model_copy(update=params.budget(budget).changes)


def _tokens(params: Params, budget: str = BASE_BUDGET) -> int:
    distillation = _distillation(params, budget)
    return distillation.steps * distillation.batch_size * params.corpus.sequence_length


def _budget_cells(params: Params, name: str) -> BudgetCells:
    budget, grid = params.budget(name), params.grid
    methods = grid.methods if budget.methods is None else budget.methods
    trained = [method for method in methods if isinstance(params.methods[method], Trained)]
    seeds = grid.seeds if budget.seeds is None else budget.seeds
    return BudgetCells(tokens=_tokens(params, name), methods=trained, seeds=seeds)


def _sizes(params: Params, student: str) -> Encoder:
    return Encoder(**params.students[student].model_dump(exclude={"learning_rates"}))


def _judged(params: Params, setting: str, examined: list[str] | None = None) -> dict[str, Any]:
    names: list[Any] = examined or [*params.settings[setting].tasks]
    tasks = {name: params.task_budget(name) for name in names}
    return {"tasks": tasks, "finetuning": params.finetuning.model_copy(update={"tasks": {}})}
