"""Trimming: what is kept reads as before, to the bit; what was never seen still has no unknown tokens."""

from __future__ import annotations

import json
import random
from pathlib import Path

import numpy as np
import pytest
import tiny
import torch
from tokenizers import Tokenizer, decoders, models, normalizers, pre_tokenizers, processors, trainers
from transformers import AutoModelForMaskedLM, AutoTokenizer, PreTrainedTokenizerFast

from study import StudyError
from study.data.vocabulary import pieces_to_keep, trim_embeddings, trim_tokenizer

LINES = [line for line in (Path(__file__).parents[1] / "LICENSE").read_text().splitlines() if len(line) > 40]
UNUSED = [f"unused{number}" for number in range(20)]  # before the other special tokens, as BERT has them


def unigram() -> PreTrainedTokenizerFast:
    trained = Tokenizer(models.Unigram())
    trained.pre_tokenizer = pre_tokenizers.Metaspace()
    trained.train_from_iterator(LINES, trainers.UnigramTrainer(vocab_size=600, unk_token="<unk>"))
    pieces = [item for item in json.loads(trained.to_str())["model"]["vocab"] if item[0] != "<unk>"]
    special = ["<s>", "<pad>", *UNUSED, "</s>", "<unk>", "<mask>"]
    pieces = [*((piece, 0.0) for piece in special), *map(tuple, pieces)]
    backend = Tokenizer(models.Unigram(pieces, unk_id=special.index("<unk>")))
    backend.pre_tokenizer, backend.decoder = trained.pre_tokenizer, decoders.Metaspace()
    backend.post_processor = processors.RobertaProcessing(("</s>", special.index("</s>")), ("<s>", 0))
    return PreTrainedTokenizerFast(
        tokenizer_object=backend,
        bos_token="<s>",
        cls_token="<s>",
        eos_token="</s>",
        sep_token="</s>",
        pad_token="<pad>",
        unk_token="<unk>",
        mask_token="<mask>",
        model_max_length=77,
    )


def wordpiece() -> PreTrainedTokenizerFast:
    trained = Tokenizer(models.WordPiece(unk_token="[UNK]"))
    trained.normalizer, trained.pre_tokenizer = normalizers.BertNormalizer(), pre_tokenizers.BertPreTokenizer()
    trained.train_from_iterator(LINES, trainers.WordPieceTrainer(vocab_size=800))
    pad, *special = tiny.SPECIAL
    pieces = ["[first]", pad, *UNUSED, *special, *sorted(trained.get_vocab())]
    backend = Tokenizer(models.WordPiece({piece: index for index, piece in enumerate(pieces)}, unk_token="[UNK]"))
    backend.normalizer, backend.pre_tokenizer = trained.normalizer, trained.pre_tokenizer
    backend.decoder = decoders.WordPiece()
    template = processors.TemplateProcessing(
        single="[CLS] $A [SEP]",
        pair="[CLS] $A [SEP] $B:1 [SEP]:1",
        special_tokens=[(piece, pieces.index(piece)) for piece in ("[CLS]", "[SEP]")],
    )
    backend.post_processor = processors.Sequence([template])
    backend.enable_padding(length=50, pad_id=1, pad_token=pad)
    names = ("pad_token", "unk_token", "cls_token", "sep_token", "mask_token")
    special = dict(zip(names, tiny.SPECIAL, strict=True))
    options = {"clean_up_tokenization_spaces": True, "model_input_names": ["input_ids", "token_type_ids"]}
    return PreTrainedTokenizerFast(tokenizer_object=backend, **special, **options)


@pytest.fixture(scope="module", params=[unigram, wordpiece])
def tokenizer(request) -> PreTrainedTokenizerFast:
    return request.param()


def trim(tokenizer, texts: list[str]) -> tuple[PreTrainedTokenizerFast, np.ndarray]:
    kept = pieces_to_keep(tokenizer, {index for ids in tokenizer(texts)["input_ids"] for index in ids})
    return trim_tokenizer(tokenizer, kept), kept


@pytest.mark.parametrize("seed", range(5))
def test_texts_of_kept_pieces_are_read_as_before(tokenizer, seed):
    texts = random.Random(seed).sample(LINES, 12)
    trimmed, kept = trim(tokenizer, texts)
    assert len(trimmed) == len(kept) < len(tokenizer) - 50
    texts += [f"{text[:20]} {tokenizer.mask_token} {text[20:]}" for text in texts]
    within = [text for text in (*texts, *LINES) if set(tokenizer(text)["input_ids"]) <= set(kept.tolist())]
    assert len(within) >= 12
    for text in within:
        assert kept[trimmed(text)["input_ids"]].tolist() == tokenizer(text)["input_ids"]
        assert trimmed.tokenize(text) == tokenizer.tokenize(text)
        assert trimmed.decode(trimmed(text)["input_ids"]) == tokenizer.decode(tokenizer(text)["input_ids"])
    first, second = (tokenise(*within[:2]) for tokenise in (tokenizer, trimmed))
    assert first.keys() == second.keys() and kept[second["input_ids"]].tolist() == first["input_ids"]
    assert first.get("token_type_ids") == second.get("token_type_ids")
    short, long = trimmed(["a", "a a a"], padding=True)["input_ids"]
    assert len(short) == len(long) and short[-1] == trimmed.pad_token_id == tokenizer.pad_token_id == 1


