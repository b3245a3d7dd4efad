"""Methods as validated models: options of each objective, variants that change some; names of texts and tasks."""

from __future__ import annotations

import json
from collections.abc import Iterable, Iterator
from html import escape
from typing import Annotated, Any, Literal, get_args

from pydantic import (
    AfterValidator,
    BaseModel,
    ConfigDict,
    Field,
    TypeAdapter,
    ValidationError,
    model_serializer,
    model_validator,
)


class Checked(BaseModel):
    """A model that is refused for the first of its problems."""

    def problems(self) -> Iterator[str]:
        """What is wrong between its fields, and what is allowed: a line each."""
        yield from ()

    @model_validator(mode="after")
    def _has_no_problem(self):
        if problem := next(self.problems(), None):
            raise ValueError(problem)
        return self


def words_of(mistake: Any, validated: TypeAdapter[Any] | None = None) -> str:
    """What one of pydantic's mistakes is, without the name of the error.

    Args:
        validated: what it was validated as; a value of a wrong kind is then told together with a right one.
    """
    if mistake["type"] == "extra_forbidden":
        return "unknown key"
    told = "key is missing" if mistake["type"] == "missing" else str(mistake["msg"]).removeprefix("Value error, ")
    wrong_kind = mistake["type"].endswith("_type") or mistake["type"] in WITH_EXAMPLE
    if validated is None or not wrong_kind:
        return told
    return f"{told}; allowed: a value such as {example(validated, mistake['loc'])}"


def example(validated: TypeAdapter[Any], location: Iterable[str | int]) -> str:
    """A small value of the right kind for a key, as YAML in a line, by the JSON schema of what is validated.

    Names that have to be declared elsewhere are ``name``.

    Args:
        location: of the key, as pydantic tells it, with the tags of unions.
    """
    schema = validated.json_schema()

    def options(own: Any) -> list[dict[str, Any]]:
        """What may stand there, null left out."""
        if not isinstance(own, dict):
            return []
        if reference := own.get("$ref"):
            return options(schema["$defs"][reference.rpartition("/")[2]])
        if kinds := own.get("anyOf") or own.get("oneOf"):
            return [option for kind in kinds for option in options(kind)]
        return [] if own.get("type") == "null" else [own]

    def below(own: dict[str, Any], part: str | int) -> list[dict[str, Any]]:
        if isinstance(part, int):
            return options(own.get("items"))
        return options(own.get("properties", {}).get(part, own.get("additionalProperties")))

    def written(own: Any) -> str:
        match next(iter(options(own)), {}):
            case {"examples": [first, *_]} | {"enum": [first, *_]} | {"const": first}:
                return str(first)
            case {"type": "array", "items": items}:
                return f"[{written(items)}]"
            case {"type": "object", "required": keys, "properties": properties}:
                return "{" + ", ".join(f"{key}: {written(properties[key])}" for key in keys) + "}"
            case {"type": "object", "additionalProperties": dict() as values, **other}:
                return f"{{{written(other.get('propertyNames'))}: {written(values)}}}"
            case {"type": "object", "properties": properties}:
                return "{" + next(f"{key}: {written(value)}" for key, value in properties.items()) + "}"
            case {"type": "integer", **bounds}:
                return str(max(1, bounds.get("minimum", 1), bounds.get("exclusiveMinimum", 0) + 1))
            case {"type": "number"}:
                return "0.1"
            case {"type": "boolean"}:
                return "true"
        return "name"

    here = options(schema)
    for part in location:  # a key, or the tag of what was chosen there
        tagged = [own for own in here if part in (value.get("const") for value in own.get("properties", {}).values())]
        here = [option for own in here for option in below(own, part)] or tagged or here
    return written({"anyOf": here})


#: Mistakes that a right value explains, beside those of a wrong type.
WITH_EXAMPLE = ("missing", "too_short", "int_from_float", "string_pattern_mismatch")


class Section(Checked):
    """Part of the parameters or of a description: no unknown keys, strict types, nothing listed twice."""

    model_config = ConfigDict(extra="forbid", frozen=True, strict=True, validate_default=True)

    @model_validator(mode="after")
    def _has_no_problem(self):
        for name, value in self:
            lists = {f"{name}.{key}": own for key, own in value.items()} if isinstance(value, dict) else {name: value}
            for key, values in lists.items():
                if isinstance(values, list) and len(values) > len(set(map(repr, values))):
                    raise ValueError(f"{key} = {values} names something twice; allowed: each once")
        return super()._has_no_problem()  # type: ignore[operator]

    def _repr_html_(self) -> str:
        """How notebooks show it: a row for each key that has a value."""
        values = self.model_dump(mode="json", exclude_none=True)
        shown = {key: own if isinstance(own, str) else json.dumps(own).replace('"', "") for key, own in values.items()}
        rows = [f"<tr><th>{escape(key)}</th><td>{escape(own)}</td></tr>" for key, own in shown.items()]
        return f"<table>{''.join(rows)}</table>"


