"""CR-ILD: its losses against slow loops and numbers by hand, mixing, the consistency term and its schedule."""

from __future__ import annotations

import math
from types import SimpleNamespace

import pytest
import tiny
import torch
from datasets import DatasetDict
from pydantic import ValidationError
from transformers import set_seed

from study import StudyError
from study.analysis.figures.neighbours import about
from study.data import storage
from study.data.corpus import load_corpus
from study.data.tasks import load_task
from study.descriptions import NeighbourSystem
from study.evaluation.finetune import encode
from study.families import keep_layers
from study.files import Layout
from study.neighbours.cr_ild import (
    CR_ILD,
    IntermediateDistillation,
    LogitStudent,
    Progress,
    attention_rows,
    both,
    logits_loss,
    mislabelled,
    mixed_embeddings,
    teach,
)
from study.neighbours.stages import corpus_texts, train_stage
from study.neighbours.system import run_system
from study.neighbours_options import CrIld
from study.sections import TaskBudget

IDS = torch.tensor([[2, 10, 20, 30, 3, 0], [2, 15, 3, 0, 0, 0], [2, 40, 41, 42, 43, 3]])
MASK = (IDS != 0).long()


def pair(seed=0):
    """A student of three layers under a teacher of four, neither with dropout."""
    student, teacher = (tiny.masked_language_model(seed=s).bert.eval() for s in (seed, seed + 1))
    keep_layers(student, 3)
    return student, teacher


def distillation(objects, mapping="last", consistency=0.1, seed=0):
    made = IntermediateDistillation(*pair(seed), objects, mapping, consistency)
    for module in made.modules():
        if isinstance(module, torch.nn.Dropout):
            module.p = 0.0
    return made.train()


def test_attention_rows_by_hand():
    # One head, two tokens. The student's rows are (1/2, 1/2) and (3/4, 1/4), the teacher's the other way round.
    own = torch.tensor([[[[0.0, 0.0], [math.log(3), 0.0]]]])
    target = torch.tensor([[[[math.log(3), 0.0], [0.0, 0.0]]]])
    expected = (math.log(2) - (math.log(3 / 4) + math.log(1 / 4)) / 2) / 2
    assert attention_rows(own, target, torch.ones(1, 2, 2).bool()).item() == pytest.approx(expected)
    # With the second token padding there is one row, of one key: cross-entropy 0.
    assert attention_rows(own, target, torch.tensor([[[True, False], [False, False]]])).item() == pytest.approx(0)


def test_attention_rows_against_a_loop():
    torch.manual_seed(0)
    own, target = torch.randn(3, 2, 6, 6), torch.randn(3, 2, 6, 6)
    total, rows = 0.0, 0
    for b in range(3):
        real = [t for t in range(6) if MASK[b, t]]
        for a in range(2):
            for t in real:
                norm = [sum(math.exp(x[b, a, t, u]) for u in real) for x in (own, target)]
                for u in real:
                    p, q = (math.exp(x[b, a, t, u]) / n for x, n in zip((own, target), norm, strict=True))
                    total -= q * math.log(p)
                rows += 1
    assert attention_rows(own, target, both(MASK, MASK)).item() == pytest.approx(total / rows, rel=1e-5)
    assert attention_rows(100 * own, target, both(MASK, MASK)).isfinite()
    with pytest.raises(ValueError, match="differ in shape"):
        attention_rows(own, target, both(MASK, MASK)[:2])


def test_logits_by_hand():
    # At temperature 2 the student's (2 log 3, 0) is (3/4, 1/4), the teacher's (0, 0) is (1/2, 1/2): KL = log(2/sqrt 3).
    loss = logits_loss(torch.tensor([[2 * math.log(3), 0.0]]), torch.zeros(1, 2), 2.0)
    assert loss.item() == pytest.approx(4 * math.log(2 / math.sqrt(3)), rel=1e-5)
    scores = logits_loss(torch.tensor([[1.0], [4.0]]), torch.tensor([[3.0], [0.0]]), 2.0)  # ((2/2)^2 + (4/2)^2) / 2
    assert scores.item() == pytest.approx(2.5)


