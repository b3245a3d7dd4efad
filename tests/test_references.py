"""Rows beside the students: a table against a slow loop, a student of others against its export, whole rows."""

from __future__ import annotations

import subprocess
import sys
from types import SimpleNamespace

import numpy as np
import pytest
import tiny
import torch
from constructed_results import latency_result, make_study, run_result, write, write_grid
from datasets import DatasetDict
from test_finetune import CLASSES
from transformers import AutoModel, BertTokenizerFast

from study import StudyError
from study.analysis import references as shown
from study.analysis.figures.comparison import quality_latency
from study.analysis.numbers.analysis import Analysis
from study.analysis.numbers.results import load_results
from study.data import sources, storage, tasks
from study.data.pretrained import save_model
from study.data.references import PUBLISHED, published, write_reference
from study.data.static_table import static_table
from study.descriptions import REFERENCE, Comparison, Evaluation, LatencyMeasurement, ReferenceModel
from study.evaluation.finetune import MeanPoolingClassifier
from study.evaluation.latency import measure_latency
from study.evaluation.scores import evaluate
from study.methods import Published, Static
from study.plan import _list
from study.records import RunResult, read_record

STATIC = {"kind": "static_table", "width": 6, "smoothing": 0.01}
OTHERS = {"kind": "published", "model": "paraphrase-minilm-l3"}


