"""Large texts: on all cores, in bounded memory, the same as a slow and simple way gives."""

from __future__ import annotations

import json
import os
import random
import re
import subprocess
import sys
from collections import Counter
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
import tiny
from tiny_work import process_of
from tokenizers import Tokenizer, decoders, models, normalizers, pre_tokenizers, trainers
from transformers import PreTrainedTokenizerFast

from study import StudyError
from study.data import cleaning, corpus, pool, storage
from study.data.cleaning import Seen, clean
from study.data.passages import Overlap
from study.data.pool import Pool
from study.data.pretrained import save_model
from study.data.rows import LONGEST, documents
from study.data.tokens import Tokeniser, encode, read_again
from study.declarations import OwnText, hashes_of
from study.descriptions import CorpusData
from study.distillation.masking import MaskedSequences
from study.files import Layout
from study.sections import Teacher

FEW = [f"{a}{b}" for a in "abcdefg" for b in "aeiou"]


def slowly_cleaned(texts: dict[str, list[str]], heldout: list[str], longest: int) -> list[tuple[str, str]]:
    """What :func:`clean` says it does, word by word."""

    def words(text: str) -> list[str]:
        return re.findall(r"\w+", text.casefold())

    held = [words(text) for text in heldout]
    runs = {tuple(own[i : i + longest]) for own in held for i in range(len(own) - longest + 1)}
    whole = [tuple(own) for own in held if 8 <= len(own) < longest]

    def overlaps(text: str) -> bool:
        own = words(text)
        for i in range(len(own)):
            if tuple(own[i : i + longest]) in runs or any(tuple(own[i : i + len(w)]) == w for w in whole):
                return True
        return False

    seen, found = set(), []
    for name, contents in texts.items():
        for content in contents:
            kept = []
            for line in content.split("\n"):
                paragraph = " ".join(line.split())
                if not paragraph:
                    continue
                long = len(paragraph.split()) >= 8 and sum(c.isalpha() for c in paragraph) >= len(paragraph) / 2
                if long and paragraph.casefold() not in seen and not overlaps(paragraph):
                    kept.append(paragraph)
                seen.add(paragraph.casefold())
            if kept and not (len(kept) > 1 and overlaps(" ".join(kept))):
                found.append((name, " ".join(kept)))
    return found


def text_of(generator: random.Random, count: int) -> list[str]:
    """Documents of few words, so that paragraphs come again, and runs of a text occur in another by chance."""
    clauses = [" ".join(generator.choices(FEW, k=generator.randrange(3, 9))) for _ in range(60)]
    drawn = []
    for _ in range(count):
        lines = [
            ", ".join(generator.choices(clauses, k=generator.randrange(1, 4))) for _ in range(generator.randrange(1, 6))
        ]
        drawn.append("\n".join(generator.choice([line, line.upper(), line + " 1 2 3 4 5"]) for line in lines))
    return drawn


@pytest.mark.parametrize("longest", [8, 10, 13])
def test_cleaning_is_the_same_as_word_by_word(longest, monkeypatch):
    generator = random.Random(longest)
    clauses = text_of(generator, 900)
    heldout = [" ".join(text.split()[: generator.randrange(6, 30)]) for text in clauses[:25]]
    texts = {"wikipedia": clauses[:450], "xsum": clauses[450:]}
    monkeypatch.setattr(cleaning, "TEXTS", {name: lambda own=own: iter(own) for name, own in texts.items()})
    found, counts = clean(texts, Overlap(heldout, longest), processes=1)
    expected = slowly_cleaned(texts, heldout, longest)
    assert [tuple(document) for document in found] == expected
    total = Counter(key for count in counts.values() for key, number in count.items() for _ in range(number))
    assert min(total["short"], total["duplicates"], total["overlaps"]) > 20 and 100 < len(expected) < 850
    assert [found.name(i) for i in range(len(found))] == [name for name, _ in expected]
    assert found.sizes().tolist() == [len(content.encode()) for _, content in expected]


