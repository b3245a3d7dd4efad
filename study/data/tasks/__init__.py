"""Downstream tasks: labelled texts in splits that share no film, question, passage, article or template."""

from __future__ import annotations

import json
import statistics
from collections import Counter
from collections.abc import Collection, Iterable
from pathlib import Path
from typing import Any

from datasets import Dataset, DatasetDict

from study.data.storage import load, save
from study.data.tasks import commands, context, published, retrieval, topics
from study.data.tasks.own import labels_of, load_own, task_from_json, task_to_json
from study.data.tasks.task import SPLITS as SPLITS
from study.data.tasks.task import Splits, Task
from study.data.tasks.task import subsample as subsample
from study.declarations import check_content
from study.descriptions import TaskData
from study.files import Layout, StudyError, content_hash, find_root, profile_of
from study.records import SCHEMA, TaskSplits
from study.runtime import commit, environment

#: File beside the splits of a task of one's own: all that is known of it.
DECLARED = "task.json"

#: Name in params.yaml -> task, of those that the study brings.
TASKS: dict[str, Task] = {
    task.name: task for family in (published, topics, commands, retrieval, context) for task in family.TASKS
}


def build_tasks(description: TaskData, output: Path) -> list[dict[str, Any]]:
    """Write each task in full to ``output/<name>``, the same bytes at every run, and describe its splits.

    Returns:
        One row per task and split, as :class:`study.records.TaskSplit`: majority_share is that of the commonest label
        (None for regression), label_deviation the standard deviation of the label (None for classification). Both are
        None where there are no labels.

    Raises:
        StudyError: an unknown task, a source that cannot be read, a split without examples, or a folder that cannot be
            written.
    """
    rows = []
    for name in description.tasks:
        own, beside = (description.declared or {}).get(name), {}
        if own:
            root = find_root(Path(output).resolve())
            check_content(f"task {name}", name, own, description.hashes, root)
            task, splits = load_own(name, own, root)
            beside = {DECLARED: json.dumps(task_to_json(task), ensure_ascii=False, indent=1)}
        else:
            task = find_task(Path(output), name)
            splits = task.loader()
        for split in task.splits:
            if not splits.get(split):
                raise StudyError(f"task {name}: split {split!r} has no examples; allowed: at least one")
        data = {split: Dataset.from_list(examples, features=task.features) for split, examples in splits.items()}
        save(DatasetDict(data), Path(output) / name, beside)
        rows += _rows(task, splits)
        sizes = ", ".join(f"{split} {len(examples):,}" for split, examples in splits.items())
        print(f"tasks: {name}: {sizes}", flush=True)
    return rows


def describe_tasks(rows: list[dict[str, Any]], layout: Layout, output: Path) -> TaskSplits:
    """The result file of what :func:`build_tasks` returned and wrote to ``output``."""
    return TaskSplits.model_validate(
        {
            "schema": SCHEMA,
            "profile": profile_of(layout.folder),
            "setting": layout.setting,
            "environment": environment(),
            "commit": commit(layout.folder),
            "hashes": {"tasks": content_hash(Path(output))},
            "splits": rows,
        }
    )


def _rows(task: Task, splits: Splits) -> list[dict[str, Any]]:
    rows = []
    for split, examples in splits.items():
        labels = [label for example in examples for label in labels_of(example)]
        numbers = [label for label in labels if isinstance(label, float)]
        rows.append(
            {
                "task": task.name,
                "split": split,
                "examples": len(examples),
                "metric": task.metric,
                "majority_share": max(Counter(labels).values()) / len(labels)
                if task.labels is not None and labels
                else None,
                "label_deviation": statistics.pstdev(numbers) if numbers else None,
            }
        )
    return rows


def load_task(folder: Path, name: str) -> DatasetDict:
    """A task as :func:`build_tasks` wrote it, held in memory.

    Raises:
        StudyError: an unknown task, or nothing written there.
    """
    return load(Path(folder) / find_task(folder, name).name, "tasks")


def heldout_texts(folder: Path, names: Iterable[str]) -> list[str]:
    """Every text of the development and test splits, first and second of pairs alike, each once, sorted."""
    return task_texts(folder, names, without={"train"})


def task_texts(folder: Path, names: Iterable[str], without: Collection[str] = ()) -> list[str]:
    """Every text of all splits but those ``without``, first and second of pairs alike, each once, sorted."""
    texts: set[str] = set()
    for name in names:
        task = load_task(folder, name)
        for split in (name for name in task if name.partition("-")[0] not in without):
            for column in set(task[split].column_names) - {"label"}:
                texts.update(task[split][column])
    return sorted(texts)


def find_task(folder: Path, name: str) -> Task:
    """A task by name: one that the study brings, or one of one's own that :func:`build_tasks` wrote to the folder.

    Raises:
        StudyError: an unknown task.
    """
    if name in TASKS:
        return TASKS[name]
    written = Path(folder) / name / DECLARED
    if not written.is_file():
        raise StudyError(f"task {name!r} is unknown; allowed: {', '.join(TASKS)}, and tasks of params that were built")
    return task_from_json(json.loads(written.read_bytes()))
