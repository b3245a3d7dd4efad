"""Students: what each initialisation takes over from the teacher, exactly where it is said to be exact."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from tiny import FAMILIES, SPECIAL, VOCABULARY, identical, masked_language_model, sequences
from torch import nn
from transformers import AutoModel, AutoModelForMaskedLM

from study.data.pretrained import load_model
from study.distillation.heads import dense_of_head, norm_of_head
from study.distillation.students import create_student
from study.sections import Encoder

INITIALISATIONS = ("random", "teacher-embeddings", "teacher-layers")
EQUAL = Encoder(layers=2, width=24, heads=4, intermediate=48)
NARROW = Encoder(layers=2, width=12, heads=4, intermediate=24)


@pytest.fixture
def sample():
    return torch.from_numpy(sequences(24, 5).astype(np.int64))


def word_embeddings(model) -> np.ndarray:
    return model.get_input_embeddings().weight.detach().numpy()


@pytest.mark.parametrize("sizes", [EQUAL, NARROW])
@pytest.mark.parametrize("initialisation", INITIALISATIONS)
@pytest.mark.parametrize("family", FAMILIES)
def test_sizes_family_and_vocabulary(family, initialisation, sizes, sample):
    teacher = masked_language_model(family)
    student = create_student(teacher, sizes, initialisation, sample)
    config = student.config
    assert type(student) is type(teacher)
    assert (config.num_hidden_layers, config.hidden_size) == (sizes.layers, sizes.width)
    assert (config.num_attention_heads, config.intermediate_size) == (sizes.heads, sizes.intermediate)
    assert student(input_ids=sample).logits.shape == (*sample.shape, VOCABULARY)
    assert student.get_output_embeddings().weight is student.get_input_embeddings().weight
    assert all(torch.isfinite(parameter).all() for parameter in student.parameters())


@pytest.mark.parametrize("sizes", [EQUAL, NARROW])
@pytest.mark.parametrize("initialisation", INITIALISATIONS)
def test_a_seed_gives_the_same_student_whatever_was_drawn_before(initialisation, sizes, sample):
    teacher = masked_language_model()
    first = create_student(teacher, sizes, initialisation, sample, seed=3).state_dict()
    torch.rand(100)
    assert identical(first, create_student(teacher, sizes, initialisation, sample, seed=3).state_dict())
    other = create_student(teacher, sizes, initialisation, sample, seed=4).state_dict()
    assert identical(first, other) == (initialisation == "teacher-layers")  # nothing of that one is random


@pytest.mark.parametrize("sizes", [EQUAL, NARROW])
@pytest.mark.parametrize("initialisation", INITIALISATIONS)
def test_the_teacher_is_left_as_it_was(initialisation, sizes, sample):
    teacher = masked_language_model().train()
    before = {name: tensor.clone() for name, tensor in teacher.state_dict().items()}
    student = create_student(teacher, sizes, initialisation, sample)
    assert teacher.training and identical(before, teacher.state_dict())
    assert not any(module._forward_hooks for module in teacher.modules())
    storages = {parameter.data_ptr() for parameter in teacher.parameters()}
    assert not storages & {parameter.data_ptr() for parameter in student.parameters()}


def test_random_takes_nothing_from_the_teacher():
    teacher = masked_language_model()
    student = create_student(teacher, EQUAL, "random")
    assert np.abs(np.corrcoef(word_embeddings(student).ravel(), word_embeddings(teacher).ravel())[0, 1]) < 0.1


@pytest.mark.parametrize("family", FAMILIES)
def test_embeddings_of_equal_width_are_copied_and_the_rest_is_random(family):
    teacher = masked_language_model(family)
    student = create_student(teacher, EQUAL, "teacher-embeddings")
    random = create_student(teacher, EQUAL, "random")
    assert np.array_equal(word_embeddings(student), word_embeddings(teacher))
    words = "embeddings.word_embeddings.weight"
    rest = [{n: t for n, t in m.base_model.state_dict().items() if n != words} for m in (student, random)]
    assert identical(*rest)


def test_narrower_embeddings_are_the_best_of_their_rank():
    teacher = masked_language_model()
    student = create_student(teacher, NARROW, "teacher-embeddings")
    left, values, _ = np.linalg.svd(word_embeddings(teacher), full_matrices=False)
    best = (left[:, :12] * values[:12] ** 2) @ left[:, :12].T  # E_k E_k^T of the truncated decomposition
    embeddings = word_embeddings(student)
    np.testing.assert_allclose(embeddings @ embeddings.T, best, atol=1e-4 * values[0] ** 2)


@pytest.mark.parametrize(("depth", "sources"), [(2, [2, 4]), (3, [1, 2, 4]), (4, [1, 2, 3, 4])])
@pytest.mark.parametrize("family", FAMILIES)
def test_layers_of_equal_width_are_copied_by_the_uniform_mapping(family, depth, sources):
    teacher = masked_language_model(family)
    student = create_student(teacher, EQUAL.model_copy(update={"layers": depth}), "teacher-layers")
    for layer, j in zip(student.base_model.encoder.layer, sources, strict=True):
        assert identical(layer.state_dict(), teacher.base_model.encoder.layer[j - 1].state_dict())
    assert identical(student.base_model.embeddings.state_dict(), teacher.base_model.embeddings.state_dict())
    for part in (dense_of_head, norm_of_head):
        assert identical(part(student).state_dict(), part(teacher).state_dict())
    assert torch.equal(student.get_output_embeddings().bias, teacher.get_output_embeddings().bias)


@pytest.mark.parametrize("family", FAMILIES)
def test_a_copy_of_all_layers_is_the_teacher(family, sample):
    teacher = masked_language_model(family)
    student = create_student(teacher, EQUAL.model_copy(update={"layers": 4}), "teacher-layers").eval()
    with torch.no_grad():
        assert torch.equal(student(input_ids=sample).logits, teacher(input_ids=sample).logits)


def low_rank_teacher(family: str = "bert", head_rank: int = 6):
    """Hidden states within the first 12 of 24 channels; per head, attention needs ``head_rank`` of 6 dimensions."""
    teacher = masked_language_model(family)
    with torch.no_grad():
        for module in teacher.modules():
            if isinstance(module, nn.LayerNorm):
                module.weight[12:], module.bias[12:] = 0, 0
        for embedding in teacher.base_model.embeddings.modules():
            if isinstance(embedding, nn.Embedding):
                embedding.weight[:, 12:] = 0
        for layer in teacher.base_model.encoder.layer:
            attention = layer.attention.self
            for projection in (attention.query, attention.key, attention.value):
                projection.weight.view(4, 6, 24)[:, head_rank:] = 0
                projection.bias.view(4, 6)[:, head_rank:] = 0
            layer.attention.output.dense.weight[12:], layer.attention.output.dense.bias[12:] = 0, 0
            layer.output.dense.weight[12:], layer.output.dense.bias[12:] = 0, 0
    return teacher


def projection_of(student, teacher) -> torch.Tensor:
    """P (H_S, H_T), recovered from embeddings E_S = E_T P^T where the teacher's have full rank."""
    source, target = torch.from_numpy(word_embeddings(teacher)), torch.from_numpy(word_embeddings(student))
    return (torch.linalg.pinv(source) @ target).T


