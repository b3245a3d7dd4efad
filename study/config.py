"""params.yaml as validated models, and the one place that knows where the study's files are."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Annotated, Literal

from pydantic import BaseModel, ConfigDict, Field, ValidationError, model_validator
from ruamel.yaml import YAML
from ruamel.yaml.error import YAMLError

from study.mappings import STRATEGIES


class StudyError(Exception):
    """A mistake a user can mend; shown as one line, without a traceback."""


class Section(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True, strict=True, validate_default=True)

    @model_validator(mode="after")
    def _nothing_is_listed_twice(self):
        for name, value in self:
            lists = {f"{name}.{key}": own for key, own in value.items()} if isinstance(value, dict) else {name: value}
            for key, values in lists.items():
                if isinstance(values, list) and len(values) > len(set(values)):
                    raise ValueError(f"{key} = {values} names something twice; allowed: each once")
        return self


Positive = Annotated[int, Field(gt=0)]
Seed = Annotated[int, Field(ge=0)]
Fraction = Annotated[float, Field(ge=0, le=1)]
LearningRate = Annotated[float, Field(gt=0, le=1)]
Weight = Annotated[float, Field(ge=0)]
Initialisation = Literal["random", "teacher-embeddings", "teacher-layers"]
Inputs = Literal["masked", "plain"]
TextName = Literal[
    "wikipedia",
    "boolq",
    "quac",
    "xsum",
    "multilexsum",
    "sotu",
    "wikipedia-es",
    "wikipedia-fr",
    "interface-bg",
    "interface-de",
    "interface-el",
    "interface-ru",
    "interface-vi",
    "interface-zh",
]
FastPath = Literal["kept-memory", "fused-losses", "rounded-teacher", "shared-teacher"]
TaskName = Literal["sentiment", "sts-b", "boolq", "privacy-qa", "topic", "topic-multilingual", "intents", "retrieval"]

#: Values of a list that `use_profile` writes on one line of params.yaml; longer ones get a line each.
LISTED_ON_ONE_LINE = 4
#: Languages each task has data in (ISO 639-1), English first; tasks that are not named here have English alone.
TASK_LANGUAGES = {
    "topic-multilingual": ("en", "es", "fr"),
    "intents": ("en", "ar", "bg", "de", "el", "es", "fr", "hi", "ru", "th", "vi", "zh"),
    "retrieval": ("en", "ar", "bg", "de", "el", "es", "fr", "hi", "vi", "zh"),
}


class Encoder(Section):
    """Shape of a Transformer encoder; ``width`` is the hidden size, ``intermediate`` the feed-forward width."""

    layers: Positive
    width: Positive
    heads: Positive
    intermediate: Positive

    @model_validator(mode="after")
    def _heads_divide_width(self):
        if self.width % self.heads:
            raise ValueError(
                f"heads = {self.heads} does not divide width = {self.width}; allowed: a divisor of the width"
            )
        return self


class Teacher(Encoder):
    name: str


class Student(Encoder):
    """A student's shape, and the learning rates it was tuned for, by method, in place of the methods' own."""

    learning_rates: dict[str, LearningRate] = {}


class Setting(Section):
    teacher: Teacher
    vocabulary: Literal["full", "trimmed"]
    texts: list[TextName] = Field(min_length=1)
    tasks: list[TaskName] = Field(min_length=1)

    @model_validator(mode="after")
    def _something_is_learnt(self):
        if self.tasks == ["retrieval"]:
            raise ValueError("tasks = ['retrieval'] is a probe alone; allowed: at least one task that is learnt")
        return self


class Ablations(Section):
    methods: list[str]
    students: list[str]


class Grid(Section):
    settings: list[str] = Field(min_length=1)
    methods: list[str] = Field(min_length=1)
    students: dict[str, list[str]]
    seeds: list[Seed] = Field(min_length=1)
    ablations: dict[str, Ablations] = {}

    def cells(self, setting: str) -> list[tuple[str, str, int]]:
        """Method, student and seed of every run of a setting."""
        return [(m, s, seed) for s in self.students.get(setting, []) for m in self.methods for seed in self.seeds]


class Corpus(Section):
    sequence_length: Annotated[int, Field(ge=8)]
    validation_sequences: Positive
    max_tokens: Positive | None
    overlap_words: Annotated[int, Field(ge=8)]
    language_exponent: Fraction
    seed: Seed


class Masking(Section):
    fraction: Annotated[float, Field(gt=0, lt=1)]
    mask_token: Fraction
    random_token: Fraction

    @model_validator(mode="after")
    def _shares_fit(self):
        if self.mask_token + self.random_token > 1:
            raise ValueError(f"mask_token + random_token = {self.mask_token + self.random_token}; allowed: at most 1")
        return self


class Adaptation(Section):
    steps: Positive
    batch_size: Positive
    learning_rate: LearningRate
    warmup_steps: Annotated[int, Field(ge=0)]
    weight_decay: Weight
    evaluate_every: Positive
    patience: Positive
    min_improvement: Weight


class Distillation(Section):
    steps: Positive
    batch_size: Positive
    accumulation_steps: Positive
    inputs: Inputs
    warmup_fraction: Fraction
    weight_decay: Weight
    adam_epsilon: Annotated[float, Field(gt=0)]
    max_gradient_norm: Annotated[float, Field(gt=0)]
    evaluate_every: Positive
    validation_sequences: Positive
    save_every: Positive

    @model_validator(mode="after")
    def _batch_divides(self):
        if self.batch_size % self.accumulation_steps:
            raise ValueError(
                f"accumulation_steps = {self.accumulation_steps} does not divide batch_size = {self.batch_size}"
            )
        return self


class Tuning(Section):
    students: dict[str, list[str]]
    learning_rates: list[LearningRate] = Field(min_length=1)
    steps: Positive
    seed: Seed


class Untrained(Section):
    objective: Literal["none"]
    initialisation: Initialisation | None = None


class Trained(Section):
    """What a method may set for itself instead of the value that all methods share: for ablations."""

    learning_rate: LearningRate
    initialisation: Initialisation | None = None
    inputs: Inputs | None = None
    steps: Positive | None = None


class MaskedLanguageModelling(Trained):
    objective: Literal["masked_language_modelling"]
    inputs: Literal["masked"] | None = None


class OutputDistribution(Trained):
    objective: Literal["output_distribution"]
    inputs: Literal["masked"] | None = None
    temperature: Annotated[float, Field(gt=0)] = 1.0
    positions: Literal["masked", "all"] = "masked"
    mlm_weight: Weight = 0.0


class HiddenState(Trained):
    objective: Literal["hidden_state"]
    mapping: Literal[STRATEGIES]


class AttentionRelation(Trained):
    objective: Literal["attention_relation"]
    teacher_layer_from_top: Annotated[int, Field(ge=0)] = 1
    relation_heads: Positive = 12


class DirectAttention(Trained):
    objective: Literal["direct_attention"]
    teacher_layer_from_top: Annotated[int, Field(ge=0)] = 1


Method = Annotated[
    Untrained | MaskedLanguageModelling | OutputDistribution | HiddenState | AttentionRelation | DirectAttention,
    Field(discriminator="objective"),
]


class TaskBudget(Section):
    train: Positive | None
    development: Positive | None
    test: Positive | None
    max_length: Annotated[int, Field(ge=8)]
    languages: list[str] = ["en"]


class Finetuning(Section):
    seeds: list[Seed] = Field(min_length=1)
    learning_rates: list[LearningRate] = Field(min_length=1)
    epochs: Positive
    batch_size: Positive
    warmup_fraction: Fraction
    weight_decay: Weight
    pad_to_multiple_of: Positive
    pairs: Literal["separate", "joint"]
    tasks: dict[TaskName, TaskBudget]

    @model_validator(mode="after")
    def _languages_have_data(self):
        for name, task in self.tasks.items():
            known, key = TASK_LANGUAGES.get(name, ("en",)), f"tasks.{name}.languages"
            for language in task.languages:
                if language not in known:
                    raise ValueError(f"{key}: {name} has no data in {language!r}; allowed: {', '.join(known)}")
            if known[0] not in task.languages:
                raise ValueError(
                    f"{key} = {task.languages} lacks {known[0]!r}, the language {name} is trained on;"
                    f" allowed: {known[0]} and any of {', '.join(known[1:]) or 'no other'}"
                )
            if name == "retrieval" and task.languages == ["en"]:
                raise ValueError(f"{key} = ['en'] is nothing to compare; allowed: en and any of {', '.join(known[1:])}")
        return self


class Latency(Section):
    sequence_length: Annotated[int, Field(ge=2)]
    batch_sizes: list[Positive] = Field(min_length=1)
    warmup_runs: Annotated[int, Field(ge=0)]
    runs: Annotated[int, Field(ge=3)]
    threads: list[Positive] = Field(min_length=1)


class Representations(Section):
    sequences: Positive
    relation_sequences: Positive


class Benchmark(Section):
    vocabulary: Annotated[int, Field(ge=1000)]
    teacher: Encoder
    student: Encoder
    sequence_length: Annotated[int, Field(ge=8)]
    batch_size: Positive
    methods: list[str] = Field(min_length=1)
    peers: list[str]
    threads: Positive
    warmup_steps: Positive
    steps: Annotated[int, Field(ge=3)]
    rounds: Positive


class Params(Section):
    """All of params.yaml. Rules that span sections are checked here."""

    profile: str
    precision: Literal["auto", "bf16", "fp32"]
    attention_implementation: Literal["eager", "sdpa"]
    fast_paths: list[FastPath]
    grid: Grid
    settings: dict[str, Setting]
    corpus: Corpus
    masking: Masking
    adaptation: Adaptation
    students: dict[str, Student]
    initialisation: Initialisation
    distillation: Distillation
    tuning: Tuning
    methods: dict[str, Method]
    finetuning: Finetuning
    latency: Latency
    representations: Representations
    benchmark: Benchmark

    def of_ablations(self, setting: str) -> Params | None:
        """These parameters with the setting's ablations as their grid, what they vary included; None without any."""
        ablations = self.grid.ablations.get(setting)
        if not ablations or not ablations.methods:
            return None
        methods = [*self.grid.methods, *ablations.methods]
        students = {**self.grid.students, setting: ablations.students}
        grid = self.grid.model_copy(update={"methods": methods, "students": students, "ablations": {}})
        return self.model_copy(update={"grid": grid})

    def of_method(self, name: str, student: str | None = None) -> Params:
        """These parameters with what the method sets for itself in the place of what all methods share.

        With a student, the learning rate is the one that the student was tuned for, if it was.
        """
        method = self.methods[name]
        own = {key: getattr(method, key) for key in ("inputs", "steps") if getattr(method, key, None) is not None}
        if student and (rate := self.students[student].learning_rates.get(name)):
            method = method.model_copy(update={"learning_rate": rate})
        return self.model_copy(
            update={
                "initialisation": method.initialisation or self.initialisation,
                "distillation": self.distillation.model_copy(update=own),
                "methods": self.methods | {name: method},
            }
        )

    @model_validator(mode="after")
    def _sections_agree(self):
        grid = self.grid
        lists = [
            ("grid.settings", grid.settings, self.settings),
            ("grid.methods", grid.methods, self.methods),
            ("grid.students", grid.students, self.settings),
            ("grid.ablations", grid.ablations, self.settings),
            ("tuning.students", self.tuning.students, self.settings),
        ]
        for key, by_setting in (("grid.students", grid.students), ("tuning.students", self.tuning.students)):
            lists += [(f"{key}.{name}", own, self.students) for name, own in by_setting.items()]
        for name, own in grid.ablations.items():
            lists.append((f"grid.ablations.{name}.methods", own.methods, self.methods))
            lists.append((f"grid.ablations.{name}.students", own.students, self.students))
        for key, names, known in lists:
            for name in names:
                if name not in known:
                    raise ValueError(f"{key}: {name!r} is unknown; allowed: {', '.join(known)}")
        for name in self.settings:
            if (name in self.grid.settings) != bool(self.grid.students.get(name)):
                allowed = (
                    "at least one student" if name in self.grid.settings else "[], or the setting in grid.settings"
                )
                raise ValueError(f"grid.students.{name} = {self.grid.students.get(name)}; allowed: {allowed}")
        trained = [name for name, method in self.methods.items() if not isinstance(method, Untrained)]
        rated = [(f"students.{name}.learning_rates", own.learning_rates) for name, own in self.students.items()]
        for key, names in (*rated, ("benchmark.methods", self.benchmark.methods)):
            for name in names:
                if name not in trained:
                    raise ValueError(f"{key}: {name!r} is unknown or not trained; allowed: {', '.join(trained)}")
        for name in self.grid.settings:
            for task in self.settings[name].tasks:
                if task not in self.finetuning.tasks:
                    raise ValueError(f"settings.{name}.tasks: {task!r} has no entry under finetuning.tasks")
            for student in self.grid.students[name]:
                self._student_fits(student, self.settings[name].teacher, f"settings.{name}.teacher")
                for method in self.grid.methods:
                    self._method_fits(method, student, self.settings[name].teacher)
        for name, students in self.tuning.students.items():
            for student in students:
                self._student_fits(student, self.settings[name].teacher, f"settings.{name}.teacher")
        for name, ablations in self.grid.ablations.items():
            self._ablations_fit(name, ablations)
        return self

    def _ablations_fit(self, setting: str, ablations: Ablations) -> None:
        where, run = f"grid.ablations.{setting}", self.grid.students.get(setting, [])
        if bool(ablations.methods) != bool(ablations.students):
            raise ValueError(
                f"{where}: methods = {ablations.methods}, students = {ablations.students}; allowed: both, or both []"
            )
        for student in ablations.students:
            if student not in run:
                raise ValueError(f"{where}.students: {student!r} is not in the grid; allowed: {', '.join(run)}")
            for method in ablations.methods:
                if method in self.grid.methods:
                    raise ValueError(f"{where}.methods: {method!r} is in grid.methods already; allowed: other methods")
                self._method_fits(method, student, self.settings[setting].teacher)

    def _student_fits(self, name: str, teacher: Teacher, where: str) -> None:
        student = self.students[name]
        for size in ("layers", "width", "intermediate"):
            own, limit = getattr(student, size), getattr(teacher, size)
            if own > limit:
                raise ValueError(f"students.{name}.{size} = {own} exceeds {where}.{size}; allowed: at most {limit}")

    def _method_fits(self, name: str, student_name: str, teacher: Teacher) -> None:
        method, student = self.methods[name], self.students[student_name]
        if (method.initialisation or self.initialisation) == "teacher-layers" and student.heads != teacher.heads:
            raise ValueError(
                f"students.{student_name}.heads = {student.heads}: initialisation 'teacher-layers' needs"
                f" {teacher.heads} heads, as the teacher has"
            )
        if student.learning_rates and not isinstance(method, Untrained) and name not in student.learning_rates:
            raise ValueError(
                f"students.{student_name}.learning_rates: {name} is missing; allowed: a rate for every method the"
                " student is trained with, or none at all (the methods' own)"
            )
        if isinstance(method, (AttentionRelation, DirectAttention)) and method.teacher_layer_from_top >= teacher.layers:
            raise ValueError(
                f"methods.{name}.teacher_layer_from_top = {method.teacher_layer_from_top} leaves no teacher layer;"
                f" allowed: 0 to {teacher.layers - 1}"
            )
        if isinstance(method, AttentionRelation):
            for width in (teacher.width, student.width):
                if width % method.relation_heads:
                    raise ValueError(
                        f"methods.{name}.relation_heads = {method.relation_heads} does not divide width {width}"
                        f" (teacher {teacher.width}, students.{student_name} {student.width});"
                        " allowed: a divisor of both"
                    )