def test_the_second_stage_learns_from_logits_alone():
    torch.manual_seed(0)
    model = LogitStudent(tiny.masked_language_model().bert, 2, pairs=False).eval()
    texts, targets = {"input_ids": IDS, "attention_mask": MASK}, torch.randn(3, 2)
    outcome = model(labels=torch.tensor([0, 1, 1]), targets=targets, **texts)
    assert outcome["loss"].item() == pytest.approx(logits_loss(outcome["logits"], targets, 2.0).item())
    assert torch.equal(outcome["logits"], model(**texts)["logits"]) and "loss" not in model(**texts)


def slow_pass(encoder, ids, mask, weight=None):
    """Hidden states and attention of an encoder, layer by layer, of inputs mixed with the reversed batch."""
    states = encoder.embeddings(ids)
    if weight is not None:
        mixed = torch.empty_like(states)
        for b in range(len(ids)):
            mixed[b] = weight * states[b] + (1 - weight) * states[len(ids) - 1 - b]
        states, mask = mixed, torch.stack([mask[b] | mask[len(ids) - 1 - b] for b in range(len(ids))])
    hidden, scores = [states], []
    padding = (1 - mask[:, None, None, :].float()) * -1e9
    for layer in encoder.encoder.layer:
        own = layer.attention.self
        q, k, v = (f(states).unflatten(-1, (4, 6)).transpose(1, 2) for f in (own.query, own.key, own.value))
        scores.append({"qk": q @ k.mT / 6**0.5, "vv": v @ v.mT / 6**0.5})
        context = ((scores[-1]["qk"] + padding).softmax(dim=-1) @ v).transpose(1, 2).flatten(-2)
        attended = layer.attention.output(context, states)
        states = layer.output(layer.intermediate(attended), attended)
        hidden.append(states)
    return hidden, scores


def slow_rows(own, target, mask):
    total = 0.0
    for b in range(len(mask)):
        real = mask[b].bool()
        p, q = (x[b][:, real][:, :, real].softmax(dim=-1) for x in (own, target))
        total = total - (q * p.log()).sum()
    return total / (own.shape[1] * mask.sum())


def slow_states(own, target, mask):
    return ((own - target) ** 2)[mask.bool()].mean()


@pytest.mark.parametrize("family", ["bert", "roberta"])
def test_embeddings_are_mixed_with_the_reversed_batch(family):
    encoder = tiny.masked_language_model(family).base_model.eval()
    ids = torch.where(MASK.bool(), IDS, encoder.config.pad_token_id)
    both = MASK | MASK.flip(0)
    with torch.no_grad():
        with mixed_embeddings(encoder, 0.7):
            found = encoder(input_ids=ids, attention_mask=both).last_hidden_state
        after = encoder(input_ids=ids, attention_mask=MASK).last_hidden_state
        torch.testing.assert_close(found, slow_pass(encoder, ids, MASK, 0.7)[0][-1], atol=1e-5, rtol=1e-4)
        torch.testing.assert_close(
            after[MASK == 1], slow_pass(encoder, ids, MASK)[0][-1][MASK == 1], atol=1e-5, rtol=1e-4
        )


@pytest.mark.parametrize(
    ("objects", "mapping"), [(["attention", "hidden"], "last"), (["attention", "value", "hidden"], "uniform")]
)
def test_the_whole_loss_against_a_transcription(objects, mapping):
    made = distillation(objects, mapping)
    made.progress = 0.6
    torch.manual_seed(3)
    weight = torch.rand(()).item()
    weight = max(weight, 1 - weight)
    torch.manual_seed(3)
    found = made(input_ids=IDS, attention_mask=MASK, labels=torch.zeros(3))["loss"]
    with torch.no_grad():
        own, own_scores = slow_pass(made.student, IDS, MASK, weight)
        target, target_scores = slow_pass(made.teacher, IDS, MASK, weight)
        clean, clean_scores = slow_pass(made.student, IDS, MASK)
        layers = [(3, 4)] if mapping == "last" else [(1, 1), (2, 2), (3, 4)]
        expected = sum(slow_rows(own_scores[i - 1]["qk"], target_scores[j - 1]["qk"], MASK) for i, j in layers)
        if "value" in objects:
            expected += sum(slow_rows(own_scores[i - 1]["vv"], target_scores[j - 1]["vv"], MASK) for i, j in layers)
        layers += [(0, 0)] if mapping == "uniform" else []
        expected += sum(slow_states(own[i], target[j], MASK) for i, j in layers)
        for share, turn in ((weight, False), (1 - weight, True)):
            scores, states, mask = clean_scores[-1]["qk"], clean[-1], MASK
            if turn:
                scores, states, mask = scores.flip(0), states.flip(0), mask.flip(0)
            consistent = slow_rows(own_scores[-1]["qk"], scores, mask) + slow_states(own[-1], states, mask)
            expected += 0.1 * 0.6 * share * consistent
    assert found.item() == pytest.approx(expected.item(), rel=1e-4)


