"""Training by transformers' Trainer, common to teachers and students: progress, time, checkpoints, what is frozen."""

from __future__ import annotations

import hashlib
import json
import math
import shutil
import time
from collections import defaultdict
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from transformers import (
    PreTrainedModel,
    PreTrainedTokenizerBase,
    PrinterCallback,
    Trainer,
    TrainerCallback,
    TrainingArguments,
    default_data_collator,
)
from transformers.trainer_callback import ExportableState
from transformers.trainer_utils import EvalLoopOutput

from study.data.pretrained import save_model, writing
from study.distillation import processes
from study.distillation.graphs import record_step
from study.distillation.masking import MaskedSequences
from study.distillation.objectives.base import Objective
from study.execution import forget_launchers
from study.families import family_of, part
from study.files import StudyError, write_json
from study.methods import FastPath
from study.runtime import compute_device, environment, loaders, one_device

#: Optimiser steps between two training losses.
LOGGED_EVERY = 10


class Clock(TrainerCallback, ExportableState):
    """Seconds of training, and losses that no log has yet; a checkpoint keeps both, and a resumed run adds its own.

    Args:
        earlier: seconds before this process. loss: sum of the training losses since the last log. steps: how many.
    """

    def __init__(self, earlier: float = 0.0, loss: float = 0.0, steps: int = 0):
        self.earlier, self.loss, self.steps = earlier, loss, steps
        self.began: float | None = None

    def start(self) -> None:
        """Count from now on."""
        self.began = time.monotonic()

    def seconds(self) -> float:
        """Seconds so far, those before an interruption included."""
        return self.earlier + (time.monotonic() - self.began if self.began is not None else 0.0)

    def on_train_begin(self, args, state, control, **kwargs):
        self.start()

    def state(self) -> dict[str, Any]:
        """What a checkpoint keeps."""
        return {"args": {"earlier": self.seconds(), "loss": self.loss, "steps": self.steps}, "attributes": {}}


class Unlogged(TrainerCallback):
    """Gives a resumed trainer the losses that its :class:`Clock` brings: the next log is that of a whole run."""

    def __init__(self, trainer: DistillationTrainer):
        self.trainer = trainer

    def on_train_begin(self, args, state, control, **kwargs):
        self.trainer._tr_loss += self.trainer.clock.loss
        self.trainer._globalstep_last_logged -= self.trainer.clock.steps


class Progress(TrainerCallback):
    """One flushed line per logging step: what runs, step, loss, tokens per second, time left."""

    def __init__(self, title: str, tokens_per_step: int):
        self.title, self.tokens_per_step = title, tokens_per_step

    def on_train_begin(self, args, state, control, **kwargs):
        self.began, self.first = time.monotonic(), state.global_step
        if self.first:
            print(f"{self.title} | continues from step {self.first} of {state.max_steps}", flush=True)

    def on_log(self, args, state, control, logs=None, **kwargs):
        loss = {"loss": "loss", "eval_loss": "held-out loss"}
        shown = [f"{text} {logs[key]:.4g}" for key, text in loss.items() if key in logs]
        done, elapsed = state.global_step - self.first, time.monotonic() - self.began
        if not shown:
            return
        if done > 0:
            left = elapsed / done * (state.max_steps - state.global_step)
            speed = self.tokens_per_step * done / max(elapsed, 1e-9)
            shown += [f"{speed:,.0f} tokens/s", f"{int(left) // 60}:{int(left) % 60:02d} left"]
        print(f"{self.title} | step {state.global_step}/{state.max_steps} | {' | '.join(shown)}", flush=True)


class DivergedError(StudyError):
    """A loss that is not finite: the learning rate is too high, or the input is damaged."""


