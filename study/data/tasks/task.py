"""What a downstream task is, and how its examples are put into splits."""

from __future__ import annotations

import hashlib
from collections.abc import Callable
from dataclasses import dataclass
from typing import Literal

import numpy
from datasets import ClassLabel, Dataset, Features, List, Value

SPLITS = ("train", "development", "test")

#: One example: text, text_pair (tasks on pairs only) and label (a name, a number for regression, or tags of words).
Example = dict[str, str | float | list[str]]

#: Name of a split -> its examples.
Splits = dict[str, list[Example]]


@dataclass(frozen=True)
class Task:
    """A downstream task.

    ``loader`` returns the examples of each split; ``labels`` are the class names in the order of their integers, None
    for regression; ``metric`` is the main one of ``metrics``; ``pair`` tells whether examples have a ``text_pair``.

    ``languages`` are those of the test data. The first is that of the splits train, development and test; any other
    language has a split ``test-<language>`` of its own.

    ``kind``: ``labelled`` tasks are learnt by fine-tuning, and so are ``tokens``, where every word of the text (set off
    by single blanks) has a tag: ``labels`` are the tags, an example's label a list of them. The others are probes of
    the encoder as it is. ``retrieval`` has pairs of a text in the first language and its translation, no labels, and
    test splits of the other languages alone. ``masked-word`` has all splits in all languages: the text before and
    behind a mask, a word as label.

    ``group``: ``context`` where the order of words decides, ``sentence`` where a bag of words goes far; each has a
    macro score of its own. One ``made_by_rule`` keeps, as ``source``, the text that an example is made from.
    """

    name: str
    loader: Callable[[], Splits]
    labels: tuple[str, ...] | None
    metric: str
    metrics: tuple[str, ...]
    pair: bool
    citation: str
    languages: tuple[str, ...] = ("en",)
    kind: Literal["labelled", "tokens", "retrieval", "masked-word"] = "labelled"
    group: Literal["context", "sentence"] = "sentence"
    made_by_rule: bool = False

    @property
    def probe(self) -> bool:
        """Whether it is scored without fine-tuning."""
        return self.kind not in ("labelled", "tokens")

    @property
    def splits(self) -> list[str]:
        """Names of the splits that it has to have."""
        if self.kind == "masked-word":
            return [self.split(split, language) for language in self.languages for split in SPLITS]
        others = [self.split("test", language) for language in self.languages[1:]]
        return others if self.kind == "retrieval" else [*SPLITS, *others]

    def split(self, split: str, language: str) -> str:
        """Name of a split in a language: its own name for the first."""
        return split if language == self.languages[0] else f"{split}-{language}"

    @property
    def features(self) -> Features:
        """Columns of its splits."""
        columns = {column: Value("string") for column in ("text", "text_pair")[: 1 + self.pair]}
        if self.made_by_rule:
            columns["source"] = Value("string")
        if self.kind == "retrieval":
            return Features(columns)
        if self.kind == "masked-word":
            return Features({**columns, "label": Value("string")})
        label = Value("float32") if self.labels is None else ClassLabel(names=list(self.labels))
        if self.kind == "tokens":
            label = List(label)
        return Features({**columns, "label": label})


def empty_splits() -> Splits:
    """Train, development and test without examples."""
    return {split: [] for split in SPLITS}


def fraction(key: str) -> float:
    """A number in [0, 1) that depends on nothing but the key: the first 48 bits of its SHA-256."""
    return int.from_bytes(hashlib.sha256(key.encode()).digest()[:6]) / 2**48


def split_of(key: str, development: float, test: float) -> str:
    """The split that :func:`fraction` puts a key into, given the shares of development and test."""
    drawn = fraction(key)
    return "test" if drawn < test else "development" if drawn < test + development else "train"


def subsample(split: Dataset, size: int | None, seed: int = 0, after: int = 0) -> Dataset:
    """``size`` examples drawn without replacement, the same for the same seed; all when None or more than there are.

    ``after``: of what a draw of so many examples with this seed leaves over.
    """
    if not after and (size is None or size >= len(split)):
        return split
    drawn = numpy.random.default_rng(seed).permutation(len(split))[after:][:size]
    return split.select(drawn, keep_in_memory=True)
