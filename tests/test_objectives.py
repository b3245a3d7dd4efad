"""Objectives: what they hold, train, freeze and read, and where projections start."""

from __future__ import annotations

from typing import get_args

import numpy as np
import pytest
import tiny
import torch
from tiny_training import METHODS, RIVALS, above_the_projections, descend, distilled, objective_of, stream
from transformers import default_data_collator

from study.distillation.objectives import OBJECTIVES, Objective
from study.distillation.objectives.attention import leading_directions
from study.distillation.taps import read_activations
from study.distillation.trainer import freeze_untrained, switch_off_dropout
from study.families import family_of, part
from study.files import StudyError
from study.methods import Trained


@pytest.fixture
def words(tmp_path):
    return tiny.tokenizer(tmp_path / "words")


def test_every_trained_method_has_its_objective():
    tags = [get_args(method.model_fields["objective"].annotation) for method in Trained.__subclasses__()]
    assert sorted(tags) == sorted((name,) for name in OBJECTIVES)


@pytest.mark.parametrize("method", METHODS + RIVALS)
def test_the_state_of_an_objective_holds_no_teacher_and_no_tied_duplicate(tmp_path, method):
    params = tiny.parameters(tmp_path)
    objective = objective_of(params, method)
    state = objective.state_dict()
    assert not any("teacher" in name for name in state)
    assert all(name.startswith(("student.", "projections.")) for name in state)
    storages = [tensor.data_ptr() for tensor in state.values()]
    assert len(storages) == len(set(storages))
    assert {name for name, _ in objective.named_parameters()} <= set(state)
    if objective.teacher is not None:
        teachers = {parameter.data_ptr() for parameter in objective.teacher.parameters()}
        assert not teachers & set(storages) and not teachers & {p.data_ptr() for p in objective.parameters()}


@pytest.mark.parametrize("method", METHODS + RIVALS)
def test_training_changes_the_student_and_not_the_teacher(tmp_path, words, method):
    params = tiny.parameters(tmp_path)
    teacher = tiny.masked_language_model().train()
    before = tiny.snapshot(teacher)
    objective = objective_of(params, method, teacher)
    start = tiny.snapshot(objective)
    descend(objective, stream(params, words), tmp_path / "run", accumulation=1)
    assert tiny.identical(before, tiny.snapshot(teacher))
    assert all(parameter.grad is None for parameter in teacher.parameters())
    assert not tiny.identical(start, tiny.snapshot(objective))
    if method != "mlm":
        assert not teacher.training and not any(p.requires_grad for p in teacher.parameters())
        assert not any(module.training for module in teacher.modules())


@pytest.mark.parametrize("method", METHODS)
def test_frozen_is_what_the_loss_does_not_reach(tmp_path, words, method):
    params = tiny.parameters(tmp_path)
    objective = objective_of(params, method)
    training = stream(params, words)
    frozen = freeze_untrained(objective, default_data_collator([training[0]]))
    expected = above_the_projections(name for name, _ in objective.named_parameters()) if "mha" in method else set()
    assert set(frozen) == expected and (not expected or len(expected) == 10)
    assert {name for name, parameter in objective.named_parameters() if not parameter.requires_grad} == expected
    assert all(parameter.grad is None for parameter in objective.parameters())


@pytest.mark.parametrize("method", [method for method in METHODS if method.startswith("hs") or method == "mha-direct"])
@pytest.mark.parametrize("inputs", ["masked", "plain"])
def test_projections_start_at_least_squares(tmp_path, words, method, inputs):
    """Not above the variance of the target, which a constant reaches; on these very tokens not above any other map."""
    params = tiny.parameters(tmp_path, distillation={"inputs": inputs})
    training = stream(params, words)
    batch = default_data_collator([training[i] for i in range(24)])
    untouched = objective_of(params, method)(**batch)["loss"].item()
    objective = objective_of(params, method, start=training)
    with torch.no_grad():
        loss = objective(**batch)["loss"].item()
        pairs = list(objective.pairs(objective.read_student(batch), objective.read_teacher(batch)))
    variances = [(t - t.mean(dim=(0, 1))).square().mean().item() for _, _, t in pairs]
    without = sum(variances) if method == "mha-direct" else np.mean(variances)
    assert loss < 0.9 * without and loss < untouched
    best = []
    for _, student, teacher in pairs:
        source, target = (states.flatten(0, 1).double().numpy() for states in (student, teacher))
        source = np.pad(source, ((0, 0), (0, 1)), constant_values=1)
        # The states leave a layer norm: with the constant they are linearly dependent, but for rounding.
        best.append(np.square(source @ np.linalg.lstsq(source, target, rcond=1e-5)[0] - target).mean())
    assert loss == pytest.approx(sum(best) if method == "mha-direct" else np.mean(best), rel=1e-4)