def find_root(start: Path | None = None) -> Path:
    """The study's folder: the nearest one upward from ``start`` (default: here) that holds params.yaml and dvc.yaml."""
    start = (start or Path.cwd()).resolve()
    for folder in (start, *start.parents):
        if (folder / "params.yaml").is_file() and (folder / "dvc.yaml").is_file():
            return folder
    raise StudyError(f"no params.yaml beside a dvc.yaml in {start} or above; run this inside the study's folder")


def load_params(path: str | os.PathLike | None = None, profile: str | None = None) -> Params:
    """Read and validate params.yaml.

    Args:
        path: the file; by default the params.yaml of the study's folder (see :func:`find_root`).
        profile: when given and not the file's own, the values of ``profiles/<profile>.yaml`` beside the file are
            laid over it, as `make profile` would write them.

    Raises:
        StudyError: the file cannot be read, or a key is unknown, missing, of a wrong type or impossible; one line that
            names the key, the value and what is allowed.
    """
    path = Path(path) if path is not None else find_root() / "params.yaml"
    values = _read_yaml(path)
    if profile is not None and profile != values.get("profile"):
        values = _merge(values, _read_profile(path.parent, profile))
    try:
        return Params.model_validate(values)
    except ValidationError as error:
        raise StudyError(_one_line(path, error)) from None


