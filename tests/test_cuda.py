"""On a GPU: losses, gradients and weights as on the processor, and runs from end to end; skipped without one."""

from __future__ import annotations

import pytest
import tiny
import torch
from tiny_training import METHODS, ONE_OF_EACH, RIVALS, distilled, objective_of, stream
from transformers import default_data_collator

from study.descriptions import LatencyMeasurement
from study.evaluation.latency import measure_latency
from study.runtime import compute_device

pytestmark = [pytest.mark.cuda, pytest.mark.skipif(not torch.cuda.is_available(), reason="no GPU is visible")]


@pytest.mark.parametrize("method", METHODS + RIVALS)
def test_loss_and_gradients_are_those_of_the_processor(tmp_path, method):
    """Also with layers that are computed twice."""
    params, words = tiny.parameters(tmp_path), tiny.tokenizer(tmp_path / "words")
    training = stream(params, words)
    batch = default_data_collator([training[i] for i in range(8)])
    found = []
    for device, recomputes in (("cpu", False), ("cuda", False), ("cuda", True)):
        objective = objective_of(params, method).to(device).train()
        if recomputes:
            objective.recompute_layers()
        if objective.teacher is not None:
            torch.nn.Module.to(objective.teacher, device)
        loss = objective(**{key: x.to(device) for key, x in batch.items()})["loss"]
        loss.backward()
        gradients = {n: p.grad.cpu() for n, p in objective.named_parameters() if p.grad is not None}
        found.append((loss.item(), gradients))
    (expected, reference), *others = found
    largest = max(gradient.norm() for gradient in reference.values())
    for loss, gradients in others:
        assert loss == pytest.approx(expected, rel=1e-4)
        assert reference.keys() == gradients.keys()
        for name, gradient in reference.items():
            assert (gradients[name] - gradient).norm() <= 1e-3 * gradient.norm() + 1e-5 * largest, name


@pytest.mark.parametrize("method", ONE_OF_EACH)
@pytest.mark.parametrize("precision", ["fp32", "bf16"])
def test_a_run_trains_there_twice_to_the_same_weights_and_says_so(tmp_path, method, precision):
    tiny.workspace(tmp_path)
    records = [distilled(tmp_path, name, method, precision=precision) for name in ("first", "second")]
    assert records[0]["environment"]["processor"] == torch.cuda.get_device_name(compute_device())
    assert records[0]["training"]["precision"] == precision
    assert tiny.identical(tiny.weights(tmp_path / "first"), tiny.weights(tmp_path / "second"))


@pytest.mark.parametrize("method", [*ONE_OF_EACH, "se-mse"])
@pytest.mark.parametrize("precision", ["fp32", "bf16"])
def test_recorded_steps_train_as_single_kernels_do(tmp_path, method, precision):
    """All steps of the recording but the last rounding: a replay of the wrong batch would be far off."""
    tiny.workspace(tmp_path)
    paths = ["fused-losses", "rounded-teacher"]
    for name, chosen in (("single", paths), ("recorded", [*paths, "cuda-graphs"])):
        distilled(tmp_path, name, method, precision=precision, fast_paths=chosen)
    single, recorded = tiny.weights(tmp_path / "single"), tiny.weights(tmp_path / "recorded")
    for name, weight in single.items():
        assert (recorded[name] - weight).norm() <= 1e-3 * weight.norm() + 1e-5, name


def test_accumulated_steps_are_not_replayed(tmp_path):
    tiny.workspace(tmp_path)
    halves = {"distillation": {"accumulation_steps": 2}}
    for name, paths in (("single", []), ("asked", ["cuda-graphs"])):
        distilled(tmp_path, name, "od", fast_paths=paths, **halves)
    assert tiny.identical(tiny.weights(tmp_path / "single"), tiny.weights(tmp_path / "asked"))


def test_a_pruned_start_is_made_there(tmp_path):
    tiny.workspace(tmp_path)
    students = {"L2-F24": {"layers": 2, "width": 24, "heads": 4, "intermediate": 24}}
    distilled(tmp_path, "pruned", "mlm", student="L2-F24", students=students, initialisation="pruned-uniform")
    assert tiny.weights(tmp_path / "pruned")


def test_a_run_on_the_processor_learns_what_the_one_on_the_gpu_does(tmp_path, monkeypatch):
    """Of a student with copied layers: projected ones depend on the signs of eigenvectors, which devices choose."""
    tiny.workspace(tmp_path)
    ours = distilled(tmp_path, "gpu", "hs-uniform+last", student="L2-H24")["training"]["curve"]
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    theirs = distilled(tmp_path, "cpu", "hs-uniform+last", student="L2-H24")["training"]["curve"]
    assert [point["loss"] for point in ours] == pytest.approx([point["loss"] for point in theirs], rel=0.02)


def test_latency_is_measured_on_the_devices_asked_for(tmp_path):
    tiny.workspace(tmp_path)
    protocol = {"sequence_length": 16, "batch_sizes": [1], "warmup_runs": 1, "runs": 3, "threads": [1]}
    plan = tiny.plan(tmp_path, latency=protocol | {"devices": ["cuda", "cpu"]})
    (description,) = plan.of(LatencyMeasurement)
    measured = measure_latency(description, plan.layout("english"), tmp_path / "latency.json").measurements
    assert [entry.device for entry in measured] == ["cuda", "cuda", "cpu", "cpu"]
    assert measured[0].processor == torch.cuda.get_device_name() != measured[2].processor
