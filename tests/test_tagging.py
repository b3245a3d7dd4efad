"""Tasks that tag words: files, words among sub-words, the classifier, entities and their F1."""

from __future__ import annotations

import json
import math

import numpy as np
import pytest
import tiny
import torch
from datasets import ClassLabel, Dataset, DatasetDict, Features, List, Value
from pydantic import ValidationError
from sklearn.linear_model import LogisticRegression
from sklearn.preprocessing import StandardScaler
from test_scale import byte_level

from study import StudyError
from study.data.pretrained import load_model
from study.data.tasks import Task, build_tasks, find_task, heldout_texts, load_task
from study.data.tasks.own import load_own
from study.declarations import OwnTask, hashes_of
from study.descriptions import Evaluation, TaskData
from study.evaluation.classifier import NO_WORD, Collator
from study.evaluation.finetune import encode, finetune, linear_probe
from study.evaluation.metrics import task_metrics
from study.evaluation.tagging import WordClassifier, align, entities, entity_f1, tag_metrics
from study.files import Layout
from study.sections import TaskBudget

NAMES = ("O", "B-PER", "I-PER", "B-LOC", "I-LOC")
TASK = Task("names", dict, NAMES, "entity_f1", ("entity_f1", "accuracy"), False, "", kind="tokens")
BUDGET = TaskBudget(train=None, development=None, test=None, max_length=16)


@pytest.mark.parametrize(
    ("tags", "found"),
    [
        ("O O", set()),
        ("B-PER I-PER O B-LOC", {(0, 2, "PER"), (3, 4, "LOC")}),
        ("B-PER B-PER", {(0, 1, "PER"), (1, 2, "PER")}),
        ("I-PER I-PER O I-LOC", {(0, 2, "PER"), (3, 4, "LOC")}),  # IOB1
        ("B-PER I-LOC I-LOC", {(0, 1, "PER"), (1, 3, "LOC")}),  # another kind begins anew
        ("O I-PER B-PER I-PER", {(1, 2, "PER"), (2, 4, "PER")}),
        ("B-PER I-PER E-PER S-PER S-LOC", {(0, 3, "PER"), (3, 4, "PER"), (4, 5, "LOC")}),  # IOBES
        ("B-PER L-PER I-PER U-LOC O", {(0, 2, "PER"), (2, 3, "PER"), (3, 4, "LOC")}),  # BILOU
        ("I-A-B", {(0, 1, "A-B")}),
    ],
)
def test_entities_by_hand(tags, found):
    assert entities(tags.split()) == found


def test_entity_f1_by_hand():
    # Gold: 2 + 1 entities. Predicted: (0, 2, PER) right, (3, 5, LOC) too long, one found that is none: 1 of 3 and 3.
    gold = [["B-PER", "I-PER", "O", "B-LOC", "O"], ["O", "B-PER"]]
    predicted = [["B-PER", "I-PER", "O", "B-LOC", "I-LOC"], ["B-LOC", "O"]]
    assert entity_f1(predicted, gold) == pytest.approx(2 * 1 / (3 + 3))
    assert entity_f1(gold, gold) == 1 and entity_f1([["O"]], [["O"]]) == 0
    assert entity_f1([["B-PER", "O"]], [["B-PER", "B-LOC"]]) == pytest.approx(2 / 3)  # precision 1, recall 1/2


def test_metrics_leave_out_what_is_no_word_and_keep_texts_apart():
    # Two texts that would be one entity if they followed each other: B-PER | I-PER. Sub-words between words count not.
    labels = np.array([[NO_WORD, 1, NO_WORD, 2, NO_WORD], [NO_WORD, 2, NO_WORD, NO_WORD, NO_WORD]])
    predicted = np.array([[3, 1, 4, 2, 0], [0, 2, 1, 1, 1]])
    logits = np.eye(5)[predicted]
    assert tag_metrics(NAMES, ("entity_f1", "accuracy"), logits, labels) == {"entity_f1": 1.0, "accuracy": 1.0}
    predicted[0, 3] = 0
    # gold {(0,2)}, {(0,1)}; predicted {(0,1)}, {(0,1)}: 1 of 2 and 2
    assert task_metrics(TASK, np.eye(5)[predicted], labels) == pytest.approx({"entity_f1": 0.5, "accuracy": 2 / 3})


def test_a_word_has_its_tag_at_its_first_sub_word(tmp_path):
    words = tiny.tokenizer(tmp_path)
    text, tags = "ax qqq by \ufffd cz", [1, 2, 3, 4, 0]
    (columns,) = [align([text], [tags], words, 16)]
    pieces = words.convert_ids_to_tokens(columns["input_ids"][0])
    assert list(zip(pieces, columns["labels"][0], strict=True)) == [
        ("[CLS]", NO_WORD), ("ax", 1), ("[UNK]", 2), ("by", 3), ("cz", 0), ("[SEP]", NO_WORD),
    ]  # fmt: skip
    assert align([text], [tags], words, 4)["labels"] == [[NO_WORD, 1, 2, NO_WORD]]  # the rest is beyond the length
    bytes_of = byte_level()
    columns = align(["ga zzzé ca"], [[5, 6, 7]], bytes_of, 30)
    starts = {tag: place for place, tag in enumerate(columns["labels"][0]) if tag != NO_WORD}
    assert sorted(starts) == [5, 6, 7] and len(columns["labels"][0]) > 3
    for tag, end, word in ((5, starts[6], "ga"), (6, starts[7], "zzzé"), (7, None, "ca")):
        assert bytes_of.decode(columns["input_ids"][0][starts[tag] : end]).strip() == word
    with pytest.raises(ValueError):
        align(["one two"], [[1]], words, 16)


