"""What can be known wrong of a setting's teacher before its weights are read: for `make check`."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import torch
from huggingface_hub import constants
from safetensors import safe_open
from transformers import AutoConfig, AutoModel, AutoTokenizer

from study.config import Params
from study.data.pretrained import UNREADABLE, check_tokenizer, reason
from study.data.vocabulary import check_trimmable
from study.families import family_of, positions
from study.files import StudyError, UnreachableError
from study.params import check_lengths
from study.sections import Teacher
from study.teachers import EMBEDDED_POSITIONS, EMBEDDED_SIZES, agree, encoder_subfolder, find_folder, read_teacher


def check_teachers(params: Params, root: Path) -> list[str]:
    """Look at the configurations and tokenizers of the teachers of the grid's settings; embedded ones are known.

    Returns:
        What could not be looked at, a line each: hub names while no hub can be reached.

    Raises:
        StudyError: the first mistake, with the key it belongs to; one line.
    """
    notes = []
    for setting in params.grid.settings:
        teacher = params.settings[setting].teacher
        if teacher.name in EMBEDDED_SIZES:
            continue
        try:
            _check(params, setting, teacher, root)
        except UnreachableError as error:
            if constants.HF_HUB_OFFLINE:
                raise StudyError(f"settings.{setting}.teacher: {error}") from None
            notes.append(f"settings.{setting}.teacher: {teacher.name} was not looked at: the hub cannot be reached")
        except (*UNREADABLE, KeyError) as error:
            place = find_folder(teacher.name, root)
            why = reason(error, place / encoder_subfolder(teacher.name, root) if place else None)
            raise StudyError(f"settings.{setting}.teacher: {teacher.name!r} cannot be read ({why})") from None
        except StudyError as error:
            key = "" if str(error).startswith("settings.") else f"settings.{setting}: "
            raise StudyError(f"{key}{error}") from None
    return notes


def longest(name: str, root: Path) -> int:
    """How many tokens a teacher reads, special ones included.

    Raises:
        StudyError: no such teacher; it cannot be read.
    """
    if name in EMBEDDED_SIZES:
        return EMBEDDED_POSITIONS
    place, inside = find_folder(name, root), encoder_subfolder(name, root)
    try:
        return positions(AutoConfig.from_pretrained(place or name, subfolder=inside))
    except (*UNREADABLE, KeyError) as error:
        raise StudyError(f"teacher {name!r}: cannot be read ({reason(error, place)})") from None


def _check(params: Params, setting: str, teacher: Teacher, root: Path) -> None:
    agree(f"settings.{setting}.teacher", teacher.model_dump(), read_teacher(teacher.name, root))
    place = find_folder(teacher.name, root)
    inside = encoder_subfolder(teacher.name, root)
    folder = place / inside if place else None
    config = AutoConfig.from_pretrained(place or teacher.name, subfolder=inside)
    tokenizer = AutoTokenizer.from_pretrained(place or teacher.name, subfolder=inside)
    check_tokenizer(teacher.name, tokenizer, config, folder)
    if params.settings[setting].vocabulary == "trimmed":
        check_trimmable(tokenizer)
    if folder:
        _check_files(folder, config)
    if teacher.head == "own" and folder:
        _check_head(setting, folder, config)
    if config.model_type == "mpnet" and params.attention_implementation != "eager":
        raise StudyError(f"attention_implementation = {params.attention_implementation}; allowed for mpnet: eager")
    check_lengths(params, setting, positions(config))
    for name in params.grid.students[setting]:
        student, inner = params.students[name], getattr(config, "embedding_size", None) or config.hidden_size
        start = params.initialisation
        if inner != config.hidden_size and start != "random" and student.family and student.width > inner:
            raise StudyError(f"students.{name}.width = {student.width}; the teacher's embeddings have {inner} channels")


def _check_files(folder: Path, config: Any) -> None:
    """Refuse weights that are damaged or of other shapes than the config says, and a folder that has none to read."""
    weights = sorted(folder.glob("*.safetensors"))
    with torch.device("meta"):  # shapes alone
        encoder = AutoModel.from_config(config)
    shapes = {key: list(own.shape) for key, own in encoder.state_dict().items()}
    prefix = f"{encoder.base_model_prefix}."
    for file in weights:
        with safe_open(file, "pt") as stored:  # header and size agree
            for key in stored.keys():  # noqa: SIM118, no dictionary
                shape = stored.get_slice(key).get_shape()
                if (asked := shapes.get(key.removeprefix(prefix), shape)) != shape:
                    raise ValueError(f"{file.name}: {key} has the shape {shape}; by config.json it is {asked}")
    if not weights:
        raise ValueError("it has no weights in model.safetensors; pickled ones are not read")


def _check_head(setting: str, folder: Path, config: Any) -> None:
    """Refuse files without the weights of a head."""
    weights, index = folder / "model.safetensors", folder / "model.safetensors.index.json"
    if weights.is_file():
        with safe_open(weights, "pt") as file:
            names = set(file.keys())
    elif index.is_file():
        names = set(json.loads(index.read_bytes())["weight_map"])
    else:
        return
    wanted = f"{family_of(config).dense}.weight"
    if wanted not in names:
        raise StudyError(
            f"settings.{setting}.teacher.head = own: its file has no {wanted}, so no language-modelling head;"
            " allowed: fit, adapt"
        )
