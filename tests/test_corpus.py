from __future__ import annotations

import hashlib
import json
import random
import zipfile
from dataclasses import replace
from pathlib import Path

import numpy
import pytest
import tiny
import torch
from datasets import ClassLabel, Dataset, DatasetDict, Features, Value
from transformers import BertConfig, BertModel, BertTokenizerFast

from study import StudyError
from study.data import cleaning, corpus, sources, storage
from study.data.pretrained import load_model, load_tokenizer, save_model
from study.data.texts import INTERFACE, TRANSLATIONS, read_interface
from study.data.texts import TEXTS as READERS
from study.descriptions import CorpusData
from study.files import Layout, content_hash
from study.methods import TEXTS
from study.sections import Teacher

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
def description(tokenizer, tmp_path):
    """English, two texts and one task, sequences of 16 tokens."""
    settings = {"sequence_length": 16, "validation_sequences": 4, "max_tokens": None}
    return CorpusData(
        setting="english",
        revisions={},
        teacher=Teacher(name=str(tmp_path / "pretrained"), **SIZES),
        vocabulary="full",
        texts=["wikipedia", "xsum"],
        tasks=["topic"],
        corpus=tiny.parameters(tmp_path).corpus.model_copy(update=settings),
    )


def changed(description: CorpusData, **settings) -> CorpusData:
    """With other values of the section `corpus`."""
    return description.model_copy(update={"corpus": description.corpus.model_copy(update=settings)})


def trimmed(description: CorpusData) -> CorpusData:
    return description.model_copy(update={"vocabulary": "trimmed"})


@pytest.fixture
def layout(tmp_path):
    """Where the task is."""
    layout = Layout(tmp_path, "english")
    features = Features({"text": Value("string"), "label": ClassLabel(names=["no"])})
    heldout = Dataset.from_list([{"text": HELDOUT, "label": "no"}], features=features)
    train = Dataset.from_list([{"text": "free " * 20, "label": "no"}], features=features)
    storage.save(DatasetDict(train=train, development=heldout, test=heldout), layout.tasks / "topic")
    return layout


def build(description: CorpusData, layout: Layout, folder: Path) -> dict:
    """Corpus and encoder in two folders of ``folder``, and the counts."""
    return corpus.build_corpus(description, layout, folder / "corpus", folder / "encoder")


def sentence(generator: random.Random, words: int = 12) -> str:
    return " ".join(generator.choices(WORDS, k=words))


@pytest.fixture
def texts(monkeypatch):
    """Sets what the readers of `wikipedia` and `xsum` give; by default 60 documents of 12 words, and 20 of 3 x 12."""
    generator = random.Random(1)
    first = [sentence(generator) for _ in range(60)]
    second = ["\n".join(sentence(generator) for _ in range(3)) for _ in range(20)]

    def put(wikipedia: list[str] = first, xsum: list[str] = second) -> None:
        monkeypatch.setitem(READERS, "wikipedia", lambda: iter(wikipedia))
        monkeypatch.setitem(READERS, "xsum", lambda: iter(xsum))

    put()
    return put


def cleaned(texts, *documents: str, heldout=(HELDOUT,), words: int = 13):
    texts(wikipedia=list(documents), xsum=[])
    kept, counts = cleaning.clean(["wikipedia"], cleaning.Overlap(heldout, words))
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
    kept, counts = cleaning.clean(["wikipedia", "xsum"], cleaning.Overlap([], 13))
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


