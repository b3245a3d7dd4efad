"""A study of one's own: a commented profile folder, written once it is known to be right."""

from __future__ import annotations

import io
import math
import re
import shutil
from collections.abc import Sequence
from pathlib import Path
from typing import Any, get_args

from ruamel.yaml import YAML
from ruamel.yaml.error import YAMLError

from study.config import NAME, NAMES, Params
from study.families import SIZES
from study.files import DEFAULT_PROFILE, StudyError, find_root, write_file
from study.methods import TEXTS, AttentionRelation, TaskName
from study.params import load_params
from study.plan import resolve
from study.teachers import EMBEDDED_SIZES, read_teacher

TEMPLATE = """\
# {profile}: a study of one's own. `make repro PROFILE={profile}` runs it; deleting this folder undoes it.
# Every key of params.yaml may stand here; what does not is as there.
grid:
  settings: [{profile}]
  students: {{{profile}: [{student}]}}  # names under `students`, here or in params.yaml
  seeds: [1]              # several seeds tell methods apart
  # methods: [none, mlm, od, mha-minilmv2]
settings:
  {profile}:
    teacher: {teacher}
    vocabulary: {vocabulary}  # full | trimmed: the pieces that occur in texts and tasks
    texts:                # embedded names, or files / dataset with language, column, limit, name, licence
{texts}
    tasks: [{tasks}]
{students}{fitted}{declared}# For a first try in minutes, whose scores mean nothing, take the # away:
# adaptation: {{steps: 10, warmup_steps: 2, evaluate_every: 5}}  # of a teacher without a head of its own
# distillation: {{steps: 8, evaluate_every: 4, save_every: 4}}
"""
#: Tokens of a sequence and of a task's text, unless the teacher reads fewer.
LENGTH = 128


def new_study(
    profile: str, teacher: str, texts: Sequence[str], tasks: Sequence[str], language: str, student: str | None
) -> tuple[Path, list[str]]:
    """Write ``profiles/<profile>/params.yaml``; a profile that `check` refuses is not left behind.

    Args:
        teacher: an embedded one, or a folder or hub name; its files tell sizes, family and head.
        texts: embedded names, patterns of files of plain text, or declarations in YAML.
        tasks: names of embedded tasks or presets, or ``name={declaration in YAML}``.
        language: of texts and tasks that do not say theirs.
        student: a name under ``students``; by default the first that fits, else one of half the teacher's layers.

    Returns:
        The file, and what `check` says of its data.

    Raises:
        StudyError: the profile is there, a value cannot be read, or the profile would not pass `check`.
    """
    root = find_root()
    folder = root / "profiles" / profile
    if not NAME.fullmatch(profile):
        raise StudyError(f"profile {profile!r} cannot be a name of files and stages; allowed: {NAMES}")
    if profile == DEFAULT_PROFILE:
        raise StudyError(f"profile {profile!r} is params.yaml itself; allowed: a new name")
    if folder.exists():
        raise StudyError(f"profiles/{profile} is there already; allowed: a new name, or delete that folder")
    params = load_params(root=root)
    written_teacher, sizes, vocabulary = _teacher(params, teacher, root)
    chosen, made = _student(params, sizes, student)
    width = math.gcd(sizes["width"], made["width"] if made else params.students[chosen].width)
    named, declared = _tasks(params, tasks, language)
    listed = "\n".join(f"      - {_flow(_text(text, language))}" for text in texts)
    written = "".join(f"  {name}: {_flow(own)}\n" for name, own in declared.items())
    from study.data.examine import check_data  # slow to load: what is wrong above is told at once
    from study.data.teachers import check_teachers, longest

    length = min(LENGTH, longest(teacher, root))
    budget = f"{{train: null, development: null, test: null, max_length: {length}}}"
    budgets = "".join(f"    {name}: {budget}\n" for name in declared)
    content = TEMPLATE.format(
        profile=profile,
        student=chosen,
        teacher=_flow(written_teacher),
        vocabulary=vocabulary,
        texts=listed,
        tasks=", ".join(named),
        students=f"students:\n  {chosen}: {_flow(made)}\n" if made else "",
        fitted=_fitted(params, width, length),
        declared=f"tasks:\n{written}finetuning:\n  tasks:  # examples used; null: all\n{budgets}" if declared else "",
    )
    try:
        write_file(folder / "params.yaml", content)
        plan = resolve(profile, root)
        return folder / "params.yaml", [*check_teachers(plan.params, root), *check_data(plan)]
    except BaseException:
        shutil.rmtree(folder, ignore_errors=True)
        raise


