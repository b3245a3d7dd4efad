"""The plan of a study: params.yaml and a profile resolved, once, into one description for each stage, and its files.

DVC reruns a stage when its description, its data or its notebook's code changes. Nothing else in the study resolves a
default or a learning rate, expands a grid, or knows which runs there are.
"""

from __future__ import annotations

import difflib
import io
import math
import os
import re
from collections.abc import Collection, Iterable, Iterator
from dataclasses import dataclass
from itertools import product
from pathlib import Path
from typing import Any

from ruamel.yaml import YAML

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
    ReferenceModel,
    Run,
    TaskData,
    TeacherAdaptation,
    Tuning,
    with_hashes,
)
from study.files import DEFAULT_PROFILE, Layout, StudyError, find_root, profile_folder, tuning_folder, write_file
from study.methods import PRUNING, Trained
from study.neighbours_options import NOTEBOOKS
from study.params import load_params
from study.revisions import revisions
from study.sections import ANALYSES, BASE_BUDGET, MASKED_WORDS, AnalysisName, Distillation, Encoder, Reading, TaskBudget
from study.teachers import files_hash

LIST = "plan.yaml"
#: Analysis -> what it reads: its folders in plan/ and in reports/; None: of all others.
READ: dict[str | None, tuple[str, str]] = {None: ("compare", "results"), "neighbours": ("neighbours", "systems")}


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
        systems = [name for own, names in grid.neighbours.items() if setting in (None, own) for name in names]
        without = {
            "budgets": not (any(grid.budgets.values()) or "budgets" in (grid.analyses or ())),
            "neighbours": not systems,
        }
        chosen = grid.analyses or ANALYSES
        return {name: own for name, own in ANALYSES.items() if name in chosen and not without.get(name)}

    def layout(self, setting: str) -> Layout:
        """Where the files of a setting are.

        Raises:
            StudyError: the grid does not have the setting.
        """
        _check_known("setting", setting, self.params.grid.settings)
        return Layout(self.folder, setting)

    def run(self, setting: str, method: str, student: str, seed: int) -> Run:
        """One run, of the grid or not.

        Raises:
            StudyError: an unknown name.
        """
        _check_known("setting", setting, self.params.settings)
        _check_known("method", method, self.params.methods)
        _check_known("student", student, self.params.students)
        return make_run(self.params, setting, method, student, seed)

    def named(self, name: str) -> Run:
        """The grid's run of a name: ``<setting>_<method>_<student>_<seed>``, then the budget if not the base.

        Raises:
            StudyError: there is none; the nearest names are offered.
        """
        runs = {run.name: run for run in self.of(Run)}
        if name not in runs:
            near = difflib.get_close_matches(name, runs, n=3, cutoff=0.4) or list(runs)[:3]
            raise StudyError(f"run {name!r} is none of profile {self.profile}; nearest: {', '.join(near)}")
        return runs[name]