def use_profile(name: str, path: Path | None = None) -> None:
    """Write the values of ``profiles/<name>.yaml`` into params.yaml, keeping its comments and every other key.

    Raises:
        StudyError: no such profile, or the outcome would be invalid; params.yaml is then left as it was.
    """
    path = path or find_root() / "params.yaml"
    load_params(path, profile=name)
    yaml = YAML()
    yaml.representer.add_representer(
        type(None), lambda writer, _: writer.represent_scalar("tag:yaml.org,2002:null", "null")
    )
    yaml.width = 200
    yaml.indent(mapping=2, sequence=4, offset=2)
    document = yaml.load(path)
    _merge(document, _read_profile(path.parent, name), in_place=True)
    draft = path.with_suffix(".yaml.new")
    with draft.open("w") as stream:
        yaml.dump(document, stream)
    load_params(draft)
    draft.replace(path)


def _read_yaml(path: Path) -> dict:
    try:
        values = YAML(typ="safe").load(path)
    except OSError as error:
        raise StudyError(f"{path}: {error.strerror}") from None
    except YAMLError as error:
        raise StudyError(f"{path}: not valid YAML: {' '.join(str(error).split())}") from None
    if not isinstance(values, dict):
        raise StudyError(f"{path}: holds {type(values).__name__}; allowed: a mapping of keys to values")
    return values


