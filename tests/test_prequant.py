"""PreQuant: quantisers and outlier rule against slow loops and hand-computed values; what is frozen stays so."""

from __future__ import annotations

import copy
import importlib.util
import math

import pytest
import tiny
import torch
from test_finetune import CLASSES
from test_neighbours import OPTIONS, planned
from torch import nn

from study import StudyError
from study.data import tasks
from study.files import Layout
from study.neighbours import prequant
from study.neighbours.prequant import PREQUANT, STEPS, bits_per_weight, positions, quantise, quantise_in_place, tune
from study.neighbours.system import run_system
from study.neighbours_options import PreQuant

RATES = {"outliers": 0.01, "biases": 0.01, "lora": 0.01, "full": 0.005}


@pytest.fixture
def encoder():
    return tiny.masked_language_model().bert


@pytest.mark.fast
def test_quantisers_by_hand():
    weight = torch.tensor([[0.9, -0.2, 0.1], [-3.0, 1.4, 0.4]])
    # 3 bits: values -4 .. 3, a step of 3 / 3 = 1
    assert quantise(weight, 3, "minmax").tolist() == [[1.0, 0.0, 0.0], [-3.0, 1.0, 0.0]]
    # 2 bits: values -2 .. 1 and a step of 3: all but -3 is nearer to 0
    assert quantise(weight, 2, "minmax").tolist() == [[0.0, 0.0, 0.0], [-3.0, 0.0, 0.0]]
    assert not quantise(torch.zeros(2, 3), 4, "row").any()
    rows = torch.tensor([[7.0, -2.0], [0.07, 0.04]])  # each with a step of its own
    assert quantise(rows, 4, "row").ravel().tolist() == pytest.approx([7.0, -2.0, 0.07, 0.04])
    assert quantise(rows, 4, "minmax").ravel().tolist() == [7.0, -2.0, 0.0, 0.0]


def slow_quantise(values: list[float], bits: int, steps) -> list[float]:
    """One step for all values: that with the least squared error, the first of equal ones."""
    top, best = 2 ** (bits - 1) - 1, (math.inf, values)
    for share in steps:
        step = share * max(map(abs, values)) / top
        tried = [step * min(max(round(v / step), -top - 1), top) for v in values]
        best = min(best, (sum((a - b) ** 2 for a, b in zip(tried, values, strict=True)), tried), key=lambda own: own[0])
    return best[1]


@pytest.mark.fast
@pytest.mark.parametrize("bits", [2, 3, 4, 8])
def test_quantisers_are_those_of_a_slow_loop(bits):
    weight = torch.randn(5, 7, generator=torch.Generator().manual_seed(bits), dtype=torch.float64)
    flat = weight.flatten().tolist()
    for scaling, expected in {
        "minmax": slow_quantise(flat, bits, [1.0]),
        "mse": slow_quantise(flat, bits, STEPS),
        "row": [value for row in weight.tolist() for value in slow_quantise(row, bits, STEPS)],
    }.items():
        found = quantise(weight, bits, scaling)
        assert found.flatten().tolist() == pytest.approx(expected, abs=1e-12), scaling
        assert len(found[0].unique()) <= 2**bits
    errors = [(quantise(weight, bits, s) - weight).square().sum().item() for s in ("row", "mse", "minmax")]
    assert errors == sorted(errors)


@pytest.mark.fast
def test_the_weights_that_are_tuned_are_those_of_a_slow_loop(encoder):
    smaller = quantise_in_place(copy.deepcopy(encoder), 3, "row")
    linear = {name: module for name, module in encoder.named_modules() if isinstance(module, nn.Linear)}
    for rule in ("outliers", "error"):
        scored = []
        for name, module in linear.items():
            values = module.weight.flatten().double().tolist()
            after = smaller.get_submodule(name).weight.flatten().double().tolist()
            mean = sum(values) / len(values)
            spread = math.sqrt(sum((v - mean) ** 2 for v in values) / len(values))
            far = [abs(v - mean if rule == "outliers" else v - q) / spread for v, q in zip(values, after, strict=True)]
            scored += [(score, name, place) for place, score in enumerate(far)]
        count = round(0.01 * len(scored))
        expected = {(name, place) for _, name, place in sorted(scored, reverse=True)[:count]}
        chosen = positions(encoder, smaller, rule, 0.01)
        assert {(name, int(place)) for name, own in chosen.items() for place in own} == expected
    drawn = [positions(encoder, smaller, "random", 0.01, seed) for seed in (1, 1, 2)]
    assert sum(map(len, drawn[0].values())) == count
    flat = [sorted((name, int(i)) for name, own in one.items() for i in own) for one in drawn]
    assert flat[0] == flat[1] != flat[2] and not {name for name, _ in flat[0]} - linear.keys()


def trained(model: nn.Module, steps: int = 3) -> None:
    """AdamW with a weight decay that would move whatever it is given."""
    optimiser = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=0.05, weight_decay=0.5)
    ids = torch.randint(5, 60, (4, 9), generator=torch.Generator().manual_seed(0))
    for _ in range(steps):
        optimiser.zero_grad()
        model(input_ids=ids).last_hidden_state.square().mean().backward()
        optimiser.step()


