"""What a teacher's files say of it before its weights are read: family, sizes, head, pooling."""

from __future__ import annotations

import json
import os
import socket
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

from study.families import FAMILIES, SIZES
from study.files import StudyError, UnreachableError, content_hash, find_root

#: Teachers inside the pinned packages of study.data.sources, and the sizes of each.
EMBEDDED_SIZES = {
    "all-minilm-l6-v2": (6, 384, 12, 1536),
    "multilingual-e5-small": (12, 384, 12, 1536),
    "multilingual-e5-small-genuine": (12, 384, 12, 1536),
    "all-mpnet-base-v2": (12, 768, 12, 3072),
}
#: Where they are on the hub.
HUB_NAMES = {
    "all-minilm-l6-v2": "sentence-transformers/all-MiniLM-L6-v2",
    "multilingual-e5-small": "intfloat/multilingual-e5-small",
    "multilingual-e5-small-genuine": "intfloat/multilingual-e5-small",
    "all-mpnet-base-v2": "sentence-transformers/all-mpnet-base-v2",
}
#: Positions of each.
EMBEDDED_POSITIONS = 512
#: Families of those that are not BERT.
EMBEDDED_FAMILIES = {"all-mpnet-base-v2": "mpnet"}
#: What a teacher may be.
ALLOWED = f"allowed: {', '.join(EMBEDDED_SIZES)}, a folder (relative to the project) or a hub name"
#: Architectures with a language-modelling head, beside those named ...ForMaskedLM.
WITH_HEAD = ("BertForPreTraining", "ErnieForPreTraining")


def find_folder(name: str, root: Path | None = None) -> Path | None:
    """The folder of a local teacher; None for a hub name.

    Args:
        name: as ``settings.<name>.teacher.name``. root: the study's folder, which relative names start from.

    Raises:
        StudyError: the name can only be that of a folder, and there is none.
    """
    path = Path(os.path.expanduser(name))
    if not path.is_absolute():
        try:
            path = (root or find_root()) / path
        except StudyError:  # outside any study: from here
            path = path.absolute()
    if path.is_dir():
        return path
    if name.startswith((".", "/", "~")) or name.count("/") > 1 or path.exists():
        raise StudyError(f"teacher {name!r}: no such folder; {ALLOWED}")
    return None


def hub_name(name: str, root: Path | None = None) -> str | None:
    """Where a teacher is on the hub; None of a folder. ``name``, ``root``: as of :func:`find_folder`."""
    return HUB_NAMES.get(name) or (name if find_folder(name, root) is None else None)


def file_of(name: str, file: str, root: Path | None = None) -> Path | None:
    """A small file of a teacher: in its folder, the hub's cache or, fetched, from the hub; None where it has none.

    Raises:
        UnreachableError: neither folder nor cache have it, and the hub cannot be reached. StudyError: no such teacher.
    """
    folder = find_folder(name, root)
    if folder is not None:
        return folder / file if (folder / file).is_file() else None
    from huggingface_hub import constants, hf_hub_download, try_to_load_from_cache
    from huggingface_hub.errors import EntryNotFoundError, HFValidationError, LocalEntryNotFoundError
    from huggingface_hub.errors import RepositoryNotFoundError as NotThereError

    try:
        cached = try_to_load_from_cache(name, file)
        if cached is not None:
            return Path(cached) if isinstance(cached, str) else None
        if not constants.HF_HUB_OFFLINE and not any(key.lower().endswith("_proxy") for key in os.environ):
            socket.getaddrinfo(urlsplit(constants.ENDPOINT).hostname, 443)  # else every file is tried for half a minute
        return Path(hf_hub_download(name, file, etag_timeout=5))
    except (LocalEntryNotFoundError, socket.gaierror):
        why = "HF_HUB_OFFLINE is set" if constants.HF_HUB_OFFLINE else "the hub cannot be reached"
        raise UnreachableError(
            f"teacher {name!r}: no folder of the project, not in the hub's cache, and {why}; {ALLOWED}"
        ) from None
    except EntryNotFoundError:
        return None
    except (NotThereError, HFValidationError):
        raise StudyError(f"teacher {name!r}: neither a folder of the project nor on the hub; {ALLOWED}") from None
    except OSError as error:
        raise UnreachableError(f"teacher {name!r}: {' '.join(str(error).split())}; {ALLOWED}") from None


def encoder_subfolder(name: str, root: Path | None = None) -> str:
    """Where the encoder is below a teacher's folder: that of the Transformer module of sentence-transformers, else ''.

    Raises:
        StudyError: ``modules.json`` names no Transformer.
    """
    modules = _json_of(name, "modules.json", root)
    for module in modules or ():
        if module["type"].endswith("Transformer"):
            return str(module["path"])
    if modules is None:
        return ""
    raise StudyError(f"teacher {name!r}: its modules.json names no Transformer; allowed: a Transformer module")