class DistillationTrainer(Trainer):
    """The Trainer, with elapsed seconds in its log and an error as soon as a logged loss is not finite.

    Seconds count from the loss before training, or from where a run continues.
    """

    def __init__(self, *arguments: Any, **named: Any):
        super().__init__(*arguments, **named | {"args": one_device(named["args"])})
        self.add_callback(Clock())
        self.add_callback(Unlogged(self))

    @property
    def clock(self) -> Clock:
        """A checkpoint brings a clock of its own, in the place of the first."""
        (clock,) = (callback for callback in self.callback_handler.callbacks if isinstance(callback, Clock))
        return clock

    def create_optimizer(self, *arguments: Any, **named: Any) -> torch.optim.Optimizer:
        """The Trainer's, its groups split by learning rate where the method has a ``layer_decay``."""
        made = self.optimizer is None
        optimizer = super().create_optimizer(*arguments, **named)
        if made and isinstance(self.model, Objective) and (decay := self.model.method.layer_decay) is not None:
            optimizer.param_groups[:] = split_by_layer(optimizer.param_groups, self.model.student, decay)
        return optimizer

    def _save_checkpoint(self, model: nn.Module, trial: Any) -> None:
        self.clock.loss = processes.total(self._tr_loss.clone()).item() / processes.count()  # as a log has it
        self.clock.steps = self.state.global_step - self._globalstep_last_logged
        with writing(Path(str(self.args.output_dir))):
            super()._save_checkpoint(model, trial)

    def log(self, logs: dict[str, float], start_time: float | None = None) -> None:
        for key in ("loss", "eval_loss"):
            if not math.isfinite(logs.get(key, 0.0)):
                raise DivergedError(
                    f"{key} = {logs[key]} at step {self.state.global_step}: training stopped, no result written"
                )
        if self.state.global_step == 0:
            self.clock.start()
        logs["seconds"] = self.clock.seconds()
        super().log(logs, start_time)

    def evaluation_loop(self, dataloader: Any, description: str, *arguments: Any, **named: Any) -> EvalLoopOutput:
        """Of several processes each reads every n-th batch as one would: their mean is that of one process."""
        if not processes.joined():
            return super().evaluation_loop(dataloader, description, *arguments, **named)
        assert isinstance(self.model, Objective) and isinstance(self.eval_dataset, MaskedSequences)
        self.model.eval()
        rows, size = len(self.eval_dataset), self.args.eval_batch_size
        total = torch.zeros((), dtype=torch.float64, device=self.args.device)
        for turn in range(0, rows, processes.count() * size):
            first = turn + processes.rank() * size
            own = range(first, min(first + size, rows))
            batch = [self.eval_dataset[row] for row in own or range(1)]  # a sharded teacher is read by all or none
            loss, _, _ = self.prediction_step(self.model, default_data_collator(batch), prediction_loss_only=True)
            assert loss is not None
            total += loss.double() * len(own)
        mean = processes.total(total).item() / rows
        return EvalLoopOutput(None, None, {"eval_loss": mean}, rows)  # type: ignore[arg-type]


