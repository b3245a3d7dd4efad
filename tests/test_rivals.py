"""Embedding transfer, attention as it is, sums and known recipes: slow loops, numbers by hand, whole runs."""

from __future__ import annotations

import math

import pytest
import tiny
import torch
from tiny_training import METHODS, distilled, objective_of, stream
from tiny_training import RIVALS as WITH_SUMS
from transformers import default_data_collator

from study.distillation import trainer
from study.distillation.losses import attention_distribution, attention_score, attention_scores, sentence_embedding
from study.distillation.objectives import OBJECTIVES, base
from study.distillation.taps import read_activations
from study.distillation.trainer import freeze_untrained
from study.files import StudyError
from study.methods import METHOD, Untrained
from study.sections import Encoder
from study.speed.cost import Workload, count


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


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"batch_size": 8, "accumulation_steps": 8}, "accumulation_steps = 8: methods.se-relational .* allowed: 1"),
        ({"batch_size": 1, "accumulation_steps": 1}, "batch_size = 1: methods.se-relational .* allowed: at least 2"),
    ],
)
def test_similarities_need_two_sequences_read_at_once(tmp_path, changes, message):
    distillation = tiny.parameters(tmp_path).distillation.model_dump() | changes
    with pytest.raises(ValueError, match=message):
        tiny.parameters(tmp_path, grid={"methods": ["se-relational"]}, distillation=distillation)


# Attention as it is


def scores_loop(query, key, heads):
    """scores[b][a][t][u] = q_t . k_u / sqrt(d), d the width of a head."""
    d = query.shape[-1] // heads
    return [
        [
            [
                [sum(float(q[a * d + c]) * float(k[a * d + c]) for c in range(d)) / math.sqrt(d) for k in key[b]]
                for q in query[b]
            ]
            for a in range(heads)
        ]
        for b in range(len(query))
    ]


def rows_of(scores):
    return [row for sequence in scores for head in sequence for row in head]


def softmax(row):
    total = sum(math.exp(z) for z in row)
    return [math.exp(z) / total for z in row]


def divergence_loop(student, teacher) -> float:
    """Mean over rows of KL(teacher || student)."""
    pairs = [(softmax(s), softmax(t)) for s, t in zip(rows_of(student), rows_of(teacher), strict=True)]
    return sum(sum(b * math.log(b / a) for a, b in zip(p, q, strict=True)) for p, q in pairs) / len(pairs)


def score_error_loop(student, teacher) -> float:
    pairs = [(a, b) for s, t in zip(rows_of(student), rows_of(teacher), strict=True) for a, b in zip(s, t, strict=True)]
    return sum((a - b) ** 2 for a, b in pairs) / len(pairs)


@pytest.mark.fast
def test_attention_losses_are_the_formulas():
    student, teacher = ([states(2, 5, width, seed=width + i) for i in range(2)] for width in (6, 12))
    own, target = (scores_loop(*x, 3) for x in (student, teacher))
    fast = [attention_scores(*x, 3) for x in (student, teacher)]
    torch.testing.assert_close(fast[0], torch.tensor(own))
    assert attention_score(*fast).item() == pytest.approx(score_error_loop(own, target), rel=1e-4)
    assert attention_distribution(*fast).item() == pytest.approx(divergence_loop(own, target), rel=1e-4)


@pytest.mark.fast
def test_attention_losses_by_hand():
    student, teacher = torch.zeros(1, 1, 2, 2), torch.tensor([[[[0.0, 2.0], [math.log(3.0), 0.0]]]])
    assert attention_score(student, teacher).item() == pytest.approx((4 + math.log(3) ** 2) / 4)
    # p = 1 / (1 + e^-2) = 0.880797: log 2 - 0.366 = 0.327813; (3/4, 1/4) against (1/2, 1/2): 0.130812.
    assert attention_distribution(student, teacher).item() == pytest.approx((0.327813 + 0.130812) / 2, rel=1e-4)
    with pytest.raises(ValueError, match="differ in shape"):
        attention_score(student, teacher[..., :1])
    with pytest.raises(ValueError, match="5 heads do not divide the width 12"):
        attention_scores(states(1, 2, 12, seed=1), states(1, 2, 12, seed=2), 5)


