"""What can be known to be wrong of texts and tasks of one's own before any work: their files are looked into."""

from __future__ import annotations

from collections import deque
from itertools import islice

from datasets import config

from study.data.rows import documents, file_rows
from study.data.tasks.own import features_of, load_own, rows_of, split_parts
from study.data.texts.own import read_own
from study.declarations import Declared, OwnTask, OwnText, folder_of, format_of, matching
from study.files import StudyError, UnreachableError
from study.plan import Plan

#: Of files that are larger together (bytes), the head of each alone is looked into.
LARGEST = 64_000_000


def check_data(plan: Plan) -> list[str]:
    """A line for every text and task of one's own that the grid uses, each read as its stage reads it.

    Files are read to their ends, unless they are large, or a data set: then the head of each. Without a connection,
    data sets of the hub are left out, and that is said; with HF_HUB_OFFLINE set it is a mistake.

    Raises:
        StudyError: nothing matches, something cannot be read or reached, a column is missing, a split is empty or has
            no labels, labels differ between splits; names the key.
    """
    lines: list[str] = []
    params = plan.params
    for setting in params.grid.settings:
        chosen = params.settings[setting]
        for place, text in enumerate(chosen.texts):
            if isinstance(text, OwnText):
                lines.append(_told(lines, f"settings.{setting}.texts.{place}", text, plan))
        for name in (*chosen.tasks, *chosen.candidates):
            if name in params.tasks:
                lines.append(_told(lines, f"tasks.{name}", params.tasks[name], plan, name))
    return list(dict.fromkeys(lines))


def _told(lines: list[str], key: str, own: Declared, plan: Plan, name: str = "") -> str:
    unseen = f"{key}: {own.dataset}: not looked at, no connection"
    if own.dataset and not folder_of(own, plan.root):
        if any(line.endswith("no connection") for line in lines):
            return unseen  # every try takes half a minute
        print(f"check: {key}: asks the hub for {own.dataset} (half a minute without a connection)", flush=True)
    try:
        return f"{key}: {_check_text(own, plan) if isinstance(own, OwnText) else _check_task(own, plan, name)}"
    except StudyError as error:
        if isinstance(error, UnreachableError) and not config.HF_HUB_OFFLINE:
            return unseen
        raise StudyError(f"{key}: {str(error).removeprefix(f'task {name}: ')}") from None


def _check_text(text: OwnText, plan: Plan) -> str:
    files = matching(text.files, plan.root) if text.files else []
    size = sum(file.stat().st_size for file in files)
    for file in files:
        rows = documents(file) if format_of(file) == ".txt" else file_rows(file)
        deque(rows if size <= LARGEST else islice(rows, 1), maxlen=0)
    if not any(content.strip() for content in read_own(text, plan.root)):
        where = " and ".join(f"{column} = {value}" for column, value in (text.where or {}).items())
        what = f"{text.files or text.dataset} holds no document{where and f' with {where}'}"
        raise StudyError(f"{what}; allowed: at least one that is not empty")
    seen = "" if size <= LARGEST else ", the head of each read"
    count = f"{len(files):,} file{'s' * (len(files) != 1)}"
    return f"{text.label}: {count}, {size / 1e6:,.1f} MB{seen}" if files else f"{text.label}: {text.dataset}"


def _check_task(task: OwnTask, plan: Plan, name: str) -> str:
    parts, local = split_parts(task), task.files or folder_of(task, plan.root)
    size = sum(file.stat().st_size for pattern in task.patterns() for file in matching(pattern, plan.root))
    if local and size <= LARGEST:
        _, splits = load_own(name, task, plan.root)
        for split, examples in splits.items():
            if not examples:
                place = f" ({parts[split]})" if split in parts else ""
                raise StudyError(f"split {split!r}{place} has no examples; allowed: at least one")
        return ", ".join(f"{split} {len(examples):,}" for split, examples in splits.items())
    for split, part in parts.items():
        features = features_of(task, part, plan.root)
        columns = [column for column in (task.text, task.text_pair, None if task.retrieval else task.label) if column]
        known = list(features or next(iter(rows_of(task, part, plan.root)), {}))
        for column in columns:
            if column not in known:
                raise StudyError(f"{split}: {part}: no column {column!r}; allowed: {', '.join(known) or 'a row'}")
    return ", ".join(f"{split} {part}" for split, part in parts.items())