def small_corpus(root: Path, folder: Path, texts: dict[str, str], processes: int | None = None, vocabulary="full"):
    """The corpus of files ``<name>.jsonl`` of ``root`` (name -> language) and its bytes, in ``folder``."""
    (root / "notebooks").mkdir(exist_ok=True)
    (root / "params.yaml").touch()
    save_model(tiny.masked_language_model().base_model, tiny.tokenizer(root / "words"), root / "teacher")
    declared = [OwnText(files=f"{name}.jsonl", column="body", language=own) for name, own in texts.items()]
    description = CorpusData(
        setting="english",
        revisions={},
        teacher=Teacher(name=str(root / "teacher"), family="bert", **tiny.TEACHER),
        vocabulary=vocabulary,
        texts=declared,
        tasks=[],
        corpus=tiny.parameters(root).corpus.model_copy(update={"sequence_length": 16, "validation_sequences": 2}),
        hashes=hashes_of({text.label: text for text in declared}, root),
    )
    counts = corpus.build_corpus(description, Layout(root, "english"), folder / "corpus", folder / "encoder", processes)
    return counts, {str(p.relative_to(folder)): p.read_bytes() for p in folder.rglob("*") if p.is_file()}


def write_text(file: Path, megabytes: float, seed: int = 0) -> None:
    generator = random.Random(seed)
    with file.open("w") as stream:
        while stream.tell() < 1e6 * megabytes:
            stream.write(json.dumps({"body": " ".join(generator.choices(tiny.WORDS, k=100))}) + "\n")


def test_many_processes_write_the_same_bytes(tmp_path, monkeypatch):
    """Batches are small, so that the others work on most of them; the small languages are read several times."""
    monkeypatch.setattr(cleaning, "BATCH", 2000)
    monkeypatch.setattr(corpus, "TOKENISED", 2000)
    monkeypatch.setattr(pool, "ALONE", 1)
    started = []
    begin = pool.ProcessPoolExecutor
    monkeypatch.setattr(pool, "ProcessPoolExecutor", lambda *own: started.append(own) or begin(*own))
    for seed, (name, size) in enumerate({"a": 0.02, "b": 0.008, "c": 0.004}.items()):
        write_text(tmp_path / f"{name}.jsonl", size, seed)
    languages = {"a": "en", "b": "de", "c": "fr"}
    built = [small_corpus(tmp_path, tmp_path / str(n), languages, n, "trimmed") for n in (1, 2)]
    assert len(started) == 2  # cleaning, tokenising
    assert built[0] == built[1] and len(built[0][1]) == 12
    assert built[0][0]["languages"]["fr"]["passes"] > 1.5


def test_a_pool_keeps_order_and_asks_for_no_more_than_it_needs(monkeypatch):
    monkeypatch.setattr(pool, "ALONE", 2)
    asked = []

    def items(count: int) -> Iterator[int]:
        for item in range(100, 100 + count):
            asked.append(item)
            yield item

    with Pool(process_of, 7, processes=2) as own:
        found = list(own.map(items(12)))
        assert [(shared, item) for shared, item, _ in found] == [(7, item) for item in range(100, 112)]
        others = [process for *_, process in found]
        assert others[:2] == [os.getpid()] * 2 and os.getpid() not in others[2:]
        asked.clear()
        mapped = own.map(items(1000))
        next(mapped)
        assert len(asked) == 4
        mapped.close()
        with pytest.raises(StudyError, match="item 13 is bad"):
            list(own.map([13]))
        with pytest.raises(StudyError, match="ended from outside"):
            list(own.map([14]))
    assert [process for *_, process in Pool(process_of, 7, processes=1).map(range(5))] == [os.getpid()] * 5


def test_keys_are_new_once():
    generator = np.random.default_rng(0)
    seen, known = Seen(), set()
    for size in (1, 300, 5, 2000, 40, 0, 3000):
        keys = generator.integers(2**63 - 4000, 2**63, size, dtype=np.uint64).tolist()
        expected = []
        for key in keys:
            expected.append(key not in known)
            known.add(key)
        assert seen.first(keys) == expected
    assert 2000 < sum(map(len, seen._parts)) == len(known)


def test_documents_are_read_again_as_they_were(tmp_path):
    rows = [(n, np.arange(n, dtype=np.int32) * 10**6) for n in (3, 1, 5)]
    again = read_again(iter(rows), tmp_path)
    for number in range(10):
        key, tokens = next(again)
        assert key == rows[number % 3][0] and np.array_equal(tokens, rows[number % 3][1])
    assert not list(tmp_path.iterdir()) and list(read_again(iter([]), tmp_path)) == []


