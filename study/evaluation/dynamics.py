"""A student's layers while it trains: what they lose and gain, step by step."""

from __future__ import annotations

import json
import tempfile
from collections.abc import Callable, Collection, Sequence
from functools import cached_property
from pathlib import Path
from typing import Any

import torch
from datasets import Dataset
from torch import Tensor, nn
from transformers import PreTrainedModel, PreTrainedTokenizerBase, TrainerCallback

from study.data.corpus import load_corpus
from study.data.pretrained import load_model, load_tokenizer
from study.data.tasks import find_task
from study.descriptions import LayerComparison, Run
from study.distillation.distil import distil
from study.distillation.taps import Activations, read_activations
from study.distillation.trainer import digest
from study.evaluation.finetune import linear_probe, splits_without_test
from study.evaluation.masked_word import masked_word_scores
from study.evaluation.provenance import input_hashes, provenance, weights_hash
from study.evaluation.representations import compare_layers
from study.families import keep_layers
from study.files import Layout, StudyError, write_json
from study.methods import Untrained
from study.plan import Plan, make_run
from study.records import write_record
from study.records_beside import DynamicsResult, Snapshot, Watched
from study.runtime import compute_device
from study.sections import BASE_BUDGET, MASKED_WORDS, TaskBudget


class Watcher(TrainerCallback):
    """Calls ``look(step, student)`` before training and after some steps."""

    def __init__(self, steps: Collection[int], look: Callable[[int, PreTrainedModel], None]):
        self.steps, self.look = set(steps), look

    def on_train_begin(self, args, state, control, **kwargs):
        self._look(state.global_step, kwargs["model"])

    def on_step_end(self, args, state, control, **kwargs):
        self._look(state.global_step, kwargs["model"])

    def _look(self, step: int, objective: Any) -> None:
        if step in self.steps:
            self.look(step, objective.student)


class Microscope:
    """Measures of all layers of an encoder; the data that they need are read when they are first needed.

    Args:
        description: of the comparison of layers, with the tasks that are probed.
    """

    def __init__(self, description: LayerComparison, layout: Layout):
        self.description, self.layout = description, layout
        self.seed = description.finetuning.seeds[0]

    @cached_property
    def tokenizer(self) -> PreTrainedTokenizerBase:
        """The teacher's, which is the students', too."""
        return load_tokenizer(self.layout.teacher)

    @cached_property
    def splits(self) -> dict[str, dict[str, Dataset]]:
        """Training and development examples of the tasks that are learnt."""
        return splits_without_test(self.description, self.layout, self.tokenizer, self.seed)

    @cached_property
    def ids(self) -> Tensor:
        """Held-out sequences (N, T) on which layers are compared."""
        rows: Any = load_corpus(self.layout.corpus)["validation"].with_format("torch")["input_ids"][:]
        return torch.as_tensor(rows)[: self.description.representations.sequences].long().to(compute_device())

    @cached_property
    def teacher(self) -> Activations:
        """The teacher's activations on them."""
        teacher = load_model(self.layout.teacher, self.description.attention_implementation, head=False)
        nn.Module.to(teacher, compute_device())
        return self.activations(teacher)

    @torch.inference_mode()
    def activations(self, model: PreTrainedModel) -> Activations:
        """Hidden states, queries, keys and values of all layers on held-out text."""
        layers = range(1, model.config.num_hidden_layers + 1)
        return read_activations(model.eval(), self.ids, hidden_layers=layers, attention_layers=layers)

    def probes(self, folder: Path) -> dict[str, list[float]]:
        """Task -> development score of a probe of each layer, 0 to the last, of the encoder saved in ``folder``.

        Layer i is probed as the last of an encoder that ends with it.
        """
        encoder: Any = load_model(folder, self.description.attention_implementation, head=False)
        scores: dict[str, list[float]] = {name: [] for name in self.description.tasks}
        for depth in reversed(range(encoder.config.num_hidden_layers + 1)):
            keep_layers(encoder, depth)
            with tempfile.TemporaryDirectory() as shortened:
                encoder.save_pretrained(shortened)
                for name, own in scores.items():
                    own.insert(0, round(self._probe(Path(shortened), name), 4))
        return scores

    def _probe(self, folder: Path, name: str) -> float:
        tasks = self.layout.tasks
        if name in MASKED_WORDS:
            by_language = masked_word_scores(self.description, folder, name, tasks, self.tokenizer)
            return sum(own["development"] for own in by_language.values()) / len(by_language)
        task, splits = find_task(tasks, name), self.splits[name]
        return linear_probe(self.description, folder, task, splits, self.tokenizer, self.seed)

    def look(self, run: Run, step: int, student: PreTrainedModel) -> Snapshot:
        """A student as it is; neither its weights nor the state of random generators change."""
        tokens = step * run.distillation.batch_size * self.ids.shape[1]
        was_training, drawn = student.training, torch.get_rng_state()
        with tempfile.TemporaryDirectory() as folder:
            encoder: Any = student.base_model
            encoder.save_pretrained(folder)
            probes = self.probes(Path(folder))
        budget = self.description.representations
        likeness = compare_layers(
            self.activations(student), self.teacher, self.description.relation_heads, budget.relation_sequences
        )
        nn.Module.train(student, was_training)
        torch.set_rng_state(drawn)
        return Snapshot(step=step, tokens=tokens, probes=probes, **likeness)


