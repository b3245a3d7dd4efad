"""Tasks of one's own, as params.yaml declares them."""

from __future__ import annotations

import math
import re
from collections.abc import Iterator
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

from datasets import ClassLabel, Features

from study.data.rows import Row, cell, dataset_features, dataset_rows, file_features, file_rows, text_in
from study.data.strings import collapse
from study.data.tasks.task import Example, Splits, Task, fraction
from study.declarations import (
    CLASS_METRICS,
    DEVELOPMENT_SHARE,
    NUMBER_METRICS,
    TAG_METRICS,
    OwnTask,
    format_of,
    matching,
)
from study.files import StudyError


def load_own(name: str, declared: OwnTask, root: Path) -> tuple[Task, Splits]:
    """A task and its examples. Rows without a label or without any text are left out, and counted.

    Names of classes are those that the data say (``ClassLabel``) or ``labels``; else those that occur in training, in
    their order. Development data that are not declared, or as a share, are taken from training by a hash of the text,
    so that equal texts stay together; so are the halves of a split that is both development and test.

    Raises:
        StudyError: something cannot be read; a missing column; a label that training lacks; a split without labels.
    """
    names, splits = _names(declared, root), {}
    for split, part in split_parts(declared).items():
        splits[split] = list(_examples(name, declared, split, part, names, root))
    if not declared.retrieval:
        _share(declared, splits)
    labels = None if declared.retrieval else _labels(name, declared, splits, names)
    task = _task(name, declared, labels)
    ordered = {split: splits[split] for split in task.splits}
    learnt = {_key(example) for example in splits.get("train", ())}
    shared = sum(_key(example) in learnt for split, rows in ordered.items() if split != "train" for example in rows)
    if shared:
        print(f"tasks: {name}: {shared:,} examples of development and test are in the training data, too", flush=True)
    return task, ordered


def task_to_json(task: Task) -> dict[str, Any]:
    """What :func:`task_from_json` needs to make the same task without its examples."""
    return {key: value for key, value in asdict(replace(task, loader=dict)).items() if key != "loader"}


def task_from_json(content: dict[str, Any]) -> Task:
    """The task that :func:`task_to_json` was given, its lists as tuples, without a loader of examples."""
    lists: dict[str, Any] = {key: tuple(value) if isinstance(value, list) else value for key, value in content.items()}
    return Task(loader=dict, **lists)


def features_of(declared: OwnTask, part: str, root: Path) -> Features | None:
    """What is known of the columns of a split without its rows."""
    if declared.dataset:
        return dataset_features(declared, part, root)
    return file_features(matching(part, root)[0])


def rows_of(declared: OwnTask, part: str, root: Path) -> Iterator[Row]:
    """The rows of a split as they are."""
    if declared.dataset:
        yield from dataset_rows(declared, part, root, whole=True)
        return
    for file in matching(part, root):
        if format_of(file) == ".txt":
            raise StudyError(f"{file} is plain text; allowed: .csv, .tsv, .jsonl, .parquet, whose columns have names")
        yield from file_rows(file)


def split_parts(declared: OwnTask) -> dict[str, str]:
    """Name of a split -> where it is, of those that are declared by a place of their own."""
    own, first = declared.parts, declared.languages[0]
    parts = {split: part for split in ("train", "development") if isinstance(part := getattr(own, split), str)}
    return parts | {"test" if language == first else f"test-{language}": at for language, at in declared.tests.items()}


def _names(declared: OwnTask, root: Path) -> list[str] | None:
    """Names of classes that the data say."""
    if declared.retrieval or declared.metric in NUMBER_METRICS:
        return None
    features = features_of(declared, declared.parts.train or "", root)
    column = features.get(declared.label) if features else None
    if declared.kind == "tokens":
        column = getattr(column, "feature", None)
    return list(column.names) if isinstance(column, ClassLabel) else None


def _examples(
    name: str, declared: OwnTask, split: str, part: str, names: list[str] | None, root: Path
) -> Iterator[Example]:
    columns = {"text": declared.text} | ({"text_pair": declared.text_pair} if declared.text_pair else {})
    left_out = kept = unlabelled = 0
    where = f"task {name}: {part}"
    for row in rows_of(declared, part, root):
        texts: Example
        label: str | float | list[str] | None
        if declared.kind == "tokens":
            texts, label = _tagged(row, declared, names, where)
        else:
            texts = {key: collapse(text_in(row, column, where)) for key, column in columns.items()}
            label = None if declared.retrieval else _label(cell(row, declared.label, where), declared, names, where)
        unlabelled += label is not None and str(row[declared.label]).partition(".")[0] == "-1"
        missing = not all(texts.values()) if declared.retrieval else label is None or not any(texts.values())
        left_out += missing
        if not missing:
            kept += 1
            yield texts if label is None else {**texts, "label": label}
    if left_out + kept and unlabelled == kept and not declared.retrieval:
        raise StudyError(
            f"task {name}: {split}: {part} has no labels (all are empty or -1); allowed: a split with labels"
            " (where those of test are not public, name the development split for both, which halves it)"
        )
    if left_out:
        print(f"tasks: {name}: {split}: {left_out:,} rows without text or label left out", flush=True)


