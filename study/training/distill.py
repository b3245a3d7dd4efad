"""Training of teachers (MLM adaptation) and students (distillation) by transformers' Trainer."""

from __future__ import annotations

import hashlib
import json
import math
import shutil
import time
from collections import defaultdict
from pathlib import Path

import numpy as np
import torch
from datasets import Dataset
from torch import Tensor, nn
from transformers import (
    EarlyStoppingCallback,
    PreTrainedTokenizerBase,
    PrinterCallback,
    Trainer,
    TrainerCallback,
    TrainingArguments,
    default_data_collator,
)

import study
from study.config import Layout, Masking, Params, StudyError, Untrained, cell_title
from study.data.corpus import load_corpus
from study.models.students import create_student
from study.models.teachers import load_model, load_tokenizer, save_model, with_language_modelling_head
from study.runtime import environment, keep_freed_memory, use_bf16
from study.training.objectives import OBJECTIVES, MaskedLanguageModelling, Objective
from study.training.shared import SharedTeacher

#: Parameters that the teacher's outputs depend on, and with them every student.
COMMON = {"masking", "distillation", "precision", "attention_implementation"}

START_SEQUENCES = 32  # of the training stream, for projections and projected initialisation


class MaskedSequences(torch.utils.data.Dataset):
    """A stream of packed sequences with masks, a pure function of (seed, position in the stream).

    Every method of one seed therefore sees the same sequences under the same masks in the same order, whatever it does
    to random number generators, and a resumed run sees what an uninterrupted one would have seen. Each pass over the
    sequences has an order and masks of its own. The number of masked tokens M = round(fraction x T) is the same for
    every sequence, so shapes stay static; special tokens are never masked.

    Args:
        sequences: rows of ``input_ids``, all of T tokens.
        length: items of the stream; None means one pass in the given order (for evaluation).
        first: ``item`` of the first sequence; the others follow.
    """

    def __init__(
        self,
        sequences: Dataset,
        masking: Masking,
        tokenizer: PreTrainedTokenizerBase,
        seed: int,
        length: int | None = None,
        first: int = 0,
    ):
        self.sequences = sequences.with_format("numpy")
        self.masking, self.seed, self.first = masking, seed, first
        self.length = len(sequences) if length is None else length
        self.shuffled = length is not None
        self.mask_id, self.vocabulary = tokenizer.mask_token_id, len(tokenizer)
        self.special = np.array(tokenizer.all_special_ids)
        self._order = (-1, np.empty(0, dtype=int))

    def __len__(self) -> int:
        return self.length

    def __getitem__(self, item: int) -> dict[str, np.ndarray]:
        epoch, index = divmod(item, len(self.sequences))
        if self.shuffled:
            if self._order[0] != epoch:
                self._order = (epoch, np.random.default_rng([self.seed, epoch]).permutation(len(self.sequences)))
            index = int(self._order[1][index])
        tokens = self.sequences[index]["input_ids"].astype(np.int64)
        generator = np.random.default_rng([self.seed, 1, item])
        count = max(1, round(self.masking.fraction * len(tokens)))
        words = np.flatnonzero(~np.isin(tokens, self.special))
        if len(words) < count:
            raise StudyError(
                f"masking.fraction = {self.masking.fraction} masks {count} of {len(tokens)} tokens;"
                f" allowed: at most the {len(words)} of sequence {index} that are no special tokens"
            )
        positions = np.sort(generator.permutation(words)[:count])
        draw = generator.random(count)
        replaced = np.where(
            draw < self.masking.mask_token,
            self.mask_id,
            np.where(
                draw < self.masking.mask_token + self.masking.random_token,
                generator.integers(self.vocabulary, size=count),
                tokens[positions],
            ),
        )
        masked = tokens.copy()
        masked[positions] = replaced
        return {
            "input_ids": tokens,
            "masked_input_ids": masked,
            "positions": positions,
            "labels": tokens[positions],
            "item": self.first + item,
        }