@pytest.mark.parametrize("side", ["right", "left"])
def test_loss_and_padding_of_words(tmp_path, side):
    words = tiny.tokenizer(tmp_path)
    words.padding_side = side
    rows = [{"input_ids": [2, 7, 8, 9, 3], "labels": [NO_WORD, 1, NO_WORD, 4, NO_WORD]}]
    rows.append({"input_ids": [2, 7, 3], "labels": [NO_WORD, 2, NO_WORD]})
    batch = Collator(words, 4)(rows)
    assert batch["labels"].shape == (2, 8) and (batch["labels"][batch["attention_mask"] == 0] == NO_WORD).all()
    assert batch["input_ids"][batch["labels"] == 4] == 9 and batch["input_ids"][batch["labels"] == 2] == 7
    torch.manual_seed(0)
    model = WordClassifier(tiny.masked_language_model().bert, 5, pairs=False).eval()
    outcome = model(**batch)
    probabilities = outcome["logits"].softmax(dim=-1)
    own = [
        -math.log(probabilities[row, place, tag])
        for row, tags in enumerate(batch["labels"].tolist())
        for place, tag in enumerate(tags)
        if tag != NO_WORD
    ]
    assert len(own) == 3 and outcome["loss"].item() == pytest.approx(sum(own) / 3, rel=1e-5)


def tagged_rows(count: int, seed: int) -> list[tuple[list[str], list[str]]]:
    """Words of the vocabulary's last third are persons, of two words where they follow each other."""
    generator, rows = np.random.default_rng(seed), []
    for _ in range(count):
        drawn = generator.integers(55, size=generator.integers(3, 9))
        tags = ["O" if n < 37 else "I-PER" if i and drawn[i - 1] >= 37 else "B-PER" for i, n in enumerate(drawn)]
        rows.append(([tiny.WORDS[n] for n in drawn], tags))
    return rows


