"""Fine-tuning, its metrics and the other numbers of a result file."""

from __future__ import annotations

import json
import math
import subprocess
from dataclasses import replace

import numpy as np
import pytest
import tiny
import torch
from datasets import Dataset, DatasetDict, Features, Value
from transformers import AutoModel, BertTokenizerFast

from study import StudyError
from study.config import TaskBudget
from study.data import tasks
from study.data.tasks import TASKS, Task
from study.evaluation import scores
from study.evaluation.latency import measure_latency
from study.evaluation.metrics import task_metrics
from study.files import write_json
from study.training import finetune as module
from study.training.distill import MaskedSequences, distil
from study.training.finetune import MeanPoolingClassifier, encode, finetune

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


def tuned(folder, **changes):
    entries = {"epochs": 3, "batch_size": 16, "learning_rates": [5e-3], "pad_to_multiple_of": 8, "seeds": [1]}
    return tiny.parameters(folder, finetuning=entries | changes)


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
        assert len(seen) == 5
        accuracies = [metrics["accuracy"] for metrics in seen[:4]]
        assert run.development["accuracy"] == max(accuracies) == run.test["accuracy"]
        assert run.epoch == accuracies.index(max(accuracies)) + 1


def test_test_data_are_not_touched_while_candidates_are_compared(folder, dataset, monkeypatch):
    words = tiny.tokenizer(folder / "words")
    splits = encode(dataset, CLASSES, BUDGET, words, "separate", 1)
    del splits["test"]
    run = finetune(tuned(folder), folder / "pretrained", CLASSES, splits, words, 1, 5e-3, look_at_test=False)
    assert run.test is None and run.development["accuracy"] > 0.5


def test_the_learning_rate_is_chosen_by_mean_development_score(folder, dataset, monkeypatch):
    budget = {"topic": {"train": 96, "development": 64, "test": None, "max_length": 16}}
    params = tuned(folder, learning_rates=[1e-6, 5e-3], seeds=[1, 2], epochs=2, tasks=budget)
    monkeypatch.setitem(scores.TASKS, "topic", CLASSES)
    monkeypatch.setitem(tasks.TASKS, "topic", CLASSES)
    tasks.save(dataset, folder / "tasks" / "topic")
    looks, original = [], scores.finetune

    def watch(*arguments, **named):
        looks.append((arguments[6], named["look_at_test"]))
        return original(*arguments, **named)

    monkeypatch.setattr(scores, "finetune", watch)
    words = tiny.tokenizer(folder / "words")
    entry = scores.evaluate_task(params, folder / "pretrained", "topic", folder / "tasks", words, "title", 1)
    assert entry["learning_rate"] == 5e-3 and [run["seed"] for run in entry["runs"]] == [1, 2]
    assert looks == [(1e-6, False)] * 2 + [(5e-3, False)] * 2 + [(5e-3, True)] * 2
    assert [entry[f"{split}_examples"] for split in ("train", "development", "test")] == [96, 64, 64]


def test_other_distillation_seeds_draw_other_training_examples(folder, dataset, monkeypatch):
    """Otherwise what two draws happen to favour would be common to all of them, and no interval would hold it."""
    budget = {"topic": {"train": 32, "development": 64, "test": None, "max_length": 16}}
    params = tuned(folder, learning_rates=[5e-3], seeds=[1, 2], epochs=1, tasks=budget)
    monkeypatch.setitem(scores.TASKS, "topic", CLASSES)
    monkeypatch.setitem(tasks.TASKS, "topic", CLASSES)
    tasks.save(dataset, folder / "tasks" / "topic")
    seen, original = [], scores.finetune

    def watch(params, encoder, task, splits, tokenizer, seed, *arguments, **named):
        seen.append((seed, tuple(map(tuple, splits["train"]["input_ids"]))))
        return original(params, encoder, task, splits, tokenizer, seed, *arguments, **named)

    monkeypatch.setattr(scores, "finetune", watch)
    words = tiny.tokenizer(folder / "words")
    entries = [
        scores.evaluate_task(params, folder / "pretrained", "topic", folder / "tasks", words, "title", seed)
        for seed in (0, 1, 2)
    ]
    teacher, first, second = seen[:2], seen[2:4], seen[4:]
    assert teacher == first and [seed for seed, _ in first] == [1, 2]  # the teacher shares those of seed 1
    assert len({examples for _, examples in (*first, *second)}) == 4
    assert all([run["seed"] for run in entry["runs"]] == [1, 2] for entry in entries)


LANGUAGES = replace(CLASSES, languages=("en", "es", "fr", "de"))


