"""Which tasks need context: untrained models beside the teacher, and the rule."""

from __future__ import annotations

import pytest
import tiny
from datasets import ClassLabel, Dataset, DatasetDict, Features, Value
from sklearn.metrics import f1_score

from study.data import storage
from study.data.tasks import TASKS
from study.data.tasks.task import Task
from study.descriptions import Admission
from study.evaluation.admission import admit, majority
from study.records import AdmissionResult, TaskAdmission, read_record

CLASSES = Task("topic", dict, ("no", "yes"), "accuracy", ("accuracy",), False, "", group="sentence")
ORDER = Task("bigram-shift", dict, ("no", "yes"), "accuracy", ("accuracy",), False, "", group="context")
BUDGET = {"train": None, "development": None, "test": None, "max_length": 16}


def first_of_two(count: int, seed: int) -> Dataset:
    """Label yes where the same two words stand in the order of the vocabulary: a bag of words cannot tell."""
    rows = {"text": [], "label": []}
    for i, row in enumerate(tiny.sequences(count, seed)):
        words = [tiny.WORDS[j - 5] for j in row[1:9]]
        order = sorted([words[0], words[1]])
        rows["text"].append(" ".join(words[2:5] + (order if i % 2 else order[::-1])))
        rows["label"].append(i % 2)
    return Dataset.from_dict(
        rows, features=Features({"text": Value("string"), "label": ClassLabel(names=["no", "yes"])})
    )


def test_untrained_models_are_scored_beside_the_teacher_on_development_data(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    tiny.workspace(tmp_path)
    monkeypatch.setitem(TASKS, "topic", CLASSES)
    monkeypatch.setitem(TASKS, "bigram-shift", ORDER)
    english = {"teacher": {"name": str(tmp_path / "pretrained"), **tiny.TEACHER}, "vocabulary": "full"}
    english |= {"texts": ["wikipedia"], "tasks": ["topic"], "candidates": ["bigram-shift"]}
    finetuning = tiny.read_yaml(tiny.FIXTURES / "params.yaml")["finetuning"]
    finetuning |= {"tasks": finetuning["tasks"] | {"topic": BUDGET, "bigram-shift": BUDGET}}
    plan = tiny.plan(tmp_path, settings={"english": english}, finetuning=finetuning)
    (description,) = plan.of(Admission)
    layout = plan.layout("english")
    test = tiny.sentences(16, 3, flip=True)
    storage.save(
        DatasetDict(train=tiny.sentences(200, 1), development=tiny.sentences(100, 2), test=test), layout.tasks / "topic"
    )
    storage.save(
        DatasetDict(train=first_of_two(200, 1), development=first_of_two(100, 2), test=first_of_two(16, 3)),
        layout.tasks / "bigram-shift",
    )
    output = tmp_path / "admission.json"
    result = admit(description, layout, output)
    assert read_record(output, AdmissionResult, setting="english", profile="test") == result
    topic, order = result.tasks
    assert (topic.task, topic.group, order.task, order.group) == ("topic", "sentence", "bigram-shift", "context")
    assert set(topic.scores) == {"teacher", "encoder", "floor", "bag", "embeddings"}
    assert topic.scores["embeddings"] > 0.9  # words alone tell the label
    assert order.scores["embeddings"] < 0.65  # the same words stand under both labels
    assert order.majority == 0.5 and topic.examples == order.examples == 100


def test_the_majority_by_hand():
    """Three of four labels alike: 0.75; in macro F1 one class of two has 2 x 0.75 / 1.75, the other nothing."""
    assert majority([1, 1, 0, 1], "accuracy") == 0.75
    guessed = f1_score([1, 1, 0, 1], [1, 1, 1, 1], average="macro")
    assert majority([1, 1, 0, 1], "macro_f1") == pytest.approx(guessed)


@pytest.mark.parametrize(
    ("scores", "closed", "admitted"),
    [
        ({"teacher": 0.9, "bag": 0.5, "embeddings": 0.6}, 0.25, True),
        ({"teacher": 0.9, "bag": 0.72, "embeddings": 0.6}, 0.55, False),
        ({"teacher": 0.64, "bag": 0.5, "embeddings": 0.5}, 0.0, False),  # 0.14 is less than three standard errors
        ({"teacher": 0.66, "bag": 0.5, "embeddings": 0.4}, 0.0, True),
        ({"teacher": 0.5, "bag": 0.6, "embeddings": 0.5}, float("nan"), False),  # no way to go
        ({"teacher": 0.4, "bag": 0.6, "embeddings": 0.5}, float("nan"), False),
    ],
)
def test_the_rule_by_hand(scores, closed, admitted):
    row = TaskAdmission(task="x", group="context", metric="accuracy", examples=100, majority=0.5, scores=scores)
    assert row.closed_by_bag == pytest.approx(closed, nan_ok=True) and row.admitted == admitted
