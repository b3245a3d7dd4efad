"""Tables of a student's layers while it trains, from the file that `make dynamics` writes."""

from __future__ import annotations

from typing import Any

import numpy as np
import pandas as pd

from study.records_beside import DynamicsResult

#: Measures of a layer beside the scores of its probes -> what they are called.
MEASURES = {"cka": "CKA with the teacher's layer", "divergence": "divergence of relations (nats)"}


def measures(result: DynamicsResult) -> pd.DataFrame:
    """Every measure of every layer at every snapshot: method, budget, step, tokens, layer, measure, value.

    ``cka`` of layer i is that with the teacher's layer of the same share of the depth, floor(i L_T / L_S), and
    ``divergence`` the mean over queries, keys and values of the last layer with the teacher's layer L_T - 1, which is
    what MiniLMv2 minimises. Scores are between 0 and 100.
    """
    rows: list[tuple[Any, ...]] = []
    for run in result.runs:
        for at in run.snapshots:
            place = (run.method, run.budget, at.step, at.tokens)
            depth, teacher_depth = len(at.cka), len(at.cka[0])
            for task, scores in at.probes.items():
                rows += [(*place, layer, task, 100 * score) for layer, score in enumerate(scores)]
            cka = np.array(at.cka, dtype=float)
            rows += [(*place, i, "cka", cka[i - 1, i * teacher_depth // depth - 1]) for i in range(1, depth + 1)]
            divergence = np.mean([matrix[-1][-2] for matrix in at.relation_divergence.values()])
            rows.append((*place, depth, "divergence", divergence))
    return pd.DataFrame(rows, columns=["method", "budget", "step", "tokens", "layer", "measure", "value"])


def courses(measured: pd.DataFrame) -> pd.DataFrame:
    """Of each watched run, task and layer: the score at the start, the lowest and when, and the last.

    ``lost`` is start minus lowest; ``regained``, the share of it that the last score has won back (above 1: more than
    there was; empty where nothing was lost).
    """
    rows = []
    watched = measured["budget"] == measured["budget"].iloc[0]
    scores = measured[watched & ~measured["measure"].isin(MEASURES)]
    for (method, task, layer), own in scores.groupby(["method", "measure", "layer"], sort=False):
        own = own.sort_values("step")
        start, end = own["value"].iloc[0], own["value"].iloc[-1]
        lowest = own.loc[own["value"].idxmin()]
        lost = start - lowest["value"]
        row = {"method": method, "task": task, "layer": layer, "start": start, "lowest": lowest["value"]}
        row |= {"at tokens": int(lowest["tokens"]), "end": end, "lost": lost}
        rows.append(row | {"regained": (end - lowest["value"]) / lost if lost > 0 else np.nan})
    return pd.DataFrame(rows)