def test_every_language_of_the_budget_is_tested_with_the_one_model_kept(folder, dataset, monkeypatch):
    """Spanish labels are upside down, French data are the English ones, and German is not in the budget."""
    monkeypatch.setitem(scores.TASKS, "topic", LANGUAGES)
    monkeypatch.setitem(tasks.TASKS, "topic", LANGUAGES)
    dataset |= {
        "test-es": tiny.sentences(64, 3, flip=True),
        "test-fr": dataset["test"],
        "test-de": tiny.sentences(9, 4),
    }
    tasks.save(DatasetDict(dataset), folder / "tasks" / "topic")
    budget = {"train": 128, "development": 64, "test": 48, "max_length": 16}
    words, entries, params = tiny.tokenizer(folder / "words"), {}, tuned(folder)
    for name, languages in (("several", ["es", "en", "fr"]), ("one", ["en"])):
        own = {"tasks": {"topic": TaskBudget(**budget, languages=languages)}}
        own = params.model_copy(update={"finetuning": params.finetuning.model_copy(update=own)})
        entries[name] = scores.evaluate_task(own, folder / "pretrained", "topic", folder / "tasks", words, "title", 1)
    (run,) = entries["several"]["runs"]
    assert list(run["languages"]) == ["es", "fr"] and run["test"]["accuracy"] > 0.9
    assert run["languages"]["fr"] == run["test"]
    assert run["languages"]["es"]["accuracy"] == pytest.approx(1 - run["test"]["accuracy"])
    assert entries["several"]["language_examples"] == {"es": 48, "fr": 48}
    del run["languages"], entries["several"]["language_examples"]
    assert entries["several"] == entries["one"]  # testing in more languages changes nothing else


PROBE = Task("retrieval", dict, None, "accuracy", ("accuracy",), True, "", ("en", "es", "fr"), probe=True)


def with_probe(params, test: int | None = None, languages=("en", "es")):
    own = TaskBudget(train=None, development=None, test=test, max_length=16, languages=list(languages))
    budgets = {"tasks": params.finetuning.tasks | {"retrieval": own}}
    return params.model_copy(update={"finetuning": params.finetuning.model_copy(update=budgets)})


def save_probe(folder, monkeypatch, **languages: list[tuple[str, str]]) -> None:
    monkeypatch.setitem(scores.TASKS, "retrieval", PROBE)
    monkeypatch.setitem(tasks.TASKS, "retrieval", PROBE)
    splits = {
        f"test-{language}": Dataset.from_list([{"text": text, "text_pair": other} for text, other in rows])
        for language, rows in languages.items()
    }
    tasks.save(DatasetDict(splits), folder / "retrieval")


def test_retrieval_by_hand(folder, monkeypatch):
    """Vectors in a plane, by their angles; the nearest is the one at the smallest angle."""
    angles = {"a": 0, "b": 50, "c": 180, "A": 10, "B": -12, "C": 100}
    save_probe(folder, monkeypatch, es=[("a", "A"), ("b", "B"), ("c", "C")], fr=[("a", "C"), ("b", "A"), ("c", "B")])

    def embed(params, model, texts, *_):
        radians = np.radians([angles[text] for text in texts])
        return np.stack([np.cos(radians), np.sin(radians)], axis=1)

    monkeypatch.setattr(scores, "embed", embed)
    arguments = (folder / "pretrained", "retrieval", folder, None)
    params = with_probe(tuned(folder), languages=["fr", "en", "es"])
    entry = scores.retrieve(params, *arguments)
    assert (entry["metric"], entry["test_examples"], list(entry["languages"])) == ("accuracy", 3, ["es", "fr"])
    # a finds A (10 degrees away), b finds A (40), c finds C (80); A finds a (10), B finds a (12), C finds b (50).
    # Spanish: a-A and c-C are right, b-B is not; A-a is right, B-b and C-c are not.
    expected = {"accuracy": 1 / 2, "from_english": 2 / 3, "to_english": 1 / 3}
    assert entry["languages"]["es"] == pytest.approx(expected)
    # French: b-A alone is right; none of A-b, B-c and C-a is.
    assert entry["languages"]["fr"] == pytest.approx({"accuracy": 1 / 6, "from_english": 1 / 3, "to_english": 0})
    assert list(scores.retrieve(with_probe(tuned(folder)), *arguments)["languages"]) == ["es"]


def test_retrieval_finds_a_text_that_is_its_own_translation(folder, monkeypatch):
    texts = list(dict.fromkeys(tiny.sentences(80, 5)["text"]))
    backwards = list(zip(texts, texts[::-1], strict=True))
    save_probe(folder, monkeypatch, es=[(text, text) for text in texts], fr=backwards)
    params, words = with_probe(tuned(folder), 41, ["en", "es", "fr"]), tiny.tokenizer(folder / "words")
    entry = scores.retrieve(params, folder / "pretrained", "retrieval", folder, words)
    assert entry["languages"]["es"]["accuracy"] == 1 and entry["test_examples"] == 41
    assert entry["languages"]["fr"]["accuracy"] < 0.2


