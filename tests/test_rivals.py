"""Losses of embedding transfer against slow loops and numbers worked by hand, and what is read for them."""

from __future__ import annotations

import math

import pytest
import tiny
import torch
from tiny_training import distilled, objective_of, stream
from transformers import default_data_collator

from study.distillation import trainer
from study.distillation.losses import sentence_embedding
from study.distillation.objectives import base
from study.distillation.taps import read_activations


@pytest.fixture
def folder(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    return tiny.workspace(tmp_path)


def states(*shape: int, seed: int) -> torch.Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def batch_of(params, folder):
    own = stream(params, tiny.tokenizer(folder / "words"))
    return default_data_collator([own[i] for i in range(24)])


# Embedding transfer


def cosine_loop(x, y) -> float:
    x, y = x.tolist(), y.tolist()
    norms = [math.sqrt(sum(a * a for a in v)) for v in (x, y)]
    return sum(a * b for a, b in zip(x, y, strict=True)) / (norms[0] * norms[1])


def embedding_loop(student, teacher, distance) -> float:
    count = len(student)
    if distance == "mse":
        errors = [(float(a) - float(b)) ** 2 for a, b in zip(student.flatten(), teacher.flatten(), strict=True)]
        return sum(errors) / len(errors)
    if distance == "cosine":
        return sum(1 - cosine_loop(student[b], teacher[b]) for b in range(count)) / count
    pairs = [(b, c) for b in range(count) for c in range(count) if b != c]
    return sum(
        (cosine_loop(student[b], student[c]) - cosine_loop(teacher[b], teacher[c])) ** 2 for b, c in pairs
    ) / len(pairs)


@pytest.mark.fast
@pytest.mark.parametrize("distance", ["mse", "cosine", "relational"])
def test_sentence_embedding_is_the_formula(distance):
    student, teacher = states(5, 7, seed=1), states(5, 7, seed=2)
    expected = embedding_loop(student, teacher, distance)
    assert sentence_embedding(student, teacher, distance).item() == pytest.approx(expected, rel=1e-5)
    if distance == "relational":  # no map: widths may differ
        wide = states(5, 9, seed=3)
        expected = embedding_loop(student, wide, distance)
        assert sentence_embedding(student, wide, distance).item() == pytest.approx(expected, rel=1e-5)


@pytest.mark.fast
def test_sentence_embedding_by_hand():
    student, teacher = torch.tensor([[1.0, 0.0], [0.0, 2.0]]), torch.tensor([[0.0, 1.0], [0.0, 1.0]])
    # Squared errors 1, 1 and 0, 1, over four entries. Cosines 0 and 1: mean distance 1/2.
    assert sentence_embedding(student, teacher).item() == pytest.approx(0.75)
    assert sentence_embedding(student, teacher, "cosine").item() == pytest.approx(0.5)
    # The student's two are orthogonal, the teacher's are the same: (0 - 1)^2 for either order.
    assert sentence_embedding(student, teacher, "relational").item() == pytest.approx(1.0)
    alone = student[:1].clone().requires_grad_()
    loss = sentence_embedding(alone, teacher[:1], "relational")
    loss.backward()
    assert loss.item() == 0 and alone.grad is not None


@pytest.mark.fast
def test_sentence_embedding_names_mistakes():
    for own, target, distance, named in (
        (states(3, 4, seed=1), states(3, 5, seed=2), "mse", "student .3, 4., teacher .3, 5."),
        (states(3, 4, seed=1), states(2, 4, seed=2), "relational", "teacher .2, 4."),
        (states(3, 4, seed=1), states(3, 4, seed=2), "dot", "'dot' is unknown; allowed: mse, cosine, relational"),
    ):
        with pytest.raises(ValueError, match=named):
            sentence_embedding(own, target, distance)


@pytest.mark.parametrize(("student", "maps"), [("L2-H12", ["sentence"]), ("L2-H24", [])])
def test_the_embedding_is_the_mean_of_the_last_states_through_one_map_where_widths_differ(tmp_path, student, maps):
    params = tiny.parameters(tmp_path)
    batch, teacher = batch_of(params, tmp_path), tiny.masked_language_model()
    objective = objective_of(params, "se-mse", teacher, student)
    assert list(objective.projections) == maps
    assert not any("cls" in name for name, _ in objective.named_parameters())  # no vocabulary
    ids = batch["masked_input_ids"]
    own, target = (m.base_model(ids).last_hidden_state.detach() for m in (objective.student, teacher))
    pooled = torch.stack([sum(row[t] for t in range(row.shape[0])) / row.shape[0] for row in own])
    if maps:
        layer = objective.projections["sentence"]
        pooled = pooled @ layer.weight.T + layer.bias
    expected = embedding_loop(pooled.detach(), target.mean(dim=1), "mse")
    assert objective(**batch)["loss"].item() == pytest.approx(expected, rel=1e-4)


def test_the_map_starts_at_the_least_squares_fit_of_single_tokens(tmp_path):
    params = tiny.parameters(tmp_path)
    batch = batch_of(params, tmp_path)
    fitted, drawn = objective_of(params, "se-mse"), objective_of(params, "se-mse")
    fitted.start(batch)
    own, target = (
        read_activations(m, batch["masked_input_ids"], hidden_layers=[d]).hidden[d].detach().flatten(0, 1)
        for m, d in ((fitted.student, 2), (fitted.teacher, 4))
    )
    layer = fitted.projections["sentence"]
    residual = target - layer(own).detach()
    assert (own.T @ residual).abs().max() < 1e-2 and residual.sum(dim=0).abs().max() < 1e-2
    assert fitted(**batch)["loss"] < drawn(**batch)["loss"]


def test_similarities_need_two_sequences_a_batch(tmp_path):
    alone = {"batch_size": 8, "accumulation_steps": 8}
    with pytest.raises(ValueError, match="leaves methods.se-relational one sequence.*at least 2 a batch"):
        tiny.parameters(
            tmp_path,
            grid={"methods": ["se-relational"]},
            distillation=tiny.parameters(tmp_path).distillation.model_dump() | alone,
        )


# Runs


RIVALS = ["se-mse", "se-relational"]


@pytest.mark.parametrize("method", RIVALS)
def test_stored_teacher_outputs_give_the_same_student_and_no_teacher_passes(folder, monkeypatch, method):
    budget = {"distillation": {"mask_sets": 2}}
    distilled(folder, "alone", method, fast_paths=["fused-losses"], **budget)
    shared = ["fused-losses", "shared-teacher"]
    distilled(folder, "first", method, fast_paths=shared, **budget)
    passes, original = [], base.read_activations

    def read(model, *arguments, **layers):
        if model.config.num_hidden_layers == tiny.TEACHER["layers"]:
            passes.append(layers)
        return original(model, *arguments, **layers)

    monkeypatch.setattr(base, "read_activations", read)
    distilled(folder, "second", method, fast_paths=shared, **budget)
    assert len(passes) <= 2  # the start and the search for what is trained, never in training
    alone, first, second = (tiny.weights(folder / name) for name in ("alone", "first", "second"))
    assert tiny.identical(alone, first) and tiny.identical(first, second)


@pytest.mark.parametrize("method", RIVALS)
def test_an_interrupted_run_ends_with_the_same_weights_bit_for_bit(folder, monkeypatch, method):
    distilled(folder, "whole", method)
    original = trainer.Progress.on_log

    def on_log(self, args, state, control, logs=None, **kwargs):
        original(self, args, state, control, logs, **kwargs)
        if any(folder.glob("scratch/checkpoints/*/checkpoint-4/trainer_state.json")):
            raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(trainer.Progress, "on_log", on_log)
        with pytest.raises(KeyboardInterrupt):
            distilled(folder, "student", method, distillation={"evaluate_every": 2})
    resumed = distilled(folder, "student", method, distillation={"evaluate_every": 2})
    assert resumed["training"]["steps"] == 6
    assert tiny.identical(tiny.weights(folder / "whole"), tiny.weights(folder / "student"))
