"""A student's layers while it trains: what they lose and gain, step by step."""

from __future__ import annotations

import json
from collections.abc import Callable, Collection, Sequence
from functools import partial
from pathlib import Path

from transformers import PreTrainedModel, TrainerCallback

from study.data.pretrained import load_model
from study.descriptions import LayerComparison, Run
from study.distillation.distil import distil
from study.distillation.trainer import digest
from study.evaluation.provenance import input_hashes, provenance, weights_hash
from study.evaluation.representations import Microscope
from study.files import StudyError, write_json
from study.methods import Untrained
from study.plan import Plan, make_run
from study.records import write_record
from study.records_beside import DynamicsResult, Snapshot, Watched
from study.sections import BASE_BUDGET, TaskBudget


class Watcher(TrainerCallback):
    """Calls ``look(step, student)`` before training and after some steps."""

    def __init__(self, steps: Collection[int], look: Callable[[int, PreTrainedModel], None]):
        self.steps, self.look = set(steps), look

    def on_step_end(self, args, state, control, **kwargs):
        if state.global_step in self.steps:
            self.look(state.global_step, kwargs["model"].student)

    on_train_begin = on_step_end


def _seen(file: Path, microscope: Microscope, run: Run, step: int, student: Callable[[], PreTrainedModel]) -> Snapshot:
    """A student that is looked at once: what the file holds, or what is seen now, written to it."""
    if not file.exists():
        write_json(file, microscope.look(run, step, student()).model_dump(mode="json"))
    return Snapshot.model_validate_json(file.read_bytes())


def watch(
    plan: Plan,
    setting: str,
    methods: Sequence[str],
    student: str,
    output: Path,
    tasks: Sequence[str],
    steps: Sequence[int],
    seed: int = 1,
    budget: str = BASE_BUDGET,
    ends: Sequence[str] = (),
    examples: int | None = None,
) -> DynamicsResult:
    """Train one student by each method, look at all its layers on the way, and write the result file.

    Looked at, at each of ``steps`` (the last step is added): linear CKA and divergence of attention relations of every
    layer with every layer of the teacher, on held-out text (:func:`study.evaluation.representations.compare_layers`),
    and probes of every layer on development data. What was seen is kept in scratch: a run that was killed continues.

    Source: this study's choice.

    Args:
        methods: names under ``methods`` or ``variants``. budget: name of a budget, or ``base``.
        ends: other budgets, whose students are looked at where they are trained already.
        examples: that a probe learns from, at most; None: as the params say.

    Raises:
        StudyError: an unknown name, a task that the setting does not have, a missing teacher, corpus or task.
    """
    layout = plan.layout(setting)
    (description,) = plan.of(LayerComparison, setting)
    for name in tasks:
        if name not in description.tasks:
            raise StudyError(f"task {name!r} is not one of setting {setting}; allowed: {', '.join(description.tasks)}")
    for name in methods:
        plan.run(setting, name, student, seed)  # an unknown name is told before any work
        if isinstance(plan.params.methods[name], Untrained):
            raise StudyError(f"method {name!r} trains nothing; allowed: a method that trains")
    for name in (budget, *ends):
        if name not in (BASE_BUDGET, *plan.params.budgets):
            raise StudyError(f"budget {name!r} is unknown; allowed: {', '.join((BASE_BUDGET, *plan.params.budgets))}")
    chosen = {name: _at_most(description.tasks[name], examples) for name in tasks}
    description = description.model_copy(update={"tasks": chosen})
    runs = [make_run(plan.params, setting, method, student, seed, budget) for method in methods]
    hashes = input_hashes(layout)
    place = {"probed": {name: own.model_dump(mode="json") for name, own in chosen.items()}, "inputs": hashes}
    folder, microscope = layout.folder / "scratch" / "dynamics" / digest(place), Microscope(description, layout)
    watched = [_described(run, _trained(run, runs, folder, microscope, steps)) for run in runs]
    finished = (make_run(plan.params, setting, method, student, seed, at) for method in methods for at in ends)
    for run in finished:
        if ((trained := layout.student(run.model)) / "record.json").exists():
            model = partial(load_model, trained, run.attention_implementation)
            file = folder / f"{weights_hash(trained)}.json"
            watched.append(_described(run, [_seen(file, microscope, run, run.distillation.steps, model)]))
    if not (of_teacher := folder / "teacher.json").exists():
        write_json(of_teacher, microscope.probes(layout.teacher))
    result = DynamicsResult(
        **provenance(description, layout, hashes),
        student=student,
        seed=seed,
        relation_heads=description.relation_heads,
        teacher=json.loads(of_teacher.read_bytes()),
        runs=watched,
    )
    write_record(output, result)
    return result


def _at_most(budget: TaskBudget, examples: int | None) -> TaskBudget:
    fewer = [number for number in (budget.train, examples) if number]
    return budget.model_copy(update={"train": min(fewer, default=None)})


def _trained(
    run: Run, runs: Sequence[Run], folder: Path, microscope: Microscope, steps: Sequence[int]
) -> list[Snapshot]:
    """What is seen of a run at ``steps`` and at its end, by training it unless all of it was seen before."""
    folder = folder / digest({"run": run.model_dump(mode="json")})
    at = sorted({*(step for step in steps if step < run.distillation.steps), run.distillation.steps})
    files = {step: folder / f"{step}.json" for step in at}

    def look(step: int, model: PreTrainedModel) -> None:
        _seen(files[step], microscope, run, step, lambda: model)
        print(f"{run.title} | looked at after step {step}", flush=True)

    if not all(file.exists() for file in files.values()):
        folder.mkdir(parents=True, exist_ok=True)
        distil(run, microscope.layout, folder / "student", runs, [Watcher(files, look)])
    return [Snapshot.model_validate_json(file.read_bytes()) for file in files.values()]


def _described(run: Run, snapshots: list[Snapshot]) -> Watched:
    return Watched(
        method=run.method,
        budget=run.budget,
        options=run.objective.model_dump(mode="json"),
        initialisation=run.initialisation,
        steps=run.distillation.steps,
        snapshots=snapshots,
    )
