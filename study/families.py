"""Families of encoders that are read and distilled into: where each keeps its parts, as transformers names them."""

from __future__ import annotations

from dataclasses import dataclass, field, replace
from operator import attrgetter
from typing import Any, Literal

#: Families of teachers, by ``model_type`` of their configuration.
FamilyName = Literal[
    "bert", "roberta", "xlm-roberta", "camembert", "ernie", "mpnet", "distilbert", "electra", "modernbert"
]
#: Families that a student may have whatever that of its teacher.
StudentFamily = Literal["bert", "roberta"]
#: Keys of params.yaml, in the order in which configurations are asked for them.
SIZES = ("layers", "width", "heads", "intermediate")


@dataclass(frozen=True)
class Block:
    """Names of a layer's linear maps and norms, below the layer.

    ``projections``: queries, keys and values; a single name is one map that gives all three side by side.
    """

    projections: tuple[str, ...] = ("attention.self.query", "attention.self.key", "attention.self.value")
    attention_output: str = "attention.output.dense"
    attention_norm: str = "attention.output.LayerNorm"
    feed_forward: str = "intermediate.dense"
    output: str = "output.dense"
    output_norm: str = "output.LayerNorm"


@dataclass(frozen=True)
class Family:
    """One family; every name is a path of modules or a key of the configuration.

    ``embedded``: modules below the encoder whose last one that exists gives hidden state 0, ``layers`` the list of
    layers, ``last`` what gives the last hidden state where that is not the last layer. ``head``: modules below the
    model that turn hidden states into logits, one after the other; ``dense`` and ``norm``: its layers before the
    vocabulary. ``copied``: what a student of equal widths takes over beside embeddings, layers and head; None where
    layers cannot stand elsewhere than they do. ``dropout``: of the encoder's output in fine-tuning. ``offset``:
    positions that stand before that of the first token; None: one more than the padding token's number.
    ``pooler``: whether the bare encoder comes with a pooling layer unless told otherwise. ``heads_of_files``: how
    names of weights begin that an encoder does without.
    """

    sizes: tuple[str, ...] = ("num_hidden_layers", "hidden_size", "num_attention_heads", "intermediate_size")
    embedded: tuple[str, ...] = ("embeddings",)
    embedding_norm: str = "embeddings.LayerNorm"
    layers: str = "encoder.layer"
    last: str | None = None
    block: Block = field(default_factory=Block)
    head: tuple[str, ...] = ("cls",)
    dense: str = "cls.predictions.transform.dense"
    norm: str = "cls.predictions.transform.LayerNorm"
    copied: tuple[str, ...] | None = ()
    dropout: str = "hidden_dropout_prob"
    offset: int | None = 0
    pooler: bool = True
    heads_of_files: tuple[str, ...] = ("cls.", "lm_head.")


_BERT = Family()
_ROBERTA = replace(_BERT, head=("lm_head",), dense="lm_head.dense", norm="lm_head.layer_norm", offset=None)
FAMILIES: dict[FamilyName, Family] = {
    "bert": _BERT,
    "roberta": _ROBERTA,
    "xlm-roberta": _ROBERTA,
    "camembert": _ROBERTA,
    "ernie": _BERT,
    "mpnet": replace(
        _ROBERTA,
        block=Block(
            projections=("attention.attn.q", "attention.attn.k", "attention.attn.v"),
            attention_output="attention.attn.o",
            attention_norm="attention.LayerNorm",
        ),
        copied=("encoder.relative_attention_bias",),
        offset=2,
    ),
    "distilbert": replace(
        _BERT,
        sizes=("n_layers", "dim", "n_heads", "hidden_dim"),
        layers="transformer.layer",
        block=Block(
            projections=("attention.q_lin", "attention.k_lin", "attention.v_lin"),
            attention_output="attention.out_lin",
            attention_norm="sa_layer_norm",
            feed_forward="ffn.lin1",
            output="ffn.lin2",
            output_norm="output_layer_norm",
        ),
        head=("vocab_transform", "activation", "vocab_layer_norm", "vocab_projector"),
        dense="vocab_transform",
        norm="vocab_layer_norm",
        dropout="dropout",
        pooler=False,
        heads_of_files=("vocab_",),
    ),
    "electra": replace(
        _BERT,
        embedded=("embeddings", "embeddings_project"),
        head=("generator_predictions", "generator_lm_head"),
        dense="generator_predictions.dense",
        norm="generator_predictions.LayerNorm",
        copied=("embeddings_project",),
        pooler=False,
        heads_of_files=("generator_", "discriminator_predictions."),
    ),
    "modernbert": replace(
        _BERT,
        embedding_norm="embeddings.norm",
        layers="layers",
        last="final_norm",
        block=Block(projections=("attn.Wqkv",), attention_output="attn.Wo", feed_forward="mlp.Wi", output="mlp.Wo"),
        head=("head", "decoder"),
        dense="head.dense",
        norm="head.norm",
        copied=None,
        dropout="classifier_dropout",
        pooler=False,
        heads_of_files=("head.", "decoder."),
    ),
}

#: Families whose attention scores are products of queries and keys alone, built as BERT's.
AS_BERT = tuple(name for name, own in FAMILIES.items() if own.block == Block())

#: ``model_type`` of a static table (study/data/static_table.py), a family that neither teachers nor students may have.
STATIC_TABLE = "static-table"
_TABLE = replace(_BERT, pooler=False, heads_of_files=())


def family_of(model: Any) -> Family:
    """The family of a model of transformers, or of its configuration.

    Raises:
        KeyError: none of FAMILIES.
    """
    name = getattr(model, "config", model).model_type
    return _TABLE if name == STATIC_TABLE else FAMILIES[name]


def positions(config: Any) -> int:
    """How many tokens a model of that configuration reads."""
    offset = family_of(config).offset
    return config.max_position_embeddings - (config.pad_token_id + 1 if offset is None else offset)


def part(module: Any, path: str) -> Any:
    """What stands at a path of names joined by dots below a module."""
    return attrgetter(path)(module)


def keep_layers(encoder: Any, count: int) -> None:
    """Take all layers behind the first ``count`` from an encoder, in place."""
    del part(encoder, family_of(encoder).layers)[count:]
    encoder.config.num_hidden_layers = count
    if hasattr(encoder.config, "layer_types"):
        encoder.config.layer_types = encoder.config.layer_types[:count]