def _read_profile(folder: Path, name: str) -> dict:
    file = folder / "profiles" / f"{name}.yaml"
    if not file.is_file():
        known = ", ".join(sorted(p.stem for p in file.parent.glob("*.yaml")))
        raise StudyError(f"profile {name!r} is unknown; allowed: {known}")
    return {"profile": name, **_read_yaml(file)}


def _merge(base, overrides, in_place: bool = False):
    base = base if in_place else dict(base)
    for key, value in overrides.items():
        if isinstance(value, dict) and isinstance(base.get(key), dict):
            base[key] = _merge(base[key], value, in_place)
        elif isinstance(value, list) and in_place and isinstance(base.get(key), list):
            if not base[key]:  # an empty list has forgotten how it stood
                style = base[key].fa
                (style.set_flow_style if len(value) <= LISTED_ON_ONE_LINE else style.set_block_style)()
            base[key][:] = value
        else:
            base[key] = value
    return base


def _one_line(path: Path, error: ValidationError) -> str:
    first, *others = error.errors(include_url=False)
    tags = (
        "none",
        "masked_language_modelling",
        "output_distribution",
        "hidden_state",
        "attention_relation",
        "direct_attention",
    )
    location = list(first["loc"])
    if len(location) > 2 and location[0] == "methods" and location[2] in tags:
        del location[2]  # pydantic names the objective too
    key = ".".join(str(part) for part in location if part != "[key]")
    message = first["msg"].removeprefix("Value error, ")
    value = "" if isinstance(first["input"], dict) else f" = {first['input']!r}"
    if first["type"] == "extra_forbidden":
        message = "unknown key"
    elif first["type"] == "missing":
        message, value = "key is missing", ""
    more = f" (and {len(others)} more)" if others else ""
    return f"{path.name}: {key}{value}: {message}{more}" if key else f"{path.name}: {message}{more}"