class Progress(TrainerCallback):
    """One flushed line per logging step: what runs, step, loss, tokens per second, time left."""

    def __init__(self, title: str, tokens_per_step: int):
        self.title, self.tokens_per_step = title, tokens_per_step

    def on_train_begin(self, args, state, control, **kwargs):
        self.began, self.first = time.monotonic(), state.global_step

    def on_log(self, args, state, control, logs=None, **kwargs):
        loss = {"loss": "loss", "eval_loss": "held-out loss"}
        shown = [f"{text} {logs[key]:.4g}" for key, text in loss.items() if key in logs]
        done, elapsed = state.global_step - self.first, time.monotonic() - self.began
        if not shown:
            return
        if done > 0:
            left = elapsed / done * (state.max_steps - state.global_step)
            speed = self.tokens_per_step * done / elapsed
            shown += [f"{speed:,.0f} tokens/s", f"{int(left) // 60}:{int(left) % 60:02d} left"]
        print(f"{self.title} | step {state.global_step}/{state.max_steps} | {' | '.join(shown)}", flush=True)


class DivergedError(StudyError):
    """A loss that is not finite: the learning rate is too high, or the input is damaged."""


class DistillationTrainer(Trainer):
    """The Trainer, with elapsed time in its log and an error as soon as a logged loss is not finite."""

    def log(self, logs: dict[str, float], start_time: float | None = None) -> None:
        for key in ("loss", "eval_loss"):
            if not math.isfinite(logs.get(key, 0.0)):
                raise DivergedError(
                    f"{key} = {logs[key]} at step {self.state.global_step}: training stopped, no result written"
                )
        now = time.monotonic()
        earlier = next((entry["seconds"] for entry in reversed(self.state.log_history) if "seconds" in entry), 0.0)
        logs["seconds"] = earlier + now - getattr(self, "_last_log", now)
        self._last_log = now
        super().log(logs, start_time)


def train(
    objective: Objective,
    training: MaskedSequences,
    validation: MaskedSequences,
    arguments: TrainingArguments,
    title: str,
    callbacks: list[TrainerCallback] | None = None,
) -> dict:
    """Train ``objective`` from the last complete checkpoint in ``arguments.output_dir``, or from the start.

    Returns:
        the curve of held-out losses, the training losses, steps, tokens and seconds.

    Raises:
        DivergedError: a loss that is not finite.
    """
    checkpoint = _last_complete_checkpoint(Path(arguments.output_dir))
    arguments.eval_on_start = checkpoint is None  # else the curve would hold that step twice
    objective.accepts_loss_kwargs = False  # its losses are means: the Trainer has to divide under accumulation
    trainer = DistillationTrainer(
        model=objective,
        args=arguments,
        train_dataset=training,
        eval_dataset=validation,
        data_collator=default_data_collator,
        callbacks=callbacks,
    )
    if objective.teacher is not None:
        objective.teacher.to(arguments.device)
    sequence_length = len(training[0]["input_ids"])
    batch_size = arguments.per_device_train_batch_size * arguments.gradient_accumulation_steps * arguments.world_size
    trainer.remove_callback(PrinterCallback)
    trainer.add_callback(Progress(title, batch_size * sequence_length))
    trainer.train(resume_from_checkpoint=checkpoint)
    history = trainer.state.log_history
    if not any("eval_loss" in entry and entry["step"] == trainer.state.global_step for entry in history):
        trainer.evaluate()
    tokens = batch_size * sequence_length

    def curve(key: str) -> list[dict]:
        return [
            {"step": e["step"], "tokens": e["step"] * tokens, "seconds": round(e["seconds"], 1), "loss": e[key]}
            for e in history
            if key in e
        ]

    seconds = history[-1]["seconds"]
    return {
        "steps": trainer.state.global_step,
        "tokens": trainer.state.global_step * tokens,
        "seconds": round(seconds, 1),
        "tokens_per_second": round(trainer.state.global_step * tokens / max(seconds, 1e-9), 1),
        "precision": "bf16" if arguments.bf16 else "fp32",
        "threads": torch.get_num_threads(),
        "curve": curve("eval_loss"),
        "training_curve": curve("loss"),
    }