class Sparse(Section):
    """A section that is written without its empty keys: a new optional key changes nothing that lacks it."""

    @model_serializer(mode="wrap")
    def _without_empty_keys(self, handler: Any) -> dict[str, Any]:
        return {key: value for key, value in handler(self).items() if value is not None}


Positive = Annotated[int, Field(gt=0)]
#: At most a million, so that fine-tuning's draws (study/evaluation/scores.py) stay below what generators take.
Seed = Annotated[int, Field(ge=0, le=1_000_000)]
Fraction = Annotated[float, Field(ge=0, le=1)]
LearningRate = Annotated[float, Field(gt=0, le=1)]
Weight = Annotated[float, Field(ge=0)]
Initialisation = Literal[
    "random",
    "teacher-embeddings",
    "teacher-layers",
    "teacher-layers-but-last",
    "pruned-uniform",
    "pruned-top",
    "pruned-bottom",
]
#: Initialisations that take layers out of the teacher -> how many of its last ones are left out.
TAKEN = {"teacher-layers": 0, "teacher-layers-but-last": 1}
#: Initialisations that prune the teacher -> which of its layers stay.
PRUNING = {"pruned-uniform": "uniform", "pruned-top": "top", "pruned-bottom": "bottom"}
Inputs = Literal["masked", "plain"]
Mapping = Literal["last", "top", "uniform", "uniform-consecutive", "uniform+last", "reverse", "all-to-one", "random"]
FastPath = Literal["kept-memory", "fused-losses", "rounded-teacher", "shared-teacher", "cuda-graphs"]
TaskName = Literal[
    "sentiment",
    "sts-b",
    "boolq",
    "privacy-qa",
    "topic",
    "topic-multilingual",
    "intents",
    "retrieval",
    "bigram-shift",
    "sentence-order",
    "agreement",
    "masked-word",
    "bigram-shift-multilingual",
    "sentence-order-multilingual",
    "masked-word-multilingual",
]


#: Texts and the languages (ISO 639-1) each has; ``settings.<name>.texts`` names one as ``text`` in English, else as
#: ``text-language``.
TEXT_LANGUAGES = {
    "wikipedia": ("en", "es", "fr"),
    "boolq": ("en",),
    "quac": ("en",),
    "xsum": ("en",),
    "multilexsum": ("en",),
    "sotu": ("en",),
    "interface": ("bg", "de", "el", "ru", "vi", "zh"),
    "verses": ("en", "ar", "es", "fa", "fr", "it", "ru", "tl"),
}
TEXTS = tuple(
    text if language == "en" else f"{text}-{language}"
    for text, languages in TEXT_LANGUAGES.items()
    for language in languages
)


def _known_text(name: str) -> str:
    if name not in TEXTS:
        raise ValueError(f"unknown; allowed: {', '.join(TEXTS)}")
    return name


TextName = Annotated[str, AfterValidator(_known_text), Field(examples=[TEXTS[0]])]


class Untrained(Sparse):
    objective: Literal["none"]
    initialisation: Initialisation | None = None


class Trained(Sparse):
    """What a method may set for itself instead of the value that all methods share: for ablations.

    ``equal_compute`` names a method: training then takes as many steps as cost the operations of that one's.
    ``layer_decay`` d: layer i of L_S learns at d^(L_S - i) times the rate, embeddings at d^L_S times. Source: ELECTRA
    (2003.10555), appendix B.
    """

    learning_rate: LearningRate
    initialisation: Initialisation | None = None
    inputs: Inputs | None = None
    steps: Positive | None = None
    equal_compute: str | None = None
    layer_decay: Annotated[float, Field(gt=0, lt=1)] | None = None

    def problems(self) -> Iterator[str]:
        if self.steps is not None and self.equal_compute is not None:
            yield f"steps = {self.steps} and equal_compute = {self.equal_compute}; allowed: one of them"


class MaskedLanguageModelling(Trained):
    objective: Literal["masked_language_modelling"]
    inputs: Literal["masked"] | None = None


class OutputDistribution(Trained):
    objective: Literal["output_distribution"]
    inputs: Literal["masked"] | None = None
    temperature: Annotated[float, Field(gt=0)] = 1.0
    positions: Literal["masked", "sampled", "all"] = "masked"
    mlm_weight: Weight = 0.0


class HiddenState(Trained):
    """``fitted_start``, here and below: what the objective maps by starts as a least-squares fit to the teacher.

    ``distance``: squared error by default; ``reduction`` over pairs: mean by default; ``embeddings``: embedding outputs
    are a pair, too; ``map_equal_widths``: False compares states of equal widths as they are.
    """

    objective: Literal["hidden_state"]
    mapping: Mapping
    fitted_start: bool = True
    distance: Literal["cosine"] | None = None
    reduction: Literal["sum"] | None = None
    embeddings: Literal[True] | None = None
    map_equal_widths: Literal[False] | None = None


class SentenceEmbedding(Trained):
    objective: Literal["sentence_embedding"]
    distance: Literal["mse", "cosine", "relational"] = "mse"
    fitted_start: bool = True