def test_consistency_is_left_to_attention_and_hidden_states():
    losses = {}
    for objects in (["query", "key", "value"], ["attention"], ["hidden"]):
        made = distillation(objects)
        for made.progress in (0.0, 0.9):
            torch.manual_seed(1)
            losses[objects[0], made.progress] = made(input_ids=IDS, attention_mask=MASK)["loss"].item()
    assert losses["query", 0.0] == losses["query", 0.9]
    assert losses["attention", 0.0] < losses["attention", 0.9] and losses["hidden", 0.0] < losses["hidden", 0.9]


def test_the_clean_pass_and_the_teacher_get_no_gradient():
    made = distillation(["attention", "hidden"])
    made.progress = 0.5
    texts = {"input_ids": IDS, "attention_mask": MASK}
    torch.manual_seed(1)
    loss = made(**texts)["loss"]
    loss.backward()
    whole = {name: p.grad.clone() for name, p in made.student.named_parameters() if p.grad is not None}
    assert all(p.grad is None for p in made.teacher.parameters())
    assert not any("teacher" in name for name in made.state_dict())
    # The same with the clean pass as constants that were computed before.
    clean = made._read(made.student, IDS, MASK, made.last, made.last)
    fixed = {i: states.detach() for i, states in clean.hidden.items()}, clean.attention
    made.zero_grad()
    torch.manual_seed(1)
    read = made._read
    made._read = lambda model, ids, mask, *layers: (
        SimpleNamespace(
            hidden=fixed[0], attention={i: {n: x.detach() for n, x in p.items()} for i, p in fixed[1].items()}
        )
        if layers[0] is made.last
        else read(model, ids, mask, *layers)
    )
    made(**texts)["loss"].backward()
    for name, gradient in whole.items():
        torch.testing.assert_close(made.student.get_parameter(name).grad, gradient)


def test_evaluation_is_of_clean_texts():
    made = distillation(["attention", "hidden"])
    made.progress = 0.9
    plain = distillation(["attention", "hidden"], consistency=None)
    texts = {"input_ids": IDS, "attention_mask": MASK}
    assert made.eval()(**texts)["loss"].item() == plain(**texts)["loss"].item()
    assert made.train()(**texts)["loss"].item() != plain(**texts)["loss"].item()


def test_a_model_without_scores_of_queries_and_keys():
    student, teacher = (tiny.masked_language_model("mpnet", seed=seed).base_model for seed in (0, 1))
    with pytest.raises(
        StudyError, match=r"cr-ild: the model \(mpnet, .*allowed: encoders of the BERT, RoBERTa and XLM-R"
    ):
        IntermediateDistillation(student, teacher, ["attention"], "last", 0.1)
    assert IntermediateDistillation(student, teacher, ["hidden"], "last", 0.1)(IDS, MASK)["loss"].isfinite()


def test_attention_alone_ends_inside_the_last_layer():
    made = distillation(["attention"], consistency=None)
    made(input_ids=IDS, attention_mask=MASK)["loss"].backward()
    layer = made.student.encoder.layer[-1]
    assert layer.attention.self.query.weight.grad is not None and layer.output.dense.weight.grad is None


def test_epochs_that_are_over():
    made = SimpleNamespace(progress=None)
    callback, found = Progress(made, 4), []
    for step in range(8):
        callback.on_step_begin(None, SimpleNamespace(global_step=step, max_steps=8), None)
        found.append(made.progress)
    assert found == [0, 0, 0.25, 0.25, 0.5, 0.5, 0.75, 0.75]


