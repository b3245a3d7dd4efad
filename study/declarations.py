"""Texts and tasks of one's own, as params.yaml declares them: where their rows are and what their columns mean."""

from __future__ import annotations

import glob
import hashlib
import os
import re
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Annotated, Any, Literal

from pydantic import ConfigDict, Field, model_validator

from study.files import StudyError, file_hash
from study.methods import TEXT_LANGUAGES, Positive, Sparse

#: Ends of the names of files that are read; those of text may also end in .gz.
FORMATS = (".txt", ".csv", ".tsv", ".jsonl", ".parquet")
#: Metrics of tasks with classes, and of tasks whose label is a number.
CLASS_METRICS, NUMBER_METRICS = ("accuracy", "f1", "macro_f1", "matthews"), ("pearson", "spearman")
#: Metrics of tasks that tag words.
TAG_METRICS = ("entity_f1", "accuracy")
#: Share of the training examples that development takes where it is not declared. Source: this study's choice.
DEVELOPMENT_SHARE = 0.1

Language = Annotated[str, Field(pattern=r"^[a-z]{2,3}(-[A-Za-z0-9]+)*$", examples=["en"])]
Text = Annotated[str, Field(min_length=1)]
#: No hyphen: one sets off the language.
TextLabel = Annotated[str, Field(pattern=r"^[A-Za-z0-9][A-Za-z0-9._+]*$")]


class Origin(Sparse):
    """``dataset``: a folder as the hub has them, or the name of one on the hub, ``revision`` its commit there.

    ``licence`` is what the report says of it.
    """

    dataset: Text | None = None
    config: Text | None = None
    revision: Text | None = None
    licence: Text | None = None


class OwnText(Origin):
    """Documents: every file of plain text, or ``column`` of every row, of those rows where others have a value.

    Paths are relative to the study's folder. ``limit``: the documents read, in the order of names of files.
    """

    model_config = ConfigDict(json_schema_extra={"examples": ["{files: texts/*.txt, language: en}"]})

    files: Text | None = None
    split: Text | None = None
    column: Text | None = None
    where: dict[str, str | int] | None = None
    language: Language
    limit: Positive | None = None
    name: TextLabel | None = None

    def problems(self) -> Iterator[str]:
        if (self.files is None) == (self.dataset is None):
            yield "a text has either files or dataset; allowed: one of them"
        plain = self.files is not None and ".txt" in Path(self.files).suffixes
        if plain and (self.column or self.where):
            yield f"column, where: {self.files} is plain text; allowed: neither of them"
        if self.files and not self.column and format_of(Path(self.files)) not in FORMATS:
            yield f"files = {self.files}: a pattern such as texts/*.txt; names end in {', '.join(FORMATS)}"
        if not plain and not self.column:
            yield f"column is missing: which column of {self.files or self.dataset} holds the text?"
        if self.dataset and not self.split:
            yield f"split is missing: which split of {self.dataset} is read?"
        if self.label.partition("-")[0] in TEXT_LANGUAGES:
            yield f"name {self.label!r} is that of an embedded text; allowed: another `name:`"

    @property
    def label(self) -> str:
        """Its name in tables, as of embedded texts: ``name`` in English, else ``name-language``."""
        name = self.name or _name_of(self.files or self.dataset or "")
        return name if self.language == "en" else f"{name}-{self.language}"

    def patterns(self) -> list[str]:
        """Patterns of its files."""
        return [self.files] if self.files else []


class SplitsOf(Sparse):
    """A pattern of files, or a dataset's ``split`` or ``config/split``, for each split.

    ``development`` may also be a share of the training examples; one that is the test split takes half of that.
    ``test``: one, or one for each language, the first or ``language`` being that of training.
    """

    train: Text | None = None
    development: Text | Annotated[float, Field(gt=0, lt=1)] | None = None
    test: Text | dict[Language, Text]

    def problems(self) -> Iterator[str]:
        if not self.test:
            yield "test = {}; allowed: a split, or one for each language"