@pytest.mark.parametrize("rule", ["outliers", "biases", "lora"])
def test_what_is_frozen_stays_bit_for_bit_under_adamw_and_weight_decay(encoder, rule):
    if rule == "lora":
        pytest.importorskip("peft")
    smaller = quantise_in_place(copy.deepcopy(encoder), 4, "row")
    chosen = positions(encoder, smaller, "outliers", 0.02)
    before = {name: weight.detach().clone() for name, weight in smaller.state_dict().items()}
    size = sum(map(len, chosen.values()))
    tuned = tune(smaller, rule, chosen if rule == "outliers" else {}, size)
    trained(smaller)
    modules = dict(smaller.named_modules())
    moved = 0
    for name, old in before.items():
        owner, _, key = name.rpartition(".")
        module = modules[owner]
        new = getattr(module.base_layer if hasattr(module, "base_layer") else module, key).detach()
        if rule == "outliers" and key == "weight" and owner in chosen:
            mask = torch.zeros(old.numel(), dtype=torch.bool)
            mask[chosen[owner]] = True
            assert torch.equal(new.flatten()[~mask], old.flatten()[~mask])
            moved += int((new.flatten()[mask] != old.flatten()[mask]).sum())
        elif rule != "biases" or key != "bias":
            assert torch.equal(new, old), name
    if rule == "outliers":
        assert tuned == size and moved > 0.95 * size
    if rule == "lora":  # of rank 1 each linear map has as many as the sum of its sides
        sides = [4 * (24 + 24) + 2 * (24 + 48)] * 4
        assert tuned % sum(sides) == 0 and abs(tuned - size) <= sum(sides)
    if rule == "biases":
        assert tuned == sum(p.numel() for n, p in smaller.named_parameters() if n.endswith("bias"))


@pytest.mark.fast
def test_lora_without_peft_is_one_line_before_anything_is_run(monkeypatch):
    options = PreQuant.model_validate(OPTIONS | {"tuned": ["outliers", "lora"], "learning_rates": RATES})
    monkeypatch.setattr(prequant.importlib.util, "find_spec", lambda name: object())
    assert prequant.jobs(options)[-1] == "lora-row-4"
    monkeypatch.setattr(prequant.importlib.util, "find_spec", lambda name: None)
    with pytest.raises(StudyError, match="lora needs peft"):
        prequant.jobs(options)


@pytest.mark.fast
def test_bits_per_weight_by_hand():
    model = nn.Sequential(nn.Linear(8, 4), nn.Embedding(10, 8))  # 32 and 80 weights, 4 and 10 rows
    none = bits_per_weight(model, 4, "minmax", {})
    assert none == pytest.approx((4 * 112 + 32 * 2) / 112)
    assert bits_per_weight(model, 4, "row", {}) == pytest.approx((4 * 112 + 32 * 14) / 112)
    chosen = {"0": torch.tensor([1, 30, 31])}  # 32 places: 5 bits each
    assert bits_per_weight(model, 4, "minmax", chosen) - none == pytest.approx(3 * (32 + 5) / 112)
    assert bits_per_weight(model, 4, "minmax", {}, added=7) - none == pytest.approx(7 * 32 / 112)


def test_a_run_on_a_tiny_teacher(tmp_path, monkeypatch):
    """Outliers learn what a random head of one task needs; the file on disk holds every arm, and its checks."""
    lora = ["lora"] * (importlib.util.find_spec("peft") is not None)  # an extra
    monkeypatch.chdir(tiny.workspace(tmp_path))
    monkeypatch.setitem(tasks.TASKS, "topic", CLASSES)
    described = planned(
        tmp_path, seeds=[1], scalings=["row", "minmax"], finetuned=True,
        tuned=["outliers", "random", "biases", *lora],
        learning_rates=RATES,
    )  # fmt: skip
    before = tiny.weights(tmp_path / "runs" / "english" / "teacher")
    made = run_system(PREQUANT, described, Layout(tmp_path, "english"), tmp_path / "prequant.json")
    assert tiny.identical(before, tiny.weights(tmp_path / "runs" / "english" / "teacher"))
    own = {arm.name: {name: values[0] for name, values in arm.values.items()} for arm in made.arms}
    ended = ["outliers-row-4", "head-row-4", "outliers-row-2", "head-row-2", "outliers-minmax-4", "head-minmax-4"]
    ended += ["random-row-4", "biases-row-4", *(f"{name}-row-4" for name in lora), "full", "after-row-4", "after-row-2"]
    assert list(own) == ended and len({check.claim for check in made.checks}) == len(made.checks) == 4
    assert own["full"]["score"] > 0.8 and own["full"]["bits"] == 32
    assert own["outliers-row-4"]["tuned"] == own["random-row-4"]["tuned"] == round(0.01 * 4 * 4608)
    assert own["head-row-4"]["bits"] < own["outliers-row-4"]["bits"] < 32
    assert all(own["outliers-row-4"]["bits"] < own[f"{name}-row-4"]["bits"] < 32 for name in lora)
    assert own["outliers-row-2"]["bits"] < own["outliers-row-4"]["bits"]
    assert all(0 <= arm["score"] == arm["topic"] <= 1 for arm in own.values())