def test_embeddings_are_pooled_states_of_length_one_in_the_order_of_the_texts(folder):
    words, model = tiny.tokenizer(folder / "words"), MeanPoolingClassifier(tiny.masked_language_model().bert, 1, False)
    texts = tiny.sentences(11, 6)["text"][:]
    together = scores.embed(tuned(folder), model, texts, words, max_length=9, batch_size=4)
    assert len(together) == 11
    for text, vector in zip(texts, together, strict=True):
        ids = torch.tensor(words([text], truncation=True, max_length=9)["input_ids"])
        with torch.no_grad():
            state = model.encoder.eval()(input_ids=ids).last_hidden_state[0].mean(dim=0)
        np.testing.assert_allclose(vector, state / state.norm(), atol=1e-5)
    with torch.no_grad():
        model.encoder.embeddings.LayerNorm.bias.fill_(float("nan"))
    with pytest.raises(StudyError, match="not finite"):
        scores.embed(tuned(folder), model, texts, words, max_length=9)


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
    params = tuned(folder, pairs=way)
    splits = encode(dataset, SIMILARITY, BUDGET, words, way, 1)
    run = finetune(params, folder / "pretrained", SIMILARITY, splits, words, 1, 3e-3, look_at_test=True)
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
    params, words = tuned(folder), tiny.tokenizer(folder / "words")
    four = replace(CLASSES, labels=("a", "no", "b", "yes"))
    for split in dataset:
        rows = {"text": dataset[split]["text"], "label": [1 + 2 * label for label in dataset[split]["label"]]}
        dataset[split] = Dataset.from_dict(rows)
    splits = encode(dataset, four, BUDGET, words, "separate", 1)
    assert module.linear_probe(params, folder / "pretrained", four, splits, words, 1) > 0.75
    splits["train"] = splits["train"].filter(lambda row: row["labels"] == 3, keep_in_memory=True)
    with pytest.raises(StudyError, match="training examples have label 3; allowed: at least two labels"):
        module.linear_probe(params, folder / "pretrained", four, splits, words, 1)


@pytest.mark.parametrize("task", [CLASSES, SIMILARITY])
def test_a_linear_probe_is_scored_on_development_data_one_by_one(folder, dataset, task):
    """By hand: each development example alone through the classifier that fine-tuning starts from."""
    params, words = tuned(folder), tiny.tokenizer(folder / "words")
    if task is SIMILARITY:
        dataset = DatasetDict(train=pairs(200, 1), development=pairs(64, 2), test=pairs(64, 3))
    splits = encode(dataset, task, BUDGET, words, "separate", 1)
    model, collate = module.probed_classifier(params, folder / "pretrained", task, splits, words, 1)
    with torch.no_grad():
        logits = np.concatenate([model.eval()(**collate([row]))["logits"].numpy() for row in splits["development"]])
    expected = task_metrics(task, logits, np.array(splits["development"]["labels"]))[task.metric]
    assert module.linear_probe(params, folder / "pretrained", task, splits, words, 1) == pytest.approx(expected)


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


def test_masked_language_modelling_by_a_whole_forward_pass(folder):
    params, words = tiny.parameters(folder), tiny.tokenizer(folder / "words")
    model = tiny.masked_language_model()
    sequences = MaskedSequences(Dataset.from_dict({"input_ids": tiny.sequences(21, 1)}), params.masking, words, seed=0)
    measured = scores.masked_language_modelling(model, sequences, bf16=False)
    losses, hits = [], []
    for i in range(21):  # 21 is no multiple of the batch size: the rest has to weigh what it is
        item = sequences[i]
        with torch.no_grad():
            distribution = (
                model(input_ids=torch.from_numpy(item["masked_input_ids"])[None]).logits[0].log_softmax(dim=-1)
            )
        for position, label in zip(item["positions"], item["labels"], strict=True):
            losses.append(-distribution[position, label].item())
            hits.append(distribution[position].argmax().item() == label)
    assert measured == pytest.approx({"loss": np.mean(losses), "accuracy": np.mean(hits)}, rel=1e-4)


def test_size_by_hand():
    encoder = tiny.masked_language_model(layers=2, width=12, intermediate=24).bert
    measured = scores.size(encoder, 10)
    embeddings = (60 + 40 + 2) * 12 + 2 * 12  # words, positions, segments, layer norm
    layer = 4 * (12 * 12 + 12) + (12 * 24 + 24) + (24 * 12 + 12) + 2 * 2 * 12
    assert measured["embedding_parameters"] == embeddings
    assert measured["encoder_parameters"] == 2 * layer
    assert measured["parameters"] == embeddings + 2 * layer
    # Multiply-adds of 10 tokens, two operations each: four projections, two feed-forward maps; scores and values.
    per_layer = 10 * (4 * 12 * 12 + 2 * 12 * 24) + 2 * 10 * 10 * 12
    assert measured["flops_per_sequence"] == 2 * 2 * per_layer


