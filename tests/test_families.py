"""Families whose parts have other names: taps against attention written out by hand, heads, students, one step."""

from __future__ import annotations

import math

import numpy as np
import pytest
import tiny
import torch
from tiny_training import stream
from torch import nn
from transformers import default_data_collator

from study.data.pretrained import load_model, load_pretrained
from study.distillation.heads import dense_of_head, language_modelling_head, norm_of_head, with_language_modelling_head
from study.distillation.objectives import OBJECTIVES
from study.distillation.students import create_student
from study.distillation.taps import read_activations
from study.distillation.trainer import switch_off_dropout
from study.evaluation.finetune import MeanPoolingClassifier
from study.families import FAMILIES, family_of, keep_layers, part, positions
from study.files import StudyError
from study.sections import Encoder, Teacher

pytestmark = pytest.mark.fast
LAYER = 3  # has local attention in ModernBERT's pattern of the tiny model: full, local, local, full
EQUAL = Encoder(layers=2, width=24, heads=4, intermediate=48)
NARROW = Encoder(layers=2, width=12, heads=4, intermediate=24)
COPIED = [name for name in tiny.OTHERS if FAMILIES[name].copied is not None]


@pytest.fixture
def ids():
    return torch.from_numpy(tiny.sequences(24, 5).astype(np.int64))


def attention_by_hand(name: str, layer, states: torch.Tensor, read: dict, model) -> torch.Tensor:
    """What the attention of a layer adds, from queries, keys and values (B, T, 24) of 4 heads, one head at a time."""
    outputs = torch.empty_like(states)
    tokens = states.shape[1]
    for head in range(4):
        q, k, v = (read[key][..., 6 * head : 6 * head + 6] for key in ("query", "key", "value"))
        if name == "modernbert":  # rotary positions: pairs (i, i + 3) turned by t * theta^(-2 i / 6)
            local = model.config.layer_types[LAYER - 1] == "sliding_attention"
            theta = model.config.rope_parameters["sliding_attention" if local else "full_attention"]["rope_theta"]
            angles = torch.arange(tokens)[:, None] * theta ** (-torch.arange(0, 6, 2) / 6)
            cos, sin = angles.cos(), angles.sin()
            q, k = (
                torch.cat([x[..., :3] * cos - x[..., 3:] * sin, x[..., 3:] * cos + x[..., :3] * sin], -1)
                for x in (q, k)
            )
        scores = q @ k.transpose(1, 2) / math.sqrt(6)
        for i in range(tokens):
            for j in range(tokens):
                if name == "mpnet":  # fewer than 8 tokens apart, a bucket each; behind others than before
                    bucket = (16 if j > i else 0) + abs(j - i)
                    scores[:, i, j] += model.mpnet.encoder.relative_attention_bias.weight[bucket, head]
                elif name == "modernbert" and abs(j - i) > 3:  # half of local_attention = 6
                    scores[:, i, j] = -torch.inf
        outputs[..., 6 * head : 6 * head + 6] = scores.softmax(-1) @ v
    return part(layer, FAMILIES[name].block.attention_output)(outputs)


