"""The benchmark's peers: what each package computes, against formulas written out; and what is said when it is absent.

Packages that are not installed are skipped; see ``study.speed.peers.INSTALL``.
"""

from __future__ import annotations

import math
from importlib import import_module, metadata

import pytest
import tiny
import torch
from test_environment import constraints
from torch import nn

from study import StudyError
from study.distillation import losses
from study.distillation.taps import PROJECTIONS, read_activations
from study.distillation.trainer import switch_off_dropout
from study.params import read_yaml
from study.speed import peers
from study.speed.peers import INSTALL, PEERS


@pytest.fixture
def teacher():
    return tiny.masked_language_model(seed=1, layers=4, width=96)


@pytest.fixture
def student():
    return tiny.masked_language_model(seed=2, layers=2, width=48)


@pytest.fixture
def batch():
    generator = torch.Generator().manual_seed(0)
    tokens = torch.randint(5, tiny.VOCABULARY, (3, 7), generator=generator)
    positions = torch.tensor([[1, 4]] * 3)
    masked = tokens.scatter(1, positions, 4)
    return {
        "input_ids": tokens,
        "masked_input_ids": masked,
        "positions": positions,
        "labels": tokens.gather(1, positions),
    }


@pytest.fixture(params=PEERS)
def peer(request):
    package, _, wanted = PEERS[request.param].requirement.partition("==")
    try:
        found = metadata.version(package)
    except metadata.PackageNotFoundError:
        found = None
    if found != wanted:
        pytest.skip(f"{package}=={wanted} is not installed")
    return PEERS[request.param]


def test_the_benchmark_runs_every_peer():
    assert read_yaml(tiny.FIXTURES / "params.yaml")["benchmark"]["peers"] == list(PEERS)
    assert all(name == peer.name for name, peer in PEERS.items())


def test_every_peer_can_be_installed():
    """What the study does not depend on, INSTALL names; what it does depend on, it pins to the peer's version."""
    pins = dict(constraints())
    for peer in PEERS.values():
        package, _, version = peer.requirement.partition("==")
        assert peer.requirement in INSTALL.split() or pins.get(package) == version, peer.name


@pytest.mark.parametrize("name", PEERS)
@pytest.mark.parametrize("found", ["none", "0.0.1"])
def test_a_package_that_is_missing_or_of_another_version_is_named(name, found, teacher, student, batch, monkeypatch):
    def version(package):
        if found == "none":
            raise metadata.PackageNotFoundError(package)
        return found

    monkeypatch.setattr(peers.metadata, "version", version)
    with pytest.raises(StudyError) as error:
        PEERS[name].step(teacher, student, batch)
    message, wanted = str(error.value), PEERS[name].requirement
    assert message.startswith(f"{name} needs {wanted}, found {found}; install it with: python -m pip install ")
    assert wanted in message.rpartition("install ")[2] and "\n" not in message


def test_a_package_that_cannot_be_imported_is_named(teacher, student, batch, monkeypatch):
    def fail(name):
        raise ImportError(f"No module named 'something' in {name}")

    monkeypatch.setattr(peers.metadata, "version", lambda package: "0.2.1.post1")
    monkeypatch.setattr(peers, "import_module", fail)
    with pytest.raises(StudyError, match=r"^textbrewer-hidden needs textbrewer==.*'something'.*pip install"):
        PEERS["textbrewer-hidden"].step(teacher, student, batch)


def test_steps_train_the_student_alone(peer, teacher, student, batch):
    step = peer.step(teacher, student, batch)
    before = tiny.snapshot(student), tiny.snapshot(teacher)
    given = {key: value.clone() for key, value in batch.items()}
    for _ in range(2):
        loss = step()
        assert loss.ndim == 0 and loss.isfinite() and not loss.requires_grad
    assert not tiny.identical(before[0], tiny.snapshot(student))
    assert tiny.identical(before[1], tiny.snapshot(teacher))
    assert all(parameter.grad is None for model in (teacher, student) for parameter in model.parameters())
    assert tiny.identical(given, batch)
    assert {parameter.dtype for parameter in student.parameters()} == {torch.float32}


