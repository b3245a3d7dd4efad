"""Runtimes side by side: every one timed on the same inputs, and the choice by latency and score together."""

from __future__ import annotations

from pathlib import Path

import pytest
import tiny
from datasets import DatasetDict

from study.analysis.figures.runtimes import quality_latency
from study.analysis.figures.style import STYLES, save
from study.analysis.runtimes import Footprint, Quality, RuntimesResult, Timing, choices, timings
from study.data import storage
from study.execution import run_notebook
from study.records import SCHEMA, read_record
from study.runtime import environment

ROOT = Path(__file__).parents[1]


def result(scores: dict[tuple[str, str, str], float], milliseconds: dict[tuple[str, str], float]) -> RuntimesResult:
    common = {"input": "texts", "batch_size": 1, "threads": 1, "runs": 9, "p99": None}
    return RuntimesResult(
        schema=SCHEMA, profile="test", setting="english", environment=environment(), absent={}, load=[0.0, 0.0],
        timings=[
            Timing(model=model, runtime=runtime, lower_quartile=ms / 2e3, p50=ms / 1e3, upper_quartile=ms / 1e3,
                   p90=ms / 5e2, **common)
            for (model, runtime), ms in milliseconds.items()
        ],
        footprints=[
            Footprint(model=model, runtime=runtime, file_bytes=2_000_000, memory_bytes=None)
            for model, runtime in milliseconds
        ],
        qualities=[
            Quality(model=model, method=method, run=model, precision=precision, cosine=1.0, tasks=tasks)
            for (model, method, precision), score in scores.items()
            for tasks in [{"a": score, "b": score + 0.2}]
        ],
    )  # fmt: skip


def test_the_front_is_what_no_faster_choice_equals(tmp_path):
    made = result(
        {
            ("teacher", "teacher", "fp32"): 0.7,
            ("teacher", "teacher", "int8"): 0.69,
            ("small", "od", "fp32"): 0.65,
            ("small", "od", "int8"): 0.64,
            ("small", "mha", "int8"): 0.635,
            ("small", "none", "int8"): 0.63,
            ("small", "hs", "int8"): 0.62,
        },
        {
            ("teacher", "eager"): 40.0,
            ("teacher", "onnx"): 41.0,
            ("teacher", "onnx-int8"): 10.0,
            ("small", "eager"): 20.0,
            ("small", "onnx-int8"): 5.0,
        },
    )
    table = choices(made)
    assert table[["model", "runtime"]].to_numpy().tolist()[:3] == [
        ["teacher", "onnx"],
        ["teacher", "eager"],
        ["small", "eager"],
    ]
    # neither the untrained floor, nor what does not score above it, nor what is slower or worse than another as fast
    chosen = table[table["front"]]
    assert chosen[["model", "method", "runtime"]].to_numpy().tolist() == [
        ["teacher", "teacher", "eager"],
        ["teacher", "teacher", "onnx-int8"],
        ["small", "od", "onnx-int8"],
    ]
    assert chosen["score"].tolist() == pytest.approx([80, 79, 74])
    assert chosen["loss"].tolist() == pytest.approx([0, 1, 6])
    assert chosen["speed_up"].tolist() == pytest.approx([1, 4, 8])
    assert chosen["megabytes"].tolist() == [2, 2, 2]
    assert timings(made)["texts_per_second"].tolist()[0] == pytest.approx(25)
    for own in (3, 4):
        made.qualities[own] = made.qualities[own].model_copy(update={"tasks": {"a": 0.62, "b": 0.82}})
    assert set(choices(made).query("front")["model"]) == {"teacher"}
    figure = quality_latency(table)
    shown = [words.get_text() for words in figure.legends[0].get_texts()][:3]
    assert shown == ["teacher", "none: as initialised", "OD: output distribution"]  # in the order of figures
    colors = {line.get_color() for line in figure.axes[0].lines if line.get_marker() != "None"}
    assert len(colors) == table["method"].nunique()
    assert not colors & {"black", STYLES["mlm"].color}  # a marker is a runtime, so the teacher must not look like MLM
    assert save(figure, tmp_path, "picture").stat().st_size > 10_000


def test_every_model_is_timed_in_every_runtime_and_scored_in_every_precision(tmp_path):
    pytest.importorskip("onnxscript")
    tiny.workspace(tmp_path)
    plan = tiny.plan(tmp_path, runtimes={"runtimes": ["eager", "onnx", "onnx-int8"]})
    layout = plan.layout("english")
    splits = {"train": tiny.sentences(60, 1), "development": tiny.sentences(40, 2), "test": tiny.sentences(8, 3)}
    storage.save(DatasetDict(splits), layout.tasks / "topic")
    from study.shipping.runtimes import measure_runtimes

    measure_runtimes(plan, "english", tmp_path / "runtimes.json")
    made = read_record(tmp_path / "runtimes.json", RuntimesResult)
    keys = {(t.model, t.runtime, t.input, t.batch_size) for t in made.timings}
    assert keys == {  # the model has 40 positions: 512 tokens are left out
        (model, runtime, read, batch)
        for model in ("teacher", "L2-H24")
        for runtime in ("eager", "onnx", "onnx-int8")
        for read in ("texts", "8")
        for batch in (1, 4)
    }
    assert all(5 <= t.runs < 100 and t.p99 is None and t.lower_quartile <= t.p50 <= t.p90 for t in made.timings)
    sizes = {(f.model, f.runtime): f for f in made.footprints}
    assert sizes["L2-H24", "eager"].file_bytes < sizes["teacher", "eager"].file_bytes
    memory = [sizes["teacher", runtime].memory_bytes for runtime in ("onnx", "eager")]
    assert None in memory or 1e7 < memory[0] < memory[1]  # the one does without PyTorch
    quality = {(q.model, q.precision): q for q in made.qualities}
    assert set(quality) == {("teacher", "fp32"), ("teacher", "int8")}  # the student is not trained
    assert quality["teacher", "fp32"].cosine == pytest.approx(1, abs=1e-6)
    assert 0.9 < quality["teacher", "int8"].cosine < 0.999999
    assert len(choices(made)) == 3


def test_tables_and_figure_are_drawn_again_from_what_was_measured(tmp_path):
    committed = ROOT / "reports/runtimes/english"
    values = {"profile": "laptop", "measured": str(committed / "runtimes.json"), "output": str(tmp_path)}
    run_notebook(ROOT / "notebooks/67_runtimes.ipynb", tmp_path / "executed.ipynb", values, ROOT)
    for table in ("timings.csv", "choices.csv"):
        assert (tmp_path / "english" / table).read_text() == (committed / table).read_text()
    with pytest.raises(Exception, match="setting = 'english'; at this place allowed: 'multilingual'"):
        run_notebook(
            ROOT / "notebooks/67_runtimes.ipynb",
            tmp_path / "executed.ipynb",
            values | {"setting": "multilingual"},
            ROOT,
        )
