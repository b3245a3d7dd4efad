"""How far an exported encoder is from the original: states, embeddings and task scores."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import torch
from pydantic import BaseModel
from torch import Tensor, nn
from transformers import PretrainedConfig
from transformers.modeling_outputs import BaseModelOutput

from study.data.corpus import load_corpus
from study.data.pretrained import load_model, load_tokenizer
from study.data.tasks import find_task
from study.descriptions import Evaluation, Run
from study.evaluation.finetune import frozen_score, probed_classifier, splits_without_test
from study.files import Layout, StudyError
from study.plan import Plan

#: Lengths, in tokens, of the held-out texts that states are compared on.
LENGTHS = (8, 32, 128)
TEXTS = 32
#: The largest deviation of an embedding (1 - cosine) that an export may have, by format. Source: this study's choice.
BOUNDS = {"onnx": 1e-5, "onnx-int8": 0.03}


@contextmanager
def extra() -> Iterator[None]:
    """Say in one line which package of the extra ``export`` an import did not find.

    Raises:
        StudyError: there is one.
    """
    try:
        yield
    except ImportError as error:
        advice = "pip install 'task-agnostic-distillation-study[export]'"
        raise StudyError(f"{error.name} is not installed: `{advice}`") from None


class Parity(BaseModel):
    """``state``: largest absolute deviation of a hidden state; ``cosine``: smallest of embeddings, with the original's.

    ``tasks``: task -> its development score by a linear probe that was fitted on the original's states: of the original
    and of the export.
    """

    texts: int
    lengths: list[int]
    state: float
    cosine: float
    tasks: dict[str, tuple[float, float]]

    def beyond(self, kind: str) -> str:
        """What is beyond the bound of the format; empty if nothing is."""
        if not 1 - self.cosine <= BOUNDS[kind]:
            return f"smallest cosine {self.cosine:.5f}; allowed: at least {1 - BOUNDS[kind]:g}"
        return ""


class OnnxEncoder(nn.Module):
    """An exported encoder in ONNX Runtime, to be called as the original is."""

    def __init__(self, session: Any, config: Any):
        super().__init__()
        self.session, self.config = session, config

    def forward(
        self, input_ids: Tensor, attention_mask: Tensor, token_type_ids: Tensor | None = None
    ) -> BaseModelOutput:
        if token_type_ids is not None and token_type_ids.any():
            raise ValueError("an exported encoder reads one text at a time; allowed: finetuning.pairs = separate")
        inputs = {"input_ids": input_ids.numpy(), "attention_mask": attention_mask.numpy()}
        return BaseModelOutput(last_hidden_state=torch.from_numpy(self.session.run(None, inputs)[0]))


def onnx_encoder(path: Path, config: PretrainedConfig, threads: int = 1) -> OnnxEncoder:
    """The model in ``path`` in ONNX Runtime, with the configuration of the original.

    Raises:
        StudyError: ONNX Runtime is not installed.
    """
    with extra():
        from onnxruntime import InferenceSession, SessionOptions
    options = SessionOptions()
    options.intra_op_num_threads = threads
    options.log_severity_level = 3
    return OnnxEncoder(InferenceSession(str(path), options, providers=["CPUExecutionProvider"]), config)


def parity(plan: Plan, run: Run, layout: Layout, exported: OnnxEncoder) -> Parity:
    """Compare an export with the student it was made from, in float32: held-out text of LENGTHS, and the tasks.

    Raises:
        StudyError: corpus or tasks of the setting are missing.
    """
    original = load_model(layout.student(run.model), "eager", head=False).eval()
    sequences = torch.tensor(load_corpus(layout.corpus)["validation"][:TEXTS]["input_ids"])
    lengths = [length for length in LENGTHS if length <= sequences.shape[1]]
    states, cosines = [], []
    for length in lengths:
        ids = sequences[:, :length]
        mask = torch.ones_like(ids)
        mask[::2, length // 2 :] = 0  # half of the texts are padded
        with torch.inference_mode():
            first, second = (
                model(input_ids=ids, attention_mask=mask).last_hidden_state for model in (original, exported)
            )
        real = mask[..., None].bool()
        states.append(float((first - second).abs().masked_fill(~real, 0).max()))
        pooled = [(x * real).sum(dim=1) / real.sum(dim=1) for x in (first, second)]
        cosines.append(float(torch.cosine_similarity(*pooled).min()))
    return Parity(
        texts=len(sequences),
        lengths=lengths,
        state=max(states),
        cosine=min(cosines),
        tasks=_task_scores(plan, run, layout, exported),
    )


@torch.no_grad()
def _task_scores(plan: Plan, run: Run, layout: Layout, exported: OnnxEncoder) -> dict[str, tuple[float, float]]:
    folder, tokenizer = layout.student(run.model), load_tokenizer(layout.student(run.model))
    (description,) = (e for e in plan.of(Evaluation, run.setting) if e.model == run.model)
    description = description.model_copy(update={"precision": "fp32"})
    scores = {}
    for name, splits in splits_without_test(description, layout, tokenizer, run.seed).items():
        task = find_task(layout.tasks, name)
        model, collate = probed_classifier(description, folder, task, splits, tokenizer, run.seed)
        pair = []
        encoders: tuple[Any, ...] = (model.encoder, exported)
        for encoder in encoders:
            model.encoder = encoder
            pair.append(frozen_score(description, model, task, splits["development"], collate))
        scores[name] = (float(np.round(pair[0], 6)), float(np.round(pair[1], 6)))
    return scores