def train(
    objective: Objective,
    training: MaskedSequences,
    validation: MaskedSequences,
    arguments: TrainingArguments,
    title: str,
    callbacks: list[TrainerCallback] | None = None,
    graphs: bool = False,
) -> dict[str, Any]:
    """Train ``objective`` from the last complete checkpoint in ``arguments.output_dir``, or from the start.

    Args:
        graphs: whether steps are replayed (:func:`study.distillation.graphs.record_step`), as :func:`applied` says.

    Returns:
        Fields of :class:`study.records.Training`: the curve of held-out losses, the training losses, steps, tokens,
        seconds (over interruptions too), tokens per second, precision, threads and, if more than one, processes.

    Raises:
        DivergedError: a loss that is not finite.
    """
    with processes.first_goes_first():
        checkpoint = last_complete_checkpoint(Path(str(arguments.output_dir)))
    for single in objective.singles():
        single.gathers = True
    arguments.eval_on_start = checkpoint is None  # else the curve would hold that step twice
    objective.accepts_loss_kwargs = False  # type: ignore[assignment]  # its losses are means: the Trainer has to divide
    trainer = DistillationTrainer(
        model=objective,
        args=arguments,
        train_dataset=training,
        eval_dataset=validation,
        data_collator=default_data_collator,
        callbacks=callbacks,
    )
    if objective.teacher is not None:
        nn.Module.to(objective.teacher, arguments.device)
    if graphs:
        first = default_data_collator([training[i] for i in range(arguments.per_device_train_batch_size)])
        record_step(objective, {key: x.to(arguments.device) for key, x in first.items()}, arguments.bf16)
    sequences = arguments.per_device_train_batch_size * arguments.gradient_accumulation_steps * arguments.world_size
    tokens = sequences * len(training[0]["input_ids"])  # of a step
    trainer.remove_callback(PrinterCallback)
    trainer.add_callback(Progress(title, tokens))
    trainer.train(resume_from_checkpoint=str(checkpoint) if checkpoint else None)
    history: list[dict[str, Any]] = trainer.state.log_history
    if not any("eval_loss" in entry and entry["step"] == trainer.state.global_step for entry in history):
        trainer.evaluate()

    def curve(key: str) -> list[dict[str, Any]]:
        return [
            {"step": e["step"], "tokens": e["step"] * tokens, "seconds": round(e["seconds"], 1), "loss": e[key]}
            for e in history
            if key in e
        ]

    steps, seconds = trainer.state.global_step, history[-1]["seconds"]
    return {
        "steps": steps,
        "tokens": steps * tokens,
        "seconds": round(seconds, 1),
        "tokens_per_second": round(steps * tokens / max(seconds, 1e-9), 1),
        "precision": "bf16" if arguments.bf16 else "fp32",
        "threads": torch.get_num_threads(),
        "processes": processes.count() if processes.joined() else None,
        "curve": curve("eval_loss"),
        "training_curve": curve("loss"),
    }


def split_by_layer(groups: list[dict[str, Any]], student: PreTrainedModel, decay: float) -> list[dict[str, Any]]:
    """An optimiser's groups, one for each learning rate: d^(L_S - i) times the group's for layer i, 0 the embeddings.

    What stands outside the encoder (heads, learned maps) keeps its rate.
    """
    layers = part(student.base_model, family_of(student).layers)
    depth = {id(parameter): 0 for parameter in student.base_model.parameters()}
    depth |= {id(parameter): i for i, layer in enumerate(layers, 1) for parameter in layer.parameters()}
    split = []
    for group in groups:
        chosen: dict[int, list[nn.Parameter]] = defaultdict(list)
        for parameter in group["params"]:
            chosen[depth.get(id(parameter), len(layers))].append(parameter)
        split += [
            {**group, "params": parameters, "lr": group["lr"] * decay ** (len(layers) - i)}
            for i, parameters in sorted(chosen.items())
        ]
    return split


def applied(
    fast_paths: Sequence[FastPath], accumulation_steps: int = 1, sharded: bool = False, recomputes: bool = False
) -> list[FastPath]:
    """Those of ``fast_paths`` that are of use here, which are then taken and recorded.

    A GPU computes what a teacher gives sooner than a disk has it, and a sharded one is read by all or none, as it is.
    A GPU alone replays steps, and not where several processes exchange gradients meanwhile, where accumulated ones
    would share the memory of the next replay, or where layers are computed twice.
    """
    gpu = compute_device().type == "cuda"
    useless = {
        "shared-teacher": gpu or sharded,
        "rounded-teacher": sharded,
        "cuda-graphs": not gpu or processes.joined() or accumulation_steps > 1 or recomputes,
    }
    return [path for path in fast_paths if not useless.get(path)]


