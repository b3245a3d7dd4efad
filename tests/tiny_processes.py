"""What several processes do together and one does alone; torchrun starts this file (:func:`launch`)."""

from __future__ import annotations

import contextlib
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import tiny
import torch
from tiny_training import descend, objective_of, stream
from torch.distributed.tensor import DTensor
from transformers import TrainerCallback, default_data_collator

from study.__main__ import main
from study.descriptions import Run
from study.distillation import processes, trainer
from study.distillation.distil import distil
from study.distillation.heads import language_modelling_head
from study.distillation.masking import MaskedSequences
from study.distillation.taps import PROJECTIONS, read_activations
from study.files import Layout

OF_PAIRS = {"objective": "sentence_embedding", "distance": "relational"}
OWN = {
    "hs+pairs": {"objective": "sum", "parts": [{"objective": "hidden_state", "mapping": "top"}, OF_PAIRS]},
    "od-sampled": {"objective": "output_distribution", "positions": "sampled", "mlm_weight": 0.5},
}
#: Method and batches per step: every objective. Losses over pairs of sequences need all of a step at once.
CASES = [("se-relational", 1), ("hs+pairs", 1), ("od", 1), ("mlm", 2), ("od-sampled", 2), ("hs-uniform+last", 2)]
CASES += [("mha-minilmv2", 2), ("mha-direct", 2), ("se-mse", 2), ("scores", 2), ("minilm", 2), ("distilbert", 2)]
BUDGET = {"evaluate_every": 2, "save_every": 2, "steps": 8, "accumulation_steps": 2}
#: One objective of each family, with and without a sharded teacher. All held-out sequences are one batch: of two
#: processes one has none.
SHARDED_METHODS = ["od", "hs-uniform+last", "mha-minilmv2", "mha-direct", "se-mse", "scores"]
SHARDED = {"distillation": {"steps": 4, "evaluate_every": 2, "validation_sequences": 6}}
METHOD = "hs-uniform+last"
#: Of a run that stops at step 6 and has a checkpoint of step 4: what it logs there is of both parts.
LOGGED_EVERY = 7


class Recorded(MaskedSequences):
    """Notes which items of the stream are read."""

    def __getitem__(self, item: int) -> dict[str, Any]:
        self.__dict__.setdefault("read", []).append(item)
        return super().__getitem__(item)


def trained(folder: Path, method: str, accumulation: int) -> dict[str, Any]:
    """Plain gradient descent of two steps of eight sequences: weights before and after, losses, and items read."""
    own = folder / f"rank-{processes.rank()}"  # processes write no file together
    params = tiny.parameters(folder, methods={k: {"learning_rate": 1e-3, **v} for k, v in OWN.items()})
    training = stream(params, tiny.tokenizer(own), length=16, sampled=True)
    objective = objective_of(params, method, start=training)
    trainer.freeze_untrained(objective, default_data_collator([training[0]]))
    start = tiny.snapshot(objective)
    training.__class__ = Recorded
    record = descend(objective, training, own, accumulation, rate=0.01)
    return {
        "start": start,
        "end": tiny.snapshot(objective),
        "tokens": record["tokens"],
        "training": [entry["loss"] for entry in record["training_curve"]],
        "held out": [entry["loss"] for entry in record["curve"]],
        "read": training.__dict__["read"][1:],  # the first tells the length
    }


def sharded(folder: Path, method: str) -> list[int]:
    """Distil with a sharded teacher and recomputed layers: what this process holds of the teacher after each step."""
    held: list[int] = []

    class Counter(TrainerCallback):
        def on_step_end(self, args, state, control, model=None, **kwargs):
            held.append(held_of(model.teacher))

    chosen = {"STUDY_SHARD_TEACHER": "1", "STUDY_GRADIENT_CHECKPOINTING": "1"}
    os.environ.update(chosen)
    distil(*tiny.run(folder, method, "L2-H12", **SHARDED), folder / f"sharded-{method}", callbacks=[Counter()])
    for name in chosen:
        del os.environ[name]
    return held


def held_of(model: torch.nn.Module) -> int:
    """Elements of parameters that this process has in memory."""
    parts = (x.to_local() if isinstance(x, DTensor) else x for x in model.parameters())
    return sum(part.numel() for part in parts)


@torch.no_grad()
def read(model: Any) -> list[torch.Tensor]:
    """Everything that objectives read of a teacher, every reading broken off where it is complete."""
    ids = torch.from_numpy(tiny.sequences(4, 1).astype(np.int64))
    hidden = [read_activations(model, ids, None, [layer]).hidden[layer] for layer in range(5)]
    below = [read_activations(model, ids, None, [], [layer]).attention[layer] for layer in range(1, 5)]
    projected = [parts[name] for parts in below for name in PROJECTIONS]
    return [*hidden, *projected, language_modelling_head(model)(hidden[-1])]


def interrupted(run: Run, layout: Layout, output: Path) -> None:
    """Train as far as step 6 and stop there as by Ctrl-C: the last checkpoint is that of step 4."""
    original, every = trainer.Progress.on_log, trainer.LOGGED_EVERY

    def on_log(self, args, state, control, logs=None, **kwargs):
        if state.global_step == 6:
            raise KeyboardInterrupt
        original(self, args, state, control, logs, **kwargs)

    trainer.Progress.on_log, trainer.LOGGED_EVERY = on_log, LOGGED_EVERY
    with contextlib.suppress(KeyboardInterrupt):
        distil(run, layout, output)
    trainer.Progress.on_log, trainer.LOGGED_EVERY = original, every


def launch(number: int, *command: str, folder: Path) -> subprocess.CompletedProcess:
    """Several processes of a Python command on this machine."""
    launcher = [sys.executable, "-m", "torch.distributed.run", "--standalone", f"--nproc-per-node={number}"]
    here = Path(__file__).parent
    environment = os.environ | {"PYTHONPATH": f"{here.parent}{os.pathsep}{here}", "OMP_NUM_THREADS": "1"}
    environment["CUDA_VISIBLE_DEVICES"] = ""
    return subprocess.run([*launcher, *command], cwd=folder, env=environment, capture_output=True, text=True)


if __name__ == "__main__":
    here = Path.cwd()
    trainer.LOGGED_EVERY = LOGGED_EVERY
    with processes.one_voice():
        processes.join()
        torch.save([trained(here, *case) for case in CASES], here / f"{processes.rank()}.pt")
        interrupted(*tiny.run(here, METHOD, "L2-H12", 2, distillation=BUDGET), here / "interrupted")
        outcome: dict[str, Any] = {"held": {method: sharded(here, method) for method in SHARDED_METHODS}}
        for method in SHARDED_METHODS:
            distil(*tiny.run(here, method, "L2-H12", **SHARDED), here / f"unsharded-{method}")
        for family in [*tiny.FAMILIES, *tiny.OTHERS]:
            teacher = tiny.masked_language_model(family).eval().requires_grad_(False)
            whole, held = read(teacher), [held_of(teacher), teacher.get_input_embeddings().weight.numel()]
            processes.shard(teacher)
            outcome[family] = whole, [read(teacher), read(teacher)], [*held, held_of(teacher)]
        torch.save(outcome, here / f"sharded-{processes.rank()}.pt")
    os.environ["STUDY_LOADERS"] = "2"
    sys.exit(main(["distil", sys.argv[1], "--output", str(here / "continued")]))
