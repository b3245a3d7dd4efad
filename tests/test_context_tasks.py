"""Tasks made by rule from running text, and the probe of masked words."""

from __future__ import annotations

from collections import Counter

import numpy as np
import pytest
import tiny
import torch
from datasets import Dataset, DatasetDict

from study import StudyError
from study.data import storage, tasks
from study.data.tasks import context
from study.data.tasks.task import Task, fraction
from study.descriptions import Evaluation
from study.evaluation.finetune import Collator
from study.evaluation.masked_word import guess_masked_words, masked_word_scores, states_at_masks

TEXT = (
    "The old castle stands on a hill above the town of Aberdeen. It was built in 1200 by the brother of the king."
    ' He said "no" to all of them. The walls are made of red stone from the quarries near the river! Mr. B. went home'
)


def numbered(count: int, start: int = 0) -> list[context.Passage]:
    """Passages of two sentences each, all different, every second about one thing and every second about several."""
    return [
        [f"The door of house number {i} is always painted in green by the owners.",
         f"All windows of house number {i} are very small and open to the back."]
        for i in range(start, start + count)
    ]  # fmt: skip


def test_sentences_are_whole_and_what_is_left_out_keeps_its_place():
    found = context.sentences(TEXT)
    assert found[0] == "The old castle stands on a hill above the town of Aberdeen."
    assert found[1] is not None and found[1].startswith("It was built in 1200")
    assert found[2] is None and found[3] is None and found[-1] is None  # a quotation, an exclamation, a fragment
    assert context.sentences("Only seven words are in this one.") == [None]


def test_half_of_the_sentences_have_two_neighbouring_words_swapped_and_nothing_else():
    examples = [example for passage in numbered(200) for example in context.bigram_shift(passage)]
    assert len(examples) == 400
    assert 150 < sum(example["label"] == "swapped" for example in examples) < 250
    for example in examples:
        shown, source = str(example["text"]).split(), str(example["source"]).split()
        places = [i for i, (a, b) in enumerate(zip(shown, source, strict=True)) if a != b]
        if example["label"] == "original":
            assert places == []
        else:
            i, j = places
            assert j == i + 1 and (shown[i], shown[j]) == (source[j], source[i])
            assert all(word.isalpha() and word.islower() for word in (shown[i], shown[j]))
    assert context.bigram_shift(numbered(1)[0]) is not None
    assert list(context.bigram_shift([None])) == []


def test_sentences_in_order_and_turned_round():
    examples = [example for passage in numbered(200) for example in context.sentence_order(passage)]
    assert len(examples) == 200 and 70 < sum(example["label"] == "turned" for example in examples) < 130
    for example in examples:
        pair = [example["text"], example["text_pair"]]
        ordered = pair if example["label"] == "in order" else pair[::-1]
        assert " ".join(map(str, ordered)) == example["source"]
    assert list(context.sentence_order(["A sentence.", None, "Another one."])) == []


def test_neither_form_nor_frequency_tells_whether_a_verb_agrees():
    passages = numbered(40) + [["The roof of this house is made of slate and lead as usual."]] * 1
    examples = context.agreement(passages)
    counts = Counter((word, example["label"]) for example in examples for word in str(example["text"]).split())
    assert counts["is", "right"] == counts["is", "wrong"] == counts["are", "right"] == counts["are", "wrong"] == 20
    for example in examples:
        assert (example["text"] == example["source"]) == (example["label"] == "right")


def test_masked_words_are_balanced_and_rebuild_their_sentence(monkeypatch):
    monkeypatch.setattr(context, "MASKED_WORDS", 6)
    monkeypatch.setattr(context, "EXAMPLES_OF_A_WORD", {"train": 10, "development": 3, "test": 4})
    passages = {"train": numbered(60), "development": numbered(30, 100), "test": numbered(30, 200)}
    splits = context.masked_words(passages, "fr")
    assert set(splits) == {"train-fr", "development-fr", "test-fr"}
    for split, often in (("train-fr", 10), ("development-fr", 3), ("test-fr", 4)):
        counts = Counter(example["label"] for example in splits[split])
        assert len(counts) == 6 and set(counts.values()) == {often}
        for example in splits[split]:
            word = str(example["label"]).removeprefix("fr:")
            assert f"{example['text']}{word}{example['text_pair']}" == example["source"]
        sources = [example["source"] for example in splits[split]]
        assert len(sources) == len(set(sources))


