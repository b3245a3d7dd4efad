"""The benchmark on small models: what is timed, what the floor repeats, what its tables and the cost model say."""

from __future__ import annotations

import json
import math
import shutil
from pathlib import Path

import pytest
import tiny
import torch
from constructed_results import make_study, write_grid
from torch import nn
from torch.utils.flop_counter import FlopCounterMode
from transformers import default_data_collator

from study import StudyError
from study.distillation.mappings import layer_mapping
from study.distillation.objectives import OBJECTIVES
from study.distillation.taps import read_activations
from study.distillation.trainer import switch_off_dropout
from study.execution import run_notebook
from study.sections import Encoder
from study.speed import benchmark, cost
from study.speed import tables as speed
from study.speed.benchmark import applicable, measure_method
from study.speed.floor import floor
from study.speed.parts import PARTS

ROOT = Path(__file__).parents[1]
SMALL = {
    "vocabulary": 1000,
    "teacher": tiny.TEACHER,
    "student": {"layers": 2, "width": 12, "heads": 4, "intermediate": 24},
    "sequence_length": 16,
    "batch_size": 4,
    "methods": ["hs-uniform", "mha-minilmv2"],
    "peers": ["trainer-full-vocabulary"],
    "threads": 1,
    "warmup_steps": 1,
    "steps": 3,
    "rounds": 1,
}


@pytest.fixture
def params(tmp_path):
    return tiny.parameters(tmp_path, benchmark=SMALL)


def step(name: str, *fast_paths: str, precision="fp32") -> dict:
    return {"kind": "method", "name": name, "precision": precision, "fast_paths": list(fast_paths)}


def test_a_whole_benchmark(params, tmp_path, capsys):
    params = params.model_copy(update={"benchmark": params.benchmark.model_copy(update={"methods": ["hs-last"]})})
    result = benchmark.benchmark(params, tmp_path / "benchmark.json")
    assert json.loads((tmp_path / "benchmark.json").read_text()) == result
    ladder = [s["fast_paths"] for s in result["subjects"] if s["kind"] == "method" and s["precision"] == "fp32"]
    assert ladder == [[], ["kept-memory"], ["kept-memory", "shared-teacher"]]
    table = speed.steps(result)
    assert len(table) == len(result["subjects"]) and set(table["subject"]) == {"hs-last", "trainer-full-vocabulary"}
    mine = table[table["subject"] == "hs-last"]
    assert (mine[list(PARTS)].sum(axis=1) > 0).all() and (mine["efficiency"] > 0).all()  # how long is the machine's
    assert table["memory"].between(100, 4000).all()
    assert result["peaks"]["fp32"] > 1e9 and result["peaks"]["bandwidth"] > 1e8
    progress = capsys.readouterr().out
    assert f"[{len(table)}/{len(table)}] trainer-full-vocabulary fp32 | " in progress and "tokens/s" in progress
    for precision in table[table["fast_paths"] != ""]["precision"].unique():
        figure = speed.step_times(result, precision)
        assert len(figure.axes[0].get_yticks()) == 3


def test_an_unknown_peer_is_named_before_anything_is_measured(params, tmp_path):
    wrong = params.model_copy(update={"benchmark": params.benchmark.model_copy(update={"peers": ["magic"]})})
    with pytest.raises(StudyError, match="benchmark.peers: 'magic' is unknown; allowed: bertdistiller"):
        benchmark.benchmark(wrong, tmp_path / "benchmark.json")
    assert not (tmp_path / "benchmark.json").exists()


def test_parts_of_a_step_add_up_and_nothing_is_read_that_is_not_there(params):
    for name in ("mlm", "od", "hs-uniform", "mha-direct"):
        result = measure_method(params, step(name, "kept-memory", "fused-losses"))
        assert len(result["seconds"]) == 3
        assert (result["parts"]["teacher forward"] > 1e-4) == (name != "mlm"), name
        assert all(result["parts"][part] > 0 for part in PARTS if part != "teacher forward"), name


def test_a_shared_teacher_is_not_run_in_a_timed_step(params, monkeypatch):
    passes = []
    monkeypatch.setattr(
        "study.distillation.objectives.base.read_activations",
        lambda model, *a, **k: passes.append(model.training) or read_activations(model, *a, **k),
    )
    measure_method(params, step("hs-uniform", "shared-teacher"))
    filled = 4  # batches of the stream; the one that finds what to train comes before sharing
    assert passes.count(False) == filled + 1 and passes.count(True) >= filled


