"""Taps against the models' own outputs, and a count of what they leave uncomputed."""

from __future__ import annotations

import pytest
import torch
from tiny import FAMILIES, masked_language_model
from transformers import AutoModel

from study.distillation.taps import read_activations

pytestmark = pytest.mark.fast
ATTENTIONS = ("eager", "sdpa")


def batch(family: str, padding: str | None):
    ids = torch.randint(5, 60, (3, 10), generator=torch.Generator().manual_seed(0))
    if padding is None:
        return ids, None
    mask = torch.ones(3, 10, dtype=torch.long)
    mask[1, 7:], mask[2, 4:] = 0, 0
    if padding == "left":
        mask = mask.flip(1)
    return ids.masked_fill(mask == 0, 0 if family == "bert" else 1), mask


def layers_of(model):
    return model.base_model.encoder.layer


def hooks_left(model) -> int:
    return sum(len(module._forward_hooks) for module in model.modules())


def count_calls(modules: dict):
    """Forward hooks that count; returns (counts, remove)."""
    counts = dict.fromkeys(modules, 0)

    def counting(name):
        def hook(*_):
            counts[name] += 1

        return hook

    hooks = [module.register_forward_hook(counting(name)) for name, module in modules.items()]
    return counts, lambda: [hook.remove() for hook in hooks]


@pytest.mark.parametrize("padding", [None, "right", "left"])
@pytest.mark.parametrize("attention", ATTENTIONS)
@pytest.mark.parametrize("family", FAMILIES)
def test_hidden_states_are_the_models_own(family, attention, padding):
    model = masked_language_model(family, attention)
    ids, mask = batch(family, padding)
    with torch.no_grad():
        expected = model(input_ids=ids, attention_mask=mask, output_hidden_states=True).hidden_states
        activations = read_activations(model, ids, mask, hidden_layers=range(5))
    assert len(expected) == 5 and activations.attention == {}
    for layer in range(5):
        torch.testing.assert_close(activations.hidden[layer], expected[layer], rtol=0, atol=0)