@pytest.mark.parametrize("method", ["scores", "minilm"])
def test_attention_is_compared_head_by_head_and_only_where_it_is_the_models(tmp_path, method):
    params = tiny.parameters(tmp_path)
    options, teacher = params.methods[method], tiny.masked_language_model()
    with pytest.raises(StudyError, match="the student has 2 attention heads; allowed: 4"):
        OBJECTIVES[options.objective](tiny.masked_language_model(heads=2), teacher, options)
    teacher.config.position_embedding_type = "relative_key"
    with pytest.raises(StudyError, match="teacher .bert, relative_key positions. has no attention scores"):
        OBJECTIVES[options.objective](tiny.masked_language_model(), teacher, options)
    with pytest.raises(ValueError, match="compares attention head by head; allowed: 4"):
        tiny.parameters(
            tmp_path,
            grid={"methods": [method], "students": {"english": ["two"]}},
            initialisation="random",
            students={"two": {"layers": 2, "width": 24, "heads": 2, "intermediate": 48}},
        )


# Known recipes, written down once more from their formulas


def read(model, ids):
    """Hidden states 0..L and queries, keys, values 1..L, by the model's own outputs and layers."""
    encoder = model.base_model
    hidden = encoder(ids, output_hidden_states=True).hidden_states
    projected = [
        {x: getattr(layer.attention.self, x)(state) for x in ("query", "key", "value")}
        for layer, state in zip(encoder.encoder.layer, hidden, strict=False)
    ]
    return hidden, [None, *projected]


@pytest.mark.parametrize("student", ["L2-H24", "L2-H12"])
def test_distilbert_is_its_formula(tmp_path, student):
    params = tiny.parameters(tmp_path)
    batch, teacher = batch_of(params, tmp_path), tiny.masked_language_model()
    objective = objective_of(params, "distilbert", teacher, student)
    ids = batch["masked_input_ids"]
    with torch.no_grad():
        own, target = objective.student(ids).logits, teacher(ids).logits
        divergence = 0.0
        for s, t in zip(own.flatten(0, 1), target.flatten(0, 1), strict=True):
            p, q = torch.softmax(t / 2, 0), torch.softmax(s / 2, 0)
            divergence += 4 * (p * (p / q).log()).sum().item()
        divergence /= own.shape[0] * own.shape[1]
        picks = [
            -torch.log_softmax(own[b, place], 0)[label].item()
            for b in range(len(ids))
            for place, label in zip(batch["positions"][b], batch["labels"][b], strict=True)
        ]
        last = read(objective.student, ids)[0][-1]
        if student == "L2-H12":
            (layer,) = (m for m in objective.projections.modules() if isinstance(m, torch.nn.Linear))
            last = layer(last)
        else:
            assert not list(objective.projections.modules())[1:]  # equal widths: states as they are
        pairs = zip(last.flatten(0, 1), read(teacher, ids)[0][-1].flatten(0, 1), strict=True)
        cosines = [1 - cosine_loop(a, b) for a, b in pairs]
    expected = 5 * divergence + 2 * sum(picks) / len(picks) + sum(cosines) / len(cosines)
    assert objective(**batch)["loss"].item() == pytest.approx(expected, rel=1e-3)


def test_tinybert_is_its_formula(tmp_path):
    params = tiny.parameters(tmp_path)
    batch, teacher = batch_of(params, tmp_path), tiny.masked_language_model()
    objective = objective_of(params, "tinybert", teacher)
    ids = batch["masked_input_ids"][:2]
    with torch.no_grad():
        expected, (own, own_qk), (target, target_qk) = 0.0, read(objective.student, ids), read(teacher, ids)
    for i, j in ((0, 0), (1, 2), (2, 4)):
        layer = objective.projections["0"][f"{i}-{j}"]
        expected += ((own[i] @ layer.weight.T + layer.bias - target[j]) ** 2).mean().item()
        if i:
            maps = [scores_loop(x["query"], x["key"], 4) for x in (own_qk[i], target_qk[j])]
            expected += score_error_loop(*maps)
    loss = objective(**{key: value[:2] for key, value in batch.items()})["loss"]
    assert loss.item() == pytest.approx(expected, rel=1e-3)