def test_levers_change_what_they_say_and_nothing_else(params, monkeypatch):
    seen, compiled = [], []

    class Recorder(benchmark.DistillationTrainer):
        def train(self):
            seen.append((self.model, self.args))
            return super().train()

    monkeypatch.setattr(benchmark, "DistillationTrainer", Recorder)
    monkeypatch.setattr(torch, "compile", lambda loss: compiled.append(loss.__name__) or loss)
    subject = step("mha-minilmv2", "fused-losses")
    for lever in (None, *benchmark.LEVERS):
        result = measure_method(params, subject | {"lever": lever})
        assert len(result["seconds"]) == 3
    attention = [objective.student.config._attn_implementation for objective, _ in seen]
    optimisers = [str(arguments.optim) for _, arguments in seen]
    modules = [getattr(objective.losses, "__name__", "compiled") for objective, _ in seen]
    assert attention == ["eager", "sdpa", "eager", "eager", "eager"]
    assert [name.rpartition(".")[2].lower() for name in optimisers] == [
        *["adamw_torch_fused"] * 3,
        "adamw_torch",
        "adamw_torch_fused",
    ]
    fused = "study.distillation.fused"
    assert modules == [fused, fused, "compiled", fused, fused]
    assert compiled == ["output_distribution", "attention_relation"]


def test_levers_are_measured_beside_the_step_as_it_is(params, tmp_path, monkeypatch, capsys):
    lever = benchmark.Lever(("hs-uniform", "od"), processes=2)  # `od` is not among the benchmark's methods
    monkeypatch.setattr(benchmark, "LEVERS", {"two processes": lever})
    result = benchmark.levers(params, tmp_path / "levers.json")
    assert json.loads((tmp_path / "levers.json").read_text()) == result
    (row,) = speed.levers(result).to_dict("records")
    (only,) = result["levers"][0]["rounds"]
    assert (row["lever"], row["method"]) == ("two processes", "hs-uniform")
    assert row["ratio"] == row["lowest"] == row["highest"] == only["with"] / only["without"] > 0
    assert "two processes | hs-uniform | " in capsys.readouterr().out


def test_fast_paths_that_change_nothing_are_left_out():
    assert applicable("masked_language_modelling", "bf16") == ["kept-memory"]
    assert applicable("hidden_state", "fp32") == ["kept-memory", "shared-teacher"]
    assert applicable("output_distribution", "bf16") == [
        "kept-memory",
        "fused-losses",
        "rounded-teacher",
        "shared-teacher",
    ]


def test_the_floor_repeats_every_product_of_forward_and_backward_once(monkeypatch):
    """A linear map: x W, and for the gradients of W and x one product each; a batched product and its two."""
    layer, x = nn.Linear(5, 7, bias=False), torch.randn(3, 5, requires_grad=True)
    left, right = torch.randn(2, 3, 4, requires_grad=True), torch.randn(2, 4, 6, requires_grad=True)
    calls = []
    for name in ("mm", "bmm"):
        original = getattr(torch, name)

        def count(first, second, out, name=name, original=original):
            calls.append((name, tuple(first.shape), tuple(second.shape)))
            return original(first, second, out=out)

        monkeypatch.setattr(torch, name, count)
    seconds = floor(lambda: (layer(x).sum() + torch.ops.aten.bmm(left, right).sum()).backward(), repeats=1)
    assert seconds > 0
    expected = {
        ("mm", (3, 5), (5, 7)),
        ("mm", (7, 3), (3, 5)),
        ("mm", (3, 7), (7, 5)),
        ("bmm", (2, 3, 4), (2, 4, 6)),
        ("bmm", (2, 4, 3), (2, 3, 6)),
        ("bmm", (2, 3, 6), (2, 6, 4)),
    }
    assert set(calls) == expected and len(calls) == 3 * len(expected)


def seconds_of(speed: float) -> dict:
    quartiles = {"lower_quartile": 0.8, "median": 1.0, "upper_quartile": 1.25}
    return {f"{name}_seconds": factor / speed for name, factor in quartiles.items()}


