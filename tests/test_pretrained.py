"""Loading models: nothing that does not fit is replaced in silence."""

from __future__ import annotations

import json

import numpy as np
import pytest
import tiny
import torch
from safetensors.torch import load_file, save_file

from study import StudyError
from study.data.pretrained import load_model, load_pretrained
from study.distillation.heads import with_language_modelling_head
from study.distillation.students import create_student
from study.distillation.taps import read_activations


@pytest.fixture
def folder(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    return tiny.workspace(tmp_path)


def test_a_teacher_of_other_sizes_than_declared(folder):
    teacher = tiny.parameters(folder).settings["english"].teacher.model_copy(update={"intermediate": 64})
    with pytest.raises(StudyError, match="intermediate = 64.*48"):
        load_pretrained(teacher)


def test_a_teacher_that_does_not_exist(folder, monkeypatch):
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    teacher = tiny.parameters(folder).settings["english"].teacher.model_copy(update={"name": str(folder / "nowhere")})
    with pytest.raises(StudyError) as error:
        load_pretrained(teacher)
    message = str(error.value)
    assert "nowhere" in message and "\n" not in message
    assert "all-minilm-l6-v2, multilingual-e5-small" in message


def pretrained(folder):
    return tiny.parameters(folder).settings["english"].teacher


def rewrite(folder, change) -> None:
    """The weights in a folder, with their names and values changed."""
    file = folder / "model.safetensors"
    save_file(change(load_file(file)), file, metadata={"format": "pt"})


WEIGHTS = {
    "keys of DataParallel": (lambda w: {f"module.{key}": value for key, value in w.items()}, "lacks weights"),
    "keys of sentence-transformers": (
        lambda w: {f"0.auto_model.{key}": value for key, value in w.items()},
        "lacks weights",
    ),
    "a missing layer": (
        lambda w: {k: v for k, v in w.items() if ".layer.2." not in k},
        r"lacks weights: encoder\.layer\.2",
    ),
    "a layer too many": (
        lambda w: w | {k.replace("layer.3", "layer.4"): v.clone() for k, v in w.items() if ".layer.3." in k},
        r"has unexpected weights: bert\.encoder\.layer\.4",
    ),
    "one weight missing": (
        lambda w: {k: v for k, v in w.items() if not k.endswith("layer.0.output.dense.bias")},
        "lacks weights",
    ),
}


@pytest.mark.parametrize("name", WEIGHTS)
def test_weights_that_do_not_fit_are_refused_wherever_a_model_is_loaded(folder, name):
    change, problem = WEIGHTS[name]
    rewrite(folder / "pretrained", change)
    for load in (
        lambda: load_pretrained(pretrained(folder)),
        lambda: load_model(folder / "pretrained", "eager", head=False),
    ):
        with pytest.raises(StudyError, match=problem) as error:
            load()
        assert "\n" not in str(error.value) and "pretrained" in str(error.value)


def test_a_missing_head_is_refused_where_the_model_says_it_has_one(folder):
    rewrite(folder / "pretrained", lambda w: {k: v for k, v in w.items() if "transform.dense" not in k})
    with pytest.raises(StudyError, match=r"lacks weights: cls\.predictions\.transform\.dense"):
        load_model(folder / "pretrained", "eager")
    load_model(folder / "pretrained", "eager", head=False)


def edit(file, **values) -> None:
    file.write_text(json.dumps(json.loads(file.read_text()) | values))


@pytest.mark.parametrize("family", tiny.FAMILIES)
def test_every_family_that_is_allowed_is_loaded_read_and_distilled_into(folder, family):
    model = tiny.masked_language_model(family, **tiny.TEACHER)
    model.save_pretrained(folder / "pretrained")
    encoder, _ = load_pretrained(pretrained(folder))
    headed = with_language_modelling_head(encoder, torch.ones(tiny.VOCABULARY))
    ids = torch.from_numpy(tiny.sequences(24, 5).astype(np.int64))
    student = create_student(headed, tiny.parameters(folder).students["L2-H12"], "teacher-layers", ids, seed=1)
    for model in (headed, student):
        depth = model.config.num_hidden_layers
        read = read_activations(model, ids, hidden_layers=[depth], attention_layers=[depth])
        assert read.hidden[depth].isfinite().all() and set(read.attention[depth]) == {"query", "key", "value"}


def test_families_and_positions_that_cannot_be_read_are_refused(folder):
    edit(folder / "pretrained" / "config.json", position_embedding_type="relative_key")
    with pytest.raises(StudyError, match="position_embedding_type = relative_key cannot be read"):
        load_pretrained(pretrained(folder))
    edit(folder / "pretrained" / "config.json", position_embedding_type="absolute", model_type="gpt2")
    with pytest.raises(StudyError, match="model_type = gpt2 cannot be read; allowed: bert, roberta"):
        load_pretrained(pretrained(folder))


def test_a_tokenizer_that_is_not_its_file_is_refused(folder):
    """transformers rebuilds a BERT tokenizer by its class: what tokenizer.json says of accents is ignored."""
    file = folder / "pretrained" / "tokenizer.json"
    content = json.loads(file.read_text())
    content["normalizer"] = {"type": "BertNormalizer", "clean_text": True, "handle_chinese_chars": False,
                             "strip_accents": False, "lowercase": False}  # fmt: skip
    content["model"]["vocab"] = {
        token: i for i, token in enumerate([*tiny.SPECIAL, "W", "words", "##ORDS", *tiny.WORDS[3:]])
    }
    file.write_text(json.dumps(content))
    from tokenizers import Tokenizer
    from transformers import AutoTokenizer

    text = "WORDS and Words"
    same = (
        AutoTokenizer.from_pretrained(folder / "pretrained")(text)["input_ids"]
        == Tokenizer.from_file(str(file)).encode(text).ids
    )
    if same:
        load_pretrained(pretrained(folder))
    else:
        with pytest.raises(StudyError, match="otherwise than tokenizer.json says"):
            load_pretrained(pretrained(folder))


def test_a_folder_without_a_tokenizer_of_its_own_is_refused(folder):
    for name in ("tokenizer.json", "tokenizer_config.json", "vocab.txt", "special_tokens_map.json"):
        (folder / "pretrained" / name).unlink(missing_ok=True)
    with pytest.raises(StudyError) as error:
        load_pretrained(pretrained(folder))
    assert "\n" not in str(error.value)


def test_the_head_is_tied_whatever_the_encoder_says(folder):
    model = tiny.masked_language_model()
    model.config.tie_word_embeddings = False
    headed = with_language_modelling_head(model.bert, torch.ones(tiny.VOCABULARY))
    assert headed.get_output_embeddings().weight is headed.get_input_embeddings().weight
    assert model.config.tie_word_embeddings is False