@pytest.mark.parametrize("padding", [None, "right", "left"])
@pytest.mark.parametrize("attention", ATTENTIONS)
@pytest.mark.parametrize("family", FAMILIES)
def test_queries_keys_and_values_are_the_layers_projections_of_its_input(family, attention, padding):
    model = masked_language_model(family, attention)
    ids, mask = batch(family, padding)
    with torch.no_grad():
        inputs = model(input_ids=ids, attention_mask=mask, output_hidden_states=True).hidden_states
        activations = read_activations(model, ids, mask, attention_layers=[1, 3, 4])
        assert activations.hidden == {} and list(activations.attention) == [1, 3, 4]
        for layer, tensors in activations.attention.items():
            projections = layers_of(model)[layer - 1].attention.self
            assert set(tensors) == {"query", "key", "value"}
            for name, tensor in tensors.items():
                linear = getattr(projections, name)
                expected = inputs[layer - 1] @ linear.weight.T + linear.bias
                assert tensor.shape == (3, 10, 24)
                torch.testing.assert_close(tensor, expected, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("family", FAMILIES)
def test_padding_does_not_change_what_real_tokens_read(family):
    model = masked_language_model(family)
    ids, mask = batch(family, "right")
    with torch.no_grad():
        padded = read_activations(model, ids, mask, hidden_layers=[2], attention_layers=[4])
        alone = read_activations(model, ids[2:, :4], None, hidden_layers=[2], attention_layers=[4])
    torch.testing.assert_close(padded.hidden[2][2:, :4], alone.hidden[2], rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(padded.attention[4]["value"][2:, :4], alone.attention[4]["value"], rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("attention", ATTENTIONS)
@pytest.mark.parametrize("family", FAMILIES)
def test_nothing_behind_the_deepest_hidden_state_is_computed(family, attention):
    model = masked_language_model(family, attention)
    counts, remove = count_calls({i: layer.intermediate for i, layer in enumerate(layers_of(model), 1)})
    read_activations(model, batch(family, None)[0], hidden_layers=[0, 2])
    remove()
    assert counts == {1: 1, 2: 1, 3: 0, 4: 0}


@pytest.mark.parametrize("family", FAMILIES)
def test_for_the_embedding_output_no_layer_runs(family):
    model = masked_language_model(family)
    counts, remove = count_calls({1: layers_of(model)[0].attention.self.query})
    read_activations(model, batch(family, None)[0], hidden_layers=[0])
    remove()
    assert counts == {1: 0}


@pytest.mark.parametrize("attention", ATTENTIONS)
@pytest.mark.parametrize("family", FAMILIES)
def test_behind_the_projections_that_are_read_not_even_attention_is_computed(family, attention):
    model = masked_language_model(family, attention)
    layer = layers_of(model)[2]
    parts = {
        "layer below": layers_of(model)[1].output.dense,
        **{name: getattr(layer.attention.self, name) for name in ("query", "key", "value")},
        "attention": layer.attention.self,
        "attention output": layer.attention.output.dense,
        "feed-forward": layer.intermediate.dense,
        "layer above": layers_of(model)[3].attention.self.query,
    }
    head = model.cls if family == "bert" else model.lm_head
    counts, remove = count_calls(parts | {"head": head})
    softmax = torch.nn.functional.softmax
    read_activations(model, batch(family, None)[0], attention_layers=[3])
    remove()
    assert torch.nn.functional.softmax is softmax
    assert {name for name, count in counts.items() if count} == {"layer below", "query", "key", "value"}


@pytest.mark.parametrize("deepest", ["hidden", "attention"])
def test_both_kinds_at_once_stop_at_the_deeper(deepest):
    model = masked_language_model()
    asked = (
        {"hidden_layers": [3], "attention_layers": [3]}
        if deepest == "hidden"
        else {"hidden_layers": [2], "attention_layers": [3]}
    )
    counts, remove = count_calls({"rest": layers_of(model)[2].output.dense, "above": layers_of(model)[3]})
    activations = read_activations(model, batch("bert", None)[0], **asked)
    remove()
    assert counts == {"rest": int(deepest == "hidden"), "above": 0}
    assert len(activations.hidden) == 1 and len(activations.attention[3]) == 3


@pytest.mark.parametrize("attention", ATTENTIONS)
@pytest.mark.parametrize("family", FAMILIES)
def test_gradients_flow_below_the_reading_and_nowhere_above(family, attention):
    model = masked_language_model(family, attention)
    activations = read_activations(model, batch(family, None)[0], attention_layers=[3])
    sum(tensor.square().sum() for tensor in activations.attention[3].values()).backward()
    reached = {name for name, parameter in model.base_model.named_parameters() if parameter.grad is not None}
    own = {
        f"encoder.layer.2.attention.self.{x}.{kind}" for x in ("query", "key", "value") for kind in ("weight", "bias")
    }
    below = {
        name
        for name, _ in model.base_model.named_parameters()
        if name.startswith(("embeddings", *(f"encoder.layer.{i}." for i in (0, 1))))
    }
    assert reached == own | below


def test_no_gradient_is_kept_where_none_is_wanted():
    model = masked_language_model()
    with torch.no_grad():
        activations = read_activations(model, batch("bert", None)[0], hidden_layers=[4])
    assert not activations.hidden[4].requires_grad


def test_a_bare_encoder_reads_the_same(tmp_path):
    model = masked_language_model()
    model.save_pretrained(tmp_path)
    ids, _ = batch("bert", None)
    with torch.no_grad():
        bare = read_activations(
            AutoModel.from_pretrained(tmp_path, attn_implementation="eager").eval(), ids, hidden_layers=[4]
        ).hidden[4]
        assert torch.equal(bare, read_activations(model, ids, hidden_layers=[4]).hidden[4])


def test_hooks_are_gone_afterwards_even_after_an_error():
    model = masked_language_model()
    before = hooks_left(model)
    read_activations(model, batch("bert", None)[0], hidden_layers=[1], attention_layers=[2])
    assert hooks_left(model) == before
    with pytest.raises((IndexError, RuntimeError)):
        read_activations(model, torch.full((1, 4), 10_000), hidden_layers=[1])
    assert hooks_left(model) == before


def test_the_model_still_runs_whole_after_a_reading():
    model = masked_language_model()
    ids, _ = batch("bert", None)
    with torch.no_grad():
        before = model(input_ids=ids).logits
        read_activations(model, ids, attention_layers=[1])
        assert torch.equal(model(input_ids=ids).logits, before)


@pytest.mark.parametrize(
    ("asked", "named"),
    [
        ({}, "nothing to read"),
        ({"hidden_layers": [5]}, r"\[5\].*4 layers"),
        ({"hidden_layers": [-1]}, r"\[-1\].*4 layers"),
        ({"attention_layers": [0]}, r"\[0\].*4 layers"),
        ({"attention_layers": [5], "hidden_layers": [1]}, r"\[5\].*4 layers"),
    ],
)
def test_layers_that_do_not_exist(asked, named):
    with pytest.raises(ValueError, match=named):
        read_activations(masked_language_model(), batch("bert", None)[0], **asked)