@pytest.mark.parametrize("seed", range(5))
def test_words_never_seen_have_no_unknown_tokens(tokenizer, seed):
    trimmed, _ = trim(tokenizer, LINES[:1])
    assert len(trimmed) < 0.6 * len(tokenizer)
    letters = sorted(set("".join(LINES)) - {" "})
    generator = random.Random(seed)
    invented = ["".join(generator.choices(letters, k=generator.randint(1, 12))) for _ in range(100)]
    readable = [word for word in (*LINES, *invented) if tokenizer.unk_token_id not in tokenizer(word)["input_ids"]]
    assert len(readable) > 100
    assert not any(trimmed.unk_token_id in trimmed(word)["input_ids"] for word in readable)
    assert trimmed.unk_token in trimmed.convert_ids_to_tokens(trimmed("\u4e16")["input_ids"])


def test_an_unknown_character_costs_what_it_did():
    """The second-best reading of "cba" has an unknown character, which is scored by the lowest-scoring piece of all."""
    scores = {"<unk>": 0.0, "<pad>": 0.0, "a": -20.0, "b": -2.0, "cb": -30.0, "ba": -1.0, "never": -50.0, "ab": -45.0}
    backend = Tokenizer(models.Unigram(list(scores.items()), unk_id=0))
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=backend, unk_token="<unk>", pad_token="<pad>")
    assert tokenizer.tokenize("cba") == ["cb", "a"] and tokenizer.tokenize("ba") == ["ba"]
    kept = pieces_to_keep(tokenizer, tokenizer("cbaba")["input_ids"])
    trimmed = trim_tokenizer(tokenizer, kept)
    assert trimmed.get_vocab().keys() == scores.keys() - {"ab"}
    assert trimmed.tokenize("cba") == ["cb", "a"]
    without = trim_tokenizer(tokenizer, kept[kept != list(scores).index("never")])
    assert without.tokenize("cba") != ["cb", "a"]


def test_bytes_are_kept():
    pieces = [("<unk>", 0.0), ("<pad>", 0.0), *((f"<0x{byte:02X}>", -9.0) for byte in range(256)), ("word", -1.0)]
    backend = Tokenizer(models.Unigram([*pieces, ("<0xyz>", -2.0)], unk_id=0, byte_fallback=True))
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=backend, unk_token="<unk>", pad_token="<pad>")
    trimmed = trim_tokenizer(tokenizer, pieces_to_keep(tokenizer, []))
    assert len(trimmed) == 258 and trimmed.tokenize("é") == ["<0xC3>", "<0xA9>"]


def test_saved_and_loaded_again(tokenizer, tmp_path):
    trimmed, _ = trim(tokenizer, LINES[:5])
    trimmed.save_pretrained(tmp_path)
    loaded = AutoTokenizer.from_pretrained(tmp_path)
    assert loaded.special_tokens_map == trimmed.special_tokens_map == tokenizer.special_tokens_map
    assert (loaded.model_max_length, loaded.model_input_names) == (
        tokenizer.model_max_length,
        tokenizer.model_input_names,
    )
    assert loaded(LINES)["input_ids"] == trimmed(LINES)["input_ids"]


def test_special_tokens_cannot_be_trimmed(tokenizer):
    kept = pieces_to_keep(tokenizer, [])
    with pytest.raises(StudyError) as error:
        trim_tokenizer(tokenizer, kept[kept != tokenizer.mask_token_id])
    message = str(error.value)
    assert "\n" not in message
    for part in (f"{len(kept) - 1} pieces", tokenizer.mask_token, str(tokenizer.mask_token_id), tokenizer.cls_token):
        assert part in message


def test_other_kinds_of_tokenizers_are_refused():
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=Tokenizer(models.BPE()), pad_token="<pad>")
    with pytest.raises(StudyError, match="BPE tokenizer cannot be trimmed; allowed: Unigram, WordPiece"):
        pieces_to_keep(tokenizer, [])


@pytest.mark.parametrize("tied", [True, False])
@pytest.mark.parametrize("family", tiny.FAMILIES)
def test_hidden_states_stay_the_same_to_the_bit(family, tied, tmp_path):
    config = tiny.masked_language_model(family).config
    config.tie_word_embeddings = tied
    torch.manual_seed(1)
    model = AutoModelForMaskedLM.from_config(config).eval()
    kept = np.array([0, 1, 2, 3, 7, 8, 20, 33, 58])
    trimmed_ids = torch.randint(len(kept), (4, 12), generator=torch.Generator().manual_seed(2))
    full_ids = torch.from_numpy(kept)[trimmed_ids]
    with torch.no_grad():
        hidden, logits = model.base_model(full_ids).last_hidden_state, model(full_ids).logits
    rows = model.get_output_embeddings().weight[kept].clone()

    trim_embeddings(model, kept)
    model.save_pretrained(tmp_path)
    for trimmed in (model, AutoModelForMaskedLM.from_pretrained(tmp_path, attn_implementation="eager")):
        with torch.no_grad():
            assert torch.equal(trimmed.base_model(trimmed_ids).last_hidden_state, hidden)
            torch.testing.assert_close(trimmed(trimmed_ids).logits, logits[..., kept])
        assert trimmed.config.vocab_size == len(kept) and trimmed.config.pad_token_id == config.pad_token_id
        assert torch.equal(trimmed.get_output_embeddings().weight, rows)
        assert (
            trimmed.get_input_embeddings().num_embeddings == trimmed.get_output_embeddings().out_features == len(kept)
        )
        shared = trimmed.get_output_embeddings().weight is trimmed.get_input_embeddings().weight
        assert shared == tied


def test_token_ids_of_the_configuration_follow():
    model = tiny.masked_language_model("roberta").base_model
    model.config.eos_token_id = 20
    trim_embeddings(model, np.array([0, 1, 2, 20, 30]))
    assert (model.config.bos_token_id, model.config.pad_token_id, model.config.eos_token_id) == (0, 1, 3)
