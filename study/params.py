"""Reading params.yaml: a profile laid over it, variants expanded into methods, every mistake told in one line."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from pydantic import TypeAdapter, ValidationError
from ruamel.yaml import YAML
from ruamel.yaml.constructor import DuplicateKeyError
from ruamel.yaml.error import MarkedYAMLError, YAMLError

from study.config import Params
from study.files import DEFAULT_PROFILE, StudyError, find_root, profile_folder
from study.methods import METHOD, PARTS, Variant, words_of
from study.neighbours_options import NOTEBOOKS as SYSTEMS
from study.teachers import EMBEDDED_POSITIONS, EMBEDDED_SIZES, complete

#: Tasks and methods that params may name as if they declared them.
PRESETS = Path(__file__).with_name("presets.yaml")


def expand(methods: dict[str, Any], variants: dict[str, Any]) -> tuple[dict[str, Any], dict[str, Any]]:
    """The methods with those that variants make of them, and the membership of each made one.

    Raises:
        ValueError: a variant that extends nothing, itself or another variant, that changes nothing or several keys by
            lists, whose values a method does not have, or that makes a name twice; one line.
    """
    made, memberships = dict(methods), {}
    for name, raw in variants.items():
        if not isinstance(raw, dict) or not raw.get("extends"):
            raise ValueError(f"variants.{name} extends nothing; allowed: extends: one or more of {', '.join(methods)}")
        try:
            variant, key = Variant.model_validate(raw), f"variants.{name}"
        except ValidationError:
            told = f"variants.{name}.extends = {raw['extends']!r}"
            raise ValueError(f"{told}; allowed: one or more of {', '.join(methods)}") from None
        if not variant.changes:
            raise ValueError(f"{key} changes nothing; allowed: at least one key of a method")
        lists = [option for option, value in variant.changes.items() if isinstance(value, list)]
        if len(lists) > 1 or any(not variant.changes[option] for option in lists):
            raise ValueError(f"{key}: {', '.join(lists)} are lists; allowed: one list, not empty")
        for base in [variant.extends] if isinstance(variant.extends, str) else variant.extends:
            if base not in methods:
                what = "itself" if base == name else f"{base!r}, which is no entry of methods"
                raise ValueError(f"{key} extends {what}; allowed: {', '.join(methods)}")
            try:
                METHOD.validate_python(methods[base])
            except ValidationError:
                continue  # a mistake of the method itself is told as such
            for suffix, changes in variant.options():
                method, values = f"{base}-{name}{suffix}", {**methods[base], **changes}
                if method in made:
                    raise ValueError(f"{key} makes {method!r}, which is there already; allowed: each name once")
                try:
                    METHOD.validate_python(values)
                except ValidationError as error:
                    first = error.errors(include_url=False)[0]
                    option = str(first["loc"][-1]) if len(first["loc"]) > 1 else ""
                    value = f".{option} = {first['input']!r}" if option else ""
                    raise ValueError(f"{key}{value}: of {base}: {words_of(first, METHOD)}") from None
                made[method] = values
                memberships[method] = {"extends": base, "variant": name, "changes": changes}
    return made, memberships


def load_params(profile: str = DEFAULT_PROFILE, root: Path | None = None) -> Params:
    """Read and validate params.yaml, with the profile's own params.yaml laid over it.

    Args:
        profile: the name of a folder of ``profiles/``, or the default one, which changes nothing.
        root: the study's folder; by default found from the working folder.

    Raises:
        StudyError: no such profile; a file cannot be read, or a key is unknown, missing, of a wrong type or impossible;
            one line that names the key, the value and what is allowed.
    """
    root = root or find_root()
    path = root / "params.yaml"
    values = read_yaml(path)
    if profile != DEFAULT_PROFILE:
        path = profile_folder(profile, root) / "params.yaml"
        values = merge(values, read_yaml(path))
    presets = read_yaml(PRESETS)
    for section in ("tasks", "references"):
        if isinstance(own := values.get(section) or {}, dict):
            values[section] = presets[section] | own
    if isinstance(own := values.get("neighbours") or {}, dict):
        values["neighbours"] = merge(presets["neighbours"], own)
    if isinstance(values.get("methods"), dict):
        values["methods"] = values["methods"] | merge(presets["methods"], values["methods"])
    methods, variants = values.get("methods"), values.get("variants") or {}
    try:
        values = values | _with_teachers(values, root)
        if isinstance(methods, dict) and isinstance(variants, dict):
            made, memberships = expand(methods, variants)
            values = values | {"methods": made, "memberships": memberships}
        params = Params.model_validate(values)
        for setting in params.grid.settings:
            if params.settings[setting].teacher.name in EMBEDDED_SIZES:
                check_lengths(params, setting, EMBEDDED_POSITIONS)
        return params
    except ValueError as error:
        told = one_line(error) if isinstance(error, ValidationError) else error
        raise StudyError(f"{path.relative_to(root)}: {told}") from None


def check_lengths(params: Params, setting: str, limit: int) -> None:
    """Refuse sequences longer than the teacher of a setting reads.

    Raises:
        StudyError: names the key.
    """
    own = params.settings[setting]
    lengths = {f"{key}.sequence_length": getattr(params, key).sequence_length for key in ("corpus", "latency")}
    tasks = {name: params.finetuning.tasks.get(name) for name in (*own.tasks, *own.candidates)}
    lengths |= {f"finetuning.tasks.{name}.max_length": budget.max_length for name, budget in tasks.items() if budget}
    for key, length in lengths.items():
        if length > limit:
            raise StudyError(f"{key} = {length}; allowed: at most {limit}, what settings.{setting}.teacher reads")


def _with_teachers(values: dict[str, Any], root: Path) -> dict[str, Any]:
    """``settings`` with their teachers complete; what is no setting is left for the schema to refuse."""
    settings, grid = values.get("settings"), values.get("grid")
    run = grid.get("settings") if isinstance(grid, dict) else None
    if not (isinstance(settings, dict) and isinstance(run, list)):
        return {}
    told = {
        name: own | {"teacher": complete(name, own["teacher"], root, name in run)}
        for name, own in settings.items()
        if isinstance(own, dict) and isinstance(own.get("teacher"), dict)
    }
    return {"settings": settings | told}


def read_yaml(path: Path) -> dict[str, Any]:
    """A YAML file that holds a mapping.

    Raises:
        StudyError: it cannot be read; one line that says which line of it is wrong.
    """
    try:
        content = path.read_bytes()
    except OSError as error:
        raise StudyError(f"{path}: {error.strerror}") from None
    for number, line in enumerate(content.split(b"\n"), start=1):
        for mark, name in ((b"\xef\xbb\xbf", "a byte-order mark"), (b"\r", "a Windows line end"), (b"\t", "a tab")):
            if mark in (line if mark != b"\t" else line.partition(b"#")[0]):
                raise StudyError(f"{path}: line {number} has {name}; allowed: UTF-8 with plain line ends and spaces")
    try:
        values = YAML(typ="safe").load(content.decode())
    except UnicodeDecodeError as error:
        raise StudyError(f"{path}: not UTF-8 at byte {error.start}") from None
    except MarkedYAMLError as error:
        where = f"line {error.problem_mark.line + 1}: " if error.problem_mark else ""
        repeated = isinstance(error, DuplicateKeyError)
        what = str(error.problem).split(" with value")[0] if repeated else f"not valid YAML: {error.problem}"
        raise StudyError(f"{path}: {where}{what}") from None
    except YAMLError as error:
        raise StudyError(f"{path}: not valid YAML: {' '.join(str(error).split())}") from None
    if not isinstance(values, dict):
        raise StudyError(f"{path}: holds {type(values).__name__}; allowed: a mapping of keys to values")
    return values


def merge(base: dict[str, Any], overrides: dict[str, Any]) -> dict[str, Any]:
    """``base`` with the values of ``overrides``, mapping by mapping; lists are replaced. Neither is changed."""
    merged = dict(base)
    for key, value in overrides.items():
        both = isinstance(value, dict) and isinstance(base.get(key), dict)
        merged[key] = merge(base[key], value) if both else value
    return merged


def one_line(error: ValidationError) -> str:
    """The first mistake of a validation, unknown keys before missing ones: key, value and what is allowed."""
    first, *others = sorted(error.errors(include_url=False), key=lambda own: own["type"] != "extra_forbidden")
    location = list(first["loc"])
    # pydantic names the objective, the system and the kind of text, too
    named = {"methods": (2, [*PARTS, "sum", "none"]), "neighbours": (2, SYSTEMS), "settings": (4, ["embedded", "own"])}
    place, names = named.get(str(location[0]) if location else "", (0, ()))
    if place and location[place : place + 1] and location[place] in names:
        del location[place]
    key = ".".join(str(part) for part in location if part != "[key]")
    value = "" if isinstance(first["input"], dict) or first["type"] == "missing" else f" = {first['input']!r}"
    message = words_of(first, TypeAdapter(Params) if error.title == Params.__name__ else None)
    beside = [own for own in others if own["type"] == "missing" and own["loc"][:-1] == first["loc"][:-1]]
    if first["type"] == "extra_forbidden" and beside:
        message += f", where {', '.join(str(own['loc'][-1]) for own in beside)} is missing"
        others = [own for own in others if own not in beside]
    more = f" (and {len(others)} more)" if others else ""
    return f"{key}{value}: {message}{more}" if key else f"{message}{more}"
