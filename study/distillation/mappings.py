"""Layer mappings phi: which teacher layers each student layer is tied to in hidden-state transfer."""

from __future__ import annotations

import random

STRATEGIES = ("last", "top", "uniform", "uniform-consecutive", "uniform+last", "reverse", "all-to-one", "random")


def layer_mapping(strategy: str, teacher_layers: int, student_layers: int) -> dict[int, tuple[int, ...]]:
    """Return phi(i), the teacher layers tied to student layer i.

    Layers count from 1; layer 0 is the embedding output and never mapped. With L_T = ``teacher_layers``,
    L_S = ``student_layers`` and i = 1..L_S:

    ===================== ====================================================================== =================
    strategy              phi(i)                                                                 family
    ===================== ====================================================================== =================
    last                  {L_T}, for i = L_S only                                                single layer
    top                   {L_T - L_S + i}                                                        1-to-1
    uniform               {floor(i L_T / L_S)}                                                   1-to-1
    uniform-consecutive   i-th of L_S consecutive blocks of 1..L_T, sizes differing by at most 1  1-to-N
    uniform+last          {floor(i L_T / L_S), L_T - L_S + i}                                    1-to-N
    reverse               {floor((L_S + 1 - i) L_T / L_S)}: uniform upside down                  control
    all-to-one            {L_T} for every i                                                      control
    random                L_S distinct layers in increasing order, drawn once for the two depths control
    ===================== ====================================================================== =================

    ``uniform-consecutive`` gives the first blocks the extra layers when L_S does not divide L_T.

    Source: Udagawa et al. (2310.08797), section 2, for the first five; the near-equal blocks are this study's choice
    (blocks of ceil(L_T / L_S) would leave top student layers without a target). Controls after 2502.04499.

    Raises:
        ValueError: an unknown strategy, fewer than one layer, or more student than teacher layers.
    """
    if strategy not in STRATEGIES:
        raise ValueError(f"layer mapping {strategy!r} is unknown; allowed: {', '.join(STRATEGIES)}")
    if not 1 <= student_layers <= teacher_layers:
        raise ValueError(
            f"layer mapping needs 1 <= student layers <= teacher layers, not {student_layers} and {teacher_layers}"
        )
    layers = range(1, student_layers + 1)
    top = {i: teacher_layers - student_layers + i for i in layers}
    uniform = {i: i * teacher_layers // student_layers for i in layers}
    if strategy == "last":
        return {student_layers: (teacher_layers,)}
    if strategy == "top":
        return {i: (top[i],) for i in layers}
    if strategy == "uniform":
        return {i: (uniform[i],) for i in layers}
    if strategy == "uniform-consecutive":
        size, extra = divmod(teacher_layers, student_layers)
        ends = {i: i * size + min(i, extra) for i in range(student_layers + 1)}
        return {i: tuple(range(ends[i - 1] + 1, ends[i] + 1)) for i in layers}
    if strategy == "uniform+last":
        return {i: tuple(sorted({uniform[i], top[i]})) for i in layers}
    if strategy == "reverse":
        return {i: (uniform[student_layers + 1 - i],) for i in layers}
    if strategy == "all-to-one":
        return {i: (teacher_layers,) for i in layers}
    drawn = random.Random(f"{teacher_layers} {student_layers}").sample(range(1, teacher_layers + 1), student_layers)
    return {i: (j,) for i, j in zip(layers, sorted(drawn), strict=True)}
