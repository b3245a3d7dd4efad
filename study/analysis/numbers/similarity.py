"""Likeness of layers against quality: tables of what study/evaluation/representations.py measured."""

from __future__ import annotations

import os
from collections.abc import Callable

import numpy as np
import pandas as pd
from scipy.stats import spearmanr

from study.analysis.numbers.results import FLOOR
from study.analysis.numbers.tables import write_tables
from study.analysis.numbers.text import number
from study.descriptions import TEACHER, Comparison
from study.files import Layout, StudyError
from study.records import RepresentationsResult, read_record, short_name


def load_similarity(comparison: Comparison, layout: Layout) -> tuple[pd.DataFrame, pd.DataFrame]:
    """Every pair of layers of every run of the grid, one row each; and every linear probe.

    Columns of the first: method, student, seed, layer (of the student, 1..L_S), teacher_layer (1..L_T), cka (NaN where
    one of the layers is collapsed), divergence (of the attention relations, mean over queries, keys and values, nats).
    Of the second: method, student, seed, task, last (score of a probe on the last layer, development data, 0-1),
    last_but_one (on the layer below it).

    Raises:
        StudyError: the file is missing or invalid, or lacks a run of the grid.
    """
    path = layout.representations
    record = read_record(path, RepresentationsResult, profile=comparison.profile, setting=comparison.setting)
    models = {(model.method, model.student, model.seed): model for model in record.models}
    rows, probes = [], []
    for method, student, seed in comparison.cells():
        model = models.get((method, student, seed))
        if model is None:
            raise StudyError(f"{short_name(path)}: models: {method} {student} {seed} is missing")
        run = {"method": method, "student": student, "seed": seed}
        probes += [run | {"task": task} | probe.model_dump() for task, probe in model.probes.items()]
        divergence = np.mean(list(model.relation_divergence.values()), axis=0)
        for (layer, teacher_layer), cka in np.ndenumerate(np.array(model.cka, dtype=float)):
            row = run | {"layer": layer + 1, "teacher_layer": teacher_layer + 1}
            rows.append(row | {"cka": cka, "divergence": divergence[layer, teacher_layer]})
    return pd.DataFrame(rows), pd.DataFrame(probes)


def likeness(similarity: pd.DataFrame, probes: pd.DataFrame, macro: pd.DataFrame) -> pd.DataFrame:
    """One row per student and method: how alike its layers are to the teacher's, beside what it scores.

    Columns: student, method, last_layers (CKA of the two last layers; NaN where one is collapsed), depth_kept
    (Spearman's rho of a student layer and the teacher layer most like it, collapsed layers aside: 1 if the order of
    layers is kept; NaN where it is the same for all), divergence (of attention relations, the student's last layer from
    the teacher's last but one), last_layer_adds (to a linear probe, over the layer below it, mean over tasks in points
    of development data), macro (test, 0-100); means over distillation seeds. A pair of layers that is collapsed at one
    seed has no mean.

    Args:
        similarity, probes: :func:`load_similarity`. macro: :func:`results.macro`.
    """
    deepest, top = similarity["teacher_layer"].max(), similarity.groupby("student")["layer"].transform("max")
    rows = []
    for (student, method), layers in similarity.groupby(["student", "method"], sort=False):
        mean = layers.groupby(["layer", "teacher_layer"])[["cka", "divergence"]].mean(skipna=False)
        last = top[layers.index[0]]
        nearest = mean["cka"].unstack().dropna(how="all").idxmax(axis=1)
        order = spearmanr(nearest.index, nearest).statistic if nearest.nunique() > 1 else np.nan
        row = {"student": student, "method": method, "last_layers": mean.loc[(last, deepest), "cka"]}
        rows.append(row | {"depth_kept": order, "divergence": mean.loc[(last, deepest - 1), "divergence"]})
    keys = ["student", "method"]
    added = probes.assign(last_layer_adds=100 * (probes["last"] - probes["last_but_one"]))
    added = added.groupby(keys)["last_layer_adds"].mean()
    scores = macro.groupby(keys)["test"].mean().mul(100).rename("macro")
    return pd.DataFrame(rows).join(added, on=keys).join(scores, on=keys)


def sentences(table: pd.DataFrame, named: Callable[[str], str] = str) -> str:
    """What a table of :func:`likeness` shows: made from the numbers, so that other results say other things.

    Args:
        named: what methods are called.
    """
    lines = []
    for student, rows in table.groupby("student", sort=False):
        trained = rows[~rows["method"].isin([FLOOR, TEACHER])]
        alike, best = trained.dropna(subset="last_layers"), trained.loc[trained["macro"].idxmax()]
        told = f"* {student}: "
        if len(alike):
            near, rho = alike.loc[alike["last_layers"].idxmax()], spearmanr(alike["last_layers"], alike["macro"])
            of_best = "no CKA" if np.isnan(best.last_layers) else f"CKA {best.last_layers:.2f}"
            told += (
                f"the last layer most like the teacher's is that of {named(near.method)} (CKA {near.last_layers:.2f});"
                f" the best macro test score is that of {named(best.method)} ({of_best}). Rank correlation of CKA and"
                f" score over {len(alike)} methods, which are not independent of each other:"
                f" {number(rho.statistic, 2, '+')}. "
            )
        if names := [named(row.method) for row in rows[rows["last_layers"].isna()].itertuples()]:
            told += f"No CKA of the last layers, since one gives every token the same state: {', '.join(names)}. "
        most, least = (rows.loc[rows["last_layer_adds"].agg(end)] for end in ("idxmax", "idxmin"))
        told += (
            f"To a linear probe the last layer adds most with {named(most.method)}"
            f" ({number(most.last_layer_adds, 1, '+')} points), least with {named(least.method)}"
            f" ({number(least.last_layer_adds, 1, '+')})."
        )
        lines.append(told)
    return "\n".join(["**Found.**", "", *lines])


def write_similarity(
    similarity: pd.DataFrame, probes: pd.DataFrame, table: pd.DataFrame, folder: str | os.PathLike[str]
) -> None:
    """Write layers.csv (every pair of layers), probes.csv (every probe) and likeness.csv into ``folder``.

    Raises:
        StudyError: the folder cannot be written.
    """
    tables = {"layers": similarity, "probes": probes, "likeness": table}
    write_tables(folder, {name: rows.round(4) for name, rows in tables.items()})
