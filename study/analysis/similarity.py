"""Likeness of layers against quality: tables of what study/evaluation/representations.py measured."""

from __future__ import annotations

import os
from pathlib import Path

import numpy as np
import pandas as pd
from pydantic import model_validator
from scipy.stats import spearmanr

from study.analysis.results import FLOOR, TEACHER, Record, ResultFile, Results, macro, read_result
from study.config import Layout, Params, StudyError, find_root
from study.files import write_file

RUN = ["method", "student", "seed"]


class Probe(Record):
    last: float
    last_but_one: float


class Compared(Record):
    method: str
    student: str
    seed: int
    cka: list[list[float]]
    relation_divergence: dict[str, list[list[float]]]
    probes: dict[str, Probe]

    @model_validator(mode="after")
    def _same_layers(self):
        shape = np.shape(self.cka)
        for name, matrix in self.relation_divergence.items():
            if len(shape) != 2 or np.shape(matrix) != shape:
                raise ValueError(f"relation_divergence.{name} is {np.shape(matrix)}; allowed: {shape}, as cka")
        return self


class RepresentationsResult(ResultFile):
    sequences: int
    relation_sequences: int
    relation_heads: int
    models: list[Compared]


def load_similarity(params: Params, setting: str, root: Path | None = None) -> tuple[pd.DataFrame, pd.DataFrame]:
    """Every pair of layers of every run of the grid, one row each; and every linear probe.

    Columns of the first: method, student, seed, layer (of the student, 1..L_S), teacher_layer (1..L_T), cka, divergence
    (of the attention relations, mean over queries, keys and values, nats). Of the second: method, student, seed, task,
    last (score of a probe on the last layer, development data, 0-1), last_but_one (on the layer below it).

    Raises:
        StudyError: the file is invalid, or lacks a run of the grid.
    """
    root = root or find_root()
    path = Layout(params, setting, root).representations
    result = read_result(path, RepresentationsResult, root, profile=params.profile, setting=setting)
    models = {(model.method, model.student, model.seed): model for model in result.models}
    rows, probes = [], []
    for cell in params.grid.cells(setting):
        if cell not in models:
            raise StudyError(f"{path.relative_to(root)}: models: {' '.join(map(str, cell))} is missing")
        run = dict(zip(RUN, cell, strict=True))
        probes += [run | {"task": task} | probe.model_dump() for task, probe in models[cell].probes.items()]
        divergence = np.mean(list(models[cell].relation_divergence.values()), axis=0)
        for (layer, teacher_layer), cka in np.ndenumerate(models[cell].cka):
            row = run | {"layer": layer + 1, "teacher_layer": teacher_layer + 1}
            rows.append(row | {"cka": cka, "divergence": divergence[layer, teacher_layer]})
    return pd.DataFrame(rows), pd.DataFrame(probes)


def likeness(similarity: pd.DataFrame, probes: pd.DataFrame, results: Results) -> pd.DataFrame:
    """One row per student and method: how alike its layers are to the teacher's, beside what it scores.

    Columns: student, method, last_layers (CKA of the two last layers), depth_kept (Spearman's rho of a student layer
    and the teacher layer most like it: 1 if the order of layers is kept; NaN where it is the same for all),
    divergence (of attention relations, the student's last layer from the teacher's last but one), last_layer_adds (to
    a linear probe, over the layer below it, mean over tasks in points of development data), macro (test, 0-100); means
    over distillation seeds.
    """
    deepest, top = similarity["teacher_layer"].max(), similarity.groupby("student")["layer"].transform("max")
    rows = []
    for (student, method), own in similarity.groupby(["student", "method"], sort=False):
        mean = own.groupby(["layer", "teacher_layer"])[["cka", "divergence"]].mean()
        last = top[own.index[0]]
        nearest = mean["cka"].unstack().idxmax(axis=1)
        order = spearmanr(nearest.index, nearest).statistic if nearest.nunique() > 1 else np.nan
        row = {"student": student, "method": method, "last_layers": mean.loc[(last, deepest), "cka"]}
        rows.append(row | {"depth_kept": order, "divergence": mean.loc[(last, deepest - 1), "divergence"]})
    keys = ["student", "method"]
    added = probes.assign(last_layer_adds=100 * (probes["last"] - probes["last_but_one"]))
    added = added.groupby(keys)["last_layer_adds"].mean()
    scores = macro(results).groupby(keys)["test"].mean().mul(100).rename("macro")
    return pd.DataFrame(rows).join(added, on=keys).join(scores, on=keys)


def found(table: pd.DataFrame) -> str:
    """What :func:`likeness` shows, in sentences made from the numbers."""
    lines = []
    for student, own in table.groupby("student", sort=False):
        trained = own[~own["method"].isin([FLOOR, TEACHER])]
        near, best = trained.loc[trained["last_layers"].idxmax()], trained.loc[trained["macro"].idxmax()]
        rho = spearmanr(trained["last_layers"], trained["macro"])
        lines.append(
            f"* {student}: the last layer most like the teacher's is that of `{near.method}` (CKA"
            f" {near.last_layers:.2f}); the best macro test score has `{best.method}` (CKA {best.last_layers:.2f})."
            f" Rank correlation of CKA and score over {len(trained)} methods, which are not independent of each other:"
            f" {rho.statistic:+.2f}. What the last layer adds to a linear probe, in points: "
            + ", ".join(f"`{row.method}` {row.last_layer_adds:+.1f}" for row in own.itertuples())
            + "."
        )
    return "\n".join(["**Found.**", "", *lines])


def write_similarity(
    similarity: pd.DataFrame, probes: pd.DataFrame, table: pd.DataFrame, folder: str | os.PathLike
) -> None:
    """Write layers.csv (every pair of layers), probes.csv (every probe) and likeness.csv into ``folder``.

    Raises:
        StudyError: the folder cannot be written.
    """
    for name, rows in (("layers", similarity), ("probes", probes), ("likeness", table)):
        write_file(Path(folder) / f"{name}.csv", rows.round(4).to_csv(index=False, lineterminator="\n"))