@pytest.fixture
def folder(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    for name, count, seed in (("train", 120, 1), ("test", 40, 2), ("de", 30, 3)):
        lines = [json.dumps({"id": i, "tokens": w, "tags": t}) for i, (w, t) in enumerate(tagged_rows(count, seed))]
        (tmp_path / f"{name}.jsonl").write_text("\n".join(lines) + "\n")
    return tmp_path


DECLARED = {"kind": "tokens", "files": {"train": "train.jsonl", "test": {"en": "test.jsonl", "de": "de.jsonl"}}}


def test_files_of_tagged_words_become_a_task(folder):
    declared = OwnTask.model_validate(DECLARED)
    (folder / "notebooks").mkdir()
    (folder / "params.yaml").touch()
    hashes = hashes_of({"names": declared}, folder)
    described = TaskData(setting="mine", tasks=["names"], declared={"names": declared}, hashes=hashes, revisions={})
    rows = build_tasks(described, folder / "tasks")
    task, data = find_task(folder / "tasks", "names"), load_task(folder / "tasks", "names")
    assert (task.kind, task.labels, task.metrics) == ("tokens", ("B-PER", "I-PER", "O"), ("entity_f1", "accuracy"))
    assert {split: len(own) for split, own in data.items()} == {
        "train": 108,
        "development": 12,
        "test": 40,
        "test-de": 30,
    }
    first = tagged_rows(40, 2)[0]
    assert data["test"][0]["text"] == " ".join(first[0])
    assert [task.labels[tag] for tag in data["test"][0]["label"]] == first[1]
    assert " ".join(first[0]) in heldout_texts(folder / "tasks", ["names"])
    shares = [tag for _, tags in tagged_rows(40, 2) for tag in tags]
    assert rows[2]["majority_share"] == pytest.approx(shares.count("O") / len(shares))


def test_names_of_tags_are_those_of_the_data(folder):
    features = Features({"words": List(Value("string")), "ner": List(ClassLabel(names=list(NAMES)))})
    part = folder / "hub" / "data"
    part.mkdir(parents=True)
    rows = {"words": [["Ann", "Lee ", "in", "Rome"], ["a\u00a0b", "", "ran"]], "ner": [[1, 2, 0, 3], [4, 0, 0]]}
    for split in ("train", "validation", "test"):
        Dataset.from_dict(rows, features=features).to_parquet(str(part / f"{split}-00000-of-00001.parquet"))
    splits = {"train": "train", "development": "validation", "test": "test"}
    own = {"kind": "tokens", "dataset": "hub", "splits": splits, "text": "words", "label": "ner", "language": "en"}
    task, found = load_own("names", OwnTask.model_validate(own), folder)
    assert task.labels == NAMES
    assert found["test"][0] == {"text": "Ann Lee in Rome", "label": ["B-PER", "I-PER", "O", "B-LOC"]}
    assert found["test"][1] == {"text": "ab \ufffd ran", "label": ["I-LOC", "O", "O"]}
    one = own | {"dataset": None, "splits": None, "metric": "accuracy"}
    one["files"] = dict.fromkeys(("train", "development", "test"), "hub/data/train*.parquet")
    assert load_own("names", OwnTask.model_validate(one), folder)[0].metrics == ("accuracy",)


@pytest.mark.parametrize(
    ("row", "changes", "message"),
    [
        (
            {"tokens": ["a", "b"], "tags": ["O"]},
            {},
            "bad.jsonl: tokens has 2 words and tags 1 tags ('a b'); allowed: as",
        ),
        ({"tokens": "a b", "tags": ["O"]}, {}, "tokens = 'a b' is no list; allowed: a list, of each word one"),
        ({"tokens": ["a"], "tags": [None]}, {}, "the word 'a' has the tag None"),
        ({"tokens": ["a"], "tags": ["NOUN"]}, {}, "the tag 'NOUN' is of no entity; allowed: O, B-... and I-..."),
        ({"tokens": ["a"], "tags": ["B-ORG"]}, {}, "test has the label 'B-ORG'; allowed: B-PER, I-PER, O"),
        ({"tokens": ["a"], "tags": ["B-ORG"]}, {"labels": ["O", "B-PER", "I-PER"]}, "allowed: O, B-PER, I-PER"),
        ({"words": ["a"], "tags": ["O"]}, {}, "no column 'tokens'; allowed: words, tags"),
    ],
)
def test_bad_tags_are_one_line(folder, row, changes, message):
    (folder / "bad.jsonl").write_text(json.dumps(row) + "\n")
    files = {"train": "train.jsonl", "test": "bad.jsonl"}
    declared = OwnTask.model_validate(DECLARED | {"files": files, "language": "en"} | changes)
    with pytest.raises(StudyError) as error:
        load_own("names", declared, folder)
    assert message in str(error.value) and "\n" not in str(error.value)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"metric": "macro_f1"}, "allowed with kind tokens: entity_f1, accuracy"),
        ({"kind": None, "metric": "entity_f1"}, "allowed with kind labelled: accuracy, f1"),
        ({"text_pair": "b"}, "allowed: text and label alone"),
    ],
)
def test_bad_declarations_are_refused(changes, message):
    with pytest.raises(ValidationError, match=message):
        OwnTask.model_validate(DECLARED | changes)


def test_a_learnable_tagging_is_learnt_by_probe_and_by_fine_tuning(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    tiny.workspace(tmp_path)
    words = tiny.tokenizer(tmp_path / "words")
    settings = {"epochs": 4, "batch_size": 16, "learning_rates": [5e-3], "pad_to_multiple_of": 8, "seeds": [1]}
    _, evaluation, _ = tiny.plan(tmp_path, finetuning=settings).of(Evaluation)
    features = Features({"text": Value("string"), "label": List(ClassLabel(names=list(NAMES)))})
    data = {
        split: Dataset.from_list(
            [{"text": " ".join(w), "label": t} for w, t in tagged_rows(count, seed)], features=features
        )
        for split, count, seed in (("train", 400, 1), ("development", 40, 2), ("test", 40, 3))
    }
    splits = encode(DatasetDict(data), TASK, BUDGET, words, "separate", seed=1)
    model = Layout(tmp_path, "english").teacher
    run = finetune(evaluation, model, TASK, splits, words, 1, 5e-3, look_at_test=True)
    assert run.test["entity_f1"] > 0.6 and run.test["entity_f1"] > run.frozen["test"] + 0.3
    # The probe, by scikit-learn alone on the states of words read one text at a time.
    encoder = load_model(model, "eager", head=False).eval()

    def of(split: str) -> tuple[list[np.ndarray], list[list[int]]]:
        states, tags = [], []
        for row in splits[split]:
            places = [place for place, tag in enumerate(row["labels"]) if tag != NO_WORD]
            with torch.no_grad():
                states.append(encoder(torch.tensor([row["input_ids"]])).last_hidden_state[0, places].numpy())
            tags.append([row["labels"][place] for place in places])
        return states, tags

    (states, tags), (held, gold) = of("train"), of("development")
    scaler = StandardScaler().fit(np.concatenate(states))
    probe = LogisticRegression(C=0.01, max_iter=500).fit(scaler.transform(np.concatenate(states)), np.concatenate(tags))
    predicted = [[NAMES[tag] for tag in probe.predict(scaler.transform(own))] for own in held]
    expected = entity_f1(predicted, [[NAMES[tag] for tag in own] for own in gold])
    assert linear_probe(evaluation, model, TASK, splits, words, 1) == run.frozen["development"]
    assert run.frozen["development"] == pytest.approx(expected, abs=0.02) and expected > 0