def _teacher(params: Params, name: str, root: Path) -> tuple[dict[str, Any], dict[str, Any], str]:
    """What the file says of the teacher, its sizes, and the vocabulary."""
    for setting in params.settings.values():
        if setting.teacher.name == name:
            return {"name": name}, setting.teacher.model_dump(), setting.vocabulary
    if name in EMBEDDED_SIZES:
        told = dict(zip(SIZES, EMBEDDED_SIZES[name], strict=True))
        return {"name": name}, told, "trimmed" if name.startswith("multilingual") else "full"
    try:
        told = read_teacher(name, root)
    except StudyError as error:
        raise StudyError(f"--teacher: {error}") from None
    return {"name": name, "head": told["head"]}, told, "full"


def _student(params: Params, teacher: dict[str, Any], name: str | None) -> tuple[str, dict[str, Any] | None]:
    if name is not None:
        if name not in params.students:
            raise StudyError(f"--student {name}: unknown; allowed: {', '.join(params.students)}")
        return name, None
    for known, own in params.students.items():
        fits = all(getattr(own, size) <= teacher[size] for size in ("layers", "width", "intermediate"))
        if fits and own.heads == teacher["heads"] and not own.learning_rates:
            return known, None
    layers = max(1, teacher["layers"] // 2)
    sizes = {key: teacher[key] for key in ("width", "heads", "intermediate")}
    return f"L{layers}-H{teacher['width']}", {"layers": layers, **sizes}


def _fitted(params: Params, width: int, length: int) -> str:
    """Lines for what the values of params.yaml would be too many for: relation heads, and tokens of a sequence.

    Args:
        width: the greatest common divisor of the teacher's and the student's. length: tokens the teacher reads.
    """
    lines, heads = [], {}
    for name in params.grid.methods:
        own = params.methods[name]
        if isinstance(own, AttentionRelation) and width % own.relation_heads:
            most = max(count for count in range(1, own.relation_heads) if width % count == 0)
            heads[name] = {"relation_heads": most}
    if heads:
        lines.append(f"methods: {_flow(heads)}  # a divisor of both widths\n")
    for key in ("corpus", "latency"):
        if getattr(params, key).sequence_length > length:
            lines.append(f"{key}: {{sequence_length: {length}}}  # the teacher reads no more\n")
    return "".join(lines)


def _text(value: str, language: str) -> str | dict[str, Any]:
    if value in TEXTS:
        return value
    if re.fullmatch(r"[\w-]*", value):
        raise StudyError(
            f"--text {value}: unknown; allowed: {', '.join(TEXTS)}, 'files/*.txt' or '{{files: ..., ...}}'"
        )
    read = _yaml("--text", value)
    own = read if isinstance(read, dict) else {"files": value}
    return own if "language" in own else own | {"language": language}


def _tasks(params: Params, values: Sequence[str], language: str) -> tuple[list[str], dict[str, Any]]:
    names: list[str] = []
    declared: dict[str, Any] = {}
    for value in values:
        name, equals, declaration = value.partition("=")
        names.append(name)
        if equals:
            own = _yaml(f"--task {name}", declaration)
            if not isinstance(own, dict):
                raise StudyError(f"--task {value}: allowed: name={{files: ..., text: ..., label: ..., metric: ...}}")
            splits = own.get("files") or own.get("splits")
            several = isinstance(splits, dict) and isinstance(splits.get("test"), dict)
            declared[name] = own if several or "language" in own else own | {"language": language}
        elif name not in get_args(TaskName) and name not in params.tasks:
            allowed = ", ".join([*get_args(TaskName), *params.tasks])
            raise StudyError(f"--task {value}: unknown; allowed: {allowed}, or name={{files: ...}}")
    return names, declared


def _yaml(option: str, value: str) -> Any:
    try:
        return YAML(typ="safe").load(value)
    except YAMLError as error:
        problem = getattr(error, "problem", None) or " ".join(str(error).split())
        raise StudyError(f"{option}: {value!r} is not valid YAML: {problem}") from None


def _flow(value: Any) -> str:
    """A value on one line of YAML."""
    if isinstance(value, str):
        return value
    yaml: Any = YAML(typ="safe", pure=True)
    stream = io.StringIO()
    yaml.default_flow_style, yaml.width, yaml.sort_base_mapping_type_on_output = True, 10_000, False
    yaml.dump(value, stream)
    return stream.getvalue().strip()