def test_every_text_of_a_task_made_by_rule_is_withheld_with_its_source(monkeypatch, tmp_path):
    """The corpus leaves out what development and test examples were made from, swapped words put back."""
    passages = {"train": numbered(20), "development": numbered(20, 100), "test": numbered(20, 200)}
    monkeypatch.setattr(context, "news", lambda: passages)
    task = tasks.TASKS["bigram-shift"]
    splits = task.loader()
    rows = {split: Dataset.from_list(examples, features=task.features) for split, examples in splits.items()}
    storage.save(DatasetDict(rows), tmp_path / "bigram-shift")
    withheld = tasks.heldout_texts(tmp_path, ["bigram-shift"])
    assert {s for split in ("development", "test") for p in passages[split] for s in p} <= set(withheld)
    assert not {s for p in passages["train"] for s in p} & set(withheld)


@pytest.fixture
def probe(monkeypatch, tmp_path):
    """A probe whose word follows from its neighbours: the words of tiny.sequences climb by one or two."""
    monkeypatch.chdir(tmp_path)
    tiny.workspace(tmp_path)

    def rows(count: int, seed: int) -> Dataset:
        texts = [[tiny.WORDS[i - 5] for i in row[1:9]] for row in tiny.sequences(count, seed)]
        return Dataset.from_dict(
            {"text": [" ".join(t[:4]) + " " for t in texts], "text_pair": [" " + " ".join(t[5:]) for t in texts],
             "label": [f"en:{t[4][0]}" for t in texts], "source": [" ".join(t) for t in texts]}
        )  # fmt: skip

    task = Task("masked-word", dict, (), "accuracy", ("accuracy",), True, "", kind="masked-word", made_by_rule=True)
    monkeypatch.setitem(tasks.TASKS, "masked-word", task)
    splits = {"train": rows(400, 1), "development": rows(100, 2), "test": rows(120, 3)}
    storage.save(DatasetDict(splits), tmp_path / "tasks" / "masked-word")
    return tmp_path


def described(folder, **budget) -> Evaluation:
    description = next(iter(tiny.plan(folder).of(Evaluation)))
    own = description.tasks["topic"].model_copy(
        update={"train": None, "development": None, "test": None, "max_length": 16, "languages": ["en"]} | budget
    )
    return description.model_copy(update={"tasks": {"masked-word": own}})


def test_a_state_at_a_mask_is_that_of_a_whole_forward_pass(probe):
    words = tiny.tokenizer(probe / "words")
    encoder = tiny.masked_language_model().base_model
    rows = storage.load(probe / "tasks" / "masked-word", "tasks")["test"].select(range(7))
    states = states_at_masks(encoder, rows, Collator(words, 8), 16, bf16=False, batch_size=3)
    for row, state in zip(rows, states, strict=True):
        text = f"{row['text']}[MASK]{row['text_pair']}"
        ids = torch.tensor([words(text)["input_ids"]])
        with torch.no_grad():
            expected = encoder(input_ids=ids).last_hidden_state[0][int((ids[0] == 4).nonzero())]
        assert np.allclose(state, expected.numpy(), atol=1e-5)


def test_masked_words_are_guessed_from_what_is_around_them(probe):
    words = tiny.tokenizer(probe / "words")
    result = guess_masked_words(described(probe), probe / "pretrained", "masked-word", probe / "tasks", words)
    assert result.test_examples == 120 and set(result.development) == {"en"}
    labels = storage.load(probe / "tasks" / "masked-word", "tasks")["test"]["label"]
    majority = Counter(labels).most_common(1)[0][1] / len(labels)
    assert result.languages["en"]["accuracy"] > majority + 0.1
    assert result.development["en"] > majority + 0.1


def test_only_the_splits_asked_for_are_touched(probe):
    """Tuning and admission read development data; without a test split they say the same."""
    words, folder = tiny.tokenizer(probe / "words"), probe / "tasks" / "masked-word"
    whole = guess_masked_words(described(probe), probe / "pretrained", "masked-word", probe / "tasks", words)
    splits = storage.load(folder, "tasks")
    storage.save(DatasetDict({split: splits[split] for split in ("train", "development")}), folder)
    scores = masked_word_scores(described(probe), probe / "pretrained", "masked-word", probe / "tasks", words)
    assert scores == {"en": {"development": whole.development["en"]}}


def test_a_text_too_long_for_its_mask_is_refused(probe):
    words = tiny.tokenizer(probe / "words")
    with pytest.raises(StudyError, match=r"10 tokens; allowed: at most max_length = 8"):
        short = described(probe, max_length=8)
        guess_masked_words(short, probe / "pretrained", "masked-word", probe / "tasks", words)


def test_labels_depend_on_the_sentence_alone():
    (sentence,) = [s for s in numbered(1)[0] if s.startswith("The door")]
    (example,) = context.bigram_shift([sentence])
    assert (example["label"] == "swapped") == (fraction(f"bigram shift {sentence}") < 0.5)
