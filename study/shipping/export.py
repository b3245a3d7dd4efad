"""Exporting a distilled student, whole or not at all, with its parity and its card."""

from __future__ import annotations

import json
import os
import shutil
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from torch import nn

from study.data.corpus import load_corpus
from study.data.pretrained import load_model, load_tokenizer
from study.descriptions import Run
from study.distillation.objectives import OBJECTIVES
from study.evaluation.scores import training_of
from study.files import StudyError, file_hash, write_file, write_json
from study.plan import Plan
from study.shipping.card import command_of, write_card
from study.shipping.formats import MODEL, OPENVINO_MODEL, OPSET, WRITERS
from study.shipping.parity import TEXTS, Parity, deviation, evaluation_of, onnx_encoder, openvino_encoder, probe_scores
from study.shipping.trimming import Trimmed, trim


def export(plan: Plan, name: str, kind: str, to: Path | None = None, texts: Path | None = None) -> Path:
    """Write a trained student to a folder, in one format, with ``README.md``, ``export.json`` and ``SHA256SUMS``.

    ``transformers``: for ``AutoModelForMaskedLM`` where its head was trained, else for ``AutoModel``.
    ``sentence-transformers``: for ``SentenceTransformer``, mean pooling, lengths up to those of the corpus.
    ``onnx``: ``model.onnx`` from token ids and attention mask (int64) to last hidden states, any batch and length.
    ``onnx-int8``: the same, weights in 8 bits, activations as they come (ONNX Runtime's dynamic quantisation).
    ``onnx-int8-static``: the same, ranges of activations fixed on held-out text of the corpus.
    ``openvino``: ``openvino_model.xml`` with the same inputs and outputs, in float32.

    Args:
        name: of a run of the plan: ``<setting>_<method>_<student>_<seed>``, then the budget if not the base.
        to: an empty or new folder; by default ``exports/<name>/<format>`` in the profile's folder.
        texts: a text file, or a folder of them: of the vocabulary, the pieces that occur in there are kept
            (:func:`study.data.vocabulary.pieces_to_keep`).

    Returns:
        The folder.

    Raises:
        StudyError: no such format or run, one that is not trained, a folder that is not empty, an extra that is not
            installed, no texts, an export that is further from the original than the stated bound.
    """
    if kind not in WRITERS:
        raise StudyError(f"format {kind!r} is unknown; allowed: {', '.join(WRITERS)}")
    run = plan.named(name)
    layout = plan.layout(run.setting)
    source = trained(plan, run)
    record = json.loads((source / "record.json").read_text())
    tokenizer = load_tokenizer(source)
    architecture = OBJECTIVES.get(run.objective.objective)  # whether training reached the head
    head = architecture is not None and architecture.trains_head(run.objective)
    model = load_model(source, run.attention_implementation, head).eval()
    target = to or plan.folder / "exports" / name / kind
    with draft_of(target) as folder:
        trimmed = trim(model, tokenizer, texts) if texts else None
        tokenizer = trimmed.tokenizer if trimmed else tokenizer
        WRITERS[kind](model, tokenizer, folder, layout)
        measured = _measured(plan, run, kind, model, trimmed, folder)
        facts = {"run": name, "format": kind, "opset": OPSET if "onnx" in kind else None, "hashes": record["hashes"]}
        facts |= {"parity": measured.model_dump() if measured else None}
        facts |= {"vocabulary": trimmed.facts if trimmed else None}
        write_json(folder / "export.json", facts)
        more = f"## Vocabulary\n\n{trimmed.sentence}.\n" if trimmed else ""
        write_card(plan, run, record, kind, head and kind == "transformers", measured, folder, more)
        if trimmed:
            print(f"vocabulary: {trimmed.sentence}")
        if measured:
            print(f"parity: {measured.sentence}")
    return target


def trained(plan: Plan, run: Run) -> Path:
    """The folder of a run's student.

    Raises:
        StudyError: it is not trained yet, or its record is damaged.
    """
    source = plan.layout(run.setting).student(run.model)
    if not (source / "record.json").is_file():
        raise StudyError(f"{run.name} is not trained yet: run `{command_of(plan, f'distill@{run.name}')}`")
    training_of(source)
    return source


@contextmanager
def draft_of(target: Path) -> Iterator[Path]:
    """A new folder to write an export to; with checksums and readable by anybody, it becomes ``target`` at the end.

    Raises:
        StudyError: ``target`` is there and not an empty folder.
    """
    if target.exists() and (not target.is_dir() or any(target.iterdir())):
        raise StudyError(f"{target}: is there already; allowed: a new or an empty folder (--to)")
    target.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(prefix=f".{target.name}-", dir=target.parent) as parent:
        folder = Path(parent) / "export"
        yield folder
        files = sorted(path for path in folder.rglob("*") if path.is_file())
        lines = [f"{file_hash(path)}  {path.relative_to(folder).as_posix()}" for path in files]
        write_file(folder / "SHA256SUMS", "\n".join(lines) + "\n")
        for path in folder.rglob("*"):
            path.chmod(0o755 if path.is_dir() else 0o644)
        folder.chmod(0o755)
        shutil.rmtree(target, ignore_errors=True)
        os.replace(folder, target)


def _measured(plan: Plan, run: Run, kind: str, model: Any, trimmed: Trimmed | None, folder: Path) -> Parity | None:
    """How far the export is from the original: states, on texts whose ids are renumbered if need be, and tasks."""
    layout, original = plan.layout(run.setting), model.base_model.eval()
    if "onnx" in kind:
        exported: nn.Module = onnx_encoder(folder / MODEL, model.config)
    elif kind == "openvino":
        exported = openvino_encoder(folder / OPENVINO_MODEL, model.config)
    elif trimmed:
        exported = original
    else:
        return None
    ids = torch.tensor(load_corpus(layout.corpus)["validation"][:TEXTS]["input_ids"])
    ids = trimmed.renumbered(ids) if trimmed else ids
    tokenizer = trimmed.tokenizer if trimmed else None
    scores = probe_scores(evaluation_of(plan, run.setting, run.model), layout, run.seed, [(exported, tokenizer)])
    found = Parity(texts=len(ids), **deviation(original, exported, ids), tasks=scores)
    reason = found.beyond(kind)
    if reason:
        raise StudyError(f"{run.name}: export as {kind} is too far from the original: {reason}; {found.sentence}")
    return found
