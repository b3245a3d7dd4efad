from __future__ import annotations

import random
from pathlib import Path

import numpy
import pytest
import torch
from datasets import ClassLabel, Dataset, DatasetDict, Features, Value
from transformers import BertConfig, BertModel, BertTokenizerFast

from study import StudyError, load_params
from study.config import Teacher
from study.data import corpus, tasks
from study.models.teachers import load_model, load_tokenizer, save_model

ROOT = Path(__file__).parents[1]
WORDS = [a + b + c for a in "bdfgklmn" for b in "aeiou" for c in "prstvz"]
LETTERS = [prefix + letter for letter in "abcdefghijklmnopqrstuvwxyz" for prefix in ("", "##")]
SIZES = {"layers": 2, "width": 8, "heads": 2, "intermediate": 16}
HELDOUT = " ".join(f"heldout{n}" for n in range(20))


@pytest.fixture
def tokenizer(tmp_path):
    """Of the small teacher in the folder `pretrained`, saved beside it."""
    vocabulary = tmp_path / "vocab.txt"
    vocabulary.write_text("\n".join(["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", *LETTERS, *WORDS]) + "\n")
    tokenizer = BertTokenizerFast(vocab=str(vocabulary))
    torch.manual_seed(0)
    config = BertConfig(
        vocab_size=len(tokenizer),
        num_hidden_layers=SIZES["layers"],
        hidden_size=SIZES["width"],
        num_attention_heads=SIZES["heads"],
        intermediate_size=SIZES["intermediate"],
    )
    save_model(BertModel(config, add_pooling_layer=False), tokenizer, tmp_path / "pretrained")
    return tokenizer


@pytest.fixture
def params(tokenizer, tmp_path):
    """The study's own, with an English setting of two texts and one task, sequences of 16 tokens."""
    params = load_params(ROOT / "params.yaml")
    setting = params.settings["english"].model_copy(
        update={
            "teacher": Teacher(name=str(tmp_path / "pretrained"), **SIZES),
            "texts": ["wikipedia", "xsum"],
            "tasks": ["topic"],
        }
    )
    settings = params.corpus.model_copy(update={"sequence_length": 16, "validation_sequences": 4, "max_tokens": None})
    distillation = params.distillation.model_copy(update={"batch_size": 8})
    return params.model_copy(
        update={"settings": {"english": setting}, "corpus": settings, "distillation": distillation}
    )


@pytest.fixture
def tasks_folder(tmp_path):
    features = Features({"text": Value("string"), "label": ClassLabel(names=["no"])})
    heldout = Dataset.from_list([{"text": HELDOUT, "label": "no"}], features=features)
    train = Dataset.from_list([{"text": "free " * 20, "label": "no"}], features=features)
    tasks.save(DatasetDict(train=train, development=heldout, test=heldout), tmp_path / "tasks" / "topic")
    return tmp_path / "tasks"


def sentence(generator: random.Random, words: int = 12) -> str:
    return " ".join(generator.choices(WORDS, k=words))


@pytest.fixture
def texts(monkeypatch):
    """Sets what the readers of `wikipedia` and `xsum` give; by default 60 documents of 12 words, and 20 of 3 x 12."""
    generator = random.Random(1)
    first = [sentence(generator) for _ in range(60)]
    second = ["\n".join(sentence(generator) for _ in range(3)) for _ in range(20)]

    def put(wikipedia: list[str] = first, xsum: list[str] = second) -> None:
        monkeypatch.setitem(corpus.TEXTS, "wikipedia", lambda: iter(wikipedia))
        monkeypatch.setitem(corpus.TEXTS, "xsum", lambda: iter(xsum))

    put()
    return put


def cleaned(texts, *documents: str, heldout=(HELDOUT,), words: int = 13):
    texts(wikipedia=list(documents), xsum=[])
    kept, counts = corpus.clean(["wikipedia"], corpus.Overlap(heldout, words))
    return [document.content for document in kept], counts["wikipedia"]


