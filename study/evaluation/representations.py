"""How alike the layers of teacher and students are, and what a student's last layer is worth."""

from __future__ import annotations

import math
import tempfile
from functools import cached_property
from pathlib import Path
from typing import Any

import torch
from datasets import Dataset
from torch import Tensor, nn
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from study.data.corpus import load_corpus
from study.data.pretrained import load_model
from study.data.tasks import find_task
from study.descriptions import LayerComparison, Run
from study.distillation import losses
from study.distillation.taps import PROJECTIONS, Activations, read_activations
from study.evaluation.finetune import Judging, linear_probe
from study.evaluation.probes import Probes
from study.evaluation.provenance import input_hashes, provenance, weights_hash
from study.families import keep_layers
from study.files import Layout, StudyError
from study.records import Compared, Probe, RepresentationsResult, write_record
from study.records_beside import Snapshot
from study.runtime import compute_device


def relations(states: Tensor, relation_heads: int) -> Tensor:
    r"""MiniLMv2's self-attention relations, softmax(X_a X_a^T / sqrt(d)) for each of A relation heads.

    Args:
        states: (B, T, H) queries, keys or values, all heads side by side; A divides H, d = H / A.

    Returns:
        (B, A, T, T) in float32, rows summing to 1.

    Source: MiniLMv2 (2012.15828), section 3.1.
    """
    width = states.shape[-1] // relation_heads
    heads = states.float().unflatten(-1, (relation_heads, width))
    return (torch.einsum("btad,bsad->bats", heads, heads) / math.sqrt(width)).softmax(dim=-1)


def linear_cka(first: Tensor, second: Tensor) -> float | None:
    r"""Linear centred kernel alignment of two sets of features of the same N tokens, between 0 and 1.

    .. math:: \frac{\|Y^\top X\|_F^2}{\|X^\top X\|_F \, \|Y^\top Y\|_F}, \quad X, Y \text{ centred over tokens}

    1 means equal up to rotation, scale and shift. With few tokens it is too high: N should be well above both widths.
    Features that are the same at every token, to float32's precision, have none: None.

    Args:
        first: (N, p). second: (N, q).

    Source: Kornblith et al. (2019), 1905.00414, section 3.
    """
    return _alignment(*_centred(first), *_centred(second))


def _centred(features: Tensor) -> tuple[Tensor, Tensor]:
    """Features (N, p) less their mean over tokens, and the Frobenius norm of X^T X: 0 if they are but rounding."""
    x = features.double() - features.double().mean(dim=0)
    constant = x.norm() <= torch.finfo(torch.float32).eps * features.double().norm()
    return x, (x.T @ x).norm() * ~constant


def _alignment(x: Tensor, x_norm: Tensor, y: Tensor, y_norm: Tensor) -> float | None:
    norm = x_norm * y_norm
    return None if norm == 0 else float((y.T @ x).square().sum() / norm)


def compare_layers(
    student: Activations, teacher: Activations, relation_heads: int, relation_sequences: int
) -> dict[str, Any]:
    """Every layer of the student against every layer of the teacher.

    Returns:
        cka: [student layer 1..L_S][teacher layer 1..L_T], :func:`linear_cka` of hidden states, None where a layer is
        collapsed; relation_divergence: query, key and value -> the same of
        :func:`study.distillation.losses.attention_relation`, teacher from student, in nats.
    """
    student_layers, teacher_layers = ([layer for layer in sorted(r.hidden) if layer] for r in (student, teacher))
    first = slice(relation_sequences)
    student_states = [_centred(student.hidden[i].flatten(0, 1)) for i in student_layers]
    teacher_states = [_centred(teacher.hidden[j].flatten(0, 1)) for j in teacher_layers]

    def alignment(x: tuple[Tensor, Tensor], y: tuple[Tensor, Tensor]) -> float | None:
        cka = _alignment(*x, *y)
        return cka if cka is None else round(cka, 4)

    def divergence(name: str, i: int, j: int) -> float:
        pair = student.attention[i][name][first], teacher.attention[j][name][first]
        return round(losses.attention_relation(*pair, relation_heads).item(), 4)

    return {
        "cka": [[alignment(x, y) for y in teacher_states] for x in student_states],
        "relation_divergence": {
            name: [[divergence(name, i, j) for j in teacher_layers] for i in student_layers] for name in PROJECTIONS
        },
    }


def probe_last_layers(
    description: Judging,
    folder: Path,
    splits: dict[str, dict[str, Dataset]],
    tokenizer: PreTrainedTokenizerBase,
    seed: int,
    tasks: Path,
) -> dict[str, Probe]:
    """Linear probes of the encoder saved in ``folder``, and of the same encoder without its last layer.

    Attention transfer trains nothing of the last layer but its queries, keys and values: attention output and
    feed-forward network stay as initialised (9/12 of a layer's weights at a feed-forward width of 4 H). The difference
    of the two scores is what the layer is worth. Source: this study's choice.

    Args:
        splits: task -> training and development examples.
        seed: of the probe, as in :func:`study.evaluation.finetune.linear_probe`.
        tasks: the folder that holds the tasks.

    Returns:
        task -> last and last_but_one: the task's main metric on development data.
    """
    encoder: Any = load_model(folder, description.attention_implementation, head=False)
    keep_layers(encoder, encoder.config.num_hidden_layers - 1)

    def score(saved: Path, name: str) -> float:
        return round(linear_probe(description, saved, find_task(tasks, name), splits[name], tokenizer, seed), 4)

    with tempfile.TemporaryDirectory() as shortened:
        encoder.save_pretrained(shortened)
        return {name: Probe(last=score(folder, name), last_but_one=score(Path(shortened), name)) for name in splits}