class Layout:
    """Where the files of one profile and setting are, relative to the study's folder.

    ``runs/`` holds what DVC caches (models, data), ``reports/`` what git keeps (small results, figures, pages),
    ``scratch/`` what nobody keeps.
    """

    def __init__(self, params: Params, setting: str, root: Path | None = None):
        if setting not in params.settings:
            raise StudyError(f"setting {setting!r} is unknown; allowed: {', '.join(params.settings)}")
        self.root = root or find_root()
        self.runs = self.root / "runs" / params.profile / setting
        self.setting = setting
        self.reports = self.root / "reports" / params.profile
        self.results = self.reports / "results" / setting
        self.figures = self.reports / "figures" / setting
        self.tables = self.reports / "tables" / setting
        self.headline = self.reports / "headline" / f"{setting}.json"
        executed = self.root / "runs" / params.profile / "compared"
        self.representations = self.results / "representations.json"
        self.analyses = {  # executed notebooks, and the folders of their figures
            executed / f"compare_{setting}.ipynb": self.figures,
            executed / f"ablations_{setting}.ipynb": self.reports / "ablations" / setting,
            executed / f"representations_{setting}.ipynb": self.reports / "representations" / setting,
        }
        self.tasks = self.runs / "tasks"
        self.corpus = self.runs / "corpus"
        self.encoder = self.runs / "encoder"
        self.teacher = self.runs / "teacher"
        self.checkpoints = self.root / "scratch" / "checkpoints"
        self.teacher_outputs = self.root / "scratch" / "teacher_outputs"

    def student(self, method: str, student: str, seed: int) -> Path:
        return self.runs / "students" / f"{method}_{student}_{seed}"

    def result(self, method: str, student: str, seed: int) -> Path:
        return self.results / f"{method}_{student}_{seed}.json"


def cell_title(params: Params, setting: str, method: str, student: str, seed: int) -> str:
    """How a run announces itself: its place in the grid where it has one, and its name."""
    cells = [(name, *cell) for name in params.grid.settings for cell in params.grid.cells(name)]
    cell = (setting, method, student, seed)
    place = f"[{cells.index(cell) + 1}/{len(cells)}] " if cell in cells else ""
    return f"{place}{setting} {method}" + (f" {student} seed {seed}" if method != "teacher" else "")
