"""Fine-tuning and linear probes of one encoder on one task, and the metrics of tasks."""

from __future__ import annotations

import math
from dataclasses import replace

import numpy as np
import pytest
import tiny
import torch
from datasets import Dataset, DatasetDict, Features, Value
from transformers import AutoModel, BertTokenizerFast

from study import StudyError
from study.data.tasks import TASKS, Task
from study.descriptions import Evaluation
from study.evaluation import finetune as module
from study.evaluation.finetune import MeanPoolingClassifier, encode, finetune
from study.evaluation.metrics import task_metrics
from study.sections import TaskBudget

CLASSES = Task("topic", dict, ("no", "yes"), "accuracy", ("accuracy", "f1", "macro_f1", "matthews"), False, "")
SCORES = Task("sts-b", dict, None, "spearman", ("spearman", "pearson"), False, "")
BUDGET = TaskBudget(train=None, development=None, test=None, max_length=16)


def logits(*predicted: int) -> np.ndarray:
    return np.eye(2)[list(predicted)]


def test_classification_metrics_by_hand():
    # labels 1 1 1 0 0 0 against 1 1 0 0 0 1: 4 of 6 right. Precision, recall and F1 of both classes: 2/3.
    # Matthews: (2*2 - 1*1) / sqrt(3*3*3*3) = 1/3.
    metrics = task_metrics(CLASSES, logits(1, 1, 0, 0, 0, 1), np.array([1, 1, 1, 0, 0, 0]))
    assert metrics == pytest.approx({"accuracy": 2 / 3, "f1": 2 / 3, "macro_f1": 2 / 3, "matthews": 1 / 3})
    # labels 1 0 0 0 against 1 1 0 0. Class 1: precision 1/2, recall 1: 2/3. Class 0: precision 1, recall 2/3: 4/5.
    # Matthews: (1*2 - 1*0) / sqrt(2*1*3*2) = 2 / sqrt(12).
    metrics = task_metrics(CLASSES, logits(1, 1, 0, 0), np.array([1, 0, 0, 0]))
    assert metrics == pytest.approx(
        {"accuracy": 3 / 4, "f1": 2 / 3, "macro_f1": (2 / 3 + 4 / 5) / 2, "matthews": 2 / 12**0.5}
    )


def test_classification_metrics_of_constant_predictions():
    # Only class 0, labels 1 0 0 0: accuracy 3/4, F1 of class 1 is 0, of class 0 6/7; Matthews 0.
    metrics = task_metrics(CLASSES, logits(0, 0, 0, 0), np.array([1, 0, 0, 0]))
    assert metrics == pytest.approx({"accuracy": 3 / 4, "f1": 0, "macro_f1": 3 / 7, "matthews": 0})


def test_correlations_by_hand():
    # Deviations (-1, 0, 1) and (-2, -1, 3): Pearson 5 / sqrt(2 * 14); the ranks agree: Spearman 1.
    metrics = task_metrics(SCORES, np.array([[1.0], [2.0], [3.0]]), np.array([0.0, 1.0, 5.0]))
    assert metrics == pytest.approx({"spearman": 1.0, "pearson": 5 / 28**0.5})
    metrics = task_metrics(SCORES, np.array([[3.0], [1.0], [2.0]]), np.array([0.0, 1.0, 5.0]))
    assert metrics["spearman"] == pytest.approx(1 - 6 * (4 + 1 + 1) / (3 * 8))
    assert task_metrics(SCORES, np.ones((3, 1)), np.array([0.0, 1.0, 5.0])) == {"spearman": 0.0, "pearson": 0.0}


def test_every_task_has_its_main_metric_among_its_metrics():
    for task in (task for task in TASKS.values() if not task.probe):
        outputs = np.random.default_rng(0).normal(size=(20, len(task.labels) if task.labels else 1))
        labels = np.arange(20) % (len(task.labels) if task.labels else 5)
        metrics = task_metrics(task, outputs, labels)
        assert task.metric in metrics and set(metrics) == set(task.metrics)


@pytest.mark.parametrize("side", ["right", "left"])
def test_pooling_ignores_padding(side):
    torch.manual_seed(0)
    classifier = MeanPoolingClassifier(tiny.masked_language_model().bert, 3, pairs=False).eval()
    ids, mask = torch.randint(5, 60, (2, 9)), torch.ones(2, 9, dtype=torch.long)
    padding = slice(5, 9) if side == "right" else slice(0, 4)
    mask[1, padding], ids[1, padding] = 0, 0
    alone = ids[1:, mask[1] == 1]
    with torch.no_grad():
        both = classifier(input_ids=ids, attention_mask=mask)["logits"]
        if side == "left":  # positions are absolute: give the shorter sequence the same ones
            states = classifier.encoder(input_ids=ids[1:], attention_mask=mask[1:]).last_hidden_state
            expected = classifier.output(states[0, mask[1] == 1].mean(dim=0))
        else:
            expected = classifier(input_ids=alone, attention_mask=torch.ones_like(alone))["logits"][0]
    torch.testing.assert_close(both[1], expected, atol=1e-5, rtol=1e-4)