class OwnTask(Origin):
    """Rows with a text or two and a label; with ``kind: retrieval``, pairs of a text and its translation.

    With ``kind: tokens``, rows with a list of words (``text``, by default the column tokens) and one of their tags
    (``label``, by default tags); its metric is entity_f1, whose tags are O, B-... and I-..., or accuracy.
    Classes, unless ``metric`` is a correlation; ``labels``: their names in order (f1 is that of the second).
    """

    model_config = ConfigDict(
        json_schema_extra={"examples": ["{files: {train: data/train.csv, test: data/test.csv}, language: en}"]}
    )

    kind: Literal["labelled", "retrieval", "tokens"] | None = None
    files: SplitsOf | None = None
    splits: SplitsOf | None = None
    text: Text = "text"
    text_pair: Text | None = None
    label: Text = "label"
    labels: Annotated[list[str], Field(min_length=2)] | None = None
    metric: Literal["accuracy", "f1", "macro_f1", "matthews", "pearson", "spearman", "entity_f1"] = "accuracy"
    language: Language | None = None

    @model_validator(mode="before")
    @classmethod
    def _tags_have_columns_of_their_own(cls, value: Any) -> Any:
        if isinstance(value, dict) and value.get("kind") == "tokens":
            return {"text": "tokens", "label": "tags", "metric": TAG_METRICS[0]} | value
        return value

    def problems(self) -> Iterator[str]:
        known = TAG_METRICS if self.kind == "tokens" else (*CLASS_METRICS, *NUMBER_METRICS)
        if self.metric not in known:
            yield f"metric = {self.metric}; allowed with kind {self.kind or 'labelled'}: {', '.join(known)}"
        if self.kind == "tokens" and self.text_pair:
            yield "text_pair: words of one text are tagged; allowed: text and label alone"
        if (self.files is None) == (self.splits is None) or (self.splits is None) != (self.dataset is None):
            yield "a task has either files, or a dataset and its splits; allowed: one of them"
        if self.labels and self.metric in NUMBER_METRICS:
            yield f"labels: {self.metric} is of numbers; allowed: labels with {', '.join(CLASS_METRICS)}"
        test = self.parts.test
        if not isinstance(test, dict):
            if self.language is None:
                yield "language is missing: which language are the examples in?"
            if self.retrieval:
                yield "test: retrieval needs languages; allowed: {language: file with aligned columns}"
        elif self.retrieval:
            if self.language is None or self.language in test:
                yield "language: that of the column `text`; allowed: one that `test` does not name"
        elif self.languages[0] not in test:
            yield f"test lacks {self.language!r}, the language of training; allowed: {', '.join(test)} and it"
        if self.retrieval and (self.text_pair is None or self.metric != "accuracy" or self.parts.train):
            yield "retrieval is not learnt; allowed: text, text_pair, test and metric accuracy"
        if not self.retrieval and self.parts.train is None:
            yield "train is missing: which examples is the task learnt from?"

    @property
    def retrieval(self) -> bool:
        """Whether it is a probe that is not learnt."""
        return self.kind == "retrieval"

    @property
    def parts(self) -> SplitsOf:
        """Where its splits are."""
        found = self.files or self.splits
        assert found is not None
        return found

    @property
    def languages(self) -> tuple[str, ...]:
        """Languages of its test data, that of training (or of ``text``) first."""
        tested = self.parts.test if isinstance(self.parts.test, dict) else {}
        return tuple(dict.fromkeys([*([self.language] if self.language else []), *tested]))

    @property
    def tests(self) -> dict[str, str]:
        """Language -> where its test examples are."""
        test = self.parts.test
        return test if isinstance(test, dict) else {self.languages[0]: test}

    def patterns(self) -> list[str]:
        """Patterns of its files."""
        if self.files is None:
            return []
        declared = [self.files.train, self.files.development, *self.tests.values()]
        return list(dict.fromkeys(part for part in declared if isinstance(part, str)))


Declared = OwnText | OwnTask
#: Name of a text or task of one's own -> SHA-256 of what is in its files.
Hashes = dict[str, str]


def language_of(text: str | OwnText) -> str:
    """The language of a text: the field, or the end of an embedded text's name."""
    return text.partition("-")[2] or "en" if isinstance(text, str) else text.language


def matching(pattern: str, root: Path) -> list[Path]:
    """Files of a format that is read whose names match, in their order; ``~`` is the home folder.

    Raises:
        StudyError: no file, a folder, or a file of another format.
    """
    full = os.path.join(root, os.path.expanduser(pattern))
    if os.path.isdir(full):
        raise StudyError(f"{pattern} is a folder; allowed: a pattern of files, such as {pattern.rstrip('/')}/*.txt")
    files = sorted(Path(name) for name in glob.glob(full, recursive=True) if os.path.isfile(name))
    if not files:
        raise StudyError(f"{pattern} matches no file (paths are relative to {root})")
    for file in files:
        if format_of(file) not in FORMATS:
            raise StudyError(f"{file}: cannot be read; allowed: {', '.join(FORMATS)}, those of text also .gz")
    return files


def format_of(file: Path) -> str:
    """The end of a file's name that says what is in it, ``.gz`` left out."""
    return Path(file.stem).suffix if file.suffix == ".gz" and not file.stem.endswith(".parquet") else file.suffix


def folder_of(origin: Origin, root: Path) -> Path | None:
    """The folder that ``dataset`` names; None of one on the hub."""
    if origin.dataset is None:
        return None
    folder = Path(root, os.path.expanduser(origin.dataset))
    return folder if folder.is_dir() else None


def hashes_of(declared: dict[str, Declared], root: Path) -> Hashes:
    """Name -> SHA-256 over names and contents of all its files; files that are not there have none, nor has the hub."""
    return {name: own for name, one in declared.items() if (own := content_of(one, root))}


def content_of(declared: Declared, root: Path) -> str | None:
    """SHA-256 over names and contents of the files of a text or task; None where there are none."""
    folder = folder_of(declared, root)
    try:
        files: Iterable[Path] = [file for pattern in declared.patterns() for file in matching(pattern, root)]
    except StudyError:
        return None
    if folder:
        files = sorted(file for file in folder.rglob("*") if file.is_file() and ".cache" not in file.parts)
    listed = [f"{os.path.relpath(file, root)} {file_hash(file)}" for file in files]
    return hashlib.sha256("\n".join(listed).encode()).hexdigest() if listed else None


def check_content(what: str, name: str, declared: Declared, hashes: Hashes | None, root: Path) -> None:
    """Refuse files that are others than those that the plan saw.

    Raises:
        StudyError: they are.
    """
    if content_of(declared, root) != (hashes or {}).get(name):
        raise StudyError(f"{what}: its files have changed since the plan was made; run `python -m study plan` again")


def _name_of(where: str) -> str:
    if "*" not in where and "/" in where and not where.endswith(FORMATS):
        plain = where.replace("/", ".")  # a dataset
    else:
        parts = [part for part in Path(where).parts if not set(part) & set("*?[~") and part not in ("/", "..")]
        plain = Path(parts[-1]).name.partition(".")[0] if parts else Path(where).suffix
    return re.sub(r"[^A-Za-z0-9._+]+", "_", plain).strip("._+") or "own"