def test_thirteen_words_of_a_heldout_text_are_left_out_and_twelve_are_kept(texts):
    words = HELDOUT.split()
    twelve, thirteen = " ".join(["ours", *words[3:15], "ours"]), " ".join(["ours", *words[3:16], "ours"])
    kept, counts = cleaned(texts, twelve, thirteen)
    assert kept == [twelve]
    assert (counts["documents"], counts["overlaps"]) == (1, 1)


def test_overlap_sees_neither_case_nor_punctuation_nor_line_breaks(texts):
    kept, _ = cleaned(
        texts, "Ours: " + HELDOUT.upper().replace(" ", ",  ") + ". Ours.", heldout=(HELDOUT.replace(" ", "\n"),)
    )
    assert kept == []


def test_short_heldout_texts_are_matched_whole(texts):
    words = HELDOUT.split()
    whole, part = " ".join(["ours", *words[:9], "ours"]), " ".join(["ours", *words[:8], "ours ours"])
    kept, _ = cleaned(texts, whole, part, heldout=(" ".join(words[:9]),))
    assert kept == [part]
    kept, _ = cleaned(texts, whole, part, heldout=(" ".join(words[:7]),))
    assert kept == [whole, part]


def test_one_overlap_costs_a_paragraph_not_the_document(texts):
    before, after = "This paragraph comes before the held out one.", "And this paragraph comes after the held out one."
    kept, counts = cleaned(texts, f"{before}\n{HELDOUT}\n{after}")
    assert kept == [f"{before} {after}"]
    assert (counts["paragraphs"], counts["overlaps"]) == (2, 1)


def test_heldout_words_that_meet_across_paragraphs_cost_the_document(texts):
    words = HELDOUT.split()
    kept, counts = cleaned(texts, "\n".join([" ".join(words[:10]), " ".join(words[10:])]))
    assert kept == [] and counts["overlaps"] == 2


def test_duplicates_are_left_out_across_texts(texts):
    line = "The same paragraph occurs in both of the texts."
    own = "Its own paragraph stays where it was found here."
    texts(wikipedia=[line, "the SAME  paragraph occurs in both of the texts."], xsum=[f"{own}\n{line}"])
    kept, counts = corpus.clean(["wikipedia", "xsum"], corpus.Overlap([], 13))
    assert [document.content for document in kept] == [line, own]
    assert (counts["wikipedia"]["duplicates"], counts["xsum"]["duplicates"]) == (1, 1)


def test_markup_headings_and_tables_are_cleaned_away(texts):
    kept, counts = cleaned(
        texts,
        "TAXES\n\n<b>All of us</b> have paid our taxes &amp; dues. [Applause] So we have!\n"
        "1901 12.5 13.7 1902 14.1 15.5 1903 16.2 17.8 (a)",
    )
    assert kept == ["All of us have paid our taxes & dues. So we have!"]
    assert counts["short"] == 2


def test_packed_sequences_are_full_and_keep_the_stream(tokenizer):
    stream = list(range(5, 5 + 100))
    packed = corpus.pack(stream, tokenizer, 16)
    assert packed.shape == (7, 16) and packed.dtype == numpy.uint16
    assert (packed[:, 0] == tokenizer.cls_token_id).all() and (packed[:, -1] == tokenizer.sep_token_id).all()
    assert packed[:, 1:-1].ravel().tolist() == stream[:98]


