"""Exports load as their formats say, stay close to the original, and are there whole or not at all."""

from __future__ import annotations

import hashlib
import json
import stat
import sys
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import tiny
import torch
from constructed_results import latency_result, write
from datasets import DatasetDict
from transformers import AutoConfig, AutoModel, AutoModelForMaskedLM, AutoTokenizer

from study import StudyError
from study.data import storage
from study.data.tasks import TASKS
from study.descriptions import Run
from study.distillation.distil import distil
from study.shipping import card
from study.shipping import parity as parity_module
from study.shipping.card import command_of
from study.shipping.classifier import export_classifier
from study.shipping.export import export
from study.shipping.formats import MODEL, OPENVINO_MODEL, WRITERS

FOR_TORCH = ("transformers", "sentence-transformers")
TEXTS = ["ax by cz", "dq e fx gy hz iq j kx", "b"]


@pytest.fixture(scope="module", params=["bert", "xlm-roberta"])
def plan(request, tmp_path_factory):
    """Students of hs-last and mlm, trained on a tiny workspace of either family, with a task to compare by."""
    folder = tmp_path_factory.mktemp(request.param)
    tiny.workspace(folder)
    made = tiny.plan(folder, grid={"methods": ["none", "mlm", "hs-last"], "students": {"english": ["L2-H12"]}})
    layout = made.layout("english")
    if request.param != "bert":
        model = tiny.masked_language_model(request.param, **tiny.TEACHER)
        for target in (layout.encoder, layout.teacher):
            model.save_pretrained(target)
    splits = {"train": tiny.sentences(60, 1), "development": tiny.sentences(40, 2), "test": tiny.sentences(8, 3)}
    storage.save(DatasetDict(splits), layout.tasks / "topic")
    for run in made.of(Run):
        if run.method != "none":
            distil(run, layout, layout.student(run.model))
    return made


def reference(plan, name: str, head: bool = False):
    source = plan.layout("english").student(plan.named(name).model)
    tokenizer = AutoTokenizer.from_pretrained(source)
    model = (AutoModelForMaskedLM if head else AutoModel).from_pretrained(
        source, **({} if head else {"add_pooling_layer": False})
    )
    return tokenizer, model.eval()


def pooled(states, mask):
    weights = np.asarray(mask)[..., None]
    return (np.asarray(states) * weights).sum(axis=1) / weights.sum(axis=1)


@pytest.mark.parametrize("kind", list(WRITERS))
def test_every_format_loads_by_its_library_and_gives_the_embeddings_of_the_student(plan, tmp_path, kind, monkeypatch):
    name = "english_hs-last_L2-H12_1"
    if kind in ("openvino", "onnx-int8-static") and "xlm" in str(plan.folder):
        pytest.skip("one family is enough")
    if kind == "openvino":
        pytest.importorskip("openvino")
    folder = export(plan, name, kind, tmp_path / "out")
    tokenizer, model = reference(plan, name)
    batch = tokenizer(TEXTS, padding=True, return_tensors="pt")
    inputs = {key: batch[key] for key in ("input_ids", "attention_mask")}
    with torch.no_grad():
        expected = pooled(model(**inputs).last_hidden_state, inputs["attention_mask"])
    if kind == "transformers":
        loaded = AutoModel.from_pretrained(folder, add_pooling_layer=False).eval()
        own = AutoTokenizer.from_pretrained(folder)(TEXTS, padding=True, return_tensors="pt")
        with torch.no_grad():
            states = loaded(input_ids=own["input_ids"], attention_mask=own["attention_mask"]).last_hidden_state
        found = pooled(states, own["attention_mask"])
    elif kind == "sentence-transformers":
        from sentence_transformers import SentenceTransformer

        loaded = SentenceTransformer(str(folder), device="cpu")
        found = loaded.encode(TEXTS)
        assert loaded.max_seq_length == tiny.LENGTH
    else:
        if kind == "openvino":
            import openvino

            compiled = openvino.compile_model(folder / OPENVINO_MODEL, "CPU", {"INFERENCE_PRECISION_HINT": "f32"})

            def encode(texts):
                return compiled(texts)[0]
        else:
            from onnxruntime import InferenceSession

            session = InferenceSession(str(folder / MODEL))

            def encode(texts):
                return session.run(None, texts)[0]

        found = pooled(encode({k: v.numpy() for k, v in inputs.items()}), inputs["attention_mask"])
        one = tokenizer(["ax"], return_tensors="np")  # another batch and length
        encode({key: one[key] for key in ("input_ids", "attention_mask")})
    cosine = (found * expected).sum(axis=1) / np.linalg.norm(found, axis=1) / np.linalg.norm(expected, axis=1)
    assert cosine.min() > (0.95 if "int8" in kind else 0.99999)
    for path in folder.rglob("*"):
        assert stat.S_IMODE(path.stat().st_mode) == (0o755 if path.is_dir() else 0o644)
    for line in (folder / "SHA256SUMS").read_text().splitlines():
        digest, file = line.split("  ")
        assert hashlib.sha256((folder / file).read_bytes()).hexdigest() == digest
    facts = json.loads((folder / "export.json").read_text())
    assert facts["run"] == name and (facts["parity"] is not None) == (kind not in FOR_TORCH)
    if kind not in FOR_TORCH:
        assert set(facts["parity"]["tasks"]) == {"topic"} and 0 <= 1 - facts["parity"]["cosine"] < 0.05
    card = (folder / "README.md").read_text()
    assert card.startswith("---\nlanguage:\n- en\n") and "Not measured yet" in card and "HS: last" in card
    assert "base_model" not in card  # a folder, which nobody else has
    monkeypatch.chdir(folder)
    told: dict = {}
    exec(card.partition("```python\n")[2].partition("```")[0], told)  # as it stands there
    assert told["embeddings"].shape == (2, expected.shape[1])


