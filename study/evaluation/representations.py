"""How alike the layers of teacher and students are, and what a student's last layer is worth."""

from __future__ import annotations

import math
import tempfile
from pathlib import Path

import torch
from datasets import Dataset
from torch import Tensor
from transformers import PreTrainedTokenizerBase

from study import losses
from study.config import Layout, Params, StudyError
from study.data.corpus import load_corpus
from study.data.tasks import TASKS
from study.files import write_json
from study.models.taps import PROJECTIONS, Readings, read
from study.models.teachers import load_model, load_tokenizer
from study.runtime import environment
from study.training.finetune import linear_probe
from study.training.tune import splits_without_test


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


def linear_cka(first: Tensor, second: Tensor) -> float:
    r"""Linear centred kernel alignment of two sets of features of the same N tokens, between 0 and 1.

    .. math:: \frac{\|Y^\top X\|_F^2}{\|X^\top X\|_F \, \|Y^\top Y\|_F}, \quad X, Y \text{ centred over tokens}

    1 means equal up to rotation, scale and shift. With few tokens it is too high: N should be well above both widths.

    Args:
        first: (N, p). second: (N, q).

    Source: Kornblith et al. (2019), 1905.00414, section 3.
    """
    return _alignment(*_centred(first), *_centred(second))


def _centred(features: Tensor) -> tuple[Tensor, Tensor]:
    """Features (N, p) less their mean over tokens, and the Frobenius norm of X^T X."""
    x = features.double() - features.double().mean(dim=0)
    return x, (x.T @ x).norm()


def _alignment(x: Tensor, x_norm: Tensor, y: Tensor, y_norm: Tensor) -> float:
    return float((y.T @ x).square().sum() / (x_norm * y_norm))


def compare_layers(student: Readings, teacher: Readings, relation_heads: int, relation_sequences: int) -> dict:
    """Every layer of the student against every layer of the teacher.

    Returns:
        cka: [student layer 1..L_S][teacher layer 1..L_T], :func:`linear_cka` of hidden states; relation_divergence:
        query, key and value -> the same of :func:`study.losses.attention_relation`, teacher from student, in nats.
    """
    own, of_teacher = ([layer for layer in sorted(r.hidden) if layer] for r in (student, teacher))
    first = slice(relation_sequences)
    own_states = [_centred(student.hidden[i].flatten(0, 1)) for i in own]
    teacher_states = [_centred(teacher.hidden[j].flatten(0, 1)) for j in of_teacher]
    return {
        "cka": [[round(_alignment(*x, *y), 4) for y in teacher_states] for x in own_states],
        "relation_divergence": {
            name: [
                [
                    round(
                        losses.attention_relation(
                            student.attention[i][name][first], teacher.attention[j][name][first], relation_heads
                        ).item(),
                        4,
                    )
                    for j in of_teacher
                ]
                for i in own
            ]
            for name in PROJECTIONS
        },
    }


def probe_last_layers(
    params: Params, folder: Path, splits: dict[str, dict[str, Dataset]], tokenizer: PreTrainedTokenizerBase, seed: int
) -> dict[str, dict[str, float]]:
    """Linear probes of the encoder saved in ``folder``, and of the same encoder without its last layer.

    Attention transfer trains nothing of the last layer but its queries, keys and values: attention output and
    feed-forward network stay as initialised (9/12 of a layer's weights at a feed-forward width of 4 H). The difference
    of the two scores is what the layer is worth. Source: this study's choice.

    Args:
        splits: task -> training and development examples.
        seed: of the probe, as in :func:`study.training.finetune.linear_probe`.

    Returns:
        task -> last and last_but_one: the task's main metric on development data.
    """
    encoder = load_model(folder, params.attention_implementation, head=False)
    del encoder.encoder.layer[-1]
    encoder.config.num_hidden_layers -= 1
    with tempfile.TemporaryDirectory() as shortened:
        encoder.save_pretrained(shortened)
        places = {"last": folder, "last_but_one": Path(shortened)}
        return {
            name: {
                layer: round(linear_probe(params, place, TASKS[name], examples, tokenizer, seed), 4)
                for layer, place in places.items()
            }
            for name, examples in splits.items()
        }


@torch.inference_mode()
def represent(params: Params, setting: str, output: Path) -> list[dict]:
    """Compare each student of the grid with its teacher, probe its last layers, and write what was found to ``output``.

    The text compared on is plain, from the corpus' validation split: what students read in use. Relations have as many
    heads as the teacher and are compared on a part of the sequences. Probes learn from the training examples of the
    first fine-tuning seed and are scored on development data.

    Returns:
        One entry per run: method, student, seed, those of :func:`compare_layers`, and probes of
        :func:`probe_last_layers`.

    Raises:
        StudyError: a model, a task or the corpus is missing, or the file cannot be written.
    """
    layout, budget = Layout(params, setting), params.representations
    sequences = load_corpus(layout.corpus)["validation"].with_format("torch")["input_ids"][:]
    ids = torch.as_tensor(sequences)[: budget.sequences].long()

    def readings(folder: Path) -> Readings:
        model = load_model(folder, params.attention_implementation, head=False).eval()
        layers = range(1, model.config.num_hidden_layers + 1)
        return read(model, ids, hidden_layers=layers, attention_layers=layers)

    teacher, heads = readings(layout.teacher), params.settings[setting].teacher.heads
    tokenizer, probe_seed = load_tokenizer(layout.teacher), params.finetuning.seeds[0]
    splits = splits_without_test(params, setting, tokenizer, probe_seed)
    found = []
    for method, student, seed in params.grid.cells(setting):
        folder = layout.student(method, student, seed)
        compared = compare_layers(readings(folder), teacher, heads, budget.relation_sequences)
        if not math.isfinite(sum(map(sum, compared["cka"]))):
            raise StudyError(f"{folder}: its hidden states are not finite")
        probes = probe_last_layers(params, folder, splits, tokenizer, probe_seed)
        found.append({"method": method, "student": student, "seed": seed} | compared | {"probes": probes})
        print(f"{setting} {method} {student} seed {seed} | compared with its teacher", flush=True)
    write_json(
        output,
        {
            "profile": params.profile,
            "setting": setting,
            "sequences": len(ids),
            "relation_sequences": budget.relation_sequences,
            "relation_heads": heads,
            "models": found,
            "environment": environment(),
        },
    )
    return found