def distil(params: Params, setting: str, method: str, student: str, seed: int, output: Path) -> dict:
    """Distil one student and save it to ``output`` (loadable by ``from_pretrained``) with its ``record.json``.

    A run that was killed continues from its last checkpoint when called again with the same parameters, code, corpus
    and teacher.

    Raises:
        StudyError: an unknown name, a missing input, a corpus shorter than one batch.
        DivergedError: a loss that is not finite.
    """
    layout = Layout(params, setting)
    _make_folder(output.parent)  # before any work
    for key, name, known in (("method", method, params.methods), ("student", student, params.students)):
        if name not in known:
            raise StudyError(f"{key} {name!r} is unknown; allowed: {', '.join(known)}")
    grid, params = params, params.of_method(method, student)
    chosen, budget = params.methods[method], params.distillation
    tokenizer = load_tokenizer(layout.teacher)
    teacher = load_model(layout.teacher, params.attention_implementation)
    if not all(parameter.isfinite().all() for parameter in teacher.parameters()):
        raise StudyError(f"{layout.teacher}: holds weights that are not finite; run the stage that writes it again")
    corpus = load_corpus(layout.corpus)
    if len(corpus["train"]) < budget.batch_size:
        raise StudyError(
            f"{layout.corpus}: {len(corpus['train'])} training sequences; distillation.batch_size = {budget.batch_size}"
            " needs at least one batch"
        )
    stream = MaskedSequences(corpus["train"], params.masking, tokenizer, seed, budget.steps * budget.batch_size)
    start = default_data_collator([stream[i] for i in range(START_SEQUENCES)])
    model = create_student(teacher, params.students[student], params.initialisation, start["input_ids"], seed)
    record = {
        "objective": chosen.objective,
        "learning_rate": getattr(chosen, "learning_rate", None),
        "initialisation": params.initialisation,
        "inputs": budget.inputs,
        "fast_paths": params.fast_paths,
        "method": chosen.model_dump(exclude_none=True),
    }
    if isinstance(chosen, Untrained):
        record.update(steps=0, tokens=0, seconds=0.0)
        _save(model, tokenizer, record, output)
        return record

    switch_off_dropout(model)
    fused = "fused-losses" in params.fast_paths
    objective = OBJECTIVES[chosen.objective](model, teacher, chosen, budget, fused)
    objective.start(start)
    freeze_untrained(objective, {key: value[:1] for key, value in start.items()})
    validation_sequences = corpus["validation"].select(
        range(min(budget.validation_sequences, len(corpus["validation"])))
    )
    validation = MaskedSequences(validation_sequences, params.masking, tokenizer, seed=0, first=len(stream))
    inputs = [fingerprint(layout.teacher), fingerprint(layout.corpus)]
    common = {"seed": seed, "inputs": inputs, **params.model_dump(include=COMMON)}
    teacher_outputs = layout.teacher_outputs / digest(common)
    shape = len(stream) + len(validation), start["input_ids"].shape[1]
    others = read_by_grid(grid, setting, method, teacher.config.num_hidden_layers)
    start_fast_paths(params, objective, teacher_outputs, shape, others)
    identity = common | {
        "initialisation": params.initialisation,
        "fast_paths": params.fast_paths,
        "method": chosen.model_dump(exclude_none=True),
        "student": params.students[student].model_dump(exclude={"learning_rates"}),
    }
    with Checkpoints(layout.checkpoints, identity) as folder:
        arguments = TrainingArguments(
            output_dir=str(folder),
            max_steps=budget.steps,
            per_device_train_batch_size=budget.batch_size // budget.accumulation_steps,
            gradient_accumulation_steps=budget.accumulation_steps,
            learning_rate=chosen.learning_rate,
            warmup_steps=round(budget.warmup_fraction * budget.steps),
            weight_decay=budget.weight_decay,
            adam_epsilon=budget.adam_epsilon,
            max_grad_norm=budget.max_gradient_norm,
            eval_steps=budget.evaluate_every,
            save_steps=budget.save_every,
            seed=seed,
            **common_arguments(params, budget.batch_size),
        )
        title = cell_title(params, setting, method, student, seed)
        record |= train(objective, stream, validation, arguments, title)
        _save(objective.student, tokenizer, record, output)
    return record