@pytest.fixture
def folder(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    return tiny.workspace(tmp_path)


def planned(folder, **changes):
    grid = {"references": {"english": ["static"]}}
    return tiny.plan(folder, references={"static": STATIC}, grid=grid, **changes)


# The table


def words_with_unused(folder) -> BertTokenizerFast:
    folder.mkdir()
    words = [*tiny.SPECIAL, "[unused0]", "[unused1]", *tiny.WORDS[2:]]
    (folder / "vocab.txt").write_text("\n".join(words) + "\n")
    return BertTokenizerFast(vocab=str(folder / "vocab.txt"))


def table_loop(model, kept: list[int], width: int, a: float) -> np.ndarray:
    """Inner products of the rows of all tokens: what rows are but for the signs of the directions."""
    means = []
    for token in kept:
        states = model(torch.tensor([[2, token, 3]])).last_hidden_state[0].tolist()
        means.append([sum(state[c] for state in states) / 3 for c in range(len(states[0]))])
    centred = np.array(means) - np.mean(means, axis=0)
    left, values, _ = np.linalg.svd(centred, full_matrices=False)
    total = sum(1 / (rank + 1) for rank in range(1, len(kept) + 1))
    weights = [a / (a + 1 / (rank + 1) / total) for rank in range(1, len(kept) + 1)]
    rows = np.zeros((tiny.VOCABULARY, width))
    rows[kept] = (left[:, :width] * values[:width]) * np.array(weights)[:, None]
    return rows @ rows.T


@torch.no_grad()
def test_a_static_table_is_the_formula(tmp_path):
    words, model = words_with_unused(tmp_path / "words"), tiny.masked_language_model().base_model
    made = static_table(model.train(), words, 6, 0.01).embeddings.weight
    expected = table_loop(model.eval(), list(range(7, tiny.VOCABULARY)), 6, 0.01)
    np.testing.assert_allclose((made @ made.T).numpy(), expected, atol=1e-4 * np.abs(expected).max())
    assert not made[:7].any() and made[7:].abs().sum(dim=1).min() > 0


def test_weights_of_the_first_token_by_hand(tmp_path):
    """Two words: p = (1/2) / (1/2 + 1/3) = 3/5 and 2/5; a / (a + p) = 1/4 and 1/3 at a = 1/5; rows are as +-d apart."""
    (tmp_path / "vocab.txt").write_text("\n".join([*tiny.SPECIAL, "a", "b"]) + "\n")
    words = BertTokenizerFast(vocab=str(tmp_path / "vocab.txt"))
    table = static_table(tiny.masked_language_model().base_model, words, 1, 0.2).embeddings.weight.detach()
    assert table[5].item() / table[6].item() == pytest.approx(-(1 / 4) / (1 / 3), rel=1e-4)


def test_a_text_is_the_mean_of_its_rows_and_a_saved_table_is_loaded_by_name(tmp_path):
    words = tiny.tokenizer(tmp_path / "words")
    table = static_table(tiny.masked_language_model().base_model, words, 6, 0.01)
    save_model(table, words, tmp_path / "saved")
    loaded = AutoModel.from_pretrained(tmp_path / "saved")
    ids, mask = torch.tensor([[2, 9, 12, 3, 0]]), torch.tensor([[1, 1, 1, 1, 0]])
    features = MeanPoolingClassifier(loaded, 2, pairs=False).eval().features(input_ids=ids, attention_mask=mask)
    rows = table.embeddings.weight.detach()
    torch.testing.assert_close(features[0], (rows[9] + rows[12]) / 4)  # [CLS] and [SEP] count, as zeros


def test_a_saved_table_is_known_to_a_process_that_only_loads(tmp_path):
    words = tiny.tokenizer(tmp_path / "words")
    save_model(static_table(tiny.masked_language_model().base_model, words, 6, 0.01), words, tmp_path / "saved")
    code = "import sys, pathlib; from study.data.pretrained import load_model as load"
    code += "; print(load(pathlib.Path(sys.argv[1]), 'eager', head=False).num_parameters())"
    told = subprocess.run([sys.executable, "-c", code, tmp_path / "saved"], capture_output=True, text=True)
    assert told.stdout.strip() == str(6 * tiny.VOCABULARY), told.stderr[-500:]


# A student of others


def test_a_published_student_is_its_export():
    runtime = pytest.importorskip("onnxruntime")
    own = PUBLISHED["paraphrase-minilm-l3"]
    model, words = published("paraphrase-minilm-l3")
    texts = ["A man is playing a guitar.", "Someone plays an instrument.", "Shares fell sharply on Wall Street."]
    batch = words(texts, padding=True, return_tensors="pt")
    session = runtime.InferenceSession(sources.read_member(own.package, own.member))
    outputs = session.run(None, {key: batch[key].numpy() for key in ("input_ids", "attention_mask")})
    with torch.no_grad():
        states = model.eval()(**batch).last_hidden_state
    (exported,) = (torch.from_numpy(output) for output in outputs if output.shape == states.shape)
    torch.testing.assert_close(states, exported, atol=1e-4, rtol=1e-3)
    pooled = torch.nn.functional.normalize(
        MeanPoolingClassifier(model, 1, pairs=False).features(batch["input_ids"], batch["attention_mask"]), dim=1
    )
    likeness = (pooled @ pooled.T).detach()
    assert likeness[0, 1] > 0.4 > 0.2 > likeness[0, 2]  # the tokenizer is its own


def test_weights_that_do_not_fit_are_named(monkeypatch):
    monkeypatch.setattr("study.data.references.read_onnx", lambda content, prefix: {})
    monkeypatch.setattr(sources, "read_member", lambda package, member: b"")
    with pytest.raises(StudyError, match=r"reference paraphrase-minilm-l3: weights do not fit the model \(embeddings"):
        published("paraphrase-minilm-l3")


def test_its_package_is_fetched_by_nobody_who_does_not_ask():
    optional = {source.package for source in sources.SOURCES.values() if source.optional}
    assert PUBLISHED["paraphrase-minilm-l3"].package in optional


# Rows


def test_a_row_is_made_evaluated_and_timed_as_students_are(folder, monkeypatch):
    monkeypatch.setitem(tasks.TASKS, "topic", CLASSES)
    plan = planned(folder)
    layout = plan.layout("english")
    splits = {"train": tiny.sentences(96, 1), "development": tiny.sentences(48, 2), "test": tiny.sentences(48, 3)}
    storage.save(DatasetDict(splits), layout.tasks / "topic")
    (reference,) = plan.of(ReferenceModel)
    write_reference(reference, layout, layout.reference(reference.model))
    (described,) = (d for d in plan.of(Evaluation) if d.student == REFERENCE)
    result = evaluate(described, layout, layout.result(described.model))
    where = {"method": "static", "student": REFERENCE, "seed": 0}
    assert read_record(layout.results / "static_reference_0.json", RunResult, **where) == result
    assert result.distillation is None and result.masked_language_modelling is None
    assert result.size.parameters == 6 * tiny.VOCABULARY and result.size.flops_per_sequence == 0
    score = np.mean([run.frozen["test"] for run in result.tasks["topic"].runs])
    assert 0.7 < score <= 1  # words alone tell these classes
    (timed,) = plan.of(LatencyMeasurement)
    protocol = timed.latency.model_copy(update={"sequence_length": 16, "batch_sizes": [1], "threads": [1], "runs": 3})
    measured = measure_latency(timed.model_copy(update={"latency": protocol}), layout, folder / "latency.json")
    assert [row.student for row in measured.measurements] == ["static", "L2-H24", "teacher"]


def test_a_row_changes_no_description_but_those_that_name_it(folder):
    before = {(d.stage, d.name): d.model_dump_json() for d in tiny.plan(folder).descriptions}
    after = {(d.stage, d.name): d.model_dump_json() for d in planned(folder).descriptions}
    assert {key for key in before if before[key] != after[key]} == {("latency", "english"), ("compare", "english")}
    assert set(after) - set(before) == {(stage, "english_static_reference_0") for stage in ("reference", "evaluate")}
    assert not any("reference" in content for content in before.values())
    listed = _list(planned(folder))
    assert "english_static_reference_0: {setting: english, model: static_reference_0}" in listed
    assert "model: static_reference_0, folder: references/static_reference_0" in listed


@pytest.mark.parametrize(
    ("own", "message"),
    [
        (STATIC | {"width": 25}, r"references.static.width = 25; allowed: at most 24"),
        (STATIC | {"smoothing": 1.0}, r"references.static.static_table.smoothing"),
        (OTHERS | {"model": "distilbert"}, r"references.static.published.model"),
    ],
)
def test_rows_that_cannot_be(folder, own, message):
    with pytest.raises(ValueError, match=message):
        tiny.plan(folder, references={"static": own}, grid={"references": {"english": ["static"]}})


def test_no_student_has_the_name_of_rows(folder):
    sizes = {"layers": 2, "width": 24, "heads": 4, "intermediate": 48}
    with pytest.raises(ValueError, match="students: 'reference' stands for rows"):
        tiny.plan(folder, students={"reference": sizes})


def test_rows_that_nothing_declares(folder):
    with pytest.raises(ValueError, match=r"grid.references.english: 'other' is unknown; allowed: static"):
        tiny.plan(folder, references={"static": STATIC}, grid={"references": {"english": ["other"]}})


# What is shown


def with_rows(tmp_path) -> SimpleNamespace:
    study = make_study(tmp_path, ["none", "mlm"])
    folder = write_grid(study)
    rows = {"others": Published(**OTHERS), "static": Static(**STATIC)}
    for name, score in (("others", 0.76), ("static", 0.64)):
        content = run_result(name, REFERENCE, 0, score) | {"distillation": None}
        write(study.layout.result(f"{name}_{REFERENCE}_0"), content)
    timed = latency_result(study.comparison.students)
    speed = {"others": 2.0, "static": 90.0}
    timed["measurements"] += [
        row | {"student": name, "speed_up": factor}
        for name, factor in speed.items()
        for row in timed["measurements"][:2]
    ]
    write(folder / "latency.json", timed)
    comparison = study.comparison.model_copy(update={"references": rows})
    return SimpleNamespace(comparison=comparison, layout=study.layout, without=study.comparison)


def test_rows_are_set_beside_the_teacher_and_leave_everything_else(tmp_path):
    study = with_rows(tmp_path)
    analysis = Analysis(load_results(study.comparison, study.layout))
    table = shown.reference_table(analysis)
    assert list(table["method"]) == ["others", "static"]
    assert table["macro"].tolist() == pytest.approx([0.76, 0.64])
    assert table["retained"].tolist() == pytest.approx([0.76 / 0.80, 0.64 / 0.80])
    assert table["speed_up_batch_32"].tolist() == [2.0, 90.0]
    (page,) = shown.references(analysis)
    text = page.to_html()
    for told in ("paraphrase-minilm-l3", "trained by others, on other data", "not distilled", "95.0", "90.0 ×"):
        assert told in text
    without = Analysis(load_results(study.without, study.layout))
    assert shown.references(without) == []
    for name in ("scores", "runs", "latency"):
        assert getattr(analysis.results, name).equals(getattr(without.results, name))
    assert analysis.headline == without.headline


def test_rows_are_hollow_in_the_picture_of_quality_and_latency_and_not_on_its_front(tmp_path):
    study = with_rows(tmp_path)
    with_them, without = (
        quality_latency(Analysis(load_results(own, study.layout))).axes[0] for own in (study.comparison, study.without)
    )
    hollow = [line for line in with_them.lines if line.get_fillstyle() == "none"]
    assert [line.get_ydata()[0] for line in hollow] == pytest.approx([76, 64])
    assert [note.get_text().split()[0] for note in with_them.texts[-2:]] == ["others", "static"]
    assert len(with_them.lines) == len(without.lines) + 2
    assert with_them.lines[0].get_xydata().tolist() == without.lines[0].get_xydata().tolist()


def test_a_row_without_a_file_or_a_measurement_is_named(tmp_path):
    study = with_rows(tmp_path)
    write(study.layout.results / "latency.json", latency_result(study.comparison.students))
    with pytest.raises(StudyError, match="missing others at batch size 1"):
        load_results(study.comparison, study.layout)
    study.layout.result(f"static_{REFERENCE}_0").unlink()
    with pytest.raises(StudyError, match=r"result files are missing .*: \S*static_reference_0.json$"):
        load_results(study.comparison, study.layout)


def test_a_comparison_without_rows_says_nothing_of_them(folder):
    (comparison,) = tiny.plan(folder).of(Comparison)
    assert "references" not in comparison.model_dump()