def attention_block(layer, states: torch.Tensor) -> torch.Tensor:
    """What the attention of a layer adds to the residual stream."""
    context = layer.attention.self(states)
    return layer.attention.output.dense(context[0] if isinstance(context, tuple) else context)


def relative_error(value: torch.Tensor, expected: torch.Tensor) -> float:
    return ((value - expected).norm() / expected.norm()).item()


@pytest.mark.parametrize("family", FAMILIES)
def test_projection_at_equal_width_loses_nothing_of_attention(family, sample):
    """Heads keep their size, so every bilinear form must come through whole; a narrower feed-forward part forces it."""
    teacher = masked_language_model(family)
    sizes = Encoder(layers=2, width=24, heads=4, intermediate=40)
    student = create_student(teacher, sizes, "teacher-layers", sample).eval()
    projection = projection_of(student, teacher)
    torch.testing.assert_close(projection @ projection.T, torch.eye(24), atol=1e-3, rtol=0)
    with torch.no_grad():
        hidden = teacher(input_ids=sample, output_hidden_states=True).hidden_states
        for i, j in ((0, 2), (1, 4)):
            source, target = teacher.base_model.encoder.layer[j - 1], student.base_model.encoder.layer[i]
            large = source.attention.self.attention_head_size
            for head in range(4):
                rows = slice(head * large, (head + 1) * large)
                forms = [
                    (layer.attention.self.query.weight[rows].T @ layer.attention.self.key.weight[rows])
                    for layer in (source, target)
                ]
                assert relative_error(projection.T @ forms[1] @ projection, forms[0]) < 1e-3
            h = hidden[j - 1]
            ours = attention_block(target, h @ projection.T)
            assert relative_error(ours, attention_block(source, h) @ projection.T) < 1e-3


@pytest.mark.parametrize("family", FAMILIES)
def test_projection_loses_nothing_of_attention_that_fits_the_narrower_student(family, sample):
    """States of rank 12 and heads of rank 3 fit a student of width 12 with heads of 3: scores, values, biases agree."""
    teacher = low_rank_teacher(family, head_rank=3)
    student = create_student(teacher, NARROW, "teacher-layers", sample).eval()
    projection = projection_of(student, teacher)
    with torch.no_grad():
        hidden = teacher(input_ids=sample, output_hidden_states=True).hidden_states
        for i, j in ((0, 2), (1, 4)):
            source, target = teacher.base_model.encoder.layer[j - 1], student.base_model.encoder.layer[i]
            h = hidden[j - 1]
            assert relative_error(h @ projection.T @ projection, h) < 1e-3
            ours = attention_block(target, h @ projection.T)
            assert relative_error(ours, attention_block(source, h) @ projection.T) < 2e-3


