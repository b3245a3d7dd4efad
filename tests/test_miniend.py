"""MiniEnD: spans, the encoder-decoder, its losses and masks against slow loops, and a whole run."""

from __future__ import annotations

import math

import numpy as np
import pytest
import tiny
import torch
from pydantic import ValidationError
from transformers import DataCollatorForSeq2Seq

from study import StudyError
from study.data import storage
from study.descriptions import NeighbourSystem
from study.distillation.students import create_student
from study.files import Layout
from study.neighbours import miniend as module
from study.neighbours.miniend import IGNORED, MINIEND, Reader, SpanDistillation, corrupted, encoder_decoder, projections
from study.neighbours.stages import attention_rows
from study.neighbours.system import run_system
from study.neighbours_options import MiniEnd
from study.sections import Encoder

IDS = torch.tensor([[2, 10, 4, 30, 3, 0], [2, 4, 3, 0, 0, 0], [2, 40, 41, 4, 43, 3]])
LABELS = torch.tensor([[4, 20, 21, 3], [4, 15, 3, IGNORED], [4, 3, IGNORED, IGNORED]])
TEXTS = {"input_ids": IDS, "attention_mask": (IDS != 0).long(), "labels": LABELS}
ARMS = ["od+self+cross", "od+self", "od", "self", "scratch"]


def made(seed=1, width=24, layers=4, **changes):
    model = tiny.masked_language_model(seed=seed, layers=layers, width=width, **changes)
    torch.manual_seed(seed)
    found = encoder_decoder(model, "neighbours.miniend").eval()
    found.config.pad_token_id, found.config.decoder_start_token_id = 0, 2
    for part in found.modules():
        if isinstance(part, torch.nn.Dropout):
            part.p = 0.0
    return found


@pytest.mark.fast
@pytest.mark.parametrize("length", [4, 12, 48])
@pytest.mark.parametrize("fraction", [0.15, 0.3, 0.9])
def test_spans_put_back_give_the_sequence(length, fraction):
    generator, tokens = np.random.default_rng(0), [2, *range(100, 98 + length), 3]
    for _ in range(20):
        source, target = corrupted(tokens, fraction, 3, 4, generator)
        assert source[0] == 2 and source[-1] == target[-1] == 3 and target[0] == 4
        taken, spans = max(1, round((length - 2) * fraction)), source.count(4)
        assert spans == target.count(4) == min(max(1, round(taken / 3)), taken, max(1, length - 2 - taken))
        assert len(target) == taken + spans + 1
        outs = " ".join(map(str, target[1:-1])).split(" 4 ")
        parts = " ".join(map(str, source)).split(" 4")
        assert " ".join(a + " " + b for a, b in zip(parts, [*outs, ""], strict=True)).split() == [*map(str, tokens)]


@pytest.mark.fast
def test_the_encoder_decoder_starts_as_the_language_model():
    model = tiny.masked_language_model(seed=3)
    found = encoder_decoder(model, "neighbours.miniend").eval()
    own, weights = found.decoder.state_dict(), model.state_dict()
    assert all(torch.equal(own[key], weights[key]) for key in weights)
    assert {key for key in own if key not in weights} == {key for key in own if "crossattention" in key} != set()
    table = found.encoder.get_input_embeddings().weight
    assert found.decoder.get_input_embeddings().weight is table is found.decoder.get_output_embeddings().weight
    with torch.no_grad():
        states = found.encoder(input_ids=IDS).last_hidden_state
        torch.testing.assert_close(states, model.bert(input_ids=IDS).last_hidden_state)


@pytest.mark.fast
@pytest.mark.parametrize("family", ["mpnet", "distilbert", "modernbert"])
def test_an_encoder_without_a_decoder_is_told_in_one_line(family):
    with pytest.raises(StudyError, match=f"neighbours.x.model: {family} has no decoder; allowed: a model of bert,"):
        encoder_decoder(tiny.masked_language_model(family), "neighbours.x")


@pytest.mark.fast
@pytest.mark.parametrize("family", module.DECODERS)
def test_every_family_with_a_decoder_has_one(family):
    model = encoder_decoder(tiny.masked_language_model(family), "x").eval()
    pad = model.config.encoder.pad_token_id
    model.config.pad_token_id, model.config.decoder_start_token_id = pad, 2
    loss = SpanDistillation(model)(input_ids=IDS, attention_mask=(IDS != 0).long(), labels=LABELS)["loss"]
    assert loss.isfinite()


def relation(states, heads, seen):
    """(B, T, H), and for sequence b and row t the columns it sees: rows of probabilities by (b, head, t)."""
    size, rows = states.shape[-1] // heads, {}
    for b in range(len(states)):
        for t in range(states.shape[1]):
            columns = seen(b, t)
            for a in range(heads if columns else 0):
                part = states[b, :, a * size : (a + 1) * size]
                scores = {u: (part[t] @ part[u]).item() / math.sqrt(size) for u in columns}
                total = sum(math.exp(x) for x in scores.values())
                rows[b, a, t] = {u: math.exp(x) / total for u, x in scores.items()}
    return rows