class Microscope(Probes):
    """Measures of all layers of an encoder; the data that they need are read when they are first needed.

    Args:
        description: of the comparison of layers, with the tasks that are probed.
    """

    description: LayerComparison

    def __init__(self, description: LayerComparison, layout: Layout):
        super().__init__(description, layout, description.seed)

    @cached_property
    def ids(self) -> Tensor:
        """Held-out sequences (N, T) on which layers are compared."""
        rows: Any = load_corpus(self.layout.corpus)["validation"].with_format("torch")["input_ids"][:]
        return torch.as_tensor(rows)[: self.description.representations.sequences].long().to(compute_device())

    @cached_property
    def teacher(self) -> Activations:
        """The teacher's activations on them."""
        return self.activations(load_model(self.layout.teacher, self.description.attention_implementation, head=False))

    @torch.inference_mode()
    def activations(self, model: PreTrainedModel) -> Activations:
        """Hidden states, queries, keys and values of all layers on held-out text."""
        nn.Module.to(model.eval(), compute_device())
        layers = range(1, model.config.num_hidden_layers + 1)
        return read_activations(model, self.ids, hidden_layers=layers, attention_layers=layers)

    def likeness(self, model: PreTrainedModel) -> dict[str, Any]:
        """:func:`compare_layers` of a model and the teacher."""
        heads, sequences = self.description.relation_heads, self.description.representations.relation_sequences
        return compare_layers(self.activations(model), self.teacher, heads, sequences)

    def probes(self, folder: Path) -> dict[str, list[float]]:
        """Task -> development score of a probe of each layer, 0 to the last, of the encoder saved in ``folder``.

        Layer i is probed as the last of an encoder that ends with it.
        """
        encoder: Any = load_model(folder, self.description.attention_implementation, head=False)
        scores: dict[str, list[float]] = {name: [] for name in self.description.tasks}
        for depth in reversed(range(encoder.config.num_hidden_layers + 1)):
            keep_layers(encoder, depth)
            with tempfile.TemporaryDirectory() as shortened:
                encoder.save_pretrained(shortened)
                for name, own in scores.items():
                    own.insert(0, round(self.score(Path(shortened), name), 4))
        return scores

    def look(self, run: Run, step: int, student: PreTrainedModel) -> Snapshot:
        """A student as it is; neither its weights nor the state of random generators change."""
        tokens = step * run.distillation.batch_size * self.ids.shape[1]
        was_training, drawn = student.training, torch.get_rng_state()
        with tempfile.TemporaryDirectory() as folder:
            encoder: Any = student.base_model
            encoder.save_pretrained(folder)
            probes = self.probes(Path(folder))
        likeness = self.likeness(student)
        nn.Module.train(student, was_training)
        torch.set_rng_state(drawn)
        return Snapshot(step=step, tokens=tokens, probes=probes, **likeness)


@torch.inference_mode()
def represent(description: LayerComparison, layout: Layout, output: Path) -> RepresentationsResult:
    """Compare each student of the grid with its teacher, probe its last layers, and write the result file.

    The text compared on is plain, from the corpus' validation split: what students read in use. Relations are
    compared on a part of the sequences. Probes learn from the training examples of the first fine-tuning seed and are
    scored on development data.

    Raises:
        StudyError: a model, a task or the corpus is missing, or the file cannot be written.
    """
    microscope, hashes, models = Microscope(description, layout), input_hashes(layout), []
    probed = microscope.splits, microscope.tokenizer, microscope.seed, layout.tasks
    for run in description.runs:
        folder = layout.student(run.model)
        likeness = microscope.likeness(load_model(folder, description.attention_implementation, head=False))
        cka = [value for line in likeness["cka"] for value in line]
        if not all(value is None or math.isfinite(value) for value in cka):
            raise StudyError(f"{folder}: its hidden states are not finite")
        models.append(
            Compared(
                method=run.method,
                student=run.student,
                seed=run.seed,
                weights=weights_hash(folder),
                probes=probe_last_layers(description, folder, *probed),
                **likeness,
            )
        )
        collapsed = f" ({cka.count(None)} of {len(cka)} pairs of layers have no CKA: one is collapsed)"
        print(f"{run.title} | compared with its teacher{collapsed * (None in cka)}", flush=True)
    result = RepresentationsResult(
        **provenance(description, layout, hashes),
        sequences=len(microscope.ids),
        relation_sequences=description.representations.relation_sequences,
        relation_heads=description.relation_heads,
        models=models,
    )
    write_record(output, result)
    return result
