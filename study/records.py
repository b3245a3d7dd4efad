"""The one schema of result files: what writers write and readers read, checked on both sides.

Every file says which schema it has, which profile and setting it belongs to, the package versions and the machine it
was made with, the commit of the code, and the SHA-256 of the data and weights behind it.
"""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any, Literal, TypeVar

import numpy as np
from pydantic import ConfigDict, Field, ValidationError

from study.files import StudyError, write_file
from study.methods import Checked, words_of
from study.sections import BASE_BUDGET

#: Raised when a file of the schema before can no longer be read as it is.
SCHEMA: Literal[2] = 2


class Record(Checked):
    """Part of a result file. Numbers must be finite, and there are no other fields."""

    model_config = ConfigDict(allow_inf_nan=False, frozen=True, extra="forbid", populate_by_name=True)


class FinetuningRun(Record):
    """``frozen``: split -> main metric of the linear probe that fine-tuning starts from."""

    seed: int
    epoch: int
    development: dict[str, float]
    test: dict[str, float]
    languages: dict[str, dict[str, float]] = {}
    frozen: dict[str, float] = {}


class TaskResult(Record):
    """``language``: that of training, and of ``test``."""

    metric: str
    group: Literal["context", "sentence"] = "sentence"
    language: str = "en"
    learning_rate: float
    train_examples: int
    development_examples: int
    test_examples: int
    language_examples: dict[str, int] = {}
    runs: list[FinetuningRun]

    def problems(self) -> Iterator[str]:
        for run in self.runs:
            who, languages = f"fine-tuning seed {run.seed}", list(self.language_examples)
            if run.languages.keys() != {*languages}:
                yield f"{who} is tested in {list(run.languages)}; allowed: {languages}, as in language_examples"
            for split, values in ({"development": run.development, "test": run.test} | run.languages).items():
                if self.metric not in values:
                    yield f"{split} scores of {who} lack {self.metric!r}"


class ProbeResult(Record):
    """``development``: language -> main metric on development data, where there are any."""

    metric: str
    group: Literal["context", "sentence"] = "sentence"
    test_examples: int
    languages: dict[str, dict[str, float]] = Field(min_length=1)
    development: dict[str, float] = {}

    def problems(self) -> Iterator[str]:
        for language, values in self.languages.items():
            if self.metric not in values:
                yield f"scores in {language!r} lack {self.metric!r}"


class LanguageModelling(Record):
    loss: float
    accuracy: float


class Size(Record):
    parameters: int
    embedding_parameters: int
    encoder_parameters: int
    flops_per_sequence: float
    sequence_length: int


class CurvePoint(Record):
    step: int
    tokens: int
    seconds: float
    loss: float


class Environment(Record):
    python: str
    torch: str
    transformers: str
    datasets: str
    processor: str
    instructions: str | None = None
    cores: int
    threads: int
    date: str


class Training(Record):
    """What a training run was and how it went; ``options``: those of the method, without what others may set, too.

    ``processes``: how many trained one student together; ``threads``: of each.
    ``environment``: what it ran with, which may be another machine than that of the evaluation.
    """

    objective: str
    learning_rate: float
    options: dict[str, str | int | float | list[dict[str, str | int | float | None]] | None] = {}
    revisions: dict[str, int] = {}
    steps: int
    tokens: int
    seconds: float
    tokens_per_second: float
    initialisation: str | None = None
    inputs: str | None = None
    precision: str
    threads: int
    processes: int | None = Field(default=None, exclude_if=lambda value: value is None)
    fast_paths: list[str] = []
    curve: list[CurvePoint] = Field(min_length=1)
    training_curve: list[CurvePoint] = []
    stopped: str | None = None
    environment: Environment | None = None

    def problems(self) -> Iterator[str]:
        if self.curve[0].step != 0:
            yield f"curve: begins at step {self.curve[0].step}; allowed: 0, the loss before training"


class Labelled(Record):
    """What every file says of itself.

    ``hashes``: what its numbers rest on (``corpus``, ``tasks``, ``weights`` of the model, ``teacher``) -> SHA-256, as
    :func:`study.files.content_hash`; empty where the file was made before hashes were recorded. ``commit``: first 12
    digits, of the study's own repository, and a + where its code had changes; None outside one.
    """

    schema_version: Literal[2] = Field(alias="schema")
    profile: str
    setting: str
    commit: str | None = None
    hashes: dict[str, str] = {}


class ResultFile(Labelled):
    """A file of measurements, which says what they were made with."""

    environment: Environment


class RunResult(ResultFile):
    method: str
    student: str
    seed: int
    budget: str = BASE_BUDGET
    tasks: dict[str, TaskResult]
    probes: dict[str, ProbeResult] = {}
    masked_language_modelling: LanguageModelling | None
    size: Size
    distillation: Training | None
    evaluation_seconds: float


class Measurement(Record):
    """``device``, ``processor`` (its name) and ``precision``: where and how it ran, if params ask for devices."""

    student: str
    batch_size: int
    threads: int
    median_seconds: float = Field(gt=0)
    lower_quartile_seconds: float
    upper_quartile_seconds: float
    sequences_per_second: float
    teacher_median_seconds: float
    speed_up: float
    device: str | None = Field(default=None, exclude_if=lambda value: value is None)
    processor: str | None = Field(default=None, exclude_if=lambda value: value is None)
    precision: str | None = Field(default=None, exclude_if=lambda value: value is None)


