"""Result files beside the grid: layers while a student trains, systems of other papers, sentences read."""

from __future__ import annotations

import base64
from collections.abc import Iterator
from typing import Any, Literal

import numpy as np
from pydantic import Field

from study.records import Labelled, Record, ResultFile


class Snapshot(Record):
    """A student after ``step`` steps. ``probes``: task -> development score by layer, 0 (embeddings) to the last.

    ``cka`` and ``relation_divergence``: as in :class:`study.records.Compared`.
    """

    step: int
    tokens: int
    cka: list[list[float | None]]
    relation_divergence: dict[str, list[list[float]]]
    probes: dict[str, list[float]]

    def problems(self) -> Iterator[str]:
        for task, scores in self.probes.items():
            if len(scores) != len(self.cka) + 1:
                yield f"probes.{task} has {len(scores)} scores; allowed: {len(self.cka) + 1}, one a layer"


class Watched(Record):
    """One run; ``options``: those of its method. Of a student that was there already, its end is the only snapshot."""

    method: str
    budget: str
    options: dict[str, Any]
    initialisation: str
    steps: int
    snapshots: list[Snapshot]


class DynamicsResult(ResultFile):
    """``teacher``: task -> development score by layer of the teacher."""

    student: str
    seed: int
    relation_heads: int
    teacher: dict[str, list[float]]
    runs: list[Watched]


class Check(Record):
    """An ordinal claim of a system's source: arm ``first`` lies above arm ``second`` in a measure, or below it."""

    claim: str
    first: str
    second: str
    measure: str
    sign: Literal["above", "below"] = "above"


class Arm(Record):
    """``values``: measure -> its value at each seed."""

    name: str
    words: str
    values: dict[str, list[float]]


class NeighbourResult(ResultFile):
    """A system beside the grid: what it is, what was reproduced and how sure that is, and arms x seeds x measures.

    ``standing``: its public code was read, its text was, or parts are our reading; ``unknown``: what could not be
    known. ``measures``: name -> words, the one that figures show first.
    """

    neighbour: str
    system: str
    title: str
    source: str
    standing: Literal["code-exact", "published", "our reading"]
    equation: str
    reproduced: str
    unknown: list[str]
    model: str
    options: dict[str, Any]
    revisions: dict[str, int]
    seeds: list[int]
    measures: dict[str, str] = Field(min_length=1)
    arms: list[Arm] = Field(min_length=1)
    checks: list[Check]
    seconds: float

    def problems(self) -> Iterator[str]:
        measured = {(arm.name, measure): values for arm in self.arms for measure, values in arm.values.items()}
        for (arm, measure), values in measured.items():
            if measure not in self.measures or len(values) != len(self.seeds):
                allowed = f"one a seed of {', '.join(self.measures)}"
                yield f"arm {arm}: {measure} has {len(values)} values; allowed: {allowed}"
        for check in self.checks:
            for name in (check.first, check.second):
                if (name, check.measure) not in measured:
                    yield f"check {check.claim!r}: {check.measure} of arm {name!r} was not measured"


class ReadSentence(Record):
    """What models make of a sentence of T tokens: model -> kind of relation -> matrices (layers, T, T).

    Values v, 0 to 1, are kept as a byte each, round(255 sqrt(v)), row by row, in base64: errors are below 0.004.
    """

    tokens: list[str]
    models: dict[str, dict[str, str]]

    def matrices(self, model: str, kind: str) -> np.ndarray:
        """(layers, T, T) in float64."""
        codes = np.frombuffer(base64.b64decode(self.models[model][kind]), dtype=np.uint8)
        return (codes / 255).reshape(-1, len(self.tokens), len(self.tokens)) ** 2

    @staticmethod
    def coded(matrices: np.ndarray) -> str:
        """The inverse of :meth:`matrices`."""
        return base64.b64encode(np.rint(255 * np.sqrt(matrices)).astype(np.uint8).tobytes()).decode()


class AttentionMaps(Labelled):
    """Attention and its relations in a few sentences, of a teacher and some of its students (by their runs' names)."""

    relation_heads: int
    sentences: list[ReadSentence]


class Translations(Labelled):
    """How near the same sentences in several languages are to each other, for a teacher and some of its students.

    ``sentences``: language -> the N sentences, all languages in the same order. ``models``: name -> cosines of the mean
    last hidden states of all L N texts, language by language, (L N, L N): values v, -1 to 1, as unsigned 16-bit
    integers, round((v + 1) 65535 / 2), little end first, row by row, in base64: errors are below 0.00002.
    """

    sentences: dict[str, list[str]] = Field(min_length=2)
    models: dict[str, str]

    def problems(self) -> Iterator[str]:
        counts = {language: len(own) for language, own in self.sentences.items()}
        if len(set(counts.values())) != 1:
            yield f"sentences by language: {counts}; allowed: the same number in each"
        for name, coded in self.models.items():
            if len(base64.b64decode(coded)) != 2 * sum(counts.values()) ** 2:
                yield f"models.{name}: its cosines are not those of {sum(counts.values())} texts"

    def cosines(self, model: str) -> np.ndarray:
        """(L, N, L, N) in float64."""
        codes = np.frombuffer(base64.b64decode(self.models[model]), dtype="<u2")
        each = len(next(iter(self.sentences.values())))
        return (codes * (2 / 65535) - 1).reshape(2 * (len(self.sentences), each))

    @staticmethod
    def coded(cosines: np.ndarray) -> str:
        """The inverse of :meth:`cosines`."""
        return base64.b64encode(np.rint((cosines + 1) * (65535 / 2)).astype("<u2").tobytes()).decode()

    def found(self, model: str) -> np.ndarray:
        """(L, L): share of the sentences of a language (rows) whose nearest one in another is their translation.

        Source: as :func:`study.evaluation.retrieval.retrieve`.
        """
        nearest = self.cosines(model).argmax(axis=-1)  # (L, N, L)
        return (nearest == np.arange(nearest.shape[1])[None, :, None]).mean(axis=1)
