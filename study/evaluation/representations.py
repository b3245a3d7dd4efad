"""How alike the layers of teacher and students are, and what a student's last layer is worth."""

from __future__ import annotations

import math
import tempfile
from pathlib import Path
from typing import Any

import torch
from datasets import Dataset
from torch import Tensor
from transformers import PreTrainedTokenizerBase

from study.data.corpus import load_corpus
from study.data.pretrained import load_model, load_tokenizer
from study.data.tasks import find_task
from study.descriptions import LayerComparison
from study.distillation import losses
from study.distillation.taps import PROJECTIONS, Activations, read_activations
from study.evaluation.finetune import Judging, linear_probe, splits_without_test
from study.evaluation.provenance import input_hashes, provenance, weights_hash
from study.families import keep_layers
from study.files import Layout, StudyError
from study.records import Compared, Probe, RepresentationsResult, write_record
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
    with tempfile.TemporaryDirectory() as shortened:
        encoder.save_pretrained(shortened)
        folders = {"last": folder, "last_but_one": Path(shortened)}
        return {
            name: Probe(
                **{
                    layer: round(linear_probe(description, saved, find_task(tasks, name), examples, tokenizer, seed), 4)
                    for layer, saved in folders.items()
                }
            )
            for name, examples in splits.items()
        }


@torch.inference_mode()
def represent(description: LayerComparison, layout: Layout, output: Path) -> RepresentationsResult:
    """Compare each student of the grid with its teacher, probe its last layers, and write the result file.

    The text compared on is plain, from the corpus' validation split: what students read in use. Relations are
    compared on a part of the sequences. Probes learn from the training examples of the first fine-tuning seed and are
    scored on development data.

    Raises:
        StudyError: a model, a task or the corpus is missing, or the file cannot be written.
    """
    budget, heads = description.representations, description.relation_heads
    sequences = load_corpus(layout.corpus)["validation"].with_format("torch")["input_ids"][:]
    device = compute_device()
    ids = torch.as_tensor(sequences)[: budget.sequences].long().to(device)

    def activations(folder: Path) -> Activations:
        model = load_model(folder, description.attention_implementation, head=False).eval().to(device)
        layers = range(1, model.config.num_hidden_layers + 1)
        return read_activations(model, ids, hidden_layers=layers, attention_layers=layers)

    teacher = activations(layout.teacher)
    hashes = input_hashes(layout)
    tokenizer, probe_seed = load_tokenizer(layout.teacher), description.finetuning.seeds[0]
    splits = splits_without_test(description, layout, tokenizer, probe_seed)
    models = []
    for run in description.runs:
        folder = layout.student(run.model)
        likeness = compare_layers(activations(folder), teacher, heads, budget.relation_sequences)
        cka = [value for line in likeness["cka"] for value in line]
        if not all(value is None or math.isfinite(value) for value in cka):
            raise StudyError(f"{folder}: its hidden states are not finite")
        models.append(
            Compared(
                method=run.method,
                student=run.student,
                seed=run.seed,
                weights=weights_hash(folder),
                probes=probe_last_layers(description, folder, splits, tokenizer, probe_seed, layout.tasks),
                **likeness,
            )
        )
        collapsed = f" ({cka.count(None)} of {len(cka)} pairs of layers have no CKA: one is collapsed)"
        print(f"{run.title} | compared with its teacher{collapsed * (None in cka)}", flush=True)
    result = RepresentationsResult(
        **provenance(description, layout, hashes),
        sequences=len(ids),
        relation_sequences=budget.relation_sequences,
        relation_heads=heads,
        models=models,
    )
    write_record(output, result)
    return result