def adapt_teacher(params: Params, setting: str, output: Path) -> dict:
    """Continue MLM training of the setting's teacher on the corpus, so that it has an output distribution to transfer.

    It stops at ``adaptation.steps``, or earlier once the held-out MLM loss has improved by less than
    ``adaptation.min_improvement`` nats in ``adaptation.patience`` evaluations in a row.

    Raises:
        StudyError: as :func:`distil`.
    """
    layout, budget = Layout(params, setting), params.adaptation
    _make_folder(output.parent)
    tokenizer = load_tokenizer(layout.encoder)
    corpus = load_corpus(layout.corpus)
    encoder = load_model(layout.encoder, params.attention_implementation, head=False)
    tokens = torch.from_numpy(
        np.concatenate([batch["input_ids"].ravel() for batch in corpus["train"].with_format("numpy").iter(1024)])
    )
    model = with_language_modelling_head(encoder, torch.bincount(tokens.long(), minlength=encoder.config.vocab_size))
    switch_off_dropout(model)
    identity = {
        "params": params.model_dump(include={"masking", "adaptation", "precision", "attention_implementation"}),
        "inputs": [fingerprint(layout.encoder), fingerprint(layout.corpus)],
    }
    objective = MaskedLanguageModelling(model, None, params.methods.get("mlm"), params.distillation)
    if "kept-memory" in params.fast_paths:
        keep_freed_memory()
    with Checkpoints(layout.checkpoints, identity) as folder:
        arguments = TrainingArguments(
            output_dir=str(folder),
            max_steps=budget.steps,
            per_device_train_batch_size=budget.batch_size,
            learning_rate=budget.learning_rate,
            warmup_steps=budget.warmup_steps,
            weight_decay=budget.weight_decay,
            eval_steps=budget.evaluate_every,
            save_steps=budget.evaluate_every,
            metric_for_best_model="eval_loss",
            greater_is_better=False,
            seed=0,
            **common_arguments(params, budget.batch_size),
        )
        record = {"objective": "masked_language_modelling", "learning_rate": budget.learning_rate} | train(
            objective,
            MaskedSequences(corpus["train"], params.masking, tokenizer, 0, budget.steps * budget.batch_size),
            MaskedSequences(corpus["validation"], params.masking, tokenizer, seed=0),
            arguments,
            f"{setting} teacher",
            [EarlyStoppingCallback(budget.patience, budget.min_improvement)],
        )
        record["stopped"] = "step limit" if record["steps"] == budget.steps else "held-out loss no longer improves"
        _save(model, tokenizer, record, output)
    return record


def read_by_grid(params: Params, setting: str, method: str, teacher_layers: int) -> dict[str, set[int]]:
    """What the setting's cells, ablations too, read of the teacher on the very sequences that ``method`` reads.

    As keyword arguments of :func:`study.models.taps.read`; ``teacher_layers``: the teacher's depth.
    """
    common, layers = params.of_method(method).model_dump(include=COMMON), defaultdict(set)
    for part in filter(None, (params, params.of_ablations(setting))):
        for name, student, _ in part.grid.cells(setting):
            other = params.methods[name]
            if isinstance(other, Untrained) or params.of_method(name).model_dump(include=COMMON) != common:
                continue
            reads = OBJECTIVES[other.objective].reads(other, teacher_layers, params.students[student].layers)
            for kind, own in reads.items():
                layers[kind] |= own
    return dict(layers)


def start_fast_paths(
    params: Params,
    objective: Objective,
    teacher_outputs: Path,
    shape: tuple[int, int],
    others: dict[str, set[int]] | None = None,
) -> None:
    """Switch on those of ``params.fast_paths`` that are not built into the objective.

    Args:
        teacher_outputs: a folder that names everything that the teacher's outputs depend on.
        shape: (sequences that the run numbers, tokens of each).
        others: what other runs read of the teacher (:func:`read_by_grid`); left out if the disk is too full for it.
    """
    bf16 = use_bf16(params.precision)
    if "kept-memory" in params.fast_paths:
        keep_freed_memory()
    if objective.teacher is None:
        return
    if "rounded-teacher" in params.fast_paths and bf16:
        objective.round_teacher()
    if "shared-teacher" in params.fast_paths:
        kind = torch.bfloat16 if bf16 else torch.float32
        shape = (*shape, objective.teacher.config.hidden_size)
        own = objective.teacher_layers()
        stores = (SharedTeacher(teacher_outputs, shape, kind, own, also) for also in (others, None))
        objective.shared_teacher = next((store for store in stores if store.open()), None)
        if objective.shared_teacher is None:
            print(f"{teacher_outputs}: the disk is too full to share what the teacher computes", flush=True)


