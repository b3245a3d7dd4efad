"""The formats that a student is written in: each a function from a model to a folder of files."""

from __future__ import annotations

import io
import json
import logging
import tempfile
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager, redirect_stdout
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from study.data.corpus import load_corpus
from study.data.pretrained import save_model
from study.families import positions
from study.files import Layout, StudyError, write_json
from study.shipping.parity import extra

#: Operators of this set: the newest that ONNX Runtime's quantisation and browsers' runtimes read alike.
OPSET = 18
MODEL, OPENVINO_MODEL = "model.onnx", "openvino_model.xml"
#: Held-out sequences that ranges of activations are taken from, in static quantisation.
CALIBRATION = 32


def _transformers(model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, folder: Path, layout: Layout) -> None:
    save_model(model, tokenizer, folder)
    name_tokenizer(folder)


def name_tokenizer(folder: Path) -> None:
    """Name the tokenizer as transformers 4 knows it, too, and leave out where it was loaded from."""
    path = folder / "tokenizer_config.json"
    config = json.loads(path.read_text())
    if config.get("tokenizer_class") == "TokenizersBackend":
        config["tokenizer_class"] = "PreTrainedTokenizerFast"
    write_json(path, {key: value for key, value in config.items() if key not in ("is_local", "local_files_only")})


def _sentence_transformers(
    model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, folder: Path, layout: Layout
) -> None:
    with extra():
        from sentence_transformers import SentenceTransformer
        from sentence_transformers.sentence_transformer.modules import Pooling, Transformer
    with tempfile.TemporaryDirectory() as plain:
        encoder: Any = model.base_model
        _transformers(encoder, tokenizer, Path(plain), layout)
        transformer = Transformer(plain, max_seq_length=len(load_corpus(layout.corpus)["validation"][0]["input_ids"]))
        pooling = Pooling(model.config.hidden_size, pooling_mode="mean")
        SentenceTransformer(modules=[transformer, pooling], device="cpu").save(str(folder), create_model_card=False)


class Output(nn.Module):
    """One output of a model, as a function of token ids and attention mask (B, T), int64."""

    def __init__(self, encoder: nn.Module, name: str):
        super().__init__()
        self.encoder, self.name = encoder, name

    def forward(self, input_ids: Tensor, attention_mask: Tensor) -> Tensor:
        return self.encoder(input_ids=input_ids, attention_mask=attention_mask)[self.name]


def write_onnx(model: nn.Module, config: Any, output: str, tokenizer: PreTrainedTokenizerBase, folder: Path) -> None:
    """Write ``model.onnx`` from token ids and mask to an output of a model, any batch and length; config and tokenizer.

    Raises:
        StudyError: the extra ``export`` is not installed, or the operator set cannot express the model.
    """
    with extra():
        import onnx  # noqa: F401
        import onnxscript  # noqa: F401
    folder.mkdir(parents=True, exist_ok=True)
    example = tokenizer(["One text.", "Another, a longer text."], padding=True, return_tensors="pt")
    sizes = {0: torch.export.Dim("batch"), 1: torch.export.Dim("tokens", max=positions(config))}
    with _quiet():
        try:
            program = torch.onnx.export(
                Output(model, output),
                (example["input_ids"], example["attention_mask"]),
                input_names=["input_ids", "attention_mask"],
                output_names=[output],
                dynamic_shapes={"input_ids": sizes, "attention_mask": sizes},
                opset_version=OPSET,
                dynamo=True,
                verbose=False,
            )
        except torch.onnx.errors.OnnxExporterError as error:
            reason = str(error).strip().splitlines()[0]
            raise StudyError(f"operator set {OPSET} of ONNX cannot express this model: {reason}") from None
    assert program is not None
    program.save(str(folder / MODEL))
    config.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    name_tokenizer(folder)


def _onnx(model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, folder: Path, layout: Layout) -> None:
    encoder: Any = model.base_model
    encoder.set_attn_implementation("eager")
    write_onnx(encoder, encoder.config, "last_hidden_state", tokenizer, folder)


def _onnx_int8(model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, folder: Path, layout: Layout) -> None:
    _onnx(model, tokenizer, folder, layout)
    quantise(folder)


def _onnx_int8_static(model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, folder: Path, layout: Layout) -> None:
    _onnx(model, tokenizer, folder, layout)
    with extra():
        from onnxruntime.quantization import CalibrationDataReader, QuantType, quantize_static
        from onnxruntime.quantization.shape_inference import quant_pre_process

    class Texts(CalibrationDataReader):
        def __init__(self) -> None:
            rows = np.array(load_corpus(layout.corpus)["validation"][-CALIBRATION:]["input_ids"], dtype=np.int64)
            self.batches: Iterator[dict[str, Any]] = iter(
                [{"input_ids": row[None], "attention_mask": np.ones_like(row[None])} for row in rows]
            )

        def get_next(self) -> Any:
            return next(self.batches, None)

    operators = ["MatMul", "Gemm", "Gather"]
    types = {"activation_type": QuantType.QUInt8, "weight_type": QuantType.QInt8}
    with _replaced(folder) as whole:
        quant_pre_process(whole, whole, skip_symbolic_shape=True)
        quantize_static(whole, folder / MODEL, Texts(), per_channel=True, op_types_to_quantize=operators, **types)


def _openvino(model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, folder: Path, layout: Layout) -> None:
    with extra("openvino"):
        import openvino
    _onnx(model, tokenizer, folder, layout)
    openvino.save_model(openvino.convert_model(folder / MODEL), folder / OPENVINO_MODEL, compress_to_fp16=False)
    (folder / MODEL).unlink()


def quantise(folder: Path) -> None:
    """ONNX Runtime's dynamic quantisation of the model in a folder: weights in 8 bits, activations as they come."""
    with extra():
        from onnxruntime.quantization import QuantType, quantize_dynamic
    with _replaced(folder) as whole:
        quantize_dynamic(whole, folder / MODEL, weight_type=QuantType.QInt8)


@contextmanager
def _replaced(folder: Path) -> Iterator[Path]:
    """Within the block the model of a folder is elsewhere, and gone behind it."""
    whole = (folder / MODEL).rename(folder / "whole.onnx")
    with _quiet():
        yield whole
    whole.unlink()


@contextmanager
def _quiet() -> Iterator[None]:
    """Without the exporters' warnings and progress: what a user has to know, errors and parity say."""
    before = logging.root.manager.disable
    with warnings.catch_warnings(), redirect_stdout(io.StringIO()):
        warnings.simplefilter("ignore")
        logging.disable(logging.WARNING)
        try:
            yield
        finally:
            logging.disable(before)


#: Format -> what writes it, given model, tokenizer, a new folder and where the setting's files are.
WRITERS: dict[str, Callable[[PreTrainedModel, PreTrainedTokenizerBase, Path, Layout], None]] = {
    "transformers": _transformers,
    "sentence-transformers": _sentence_transformers,
    "onnx": _onnx,
    "onnx-int8": _onnx_int8,
    "onnx-int8-static": _onnx_int8_static,
    "openvino": _openvino,
}