def test_the_corpus_is_the_shuffled_documents_without_padding(params, tokenizer, tasks_folder, texts, tmp_path):
    counts = corpus.build_corpus(params, "english", tasks_folder, tmp_path / "corpus", tmp_path / "encoder")
    data = corpus.load_corpus(tmp_path / "corpus")
    assert {split: len(data[split]) for split in data} == {split: counts[split]["sequences"] for split in data}
    assert len(data["validation"]) == 4
    sequences = numpy.array(data["train"]["input_ids"])
    assert sequences.shape[1] == 16 and tokenizer.pad_token_id not in sequences
    stream = sequences[:, 1:-1].ravel().tolist()

    documents, _ = corpus.clean(["wikipedia", "xsum"], corpus.Overlap([HELDOUT], 13))
    random.Random(params.corpus.seed).shuffle(documents)
    expected = [[*tokenizer(d.content)["input_ids"][1:-1], tokenizer.sep_token_id] for d in documents]
    # a document gives validation at most 4 x 14 / 16 = 3 tokens, so the first 19 documents fill it
    first = [token for tokens in expected[:19] for token in tokens[:3]]
    assert numpy.array(data["validation"]["input_ids"])[:, 1:-1].ravel().tolist() == first[:56]
    rest = [token for tokens in expected[19:] for token in tokens]
    assert stream == rest[: len(rest) // 14 * 14]
    texts_counts = counts["texts"]
    assert sum(count["tokens"] for count in texts_counts.values()) == len(rest)
    assert {name: count["documents"] for name, count in texts_counts.items()} == {"wikipedia": 60, "xsum": 20}


def test_no_heldout_text_reaches_the_corpus(params, tokenizer, tasks_folder, texts, tmp_path):
    generator = random.Random(2)
    ours = [sentence(generator) for _ in range(60)]
    texts(wikipedia=[*ours, HELDOUT], xsum=[f"{sentence(generator)}\nSo it said: {HELDOUT}!"])
    counts = corpus.build_corpus(params, "english", tasks_folder, tmp_path / "corpus", tmp_path / "encoder")
    assert [count["overlaps"] for count in counts["texts"].values()] == [1, 1]
    data = corpus.load_corpus(tmp_path / "corpus")
    # words of the held-out text are unknown to the tokenizer, all others are known
    assert tokenizer.unk_token_id in tokenizer(HELDOUT)["input_ids"]
    assert not any(tokenizer.unk_token_id in row for split in data.values() for row in split["input_ids"])


def test_training_tokens_are_cut_to_whole_sequences(params, tasks_folder, texts, tmp_path):
    full = corpus.build_corpus(params, "english", tasks_folder, tmp_path / "full", tmp_path / "encoder")
    settings = params.corpus.model_copy(update={"max_tokens": 16 * 20 + 15})
    cut = params.model_copy(update={"corpus": settings})
    counts = corpus.build_corpus(cut, "english", tasks_folder, tmp_path / "cut", tmp_path / "encoder")
    assert counts["train"] == {"sequences": 20, "tokens": 320}
    assert full["train"]["sequences"] > 20
    kept = corpus.load_corpus(tmp_path / "full")["train"][:20]["input_ids"]
    assert corpus.load_corpus(tmp_path / "cut")["train"][:]["input_ids"] == kept


def test_a_corpus_shorter_than_one_batch_is_refused(params, tasks_folder, texts, tmp_path):
    settings = params.corpus.model_copy(update={"max_tokens": 16 * 7})
    short = params.model_copy(update={"corpus": settings})
    with pytest.raises(StudyError, match=r"has 7 training sequences; a batch needs distillation\.batch_size = 8"):
        corpus.build_corpus(short, "english", tasks_folder, tmp_path / "corpus", tmp_path / "encoder")
    assert not (tmp_path / "corpus").exists()
    texts(wikipedia=["One document alone does not fill the validation split."], xsum=[])
    with pytest.raises(StudyError, match="corpus has 0 training sequences"):
        corpus.build_corpus(params, "english", tasks_folder, tmp_path / "corpus", tmp_path / "encoder")


def test_a_corpus_built_twice_is_the_same_bytes(params, tasks_folder, texts, tmp_path):
    def contents(folder: Path) -> dict:
        return {str(file.relative_to(folder)): file.read_bytes() for file in folder.rglob("*") if file.is_file()}

    counts = []
    for name in ("first", "second"):
        folders = tmp_path / name / "corpus", tmp_path / name / "encoder"
        counts.append(corpus.build_corpus(_trimmed(params), "english", tasks_folder, *folders))
    assert counts[0] == counts[1]
    assert contents(tmp_path / "first") == contents(tmp_path / "second")
    assert len(contents(tmp_path / "first" / "corpus")) == 7 and len(contents(tmp_path / "first" / "encoder")) == 4


def test_the_full_vocabulary_leaves_the_teacher_as_it_is(params, tokenizer, tasks_folder, texts, tmp_path):
    counts = corpus.build_corpus(params, "english", tasks_folder, tmp_path / "corpus", tmp_path / "encoder")
    assert counts["vocabulary"] == {"full": len(tokenizer)}
    before, after = (
        load_model(tmp_path / name, "eager", head=False).state_dict() for name in ("pretrained", "encoder")
    )
    assert before.keys() == after.keys() and all(torch.equal(before[name], after[name]) for name in before)
    assert load_tokenizer(tmp_path / "encoder").get_vocab() == tokenizer.get_vocab()


def test_a_trimmed_vocabulary_changes_ids_and_nothing_else(params, tasks_folder, texts, tmp_path):
    generator = random.Random(3)
    texts(wikipedia=[" ".join(generator.choices(WORDS[::2], k=12)) for _ in range(90)], xsum=[])
    chosen = {"full": params, "trimmed": _trimmed(params)}
    counts, tokenizers, models, data = {}, {}, {}, {}
    for name, values in chosen.items():
        folder = tmp_path / name
        counts[name] = corpus.build_corpus(values, "english", tasks_folder, folder / "corpus", folder / "encoder")
        tokenizers[name] = load_tokenizer(folder / "encoder")
        models[name] = load_model(folder / "encoder", "eager", head=False)
        data[name] = corpus.load_corpus(folder / "corpus")

    occurring = set()
    for split in ("train", "validation"):
        ids = {name: torch.tensor(data[name][split]["input_ids"]) for name in chosen}
        pieces = {name: tokenizers[name].convert_ids_to_tokens(ids[name].flatten().tolist()) for name in chosen}
        assert pieces["full"] == pieces["trimmed"]
        with torch.no_grad():
            hidden = {name: models[name](input_ids=ids[name]).last_hidden_state for name in chosen}
        assert torch.equal(hidden["full"], hidden["trimmed"])
        occurring |= set(pieces["full"])
    task = set(tokenizers["full"].tokenize(f"free {HELDOUT}"))
    special = set(tokenizers["full"].all_special_tokens)
    assert set(tokenizers["trimmed"].get_vocab()) == occurring | task | special | set(LETTERS)
    assert models["trimmed"].config.vocab_size == len(tokenizers["trimmed"]) < len(tokenizers["full"]) - 100
    vocabulary = {"full": len(tokenizers["full"]), "occurring": len(occurring - {"[CLS]"} | task)}
    assert counts["trimmed"].pop("vocabulary") == vocabulary | {"kept": len(tokenizers["trimmed"])}
    counts["full"].pop("vocabulary")
    assert counts["full"] == counts["trimmed"]


def _trimmed(params):
    setting = params.settings["english"].model_copy(update={"vocabulary": "trimmed"})
    return params.model_copy(update={"settings": {"english": setting}})


def test_samples_are_decoded_training_sequences(params, tokenizer, tasks_folder, texts, tmp_path):
    counts = corpus.build_corpus(params, "english", tasks_folder, tmp_path / "corpus", tmp_path / "encoder")
    shown = corpus.samples(corpus.load_corpus(tmp_path / "corpus"), tokenizer, 3)
    assert len(shown) == 3
    assert all(text.startswith("[CLS] ") and text.endswith(" [SEP]") for text in shown)
    assert not any(word in str(counts) for word in shown[0].split()[1:-1])


def test_a_missing_corpus_is_one_line(tmp_path):
    with pytest.raises(StudyError, match="run the stage `corpus` first"):
        corpus.load_corpus(tmp_path / "corpus")
