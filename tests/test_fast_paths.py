"""Every fast path against what it replaces: values, gradients and whole runs, each on its own and all together."""

from __future__ import annotations

import resource
import subprocess
import sys
from typing import get_args

import pytest
import tiny
import torch
from tiny_training import distilled
from torch import nn

import study.distillation.fused
from study.distillation import losses
from study.distillation.distil import layers_of_others
from study.distillation.objectives import OBJECTIVES, base
from study.distillation.objectives.base import masked_logits
from study.distillation.taps import PROJECTIONS, Activations
from study.distillation.teacher_outputs import TeacherOutputs
from study.distillation.trainer import applied
from study.methods import FastPath

TEACHER_METHODS = ["od", "hs-uniform-consecutive", "mha-minilmv2", "mha-direct", "se-cosine"]
MASKS = {
    "none": None,
    "full": [[1, 1, 1, 1, 1]] * 3,
    "right": [[1, 1, 1, 0, 0], [1, 1, 1, 1, 1], [1, 0, 0, 0, 0]],
    "left": [[0, 0, 1, 1, 1], [1, 1, 1, 1, 1], [0, 0, 0, 0, 1]],
    "one sequence of padding alone": [[1, 0, 1, 0, 1], [0, 0, 0, 0, 0], [1, 1, 0, 1, 1]],
}