def test_the_student_keeps_its_dropout_and_the_teacher_has_none(peer, teacher, student, batch):
    step = peer.step(teacher.train(), student.eval(), batch)
    modes = []
    for model in (teacher, student):
        layer = model.base_model.encoder.layer[0]
        layer.register_forward_hook(lambda module, *_: modes.append(module.training))
    step()
    assert sorted(modes) == [False, True] and not teacher.training and student.training


def test_the_loss_is_the_formula(peer, teacher, student, batch, monkeypatch):
    switch_off_dropout(student)
    tokens = batch["masked_input_ids"]
    if peer.name.startswith("bertdistiller"):
        expected = relations(teacher, student, tokens, 48 if "48" in peer.name else 12)
        loss = peer.step(teacher, student, batch)()
    elif peer.name.startswith("textbrewer"):
        maps = []

        def linear(*widths):
            maps.append(nn.Linear(*widths))
            return maps[-1]

        monkeypatch.setitem(import_module("textbrewer").PROJ_MAP, "linear", linear)
        step = peer.step(teacher, student, batch)
        expected = hidden_states(teacher, student, tokens, dict(zip([(1, 2), (2, 4)], maps, strict=True)))
        if peer.name == "textbrewer-hidden-and-logits":
            divergence, entropy = distributions(teacher, student, tokens)
            expected += divergence + entropy
        before = [tiny.snapshot(module) for module in maps]
        loss = step()
        assert not any(tiny.identical(old, tiny.snapshot(new)) for old, new in zip(before, maps, strict=True))
    else:
        expected, _ = distributions(teacher, student, tokens)
        loss = peer.step(teacher, student, batch)()
    assert float(loss) == pytest.approx(expected, rel=1e-5)


def test_encoders_without_heads_leave_the_heads_alone(peer, teacher, student, batch):
    before = tiny.snapshot(student.cls.predictions.transform)
    peer.step(teacher, student, batch)()
    kept = tiny.identical(before, tiny.snapshot(student.cls.predictions.transform))
    assert kept == (peer.name.startswith("bertdistiller") or peer.name == "textbrewer-hidden-encoders")


@torch.no_grad()
def distributions(teacher, student, tokens) -> tuple[float, float]:
    """Mean over all positions of KL(teacher || student) and of the teacher's entropy, by a loop over the vocabulary."""
    divergence = entropy = 0.0
    pairs = [model(input_ids=tokens).logits.double().flatten(0, 1).tolist() for model in (teacher, student)]
    for logits in zip(*pairs, strict=True):
        p, q = ([value - math.log(sum(map(math.exp, row))) for value in row] for row in logits)
        divergence += sum(math.exp(a) * (a - b) for a, b in zip(p, q, strict=True))
        entropy -= sum(math.exp(a) * a for a in p)
    return divergence / tokens.numel(), entropy / tokens.numel()


@torch.no_grad()
def hidden_states(teacher, student, tokens, maps) -> float:
    """Sum over pairs (student layer, teacher layer) of the mean squared error, with the maps of the package."""
    total = 0.0
    for (i, j), linear in maps.items():
        states = read_activations(student, tokens, hidden_layers=[i]).hidden[i]
        difference = linear(states) - read_activations(teacher, tokens, hidden_layers=[j]).hidden[j]
        total += float((difference.double() ** 2).sum()) / (tokens.numel() * teacher.config.hidden_size)
    return total


@torch.no_grad()
def relations(teacher, student, tokens, heads) -> float:
    """The study's MiniLMv2, which tests/test_losses.py compares with loops: last layer, teacher's last but one."""
    layers = {student: student.config.num_hidden_layers, teacher: teacher.config.num_hidden_layers - 1}
    states = [
        read_activations(model, tokens, attention_layers=[layer]).attention[layer] for model, layer in layers.items()
    ]
    return sum(float(losses.attention_relation(states[0][x], states[1][x], heads)) for x in PROJECTIONS)