class AttentionRelation(Trained):
    """``value_weight``: of the value relation beside those of queries and keys, which weigh 1."""

    objective: Literal["attention_relation"]
    teacher_layer_from_top: Annotated[int, Field(ge=0)] = 1
    relation_heads: Positive = 12
    fitted_start: bool = False
    value_weight: Weight | None = None


class DirectAttention(Trained):
    objective: Literal["direct_attention"]
    teacher_layer_from_top: Annotated[int, Field(ge=0)] = 1
    fitted_start: bool = True


class AttentionScore(Trained):
    objective: Literal["attention_score"]
    mapping: Mapping
    reduction: Literal["mean", "sum"] = "mean"


class AttentionDistribution(Trained):
    objective: Literal["attention_distribution"]
    teacher_layer_from_top: Annotated[int, Field(ge=0)] = 0
    value_relation: bool = True


class Part(BaseModel):
    """A part of a sum: the keys of a trained method but for those that belong to the whole, and its ``weight``."""

    model_config = ConfigDict(
        extra="allow",
        frozen=True,
        strict=True,
        json_schema_extra={"examples": ["{objective: hidden_state, mapping: last}"]},
    )

    weight: Weight = 1.0

    @property
    def method(self) -> Any:
        """The part as a method; its learning rate is without meaning."""
        return METHOD.validate_python({**(self.model_extra or {}), "learning_rate": 1.0})

    @model_validator(mode="before")
    @classmethod
    def _is_a_method(cls, values: Any) -> Any:
        if not isinstance(values, dict):
            raise ValueError("allowed: objective, weight and the objective's options")
        options = {key: value for key, value in values.items() if key != "weight"}
        tag, whole = options.get("objective"), sorted(set(options) & {*Trained.model_fields})
        if tag not in PARTS:
            raise ValueError(f"objective {tag!r} is no part of a sum; allowed: {', '.join(PARTS)}")
        if whole:
            raise ValueError(f"{', '.join(whole)} of a part; allowed: in the sum itself")
        try:
            method = METHOD.validate_python({**options, "learning_rate": 1.0})
        except ValidationError as error:  # in one line, like every other mistake
            first = error.errors(include_url=False)[0]
            raise ValueError(f"{tag}: {'.'.join(map(str, first['loc'][1:]))}: {words_of(first, METHOD)}") from None
        return {"weight": values.get("weight", 1.0), **method.model_dump(exclude={"learning_rate"})}


class Sum(Trained):
    objective: Literal["sum"]
    parts: list[Part] = Field(min_length=1)

    def problems(self) -> Iterator[str]:
        yield from super().problems()
        if not any(weights := [part.weight for part in self.parts]):
            yield f"parts: weights {weights} sum to nothing; allowed: one above 0"


Method = Annotated[
    Untrained
    | MaskedLanguageModelling
    | OutputDistribution
    | HiddenState
    | SentenceEmbedding
    | AttentionRelation
    | DirectAttention
    | AttentionScore
    | AttentionDistribution
    | Sum,
    Field(discriminator="objective"),
]


#: One of the classes above, chosen by ``objective``.
METHOD: TypeAdapter[Method] = TypeAdapter(Method)


def objective_of(kind: type[BaseModel]) -> str:
    """The value of ``objective`` that names a class of methods."""
    return str(get_args(kind.model_fields["objective"].annotation)[0])


#: Objectives that a sum may have as parts.
PARTS = tuple(objective_of(kind) for kind in Trained.__subclasses__() if kind is not Sum)


def parts_of(method: Any) -> list[Any]:
    """The methods that a sum is made of; of any other, itself."""
    return [part.method for part in method.parts] if isinstance(method, Sum) else [method]


class Published(Section):
    """A row beside the students: one that others trained, on other data."""

    kind: Literal["published"]
    model: Literal["paraphrase-minilm-l3"]


class Static(Section):
    """A row beside the students: a table of vectors, see :func:`study.data.static_table.static_table`."""

    kind: Literal["static_table"]
    width: Positive
    smoothing: Annotated[float, Field(gt=0, lt=1)]


Reference = Annotated[Published | Static, Field(discriminator="kind")]


class Variant(BaseModel):
    """Methods made of others: what they extend, and the keys that they change.

    A key with a list of values gives one method per value, ``<method>-<variant>-<value>``; otherwise there is one,
    ``<method>-<variant>``.
    """

    model_config = ConfigDict(
        extra="allow", frozen=True, strict=True, json_schema_extra={"examples": ["{extends: od, temperature: 2.0}"]}
    )

    extends: str | list[str]

    @property
    def changes(self) -> dict[str, Any]:
        """Key of a method -> its value, or the list of its values."""
        return dict(self.model_extra or {})

    def options(self) -> list[tuple[str, dict[str, Any]]]:
        """Suffix of the name and the changed values of each method it makes of one."""
        for axis, values in self.changes.items():
            if isinstance(values, list):
                return [(f"-{v:g}" if isinstance(v, float) else f"-{v}", self.changes | {axis: v}) for v in values]
        return [("", self.changes)]


class Membership(Section):
    """Where a method that a variant makes comes from; ``changes``: key of a method -> the value it has in this one."""

    extends: str
    variant: str
    changes: dict[str, Any]