def test_losses_of_the_classifier():
    classifier = MeanPoolingClassifier(tiny.masked_language_model().bert, 1, pairs=False).eval()
    ids = torch.randint(5, 60, (3, 6))
    outcome = classifier(input_ids=ids, attention_mask=torch.ones_like(ids), labels=torch.tensor([0.0, 2.0, 5.0]))
    errors = [(z - y) ** 2 for z, y in zip(outcome["logits"][:, 0].tolist(), (0, 2, 5), strict=True)]
    assert outcome["loss"].item() == pytest.approx(sum(errors) / 3, rel=1e-5)
    classifier = MeanPoolingClassifier(tiny.masked_language_model().bert, 2, pairs=False).eval()
    outcome = classifier(input_ids=ids, attention_mask=torch.ones_like(ids), labels=torch.tensor([0, 1, 1]))
    probabilities = outcome["logits"].softmax(dim=1)
    expected = -sum(math.log(probabilities[i, y]) for i, y in enumerate((0, 1, 1))) / 3
    assert outcome["loss"].item() == pytest.approx(expected, rel=1e-5)


@pytest.fixture
def folder(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    return tiny.workspace(tmp_path)


FINETUNING = {"epochs": 3, "batch_size": 16, "learning_rates": [5e-3], "pad_to_multiple_of": 8, "seeds": [1]}


def tuned(folder, **changes) -> Evaluation:
    """The evaluation of the student that is not trained."""
    _, evaluation, _ = tiny.plan(folder, finetuning=FINETUNING | changes).of(Evaluation)
    return evaluation


@pytest.fixture
def dataset():
    return DatasetDict(train=tiny.sentences(128, 1), development=tiny.sentences(64, 2), test=tiny.sentences(64, 3))


def test_a_learnable_task_is_learnt(folder, dataset):
    words = tiny.tokenizer(folder / "words")
    splits = encode(dataset, CLASSES, BUDGET, words, "separate", 1)
    run = finetune(tuned(folder), folder / "pretrained", CLASSES, splits, words, 1, 5e-3, look_at_test=True)
    assert run.development["accuracy"] > 0.9 and run.test["accuracy"] > 0.9
    assert set(run.test) == set(CLASSES.metrics) and 1 <= run.epoch <= 3
    again = finetune(tuned(folder), folder / "pretrained", CLASSES, splits, words, 1, 5e-3, look_at_test=True)
    assert again == run


def test_selection_reads_development_data_only(folder, dataset):
    """Test labels turned upside down change neither the epoch kept nor its development scores."""
    words = tiny.tokenizer(folder / "words")
    runs = []
    for flip in (False, True):
        dataset["test"] = tiny.sentences(64, 3, flip)
        splits = encode(dataset, CLASSES, BUDGET, words, "separate", 1)
        runs.append(finetune(tuned(folder), folder / "pretrained", CLASSES, splits, words, 1, 5e-3, look_at_test=True))
    assert (runs[0].epoch, runs[0].development) == (runs[1].epoch, runs[1].development)
    assert runs[0].test["accuracy"] == pytest.approx(1 - runs[1].test["accuracy"])


def test_the_epoch_kept_is_the_best_on_development_data_and_is_the_one_tested(folder, dataset, monkeypatch):
    """With development = test, the test score of the model kept must be the best development score of all epochs."""
    words = tiny.tokenizer(folder / "words")
    dataset["test"] = dataset["development"]
    splits = encode(dataset, CLASSES, BUDGET, words, "separate", 1)
    seen, original = [], task_metrics
    monkeypatch.setattr(module, "task_metrics", lambda *arguments: seen.append(original(*arguments)) or seen[-1])
    for rate in (5e-3, 0.3):  # the second one does harm on the way
        seen.clear()
        run = finetune(
            tuned(folder, epochs=4), folder / "pretrained", CLASSES, splits, words, 1, rate, look_at_test=True
        )
        probed, seen[:2] = seen[:2], []  # the linear probe before any training, on development and test data
        assert run.frozen == {"development": probed[0]["accuracy"], "test": probed[1]["accuracy"]} and len(seen) == 5
        accuracies = [metrics["accuracy"] for metrics in seen[:4]]
        assert run.development["accuracy"] == max(accuracies) == run.test["accuracy"]
        assert run.epoch == accuracies.index(max(accuracies)) + 1


def test_test_data_are_not_touched_while_candidates_are_compared(folder, dataset, monkeypatch):
    words = tiny.tokenizer(folder / "words")
    splits = encode(dataset, CLASSES, BUDGET, words, "separate", 1)
    del splits["test"]
    run = finetune(tuned(folder), folder / "pretrained", CLASSES, splits, words, 1, 5e-3, look_at_test=False)
    assert run.test is None and run.development["accuracy"] > 0.5


def test_a_fine_tuning_that_is_not_finite_gives_no_score(folder, dataset):
    model = AutoModel.from_pretrained(folder / "pretrained", add_pooling_layer=False)
    with torch.no_grad():
        model.encoder.layer[0].output.dense.weight[0, 0] = float("nan")
    model.save_pretrained(folder / "pretrained")
    words = tiny.tokenizer(folder / "words")
    splits = encode(dataset, CLASSES, BUDGET, words, "separate", 1)
    with pytest.raises(StudyError):
        finetune(tuned(folder), folder / "pretrained", CLASSES, splits, words, 1, 5e-3, look_at_test=True)


PAIRS = Features({"text": Value("string"), "text_pair": Value("string"), "label": Value("float64")})
SIMILARITY = Task("sts-b", dict, None, "spearman", ("spearman", "pearson"), True, "")


def pairs(count: int, seed: int) -> Dataset:
    """Two texts of four words; the label tells how many of the eight are from the second half of the vocabulary."""
    generator = np.random.default_rng(seed)
    rows = {"text": [], "text_pair": [], "label": []}
    for _ in range(count):
        halves = generator.random(8) < generator.random()
        words = [tiny.WORDS[27 * half + generator.integers(27)] for half in halves]
        rows["text"].append(" ".join(words[:4]))
        rows["text_pair"].append(" ".join(words[4:]))
        rows["label"].append(5 * float(halves.mean()))
    return Dataset.from_dict(rows, features=PAIRS)


@pytest.mark.parametrize("way", ["separate", "joint"])
def test_pairs_are_cut_to_the_maximal_length(folder, way):
    words = tiny.tokenizer(folder / "words")
    short, long = " ".join(tiny.WORDS[:4]), " ".join(tiny.WORDS[:40])
    for first, second in ((short, long), (long, short), (long, long)):
        rows = Dataset.from_dict({"text": [first], "text_pair": [second], "label": [1.0]}, features=PAIRS)
        row = encode(DatasetDict(train=rows, development=rows, test=rows), SIMILARITY, BUDGET, words, way, 1)["train"][
            0
        ]
        if way == "joint":
            assert len(row["input_ids"]) == 16 and "pair_input_ids" not in row
        else:
            assert [len(row["input_ids"]), len(row["pair_input_ids"])] == [
                6 if t == short else 16 for t in (first, second)
            ]
            assert row["length"] == len(row["input_ids"]) + len(row["pair_input_ids"])


def test_regression_labels_are_standardised_by_the_training_examples_alone(folder):
    words = tiny.tokenizer(folder / "words")
    dataset = DatasetDict(train=pairs(50, 1), development=pairs(20, 2), test=pairs(20, 3))
    splits = encode(dataset, SIMILARITY, BUDGET, words, "separate", 1)
    train = np.array(dataset["train"]["label"])
    for name, split in splits.items():
        np.testing.assert_allclose(split["labels"], (np.array(dataset[name]["label"]) - train.mean()) / train.std())


def test_features_of_a_pair_by_hand():
    """[u, v, |u - v|, u * v] of the two mean-pooled texts, whatever the padding of either."""
    torch.manual_seed(0)
    classifier = MeanPoolingClassifier(tiny.masked_language_model().bert, 1, pairs=True).eval()
    collate = module.Collator(BertTokenizerFast(vocab={word: i for i, word in enumerate(tiny.SPECIAL)}), 8)
    rows = [
        {"input_ids": [2, 7, 8, 3], "pair_input_ids": [2, 9, 3], "labels": 0.0},
        {"input_ids": [2, 7, 3], "pair_input_ids": [2, *range(10, 20), 3], "labels": 1.0},
    ]
    batch = collate(rows)
    assert batch["input_ids"].shape == (2, 8) and batch["pair_input_ids"].shape == (2, 16)
    assert batch.pop("labels").tolist() == [0.0, 1.0]
    with torch.no_grad():
        features = classifier.features(**batch)
        for row, expected in zip(features, rows, strict=True):
            u, v = (
                classifier.encoder(input_ids=torch.tensor([expected[key]])).last_hidden_state[0].mean(dim=0)
                for key in ("input_ids", "pair_input_ids")
            )
            torch.testing.assert_close(row, torch.cat([u, v, (u - v).abs(), u * v]), atol=1e-5, rtol=1e-4)


@pytest.mark.parametrize("way", ["separate", "joint"])
def test_a_regression_on_pairs_is_learnt(folder, way):
    words = tiny.tokenizer(folder / "words")
    dataset = DatasetDict(train=pairs(200, 1), development=pairs(64, 2), test=pairs(64, 3))
    evaluation = tuned(folder, pairs=way)
    splits = encode(dataset, SIMILARITY, BUDGET, words, way, 1)
    run = finetune(evaluation, folder / "pretrained", SIMILARITY, splits, words, 1, 3e-3, look_at_test=True)
    assert run.test["spearman"] > 0.5 and run.test["pearson"] > 0.5


@pytest.mark.parametrize("task", [CLASSES, SIMILARITY])
def test_training_starts_from_a_linear_probe(folder, dataset, task):
    """On the training examples its loss beats what any constant reaches; nothing of the encoder changes."""
    words = tiny.tokenizer(folder / "words")
    if task is SIMILARITY:
        dataset = DatasetDict(train=pairs(200, 1), development=pairs(64, 2), test=pairs(64, 3))
    splits = encode(dataset, task, BUDGET, words, "separate", 1)
    encoder = tiny.masked_language_model().bert
    before = tiny.snapshot(encoder)
    model = MeanPoolingClassifier(encoder, len(task.labels) if task.labels else 1, pairs=task.pair)
    collate = module.Collator(words, 8)
    module.start_from_probe(model, splits["train"], collate, 16, bf16=False)
    batch = collate(list(splits["train"]))
    with torch.no_grad():
        loss = model.eval()(**batch)["loss"].item()
    labels = batch["labels"].double()
    shares = labels.mean().item()
    constant = (
        labels.var(unbiased=False).item()
        if task is SIMILARITY
        else -(shares * math.log(shares) + (1 - shares) * math.log(1 - shares))
    )
    assert loss < 0.95 * constant
    assert tiny.identical(before, tiny.snapshot(encoder)) and all(
        parameter.requires_grad for parameter in model.parameters()
    )


def test_a_probe_of_two_of_four_classes_names_these_two_and_of_one_class_is_an_error(folder, dataset):
    evaluation, words = tuned(folder), tiny.tokenizer(folder / "words")
    four = replace(CLASSES, labels=("a", "no", "b", "yes"))
    for split in dataset:
        rows = {"text": dataset[split]["text"], "label": [1 + 2 * label for label in dataset[split]["label"]]}
        dataset[split] = Dataset.from_dict(rows)
    splits = encode(dataset, four, BUDGET, words, "separate", 1)
    assert module.linear_probe(evaluation, folder / "pretrained", four, splits, words, 1) > 0.75
    splits["train"] = splits["train"].filter(lambda row: row["labels"] == 3, keep_in_memory=True)
    with pytest.raises(StudyError, match="training examples have label 3; allowed: at least two labels"):
        module.linear_probe(evaluation, folder / "pretrained", four, splits, words, 1)


@pytest.mark.parametrize("task", [CLASSES, SIMILARITY])
def test_a_linear_probe_is_scored_on_development_data_one_by_one(folder, dataset, task):
    """By hand: each development example alone through the classifier that fine-tuning starts from."""
    evaluation, words = tuned(folder), tiny.tokenizer(folder / "words")
    if task is SIMILARITY:
        dataset = DatasetDict(train=pairs(200, 1), development=pairs(64, 2), test=pairs(64, 3))
    splits = encode(dataset, task, BUDGET, words, "separate", 1)
    model, collate = module.probed_classifier(evaluation, folder / "pretrained", task, splits, words, 1)
    with torch.no_grad():
        logits = np.concatenate([model.eval()(**collate([row]))["logits"].numpy() for row in splits["development"]])
    expected = task_metrics(task, logits, np.array(splits["development"]["labels"]))[task.metric]
    assert module.linear_probe(evaluation, folder / "pretrained", task, splits, words, 1) == pytest.approx(expected)


def test_encoding_keeps_to_the_budget_with_the_same_examples_for_every_model(folder, dataset):
    """A fine-tuning seed draws its own training examples; development and test examples are always the same."""
    words = tiny.tokenizer(folder / "words")
    budget = TaskBudget(train=20, development=10, test=None, max_length=8)
    first, second = (encode(dataset, CLASSES, budget, words, "separate", 1) for _ in range(2))
    assert [len(first[split]) for split in ("train", "development", "test")] == [20, 10, 64]
    assert first["train"]["input_ids"] == second["train"]["input_ids"]
    assert max(len(ids) for ids in first["test"]["input_ids"]) == 8
    other = encode(dataset, CLASSES, budget, words, "separate", 2)
    assert other["train"]["input_ids"] != first["train"]["input_ids"]
    assert all(other[split]["input_ids"] == first[split]["input_ids"] for split in ("development", "test"))