def test_projection_keeps_every_neuron_where_the_feed_forward_width_is_kept(sample):
    teacher = low_rank_teacher()
    sizes = NARROW.model_copy(update={"intermediate": 48})
    student = create_student(teacher, sizes, "teacher-layers", sample).eval()
    projection = projection_of(student, teacher)
    with torch.no_grad():
        h = teacher(input_ids=sample, output_hidden_states=True).hidden_states[2]
        for i, j in ((0, 2), (1, 4)):
            source, target = teacher.base_model.encoder.layer[j - 1], student.base_model.encoder.layer[i]
            ours = target.output.dense(target.intermediate(h @ projection.T))
            assert relative_error(ours, source.output.dense(source.intermediate(h)) @ projection.T) < 1e-3


def test_dropped_neurons_leave_their_mean(sample):
    """Half of the neurons add next to nothing but a constant: dropping them must cost next to nothing."""
    teacher = low_rank_teacher()
    with torch.no_grad():
        for layer in teacher.base_model.encoder.layer:
            layer.intermediate.dense.weight[24:] *= 1e-3
            layer.intermediate.dense.bias[24:] = 1.0
            layer.output.dense.weight[:, 24:] *= 0.05
    student = create_student(teacher, NARROW, "teacher-layers", sample).eval()
    projection = projection_of(student, teacher)
    with torch.no_grad():
        h = teacher(input_ids=sample, output_hidden_states=True).hidden_states[1]
        source, target = teacher.base_model.encoder.layer[1], student.base_model.encoder.layer[0]
        ours = target.output.dense(target.intermediate(h @ projection.T))
        assert relative_error(ours, source.output.dense(source.intermediate(h)) @ projection.T) < 5e-3


def explained(student, teacher, ids: torch.Tensor) -> float:
    """R^2 of the teacher's last hidden states from the student's, by least squares, on half of the sequences."""
    with torch.no_grad():
        source, target = (model.base_model(input_ids=ids).last_hidden_state for model in (student, teacher))
    half = len(ids) // 2
    source = torch.cat([source, torch.ones(*source.shape[:2], 1)], dim=-1)
    solution = torch.linalg.lstsq(source[:half].flatten(0, 1), target[:half].flatten(0, 1)).solution
    rest, expected = source[half:].flatten(0, 1) @ solution, target[half:].flatten(0, 1)
    return 1 - ((rest - expected).square().sum() / (expected - expected.mean(dim=0)).square().sum()).item()


def test_projected_students_predict_their_teacher_far_better_than_random_ones(sample):
    teacher = low_rank_teacher(head_rank=3)
    ids = torch.from_numpy(sequences(128, 7).astype(np.int64))
    sizes = Encoder(layers=4, width=12, heads=4, intermediate=48)
    scores = {
        name: explained(create_student(teacher, sizes, name, sample, seed=1).eval(), teacher, ids)
        for name in INITIALISATIONS
    }
    # What is lost even here, where everything else fits, is the layer norm: over 12 channels instead of 24.
    assert scores["teacher-layers"] > 0.7, scores
    assert scores["teacher-layers"] > scores["random"] + 0.4, scores
    assert scores["teacher-layers"] > scores["teacher-embeddings"] + 0.3, scores


@pytest.mark.parametrize("family", FAMILIES)
def test_special_rows_of_the_embeddings_follow_the_teacher(family, sample):
    """The padding row too: from_pretrained or a copy must not have zeroed it on one side only."""
    teacher = masked_language_model(family)
    student = create_student(teacher, EQUAL, "teacher-layers", sample)
    rows = slice(0, len(SPECIAL))
    assert np.array_equal(word_embeddings(student)[rows], word_embeddings(teacher)[rows])


@pytest.mark.parametrize("family", FAMILIES)
def test_a_saved_student_loads_by_from_pretrained_and_holds_nothing_else(family, sample, tmp_path):
    teacher = masked_language_model(family)
    student = create_student(teacher, NARROW, "teacher-layers", sample).eval()
    student.save_pretrained(tmp_path)
    with torch.no_grad():
        expected = student(input_ids=sample)
        loaded = AutoModelForMaskedLM.from_pretrained(tmp_path, attn_implementation="eager")
        assert torch.equal(loaded(input_ids=sample).logits, expected.logits)
        encoder = AutoModel.from_pretrained(tmp_path, add_pooling_layer=False, attn_implementation="eager")
        assert torch.equal(encoder(input_ids=sample)[0], student.base_model(input_ids=sample)[0])
        assert torch.equal(load_model(tmp_path, "eager", head=False)(input_ids=sample)[0], encoder(input_ids=sample)[0])
    sizes = sum(parameter.numel() for parameter in student.parameters())
    from safetensors.torch import load_file

    assert sum(tensor.numel() for tensor in load_file(tmp_path / "model.safetensors").values()) == sizes
