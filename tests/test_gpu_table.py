"""The table of steps on a GPU: its formula, layout, rows, and the measurement itself on a small scale, GPU or not."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import tiny
import torch
from test_benchmark import SMALL

from study import resolve
from study.speed import benchmark, cost, gpu
from study.speed.tables import ratios

DOCS = Path(__file__).parents[1] / "docs" / "performance.md"


@pytest.fixture
def params(tmp_path):
    return tiny.parameters(tmp_path, benchmark=SMALL | {"methods": ["od"], "peers": ["trainer-full-vocabulary"]})


def test_utilisation_by_hand():
    """A card of 100 FLOP/s that needs 4 seconds for 200."""
    assert gpu.utilisation(200.0, 4.0, 100.0) == 0.5


@pytest.mark.parametrize(
    ("card", "peak"),
    [("NVIDIA H100 80GB HBM3", 989e12), ("NVIDIA H100 PCIe", 756e12), ("NVIDIA H200", 989e12)]
    + [("NVIDIA A100-SXM4-80GB", 312e12), ("NVIDIA L40S", 362e12), ("NVIDIA L4", 121e12), ("Tesla K80", None)],
)
def test_peaks_of_makers_are_found_by_the_name_of_a_card(card, peak):
    assert gpu.makers_peak(card) == peak


def constructed(card: str) -> dict:
    quartiles = {"lower_quartile_seconds": 0.9, "median_seconds": 1.0, "upper_quartile_seconds": 1.2}
    method = {"kind": "method", "name": "od", "precision": "bf16"}
    rounds = [quartiles | {"tokens_per_second": 10.0 * n, "flops": 100e12, "memory": 2048.0} for n in (1, 2)]
    slow = quartiles | {"median_seconds": 3.0, "tokens_per_second": 5.0, "memory": 1024.0}
    return {
        "subjects": [
            method | {"fast_paths": [], "rounds": rounds},
            method | {"fast_paths": ["fused-losses", "cuda-graphs"], "rounds": rounds},
            {"kind": "peer", "name": "torchdistill-logits", "precision": "fp32", "rounds": [slow]},
            {"kind": "peer", "name": "bertdistiller", "precision": "fp32", "rounds": [{"left_out": "absent"}]},
        ],
        "peaks": {"bf16": 500e12, "fp32": 50e12, "bandwidth": 1e12},
        "environment": {"processor": card},
    }


def test_rows_of_the_table_are_worked_out_from_the_result_file():
    table = gpu.gpu_steps(constructed("NVIDIA A100-SXM4-80GB"))
    assert list(table["subject"]) == ["od", "od", "torchdistill-logits"]  # what was left out has no row
    assert list(table["fast_paths"]) == ["none", "fused-losses, cuda-graphs", ""]
    row = table.iloc[0]
    assert (row["tokens_per_second"], row["lowest"], row["highest"], row["step"]) == (15.0, 10.0, 20.0, 1000.0)
    assert row["roofline"] == pytest.approx(200.0) and row["efficiency"] == pytest.approx(0.2)
    assert row["mfu"] == pytest.approx(100 / 312) and row["memory"] == 2.0
    assert table.iloc[2][["roofline", "efficiency", "mfu"]].isna().all()
    assert gpu.gpu_steps(constructed("a card of tomorrow"))["mfu"].isna().all()
    assert list(ratios(constructed("NVIDIA A100-SXM4-80GB"))["ratio"]) == [3.0, 3.0]


def test_the_scale_is_the_papers_and_its_rows_are_named_in_the_documentation():
    """A GPU's rows that are missing are named where one looks for them, and by the command."""
    params = gpu.at_scale(resolve("laptop").params)
    sizes = params.benchmark
    assert (sizes.teacher.layers, sizes.teacher.width, sizes.student.layers, sizes.student.width) == (12, 768, 6, 384)
    assert (sizes.batch_size, sizes.sequence_length, params.precision) == (64, 512, "bf16")
    assert params.attention_implementation == "sdpa" and sizes.vocabulary == 30522
    rows = gpu.subjects(params)
    assert len(rows) == 2 * (len(sizes.methods) + len(sizes.peers))
    assert not any("shared-teacher" in row.get("fast_paths", []) for row in rows)
    line = gpu.missing(params)
    assert "\n" not in line and line.startswith("no GPU is visible: the table of steps on a GPU was not measured")
    documented = DOCS.read_text()
    for name in {row["name"] for row in rows}:
        assert name in line and f"`{name}`" in documented, name


def test_a_whole_table_on_a_small_scale(params, tmp_path, capsys, monkeypatch):
    """Where models are trained: without a GPU on the processor; all in this process."""
    monkeypatch.setattr(benchmark, "_in_processes", lambda measure, *what: [measure(*what)])
    result = gpu.gpu_benchmark(params, tmp_path / "gpu.json")
    assert json.loads((tmp_path / "gpu.json").read_text()) == result
    table = gpu.gpu_steps(result)
    assert list(table["subject"]) == ["od", "od", "trainer-full-vocabulary", "trainer-full-vocabulary"]
    assert list(table["precision"]) == ["bf16", "bf16", "fp32", "bf16"]
    counted = cost.count(cost.benchmark_workload(params, params.benchmark, result["subjects"][0])).flops
    (own,) = result["subjects"][0]["rounds"]
    assert own["flops"] == counted > 0
    assert own["tokens_per_second"] == pytest.approx(4 * 16 / own["median_seconds"])
    assert ((table["efficiency"].dropna() > 0) & (table["efficiency"].dropna() < 1)).all()
    assert (table["memory"] > 0).all()
    assert "GPU round 1 [1/4] od bf16 no fast path | " in capsys.readouterr().out


@pytest.mark.cuda
@pytest.mark.skipif(not torch.cuda.is_available(), reason="no GPU is visible")
def test_the_papers_scale_fits_and_is_timed_on_the_card(tmp_path):
    """One method, few steps: what `make benchmark` does for every row."""
    params = gpu.at_scale(resolve("laptop").params)
    few = params.benchmark.model_copy(
        update={"methods": ["hs-uniform"], "peers": [], "warmup_steps": 3, "steps": 3, "rounds": 1}
    )
    table = gpu.gpu_steps(gpu.gpu_benchmark(params.model_copy(update={"benchmark": few}), tmp_path / "gpu.json"))
    assert len(table) == 2 and table["efficiency"].between(0.01, 1).all()