class LatencyResult(ResultFile):
    sequence_length: int
    precision: str
    runs: int
    warmup_runs: int
    measurements: list[Measurement]


class TaskSplit(Record):
    task: str
    split: str
    examples: int
    metric: str
    majority_share: float | None
    label_deviation: float | None = None


class TaskSplits(Labelled):
    """Every split in full, before fine-tuning draws its budget from it.

    ``environment``: None where the file was made before it was recorded.
    """

    environment: Environment | None = None
    splits: list[TaskSplit]


class TaskAdmission(Record):
    """Development scores of untrained models and of the teacher; ``majority``: what the commonest label scores."""

    task: str
    group: Literal["context", "sentence"]
    metric: str
    examples: int
    majority: float
    scores: dict[str, float]

    @property
    def closed_by_bag(self) -> float:
        """Share of the way from the majority to the teacher that the better bag of embeddings goes; NaN if none."""
        bag = max(self.scores["bag"], self.scores["embeddings"])
        gap = self.scores["teacher"] - self.majority
        return (bag - self.majority) / gap if gap > 0 else float("nan")

    @property
    def admitted(self) -> bool:
        """Whether the teacher is three standard errors above the majority, and a bag goes less than half the way."""
        spread = (self.majority * (1 - self.majority) / self.examples) ** 0.5
        return self.scores["teacher"] - self.majority > 3 * spread and self.closed_by_bag < 0.5


class AdmissionResult(ResultFile):
    tasks: list[TaskAdmission]


class Candidate(Record):
    """One learning rate: ``diverged`` says how its training ended where it did not end well; all scores are then empty.

    ``digest``: of the descriptions of its run and of its probes, None where it was not recorded.
    """

    learning_rate: float
    digest: str | None = None
    diverged: str | None = None
    development_mean: float | None = None
    development: dict[str, float] = {}
    held_out_loss_before: float | None = None
    held_out_loss: float | None = None

    def problems(self) -> Iterator[str]:
        if self.diverged is None and (self.held_out_loss is None or self.held_out_loss_before is None):
            yield f"learning rate {self.learning_rate} neither diverged nor has held-out losses"


class Tuning(ResultFile):
    """What `make tune` tried on one method and student (:func:`study.evaluation.tune.tune`)."""

    method: str
    student: str
    budget: str = BASE_BUDGET
    steps: int
    seed: int
    initialisation: str
    tried: list[Candidate]


class Probe(Record):
    last: float
    last_but_one: float


class Compared(Record):
    """One student beside its teacher.

    ``weights``: SHA-256 of the student's, None where it was not recorded. ``cka``: None where one of the two layers is
    collapsed, that is, gives every token the same state.
    """

    method: str
    student: str
    seed: int
    weights: str | None = None
    cka: list[list[float | None]]
    relation_divergence: dict[str, list[list[float]]]
    probes: dict[str, Probe]

    def problems(self) -> Iterator[str]:
        shape = np.array(self.cka, dtype=float).shape
        for name, matrix in self.relation_divergence.items():
            if len(shape) != 2 or np.shape(matrix) != shape:
                yield f"relation_divergence.{name} is {np.shape(matrix)}; allowed: {shape}, as cka"


class RepresentationsResult(ResultFile):
    sequences: int
    relation_sequences: int
    relation_heads: int
    models: list[Compared]


R = TypeVar("R", bound=Labelled)


def read_record(path: Path, kind: type[R], **expected: Any) -> R:
    """One validated result file.

    Args:
        path: the file; errors name the last three parts of it.
        kind: what it holds.
        expected: attributes that must have these values.

    Raises:
        StudyError: it cannot be read, is invalid or of another schema, or one of the ``expected`` values is another.
    """
    name = short_name(path)
    try:
        record = kind.model_validate_json(path.read_bytes())
    except OSError as error:
        raise StudyError(f"{name}: {error.strerror}") from None
    except ValidationError as error:
        raise StudyError(f"{name}: {_problem(error)}; delete the file and run `dvc repro`") from None
    for key, allowed in expected.items():
        value = getattr(record, key)
        if value != allowed:
            raise StudyError(f"{name}: {key} = {value!r}; at this place allowed: {allowed!r}")
    return record


def short_name(path: Path) -> str:
    """The last three parts of a path: how errors name a result file."""
    return Path(*path.parts[-3:]).as_posix()


def _problem(error: ValidationError) -> str:
    """The first mistake of a file in one line; another schema before all others, since it explains them."""
    mistakes = error.errors(include_url=False)
    first = next((mistake for mistake in mistakes if mistake["loc"] == ("schema",)), mistakes[0])
    if first["loc"] == ("schema",):
        stated = "none" if first["type"] == "missing" else repr(first["input"])
        return f"schema = {stated}; allowed: {SCHEMA}, as in all other files"
    return ": ".join(filter(None, (".".join(map(str, first["loc"])), words_of(first))))


def write_record(path: Path, record: Labelled) -> None:
    """Write a result file, whole or not at all; :func:`read_record` of the same class reads it.

    Raises:
        StudyError: the file cannot be written.
    """
    write_file(path, record.model_dump_json(indent=1, by_alias=True) + "\n")