def _check_known(key: str, name: str, known: Collection[str]) -> None:
    if name not in known:
        raise StudyError(f"{key} {name!r} is unknown; allowed: {', '.join(known)}")


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
    method's; a variant takes that of the method it extends, unless it changes it or was tuned itself.
    """
    options, membership = params.methods[method], params.memberships.get(method)
    fields = type(options).model_fields
    own = {key: getattr(options, key) for key in ("inputs", "steps") if getattr(options, key, None) is not None}
    # fields of the run, not of its objective
    update: dict[str, Any] = {k: None for k in ("initialisation", "inputs", "steps", "equal_compute") if k in fields}
    chosen = params.students[student].learning_rates | params.budget(budget).learning_rates
    inherits = membership and "learning_rate" not in membership.changes and method not in chosen
    rated = membership.extends if membership and inherits else method
    if rated in chosen:
        update["learning_rate"] = chosen[rated]
    equal_compute = None
    if compared := getattr(options, "equal_compute", None):
        reference = make_run(params, setting, compared, student, seed, budget)
        equal_compute = EqualCompute(method=compared, objective=reference.objective, steps=reference.distillation.steps)
    start = options.initialisation or params.initialisation
    families = ["start", *["masking", "pruning"] * (start in PRUNING)]
    if isinstance(options, Trained):
        families += [options.objective, "masking", "training"]
    return _describe(
        params,
        Run,
        [*families, f"family/{params.settings[setting].teacher.family}"],
        setting=setting,
        method=method,
        student=student,
        seed=seed,
        budget=budget,
        objective=options.model_copy(update=update),
        sizes=_sizes(params, student),
        initialisation=start,
        distillation=_distillation(params, budget).model_copy(update=own),
        equal_compute=equal_compute,
    )


def _describe(params: Params, kind: type[D], families: Iterable[str], **own: Any) -> D:
    """A description that rests on families of behaviour; what is not given of its fields is as in params.yaml."""
    shared = {key: getattr(params, key) for key in Params.model_fields.keys() & kind.model_fields.keys() - own.keys()}
    return kind(revisions=revisions(*families), **shared, **own)


def _descriptions(params: Params, profile: str, root: Path | None = None) -> Iterator[Description]:
    for setting in params.grid.settings:
        yield from _Setting(params, profile, setting, root).descriptions()


@dataclass(frozen=True)
class _Setting:
    """What makes the descriptions of one setting."""

    params: Params
    profile: str
    name: str
    root: Path | None

    def make(self, kind: type[D], *families: str, **own: Any) -> D:
        """A description of the setting, with the name of the profile where its kind has it."""
        profile = {"profile": self.profile} if "profile" in kind.model_fields else {}
        return _describe(self.params, kind, families, setting=self.name, **profile, **own)

    def descriptions(self) -> Iterator[Description]:
        params, grid, chosen = self.params, self.params.grid, self.params.settings[self.name]
        tasks, examined = chosen.tasks, [*chosen.tasks, *chosen.candidates]
        yield from self.prepared(examined)
        students = {name: _sizes(params, name) for name in grid.students[self.name]}
        if chosen.candidates:
            families = ("admission", "finetuning", "masked_word", "start", *_kinds(params, examined))
            yield self.make(Admission, *families, sizes=next(iter(students.values())), **self.probed(examined))
        references = {name: params.references[name] for name in grid.references.get(self.name, [])}
        for name, options in references.items():
            yield self.make(ReferenceModel, f"reference/{options.kind}", reference=name, options=options)
        ablations = grid.ablations.get(self.name)
        comparison = self.make(
            Comparison,
            teacher=chosen.teacher,
            methods=grid.methods,
            students=students,
            seeds=grid.seeds,
            memberships={name: params.memberships[name] for name in params.ablated(self.name)},
            ablated_students=ablations.students if ablations else [],
            tasks=tasks,
            finetuning_seeds=params.finetuning.seeds,
            batch_sizes=params.latency.batch_sizes,
            threads=params.latency.threads,
            tokens=_tokens(params),
            budgets={name: _budget_cells(params, name) for name in grid.budgets.get(self.name, [])},
            references=references or None,
        )
        at_budgets = [(*cell, name) for name in comparison.budgets for cell in comparison.budget_cells(name)]
        others: list[tuple[Any, ...]] = [*comparison.ablation_cells(), *at_budgets]
        runs = [make_run(params, self.name, *cell) for cell in comparison.cells()]
        beside = [make_run(params, self.name, *cell) for cell in others]
        yield from (*runs, *beside)
        families = ("finetuning", "retrieval", "mlm_score", "size", *_kinds(params, tasks))
        for cell in ((TEACHER, TEACHER, 0), *comparison.reference_cells(), *comparison.cells(), *others):
            model = dict(zip(("method", "student", "seed", "budget"), cell, strict=False))
            length = params.latency.sequence_length
            yield self.make(Evaluation, *families, **model, sequence_length=length, **self.judged(tasks))
        yield self.make(LatencyMeasurement, "latency", students=students, references=references or None)
        yield self.make(
            LayerComparison,
            *("representations", "finetuning", *set(_kinds(params, tasks)) - {"masked_word"}),
            runs=runs,
            relation_heads=math.gcd(chosen.teacher.heads, *(sizes.width for sizes in students.values())),
            seed=params.finetuning.seeds[0],
            **self.probed(tasks),
        )
        yield from self.tunings()
        yield from self.neighbours({run.model for run in (*runs, *beside)})
        yield comparison

    def prepared(self, examined: list[str]) -> Iterator[Description]:
        """Tasks, corpus and teacher."""
        params, chosen, teacher = self.params, self.params.settings[self.name], self.params.settings[self.name].teacher
        declared = {name: params.tasks[name] for name in examined if name in params.tasks}
        kinds = ["own/task" if name in declared else f"task/{name}" for name in examined]
        kinds += _kinds(params, [*declared])
        yield self.make(TaskData, *kinds, tasks=examined, declared=declared or None)
        own = "own" if teacher.head == "own" else None  # all that earlier stages need of it
        yield self.make(
            CorpusData,
            *("cleaning", "vocabulary", f"teacher/{teacher.name}"),
            *("own/text" if isinstance(t, OwnText) else f"text/{t.partition('-')[0]}" for t in chosen.texts),
            teacher=teacher.model_copy(update={"head": own}),
            vocabulary=chosen.vocabulary,
            texts=chosen.texts,
            tasks=examined,
            teacher_files=files_hash(teacher.name, self.root),
        )
        changes = chosen.adaptation.model_dump()
        if teacher.head:
            changes["head_only"] = True if teacher.head == "fit" else None
        yield self.make(
            TeacherAdaptation,
            *("masked_language_modelling", "masking", f"family/{teacher.family}"),
            *(() if own else ("head", "training")),
            adaptation=params.adaptation.model_copy(update=changes),
            head=own,
        )

    def tunings(self) -> Iterator[Tuning]:
        """What is tried: every trained method of the grid, and its variants on students with rates of their own."""
        params, tuning, tasks = self.params, self.params.tuning, self.params.settings[self.name].tasks
        trained = [method for method in params.grid.methods if isinstance(params.methods[method], Trained)]
        cells = list(product(tuning.budgets, trained, tuning.students.get(self.name, [])))
        cells += [(BASE_BUDGET, *cell) for cell in params.tuned_variants(self.name)]
        for budget, method, student in cells:
            run = make_run(params, self.name, method, student, tuning.seed, budget)
            steps = tuning.steps or run.distillation.steps
            distillation = run.distillation.model_copy(update={"steps": steps, "evaluate_every": steps})
            rated = [run.objective.model_copy(update={"learning_rate": rate}) for rate in tuning.learning_rates]
            yield self.make(
                Tuning,
                *("finetuning", *_kinds(params, tasks)),
                method=method,
                student=student,
                budget=budget,
                candidates=[run.model_copy(update={"objective": o, "distillation": distillation}) for o in rated],
                **self.probed(tasks),
            )

    def neighbours(self, runs: set[str]) -> Iterator[Description]:
        """The systems beside the grid, each on the teacher or one of the runs."""
        names = self.params.grid.neighbours.get(self.name, [])
        for name in names:
            options = self.params.neighbours[name]
            if options.model not in (TEACHER, *runs):
                raise StudyError(
                    f"neighbours.{name}.model = {options.model!r} is no run of {self.name}; allowed: {TEACHER}, or a"
                    " student's <method>_<student>_<seed>, then _<budget> if not the base"
                )
            cuts = options.model_dump(include={"train", "development", "test", "max_length"})
            judged = self.judged(options.tasks or self.params.learnt_tasks(self.name))
            judged["tasks"] = {t: own.model_copy(update=_least(own, cuts)) for t, own in judged["tasks"].items()}
            families = (f"neighbour/{options.system}", "finetuning")
            yield self.make(NeighbourSystem, *families, neighbour=name, options=options, **judged)
        if names:
            yield self.make(Neighbours, neighbours=names)

    def judged(self, names: list[str]) -> dict[str, Any]:
        """How models are judged on some tasks."""
        tasks = {name: self.params.task_budget(name) for name in names}
        return {"tasks": tasks, "finetuning": self.params.finetuning.model_copy(update={"tasks": {}})}

    def probed(self, names: list[str]) -> dict[str, Any]:
        """As :meth:`judged`, of models that are not fine-tuned and that look for no translations."""
        own, judged = {key: getattr(self.params.finetuning, key) for key in Reading.model_fields}, self.judged(names)
        unread = {name: None if self.params.is_retrieval(name) else judged["tasks"][name].development for name in names}
        tasks = {t: budget.model_copy(update={"development": unread[t]}) for t, budget in judged["tasks"].items()}
        return {"tasks": tasks, "finetuning": Reading(**own)}


def _least(budget: TaskBudget, cuts: dict[str, int]) -> dict[str, int]:
    """Of each split the smaller number of examples; None is all."""
    return {split: min(cut, getattr(budget, split) or cut) for split, cut in cuts.items()}


def _kinds(params: Params, tasks: list[str]) -> list[str]:
    """Families of behaviour of tasks that are scored otherwise than by a label."""
    tags = any(name in params.tasks and params.tasks[name].kind == "tokens" for name in tasks)
    return ["masked_word"] * any(name in MASKED_WORDS for name in tasks) + ["tagging"] * tags


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


def write_plan(plan: Plan, listed: bool = False) -> int:
    """Write every description to ``plan/<stage>/<name>.json`` of the profile's folder, and the list of them for DVC.

    Files that have their content already are left alone, descriptions that the plan no longer has are deleted, and
    dvc.yaml is linked into the folder of a profile that lacks it.

    Args:
        listed: write descriptions alone, for a list (plan.yaml) that has to be right already.

    Returns:
        The number of descriptions.

    Raises:
        StudyError: the list is not right, dvc.lock belongs to another profile, or a file cannot be written.
    """
    content, path, folder = _list(plan), plan.folder / LIST, plan.folder / "plan"
    if listed and (not path.is_file() or path.read_text() != content):
        raise StudyError(
            f"{path.relative_to(plan.root)} does not list the runs that params.yaml asks for; run"
            f" `python -m study plan {plan.profile}`"
        )
    _check_lock(plan)
    described = [with_hashes(own, plan.root) for own in plan.descriptions]
    files = {folder / d.stage / f"{d.name}.json": d.model_dump_json(indent=1) + "\n" for d in described}
    for file, text in {**files, path: content}.items():
        if not file.is_file() or file.read_text() != text:
            write_file(file, text)
    for file in set(folder.glob("*/*.json")) - files.keys():
        file.unlink()
    link, target = plan.folder / "dvc.yaml", os.path.relpath(plan.root / "dvc.yaml", plan.folder)
    if not link.exists() or link.read_text() == target:  # some unpack a link as a file with its target
        link.unlink(missing_ok=True)
        link.symlink_to(target)
    return len(files)


def _list(plan: Plan) -> str:
    """What dvc.yaml repeats its stages for, as the text of plan.yaml."""
    here = plan.folder.relative_to(plan.root)

    def entry(own: Any, **more: str) -> dict[str, str]:
        return {"setting": own.setting, **more}

    def model(own: Evaluation | NeighbourSystem) -> str:
        layout = Layout(here, own.setting)
        return own.folder(layout).relative_to(layout.runs).as_posix()

    rates = os.path.relpath(tuning_folder(plan.folder, plan.root), plan.folder)
    values = {
        "profile": plan.profile,
        "here": here.as_posix(),
        "root": os.path.relpath(plan.root, plan.folder),
        "prepared": list(plan.params.grid.settings),
        "admitted": [admission.setting for admission in plan.of(Admission)],
        "referenced": {own.name: entry(own, model=own.model) for own in plan.of(ReferenceModel)},
        "distilled": {own.name: entry(own, model=own.model) for own in plan.of(Run)},
        "evaluated": {own.name: entry(own, model=own.model, folder=model(own)) for own in plan.of(Evaluation)},
        "analyses": {
            f"{analysis}_{setting}": {"analysis": analysis, "setting": setting, "notebook": notebook}
            | dict(zip(("plan", "results"), READ.get(analysis, READ[None]), strict=True))
            | {"beside": f"reports/results/{setting}" if analysis == "neighbours" else rates}
            for setting in (comparison.setting for comparison in plan.of(Comparison))
            for analysis, notebook in plan.analyses(setting).items()
        },
        "systems": {
            own.name: entry(own, name=own.neighbour, notebook=NOTEBOOKS[own.options.system], model=model(own))
            for own in plan.of(NeighbourSystem)
        },
    }
    yaml: Any = YAML(typ="safe")
    stream = io.StringIO()
    yaml.sort_base_mapping_type_on_output, yaml.width = False, 200
    yaml.dump(values, stream)
    written = f"`python -m study plan {plan.profile}` writes it"
    return f"# What dvc.yaml repeats its stages for; {written}.\n{stream.getvalue()}"


def _check_lock(plan: Plan) -> None:
    lock = plan.folder / "dvc.lock"
    stated = lock.is_file() and re.search(r"study plan --listed ([\w.-]+)", " ".join(lock.read_text().split()))
    if stated and stated[1] != plan.profile:
        raise StudyError(
            f"{lock.relative_to(plan.root)} belongs to profile {stated[1]!r}; allowed: that of {plan.profile!r} (delete"
            " it to run everything anew)"
        )