def test_json_is_written_whole_or_not_at_all(tmp_path):
    output = tmp_path / "results" / "result.json"
    write_json(output, {"a": 1})
    with pytest.raises(ValueError):
        write_json(output, {"a": float("nan")})
    assert json.loads(output.read_text()) == {"a": 1}
    with pytest.raises(StudyError, match="cannot be written"):
        write_json(output / "below a file" / "result.json", {"a": 1})


def test_the_result_file_of_a_student_and_of_the_teacher(folder, dataset, monkeypatch):
    monkeypatch.setitem(scores.TASKS, "topic", CLASSES)
    monkeypatch.setitem(tasks.TASKS, "topic", CLASSES)
    budget = {"topic": {"train": 64, "development": 32, "test": 32, "max_length": 16}}
    params = tuned(folder, epochs=1, tasks=budget)
    params = params.model_copy(update={"latency": params.latency.model_copy(update={"sequence_length": tiny.LENGTH})})
    runs = folder / "runs" / "test" / "english"
    tasks.save(dataset, runs / "tasks" / "topic")
    (runs / "teacher" / "record.json").write_text(json.dumps({"steps": 3}))
    for method in ("none", "mlm", "hs-last"):
        distil(params, "english", method, "L2-H12", 1, runs / "students" / f"{method}_L2-H12_1")
    save_probe(runs / "tasks", monkeypatch, es=[(text, text) for text in tiny.WORDS[:9]])
    setting = params.settings["english"].model_copy(update={"tasks": ["topic", "retrieval"]})
    probing = with_probe(params).model_copy(update={"settings": {"english": setting}})
    probed = scores.evaluate(probing, "english", "teacher", "teacher", 0, folder / "results" / "probed.json")
    assert probed["probes"]["retrieval"]["languages"]["es"]["accuracy"] == 1 and list(probed["tasks"]) == ["topic"]
    results = {}
    for method, student, seed in (
        ("teacher", "teacher", 0),
        ("none", "L2-H12", 1),
        ("mlm", "L2-H12", 1),
        ("hs-last", "L2-H12", 1),
    ):
        output = folder / "results" / f"{method}.json"
        results[method] = scores.evaluate(params, "english", method, student, seed, output)
        assert json.loads(output.read_text()) == results[method]
    assert results["teacher"]["tasks"] == probed["tasks"] and "probes" not in results["teacher"]
    assert results["none"]["distillation"] is None and results["mlm"]["distillation"]["steps"] == 6
    assert results["hs-last"]["masked_language_modelling"] is None  # it has no head
    assert results["mlm"]["masked_language_modelling"]["loss"] < results["none"]["masked_language_modelling"]["loss"]
    assert results["teacher"]["size"]["parameters"] > results["mlm"]["size"]["parameters"]
    assert results["teacher"]["commit"] is None  # this folder is no repository; that of the study is
    head = subprocess.run(["git", "rev-parse", "HEAD"], cwd=tiny.ROOT, capture_output=True, text=True).stdout
    assert scores.commit(tiny.ROOT) == (head[:12] or None)
    with pytest.raises(StudyError, match="no saved model"):
        scores.evaluate(params, "english", "od", "L2-H12", 1, folder / "results" / "od.json")
    assert not (folder / "results" / "od.json").exists()


def test_latency_is_measured_beside_the_teacher(folder):
    protocol = {"sequence_length": 16, "batch_sizes": [1, 4], "warmup_runs": 1, "runs": 5, "threads": [1]}
    params = tiny.parameters(folder, latency=protocol)
    result = measure_latency(params, "english", folder / "latency.json")
    assert json.loads((folder / "latency.json").read_text()) == result
    assert [(entry["student"], entry["batch_size"]) for entry in result["measurements"]] == [
        ("L2-H24", 1),
        ("teacher", 1),
        ("L2-H24", 4),
        ("teacher", 4),
    ]
    for entry in result["measurements"]:
        assert 0 < entry["lower_quartile_seconds"] <= entry["median_seconds"] <= entry["upper_quartile_seconds"]
        assert entry["sequences_per_second"] == pytest.approx(entry["batch_size"] / entry["median_seconds"])
        ratio = entry["teacher_median_seconds"] / entry["median_seconds"]
        assert ratio / 3 < entry["speed_up"] < 3 * ratio
    teacher = result["measurements"][1]
    assert teacher["teacher_median_seconds"] == teacher["median_seconds"] and teacher["speed_up"] == 1