def test_a_head_is_exported_where_it_was_trained_and_nowhere_else(plan, tmp_path):
    with_head = export(plan, "english_mlm_L2-H12_1", "transformers", tmp_path / "mlm")
    assert "MaskedLM" in str(json.loads((with_head / "config.json").read_text())["architectures"])
    tokenizer, model = reference(plan, "english_mlm_L2-H12_1", head=True)
    ids = tokenizer(["ax by"], return_tensors="pt")["input_ids"]
    with torch.no_grad():
        assert torch.equal(
            AutoModelForMaskedLM.from_pretrained(with_head).eval()(input_ids=ids).logits, model(input_ids=ids).logits
        )
    assert "AutoModelForMaskedLM" in (with_head / "README.md").read_text()
    without = export(plan, "english_hs-last_L2-H12_1", "transformers", tmp_path / "hs")
    assert "MaskedLM" not in str(json.loads((without / "config.json").read_text())["architectures"])
    assert "an encoder without a head" in (without / "README.md").read_text()


def test_a_trimmed_vocabulary_gives_the_same_embeddings_of_texts_it_was_made_for(plan, tmp_path, capsys):
    name, texts = "english_hs-last_L2-H12_1", tmp_path / "texts"
    texts.mkdir()
    (texts / "a.txt").write_text("ax by\n\ncz\n")
    folder = export(plan, name, "transformers", tmp_path / "out", texts)
    tokenizer, model = reference(plan, name)
    trimmed, small = AutoTokenizer.from_pretrained(folder), AutoModel.from_pretrained(folder, add_pooling_layer=False)
    assert small.config.vocab_size == len(trimmed) < len(tokenizer)
    with torch.no_grad():
        before, after = (
            m.eval()(input_ids=t("cz ax by", return_tensors="pt")["input_ids"]).last_hidden_state
            for t, m in ((tokenizer, model), (trimmed, small))
        )
    torch.testing.assert_close(before, after)
    said, facts = capsys.readouterr().out, json.loads((folder / "export.json").read_text())
    assert facts["vocabulary"]["pieces"] == [len(tokenizer), len(trimmed)]
    assert f"{len(tokenizer)} -> {len(trimmed)} pieces" in said and "mean of 1 tasks" in said
    original, export_score = facts["parity"]["tasks"]["topic"]
    assert original != export_score  # texts of the task have pieces that are gone
    assert "## Vocabulary" in (folder / "README.md").read_text()
    (texts / "a.txt").write_text("\n")
    for place, problem in ((texts, "has no text"), (tmp_path / "none.txt", "cannot be read: No such file")):
        with pytest.raises(StudyError, match=problem):
            export(plan, name, "transformers", tmp_path / "b", place)
    assert not (tmp_path / "b").exists()


def test_mistakes_are_told_in_one_line_and_leave_nothing(plan, tmp_path, monkeypatch):
    with pytest.raises(StudyError, match="'tflite' is unknown; allowed: transformers, "):
        export(plan, "english_hs-last_L2-H12_1", "tflite", tmp_path / "a")
    with pytest.raises(StudyError, match="nearest: english_hs-last_L2-H12_1"):
        export(plan, "english_hs-lst_L2-H12_1", "onnx", tmp_path / "a")
    with pytest.raises(
        StudyError, match=r"not trained yet: run `make plan && dvc repro distill@english_none_L2-H12_1`"
    ):
        export(plan, "english_none_L2-H12_1", "onnx", tmp_path / "a")
    record = plan.layout("english").student("hs-last_L2-H12_1") / "record.json"
    whole = record.read_bytes()
    record.write_bytes(whole[:100])
    with pytest.raises(StudyError, match=r"record.json: no record of a training; run the stage"):
        export(plan, "english_hs-last_L2-H12_1", "onnx", tmp_path / "a")
    record.write_bytes(whole)
    (tmp_path / "full").mkdir()
    (tmp_path / "full" / "mine").write_text("kept")
    with pytest.raises(StudyError, match="a new or an empty folder"):
        export(plan, "english_hs-last_L2-H12_1", "onnx", tmp_path / "full")
    assert (tmp_path / "full" / "mine").read_text() == "kept"
    monkeypatch.setitem(parity_module.BOUNDS, "onnx-int8", 0.0)
    with pytest.raises(StudyError, match=r"too far from the original: smallest cosine 0\.\d+; allowed: at least 1"):
        export(plan, "english_hs-last_L2-H12_1", "onnx-int8", tmp_path / "a")
    monkeypatch.setitem(sys.modules, "onnxscript", None)
    with pytest.raises(StudyError, match=r"onnxscript is not installed: .*\[export\]"):
        export(plan, "english_hs-last_L2-H12_1", "onnx", tmp_path / "a")
    assert sorted(path.name for path in tmp_path.iterdir()) == ["full"]