def result_of(subjects: list[tuple]) -> dict:
    """Constructed result: (kind, name, precision, fast paths, tokens per second by round)."""
    return {
        "subjects": [
            {"kind": kind, "name": name, "precision": precision, **({"fast_paths": paths} if kind == "method" else {})}
            | {"rounds": [{"left_out": "absent"} if s is None else seconds_of(s) for s in speeds]}
            for kind, name, precision, paths, speeds in subjects
        ]
    }


def test_ratios_pair_all_rounds_and_skip_what_was_left_out():
    all_paths = ["kept-memory", "fused-losses", "shared-teacher"]
    result = result_of(
        [
            ("method", "mha-minilmv2", "fp32", all_paths[:count], speeds)
            for count, speeds in enumerate([[10, 20], [20, 30], [40, 60], [80, 120]])
        ]
        + [("method", "od", "fp32", [], [5, 5])]
        + [
            ("peer", "bertdistiller-minilmv2", "fp32", None, [10, 20]),
            ("peer", "torchdistill-logits", "fp32", None, [None]),
        ]
    )
    table = speed.ratios(result)
    assert list(table["fast_paths"]) == ["none", "kept-memory, fused-losses", ", ".join(all_paths)]
    assert list(table["ratio"]) == pytest.approx([1.0, 3.5, 7.0])  # medians of 1 2 0.5 1, of 4 6 2 3, of 8 12 4 6
    spread = 1.25 / 0.8
    assert list(table["lowest"]) == pytest.approx([0.5 / spread, 2.0 / spread, 4.0 / spread])
    assert list(table["highest"]) == pytest.approx([2.0 * spread, 6.0 * spread, 12.0 * spread])


# The cost model


BERT = Encoder(layers=12, width=768, heads=12, intermediate=3072)
SMALLER = Encoder(layers=3, width=192, heads=12, intermediate=768)


def workload_of(params, method: str, **changes) -> cost.Workload:
    return cost.Workload(BERT, SMALLER, params.methods[method], 1000, 16, 128, **changes)


@pytest.mark.parametrize("method", ["mlm", "od", "hs-uniform-consecutive", "hs-last", "mha-minilmv2", "mha-direct"])
@pytest.mark.parametrize("shared", [False, True])
def test_counted_products_are_those_that_a_step_makes(params, method, shared):
    """Against PyTorch's own counter, on the benchmark's step."""
    teacher, student = benchmark.models(params)
    switch_off_dropout(student)
    chosen = params.methods[method]
    objective = OBJECTIVES[chosen.objective](student, teacher, chosen, params.distillation.inputs)
    stream = benchmark.sequences(params, 4)
    batch = default_data_collator([stream[i] for i in range(4)])
    activations = None
    if shared and objective.teacher is not None:
        with torch.no_grad():
            activations = objective.read_teacher(batch)
        objective.read_teacher = lambda batch: activations

    def in_place(shape, left, right, **keywords):  # the counter knows its like that is not in place
        return 2 * math.prod(left) * right[-1]

    mapping = {torch.ops.aten.baddbmm_: in_place}
    with FlopCounterMode(display=False, custom_mapping=mapping) as counter:
        objective(**batch)["loss"].backward()
    paths = ("fused-losses", "shared-teacher") if shared else ("fused-losses",)
    sizes = params.benchmark
    shapes = sizes.teacher, sizes.student, chosen, sizes.vocabulary
    workload = cost.Workload(*shapes, 4, 16, masked=2 / 16, fast_paths=paths)
    assert cost.count(workload).flops == pytest.approx(counter.get_total_flops(), rel=0.02)


def test_efficiencies_come_back_from_made_up_steps(params):
    device = cost.Device("made up", 1e12, 1e11)
    runs = [workload_of(params, name) for name in ("mlm", "od", "hs-uniform", "mha-minilmv2", "mha-direct")]
    seconds = [w.flops / (0.5 * 1e12) + w.bytes / (0.25 * 1e11) for w in map(cost.count, runs)]
    found = cost.fit(runs, seconds, device)
    assert (found.flops, found.bytes) == pytest.approx((0.5, 0.25))
    assert [cost.predict(run, device, found)["seconds"] for run in runs] == pytest.approx(seconds)
    with pytest.raises(ValueError, match="at least 2"):
        cost.fit(runs[:1], seconds[:1], device)