def test_the_corpus_is_the_shuffled_documents_without_padding(description, tokenizer, layout, texts, tmp_path):
    counts = build(description, layout, tmp_path)
    data = corpus.load_corpus(tmp_path / "corpus")
    assert {split: len(data[split]) for split in data} == {split: counts[split]["sequences"] for split in data}
    assert len(data["validation"]) == 4
    sequences = numpy.array(data["train"]["input_ids"])
    assert sequences.shape[1] == 16 and tokenizer.pad_token_id not in sequences
    stream = sequences[:, 1:-1].ravel().tolist()

    documents = list(cleaning.clean(["wikipedia", "xsum"], cleaning.Overlap([HELDOUT], 13))[0])
    random.Random(description.corpus.seed).shuffle(documents)
    expected = [[*tokenizer(d.content)["input_ids"][1:-1], tokenizer.sep_token_id] for d in documents]
    # a document gives validation at most 4 x 14 / 16 = 3 tokens, so the first 19 documents fill it
    first = [token for tokens in expected[:19] for token in tokens[:3]]
    assert numpy.array(data["validation"]["input_ids"])[:, 1:-1].ravel().tolist() == first[:56]
    rest = [token for tokens in expected[19:] for token in tokens]
    assert stream == rest[: len(rest) // 14 * 14]
    texts_counts = counts["texts"]
    assert sum(count["tokens"] for count in texts_counts.values()) == len(rest)
    assert {name: count["documents"] for name, count in texts_counts.items()} == {"wikipedia": 60, "xsum": 20}


def test_no_heldout_text_reaches_the_corpus(description, tokenizer, layout, texts, tmp_path):
    generator = random.Random(2)
    ours = [sentence(generator) for _ in range(60)]
    texts(wikipedia=[*ours, HELDOUT], xsum=[f"{sentence(generator)}\nSo it said: {HELDOUT}!"])
    counts = build(description, layout, tmp_path)
    assert [count["overlaps"] for count in counts["texts"].values()] == [1, 1]
    data = corpus.load_corpus(tmp_path / "corpus")
    # words of the held-out text are unknown to the tokenizer, all others are known
    assert tokenizer.unk_token_id in tokenizer(HELDOUT)["input_ids"]
    assert not any(tokenizer.unk_token_id in row for split in data.values() for row in split["input_ids"])


def test_training_tokens_are_cut_to_whole_sequences(description, layout, texts, tmp_path):
    full = build(description, layout, tmp_path / "full")
    counts = build(changed(description, max_tokens=16 * 20 + 15), layout, tmp_path / "cut")
    assert counts["train"] == {"sequences": 20, "tokens": 320}
    assert full["train"]["sequences"] > 20
    kept = corpus.load_corpus(tmp_path / "full" / "corpus")["train"][:20]["input_ids"]
    assert corpus.load_corpus(tmp_path / "cut" / "corpus")["train"][:]["input_ids"] == kept


def test_a_corpus_without_a_training_sequence_is_refused(description, layout, texts, tmp_path):
    """How many a batch needs is a matter of training: seven are enough here."""
    counts = build(changed(description, max_tokens=16 * 7), layout, tmp_path / "short")
    assert counts["train"] == {"sequences": 7, "tokens": 112}
    message = r"corpus has 0 training sequences; allowed: at least one \(raise corpus\.max_tokens or add texts to"
    with pytest.raises(StudyError, match=message + r" settings\.english\.texts\)"):
        build(changed(description, max_tokens=15), layout, tmp_path)
    texts(wikipedia=["One document alone does not fill the validation split."], xsum=[])
    with pytest.raises(StudyError, match=message):
        build(description, layout, tmp_path)
    assert not (tmp_path / "corpus").exists() and not (tmp_path / "encoder").exists()


def test_a_corpus_built_twice_is_the_same_bytes(description, layout, texts, tmp_path):
    def contents(folder: Path) -> dict:
        return {str(file.relative_to(folder)): file.read_bytes() for file in folder.rglob("*") if file.is_file()}

    counts = []
    for name in ("first", "second"):
        counts.append(build(trimmed(description), layout, tmp_path / name))
    assert counts[0] == counts[1]
    assert contents(tmp_path / "first") == contents(tmp_path / "second")
    assert len(contents(tmp_path / "first" / "corpus")) == 8 and len(contents(tmp_path / "first" / "encoder")) == 4


def test_the_full_vocabulary_leaves_the_teacher_as_it_is(description, tokenizer, layout, texts, tmp_path):
    counts = build(description, layout, tmp_path)
    assert counts["vocabulary"] == {"full": len(tokenizer)}
    before, after = (
        load_model(tmp_path / name, "eager", head=False).state_dict() for name in ("pretrained", "encoder")
    )
    assert before.keys() == after.keys() and all(torch.equal(before[name], after[name]) for name in before)
    assert load_tokenizer(tmp_path / "encoder").get_vocab() == tokenizer.get_vocab()


def test_a_trimmed_vocabulary_changes_ids_and_nothing_else(description, layout, texts, tmp_path):
    generator = random.Random(3)
    texts(wikipedia=[" ".join(generator.choices(WORDS[::2], k=12)) for _ in range(90)], xsum=[])
    chosen = {"full": description, "trimmed": trimmed(description)}
    counts, tokenizers, models, data = {}, {}, {}, {}
    for name, values in chosen.items():
        folder = tmp_path / name
        counts[name] = build(values, layout, folder)
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


@pytest.fixture
def languages(description, monkeypatch):
    """A setting of 200 English, 50 Spanish and 10 German documents of 12 words each, its description and documents."""
    generator = random.Random(3)
    sizes = {"wikipedia": 200, "wikipedia-es": 50, "interface-de": 10}
    texts = {name: [sentence(generator) for _ in range(size)] for name, size in sizes.items()}
    for name, documents in texts.items():
        monkeypatch.setitem(READERS, name, lambda documents=documents: iter(documents))
    return description.model_copy(update={"texts": list(sizes)}), texts


def packed_documents(sequences, tokenizer) -> list[str]:
    """The whole documents in packed sequences, in order."""
    stream = [token for sequence in sequences for token in sequence[1:-1]]
    text = tokenizer.decode(stream)
    return [document.strip() for document in text.split("[SEP]")[:-1]]


@pytest.mark.parametrize("exponent", [0.0, 0.5, 1.0])
def test_languages_get_smoothed_shares_of_every_stretch(languages, tokenizer, layout, tmp_path, exponent):
    """Shares p_l are n_l ** exponent / sum of all, n_l being 200, 50 and 10 documents of equal length."""
    description, texts = languages
    counts = build(changed(description, language_exponent=exponent), layout, tmp_path)
    total = sum(size**exponent for size in (200, 50, 10))
    train = packed_documents(corpus.load_corpus(tmp_path / "corpus")["train"]["input_ids"], tokenizer)
    for name, language, size in (("wikipedia", "en", 200), ("wikipedia-es", "es", 50), ("interface-de", "de", 10)):
        share = size**exponent / total
        assert counts["languages"][language]["share"] == pytest.approx(share, abs=0.02)
        assert counts["languages"][language]["tokens"] == counts["texts"][name]["tokens"]
        for part in (train[: len(train) // 2], train[len(train) // 2 :]):
            assert sum(document in texts[name] for document in part) == pytest.approx(share * len(part), abs=3)
    assert counts["languages"]["en"]["passes"] == 1


def test_small_languages_are_read_again_and_validation_documents_never(languages, tokenizer, layout, tmp_path):
    description, texts = languages
    counts = build(description, layout, tmp_path)
    train = packed_documents(corpus.load_corpus(tmp_path / "corpus")["train"]["input_ids"], tokenizer)
    first = {document for name in texts for document in texts[name]} - set(train)
    table = counts["languages"]
    assert sum(table[language]["documents"] for language in table) == 260 - len(first)
    assert len(first) >= 19 and counts["validation"]["sequences"] == 4  # at most three tokens of each
    for name, language in (("wikipedia", "en"), ("wikipedia-es", "es"), ("interface-de", "de")):
        times = [train.count(document) for document in texts[name] if document not in first]
        assert len(times) == table[language]["documents"] < len(texts[name])
        assert max(times) - min(times) <= 1
        assert sum(times) / len(times) == pytest.approx(table[language]["passes"], abs=0.2)
    assert table["de"]["passes"] > table["es"]["passes"] > 1.5


def test_one_language_has_no_table_of_languages(description, tokenizer, layout, texts, tmp_path):
    counts = build(description, layout, tmp_path)
    assert "languages" not in counts


def test_characters_count_as_words_in_scripts_without_spaces(texts):
    """Eight characters make a paragraph; thirteen that follow each other in a held-out text are an overlap."""
    heldout = "这是一个用来测试的句子没有人应该在训练里看到它"
    kept, counts = cleaned(texts, "我们今天去图书", "我们今天去图书馆", "我说" + heldout[2:15], heldout=[heldout])
    assert kept == ["我们今天去图书馆"]
    assert (counts["short"], counts["overlaps"]) == (1, 1)
    kept, _ = cleaned(texts, "我说" + heldout[2:14] + "吗", heldout=[heldout])
    assert len(kept) == 1


def test_interface_text_is_translated_sentences(tmp_path, monkeypatch):
    folder = "homeassistant/components/{}/translations/{}.json"
    english = {"title": "Kept in English", "step": {"done": "Done", "more": "More"}}
    german = {"title": "Kept in English", "step": {"done": "Fertig", "more": "Mehr zu  {name}"}, "link": "https://a.de"}
    contents = {
        folder.format("alarm", "en"): english,
        folder.format("alarm", "de"): german,
        folder.format("blind", "en"): {"a": "Up"},
        folder.format("blind", "de"): {"a": "Hoch", "b": {"c": "Nach  unten"}},
        folder.format("blind", "fr"): {"a": "En haut"},
    }
    install_wheel(tmp_path, monkeypatch, "homeassistant", {name: json.dumps(own) for name, own in contents.items()})
    assert list(read_interface("de")) == ["Fertig", "Hoch\nNach unten"]
    with pytest.raises(StudyError, match="interface: no text in 'hi'; allowed: bg, de, el, ru, vi, zh"):
        list(read_interface("hi"))


def test_every_text_that_params_allow_has_a_reader_and_a_language():
    assert tuple(READERS) == TEXTS
    languages = {name: cleaning.Document(name, "").language for name in READERS}
    assert (languages["sotu"], languages["wikipedia-es"], languages["interface-zh"]) == ("en", "es", "zh")
    assert set(languages.values()) == {*INTERFACE, *TRANSLATIONS}


def install_wheel(tmp_path: Path, monkeypatch, package: str, contents: dict[str, str]) -> None:
    source = sources.Source(package, "1.0", "", "", "", ())
    with zipfile.ZipFile(tmp_path / source.file, "w") as archive:
        for member, content in contents.items():
            archive.writestr(member, content)
    sha256 = hashlib.sha256((tmp_path / source.file).read_bytes()).hexdigest()
    monkeypatch.setenv("STUDY_SOURCES", str(tmp_path))
    monkeypatch.setattr(sources, "SOURCES", {package: replace(source, sha256=sha256)})


def test_samples_are_decoded_training_sequences(description, tokenizer, layout, texts, tmp_path):
    counts = build(description, layout, tmp_path)
    shown = corpus.samples(corpus.load_corpus(tmp_path / "corpus"), tokenizer, 3)
    assert len(shown) == 3
    assert all(text.startswith("[CLS] ") and text.endswith(" [SEP]") for text in shown)
    assert not any(word in str(counts) for word in shown[0].split()[1:-1])


def test_a_missing_corpus_is_one_line(tmp_path):
    with pytest.raises(StudyError, match="run the stage `corpus` first"):
        corpus.load_corpus(tmp_path / "corpus")


def test_the_hash_of_a_corpus_is_that_of_its_tokens(description, layout, texts, tmp_path):
    build(description, layout, tmp_path)
    build(description, layout, tmp_path / "again")
    build(changed(description, max_tokens=16 * 20), layout, tmp_path / "short")
    first, again, short = (corpus.corpus_hash(tmp_path / name / "corpus") for name in (".", "again", "short"))
    assert first == again != short and len(bytes.fromhex(first)) == 32
    assert first == (tmp_path / "corpus" / "sha256").read_text().strip()
    (tmp_path / "corpus" / "sha256").unlink()
    assert corpus.corpus_hash(tmp_path / "corpus") == content_hash(tmp_path / "corpus") != first
    with pytest.raises(StudyError, match="run the stage `corpus` first"):
        corpus.corpus_hash(tmp_path / "none")


def test_anybody_may_read_what_is_written(description, layout, texts, tmp_path):
    build(description, layout, tmp_path)
    files = [file for name in ("corpus", "encoder") for file in (tmp_path / name).rglob("*") if file.is_file()]
    assert len(files) == 12 and {file.stat().st_mode & 0o777 for file in files} == {0o644}