def _tagged(row: Row, declared: OwnTask, names: list[str] | None, where: str) -> tuple[Example, list[str] | None]:
    """The words of a row, set off by blanks, and their tags; None where there are no words."""
    words, tags = (cell(row, column, where) for column in (declared.text, declared.label))
    for column, value in ((declared.text, words), (declared.label, tags)):
        if not isinstance(value, list | None):
            raise StudyError(f"{where}: {column} = {str(value)[:40]!r} is no list; allowed: a list, of each word one")
    words, tags = words or [], tags or []
    if len(words) != len(tags):
        raise StudyError(
            f"{where}: {declared.text} has {len(words)} words and {declared.label} {len(tags)} tags"
            f" ({' '.join(map(str, words))[:40]!r}); allowed: as many of both"
        )
    told = [_label(tag, declared, names, where) for tag in tags]
    for word, tag in zip(words, told, strict=True):
        if not isinstance(word, str) or not isinstance(tag, str):
            raise StudyError(f"{where}: the word {word!r} has the tag {tag!r}; allowed: text, and a tag for every word")
        if declared.metric == "entity_f1" and tag != "O" and not re.fullmatch("[BIELSU]-.+", tag):
            raise StudyError(
                f"{where}: the tag {tag!r} is of no entity; allowed: O, B-... and I-..., or metric accuracy"
            )
    kept = ["".join(word.split()) or "\ufffd" for word in words]
    return {"text": " ".join(kept)}, [str(tag) for tag in told] or None


def labels_of(example: Example) -> list[str | float]:
    """The label of an example, or those of its words; none where there is none."""
    label = example.get("label", [])
    return [*label] if isinstance(label, list) else [label]


def _label(value: Any, declared: OwnTask, names: list[str] | None, where: str) -> str | float | None:
    """The label of a row; None where it has none."""
    if value is None or value == "":
        return None
    if declared.metric in NUMBER_METRICS:
        try:
            number = float(value)
        except (TypeError, ValueError):
            number = math.nan
        if not math.isfinite(number):
            raise StudyError(f"{where}: {declared.label} = {value!r} is no number; {declared.metric} needs numbers")
        return number
    if names and isinstance(value, int) and not isinstance(value, bool):
        return names[value] if 0 <= value < len(names) else None
    return collapse(str(value))


def _share(declared: OwnTask, splits: Splits) -> None:
    """Put the development split beside the others, where it is a part of one of them."""
    own, first = declared.parts, declared.tests[declared.languages[0]]
    if isinstance(own.development, str) and own.development != first:
        return
    shared, size = "train", own.development or DEVELOPMENT_SHARE
    if isinstance(size, str):
        shared, size = "test", 0.5
    drawn = [fraction(_key(example)) for example in splits[shared]]
    last = sorted(drawn)[max(round(size * len(drawn)), 1) - 1] if drawn else 0.0
    splits["development"] = [row for own, row in zip(drawn, splits[shared], strict=True) if own <= last]
    splits[shared] = [row for own, row in zip(drawn, splits[shared], strict=True) if own > last]


def _key(example: Example) -> str:
    return "\n".join(str(example.get(column, "")) for column in ("text", "text_pair"))


def _labels(name: str, declared: OwnTask, splits: Splits, names: list[str] | None) -> tuple[str, ...] | None:
    if declared.metric in NUMBER_METRICS:
        return None
    occurring = {split: {str(label) for row in rows for label in labels_of(row)} for split, rows in splits.items()}
    learnt = sorted(occurring["train"], key=_order)
    labels = declared.labels or names or learnt
    if len(learnt) < 2:
        raise StudyError(f"task {name}: train has the labels {', '.join(learnt) or 'none'}; allowed: at least two")
    for split, found in occurring.items():
        for label in sorted(found - set(labels)):
            raise StudyError(f"task {name}: {split} has the label {label!r}; allowed: {', '.join(labels[:20])}")
        for label in sorted(found - set(learnt)):
            raise StudyError(f"task {name}: {split} has the label {label!r}, which train lacks; allowed: its labels")
    if declared.metric == "f1" and len(labels) != 2:
        raise StudyError(f"task {name}: f1 is of the second of two classes, not {len(labels)}; allowed: macro_f1")
    return tuple(labels)


def _order(label: str) -> tuple[bool, float, str]:
    """Numbers by size, before names by letter."""
    number = label.lstrip("-").isdecimal()
    return not number, float(label) if number else 0.0, label


def _task(name: str, declared: OwnTask, labels: tuple[str, ...] | None) -> Task:
    known: tuple[str, ...] = NUMBER_METRICS if declared.metric in NUMBER_METRICS else CLASS_METRICS
    if declared.kind == "tokens":
        known = TAG_METRICS if declared.metric == "entity_f1" else ("accuracy",)
    elif declared.retrieval:
        known = ("accuracy",)
    elif labels is not None and len(labels) != 2:
        known = tuple(metric for metric in known if metric != "f1")
    return Task(
        name=name,
        loader=dict,
        labels=labels,
        metric=declared.metric,
        metrics=(declared.metric, *(metric for metric in known if metric != declared.metric)),
        pair=declared.text_pair is not None,
        citation=declared.dataset or "own files",
        languages=declared.languages,
        kind=declared.kind or "labelled",
    )
