"""XtremeDistilTransformers: compressed embeddings, its first stage against slow loops, stages and what they freeze."""

from __future__ import annotations

import math

import numpy as np
import pytest
import tiny
import torch
from datasets import DatasetDict
from pydantic import ValidationError
from sklearn.decomposition import PCA

from study import StudyError
from study.data import storage
from study.descriptions import NeighbourSystem
from study.distillation.students import create_student
from study.files import Layout
from study.neighbours import xtreme_distil as module
from study.neighbours.system import run_system
from study.neighbours.xtreme_distil import (
    XTREME_DISTIL,
    ClsClassifier,
    Representation,
    StagedClassifier,
    attention_maps,
    compressed,
    distil,
    teach,
)
from study.neighbours_options import XtremeDistil
from study.sections import Encoder, TaskBudget

IDS = torch.tensor([[2, 10, 20, 30, 3, 0], [2, 15, 3, 0, 0, 0], [2, 40, 41, 42, 43, 3]])
MASK = (IDS != 0).long()
TEXTS = {"input_ids": IDS, "attention_mask": MASK}


def student(width=12, layers=2):
    sizes = Encoder(layers=layers, width=width, heads=4, intermediate=2 * width)
    return create_student(tiny.masked_language_model(seed=1), sizes, "random", seed=2).base_model


def representation(variant, width=12, layers=2):
    made = Representation(student(width, layers), tiny.masked_language_model(seed=1).base_model, variant)
    for part in made.modules():
        if isinstance(part, torch.nn.Dropout):
            part.p = 0.0
    return made.train()


def test_embeddings_are_compressed_as_by_pca():
    torch.manual_seed(0)
    table = torch.randn(60, 24) @ torch.randn(24, 24) + 5
    found, expected = compressed(table, 7), PCA(7, svd_solver="full").fit_transform(table.double().numpy())
    assert found.shape == (60, 7) and found.mean(dim=0).abs().max() < 1e-4
    signs = np.sign((found.numpy() * expected).sum(axis=0))
    np.testing.assert_allclose(found.numpy(), expected * signs, atol=1e-3)
    with pytest.raises(StudyError, match="width = 25; allowed: at most 24"):
        compressed(table, 25)


def test_the_teacher_reads_its_first_token_on_whichever_side_padding_is():
    classifier = ClsClassifier(student(), labels=3, pairs=False).eval()
    alone = classifier(input_ids=IDS[1:2, :3], attention_mask=MASK[1:2, :3])["logits"]
    right = classifier(input_ids=IDS[1:2], attention_mask=MASK[1:2])["logits"]
    with torch.no_grad():  # positions count from the left: without them the place does not matter
        classifier.encoder.embeddings.position_embeddings.weight.zero_()
    plain = classifier(input_ids=IDS[1:2, :3], attention_mask=MASK[1:2, :3])["logits"]
    turned = classifier(input_ids=IDS[1:2].roll(3, dims=1), attention_mask=MASK[1:2].roll(3, dims=1))["logits"]
    assert torch.allclose(alone, right, atol=1e-5) and torch.allclose(plain, turned, atol=1e-5)
    assert not torch.allclose(alone, plain, atol=1e-3)


def test_attention_maps_by_hand_and_against_a_loop():
    # Rows (1/2, 1/2), (3/4, 1/4) against (3/4, 1/4), (1/2, 1/2): every difference is 1/4.
    own = torch.tensor([[[[0.0, 0.0], [math.log(3), 0.0]]]])
    assert attention_maps(own, own.flip(2), torch.ones(1, 2)).item() == pytest.approx(1 / 16)
    torch.manual_seed(0)
    own, target = torch.randn(3, 2, 6, 6), torch.randn(3, 2, 6, 6)
    total, pairs = 0.0, 0
    for b in range(3):
        real = [t for t in range(6) if MASK[b, t]]
        for a in range(2):
            for t in real:
                norm = [sum(math.exp(x[b, a, t, u]) for u in real) for x in (own, target)]
                for u in real:
                    p, q = (math.exp(x[b, a, t, u]) / n for x, n in zip((own, target), norm, strict=True))
                    total, pairs = total + (p - q) ** 2, pairs + 1
    assert attention_maps(own, target, MASK).item() == pytest.approx(total / pairs, rel=1e-5)