@pytest.mark.parametrize("kind", ["sentence-transformers", "onnx-int8"])
def test_a_classifier_loads_with_its_labels_and_says_what_was_trained(plan, tmp_path, capsys, kind):
    if kind == "onnx-int8" and "xlm" in str(plan.folder):
        pytest.skip("one family is enough")
    folder = export_classifier(plan, "english_hs-last_L2-H12_1", "topic", kind, tmp_path / "out")
    development = tiny.sentences(40, 2)
    tokenizer, config = AutoTokenizer.from_pretrained(folder), AutoConfig.from_pretrained(folder)
    assert list(config.id2label.values()) == list(TASKS["topic"].labels)
    if kind == "sentence-transformers":
        from sentence_transformers import SentenceTransformer

        classify = SentenceTransformer(str(folder), device="cpu")
        found = classify.encode(list(development["text"])).argmax(axis=1)
    else:
        from onnxruntime import InferenceSession

        session = InferenceSession(str(folder / MODEL))
        found = []
        for text in development["text"]:
            ids = tokenizer([text], return_tensors="np")
            inputs = {key: ids[key] for key in ("input_ids", "attention_mask")}
            found.append(int(session.run(["logits"], inputs)[0].argmax()))
    accuracy = np.mean(np.array(found) == np.array(development["label"]))
    assert accuracy > 0.6  # more than either label's share: the labels are learnt, in their order
    facts = json.loads((folder / "export.json").read_text())
    assert facts["task"] == "topic" and facts["changed"] <= 0.05
    assert "labels changed" in capsys.readouterr().out and "fine-tuned on topic" in (folder / "README.md").read_text()
    assert "base_model" not in (folder / "README.md").read_text()


def test_what_is_no_classifier_is_told_in_one_line(plan, tmp_path):
    name = "english_hs-last_L2-H12_1"
    with pytest.raises(StudyError, match="task 'sts-b' classifies no single texts here; allowed: topic"):
        export_classifier(plan, name, "sts-b", "onnx", tmp_path / "a")
    with pytest.raises(StudyError, match="format 'openvino' is none of classifiers; allowed: sentence-trans"):
        export_classifier(plan, name, "topic", "openvino", tmp_path / "a")
    assert not (tmp_path / "a").exists()


@pytest.mark.parametrize("kind", ["transformers", "onnx"])
def test_a_tokenizer_is_named_as_transformers_4_knows_it(plan, tmp_path, kind):
    """A trimmed tokenizer has no class of its own, and what transformers 5 calls it then, 4 cannot load."""
    if kind == "onnx" and "xlm" in str(plan.folder):
        pytest.skip("one family is enough")
    (tmp_path / "texts.txt").write_text("ax by cz")
    folder = export(plan, "english_hs-last_L2-H12_1", kind, tmp_path / "out", tmp_path / "texts.txt")
    config = json.loads((Path(folder) / "tokenizer_config.json").read_text())
    assert config["tokenizer_class"] == "PreTrainedTokenizerFast" and "is_local" not in config
    assert {"cls_token", "sep_token", "pad_token", "unk_token", "mask_token"} <= config.keys()
    assert (folder / "tokenizer.json").is_file()


def test_a_card_says_how_to_run_a_stage_with_what_it_needs_and_shows_the_first_device_alone(plan):
    """In a fresh clone corpus and teacher are missing; a GPU's times are no row beside a processor's."""
    elsewhere = replace(plan, profile="small", folder=plan.root / "profiles" / "small")
    inside = "make plan PROFILE=small && cd profiles/small && dvc repro distill@a"
    assert (command_of(plan, "distill@a"), command_of(elsewhere, "distill@a")) == (
        "make plan && dvc repro distill@a",
        inside,
    )
    layout, run = plan.layout("english"), plan.named("english_hs-last_L2-H12_1")
    made = latency_result(["L3-H384"])
    rows = [row | {"student": "L2-H12"} for row in made["measurements"] if row["student"] == "L3-H384"]
    on = [{"device": "cpu", "processor": "a CPU", "precision": "float32"}, {"device": "cuda", "processor": "a GPU"}]
    times = [row | place | {"speed_up": 2.0 + n} for n, place in enumerate(on) for row in rows]
    layout.results.mkdir(parents=True, exist_ok=True)
    write(layout.results / "latency.json", made | {"measurements": times})
    try:
        said = card._latency(plan, run, layout)
    finally:
        (layout.results / "latency.json").unlink()
    assert "PyTorch (float32) on a CPU" in said and "| 2.0 |" in said and "| 3.0 |" not in said