def test_inputs_decide_what_hidden_states_and_attention_read_and_never_what_logits_read(tmp_path, words):
    training = stream(tiny.parameters(tmp_path), words)
    batch = default_data_collator([training[i] for i in range(8)])
    for method in METHODS:
        values = [
            objective_of(tiny.parameters(tmp_path, distillation={"inputs": inputs}), method)(**batch)["loss"].item()
            for inputs in ("masked", "plain")
        ]
        assert (values[0] == values[1]) == (method in ("mlm", "od")), method


@pytest.mark.parametrize("student", ["L2-H12", "L2-H24"])
def test_a_fitted_start_gives_minilm_its_closest_relations(tmp_path, words, student):
    """Queries, keys and values are the least-squares maps to the leading directions, head by head; far below no fit."""
    params = tiny.parameters(tmp_path)
    fitted = params.methods["mha-minilmv2"].model_copy(update={"fitted_start": True})
    training = stream(params, words)
    batch = default_data_collator([training[i] for i in range(24)])
    before = objective_of(params, "mha-minilmv2", student=student)(**batch)["loss"].item()
    params = params.model_copy(update={"methods": {"mha-minilmv2": fitted}})
    objective = objective_of(params, "mha-minilmv2", student=student, start=training)
    assert objective(**batch)["loss"].item() < 0.7 * before
    layer = objective.student.encoder.layer[1].attention.self
    with torch.no_grad():
        below = read_activations(objective.student, batch["masked_input_ids"], hidden_layers=[1]).hidden[1]
        teacher = objective.read_teacher(batch)
    source = np.pad(below.flatten(0, 1).double().numpy(), ((0, 0), (0, 1)), constant_values=1)
    for name in ("query", "key", "value"):
        states = teacher.attention[3][name].flatten(0, 1).double().numpy()
        for head in range(4):
            x = states[:, 6 * head : 6 * head + 6]
            kept = below.shape[-1] // 4
            u, values, _ = np.linalg.svd(x, full_matrices=False)
            best = (u[:, :kept] * values[:kept]) @ (u[:, :kept] * values[:kept]).T / np.sqrt(6)
            target = leading_directions(teacher.attention[3][name], 4, below.shape[-1]).flatten(0, 1).numpy()
            target = target[:, kept * head : kept * (head + 1)]
            assert np.allclose(target @ target.T / np.sqrt(kept), best, atol=1e-5)
            expected = source @ np.linalg.lstsq(source, target, rcond=1e-5)[0]
            own = getattr(layer, name)(below).flatten(0, 1).detach().numpy()[:, kept * head : kept * (head + 1)]
            assert np.allclose(own, expected, atol=1e-3)


def test_projections_keep_their_random_start_where_asked_to(tmp_path, words):
    params = tiny.parameters(tmp_path)
    unfitted = {"hs-last": params.methods["hs-last"].model_copy(update={"fitted_start": False})}
    params = params.model_copy(update={"methods": unfitted})
    training = stream(params, words)
    without, with_start = (objective_of(params, "hs-last", start=start) for start in (None, training))
    for name, parameter in without.projections.named_parameters():
        assert torch.equal(parameter, with_start.projections.get_parameter(name))


@pytest.mark.parametrize("positions", ["masked", "sampled", "all"])
def test_output_distribution_and_its_mlm_term_by_whole_forward_passes(tmp_path, words, positions):
    params = tiny.parameters(tmp_path)
    method = params.methods["od"].model_copy(update={"positions": positions, "temperature": 2.0, "mlm_weight": 0.5})
    params = params.model_copy(update={"methods": {"od": method}})
    training = stream(params, words, sampled=positions == "sampled")
    batch = default_data_collator([training[i] for i in range(8)])
    objective = objective_of(params, "od").eval()
    with torch.no_grad():
        loss = objective(**batch)["loss"]
        student, teacher = (
            model(input_ids=batch["masked_input_ids"]).logits for model in (objective.student, objective.teacher)
        )
        rows = torch.arange(8)[:, None]
        at_masked = student[rows, batch["positions"]]
        mlm = torch.nn.functional.cross_entropy(at_masked.flatten(0, 1), batch["labels"].flatten())
        if positions == "masked":
            student, teacher = at_masked, teacher[rows, batch["positions"]]
        elif positions == "sampled":
            student, teacher = student[rows, batch["sampled"]], teacher[rows, batch["sampled"]]
        p, q = torch.softmax(teacher / 2, dim=-1), torch.log_softmax(student / 2, dim=-1)
        kl = 4 * (p * (p.log() - q)).sum(dim=-1).mean()
    assert loss.item() == pytest.approx((kl + 0.5 * mlm).item(), rel=1e-4)


@pytest.mark.parametrize("from_top", [0, 1, 2])
def test_attention_methods_read_the_teacher_layer_they_are_told(tmp_path, words, from_top):
    params = tiny.parameters(tmp_path)
    training = stream(params, words)
    batch = default_data_collator([training[i] for i in range(4)])
    for name in ("mha-minilmv2", "mha-direct"):
        method = params.methods[name].model_copy(update={"teacher_layer_from_top": from_top})
        objective = objective_of(params.model_copy(update={"methods": {name: method}}), name)
        inputs = objective.teacher(input_ids=batch["masked_input_ids"], output_hidden_states=True).hidden_states
        layer = 4 - from_top
        expected = objective.teacher.base_model.encoder.layer[layer - 1].attention.self.value(inputs[layer - 1])
        teacher = {n: t for n, _, t in objective.pairs(objective.read_student(batch), objective.read_teacher(batch))}
        torch.testing.assert_close(teacher["value"], expected)