def test_minilm_is_its_formula(tmp_path):
    params = tiny.parameters(tmp_path)
    batch, teacher = batch_of(params, tmp_path), tiny.masked_language_model()
    objective = objective_of(params, "minilm", teacher)
    ids = batch["masked_input_ids"][:2]
    with torch.no_grad():
        own, target = read(objective.student, ids)[1][2], read(teacher, ids)[1][4]
    expected = sum(
        divergence_loop(*(scores_loop(x[first], x[second], 4) for x in (own, target)))
        for first, second in (("query", "key"), ("value", "value"))
    )
    loss = objective(**{key: value[:2] for key, value in batch.items()})["loss"]
    assert loss.item() == pytest.approx(expected, rel=1e-3)
    frozen = freeze_untrained(objective, batch)
    assert len(frozen) == 10 and not any(f".self.{x}." in name for name in frozen for x in ("query", "key", "value"))


# Sums


def test_a_sum_is_the_weighted_sum_of_its_parts_alone(tmp_path):
    params = tiny.parameters(tmp_path)
    batch = batch_of(params, tmp_path)
    alone = ["od", "mlm", "hs-last", "mha-minilmv2"]
    parts = [
        {"weight": weight, **params.methods[name].model_dump(exclude={"learning_rate"})}
        for weight, name in zip((2.0, 0.5, 3.0, 7.0), alone, strict=True)
    ]
    method = METHOD.validate_python({"objective": "sum", "learning_rate": 0.1, "parts": parts})
    assert METHOD.validate_json(method.model_dump_json()) == method
    params = params.model_copy(update={"methods": params.methods | {"sum": method}})
    whole, singles = objective_of(params, "sum"), [objective_of(params, name) for name in alone]
    for objective in (whole, *singles):
        objective.start(batch)
    weighted = [w * o(**batch)["loss"].item() for w, o in zip((2.0, 0.5, 3.0, 7.0), singles, strict=True)]
    assert whole(**batch)["loss"].item() == pytest.approx(sum(weighted), rel=1e-5)


SUM = {"objective": "sum", "learning_rate": 0.1}
MISTAKES = {
    "nothing": ([{"weight": 0.0, "objective": "masked_language_modelling"}], "sum to nothing"),
    "unknown": ([{"objective": "hidden"}], "objective 'hidden' is no part of a sum; allowed: masked_language"),
    "nested": ([{"objective": "sum", "parts": []}], "objective 'sum' is no part"),
    "rate": ([{"objective": "hidden_state", "mapping": "last", "learning_rate": 0.1}], "learning_rate of a part"),
    "option": ([{"objective": "hidden_state", "mapping": "lowest"}], "hidden_state: mapping: Input should be"),
    "negative": ([{"weight": -1.0, "objective": "hidden_state", "mapping": "last"}], "greater than or equal to 0"),
}


@pytest.mark.fast
@pytest.mark.parametrize("name", MISTAKES)
def test_mistakes_of_a_sum_are_named(name):
    parts, named = MISTAKES[name]
    with pytest.raises(ValueError, match=named):
        METHOD.validate_python({**SUM, "parts": parts})


SIZES = Encoder(layers=4, width=24, heads=4, intermediate=48), Encoder(layers=2, width=12, heads=4, intermediate=24)


@pytest.mark.parametrize("fused", [True, False])
def test_the_cost_model_knows_every_objective(tmp_path, fused):
    known = tiny.parameters(tmp_path).methods
    methods = {known[name].objective: known[name] for name in (*METHODS, *WITH_SUMS)}
    assert methods.keys() == OBJECTIVES.keys()
    for own in methods.values():
        counted = count(Workload(*SIZES, own, 60, 8, 16, fast_paths=("fused-losses",) if fused else ()))
        assert counted.flops > 0 and counted.bytes > 0 and counted.memory > 0, own.objective


def test_an_objective_that_the_cost_model_does_not_know_is_an_error():
    with pytest.raises(StudyError, match="the cost model does not know objective 'none'"):
        count(Workload(*SIZES, Untrained(objective="none"), 60, 8, 16))


# Runs


RIVALS = ["se-mse", "se-relational", "tinybert", "minilm", "distilbert"]


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
    assert len(passes) <= 3  # before training: the start of every part, the search for what is trained
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