def common_arguments(bf16: bool, batch_size: int) -> dict[str, Any]:
    """What every training run of the study has in common, as arguments of TrainingArguments."""
    if not processes.joined():
        forget_launchers()  # which transformers would obey
    return {
        "ddp_find_unused_parameters": False,  # they are frozen
        "per_device_eval_batch_size": batch_size,
        "bf16": bf16,
        "use_cpu": compute_device().type == "cpu",
        "optim": "adamw_torch_fused",
        "lr_scheduler_type": "linear",
        "train_sampling_strategy": "sequential",  # the stream is shuffled already
        "eval_strategy": "steps",
        "restore_callback_states_from_checkpoint": True,  # the patience of early stopping, the clock
        "save_strategy": "steps",
        "save_total_limit": 2,
        "logging_steps": LOGGED_EVERY,
        "logging_nan_inf_filter": False,
        "label_names": ["labels"],
        "prediction_loss_only": True,
        "remove_unused_columns": False,
        "report_to": "none",
        "disable_tqdm": True,
        "dataloader_num_workers": loaders(),
        "dataloader_pin_memory": compute_device().type == "cuda",
    }


class Checkpoints:
    """A folder of checkpoints that only a run of the same identity continues from; removed when the block succeeds.

    It stays after a crash or a full disk, and goes after a :class:`DivergedError`: that would come again.
    """

    def __init__(self, parent: Path, identity: dict[str, Any]):
        self.folder = parent / digest(identity)

    def __enter__(self) -> Path:
        self.folder.mkdir(parents=True, exist_ok=True)
        return self.folder

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, traceback: Any) -> None:
        if kind is None:
            processes.wait()  # rank 0 has saved, no other is at a checkpoint
        if not processes.rank() and (kind is None or issubclass(kind, DivergedError)):
            shutil.rmtree(self.folder, ignore_errors=True)


def digest(identity: dict[str, Any]) -> str:
    """A name for what depends on ``identity``, values of JSON."""
    return hashlib.sha256(json.dumps(identity, sort_keys=True).encode()).hexdigest()[:24]


def last_complete_checkpoint(folder: Path) -> Path | None:
    """The newest checkpoint whose last-written file is whole; half-written ones are removed."""
    checkpoints = sorted(folder.glob("checkpoint-*"), key=lambda path: int(path.name.rpartition("-")[2]), reverse=True)
    for checkpoint in checkpoints:
        try:
            json.loads((checkpoint / "trainer_state.json").read_text())
            return checkpoint
        except (OSError, ValueError):
            shutil.rmtree(checkpoint)
    return None


def switch_off_dropout(model: nn.Module) -> None:
    """Train without dropout (this study's choice: budgets are far from overfitting); the saved config keeps it."""
    for module in model.modules():
        if isinstance(module, nn.Dropout):
            module.p = 0.0
        elif hasattr(module, "attention_dropout"):  # ModernBERT
            module.attention_dropout = 0.0  # type: ignore[assignment]


def freeze_untrained(objective: Objective, batch: dict[str, Tensor]) -> list[str]:
    """Freeze every parameter that the loss does not reach, found by one backward pass; return their names.

    With MHA transfer these are what lies above the last layer's query, key and value projections. Data-parallel
    training would otherwise wait for gradients that never come, and weight decay must not touch what is not trained.
    """
    objective(**batch)["loss"].backward()
    unreached = [name for name, parameter in objective.named_parameters() if parameter.grad is None]
    objective.zero_grad(set_to_none=True)
    for name in unreached:
        objective.get_parameter(name).requires_grad_(False)
    return unreached


def save_trained(
    model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, record: dict[str, Any], output: Path
) -> None:
    """Write the model, its tokenizer and ``record.json`` last, so that a record means a whole model.

    The record gets its ``environment`` here. Of several processes the first alone writes.

    Raises:
        StudyError: the folder cannot be written.
    """
    record["environment"] = environment()
    if processes.rank():
        return
    save_model(model, tokenizer, output)
    write_json(output / "record.json", record)