def byte_level() -> PreTrainedTokenizerFast:
    backend = Tokenizer(models.BPE())
    backend.pre_tokenizer, backend.normalizer = pre_tokenizers.ByteLevel(), normalizers.NFC()
    backend.decoder = decoders.ByteLevel()
    special = ["<s>", "<pad>", "</s>", "<unk>", "<mask>"]
    backend.train_from_iterator(
        text_of(random.Random(0), 30),
        trainers.BpeTrainer(
            vocab_size=500, special_tokens=special, initial_alphabet=pre_tokenizers.ByteLevel.alphabet()
        ),
    )
    names = dict(zip(("cls", "pad", "sep", "unk", "mask"), special, strict=True))
    return PreTrainedTokenizerFast(tokenizer_object=backend, **{f"{key}_token": own for key, own in names.items()})


def test_texts_are_tokenised_as_transformers_does(tmp_path):
    texts = ["AX by cz", "", "a <mask> b [MASK] é 汉字 \n x", "k " * 600]
    for tokenizer in (tiny.tokenizer(tmp_path), byte_level()):
        tokenizer(texts[:2], padding=True, truncation=True, max_length=4)  # which its backend remembers
        own = Tokeniser.of(tokenizer)
        expected = [[*tokenizer(text, add_special_tokens=False)["input_ids"], tokenizer.sep_token_id] for text in texts]
        assert [ids.tolist() for ids in encode(own, texts)] == expected and len(expected[3]) > 600
        slow = Tokeniser(tokenizer, tokenizer.sep_token_id)
        assert [ids.tolist() for ids in encode(slow, texts)] == expected


def test_long_splits_are_written_in_parts_and_mapped_from_the_file(tmp_path, monkeypatch):
    rows = tiny.sequences(2500, 1)
    parts = {"train": [rows[:1000], rows[1000:2000], rows[2000:]], "validation": [rows[:10]]}
    storage.save_sequences(parts, tmp_path / "held", lambda: {"sha256": "x"})
    monkeypatch.setattr(storage, "HELD", rows[:1500].nbytes)
    storage.save_sequences({name: iter(own) for name, own in parts.items()}, tmp_path / "long", lambda: {"sha256": "x"})
    files = {name: (tmp_path / name / "train" / "data-00000-of-00001.arrow").read_bytes() for name in ("held", "long")}
    assert files["held"] == files["long"]
    data = corpus.load_corpus(tmp_path / "long")
    assert [*data] == ["validation", "train"] and data["train"].cache_files  # a mapped file, not memory
    stream = MaskedSequences(data["train"], tiny.parameters(tmp_path).masking, tiny.tokenizer(tmp_path), seed=0)
    assert np.array_equal(np.concatenate(stream._rows), rows)
    assert not any(own.flags.owndata or own.flags.writeable for own in stream._rows)


def test_text_without_line_breaks_is_read_in_pieces(tmp_path):
    (tmp_path / "a.txt").write_text("x" * (2 * LONGEST + LONGEST // 2))
    assert [len(piece) for piece in documents(tmp_path / "a.txt")] == [2 * LONGEST, LONGEST // 2]


@pytest.mark.skipif(sys.platform != "linux", reason="reads the peak as Linux counts it")
def test_memory_does_not_grow_with_the_text(tmp_path):
    """Eleven times the text takes at most 8 MB more, of which its strings alone would be 5, its tokens 10 or 20."""
    for name, size in (("small", 0.5), ("large", 5.5)):
        write_text(tmp_path / f"{name}.jsonl", size)
    script = f"""
import resource, sys
from pathlib import Path
sys.path.insert(0, {str(Path(__file__).parent)!r})
from study.data import cleaning, storage
from test_scale import small_corpus
storage.HELD, cleaning.BATCH = 2**18, 50_000
for name in ("small", "small", "large"):
    counts, _ = small_corpus(Path({str(tmp_path)!r}), Path({str(tmp_path)!r}, name), {{name: "en"}}, 1)
    print(counts["train"]["tokens"], resource.getrusage(resource.RUSAGE_SELF).ru_maxrss)
"""
    print(script)
    outcome = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True)
    assert outcome.returncode == 0, outcome.stderr[-2000:]
    (few, _), (_, before), (many, after) = (
        map(int, line.split()) for line in outcome.stdout.splitlines() if line[0].isdigit()
    )
    assert many > 10 * few and after - before < 8_000, (before, after)