def common_arguments(params: Params, batch_size: int) -> dict:
    """What every training run of the study has in common, as arguments of TrainingArguments."""
    return {
        "per_device_eval_batch_size": batch_size,
        "bf16": use_bf16(params.precision),
        "use_cpu": not torch.cuda.is_available(),
        "optim": "adamw_torch_fused",
        "lr_scheduler_type": "linear",
        "train_sampling_strategy": "sequential",  # the stream is shuffled already
        "eval_strategy": "steps",
        "restore_callback_states_from_checkpoint": True,  # the patience of early stopping
        "save_strategy": "steps",
        "save_total_limit": 2,
        "logging_steps": 10,
        "logging_nan_inf_filter": False,
        "label_names": ["labels"],
        "prediction_loss_only": True,
        "remove_unused_columns": False,
        "report_to": "none",
        "disable_tqdm": True,
        "dataloader_pin_memory": False,
    }


class Checkpoints:
    """A folder of checkpoints that only a run of the same identity finds again; removed when the block succeeds.

    The identity covers parameters, inputs and the code of the study, by hash.
    """

    def __init__(self, parent: Path, identity: dict):
        self.folder = parent / digest(identity)

    def __enter__(self) -> Path:
        self.folder.mkdir(parents=True, exist_ok=True)
        return self.folder

    def __exit__(self, kind, error, traceback) -> None:
        if kind is None or issubclass(kind, StudyError):
            shutil.rmtree(self.folder, ignore_errors=True)


def digest(identity: dict) -> str:
    """A name for what depends on ``identity`` and on the code of the study that trains."""
    package = Path(study.__file__).parent
    code = [fingerprint(package / part) for part in ("fused.py", "losses.py", "mappings.py", "models", "training")]
    return hashlib.sha256(json.dumps([identity, code], sort_keys=True).encode()).hexdigest()[:24]


def fingerprint(path: Path) -> str:
    """sha256 over the relative names and contents of a file or of all files below a folder (compiled code left out)."""
    digest = hashlib.sha256()
    files = [path] if path.is_file() else sorted(p for p in path.rglob("*") if p.is_file() and p.suffix != ".pyc")
    for file in files:
        digest.update(str(file.relative_to(path)).encode() + b"\0" + hashlib.sha256(file.read_bytes()).digest())
    return digest.hexdigest()


def switch_off_dropout(model: nn.Module) -> None:
    """Train without dropout (this study's choice: budgets are far from overfitting); the saved config keeps it."""
    for module in model.modules():
        if isinstance(module, nn.Dropout):
            module.p = 0.0


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


def _last_complete_checkpoint(folder: Path) -> str | None:
    """The newest checkpoint whose last-written file is whole; half-written ones are removed."""
    checkpoints = sorted(folder.glob("checkpoint-*"), key=lambda path: int(path.name.rpartition("-")[2]), reverse=True)
    for checkpoint in checkpoints:
        try:
            json.loads((checkpoint / "trainer_state.json").read_text())
            return str(checkpoint)
        except (OSError, ValueError):
            shutil.rmtree(checkpoint)
    return None


def _make_folder(folder: Path) -> None:
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise StudyError(f"{folder}: cannot be written ({error.strerror})") from None


def _save(model, tokenizer: PreTrainedTokenizerBase, record: dict, output: Path) -> None:
    """Write the model, its tokenizer and ``record.json`` last, so that a record means a whole model."""
    save_model(model, tokenizer, output)
    record["environment"] = environment()
    try:
        (output / "record.json").write_text(json.dumps(record, indent=1) + "\n")
    except OSError as error:
        raise StudyError(f"{output}: cannot be written ({error.strerror})") from None
