"""Exporting a distilled student, whole or not at all, with its parity and its card."""

from __future__ import annotations

import contextlib
import difflib
import io
import json
import logging
import os
import shutil
import tempfile
import warnings
from pathlib import Path
from typing import Any, Literal

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from study.data.corpus import load_corpus
from study.data.pretrained import load_model, load_tokenizer, save_model
from study.descriptions import Run
from study.distillation.objectives import OBJECTIVES
from study.files import Layout, StudyError, file_hash, write_file, write_json
from study.plan import Plan
from study.shipping.card import write_card
from study.shipping.parity import Parity, extra, onnx_encoder, parity

Format = Literal["transformers", "sentence-transformers", "onnx", "onnx-int8"]
FORMATS: tuple[Format, ...] = ("transformers", "sentence-transformers", "onnx", "onnx-int8")
#: Operators of this set: the newest that ONNX Runtime's quantisation and browsers' runtimes read alike.
OPSET = 18
MODEL = "model.onnx"


def export(plan: Plan, name: str, kind: Format, to: Path | None = None) -> Path:
    """Write a trained student to a folder, in one of FORMATS, with ``README.md``, ``export.json`` and ``SHA256SUMS``.

    ``transformers``: for ``AutoModelForMaskedLM`` where its head was trained, else for ``AutoModel``.
    ``sentence-transformers``: for ``SentenceTransformer``, mean pooling, lengths up to those of the corpus.
    ``onnx``: ``model.onnx`` from token ids and attention mask (int64) to last hidden states, any batch and length.
    ``onnx-int8``: the same, weights in 8 bits, activations as they come (ONNX Runtime's dynamic quantisation).

    Args:
        name: of a run of the plan: ``<setting>_<method>_<student>_<seed>``, then the budget if not the base.
        to: an empty or new folder; by default ``exports/<name>/<format>`` in the profile's folder.

    Returns:
        The folder.

    Raises:
        StudyError: no such format or run, one that is not trained, a folder that is not empty, an extra that is not
            installed, an export that is further from the original than the stated bound.
    """
    if kind not in FORMATS:
        raise StudyError(f"format {kind!r} is unknown; allowed: {', '.join(FORMATS)}")
    run = find(plan, name)
    layout = plan.layout(run.setting)
    source, target = layout.student(run.model), to or plan.folder / "exports" / name / kind
    if not (source / "record.json").is_file():
        command = f"dvc repro --single-item distill@{name}"
        raise StudyError(f"{name} is not trained yet: run `{command}` in {plan.folder} after `make plan`")
    if target.exists() and (not target.is_dir() or any(target.iterdir())):
        raise StudyError(f"{target}: is there already; allowed: a new or an empty folder (--to)")
    record = json.loads((source / "record.json").read_text())
    tokenizer = load_tokenizer(source)
    head = has_trained_head(run)
    model = load_model(source, run.attention_implementation, head).eval()
    target.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(prefix=f".{target.name}-", dir=target.parent) as draft:
        folder = Path(draft) / "export"
        _WRITERS[kind](model, tokenizer, folder, layout)
        measured = _measured(plan, run, layout, kind, model.config, folder)
        facts = {"run": name, "format": kind, "opset": OPSET if "onnx" in kind else None, "hashes": record["hashes"]}
        facts |= {"parity": measured.model_dump() if measured else None}
        write_json(folder / "export.json", facts)
        write_card(plan, run, record, kind, head and kind == "transformers", measured, folder)
        _finish(folder)
        shutil.rmtree(target, ignore_errors=True)
        os.replace(folder, target)
    return target


def find(plan: Plan, name: str) -> Run:
    """The run of the plan with that name.

    Raises:
        StudyError: there is none; the nearest names are offered.
    """
    runs = {run.name: run for run in plan.of(Run)}
    if name not in runs:
        near = difflib.get_close_matches(name, runs, n=3, cutoff=0.4) or list(runs)[:3]
        raise StudyError(f"run {name!r} is none of profile {plan.profile}; nearest: {', '.join(near)}")
    return runs[name]


def has_trained_head(run: Run) -> bool:
    """Whether training reached the student's language-modelling head."""
    architecture = OBJECTIVES.get(run.objective.objective)
    return architecture is not None and architecture.trains_head(run.objective)


