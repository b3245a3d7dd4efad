"""Result files of what stands beside the pipeline: a student's layers while it trains."""

from __future__ import annotations

from typing import Any

from pydantic import model_validator

from study.records import Record, ResultFile


class Snapshot(Record):
    """A student after ``step`` steps. ``probes``: task -> development score by layer, 0 (embeddings) to the last.

    ``cka`` and ``relation_divergence``: as in :class:`study.records.Compared`.
    """

    step: int
    tokens: int
    cka: list[list[float | None]]
    relation_divergence: dict[str, list[list[float]]]
    probes: dict[str, list[float]]

    @model_validator(mode="after")
    def _a_score_for_each_layer(self):
        for task, scores in self.probes.items():
            if len(scores) != len(self.cka) + 1:
                raise ValueError(f"probes.{task} has {len(scores)} scores; allowed: {len(self.cka) + 1}, one a layer")
        return self


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