@pytest.fixture
def folder(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    return tiny.workspace(tmp_path)


def states(*shape: int, seed: int, scale: float = 1.0) -> torch.Tensor:
    return scale * torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def value_and_gradient(loss, student, *arguments, factor: float = 3.0):
    student = student.clone().requires_grad_()
    value = loss(student, *arguments)
    (factor * value).backward()
    return value.detach(), student.grad


# Losses with their gradients in one pass


@pytest.mark.parametrize("block", [1, 130, 2**20])
@pytest.mark.parametrize("name", MASKS)
@pytest.mark.parametrize(("widths", "relation_heads"), [((12, 24), 4), ((24, 12), 6), ((8, 8), 1), ((6, 6), 6)])
def test_fused_relation(monkeypatch, widths, relation_heads, name, block):
    """Blocks of one sequence, of one to five with a shorter last one, and all at once."""
    monkeypatch.setitem(study.distillation.fused.BLOCK, "cpu", block)
    mask = None if MASKS[name] is None else torch.tensor(MASKS[name])
    student, teacher = states(3, 5, widths[0], seed=1, scale=2.0), states(3, 5, widths[1], seed=2, scale=2.0)
    slow = value_and_gradient(losses.attention_relation, student, teacher, relation_heads, mask)
    fast = value_and_gradient(study.distillation.fused.attention_relation, student, teacher, relation_heads, mask)
    torch.testing.assert_close(fast[0], slow[0], rtol=2e-6, atol=1e-7)
    torch.testing.assert_close(fast[1], slow[1], rtol=1e-5, atol=1e-6)
    assert slow[0] > 0.01 and slow[1].abs().max() > 0.01


@pytest.mark.parametrize("block", [1, 130, 2**20])
@pytest.mark.parametrize("temperature", [0.5, 1.0, 2.0])
@pytest.mark.parametrize("shape", [(7, 50), (2, 3, 50), (1, 1, 9)])
def test_fused_output_distribution(monkeypatch, shape, temperature, block):
    monkeypatch.setitem(study.distillation.fused.BLOCK, "cpu", block)
    student, teacher = states(*shape, seed=1, scale=3.0), states(*shape, seed=2, scale=3.0)
    slow = value_and_gradient(losses.output_distribution, student, teacher, temperature)
    fast = value_and_gradient(study.distillation.fused.output_distribution, student, teacher, temperature)
    torch.testing.assert_close(fast[0], slow[0], rtol=2e-6, atol=1e-7)
    torch.testing.assert_close(fast[1], slow[1], rtol=1e-5, atol=1e-6)
    assert slow[0] > 0.01 and slow[1].abs().max() > 0.01


def test_fused_losses_of_bf16_inputs_are_summed_in_float32():
    """The gradient comes back in the inputs' type, so it agrees to bfloat16's last bit and no better."""
    student, teacher = states(2, 9, 48, seed=1).bfloat16(), states(2, 9, 48, seed=2).bfloat16()
    for name, arguments in (("attention_relation", (12,)), ("output_distribution", (1.0,))):
        slow = value_and_gradient(getattr(losses, name), student, teacher, *arguments)
        fast = value_and_gradient(getattr(study.distillation.fused, name), student, teacher, *arguments)
        assert fast[0].dtype == torch.float32 and fast[1].dtype == torch.bfloat16
        torch.testing.assert_close(fast[0], slow[0], rtol=2e-6, atol=1e-7)
        torch.testing.assert_close(fast[1].float(), slow[1].float(), rtol=2**-7, atol=1e-6)


def test_fused_relation_under_autocast_is_float32():
    student, teacher = states(2, 9, 48, seed=1), states(2, 9, 48, seed=2)
    expected = value_and_gradient(study.distillation.fused.attention_relation, student, teacher, 12)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        found = value_and_gradient(study.distillation.fused.attention_relation, student, teacher, 12)
    assert torch.equal(found[0], expected[0]) and torch.equal(found[1], expected[1])


def test_fused_losses_of_extreme_scores_stay_finite():
    """The widest scores that two models are likely to disagree by; a softmax that underflows to zero is no infinity."""
    student, teacher = states(2, 6, 12, seed=1, scale=30.0), states(2, 6, 12, seed=2, scale=30.0)
    for name, arguments in (("attention_relation", (3,)), ("output_distribution", (1.0,))):
        slow = value_and_gradient(getattr(losses, name), student, teacher, *arguments)
        fast = value_and_gradient(getattr(study.distillation.fused, name), student, teacher, *arguments)
        assert fast[0].isfinite() and fast[1].isfinite().all() and slow[0] > 10
        torch.testing.assert_close(fast[0], slow[0], rtol=1e-5, atol=0)
        torch.testing.assert_close(fast[1], slow[1], rtol=1e-4, atol=1e-5)


def test_fused_losses_give_the_teacher_no_gradient_and_no_positions_no_loss():
    for name, arguments in (("attention_relation", (3,)), ("output_distribution", (1.0,))):
        student, teacher = states(2, 6, 12, seed=1).requires_grad_(), states(2, 6, 12, seed=2).requires_grad_()
        getattr(study.distillation.fused, name)(student, teacher, *arguments).backward()
        assert teacher.grad is None and student.grad.abs().max() > 0
    nothing = torch.zeros(2, 0, 12, requires_grad=True)
    assert study.distillation.fused.output_distribution(nothing, nothing.detach()) == 0


@pytest.mark.parametrize(("name", "arguments"), [("attention_relation", (3,)), ("output_distribution", (1.0,))])
def test_fused_losses_compute_no_gradient_where_none_is_asked_for(monkeypatch, name, arguments):
    """As in evaluation: the same value, and neither the products nor the memory of a gradient."""
    student, teacher = states(2, 6, 12, seed=1), states(2, 6, 12, seed=2)
    loss, calls = getattr(study.distillation.fused, name), []
    expected = loss(student.clone().requires_grad_(), teacher, *arguments)
    monkeypatch.setattr(torch, "empty_like", lambda *given, **named: calls.append(given))
    assert torch.equal(loss(student, teacher, *arguments), expected.detach())
    with torch.no_grad():
        assert torch.equal(loss(student, teacher, *arguments), expected.detach())
    assert calls == []


def test_a_second_derivative_of_fused_losses_is_refused():
    """It would be silently wrong: the first is a constant to autograd."""
    student, teacher = states(2, 6, 12, seed=1).requires_grad_(), states(2, 6, 12, seed=2)
    factor = torch.tensor(2.0, requires_grad=True)
    value = factor * study.distillation.fused.attention_relation(student, teacher, 3)
    (gradient,) = torch.autograd.grad(value, student, create_graph=True)
    with pytest.raises(RuntimeError, match="once_differentiable"):
        gradient.sum().backward()


@pytest.mark.parametrize("module", [losses, study.distillation.fused])
def test_fused_losses_name_the_same_mistakes(module):
    x = states(2, 6, 12, seed=1)
    for call, named in (
        (lambda: module.attention_relation(x, x, 5), "relation heads 5 do not divide the student's width 12"),
        (lambda: module.attention_relation(x, x[:1], 3), "1, 6, 12"),
        (lambda: module.output_distribution(x, x[..., :5]), "differ in shape"),
        (lambda: module.output_distribution(x, x, 0.0), "temperature = 0.0"),
    ):
        with pytest.raises(ValueError, match=named):
            call()


# A teacher rounded once


@pytest.mark.parametrize("family", tiny.FAMILIES)
@pytest.mark.parametrize("method", TEACHER_METHODS)
def test_a_rounded_teacher_reads_the_same_under_autocast(folder, family, method):
    params = tiny.parameters(folder)
    batch = {"masked_input_ids": torch.from_numpy(tiny.sequences(4, 3).astype(int))}
    batch["positions"] = torch.tensor([[1, 4]] * 4)
    found = []
    for rounded in (False, True):
        teacher, student = tiny.masked_language_model(family), tiny.masked_language_model(family, layers=2)
        chosen = params.methods[method]
        objective = OBJECTIVES[chosen.objective](student, teacher, chosen, params.distillation.inputs)
        if rounded:
            objective.round_teacher()
            kinds = {module.weight.dtype for module in objective.teacher.modules() if isinstance(module, nn.Linear)}
            assert kinds == {torch.bfloat16}
        with torch.no_grad(), torch.autocast("cpu", dtype=torch.bfloat16):
            activations = objective.read_teacher(batch)
            tensors = [
                *activations.hidden.values(),
                *(x for parts in activations.attention.values() for x in parts.values()),
            ]
            if objective.needs_head:
                tensors.append(masked_logits(objective.teacher, activations, batch["positions"]))
        found.append(tensors)
    assert len(found[0]) > 0 and all(map(torch.equal, *found))


# A teacher shared between runs


def store(folder, layers=(2, 5), attention=(3,), dtype=torch.bfloat16, others=None) -> TeacherOutputs:
    own = {"hidden_layers": set(layers), "attention_layers": set(attention)}
    shared = TeacherOutputs(folder / "outputs", (10, 4, 6), dtype, own, others)
    assert shared.open()
    return shared


def activations_of(seed: int, layers=(2, 5), attention=(3,), dtype=torch.bfloat16) -> Activations:
    hidden = {layer: states(2, 4, 6, seed=seed + layer).to(dtype) for layer in layers}
    parts = {
        layer: {name: states(2, 4, 6, seed=seed + 10 * layer + i).to(dtype) for i, name in enumerate(PROJECTIONS)}
        for layer in attention
    }
    return Activations(hidden, parts)


def same(first: Activations, second: Activations) -> bool:
    return (
        first.hidden.keys() == second.hidden.keys()
        and first.attention.keys() == second.attention.keys()
        and all(torch.equal(first.hidden[layer], second.hidden[layer]) for layer in first.hidden)
        and all(
            torch.equal(parts[name], second.attention[layer][name])
            for layer, parts in first.attention.items()
            for name in PROJECTIONS
        )
    )


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
def test_a_store_gives_back_what_was_written_and_nothing_else(tmp_path, dtype):
    first, items, others = store(tmp_path, dtype=dtype), torch.tensor([7, 2]), torch.tensor([2, 3])
    assert first.load(items) is None
    written = activations_of(0, dtype=dtype)
    first.save(items, written)
    assert same(first.load(items), written)
    assert first.load(others) is None  # one of the two is missing
    again = store(tmp_path, dtype=dtype)  # another process
    assert same(again.load(items), written)
    assert same(store(tmp_path, layers=[5], attention=[], dtype=dtype).load(items), Activations({5: written.hidden[5]}))
    assert store(tmp_path, layers=[4, 5], attention=[], dtype=dtype).load(items) is None  # layer 4 was never read


def test_what_other_runs_read_is_kept_beside_ones_own(tmp_path):
    first = store(tmp_path, layers=[2], attention=[], others={"hidden_layers": {5}, "attention_layers": {3}})
    assert first.layers == {"hidden_layers": {2, 5}, "attention_layers": {3}}
    items, written = torch.tensor([7, 2]), activations_of(0)
    first.save(items, written)
    assert same(first.load(items), Activations({2: written.hidden[2]}))
    assert same(store(tmp_path).load(items), written)


def test_a_damaged_row_counts_as_missing(tmp_path):
    shared, items = store(tmp_path), torch.tensor([0, 1])
    shared.save(items, activations_of(0))
    file = tmp_path / "outputs" / "key-3.bin"
    content = bytearray(file.read_bytes())
    content[5] ^= 1
    file.write_bytes(content)
    assert store(tmp_path).load(items) is None
    shared = store(tmp_path)
    shared.save(items, activations_of(0))
    assert same(shared.load(items), activations_of(0))


def test_a_store_larger_than_half_the_free_disk_is_refused_and_leaves_no_files(tmp_path):
    shared = TeacherOutputs(tmp_path / "outputs", (10**9, 512, 1024), torch.float32, {"hidden_layers": {1}})
    assert not shared.open()
    assert list((tmp_path / "outputs").iterdir()) == []


#: Start of projections, and the backward pass that finds what to train: before the teacher is shared.
BEFORE_TRAINING = 2


def count_teacher_passes(monkeypatch) -> list:
    passes = []
    original = base.read_activations

    def read(model, *arguments, **layers):
        if model.config.num_hidden_layers == tiny.TEACHER["layers"]:  # students have two
            passes.append(layers)
        return original(model, *arguments, **layers)

    monkeypatch.setattr(base, "read_activations", read)
    return passes


@pytest.mark.parametrize("precision", ["fp32", "bf16"])
def test_what_one_run_has_read_of_the_teacher_the_next_does_not_compute(folder, emulated_bf16, monkeypatch, precision):
    """Held-out sequences too. What is not there yet is computed, and another seed shares nothing."""
    steps = tiny.parameters(folder).distillation.steps

    def shared_files():
        return {path.name for path in (folder / "scratch" / "teacher_outputs").rglob("*.bin")}

    distilled(folder, "first", "hs-last", precision=precision)
    assert shared_files() == {"hidden-4.bin"}
    (outputs,) = (folder / "scratch" / "teacher_outputs").iterdir()
    modified = {path: path.read_bytes() for path in outputs.iterdir()}
    passes = count_teacher_passes(monkeypatch)
    for method, student in (("od", "L2-H24"), ("hs-last", "L2-H24")):
        distilled(folder, "next", method, student, precision=precision)
        assert len(passes) <= BEFORE_TRAINING
        passes.clear()
    assert modified == {path: path.read_bytes() for path in outputs.iterdir()}
    distilled(folder, "next", "hs-uniform", precision=precision)
    assert shared_files() == {"hidden-2.bin", "hidden-4.bin"}
    assert sum(layers["hidden_layers"] == {2, 4} for layers in passes) >= steps
    passes.clear()
    distilled(folder, "next", "hs-last", seed=2, precision=precision)
    assert len(passes) >= steps


def test_the_first_run_computes_the_teacher_for_all_of_the_grid_and_its_ablations(folder, monkeypatch):
    """On the same sequences: a method that reads other text or makes other steps has outputs of its own."""
    methods = {"hs-plain": {"objective": "hidden_state", "mapping": "all-to-one", "inputs": "plain"}}
    methods["mha-top"] = {"objective": "attention_relation", "teacher_layer_from_top": 0, "relation_heads": 12}
    methods = {name: {**own, "learning_rate": 1e-3} for name, own in methods.items()}
    names = [("none", "L2-H12"), ("mlm", "L2-H12"), ("hs-last", "L2-H12"), ("hs-uniform", "L2-H24")]
    names += [("mha-direct", "L2-H12"), ("mha-top", "L2-H24"), ("hs-plain", "L2-H24")]
    others = [tiny.run(folder, *name, methods=methods)[0] for name in names]
    expected = {"od": {"hidden_layers": {2, 4}, "attention_layers": {3, 4}}, "hs-plain": {"hidden_layers": {4}}}
    for method, layers in expected.items():
        run, _ = tiny.run(folder, method, methods=methods)
        assert layers_of_others(run, run.distillation, others, 4) == layers

    steps = tiny.parameters(folder).distillation.steps
    distilled(folder, "first", "hs-last", others=others, methods=methods)
    passes = count_teacher_passes(monkeypatch)
    without = [path for path in get_args(FastPath) if path != "shared-teacher"]
    for method, student in [
        ("hs-uniform", "L2-H12"),
        ("mha-direct", "L2-H12"),
        ("mha-top", "L2-H24"),
        ("od", "L2-H12"),
    ]:
        distilled(folder, "next", method, student, others=others, methods=methods)
        together = tiny.weights(folder / "next")
        assert len(passes) <= BEFORE_TRAINING
        distilled(folder, "next", method, student, methods=methods, fast_paths=without)
        assert len(passes) >= steps
        assert tiny.identical(tiny.weights(folder / "next"), together)
        passes.clear()


@pytest.mark.parametrize("method", ["od", "hs-uniform+last", "mha-minilmv2"])
def test_with_mask_sets_another_seed_and_budget_compute_no_teacher_and_get_the_same_student(
    folder, monkeypatch, method
):
    """Outputs by sequence and mask: what one run has read, any other of the setting finds, and rounding is the same."""
    sets = {"distillation": {"mask_sets": 1, "batch_size": 16}, "methods": {"od": OD_SAMPLED}}
    distilled(folder, "first", method, seed=1, **sets)
    passes = count_teacher_passes(monkeypatch)
    other = sets | {"distillation": sets["distillation"] | {"steps": 9, "evaluate_every": 9}}
    distilled(folder, "shared", method, "L2-H24", seed=2, **other)
    assert len(passes) <= BEFORE_TRAINING
    without = [path for path in get_args(FastPath) if path != "shared-teacher"]
    distilled(folder, "computed", method, "L2-H24", seed=2, fast_paths=without, **other)
    assert len(passes) >= 9
    assert tiny.identical(tiny.weights(folder / "shared"), tiny.weights(folder / "computed"))


OD_SAMPLED = {"objective": "output_distribution", "learning_rate": 1e-3, "positions": "sampled"}


def test_a_disk_too_full_for_what_others_read_still_holds_ones_own(folder, monkeypatch, capsys):
    others = [tiny.run(folder, method, "L2-H12")[0] for method in ("hs-last", "hs-uniform", "mha-direct")]
    roomy = TeacherOutputs.open
    monkeypatch.setattr(TeacherOutputs, "open", lambda self: self.kept == self.needed and roomy(self))
    distilled(folder, "first", "hs-last", others=others)
    assert {path.name for path in (folder / "scratch").rglob("*.bin")} == {"hidden-4.bin"}
    assert "too full" not in capsys.readouterr().out


def test_a_full_disk_is_said_and_costs_time_only(folder, monkeypatch, capsys):
    distilled(folder, "shared", "hs-last")
    monkeypatch.setattr(TeacherOutputs, "open", lambda self: False)
    distilled(folder, "alone", "hs-last")
    assert "too full" in capsys.readouterr().out
    assert tiny.identical(tiny.weights(folder / "shared"), tiny.weights(folder / "alone"))


# Memory that the C library keeps


PAGE_FAULTS = """
import resource, sys, torch
from study.runtime import keep_freed_memory
torch.set_num_threads(1)
if sys.argv[1] == "keep":
    assert keep_freed_memory()
def work():
    for _ in range(10):
        torch.ones(16 * 2**20)  # 64 MiB
work()
before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
work()
print(resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before)
"""


@pytest.mark.skipif(sys.platform != "linux", reason="a setting of glibc")
def test_kept_memory_is_not_faulted_in_again():
    faults = {
        way: int(subprocess.run([sys.executable, "-c", PAGE_FAULTS, way], capture_output=True, check=True).stdout)
        for way in ("keep", "return")
    }
    pages = 10 * 64 * 2**20 // resource.getpagesize()
    assert faults["keep"] < pages / 100 < faults["return"]


# Whole runs


@pytest.mark.parametrize("precision", ["fp32", "bf16"])
@pytest.mark.parametrize("method", TEACHER_METHODS)
def test_a_student_is_the_same_with_and_without(folder, emulated_bf16, method, precision):
    """Bit for bit, except that fused losses round their sums differently.

    Adam with a small epsilon would make full steps of gradients that are rounding errors alone, as of key biases.
    """
    distillation = {"adam_epsilon": 1e-2, "steps": 4}

    def student(name: str, fast_paths: list[str]) -> dict[str, torch.Tensor]:
        distilled(folder, name, method, precision=precision, fast_paths=fast_paths, distillation=distillation)
        return tiny.weights(folder / name)

    slow = student("slow", [])
    assert tiny.identical(student("exact", [path for path in get_args(FastPath) if path != "fused-losses"]), slow)
    fast = student("fast", list(get_args(FastPath)))
    assert tiny.identical(student("again", list(get_args(FastPath))), fast)  # now from what the teacher left
    distilled(folder, "none", "none")
    start = {name.removeprefix("bert."): tensor for name, tensor in tiny.weights(folder / "none").items()}
    moved = sum((slow[name] - start[name.removeprefix("bert.")]).norm() ** 2 for name in slow).sqrt()
    apart = sum((fast[name] - slow[name]).norm() ** 2 for name in slow).sqrt()
    assert apart <= (1e-5 if precision == "fp32" else 1e-2) * moved


@pytest.mark.parametrize(("device", "steps", "left_out"), [
    ("cpu", 1, {"cuda-graphs"}), ("cuda", 1, {"shared-teacher"}), ("cuda", 2, {"shared-teacher", "cuda-graphs"})
])  # fmt: skip
def test_paths_that_are_of_no_use_are_neither_taken_nor_recorded(monkeypatch, device, steps, left_out):
    monkeypatch.setattr("study.distillation.trainer.compute_device", lambda: torch.device(device))
    paths = list(get_args(FastPath))
    assert applied(paths, steps) == [path for path in paths if path not in left_out]
    never = {"shared-teacher", "rounded-teacher"} | ({"cuda-graphs"} if steps > 1 or device == "cpu" else set())
    assert applied(paths, steps, sharded=True) == [path for path in paths if path not in never]
    assert "cuda-graphs" not in applied(paths, steps, recomputes=True)