def _measured(plan: Plan, run: Run, layout: Layout, kind: Format, config: Any, folder: Path) -> Parity | None:
    if "onnx" not in kind:
        return None
    found = parity(plan, run, layout, onnx_encoder(folder / MODEL, config))
    reason = found.beyond(kind)
    if reason:
        raise StudyError(f"{run.name}: export as {kind} is too far from the original: {reason}")
    return found


def _transformers(model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, folder: Path, layout: Layout) -> None:
    save_model(model, tokenizer, folder)
    path = folder / "tokenizer_config.json"
    config = json.loads(path.read_text())
    if config.get("tokenizer_class") == "TokenizersBackend":  # a name that transformers 4 does not know
        write_json(path, config | {"tokenizer_class": "PreTrainedTokenizerFast"})


def _sentence_transformers(
    model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, folder: Path, layout: Layout
) -> None:
    with extra():
        from sentence_transformers import SentenceTransformer
        from sentence_transformers.models import Pooling, Transformer
    with tempfile.TemporaryDirectory() as plain:
        encoder: Any = model.base_model
        _transformers(encoder, tokenizer, Path(plain), layout)
        transformer = Transformer(plain, max_seq_length=len(load_corpus(layout.corpus)["validation"][0]["input_ids"]))
        pooling = Pooling(model.config.hidden_size, pooling_mode="mean")
        SentenceTransformer(modules=[transformer, pooling], device="cpu").save(str(folder), create_model_card=False)


class _HiddenStates(nn.Module):
    def __init__(self, encoder: nn.Module):
        super().__init__()
        self.encoder = encoder

    def forward(self, input_ids: Tensor, attention_mask: Tensor) -> Tensor:
        return self.encoder(input_ids=input_ids, attention_mask=attention_mask).last_hidden_state


def _onnx(model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, folder: Path, layout: Layout) -> None:
    with extra():
        import onnx  # noqa: F401
        import onnxscript  # noqa: F401
    encoder: Any = model.base_model
    encoder.set_attn_implementation("eager")
    folder.mkdir(parents=True)
    example = tokenizer(["One text.", "Another, a longer text."], padding=True, return_tensors="pt")
    sizes = {0: torch.export.Dim("batch"), 1: torch.export.Dim("tokens", max=_positions(encoder))}
    with warnings.catch_warnings(), contextlib.redirect_stdout(io.StringIO()):
        warnings.simplefilter("ignore")
        program = torch.onnx.export(
            _HiddenStates(encoder),
            (example["input_ids"], example["attention_mask"]),
            input_names=["input_ids", "attention_mask"],
            output_names=["last_hidden_state"],
            dynamic_shapes={"input_ids": sizes, "attention_mask": sizes},
            opset_version=OPSET,
            dynamo=True,
            verbose=False,
        )
    assert program is not None
    program.save(str(folder / MODEL))
    encoder.config.save_pretrained(folder)
    tokenizer.save_pretrained(folder)


def _positions(encoder: Any) -> int:
    config = encoder.config
    offset = config.pad_token_id + 1 if config.model_type in ("roberta", "xlm-roberta") else 0
    return config.max_position_embeddings - offset


def _onnx_int8(model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, folder: Path, layout: Layout) -> None:
    with extra():
        from onnxruntime.quantization import QuantType, quantize_dynamic
    _onnx(model, tokenizer, folder, layout)
    whole = folder / "fp32.onnx"
    (folder / MODEL).rename(whole)
    logging.disable(logging.WARNING)
    try:
        quantize_dynamic(whole, folder / MODEL, weight_type=QuantType.QInt8)
    finally:
        logging.disable(logging.NOTSET)
    whole.unlink()


def _finish(folder: Path) -> None:
    """Checksums of every file, and files that anybody may read."""
    files = sorted(path for path in folder.rglob("*") if path.is_file())
    lines = [f"{file_hash(path)}  {path.relative_to(folder).as_posix()}" for path in files]
    write_file(folder / "SHA256SUMS", "\n".join(lines) + "\n")
    for path in folder.rglob("*"):
        path.chmod(0o755 if path.is_dir() else 0o644)
    folder.chmod(0o755)


_WRITERS = {
    "transformers": _transformers,
    "sentence-transformers": _sentence_transformers,
    "onnx": _onnx,
    "onnx-int8": _onnx_int8,
}
