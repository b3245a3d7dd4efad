"""How alike the layers of teacher and students are: centred kernel alignment and divergence of attention relations."""

from __future__ import annotations

import math
from pathlib import Path

import torch
from torch import Tensor

from study import losses
from study.config import Layout, Params, StudyError
from study.data.corpus import load_corpus
from study.files import write_json
from study.models.taps import PROJECTIONS, Readings, read
from study.models.teachers import load_model
from study.runtime import environment


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


@torch.inference_mode()
def represent(params: Params, setting: str, output: Path) -> list[dict]:
    """Compare every student of the grid with its teacher on held-out text, and write what was found to ``output``.

    The text is plain, from the corpus' validation split: what students read in use. Relations have as many heads as the
    teacher and are compared on a part of the sequences.

    Returns:
        One entry per run: method, student, seed, and those of :func:`compare_layers`.

    Raises:
        StudyError: a model or the corpus is missing, or the file cannot be written.
    """
    layout, budget = Layout(params, setting), params.representations
    sequences = load_corpus(layout.corpus)["validation"].with_format("torch")["input_ids"][:]
    ids = torch.as_tensor(sequences)[: budget.sequences].long()

    def readings(folder: Path) -> Readings:
        model = load_model(folder, params.attention_implementation, head=False).eval()
        layers = range(1, model.config.num_hidden_layers + 1)
        return read(model, ids, hidden_layers=layers, attention_layers=layers)

    teacher, heads = readings(layout.teacher), params.settings[setting].teacher.heads
    found = []
    for method, student, seed in params.grid.cells(setting):
        own = readings(layout.student(method, student, seed))
        compared = compare_layers(own, teacher, heads, budget.relation_sequences)
        if not math.isfinite(sum(map(sum, compared["cka"]))):
            raise StudyError(f"{layout.student(method, student, seed)}: its hidden states are not finite")
        found.append({"method": method, "student": student, "seed": seed} | compared)
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