def divergence(own, target, heads, seen):
    rows = [relation(x, heads, seen) for x in (own, target)]
    parts = [-sum(q * math.log(rows[0][key][u]) for u, q in row.items()) for key, row in rows[1].items()]
    return sum(parts) / len(parts)


def reading(b, t):
    real = [u for u in range(6) if IDS[b, u]]
    return real if t in real else []


def writing(b, t):
    return [u for u in range(t + 1) if LABELS[b, u] != IGNORED] if LABELS[b, t] != IGNORED else []


@pytest.mark.fast
def test_rows_by_hand_padding_and_future_are_not_seen():
    # Row 0 sees itself alone; row 1 under scores (log 3, 0) is (3/4, 1/4), under (0, 0) it is (1/2, 1/2).
    own = torch.tensor([[[[0.0, 9.0, 9.0], [0.0, 0.0, 9.0], [9.0, 9.0, 9.0]]]])
    target = torch.tensor([[[[0.0, 5.0, 5.0], [math.log(3), 0.0, 5.0], [5.0, 5.0, 5.0]]]])
    allowed = torch.tensor([[[True, False, False], [True, True, False], [False, False, False]]])
    assert attention_rows(own, target, allowed).item() == pytest.approx(math.log(2) / 2)
    assert attention_rows(target, own, allowed).item() == pytest.approx(-(math.log(3 / 4) + math.log(1 / 4)) / 4)


@pytest.mark.parametrize("arm", ARMS)
def test_the_loss_of_an_arm_against_slow_loops(arm):
    student, teacher = made(seed=1, width=12, layers=2, intermediate=24), made(seed=2)
    objective = SpanDistillation(student, teacher, arm, heads=4, temperature=2.0).train()
    found = objective(**TEXTS)["loss"].item()
    logits, projected = [], []
    with torch.no_grad():
        for model in (student, teacher):
            inputs = torch.cat([torch.full((3, 1), 2), LABELS.clamp(min=0)[:, :-1]], dim=1)
            read = model(
                input_ids=IDS, attention_mask=TEXTS["attention_mask"], decoder_input_ids=inputs,
                decoder_attention_mask=(LABELS != IGNORED).long(), output_hidden_states=True,
            )  # fmt: skip
            logits.append(read.logits)
            encoder, decoder = model.encoder.encoder.layer[-1], model.decoder.bert.encoder.layer[-1]
            attention = decoder.attention(read.decoder_hidden_states[-2], causal(inputs))[0]
            sides = {"encoder": (encoder.attention.self, *[read.encoder_hidden_states[-2]] * 3)}
            sides |= {"decoder": (decoder.attention.self, *[read.decoder_hidden_states[-2]] * 3)}
            sides |= {"cross": (decoder.crossattention.self, attention, *[read.encoder_last_hidden_state] * 2)}
            projected.append(
                {f"{p}.{n}": getattr(own, n)(x) for p, (own, *states) in sides.items()
                 for n, x in zip(("query", "key", "value"), states, strict=True)}
            )  # fmt: skip
    places = [(b, t) for b in range(3) for t in range(4) if LABELS[b, t] != IGNORED]
    expected = -sum(logits[0][b, t].log_softmax(-1)[LABELS[b, t]].item() for b, t in places) / len(places)
    if "od" in arm:
        kl = 0.0
        for b, t in places:
            p, q = ((own[b, t] / 2).softmax(-1).double() for own in logits)
            kl += (q * (q / p).log()).sum().item()
        expected = 0.5 * expected + 0.5 * 4 * kl / len(places)
    seen = {"encoder": (reading,) * 3, "decoder": (writing,) * 3, "cross": (writing, reading, reading)}
    for place in ["encoder", "decoder"] * ("self" in arm) + ["cross"] * ("cross" in arm):
        for name, columns in zip(("query", "key", "value"), seen[place], strict=True):
            expected += divergence(*(own[f"{place}.{name}"] for own in projected), 4, columns) / 3
    assert found == pytest.approx(expected, rel=1e-4)
    assert objective.eval()(**TEXTS)["loss"].item() == pytest.approx(
        -sum(logits[0][b, t].log_softmax(-1)[LABELS[b, t]].item() for b, t in places) / len(places), rel=1e-4
    )
    assert objective.train()(**padded(TEXTS))["loss"].item() == pytest.approx(found, rel=1e-4)
    if arm != "scratch":
        assert all(p.grad is None for p in teacher.parameters()) and teacher not in [*objective.modules()]


def causal(inputs):
    """An additive mask (B, 1, T, T): the past, as far as it is real."""
    real = LABELS != IGNORED
    allowed = torch.ones(4, 4).tril().bool() & real[:, None, :]
    return torch.zeros(3, 1, 4, 4).masked_fill(~allowed[:, None], torch.finfo(torch.float32).min)


def padded(texts):
    fill = {"input_ids": 0, "attention_mask": 0, "labels": IGNORED}
    return {key: torch.nn.functional.pad(own, (0, 3), value=fill[key]) for key, own in texts.items()}