# Gradient checkpointing


def step_of(objective, batch):
    """Loss, gradients, values kept for the backward pass, and how often each layer's last map was computed."""
    kept, calls = [], []
    layers = part(objective.student.base_model, family_of(objective.student).layers)
    name = family_of(objective.student).block.output
    hooks = [part(layer, name).register_forward_hook(lambda *_, i=i: calls.append(i)) for i, layer in enumerate(layers)]
    objective.train()
    with torch.autograd.graph.saved_tensors_hooks(lambda x: kept.append(x.numel()) or x, lambda x: x):
        read = objective.read_student(batch)
        with torch.no_grad():
            teacher = objective.read_teacher(batch)
        before = {key: id(states) for key, states in flat(read).items()}
        loss = objective.loss(read, teacher, batch)
    loss.backward()
    assert {key: id(states) for key, states in flat(read).items()} == before  # not recorded a second time
    for hook in hooks:
        hook.remove()
    gradients = {name: x.grad for name, x in objective.named_parameters() if x.grad is not None}
    return loss.item(), gradients, sum(kept), calls


def flat(read):
    projected = {(layer, name): x for layer, parts in read.attention.items() for name, x in parts.items()}
    return read.hidden | projected


@pytest.mark.parametrize("method", METHODS + RIVALS)
def test_layers_computed_twice_give_the_same_gradients_and_keep_less(tmp_path, words, method):
    """Every bit. A reading that ends inside the last layer leaves that one as it is."""
    params = tiny.parameters(tmp_path)
    training = stream(params, words, sampled=True)
    batch = default_data_collator([training[i] for i in range(8)])
    plain, recomputed = (objective_of(params, method, start=training) for _ in range(2))
    recomputed.recompute_layers()
    (loss, gradients, kept, once), (again, others, fewer, twice) = (step_of(o, batch) for o in (plain, recomputed))
    assert loss == again and gradients.keys() == others.keys()
    assert all(torch.equal(gradients[name], others[name]) for name in gradients)
    assert fewer < 0.7 * kept
    assert once == ([0, 1] if "hidden_layers" in plain.student_layers() else [0])
    assert sorted(twice) == sorted(2 * once)


@pytest.mark.parametrize("family", [*tiny.FAMILIES, *tiny.OTHERS])
def test_families_of_students_whose_layers_can_be_computed_twice(tmp_path, words, family):
    params = tiny.parameters(tmp_path, initialisation="random")
    training = stream(params, words)
    batch = default_data_collator([training[i] for i in range(8)])
    for method in ("hs-uniform+last", "mha-direct"):
        objective = OBJECTIVES[params.methods[method].objective](
            switched_off(tiny.masked_language_model(family, seed=1, layers=2)),
            tiny.masked_language_model(family),
            params.methods[method],
        )
        _, gradients, kept, _ = step_of(objective, batch)
        objective.zero_grad()
        if family == "mpnet":
            with pytest.raises(StudyError, match="^STUDY_GRADIENT_CHECKPOINTING = 1: .* for mpnet; allowed: 0$"):
                objective.recompute_layers()
            continue
        objective.recompute_layers()
        _, others, fewer, _ = step_of(objective, batch)
        assert all(torch.equal(gradients[name], others[name]) for name in gradients | others) and fewer < kept


def switched_off(model):
    switch_off_dropout(model)
    return model


def test_a_run_computes_layers_twice_where_it_is_asked_to(tmp_path, monkeypatch):
    tiny.workspace(tmp_path)
    plain = distilled(tmp_path, "plain", "hs-uniform+last")["training"]
    monkeypatch.setenv("STUDY_GRADIENT_CHECKPOINTING", "1")
    asked = []
    original = Objective.recompute_layers
    monkeypatch.setattr(Objective, "recompute_layers", lambda self: (asked.append(self), original(self)))
    recomputed = distilled(tmp_path, "recomputed", "hs-uniform+last")["training"]
    assert len(asked) == 1 and tiny.identical(tiny.weights(tmp_path / "plain"), tiny.weights(tmp_path / "recomputed"))
    assert [point["loss"] for point in plain["curve"]] == [point["loss"] for point in recomputed["curve"]]
    assert (tmp_path / "plain" / "config.json").read_text() == (tmp_path / "recomputed" / "config.json").read_text()
    monkeypatch.setenv("STUDY_GRADIENT_CHECKPOINTING", "on")
    with pytest.raises(StudyError, match="^STUDY_GRADIENT_CHECKPOINTING = on; allowed: 1, 0 or nothing$"):
        distilled(tmp_path, "other", "hs-uniform+last")
