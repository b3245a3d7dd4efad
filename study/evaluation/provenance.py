"""What a result file says of where its numbers come from."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch

from study.data.corpus import corpus_hash
from study.descriptions import Admission, Evaluation, LatencyMeasurement, LayerComparison, NeighbourSystem, Tuning
from study.files import Layout, content_hash, file_hash
from study.records import SCHEMA
from study.runtime import commit, environment


def provenance(
    description: Admission | Evaluation | LatencyMeasurement | LayerComparison | NeighbourSystem | Tuning,
    layout: Layout,
    hashes: Mapping[str, str],
    device: torch.device | None = None,
) -> dict[str, Any]:
    """The fields that every result file has: those of :class:`study.records.ResultFile`.

    Args:
        hashes: what the file's numbers rest on -> SHA-256. device: as in :func:`study.runtime.environment`.
    """
    return {
        "schema": SCHEMA,
        "profile": description.profile,
        "setting": description.setting,
        "environment": environment(device),
        "commit": commit(layout.folder),
        "hashes": dict(hashes),
    }


def input_hashes(layout: Layout) -> dict[str, str]:
    """Corpus, tasks and the teacher's weights of a setting -> SHA-256.

    Raises:
        StudyError: one of them is missing.
    """
    return {
        "corpus": corpus_hash(layout.corpus),
        "tasks": content_hash(layout.tasks),
        "teacher": weights_hash(layout.teacher),
    }


def weights_hash(folder: Path) -> str:
    """SHA-256 of the weights that are saved in a model's folder.

    Raises:
        StudyError: nothing is saved there.
    """
    return file_hash(folder / "model.safetensors")