@pytest.mark.parametrize(
    ("variant", "states"), [("cls", {2: 4}), ("topmost", {0: 2, 1: 3, 2: 4}), ("uniform", {0: 0, 1: 2, 2: 4})]
)
@pytest.mark.parametrize("width", [12, 24])
def test_the_first_stage_against_a_transcription(variant, states, width):
    made = representation(variant, width)
    found = made(labels=torch.zeros(3), **TEXTS)["loss"]
    assert made.states == states and len(made.maps) == (len(states) if width == 12 else 0)
    with torch.no_grad():
        own, target = (
            model(**TEXTS, output_hidden_states=True, output_attentions=True)
            for model in (made.student.eval(), made._outside[0])
        )
        expected = 0.0
        for i, j in states.items():
            mapped = made.maps[str(i)](own.hidden_states[i]) if width == 12 else own.hidden_states[i]
            squared = [
                (mapped[b, t, h] - target.hidden_states[j][b, t, h]).item() ** 2
                for b in range(3)
                for t in range(1 if variant == "cls" else 6)
                if MASK[b, t]
                for h in range(24)
            ]
            expected += sum(squared) / len(squared)
        for i, j in states.items() if variant != "cls" else ():
            if i:
                squared = [
                    (own.attentions[i - 1][b, a, t, u] - target.attentions[j - 1][b, a, t, u]).item() ** 2
                    for b in range(3)
                    for a in range(4)
                    for t in range(6)
                    for u in range(6)
                    if MASK[b, t] and MASK[b, u]
                ]
                expected += sum(squared) / len(squared)
    assert found.item() == pytest.approx(expected, rel=1e-4)


def test_students_that_do_not_fit():
    teacher = tiny.masked_language_model(seed=1).base_model
    sizes = Encoder(layers=2, width=12, heads=2, intermediate=24)
    other = create_student(tiny.masked_language_model(seed=1), sizes, "random", seed=2).base_model
    with pytest.raises(StudyError, match="variant topmost: heads = 2; allowed: 4, as the teacher has"):
        Representation(other, teacher, "topmost")
    assert Representation(other, teacher, "cls")(**TEXTS)["loss"].isfinite()
    with pytest.raises(StudyError, match="variant 'top' is unknown; allowed: cls, topmost, uniform"):
        Representation(other, teacher, "top")
    with pytest.raises(StudyError, match="layers = 4; allowed: at most 2"):
        Representation(teacher, other, "cls")


def test_the_classifier_keeps_the_map_of_the_first_stage():
    first = representation("topmost").eval()
    model = StagedClassifier(first, 3).eval()
    targets, labels = torch.randn(3, 3), torch.tensor([0, 2, 1])
    with torch.no_grad():
        states = first.student(**TEXTS).last_hidden_state[:, 0]
        logits = model.output(states @ first.maps["2"].weight.T + first.maps["2"].bias)
        outcome = model(labels=labels, targets=targets, **TEXTS)
        torch.testing.assert_close(outcome["logits"], logits)
        assert outcome["loss"].item() == pytest.approx(((logits - targets) ** 2).mean().item(), rel=1e-5)
        model.from_logits = False
        chosen = [logits[b].log_softmax(0)[labels[b]].item() for b in range(3)]
        assert model(labels=labels, targets=targets, **TEXTS)["loss"].item() == pytest.approx(
            -sum(chosen) / 3, rel=1e-5
        )
    assert model.blocks() == [first.maps["2"], first.student]
    assert StagedClassifier(representation("topmost", 24), 3).blocks()[0] is not None
    assert len(StagedClassifier(representation("topmost", 24), 3).blocks()) == 1


def test_the_teacher_reads_the_first_token():
    model = ClsClassifier(tiny.masked_language_model().base_model, 2, pairs=False).eval()
    with torch.no_grad():
        states = model.encoder(**TEXTS).last_hidden_state[:, 0]
        torch.testing.assert_close(model(**TEXTS)["logits"], model.output(states))


# What follows trains.

STAGE = {"epochs": 1, "batch_size": 8, "learning_rate": 0.003}
OPTIONS = {
    "system": "xtremedistil",
    "seeds": [1],
    "source": "topic",
    "student": {"layers": 2, "width": 12, "heads": 4, "intermediate": 24},
    "variants": ["topmost", "cls"],
    "embeddings": ["pca", "random"],
    "transfer": 32,
    "representation": STAGE | {"epochs": 4},
    "logits": STAGE,
    "labels": STAGE,
}