def test_what_is_read_and_what_does_not_fit():
    model = made()
    with projections(model) as read:
        SpanDistillation(model)(**TEXTS)
    assert {key.partition(".")[0] for key in read} == {"encoder", "decoder", "cross"} and len(read) == 9
    assert read["cross.query"].shape == (3, 4, 24) and read["cross.key"].shape == (3, 6, 24)
    assert not any(part._forward_hooks for part in model.modules())
    with pytest.raises(StudyError, match="relation_heads = 5; allowed: a divisor of 24"):
        SpanDistillation(made(seed=2), model, "self", heads=5)


def test_perplexity_counts_tokens_and_not_batches(tmp_path):
    model, words = made(), tiny.tokenizer(tmp_path)
    rows = module.Dataset.from_dict(
        {"input_ids": [own[own != 0].tolist() for own in IDS], "labels": [own[own >= 0].tolist() for own in LABELS]}
    )
    with torch.no_grad():
        losses = [
            SpanDistillation(model).eval()(**{k: x[[b]] for k, x in TEXTS.items()})["loss"].item() for b in range(3)
        ]
    expected = math.exp((4 * losses[0] + 3 * losses[1] + 2 * losses[2]) / 9)
    for size in (1, 2, 3):
        reader = Reader(words, DataCollatorForSeq2Seq(words), size)
        assert reader.perplexity(model, rows) == pytest.approx(expected, rel=1e-4)


STAGE = {"epochs": 1, "batch_size": 8, "learning_rate": 0.003}
OPTIONS = {
    "system": "miniend", "seeds": [1], "student": {"layers": 2, "width": 12, "heads": 4, "intermediate": 24},
    "arms": ["od+self+cross", "scratch"], "relation_heads": 4, "temperature": 1.0, "sequences": 64, "corrupted": 0.3,
    "span": 2, "adaptation": STAGE | {"epochs": 6}, "distillation": STAGE | {"epochs": 6}, "summaries": STAGE,
    "summary_length": 8, "train": 16, "development": 16, "test": 8, "max_length": 12,
}  # fmt: skip


def described(folder, **changes) -> tuple[NeighbourSystem, Layout]:
    layout = Layout(folder, "english")
    splits = {"train": tiny.sentences(8, 1), "development": tiny.sentences(8, 2), "test": tiny.sentences(8, 3)}
    storage.save(storage.DatasetDict(splits), layout.tasks / "topic")
    own = {"neighbours": {"miniend": OPTIONS | changes}, "grid": {"neighbours": {"english": ["miniend"]}}}
    budget = {"topic": {"train": 8, "development": 8, "test": None, "max_length": 12}}
    finetuning = {"epochs": 1, "batch_size": 16, "learning_rates": [5e-3], "seeds": [1], "tasks": budget}
    (found,) = tiny.plan(folder, **own, finetuning=finetuning).of(NeighbourSystem)
    return found, layout


def test_a_run_learns_spans_and_writes_summaries(tmp_path, monkeypatch):
    monkeypatch.chdir(tiny.workspace(tmp_path))
    found, layout = described(tmp_path)
    result = run_system(MINIEND, found, layout, tmp_path / "miniend.json")
    arms = {arm.name: arm.values for arm in result.arms}
    assert list(arms) == ["od+self+cross", "scratch", "teacher"]
    assert all(own.keys() == {"perplexity", "summaries", "rouge1", "rougeL"} for own in arms.values())
    assert arms["teacher"]["perplexity"][0] < 40 < tiny.VOCABULARY  # by chance that of its vocabulary
    assert result.checks == []  # neither of the two has its partner
    again, _ = described(tmp_path, train=999)
    with pytest.raises(StudyError, match=r"train \+ test = 1007; allowed: at most 1,000 summaries"):
        MINIEND.run(again, layout, "scratch", 1)
    more, _ = described(tmp_path, development=17)
    with pytest.raises(StudyError, match="16 sequences for validation; allowed: at least 17"):
        MINIEND.run(more, layout, "scratch", 1)


def test_the_student_is_of_the_sizes_asked_for_and_rouge_is_that_of_its_words():
    student = create_student(tiny.masked_language_model(), Encoder(**OPTIONS["student"]), "random", seed=1)
    found = encoder_decoder(student, "x")
    assert [len(own.base_model.encoder.layer) for own in (found.encoder, found.decoder)] == [2, 2]
    scores = module.rouge_score(["a b c d"], ["A b, x d e"], rouge_keys=("rouge1", "rougeL"))
    assert scores["rouge1_fmeasure"].item() == pytest.approx(2 * 3 / (4 + 5))
    assert scores["rougeL_fmeasure"].item() == pytest.approx(2 * 3 / (4 + 5))


@pytest.mark.fast
@pytest.mark.parametrize(
    ("changes", "message"),
    [({"arms": ["kd"]}, "arms.0"), ({"corrupted": 1.0}, "corrupted"), ({"temperature": 0.0}, "temperature"),
     ({"train": None}, "train")],
)  # fmt: skip
def test_options_that_do_not_fit(changes, message):
    with pytest.raises(ValidationError, match=message):
        MiniEnd.model_validate(OPTIONS | changes)