def test_devices_share_the_batch_and_exchange_gradients(params):
    run = workload_of(params, "mha-minilmv2", steps=10)
    device = cost.Device("made up", 1e12, 1e11, memory=1e10, link=1e10, price=2.0)
    one, eight = (cost.predict(run, device, cost.Efficiency(0.5, 0.5), n) for n in (1, 8))
    assert one["products"] == pytest.approx(8 * eight["products"]) and one["exchange"] == 0
    assert eight["exchange"] == pytest.approx(10 * 2 * 7 / 8 * 4 * cost.count(run).parameters / 1e10)
    assert one["dollars"] == pytest.approx(one["seconds"] / 3600 * 2)
    assert eight["dollars"] > one["dollars"] and eight["memory"] < one["memory"]
    with pytest.raises(ValueError, match="3 devices"):
        cost.predict(run, device, cost.Efficiency(0.5, 0.5), 3)


def test_cost_follows_what_is_read(params):
    """The teacher is read to its last needed layer, more pairs cost more, sharing spares the teacher."""
    flops = {
        name: cost.count(workload_of(params, name)).flops for name in params.methods if not name.startswith("none")
    }
    assert flops["mha-minilmv2"] < flops["hs-last"] < flops["hs-uniform"] < flops["hs-uniform-consecutive"]
    assert set(layer_mapping("last", 12, 3)[3]) == {12}
    teacher = (
        cost.count(workload_of(params, "hs-last")).flops
        - cost.count(workload_of(params, "hs-last", fast_paths=("shared-teacher",))).flops
    )
    assert teacher == 16 * 128 * 12 * (8 * 768**2 + 4 * 768 * 3072 + 4 * 128 * 768)


def test_an_objective_that_is_not_known_is_an_error(params):
    """Instead of a count that leaves its loss out."""
    with pytest.raises(StudyError, match="objective 'none'; allowed: those it counts"):
        cost.count(cost.Workload(BERT, SMALLER, params.methods["none"], 1000, 16, 128))


def test_predictions_of_a_stage_use_its_own_runs(tmp_path):
    """Steps of the results of a whole plan: seconds per step are tokens over tokens per second."""
    study = make_study(tmp_path, ["none", "od", "hs-last"])
    write_grid(study)
    table = cost.stage_steps(study.load(), study.plan)
    assert set(table["method"]) == {"od", "hs-last"} and len(table) == 4
    row = table[(table["method"] == "od") & (table["student"] == "L3-H192")].iloc[0]
    assert row["seconds"] == pytest.approx(16 * 128 / 2353.0)
    assert row["workload"].student.width == 192 and row["workload"].method.objective == "output_distribution"


def test_wall_time_is_that_of_a_whole_run_or_none(tmp_path):
    """A notebook of the report alone, or a part of the runs, is not the time of the study."""
    plan = make_study(tmp_path, ["none", "od"]).plan
    folder = plan.folder / "runs" / "notebooks"
    folder.mkdir(parents=True)
    names = [f"{d.stage}_{d.name}" for d in plan.descriptions if d.stage in ("teacher", "distill", "evaluate")]
    for name in ("80_report", "sources", *names):
        (folder / f"{name}.ipynb").write_text(json.dumps({"metadata": {"papermill": {"duration": 2.0}}}))
    counts = {"sources": 1} | {
        kind: sum(n.startswith(kind) for n in names) for kind in ("teacher", "distill", "evaluate")
    }
    table = cost.stage_seconds(plan).set_index("stage")
    assert table["count"].to_dict() == counts
    assert table["seconds"].to_dict() == {kind: 2.0 * count for kind, count in counts.items()}
    (folder / f"{names[-1]}.ipynb").unlink()
    assert cost.stage_seconds(plan).empty


def test_tables_and_figures_are_drawn_again_from_what_was_measured(tmp_path):
    committed = ROOT / "reports/benchmark/amd-epyc-avx512-bf16"
    folder = tmp_path / "measured"
    folder.mkdir()
    for name in ("benchmark", "levers"):
        shutil.copy(committed / f"{name}.json", folder)
    values = {"measured": str(folder), "output": str(tmp_path / "nowhere")}
    run_notebook(ROOT / "notebooks/60_benchmark.ipynb", tmp_path / "executed.ipynb", values, ROOT)
    for table in ("steps.csv", "ratios.csv", "levers.csv"):
        assert (folder / table).read_text() == (committed / table).read_text()
    assert (folder / "step_times_bf16.png").stat().st_size > 10_000 and not (tmp_path / "nowhere").exists()
