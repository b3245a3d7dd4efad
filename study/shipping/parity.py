"""How far an exported encoder is from the original: states, embeddings and task scores."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import torch
from pydantic import BaseModel
from torch import Tensor, nn
from transformers import PretrainedConfig, PreTrainedTokenizerBase
from transformers.modeling_outputs import BaseModelOutput

from study.analysis.numbers.text import number
from study.data.pretrained import load_tokenizer
from study.data.tasks import find_task
from study.descriptions import Evaluation
from study.evaluation.finetune import Collator, frozen_score, probed_classifier, splits_without_test
from study.files import Layout, StudyError
from study.plan import Plan

#: Lengths, in tokens, of the held-out texts that states are compared on.
LENGTHS = (8, 32, 128)
TEXTS = 32
#: The largest deviation of an embedding (1 - cosine) that an export may have, by format; 0.00001 in all others.
#: Source: this study's choice.
BOUNDS = {"onnx-int8": 0.03, "onnx-int8-static": 0.05}


@contextmanager
def extra(name: str = "export") -> Iterator[None]:
    """Say in one line which package of an extra of pyproject.toml an import did not find.

    Raises:
        StudyError: there is one.
    """
    try:
        yield
    except ImportError as error:
        advice = f"pip install --constraint constraints.txt --editable '.[{name}]'"
        raise StudyError(f"{error.name} is not installed: `{advice}` in the study's folder") from None


class Parity(BaseModel):
    """``state``: largest absolute deviation of a hidden state; ``cosine``: smallest of embeddings, with the original's.

    ``tasks``: task -> its development score by a linear probe that was fitted on the original's states: of the original
    and of the export, in this order.
    """

    texts: int
    lengths: list[int]
    state: float
    cosine: float
    tasks: dict[str, list[float]]

    def beyond(self, kind: str) -> str:
        """What is beyond the bound of the format; empty if nothing is."""
        bound = BOUNDS.get(kind, 1e-5)
        if not 1 - self.cosine <= bound:
            return f"smallest cosine {self.cosine:.5f}; allowed: at least {1 - bound:g}"
        return ""

    @property
    def sentence(self) -> str:
        """Deviation and scores in one line."""
        original, export = (100 * float(np.mean([pair[end] for pair in self.tasks.values()])) for end in (0, 1))
        return (
            f"smallest cosine of embeddings {self.cosine:.5f}; development score of the frozen probe, mean of"
            f" {len(self.tasks)} tasks, {original:.1f} -> {export:.1f} ({number(export - original, 1, '+')})"
        )


class ExportedEncoder(nn.Module):
    """An exported encoder in its own runtime, to be called as the original is.

    Args:
        run: ``input_ids`` and ``attention_mask``, each (B, T) -> last hidden states (B, T, H).
    """

    def __init__(self, run: Callable[[dict[str, np.ndarray]], np.ndarray], config: Any):
        super().__init__()
        self.run, self.config = run, config

    def forward(
        self, input_ids: Tensor, attention_mask: Tensor, token_type_ids: Tensor | None = None
    ) -> BaseModelOutput:
        if token_type_ids is not None and token_type_ids.any():
            raise ValueError("an exported encoder reads one text at a time; allowed: finetuning.pairs = separate")
        states = self.run({"input_ids": input_ids.cpu().numpy(), "attention_mask": attention_mask.cpu().numpy()})
        return BaseModelOutput(last_hidden_state=torch.from_numpy(states).to(input_ids.device))


def onnx_encoder(path: Path, config: PretrainedConfig, threads: int = 1) -> ExportedEncoder:
    """The model in ``path`` in ONNX Runtime, with the configuration of the original.

    Its threads do not wait in a loop for work, so that what runs beside it keeps the processor.

    Raises:
        StudyError: ONNX Runtime is not installed.
    """
    with extra():
        from onnxruntime import InferenceSession, SessionOptions
    options = SessionOptions()
    options.intra_op_num_threads = threads
    options.log_severity_level = 3
    options.add_session_config_entry("session.intra_op.allow_spinning", "0")
    session = InferenceSession(str(path), options, providers=["CPUExecutionProvider"])
    return ExportedEncoder(lambda inputs: session.run(None, inputs)[0], config)


def openvino_encoder(path: Path, config: PretrainedConfig) -> ExportedEncoder:
    """The model in ``path`` in OpenVINO, with the configuration of the original.

    Raises:
        StudyError: OpenVINO is not installed.
    """
    with extra("openvino"):
        import openvino
    # By default OpenVINO computes in bfloat16 where the processor has it.
    exact = {"INFERENCE_PRECISION_HINT": "f32"}
    model = openvino.Core().compile_model(path, "CPU", exact)
    return ExportedEncoder(lambda inputs: model(inputs)[0].copy(), config)


def deviation(original: nn.Module, exported: nn.Module, sequences: Tensor) -> dict[str, Any]:
    """``lengths``, ``state`` and ``cosine`` of a :class:`Parity`, in float32.

    Args:
        sequences: (N, T) token ids of held-out text; the first 8, 32, 128 of each are compared, as far as they go.
    """
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
    return {"lengths": lengths, "state": max(states), "cosine": min(cosines)}


@torch.no_grad()
def probe_scores(
    description: Evaluation,
    layout: Layout,
    seed: int,
    exported: Sequence[tuple[nn.Module, PreTrainedTokenizerBase | None]],
) -> dict[str, list[float]]:
    """Task -> development scores, by a linear probe fitted on the original's states, of the original and of exports.

    Args:
        exported: each with its tokenizer, None where that is the original's.

    Raises:
        StudyError: the model or a task is missing.
    """
    folder, own = description.folder(layout), load_tokenizer(description.folder(layout))
    description = description.model_copy(update={"precision": "fp32"})
    splits, pad = splits_without_test(description, layout, own, seed), description.finetuning.pad_to_multiple_of
    others = [
        (encoder, splits_without_test(description, layout, t, seed) if t else splits, Collator(t or own, pad))
        for encoder, t in exported
    ]
    scores: dict[str, list[float]] = {}
    for name in splits:
        task = find_task(layout.tasks, name)
        model, collate = probed_classifier(description, folder, task, splits[name], own, seed)
        scores[name] = []
        for encoder, texts, collated in [(model.encoder, splits, collate), *others]:
            model.encoder = encoder  # type: ignore[assignment]
            score = frozen_score(description, model, task, texts[name]["development"], collated)
            scores[name].append(float(np.round(score, 6)))
    return scores


def evaluation_of(plan: Plan, setting: str, model: str) -> Evaluation:
    """How the plan judges a model: the name of a run's model, or ``teacher``."""
    (description,) = (e for e in plan.of(Evaluation, setting) if e.model == model)
    return description