def test_wrong_labels_are_other_classes():
    labels = [0, 1, 2, 3] * 500
    noisy = mislabelled(labels, 4, 0.3, seed=1)
    assert noisy == mislabelled(labels, 4, 0.3, seed=1) != mislabelled(labels, 4, 0.3, seed=2)
    wrong = [(own - was) % 4 for own, was in zip(noisy, labels, strict=True) if own != was]
    assert 0.25 < len(wrong) / len(labels) < 0.35 and all(
        0.25 < wrong.count(step) / len(wrong) < 0.42 for step in (1, 2, 3)
    )
    assert mislabelled(labels, 4, 0.0, seed=1) == labels
    assert all(own != was for own, was in zip(mislabelled([0, 1], 2, 0.999, 3), [0, 1], strict=True))


# What follows trains.

OPTIONS = {
    "system": "cr-ild",
    "seeds": [1],
    "layers": 2,
    "objects": ["attention", "hidden"],
    "arms": ["last-task", "uniform-task", "last-supplementary", "last-task-regularised"],
    "intermediate": {"epochs": 2, "batch_size": 8, "learning_rate": 0.01},
    "logits": {"epochs": 2, "batch_size": 8, "learning_rate": 0.003},
    "consistency": 0.1,
    "weight_decay": 0.01,
    "noise": 0.2,
}


@pytest.fixture(scope="module")
def described(tmp_path_factory):
    """The system in a study of files of a few kilobytes, and where they are."""
    folder = tiny.workspace(tmp_path_factory.mktemp("study"))
    params, layout = tiny.parameters(folder), Layout(folder, "english")
    splits = {"train": tiny.sentences(48, 1), "development": tiny.sentences(24, 2), "test": tiny.sentences(24, 3)}
    storage.save(DatasetDict(splits), layout.tasks / "sentiment")
    described = NeighbourSystem(
        setting="english",
        profile="test",
        neighbour="cr-ild",
        options=CrIld.model_validate(OPTIONS),
        tasks={"sentiment": TaskBudget(train=24, development=16, test=16, max_length=12)},
        finetuning=params.finetuning.model_copy(update={"tasks": {}, "batch_size": 8, "epochs": 2}),
        revisions={},
        precision="fp32",
        attention_implementation="eager",
        fast_paths=[],
    )
    return described, layout


def test_the_teachers_logits_are_those_of_its_rows(described):
    taught = teach(*described, "sentiment", 1)
    assert taught is teach(*described, "sentiment", 1)
    for split in ("train", "development"):
        batch = taught.collate([taught.distilled[split][i] for i in range(8)])
        with torch.no_grad():
            logits = taught.teacher(**{key: batch[key] for key in ("input_ids", "attention_mask")})["logits"]
        torch.testing.assert_close(batch["targets"], logits, atol=1e-4, rtol=1e-3)
    right = encode(
        load_task(described[1].tasks, "sentiment"),
        taught.task,
        described[0].tasks["sentiment"],
        taught.collate.tokenizer,
        "joint",
        1,
    )
    assert taught.splits["test"]["labels"] == right["test"]["labels"]
    assert (
        taught.splits["train"]["labels"] == mislabelled(right["train"]["labels"], 2, 0.2, 1) != right["train"]["labels"]
    )


def test_supplementary_texts_are_those_of_the_corpus(described):
    _, layout = described
    files = sorted(layout.corpus.rglob("*"))
    drawn = corpus_texts(layout.corpus, 20, 8, seed=1)["input_ids"]
    whole = {tuple(row[:7]) for row in load_corpus(layout.corpus)["train"]["input_ids"]}
    assert all(len(row) == 8 and tuple(row[:7]) in whole and row[-1] == 3 for row in drawn)
    assert drawn == corpus_texts(layout.corpus, 20, 8, seed=1)["input_ids"]
    assert drawn != corpus_texts(layout.corpus, 20, 8, seed=2)["input_ids"]
    assert sorted(layout.corpus.rglob("*")) == files  # a cache beside them would change what DVC has on record
    with pytest.raises(StudyError, match=r"corpus: 64 sequences for training; allowed: at least 65"):
        corpus_texts(layout.corpus, 65, 8, seed=1)