def read_teacher(name: str, root: Path | None = None) -> dict[str, Any]:
    """Keys of ``settings.<name>.teacher`` that the teacher's files tell: family, sizes, head and pooling.

    ``head`` is ``own`` where the architecture has a language-modelling head, else ``fit``; ``pooling`` is there for
    models of sentence-transformers alone.

    Raises:
        StudyError: no such teacher, a file that cannot be read, or a family that is not supported; one line.
    """
    modules = _json_of(name, "modules.json", root)
    config = _json_of(name, os.path.join(encoder_subfolder(name, root), "config.json"), root)
    if config is None:
        raise StudyError(f"teacher {name!r}: has no config.json; {ALLOWED}")
    family, kind = config.get("model_type"), config.get("position_embedding_type") or "absolute"
    if family not in FAMILIES or kind != "absolute":
        found = f"model_type = {family}" if family not in FAMILIES else f"position_embedding_type = {kind}"
        allowed = f"{', '.join(FAMILIES)}, absolute positions"
        raise StudyError(f"teacher {name!r}: {found} cannot be read; allowed: {allowed}")
    keys = FAMILIES[family].sizes
    lacking = [key for key in keys if not isinstance(config.get(key), int)]
    if lacking:
        raise StudyError(f"teacher {name!r}: config.json lacks {', '.join(lacking)}; allowed: a whole number each")
    architectures = config.get("architectures") or []
    own = any(each.endswith("ForMaskedLM") or each in WITH_HEAD for each in architectures)
    told = {size: config[key] for size, key in zip(SIZES, keys, strict=True)}
    told |= {"family": family, "head": "own" if own else "fit"}
    for module in modules or []:
        if module["type"].endswith("Pooling"):
            told["pooling"] = _pooling(_json_of(name, os.path.join(module["path"], "config.json"), root) or {})
    return told


def complete(name: str, teacher: dict[str, Any], root: Path, used: bool = True) -> dict[str, Any]:
    """``settings.<name>.teacher`` with what was left out: from its files, or what is known of an embedded teacher.

    Args:
        used: whether the grid has the setting; the files of others are read for sizes alone.

    Raises:
        StudyError: the files cannot be read, or say otherwise than what was typed; one line.
    """
    own, key = teacher.get("name"), f"settings.{name}.teacher"
    if not isinstance(own, str):
        return teacher
    typed = {part: value for part, value in teacher.items() if value is not None}
    if own in EMBEDDED_SIZES:
        family = {"family": EMBEDDED_FAMILIES[own]} if own in EMBEDDED_FAMILIES else {}
        known = dict(zip(SIZES, EMBEDDED_SIZES[own], strict=True))
        agree(key, {part: typed[part] for part in (*SIZES, "head") if part in typed}, known | {"head": "fit"})
        return known | family | typed
    if typed.keys() >= {*SIZES} and ("head" in typed or not used):
        return typed
    try:
        told = read_teacher(own, root)
    except StudyError as error:
        typing = f"; or type {', '.join(SIZES)}, family and head" if isinstance(error, UnreachableError) else ""
        raise StudyError(f"{key}: {error}{typing}") from None
    agree(key, typed, told)
    return told | typed


def agree(key: str, typed: dict[str, Any], told: dict[str, Any]) -> None:
    """Refuse a teacher whose typed keys are not what its files tell.

    Raises:
        StudyError: the first key that differs, or a head of its own where there is none.
    """
    for part in (*SIZES, "family", "pooling"):
        if typed.get(part) is not None and typed[part] != told.get(part):
            found = told.get(part, "none")
            raise StudyError(f"{key}.{part} = {typed[part]}; the model has {found}; allowed: {found}, or no such key")
    if typed.get("head") == "own" and told["head"] != "own":
        raise StudyError(f"{key}.head = own: the model has no language-modelling head; allowed: fit, adapt")


def files_hash(name: str, root: Path | None = None) -> str | None:
    """SHA-256 of a local teacher's files, so that other files under the same name are noticed; None for all others."""
    try:
        folder = None if name in EMBEDDED_SIZES else find_folder(name, root)
    except StudyError:  # all of it was typed: it is missed where it is loaded
        return None
    return content_hash(folder) if folder else None


def _pooling(config: dict[str, Any]) -> str:
    """How a Pooling module pools: mean, cls, max..., several joined by +."""
    prefix = "pooling_mode_"
    named = [key.removeprefix(prefix) for key, on in config.items() if key.startswith(prefix) and on is True]
    return config.get("pooling_mode") or "+".join(key.split("_token")[0] for key in named) or "mean"


def _json_of(name: str, file: str, root: Path | None) -> Any:
    path = file_of(name, file, root)
    try:
        return json.loads(path.read_bytes()) if path else None
    except (OSError, ValueError) as error:
        raise StudyError(f"teacher {name!r}: {file} cannot be read ({error})") from None
