"""A student watched while it trains, and the options that its diagnosis tries."""

from __future__ import annotations

import pandas as pd
import pytest
import tiny
import torch
from datasets import DatasetDict
from matplotlib.colors import to_hex
from tiny_training import objective_of, stream
from transformers import default_data_collator

from study import StudyError
from study.analysis.dynamics import courses, measures
from study.analysis.figures.dynamics import last_layer_by_tokens, layers_by_tokens
from study.data import storage
from study.data.pretrained import load_tokenizer
from study.descriptions import LayerComparison
from study.distillation import losses
from study.distillation.distil import distil
from study.distillation.students import create_student
from study.distillation.trainer import split_by_layer
from study.evaluation.dynamics import Microscope, watch
from study.evaluation.finetune import splits_without_test
from study.evaluation.representations import probe_last_layers
from study.files import Layout
from study.plan import make_run
from study.records import read_record
from study.records_beside import DynamicsResult, Snapshot, Watched
from study.sections import Encoder

MLM = {"objective": "masked_language_modelling", "learning_rate": 0.0003}
MINILMV2 = {"objective": "attention_relation", "learning_rate": 0.001, "relation_heads": 4, "value_weight": 3.0}
SIZES = {"sequences": 8, "relation_sequences": 2}


@pytest.fixture
def folder(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    splits = {"train": tiny.sentences(96, 1), "development": tiny.sentences(48, 2)}
    storage.save(DatasetDict(splits), Layout(tmp_path, "english").tasks / "topic")
    return tiny.workspace(tmp_path)


def test_watching_changes_nothing_and_tells_what_the_trained_student_is(folder):
    plan = tiny.plan(folder, representations=SIZES)
    layout = plan.layout("english")
    (description,) = plan.of(LayerComparison)
    run = plan.run("english", "mha-minilmv2", "L2-H24", 1)
    result = watch(plan, "english", ["mha-minilmv2"], "L2-H24", folder / "dynamics.json", ["topic"], [0, 1])
    assert read_record(folder / "dynamics.json", DynamicsResult) == result
    (watched,) = result.runs
    assert [at.step for at in watched.snapshots] == [0, 1, run.distillation.steps]
    assert watched.snapshots[0].cka != watched.snapshots[2].cka
    assert len(result.teacher["topic"]) == 5 and len(watched.snapshots[0].probes["topic"]) == 3

    distil(run, layout, folder / "unwatched")
    (student,) = (folder / "scratch" / "dynamics").glob("*/*/student")
    assert tiny.identical(tiny.weights(student), tiny.weights(folder / "unwatched"))
    tokenizer, seed = load_tokenizer(layout.teacher), description.seed
    splits = splits_without_test(description, layout, tokenizer, seed)
    probes = probe_last_layers(description, folder / "unwatched", splits, tokenizer, seed, layout.tasks)["topic"]
    assert watched.snapshots[2].probes["topic"][1:] == [probes.last_but_one, probes.last]


def test_students_of_other_budgets_are_looked_at_where_they_are_trained(folder):
    plan = tiny.plan(folder, representations=SIZES, budgets={"short": {"steps": 2}, "long": {"steps": 9}})
    layout, short = plan.layout("english"), make_run(plan.params, "english", "mlm", "L2-H24", 1, "short")
    distil(short, layout, layout.student(short.model))
    asked = (plan, "english", ["mlm"], "L2-H24", folder / "dynamics.json", ["topic"], [2])
    result = watch(*asked, ends=["short", "long"], examples=40)
    assert [(run.budget, [at.step for at in run.snapshots]) for run in result.runs] == [
        ("base", [2, 6]),
        ("short", [2]),
    ]
    assert result.runs[0].snapshots[0] != result.runs[1].snapshots[0]  # schedules of their own
    assert watch(*asked, budget="short", examples=40).runs[0].snapshots == result.runs[1].snapshots


def test_what_was_seen_is_not_looked_at_again(folder, capsys, monkeypatch):
    plan = tiny.plan(folder, representations=SIZES)
    asked = (plan, "english", ["mlm"], "L2-H24", folder / "dynamics.json", ["topic"], [0])
    run = asked[0].run("english", "mlm", "L2-H24", 1)
    distil(run, asked[0].layout("english"), asked[0].layout("english").student(run.model))
    first = watch(*asked, ends=["base"])
    assert len(first.runs) == 2
    capsys.readouterr()
    for name in ("probes", "look", "activations"):
        monkeypatch.delattr(Microscope, name)
    again = watch(*asked, ends=["base"])
    assert (again.runs, again.teacher) == (first.runs, first.teacher)
    assert "step" not in capsys.readouterr().out


@pytest.mark.parametrize(
    ("methods", "tasks", "message"),
    [
        (["mlm"], ["sts-b"], "task 'sts-b' is not one of setting english; allowed: topic"),
        (["none"], ["topic"], "method 'none' trains nothing; allowed: a method that trains"),
        (["magic"], ["topic"], "method 'magic' is unknown"),
        ([], ["topic"], "budget 'huge' is unknown; allowed: base"),
    ],
)
def test_what_cannot_be_watched_is_told_before_any_work(folder, methods, tasks, message):
    plan = tiny.plan(folder, representations=SIZES)
    with pytest.raises(StudyError, match=message):
        watch(plan, "english", methods, "L2-H24", folder / "dynamics.json", tasks, [0], ends=["huge"])


def test_a_weighted_value_relation_is_the_sum_by_hand(tmp_path):
    params = tiny.parameters(tmp_path, methods={"mha-minilmv2": MINILMV2})
    training = stream(params, tiny.tokenizer(tmp_path / "words"), length=16)
    objective = objective_of(params, "mha-minilmv2", start=training).eval()
    batch = default_data_collator([training[i] for i in range(4)])
    student, teacher = objective.read_student(batch), objective.read_teacher(batch)
    heads = params.methods["mha-minilmv2"].relation_heads
    by_hand = sum(
        weight * losses.attention_relation(s, t, heads)
        for weight, (_, s, t) in zip((1, 1, 3), objective.pairs(student, teacher), strict=True)
    )
    assert objective(**batch)["loss"].item() == pytest.approx(by_hand.item(), rel=1e-5)


def test_layers_learn_at_decaying_rates():
    student = tiny.masked_language_model(layers=3)
    names = {id(parameter): name for name, parameter in student.named_parameters()}
    groups = [{"params": list(student.parameters()), "lr": 0.8, "weight_decay": 0.1}]
    rates = {}
    for group in split_by_layer(groups, student, 0.5):
        assert group["weight_decay"] == 0.1
        rates |= {names[id(parameter)]: group["lr"] for parameter in group["params"]}
    assert rates.keys() == {name for name, _ in student.named_parameters()}
    for name, rate in rates.items():
        layer = next((i for i in (1, 2, 3) if f"layer.{i - 1}." in name), 0 if ".embeddings." in name else 3)
        assert rate == pytest.approx(0.8 * 0.5 ** (3 - layer)), name


def test_a_decay_reaches_the_optimiser(folder):
    plan = tiny.plan(folder, methods={"mlm": MLM | {"layer_decay": 0.01}})
    layout = plan.layout("english")
    distil(plan.run("english", "mlm", "L2-H24", 1), layout, folder / "decayed")
    distil(tiny.plan(folder).run("english", "mlm", "L2-H24", 1), layout, folder / "whole")
    distil(tiny.plan(folder).run("english", "none", "L2-H24", 1), layout, folder / "start")
    start, moved = tiny.weights(folder / "start"), {}
    for name in ("decayed", "whole"):
        trained = tiny.weights(folder / name)
        moved[name] = {key: (trained[key] - start[key]).abs().max().item() for key in start}
    (lower,) = (key for key in start if key.endswith("layer.0.intermediate.dense.weight"))
    (upper,) = (key for key in start if key.endswith("layer.1.intermediate.dense.weight"))
    assert 0 < moved["decayed"][lower] < 0.1 * moved["whole"][lower]
    assert moved["decayed"][upper] > 0.5 * moved["whole"][upper]


def test_a_start_without_the_last_layer_takes_the_one_below():
    """Teacher of 5 layers, student of 2: uniform on 5 takes 2 and 5, on the lower 4 takes 2 and 4."""
    teacher = tiny.masked_language_model(layers=5)
    sizes = Encoder(layers=2, width=24, heads=4, intermediate=48)
    student = create_student(teacher, sizes, "teacher-layers-but-last")
    for own, taken in ((0, 1), (1, 3)):
        mine, other = (m.base_model.encoder.layer[i].state_dict() for m, i in ((student, own), (teacher, taken)))
        assert all(torch.equal(mine[key], other[key]) for key in other)


def _result() -> DynamicsResult:
    def at(step: int, scores: list[float], cka: float) -> Snapshot:
        return Snapshot(
            step=step,
            tokens=10 * step,
            cka=[[0.1, 0.2, 0.3, 0.4], [0.5, 0.6, 0.7, cka]],
            relation_divergence={
                name: [[9.0] * 4, [9.0, 9.0, value, 9.0]] for name, value in zip("qkv", (1.0, 2.0, 6.0), strict=True)
            },
            probes={"topic": scores},
        )

    environment = {key: "x" for key in ("python", "torch", "transformers", "datasets", "processor", "date")}
    return DynamicsResult(
        schema=2,
        profile="test",
        setting="english",
        environment=environment | {"cores": 1, "threads": 1},
        commit=None,
        hashes={},
        student="S",
        seed=1,
        relation_heads=2,
        teacher={"topic": [0.5] * 5},
        runs=[
            Watched(
                method="od",
                budget="base",
                options={},
                initialisation="random",
                steps=4,
                snapshots=[at(0, [0.5, 0.6, 0.7], 0.8), at(2, [0.5, 0.4, 0.3], 0.8), at(4, [0.6, 0.5, 0.8], 0.9)],
            )
        ],
    )


def test_tables_by_hand():
    measured = measures(_result())
    last = measured[measured["step"] == 4].set_index(["measure", "layer"])["value"]
    assert last["topic", 2] == pytest.approx(80) and last["divergence", 2] == pytest.approx(3)
    assert (last["cka", 1], last["cka", 2]) == (0.2, 0.9)  # layers 2 and 4 of the teacher's 4
    course = courses(measured).set_index("layer")
    assert list(course["lost"]) == pytest.approx([0, 20, 40]) and list(course["at tokens"]) == [0, 20, 20]
    assert course["regained"].iloc[1:].tolist() == pytest.approx([0.5, 1.25]) and course["regained"].isna().iloc[0]


@pytest.mark.parametrize("snapshots", [3, 1])
def test_figures_draw_every_layer_and_method(snapshots):
    whole = _result()
    (run,) = whole.runs
    ends = run.model_copy(update={"budget": "long", "snapshots": run.snapshots[-1:]})
    kept = run.model_copy(update={"snapshots": run.snapshots[-snapshots:]})
    result = whole.model_copy(update={"runs": [kept, ends]})
    layers = layers_by_tokens(measures(result), result, ["od"])
    (axes,) = layers.axes
    lines = [line for line in axes.get_lines() if len(line.get_xdata()) == snapshots and line.get_marker() == "o"]
    drawn = [tuple(line.get_ydata()) for line in lines if line.get_markerfacecolor() != "white"]
    expected = [[100 * at.probes["topic"][layer] for at in kept.snapshots] for layer in range(3)]
    assert drawn == [pytest.approx(tuple(values)) for values in expected]
    hollow = [line for line in axes.get_lines() if line.get_markerfacecolor() == "white"]
    assert len(hollow) == 3  # the ends of the longer run
    last = last_layer_by_tokens(measures(result), result)
    assert [axes.get_title() for axes in last.axes][:1] == ["topic (dashed: teacher)"] and len(last.axes) == 4
    layers.canvas.draw()
    last.canvas.draw()


@pytest.mark.parametrize("depth", [1, 6])
def test_every_layer_of_a_student_has_a_shade_of_its_own(depth):
    whole, rows = _result(), measures(_result())
    one = rows[rows["layer"] == 0]
    measured = pd.concat([one.assign(layer=layer) for layer in range(depth + 1)])
    (axes,) = layers_by_tokens(measured, whole, ["od"]).axes
    lines = [line for line in axes.get_lines() if line.get_marker() == "o"]
    assert len({to_hex(line.get_color()) for line in lines}) == len(lines) == depth + 1


def test_a_score_is_there_for_each_layer():
    with pytest.raises(ValueError, match="probes.topic has 2 scores; allowed: 3, one a layer"):
        Snapshot(step=0, tokens=0, cka=[[0.1], [0.2]], relation_divergence={}, probes={"topic": [0.1, 0.2]})