def test_the_first_stage_lowers_its_loss(described):
    taught = teach(*described, "sentiment", 1)
    student, teacher = pair()
    made = IntermediateDistillation(student, teacher, ["attention", "hidden"], "last", 0.1)
    before = tiny.snapshot(teacher)
    untrained, trained = train_stage(
        described[0], made, taught.splits["train"], taught.splits["development"], taught.collate, epochs=3,
        batch_size=8, learning_rate=0.01, seed=1, keep="last", schedule={}, callbacks=[Progress(made, 3)],
    )  # fmt: skip
    assert trained < 0.9 * untrained
    assert made.progress == pytest.approx(2 / 3) and tiny.identical(before, tiny.snapshot(teacher))


def test_the_epoch_with_the_lowest_loss_is_kept(described):
    taught, found = teach(*described, "sentiment", 1), {}
    for epochs in (1, 2, 3, 4):
        set_seed(0)
        model = LogitStudent(tiny.masked_language_model().bert, 2, pairs=False)
        found[epochs] = train_stage(
            described[0], model, taught.distilled["train"], taught.distilled["development"], taught.collate,
            epochs=epochs, batch_size=8, learning_rate=0.05, seed=1, keep="loss",
            schedule={"lr_scheduler_type": "constant"},
        )  # fmt: skip
    kept = [after for _, after in found.values()]
    assert kept == sorted(kept, reverse=True) and len({before for before, _ in found.values()}) == 1
    batch = taught.collate([*taught.distilled["development"]])
    with torch.no_grad():
        assert model.eval()(**batch)["loss"].item() == pytest.approx(kept[-1], rel=1e-3)


def test_every_arm_is_measured_and_written(described, tmp_path, capsys):
    description, layout = described
    result = run_system(CR_ILD, description, layout, tmp_path / "cr-ild.json")
    arms = {arm.name: arm.values for arm in result.arms}
    assert list(arms) == [*OPTIONS["arms"], "logits", "teacher"]
    for name, values in arms.items():
        assert all(len(own) == 1 for own in values.values())
        assert values["score"] == values["sentiment"]
        gap = [a - b for a, b in zip(values["train"], values["development"], strict=True)]
        assert values["gap"] == pytest.approx(gap)
        assert ("lowered" in values) == (name not in ("logits", "teacher"))
    assert {check.first for check in result.checks} <= set(arms) and len(result.checks) == 6
    assert (
        "noise: 0.2" in about(result).data
        and "sentiment" in result.measures
        and "0 of 5 left" in capsys.readouterr().out
    )


def test_a_task_of_several_languages_is_told_in_the_one_it_is_learnt_in(described):
    description, layout = described
    names = "train", "development", "test", "test-es"
    splits = {name: tiny.sentences(24, place) for place, name in enumerate(names)}
    storage.save(DatasetDict(splits), layout.tasks / "topic-multilingual")
    budget = TaskBudget(train=24, development=16, test=16, max_length=12, languages=["en", "es"])
    wider = description.model_copy(update={"tasks": {"topic-multilingual": budget} | description.tasks})
    measured = CR_ILD.run(wider, layout, "logits", 1)
    assert {name for own in measured.values() for name in own} <= {*CR_ILD.measures(wider)}


def test_more_layers_than_there_are(described):
    description, layout = described
    deeper = description.model_copy(update={"options": description.options.model_copy(update={"layers": 5})})
    with pytest.raises(StudyError, match="neighbours.cr-ild.layers = 5; allowed: at most 4"):
        CR_ILD.run(deeper, layout, "logits", 1)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"objects": ["colour"]}, "objects"),
        ({"arms": ["last-task", "last-task"]}, "names something twice"),
        ({"noise": 1.0}, "noise"),
        ({"arms": ["uniform-task-regularised"]}, "arms"),
    ],
)
def test_mistakes_in_options(change, message):
    with pytest.raises(ValidationError, match=message):
        CrIld.model_validate(OPTIONS | change)