@pytest.fixture(scope="module")
def described(tmp_path_factory):
    """The system in a study of files of a few kilobytes, and where they are."""
    folder = tiny.workspace(tmp_path_factory.mktemp("study"))
    params, layout = tiny.parameters(folder), Layout(folder, "english")
    for name in ("topic", "sentiment"):
        splits = {"train": tiny.sentences(48, 1), "development": tiny.sentences(24, 2), "test": tiny.sentences(24, 3)}
        storage.save(DatasetDict(splits), layout.tasks / name)
    described = NeighbourSystem(
        setting="english",
        profile="test",
        neighbour="xtremedistil",
        options=XtremeDistil.model_validate(OPTIONS),
        tasks={n: TaskBudget(train=24, development=16, test=16, max_length=12) for n in ("topic", "sentiment")},
        finetuning=params.finetuning.model_copy(update={"tasks": {}, "batch_size": 8, "epochs": 1}),
        revisions={},
        precision="fp32",
        attention_implementation="eager",
        fast_paths=[],
    )
    return described, layout


def test_stages_and_what_they_train(described, monkeypatch):
    taught, own, trained = teach(*described, 1), student(), []
    assert type(taught.teacher) is ClsClassifier and len(taught.train) == 24 and len(taught.transfer) == 32
    embeddings = own.get_input_embeddings().weight.requires_grad_(False)
    before = embeddings.detach().clone()
    train_stage = module.train_stage

    def watched(model, train, keep, **others):
        names = {name.partition(".")[0] for name, weight in model.named_parameters() if weight.requires_grad}
        trained.append((names, train is taught.transfer, keep if isinstance(keep, str) else keep.metric))
        was = tiny.snapshot(model)
        outcome = train_stage(model=model, train=train, keep=keep, **others)
        changed = {name for name, weight in model.named_parameters() if not torch.equal(weight, was[name])}
        assert changed <= {name for name, weight in model.named_parameters() if weight.requires_grad}
        return outcome

    monkeypatch.setattr(module, "train_stage", watched)
    found = distil(described[0], own, taught, "topmost", 1)
    head, dense, whole = {"output"}, {"output", "dense"}, {"output", "dense", "encoder"}
    logits = [(names, True, "loss") for names in (head, dense, whole)]
    labels = [(names, False, taught.task.metric) for names in (head, dense, whole)]
    assert trained == [({"student", "maps"}, True, "loss"), *logits, *labels]
    assert torch.equal(embeddings, before) and 0 < found["lowered"] < 1 and 0 <= found["source"] <= 1


def test_every_arm_is_measured_on_the_other_tasks(described, tmp_path):
    result = run_system(XTREME_DISTIL, *described, tmp_path / "result.json")
    arms = {arm.name: arm.values for arm in result.arms}
    assert list(arms) == ["topmost-pca", "topmost-random", "cls-pca", "start"]
    for name, values in arms.items():
        assert values["score"] == values["sentiment"] and "topic" not in values
        assert ("lowered" in values) == (name != "start")
    assert [check.second for check in result.checks] == ["start", "start", "cls-pca", "topmost-random"]


def test_mistakes(described):
    description, layout = described
    scores = description.model_copy(update={"options": description.options.model_copy(update={"source": "sts-b"})})
    with pytest.raises(StudyError, match="source = 'sts-b' has no classes; allowed: a task whose labels are names"):
        teach(scores, layout, 1)
    with pytest.raises(ValidationError, match="variants"):
        XtremeDistil.model_validate(OPTIONS | {"variants": ["bottom"]})


@pytest.mark.fast
@pytest.mark.parametrize("changes", [{"source": "masked-word"}, {"source": "topic", "tasks": ["topic"]}])
def test_a_source_that_cannot_be_one(changes, tmp_path):
    own = {"neighbours": {"x": OPTIONS | changes}, "grid": {"neighbours": {"english": ["x"]}}}
    message = f"neighbours.x.source: '{changes['source']}' has to be one of at least two tasks .* allowed: topic"
    with pytest.raises(ValidationError, match=message):
        tiny.parameters(tmp_path, **own)
