"""Pruning: importance against slow loops, pruned students against their teacher with units set to zero."""

from __future__ import annotations

import pytest
import tiny
import torch
from tiny_training import distilled, stream
from torch.nn import functional as F
from transformers import AutoModelForMaskedLM

from study import StudyError
from study.distillation.distil import distil
from study.distillation.pruning import Importance, kept_layers, unit_importance
from study.distillation.students import create_student, prunes_within_layers
from study.families import family_of, part
from study.methods import PRUNING
from study.sections import Encoder

#: Families whose layers are pruned, with other names of their parts each.
PRUNED = ("bert", "roberta", "distilbert", "electra")
SIZES = Encoder(layers=2, width=24, heads=2, intermediate=20)


@pytest.fixture
def ids():
    return torch.from_numpy(tiny.sequences(6, 5).astype("int64"))


def drawn(layers=4, heads=4, neurons=48) -> Importance:
    generator = torch.Generator().manual_seed(3)
    return Importance(*(torch.rand(layers, units, generator=generator) for units in (heads, neurons)))


def masked_teacher(teacher, layers: list[int], importance: Importance, sizes: Encoder):
    """Hooks that set the least important heads and neurons of some layers to zero, other layers left out."""
    family, count = family_of(teacher), 4
    own = part(teacher.base_model, family.layers)
    for j in layers:
        heads = importance.heads[j - 1].sort(descending=True).indices[sizes.heads :]
        neurons = importance.neurons[j - 1].sort(descending=True).indices[sizes.intermediate :]

        def hide_heads(module, inputs, heads=heads):
            context = inputs[0].clone()
            for head in heads.tolist():
                context[..., head * 24 // count : (head + 1) * 24 // count] = 0
            return (context,)

        def hide_neurons(module, inputs, neurons=neurons):
            activations = inputs[0].clone()
            activations[..., neurons] = 0
            return (activations,)

        part(own[j - 1], family.block.attention_output).register_forward_pre_hook(hide_heads)
        part(own[j - 1], family.block.output).register_forward_pre_hook(hide_neurons)
    kept = [own[j - 1] for j in layers]
    del own[:]
    own.extend(kept)
    setattr(teacher.config, family.sizes[0], len(layers))
    return teacher.eval()


# Students


@torch.no_grad()
@pytest.mark.parametrize(
    ("initialisation", "layers"), [("pruned-uniform", [2, 4]), ("pruned-top", [3, 4]), ("pruned-bottom", [1, 2])]
)
@pytest.mark.parametrize("family", PRUNED)
@pytest.mark.parametrize("heads", [1, 2, 4])
def test_a_pruned_student_is_its_teacher_with_units_set_to_zero(family, initialisation, layers, heads, ids):
    sizes, importance = SIZES.model_copy(update={"heads": heads}), drawn()
    teacher = tiny.masked_language_model(family)
    student = create_student(teacher, sizes, initialisation, seed=1, importance=importance).eval()
    whole = teacher(ids).logits
    expected = masked_teacher(teacher, layers, importance, sizes)(ids).logits
    torch.testing.assert_close(student(ids).logits, expected, atol=1e-4, rtol=1e-4)
    assert (whole - expected).abs().max() > 0.05  # something was taken out


@torch.no_grad()
def test_nothing_pruned_is_the_teacher_and_needs_no_importance(ids):
    teacher = tiny.masked_language_model()
    all_of_it = Encoder(layers=4, width=24, heads=4, intermediate=48)
    student = create_student(teacher, all_of_it, "pruned-top").eval()
    assert torch.equal(student(ids).logits, teacher(ids).logits)
    assert not prunes_within_layers(teacher, all_of_it, "pruned-top")
    assert prunes_within_layers(teacher, SIZES, "pruned-top")
    assert not prunes_within_layers(teacher, SIZES, "teacher-layers")
    assert kept_layers("pruned-bottom", 6, 3) == {1: 1, 2: 2, 3: 3}


def test_what_wider_heads_add_changes_nothing_and_can_be_trained(ids, tmp_path):
    teacher = tiny.masked_language_model()
    student = create_student(teacher, SIZES, "pruned-uniform", seed=1, importance=drawn()).eval()
    student(ids).logits.logsumexp(dim=-1).mean().backward()
    attention = student.base_model.encoder.layer[0].attention
    added = {
        "query": attention.self.query.weight.grad.view(2, 12, 24)[:, 6:],
        "output": attention.output.dense.weight.grad.view(24, 2, 12)[:, :, 6:],
    }
    assert all(gradient.abs().max() > 0 for gradient in added.values())
    student.save_pretrained(tmp_path)
    loaded = AutoModelForMaskedLM.from_pretrained(tmp_path, attn_implementation="eager").eval()
    assert torch.equal(loaded(ids).logits, student(ids).logits)


# Importance


@pytest.mark.parametrize("family", PRUNED)
def test_importance_is_the_sum_of_weights_times_gradients(family, tmp_path):
    """One sequence at a time, from the gradients of the weights themselves."""
    params, model = tiny.parameters(tmp_path), tiny.masked_language_model(family)
    sequences = stream(params, tiny.tokenizer(tmp_path / "words"), length=11)
    fast, block = unit_importance(model.train(), sequences), family_of(model).block
    assert model.training and all(parameter.grad is None for parameter in model.parameters())
    assert not any(module._forward_pre_hooks for module in model.modules())
    model.eval()
    heads, neurons = torch.zeros(4, 4), torch.zeros(4, 48)
    for place in range(11):
        item = sequences[place]
        model.zero_grad()
        logits = model(torch.from_numpy(item["masked_input_ids"])[None]).logits[0]
        F.cross_entropy(logits[item["positions"]], torch.from_numpy(item["labels"])).backward()
        for row, layer in enumerate(part(model.base_model, family_of(model).layers)):
            out, second = part(layer, block.attention_output).weight, part(layer, block.output).weight
            for head in range(4):
                columns = slice(6 * head, 6 * head + 6)
                heads[row, head] += (out.grad[:, columns] * out[:, columns]).sum().abs().item()
            neurons[row] += (second.grad * second).sum(dim=0).abs().detach()
    torch.testing.assert_close(fast.heads, heads, rtol=1e-3, atol=1e-5)
    torch.testing.assert_close(fast.neurons, neurons, rtol=1e-3, atol=1e-5)


def test_a_neuron_without_effect_is_worth_nothing_and_pruned_first(tmp_path, ids):
    params, model = tiny.parameters(tmp_path), tiny.masked_language_model()
    with torch.no_grad():
        for layer in model.base_model.encoder.layer:
            layer.output.dense.weight[:, ::2] = 0
            layer.attention.output.dense.weight[:, :12] = 0
    importance = unit_importance(model, stream(params, tiny.tokenizer(tmp_path / "words"), length=8))
    assert not importance.neurons[:, ::2].any() and not importance.heads[:, :2].any()
    half = Encoder(layers=4, width=24, heads=2, intermediate=24)
    student = create_student(model, half, "pruned-uniform", importance=importance).eval()
    with torch.no_grad():
        torch.testing.assert_close(student(ids).logits, model(ids).logits, atol=1e-4, rtol=1e-4)


# Runs


def test_whole_runs_with_and_without_distillation(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    tiny.workspace(tmp_path)
    students = {"half": {"layers": 2, "width": 24, "heads": 2, "intermediate": 24}}
    trained = {"objective": "masked_language_modelling", "learning_rate": 1e-3}
    methods = {"pruned": {"objective": "none"}, "pruned-mlm": trained}
    methods = {name: own | {"initialisation": "pruned-uniform"} for name, own in methods.items()}
    changes = {"students": students, "methods": methods}
    run, layout = tiny.run(tmp_path, "pruned", "half", **changes)
    assert run.revisions["pruning"] == 1 and "pruning" not in tiny.run(tmp_path, "mlm")[0].revisions
    assert distil(run, layout, tmp_path / "pruned")["training"] is None
    record = distilled(tmp_path, "trained", "pruned-mlm", "half", **changes)["training"]
    assert record["initialisation"] == "pruned-uniform"
    assert record["curve"][-1]["loss"] < record["curve"][0]["loss"]
    start, after = (tiny.weights(tmp_path / name) for name in ("pruned", "trained"))
    assert start["bert.encoder.layer.0.intermediate.dense.weight"].shape == (24, 24)
    assert start.keys() == after.keys() and not tiny.identical(start, after)


@pytest.mark.parametrize(
    ("student", "message"),
    [
        ({"heads": 6}, r"students.own.heads = 6: initialisation 'pruned-top' needs at most 4 heads"),
        ({"intermediate": 96}, r"students.own.intermediate = 96 exceeds"),
        ({"layers": 5}, r"students.own.layers = 5 exceeds"),
        ({"width": 12}, r"students.own.width = 12: initialisation 'pruned-top' keeps the width; allowed: 24"),
        ({"family": "roberta"}, r"students.own.family = roberta: initialisation 'pruned-top' needs the teacher's"),
    ],
)
def test_what_cannot_be_pruned(tmp_path, student, message):
    sizes = {"layers": 2, "width": 24, "heads": 2, "intermediate": 24}
    grid = {"methods": ["none"], "students": {"english": ["own"]}}
    with pytest.raises(ValueError, match=message):
        tiny.parameters(tmp_path, students={"own": sizes | student}, grid=grid, initialisation="pruned-top")


def test_admission_has_no_pruned_floor(tmp_path):
    settings = tiny.parameters(tmp_path).settings["english"].model_dump(exclude_none=True)
    settings["candidates"] = ["sentiment"]
    with pytest.raises(ValueError, match=r"settings.english.candidates = .*allowed: \[\] under initialisation"):
        tiny.parameters(tmp_path, settings={"english": settings}, initialisation="pruned-top")


def test_layers_that_rotate_by_their_place_are_not_pruned():
    teacher = tiny.masked_language_model("modernbert")
    for name in PRUNING:
        with pytest.raises(StudyError, match=f"initialisation = {name}: layers of modernbert cannot be taken"):
            create_student(teacher, SIZES, name, importance=drawn())
