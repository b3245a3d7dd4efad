"""Result files: scores of every task, retrieval, masked words, size, latency, and what says where they come from."""

from __future__ import annotations

import hashlib
import json
import subprocess
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import tiny
import torch
from datasets import Dataset, DatasetDict
from test_finetune import CLASSES, FINETUNING, tuned

from study import StudyError
from study.data import storage, tasks
from study.data.corpus import corpus_hash
from study.data.tasks import Task
from study.descriptions import Evaluation, LatencyMeasurement, Run
from study.distillation.distil import distil
from study.distillation.masking import MaskedSequences
from study.evaluation import latency, retrieval, scores
from study.evaluation.finetune import MeanPoolingClassifier
from study.evaluation.latency import measure_latency
from study.files import content_hash, write_json
from study.records import Environment, LanguageModelling, LatencyResult, RunResult, read_record
from study.runtime import commit, environment
from study.sections import TaskBudget


@pytest.fixture
def folder(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    return tiny.workspace(tmp_path)


@pytest.fixture
def dataset():
    return DatasetDict(train=tiny.sentences(128, 1), development=tiny.sentences(64, 2), test=tiny.sentences(64, 3))


def test_the_learning_rate_is_chosen_by_mean_development_score(folder, dataset, monkeypatch):
    budget = {"topic": {"train": 96, "development": 64, "test": None, "max_length": 16}}
    evaluation = tuned(folder, learning_rates=[1e-6, 5e-3], seeds=[1, 2], epochs=2, tasks=budget)
    monkeypatch.setitem(tasks.TASKS, "topic", CLASSES)
    storage.save(dataset, folder / "tasks" / "topic")
    looks, original = [], scores.finetune

    def watch(*arguments, **named):
        looks.append((arguments[6], named["look_at_test"]))
        return original(*arguments, **named)

    monkeypatch.setattr(scores, "finetune", watch)
    words = tiny.tokenizer(folder / "words")
    entry = scores.evaluate_task(evaluation, folder / "pretrained", "topic", folder / "tasks", words)
    assert entry.learning_rate == 5e-3 and [run.seed for run in entry.runs] == [1, 2]
    assert looks == [(1e-6, False)] * 2 + [(5e-3, False)] * 2 + [(5e-3, True)] * 2
    assert [entry.train_examples, entry.development_examples, entry.test_examples] == [96, 64, 64]


def test_other_distillation_seeds_draw_other_training_examples(folder, dataset, monkeypatch):
    """Otherwise what two draws happen to favour would be common to all of them, and no interval would hold it."""
    budget = {"topic": {"train": 32, "development": 64, "test": None, "max_length": 16}}
    evaluation = tuned(folder, learning_rates=[5e-3], seeds=[1, 2], epochs=1, tasks=budget)
    monkeypatch.setitem(tasks.TASKS, "topic", CLASSES)
    storage.save(dataset, folder / "tasks" / "topic")
    seen, original = [], scores.finetune

    def watch(description, encoder, task, splits, tokenizer, seed, *arguments, **named):
        seen.append((seed, tuple(map(tuple, splits["train"]["input_ids"]))))
        return original(description, encoder, task, splits, tokenizer, seed, *arguments, **named)

    monkeypatch.setattr(scores, "finetune", watch)
    words = tiny.tokenizer(folder / "words")
    entries = [
        scores.evaluate_task(
            evaluation.model_copy(update={"seed": seed}), folder / "pretrained", "topic", folder / "tasks", words
        )
        for seed in (0, 1, 2)
    ]
    teacher, first, second = seen[:2], seen[2:4], seen[4:]
    assert teacher == first and [seed for seed, _ in first] == [1, 2]  # the teacher shares those of seed 1
    assert len({examples for _, examples in (*first, *second)}) == 4
    assert all([run.seed for run in entry.runs] == [1, 2] for entry in entries)


LANGUAGES = replace(CLASSES, languages=("en", "es", "fr", "de"))


def test_every_language_of_the_budget_is_tested_with_the_one_model_kept(folder, dataset, monkeypatch):
    """Spanish labels are upside down, French data are the English ones, and German is not in the budget."""
    monkeypatch.setitem(tasks.TASKS, "topic", LANGUAGES)
    dataset |= {
        "test-es": tiny.sentences(64, 3, flip=True),
        "test-fr": dataset["test"],
        "test-de": tiny.sentences(9, 4),
    }
    storage.save(DatasetDict(dataset), folder / "tasks" / "topic")
    budget = {"train": 128, "development": 64, "test": 48, "max_length": 16}
    words, entries, evaluation = tiny.tokenizer(folder / "words"), {}, tuned(folder)
    for name, languages in (("several", ["es", "en", "fr"]), ("one", ["en"])):
        tested = {"tasks": {"topic": TaskBudget(**budget, languages=languages)}}
        entries[name] = scores.evaluate_task(
            evaluation.model_copy(update=tested), folder / "pretrained", "topic", folder / "tasks", words
        )
    several = entries["several"]
    (run,) = several.runs
    assert list(run.languages) == ["es", "fr"] and run.test["accuracy"] > 0.9
    assert run.languages["fr"] == run.test
    assert run.languages["es"]["accuracy"] == pytest.approx(1 - run.test["accuracy"])
    assert several.language_examples == {"es": 48, "fr": 48}
    frozen = {split: score for split, score in run.frozen.items() if split in ("development", "test")}
    assert set(run.frozen) == {"development", "test", "test-es", "test-fr"}
    english = {"runs": [run.model_copy(update={"languages": {}, "frozen": frozen})], "language_examples": {}}
    assert several.model_copy(update=english) == entries["one"]  # testing in more languages changes nothing else


PROBE = Task("retrieval", dict, None, "accuracy", ("accuracy",), True, "", ("en", "es", "fr"), kind="retrieval")


def with_probe(evaluation: Evaluation, test: int | None = None, languages=("en", "es")) -> Evaluation:
    budget = TaskBudget(train=None, development=None, test=test, max_length=16, languages=list(languages))
    return evaluation.model_copy(update={"tasks": evaluation.tasks | {"retrieval": budget}})


def save_probe(folder, monkeypatch, **languages: list[tuple[str, str]]) -> None:
    monkeypatch.setitem(tasks.TASKS, "retrieval", PROBE)
    splits = {
        f"test-{language}": Dataset.from_list([{"text": text, "text_pair": other} for text, other in rows])
        for language, rows in languages.items()
    }
    storage.save(DatasetDict(splits), folder / "retrieval")


def test_retrieval_by_hand(folder, monkeypatch):
    """Vectors in a plane, by their angles; the nearest is the one at the smallest angle."""
    angles = {"a": 0, "b": 50, "c": 180, "A": 10, "B": -12, "C": 100}
    save_probe(folder, monkeypatch, es=[("a", "A"), ("b", "B"), ("c", "C")], fr=[("a", "C"), ("b", "A"), ("c", "B")])

    def embed(description, model, texts, *_):
        radians = np.radians([angles[text] for text in texts])
        return np.stack([np.cos(radians), np.sin(radians)], axis=1)

    monkeypatch.setattr(retrieval, "embed", embed)
    arguments = (folder / "pretrained", "retrieval", folder, None)
    entry = retrieval.retrieve(with_probe(tuned(folder), languages=["fr", "en", "es"]), *arguments)
    assert (entry.metric, entry.test_examples, list(entry.languages)) == ("accuracy", 3, ["es", "fr"])
    # a finds A (10 degrees away), b finds A (40), c finds C (80); A finds a (10), B finds a (12), C finds b (50).
    # Spanish: a-A and c-C are right, b-B is not; A-a is right, B-b and C-c are not.
    expected = {"accuracy": 1 / 2, "from_english": 2 / 3, "to_english": 1 / 3}
    assert entry.languages["es"] == pytest.approx(expected)
    # French: b-A alone is right; none of A-b, B-c and C-a is.
    assert entry.languages["fr"] == pytest.approx({"accuracy": 1 / 6, "from_english": 1 / 3, "to_english": 0})
    assert list(retrieval.retrieve(with_probe(tuned(folder)), *arguments).languages) == ["es"]


def test_development_pairs_of_retrieval_are_those_that_its_test_leaves_over(folder, monkeypatch):
    texts = list(dict.fromkeys(tiny.sentences(80, 5)["text"]))[:50]
    there, words = set(texts), tiny.tokenizer(folder / "words")
    save_probe(folder, monkeypatch, es=[(text, text) for text in texts], fr=list(zip(texts, texts[::-1], strict=True)))
    embed, read = retrieval.embed, []

    def reading(description, model, own, *rest):
        read.append(set(own))
        return embed(description, model, own, *rest)

    monkeypatch.setattr(retrieval, "embed", reading)
    arguments = (folder / "pretrained", "retrieval", folder, words)
    evaluation = with_probe(tuned(folder), 30, ["en", "es", "fr"])
    budget = evaluation.tasks["retrieval"]
    alone = retrieval.retrieve(evaluation, *arguments)
    assert alone.development == {} and set.union(*read) < there
    read.clear()
    asked = evaluation.model_copy(update={"tasks": {"retrieval": budget.model_copy(update={"development": 20})}})
    both = retrieval.retrieve(asked, *arguments)
    assert both.model_copy(update={"development": {}}) == alone  # test scores do not change
    assert both.development["es"] == 1 and both.development["fr"] < 0.2
    sizes = [len(texts) for texts in read]
    assert sizes == [30, 20, 30, 20] and read[0] | read[1] == there  # Spanish, which is English; then the French sides
    more = evaluation.model_copy(update={"tasks": {"retrieval": budget.model_copy(update={"development": 21})}})
    with pytest.raises(StudyError, match=r"retrieval.development = 21; allowed: null \(none\), or up to 20, the pairs"):
        retrieval.retrieve(more, *arguments)


def test_retrieval_finds_a_text_that_is_its_own_translation(folder, monkeypatch):
    texts = list(dict.fromkeys(tiny.sentences(80, 5)["text"]))
    backwards = list(zip(texts, texts[::-1], strict=True))
    save_probe(folder, monkeypatch, es=[(text, text) for text in texts], fr=backwards)
    evaluation, words = with_probe(tuned(folder), 41, ["en", "es", "fr"]), tiny.tokenizer(folder / "words")
    entry = retrieval.retrieve(evaluation, folder / "pretrained", "retrieval", folder, words)
    assert entry.languages["es"]["accuracy"] == 1 and entry.test_examples == 41
    assert entry.languages["fr"]["accuracy"] < 0.2


def test_embeddings_are_pooled_states_of_length_one_in_the_order_of_the_texts(folder):
    words, model = tiny.tokenizer(folder / "words"), MeanPoolingClassifier(tiny.masked_language_model().bert, 1, False)
    texts = tiny.sentences(11, 6)["text"][:]
    together = retrieval.embed(tuned(folder), model, texts, words, max_length=9, batch_size=4)
    assert len(together) == 11
    for text, vector in zip(texts, together, strict=True):
        ids = torch.tensor(words([text], truncation=True, max_length=9)["input_ids"])
        with torch.no_grad():
            state = model.encoder.eval()(input_ids=ids).last_hidden_state[0].mean(dim=0)
        np.testing.assert_allclose(vector, state / state.norm(), atol=1e-5)
    with torch.no_grad():
        model.encoder.embeddings.LayerNorm.bias.fill_(float("nan"))
    with pytest.raises(StudyError, match="not finite"):
        retrieval.embed(tuned(folder), model, texts, words, max_length=9)


def test_masked_language_modelling_by_a_whole_forward_pass(folder):
    masking, words = tiny.parameters(folder).masking, tiny.tokenizer(folder / "words")
    model = tiny.masked_language_model()
    sequences = MaskedSequences(Dataset.from_dict({"input_ids": tiny.sequences(21, 1)}), masking, words, seed=0)
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
    assert isinstance(measured, LanguageModelling)
    expected = {"loss": np.mean(losses), "accuracy": np.mean(hits)}
    assert measured.model_dump() == pytest.approx(expected, rel=1e-4)


def test_size_by_hand():
    encoder = tiny.masked_language_model(layers=2, width=12, intermediate=24).bert
    measured = scores.size(encoder, 10)
    embeddings = (60 + 40 + 2) * 12 + 2 * 12  # words, positions, segments, layer norm
    layer = 4 * (12 * 12 + 12) + (12 * 24 + 24) + (24 * 12 + 12) + 2 * 2 * 12
    assert measured.embedding_parameters == embeddings
    assert measured.encoder_parameters == 2 * layer
    assert measured.parameters == embeddings + 2 * layer
    # Multiply-adds of 10 tokens, two operations each: four projections, two feed-forward maps; scores and values.
    per_layer = 10 * (4 * 12 * 12 + 2 * 12 * 24) + 2 * 10 * 10 * 12
    assert measured.flops_per_sequence == 2 * 2 * per_layer and measured.sequence_length == 10


def test_json_is_written_whole_or_not_at_all(tmp_path):
    output = tmp_path / "results" / "result.json"
    write_json(output, {"a": 1})
    with pytest.raises(ValueError):
        write_json(output, {"a": float("nan")})
    assert json.loads(output.read_text()) == {"a": 1}
    with pytest.raises(StudyError, match="cannot be written"):
        write_json(output / "below a file" / "result.json", {"a": 1})


TRAINING = {
    "objective": "masked_language_modelling",
    "learning_rate": 3e-4,
    "steps": 3,
    "tokens": 384,
    "seconds": 1.0,
    "tokens_per_second": 384.0,
    "precision": "fp32",
    "threads": 1,
    "curve": [{"step": 0, "tokens": 0, "seconds": 0.0, "loss": 4.0}],
}


def test_the_result_file_of_a_student_and_of_the_teacher(folder, dataset, monkeypatch):
    monkeypatch.setitem(tasks.TASKS, "topic", CLASSES)
    budget = {"topic": {"train": 64, "development": 32, "test": 32, "max_length": 16}}
    plan = tiny.plan(
        folder,
        finetuning=FINETUNING | {"epochs": 1, "tasks": budget},
        latency={"sequence_length": tiny.LENGTH},
        grid={"methods": ["none", "mlm", "hs-last", "od"], "students": {"english": ["L2-H12"]}},
    )
    layout, evaluations = plan.layout("english"), {entry.method: entry for entry in plan.of(Evaluation)}
    storage.save(dataset, layout.tasks / "topic")
    (layout.teacher / "record.json").write_text(json.dumps({"training": TRAINING}))
    for run in plan.of(Run):
        if run.method != "od":
            distil(run, layout, layout.student(run.model))
    save_probe(layout.tasks, monkeypatch, es=[(text, text) for text in tiny.WORDS[:9]])
    probed = scores.evaluate(with_probe(evaluations["teacher"]), layout, folder / "results" / "probed.json")
    assert probed.probes["retrieval"].languages["es"]["accuracy"] == 1 and list(probed.tasks) == ["topic"]
    results = {}
    for method in ("teacher", "none", "mlm", "hs-last"):
        output = folder / "results" / f"{method}.json"
        results[method] = scores.evaluate(evaluations[method], layout, output)
        names = {"profile": "test", "setting": "english", "method": method, "seed": int(method != "teacher")}
        assert read_record(output, RunResult, **names) == results[method]
    assert results["teacher"].tasks == probed.tasks and results["teacher"].probes == {}
    assert results["none"].distillation is None and results["mlm"].distillation.steps == 6
    assert results["teacher"].distillation.model_dump(exclude_defaults=True) == TRAINING
    assert results["hs-last"].masked_language_modelling is None  # it has no head
    assert results["mlm"].masked_language_modelling.loss < results["none"].masked_language_modelling.loss
    assert results["teacher"].size.parameters > results["mlm"].size.parameters
    assert results["mlm"].size.sequence_length == tiny.LENGTH
    for method, result in results.items():
        teacher, weights = (
            hashlib.sha256((saved / "model.safetensors").read_bytes()).hexdigest()
            for saved in (layout.teacher, evaluations[method].folder(layout))
        )
        corpus, texts = corpus_hash(layout.corpus), content_hash(layout.tasks)
        assert result.hashes == {"corpus": corpus, "tasks": texts, "teacher": teacher, "weights": weights}
    assert len({result.hashes["weights"] for result in results.values()}) == len(results)
    assert results["teacher"].commit is None  # this folder is no repository; that of the study may be
    with pytest.raises(StudyError, match="no saved model"):
        scores.evaluate(evaluations["od"], layout, folder / "results" / "od.json")
    assert not (folder / "results" / "od.json").exists()


def test_an_interrupted_evaluation_keeps_finished_tasks(folder, dataset, monkeypatch):
    """Of three tasks the third is interrupted: the next call measures it alone, and writes what a whole one writes."""
    names = ("topic", "sentiment", "boolq")
    budget = {name: {"train": 32, "development": 16, "test": 16, "max_length": 16} for name in names}
    for name in names:
        monkeypatch.setitem(tasks.TASKS, name, replace(CLASSES, name=name))
        storage.save(dataset, folder / "runs" / "english" / "tasks" / name)
    setting = tiny.parameters(folder).settings["english"].model_dump() | {"tasks": list(names)}
    changes = {"finetuning": FINETUNING | {"epochs": 1, "tasks": budget}, "settings": {"english": setting}}
    plan = tiny.plan(folder, **changes, latency={"sequence_length": tiny.LENGTH})
    layout, evaluation = plan.layout("english"), plan.of(Evaluation)[0]
    (layout.teacher / "record.json").write_text(json.dumps({"training": TRAINING}))
    measured, original = [], scores.evaluate_task

    def watch(description, encoder, name, *arguments):
        measured.append(name)
        if measured == list(names):
            raise KeyboardInterrupt
        return original(description, encoder, name, *arguments)

    monkeypatch.setattr(scores, "evaluate_task", watch)
    with pytest.raises(KeyboardInterrupt):
        scores.evaluate(evaluation, layout, folder / "result.json")
    (kept,) = layout.checkpoints.iterdir()
    (kept / "sentiment.json").write_text((kept / "sentiment.json").read_text()[:-9])  # a damaged one does not count
    took = json.loads((kept / "topic.json").read_text())["seconds"]
    resumed = scores.evaluate(evaluation, layout, folder / "result.json")
    assert measured == [*names, "sentiment", "boolq"] and not kept.exists()
    assert resumed.evaluation_seconds >= took - 0.05
    whole = scores.evaluate(evaluation, layout, folder / "whole.json")
    assert measured[5:] == list(names) and resumed.tasks == whole.tasks and list(whole.tasks) == list(names)


def test_a_result_file_says_what_made_it(tmp_path):
    assert Environment.model_validate(environment()).threads == torch.get_num_threads()
    assert commit(tmp_path) is None and commit(tmp_path / "missing") is None
    study = Path(__file__).parents[1]
    head = subprocess.run(["git", "rev-parse", "HEAD"], cwd=study, capture_output=True, text=True).stdout
    assert commit(study) in (None, head[:12], f"{head[:12]}+")  # tests may run beside changes, or in a ZIP


@pytest.mark.parametrize(
    ("content", "problem"),
    [
        (None, "No such file"),
        ("{", "no record of a training"),
        ("{}", "no record of a training"),
        ("[]", "no record of a training"),
        (json.dumps({"training": TRAINING | {"curve": []}}), r"training\.curve = \[\]: List should have at least 1"),
        (json.dumps({"training": TRAINING | {"magic": 1}}), r"training\.magic = 1: unknown key"),
    ],
)
def test_a_model_without_a_whole_record_of_its_training_is_an_error_of_one_line(tmp_path, content, problem):
    if content is not None:
        (tmp_path / "record.json").write_text(content)
    with pytest.raises(StudyError, match=f"record.json: {problem}") as error:
        scores.training_of(tmp_path)
    assert len(str(error.value).splitlines()) == 1


def test_latency_is_measured_beside_the_teacher(folder):
    protocol = {"sequence_length": 16, "batch_sizes": [1, 4], "warmup_runs": 1, "runs": 5, "threads": [1]}
    plan = tiny.plan(folder, latency=protocol)
    (description,) = plan.of(LatencyMeasurement)
    result = measure_latency(description, plan.layout("english"), folder / "latency.json")
    assert read_record(folder / "latency.json", LatencyResult, profile="test", setting="english") == result
    assert (result.sequence_length, result.runs, result.warmup_runs, result.precision) == (16, 5, 1, "fp32")
    assert list(result.hashes) == ["teacher"]
    assert [(entry.student, entry.batch_size) for entry in result.measurements] == [
        ("L2-H24", 1),
        ("teacher", 1),
        ("L2-H24", 4),
        ("teacher", 4),
    ]
    for entry in result.measurements:
        assert 0 < entry.lower_quartile_seconds <= entry.median_seconds <= entry.upper_quartile_seconds
        assert entry.sequences_per_second == pytest.approx(entry.batch_size / entry.median_seconds)
        assert entry.teacher_median_seconds > 0 and entry.speed_up > 0
    teacher = result.measurements[1]
    assert teacher.teacher_median_seconds == teacher.median_seconds and teacher.speed_up == 1
    assert '"device"' not in (folder / "latency.json").read_text()


def test_latency_is_that_of_the_runs_after_the_warm_up_and_the_speed_up_is_paired(folder, monkeypatch):
    """The machine slows down by half from the second run on, for both alike: pairs do not mind."""
    taken = iter([9.0, 9.0] + [1.0, 4.0] + [2.0, 8.0] + [2.0, 10.0])  # student, teacher, in turn
    monkeypatch.setattr(latency, "forward_seconds", lambda model, inputs, bf16: next(taken))
    protocol = {"sequence_length": 16, "batch_sizes": [4], "warmup_runs": 1, "runs": 3, "threads": [1]}
    plan = tiny.plan(folder, latency=protocol)
    result = measure_latency(plan.of(LatencyMeasurement)[0], plan.layout("english"), folder / "latency.json")
    student, teacher = result.measurements
    assert (student.median_seconds, student.teacher_median_seconds, student.speed_up) == (2.0, 8.0, 4.0)
    assert (student.lower_quartile_seconds, student.sequences_per_second) == (1.5, 2.0)
    assert (teacher.student, teacher.median_seconds, teacher.speed_up) == ("teacher", 8.0, 1.0)


def test_latency_on_devices_asked_for_says_where_it_ran(folder, monkeypatch):
    protocol = {"sequence_length": 16, "batch_sizes": [1], "warmup_runs": 1, "runs": 3, "threads": [1]}
    (description,) = tiny.plan(folder, latency=protocol | {"devices": ["cpu"]}).of(LatencyMeasurement)
    layout = tiny.plan(folder).layout("english")
    result = measure_latency(description, layout, folder / "latency.json")
    where = {(entry.device, entry.processor, entry.precision) for entry in result.measurements}
    assert where == {("cpu", result.environment.processor, "fp32")}
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    (asked,) = tiny.plan(folder, latency=protocol | {"devices": ["cpu", "cuda"]}).of(LatencyMeasurement)
    with pytest.raises(
        StudyError, match=r"^latency.devices = \['cpu', 'cuda'\]: no GPU is visible here; allowed: \[cpu\]$"
    ):
        measure_latency(asked, layout, folder / "asked.json")
    assert not (folder / "asked.json").exists()