@pytest.mark.parametrize("name", tiny.OTHERS)
def test_what_is_read_is_what_attention_is_made_of(name):
    model = tiny.masked_language_model(name)
    short = torch.from_numpy(tiny.sequences(3, 5).astype(np.int64))[:, :8]
    layer = part(model.base_model, FAMILIES[name].layers)[LAYER - 1]
    seen = []
    output = part(layer, FAMILIES[name].block.attention_output)
    handle = output.register_forward_hook(lambda module, inputs, result: seen.append(result))
    with torch.no_grad():
        states = model(input_ids=short, output_hidden_states=True).hidden_states
        handle.remove()
        read = read_activations(model, short, hidden_layers=range(5), attention_layers=[LAYER])
        by_hand = attention_by_hand(name, layer, states[LAYER - 1], read.attention[LAYER], model)
        # The projections themselves, from the layer's own weights and input.
        inputs = layer.attn_norm(states[LAYER - 1]) if name == "modernbert" else states[LAYER - 1]
        linears = [part(layer, path) for path in FAMILIES[name].block.projections]
        weight = torch.cat([linear.weight for linear in linears])
        bias = 0 if linears[0].bias is None else torch.cat([linear.bias for linear in linears])
        projected = inputs @ weight.T + bias
    assert all(torch.equal(read.hidden[i], states[i]) for i in range(5))
    assert list(read.attention[LAYER]) == ["query", "key", "value"]
    torch.testing.assert_close(torch.cat(list(read.attention[LAYER].values()), -1), projected, rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(by_hand, seen[0], rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("name", tiny.OTHERS)
def test_nothing_behind_the_deepest_reading_is_computed(name, ids):
    model = tiny.masked_language_model(name)
    layers, block = part(model.base_model, FAMILIES[name].layers), FAMILIES[name].block
    calls = []
    for key, module in {
        "below": part(layers[0], block.output),
        "attention": part(layers[1], block.attention_output),
        "above": layers[2],
    }.items():
        module.register_forward_hook(lambda *_, key=key: calls.append(key))
    read_activations(model, ids, attention_layers=[2])
    assert calls == ["below"]


@pytest.mark.parametrize("name", [*tiny.FAMILIES, *tiny.OTHERS])
def test_a_teacher_goes_through_its_files_with_its_own_head(name, tmp_path, ids):
    model = tiny.masked_language_model(name)
    model.save_pretrained(tmp_path)
    tiny.tokenizer(tmp_path).save_pretrained(tmp_path)
    teacher = Teacher(name=str(tmp_path), **tiny.TEACHER, head="own")
    loaded, _ = load_pretrained(teacher)
    bare, _ = load_pretrained(teacher.model_copy(update={"head": "fit"}))
    with torch.no_grad():
        expected = model(input_ids=ids)
        states = read_activations(loaded.eval(), ids, hidden_layers=[4]).hidden[4]
        torch.testing.assert_close(language_modelling_head(loaded)(states), expected.logits, rtol=1e-4, atol=1e-5)
        assert torch.equal(read_activations(bare.eval(), ids, hidden_layers=[4]).hidden[4], states)
        assert torch.equal(bare(input_ids=ids).last_hidden_state, states)
        fitted = with_language_modelling_head(bare, torch.ones(tiny.VOCABULARY)).eval()
        assert fitted(input_ids=ids).logits.isfinite().all()
        assert torch.equal(read_activations(fitted, ids, hidden_layers=[4]).hidden[4], states)
    assert load_model(tmp_path, "eager", head=False).config.model_type == name
    assert MeanPoolingClassifier(bare, 2, pairs=False).dropout.p == pytest.approx(0.0 if name == "modernbert" else 0.1)
    keep_layers(bare, 3)
    bare.save_pretrained(tmp_path / "shorter")
    with torch.no_grad():
        shorter = load_model(tmp_path / "shorter", "eager", head=False).eval()
        read = read_activations(loaded, ids, hidden_layers=[3]).hidden[3]
        last = shorter.final_norm(read) if name == "modernbert" else read
        torch.testing.assert_close(shorter(input_ids=ids).last_hidden_state, last, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("name", COPIED)
def test_a_copy_of_all_layers_is_the_teacher(name, ids):
    teacher = tiny.masked_language_model(name)
    student = create_student(teacher, EQUAL.model_copy(update={"layers": 4}), "teacher-layers").eval()
    with torch.no_grad():
        assert torch.equal(student(input_ids=ids).logits, teacher(input_ids=ids).logits)


@pytest.mark.parametrize("name", COPIED)
def test_projected_students_predict_their_teacher_far_better_than_random_ones(name, ids):
    """Of a teacher whose states lie within the first 12 of 24 channels, as in test_students."""
    from test_students import explained

    teacher = tiny.masked_language_model(name)
    block = FAMILIES[name].block
    with torch.no_grad():
        for module in teacher.modules():
            if isinstance(module, nn.LayerNorm):
                module.weight[12:], module.bias[12:] = 0, 0
        for embedding in teacher.base_model.embeddings.modules():
            if isinstance(embedding, nn.Embedding):
                embedding.weight[:, 12:] = 0
        for layer in part(teacher.base_model, FAMILIES[name].layers):
            for path in (*block.projections, block.attention_output, block.output):
                linear = part(layer, path)
                if path in block.projections:
                    linear.weight.view(4, 6, 24)[:, 3:], linear.bias.view(4, 6)[:, 3:] = 0, 0
                else:
                    linear.weight[12:], linear.bias[12:] = 0, 0
    sizes, test = Encoder(layers=4, width=12, heads=4, intermediate=48), tiny.sequences(128, 7).astype(np.int64)
    scores = {
        start: explained(create_student(teacher, sizes, start, ids, seed=1).eval(), teacher, torch.from_numpy(test))
        for start in ("random", "teacher-embeddings", "teacher-layers")
    }
    assert scores["teacher-layers"] > 0.6, scores
    assert scores["teacher-layers"] > max(scores["random"], scores["teacher-embeddings"]) + 0.3, scores


@pytest.mark.parametrize("family", ["bert", "roberta"])
@pytest.mark.parametrize("name", tiny.OTHERS)
def test_a_student_of_another_family(name, family, ids):
    teacher = tiny.masked_language_model(name)
    sizes = NARROW.model_copy(update={"family": family, "width": 24})
    student = create_student(teacher, sizes, "teacher-embeddings", seed=1)
    assert student.config.model_type == family
    assert positions(student.config) == positions(teacher.config)
    assert (student.config.num_hidden_layers, student.config.intermediate_size) == (2, 24)
    assert student.config.pad_token_id == teacher.config.pad_token_id
    words = [model.get_input_embeddings().weight for model in (student, teacher)]
    assert torch.equal(*words) and student.get_output_embeddings().weight is words[0]
    longest = ids.repeat(1, 3)[:, : positions(teacher.config)]
    assert student(input_ids=longest).logits.shape == (*longest.shape, tiny.VOCABULARY)
    if name != "ernie" or family != "bert":
        with pytest.raises(StudyError, match="cannot be taken out of their places; |into"):
            create_student(teacher, sizes, "teacher-layers", ids)


def test_starts_that_two_models_do_not_have_are_refused_in_one_line(ids):
    small = tiny.masked_language_model("electra", embedding_size=8)
    with pytest.raises(StudyError, match="embeddings of 8 channels under layers of 24 cannot be projected"):
        create_student(small, NARROW, "teacher-layers", ids)
    with pytest.raises(StudyError, match="the teacher's have 8 channels, the student's 12"):
        create_student(small, NARROW.model_copy(update={"family": "bert"}), "teacher-embeddings")
    assert create_student(small, NARROW, "teacher-embeddings").base_model.embeddings_project.out_features == 12
    whole = create_student(small, EQUAL.model_copy(update={"layers": 4}), "teacher-layers").eval()
    with torch.no_grad():
        assert torch.equal(whole(input_ids=ids).logits, small(input_ids=ids).logits)


def test_a_students_head_is_tied_where_the_teachers_is_not(tmp_path, ids):
    teacher = tiny.masked_language_model("roberta", tie_word_embeddings=False)
    teacher.save_pretrained(tmp_path)
    tiny.tokenizer(tmp_path).save_pretrained(tmp_path)
    loaded, _ = load_pretrained(Teacher(name=str(tmp_path), **tiny.TEACHER, head="own"))
    assert not torch.equal(loaded.get_output_embeddings().weight, loaded.get_input_embeddings().weight)
    with torch.no_grad():
        logits = [model.eval()(input_ids=ids).logits for model in (loaded, teacher)]
    torch.testing.assert_close(*logits, rtol=1e-4, atol=1e-5)
    student = create_student(loaded, EQUAL, "teacher-layers")
    assert student.get_output_embeddings().weight is student.get_input_embeddings().weight


@pytest.mark.parametrize("method", ["od", "hs-uniform+last", "mha-minilmv2"])
@pytest.mark.parametrize("name", tiny.OTHERS)
def test_a_step_of_distillation_lowers_the_loss(name, method, tmp_path):
    params = tiny.parameters(tmp_path)
    options = params.methods[method]
    teacher = tiny.masked_language_model(name)
    batches = stream(params, tiny.tokenizer(tmp_path))
    batch = default_data_collator([batches[i] for i in range(8)])
    start = "teacher-embeddings" if name == "modernbert" else "teacher-layers"
    student = create_student(teacher, EQUAL, start, batch["input_ids"], seed=1).train()
    switch_off_dropout(student)
    before = {key: value.clone() for key, value in teacher.state_dict().items()}
    objective = OBJECTIVES[options.objective](student, teacher, options)
    objective.start(batch)
    loss = objective(**batch)["loss"]
    assert torch.equal(objective(**batch)["loss"], loss)  # no dropout is left
    loss.backward()
    reached = [parameter for parameter in objective.parameters() if parameter.grad is not None]
    squares = sum(parameter.grad.square().sum() for parameter in reached)
    with torch.no_grad():
        for parameter in reached:
            parameter -= 0.02 * loss / squares * parameter.grad
    after = objective(**batch)["loss"].item()
    assert 0.95 * loss.item() < after < 0.99 * loss.item()
    assert tiny.identical(before, teacher.state_dict())


def test_facts_of_every_family_are_those_of_its_model():
    for name in FAMILIES:
        model = tiny.masked_language_model(name)
        assert family_of(model) is FAMILIES[name]
        assert [getattr(model.config, key) for key in FAMILIES[name].sizes] == [4, 24, 4, 48]
        assert dense_of_head(model).out_features == 24 and isinstance(norm_of_head(model), nn.LayerNorm)
        longest = torch.full((1, positions(model.config)), 7)
        assert model(input_ids=longest).logits.isfinite().all()
        if name != "modernbert":  # rotates, whatever the length
            with pytest.raises((IndexError, RuntimeError)):
                model(input_ids=torch.full((1, positions(model.config) + 1), 7))