class Kept:
    """What was seen of teacher and students, in a folder: it is looked at once."""

    def __init__(self, folder: Path, microscope: Microscope):
        self.folder, self.microscope = folder, microscope

    def once(self, file: Path, see: Callable[[], Any]) -> Any:
        """What the file holds, or what is seen now, written to it."""
        if not file.exists():
            file.parent.mkdir(parents=True, exist_ok=True)
            write_json(file, see())
        return json.loads(file.read_bytes())

    def teacher(self) -> dict[str, list[float]]:
        """Task -> score by layer of the teacher."""
        microscope = self.microscope
        return self.once(self.folder / "teacher.json", lambda: microscope.probes(microscope.layout.teacher))

    def end(self, run: Run) -> Snapshot:
        """A student that is trained already."""
        folder = self.microscope.layout.student(run.model)

        def see() -> dict[str, Any]:
            model = load_model(folder, run.attention_implementation)
            nn.Module.to(model, compute_device())
            return self.microscope.look(run, run.distillation.steps, model).model_dump(mode="json")

        return Snapshot.model_validate(self.once(self.folder / f"{weights_hash(folder)}.json", see))


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
    kept = Kept(layout.folder / "scratch" / "dynamics" / digest(place), Microscope(description, layout))
    watched = [_described(run, _trained(run, runs, kept, steps)) for run in runs]
    finished = (make_run(plan.params, setting, method, student, seed, at) for method in methods for at in ends)
    for run in finished:
        if (layout.student(run.model) / "record.json").exists():
            watched.append(_described(run, [kept.end(run)]))
    result = DynamicsResult(
        **provenance(description, layout, hashes),
        student=student,
        seed=seed,
        relation_heads=description.relation_heads,
        teacher=kept.teacher(),
        runs=watched,
    )
    write_record(output, result)
    return result


def _at_most(budget: TaskBudget, examples: int | None) -> TaskBudget:
    fewer = [number for number in (budget.train, examples) if number]
    return budget.model_copy(update={"train": min(fewer, default=None)})


def _trained(run: Run, runs: Sequence[Run], kept: Kept, steps: Sequence[int]) -> list[Snapshot]:
    """What is seen of a run at ``steps`` and at its end, by training it unless all of it was seen before."""
    folder = kept.folder / digest({"run": run.model_dump(mode="json")})
    at = sorted({*(step for step in steps if step < run.distillation.steps), run.distillation.steps})
    files = {step: folder / f"{step}.json" for step in at}

    def look(step: int, model: PreTrainedModel) -> None:
        kept.once(files[step], lambda: kept.microscope.look(run, step, model).model_dump(mode="json"))
        print(f"{run.title} | looked at after step {step}", flush=True)

    if not all(file.exists() for file in files.values()):
        folder.mkdir(parents=True, exist_ok=True)
        distil(run, kept.microscope.layout, folder / "student", runs, [Watcher(files, look)])
    return [Snapshot.model_validate(json.loads(file.read_bytes())) for file in files.values()]


def _described(run: Run, snapshots: list[Snapshot]) -> Watched:
    return Watched(
        method=run.method,
        budget=run.budget,
        options=run.objective.model_dump(mode="json"),
        initialisation=run.initialisation,
        steps=run.distillation.steps,
        snapshots=snapshots,
    )
