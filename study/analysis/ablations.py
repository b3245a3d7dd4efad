"""What one choice within a method changes: variants that differ from a method of the grid in that choice alone."""

from __future__ import annotations

import os
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pandas as pd

from study.analysis.results import TEACHER, Results
from study.analysis.statistics import covered, estimate, holm, replicates, score_arrays
from study.files import write_file


@dataclass(frozen=True)
class Ablation:
    """``references`` are varied in ``options``, keys of their entries in ``params.methods``, and in nothing else.

    Where the question is how variants stand to another method, each is compared with ``against``, too.
    """

    references: tuple[str, ...]
    options: tuple[str, ...]
    against: str | None = None


#: Which variants belong to an ablation is read from the result files, not from names.
ABLATIONS = {
    "layer_mapping": Ablation(("hs-uniform+last",), ("mapping",)),
    "teacher_layer": Ablation(("mha-minilmv2", "mha-direct"), ("teacher_layer_from_top",)),
    "relation_heads": Ablation(("mha-minilmv2",), ("relation_heads",)),
    "output_distribution": Ablation(("od",), ("temperature", "positions", "mlm_weight")),
    "inputs": Ablation(("hs-uniform+last", "mha-minilmv2", "mha-direct"), ("inputs",)),
    "compute": Ablation(("mlm", "hs-uniform+last", "mha-minilmv2", "mha-direct"), ("steps",), against="od"),
    "initialisation": Ablation(("none", "hs-uniform+last", "mha-minilmv2"), ("initialisation",)),
    "learning_rate": Ablation(("mlm", "od", "hs-uniform+last", "mha-minilmv2", "mha-direct"), ("learning_rate",)),
}


def variants(results: Results, reference: str, options: tuple[str, ...]) -> list[str]:
    """Methods of the results that differ from ``reference`` in one or more of ``options`` and in nothing else.

    Learning rates are each method's own and do not count, unless they are what is varied. A method without an entry has
    the value of all methods.
    """
    of = results.runs.groupby("method", sort=False)["options"].first()
    if reference not in of:
        return []

    def rest(method: str) -> dict:
        own = {key: value for key, value in of[method].items() if value is not None}
        return {key: value for key, value in own.items() if key not in (*options, "learning_rate")}

    def varied(method: str) -> bool:
        return any(of[method].get(key) != of[reference].get(key) for key in options)

    others = [method for method in of.index if method not in (TEACHER, reference) and of[method]]
    return [method for method in others if rest(method) == rest(reference) and varied(method)]


def effects(results: Results, ablations: dict[str, Ablation] = ABLATIONS) -> pd.DataFrame:
    """Variant less reference in points of macro test score (0-100), one row per variant, in the order of the results.

    Where the results hold runs for ablations, these are compared; else the methods of the grid among themselves.

    Columns: setting, ablation, reference, variant, macro (of the variant), effect (paired by student, task and seeds),
    low, high (95 %, :func:`statistics.estimate`), covers (the seeds behind them), p_holm (two-sided, of no effect,
    corrected over the ablation), runs (distilled models of the variant), learning_rate, reference_learning_rate (NaN:
    not trained, or not the same for all students; methods of the grid have rates of their own).

    Raises:
        StudyError: scores are incomplete (:func:`statistics.score_arrays`).
    """
    results = results.ablations or results
    arrays, rows = score_arrays(results), []
    rates = results.runs["options"].map(lambda options: (options or {}).get("learning_rate", np.nan)).astype(float)
    rates = rates.groupby(results.runs["method"]).agg(lambda own: own.iloc[0] if own.nunique() == 1 else np.nan)
    for name, ablation in ablations.items():
        pairs = [(own, v) for own in ablation.references for v in variants(results, own, ablation.options)]
        if ablation.against in arrays:
            pairs += [(ablation.against, variant) for _, variant in pairs]
        for reference, variant in pairs:
            found = estimate(replicates(100 * (arrays[variant] - arrays[reference])))
            low, high = found.interval()
            row = {"setting": results.runs["setting"].iloc[0], "ablation": name, "reference": reference}
            row |= {"variant": variant, "macro": 100 * arrays[variant].mean(), "effect": float(found.mean)}
            row |= {"low": float(low), "high": float(high), "covers": covered(arrays[variant])}
            row |= {"p_holm": float(2 * np.minimum(found.p_above(0), found.p_below(0)))}
            row |= {"runs": arrays[variant].shape[0] * arrays[variant].shape[2]}
            rows.append(row | {"learning_rate": rates[variant], "reference_learning_rate": rates[reference]})
    columns = ["setting", "ablation", "reference", "variant", "macro", "effect", "low", "high", "covers", "p_holm"]
    table = pd.DataFrame(rows, columns=[*columns, "runs", "learning_rate", "reference_learning_rate"])
    table["p_holm"] = table.groupby("ablation", sort=False)["p_holm"].transform(holm)
    return table


def found(table: pd.DataFrame, ablation: str) -> str:
    """What the rows of one ablation show, in sentences: made from the numbers, so that other results say other things.

    An effect is said to be there if its Holm-corrected p-value is at most 5 % and the interval covers distillation.
    """
    own = table[table["ablation"] == ablation]
    if own.empty:
        return "**Found.** No variant was run beside its reference in this profile (`grid` of params.yaml)."
    if not own["covers"].str.startswith("distillation").all():
        lead = "One distillation seed tells nothing apart; as numbers alone, against the reference:"
    else:
        shown = own[own["p_holm"] <= 0.05]
        lead = f"{len(shown)} of {len(own)} variants differ from their reference by more than chance (Holm, 5 %):"
    rows = []
    for row in own.itertuples():
        interval = "" if np.isnan(row.low) else f" ({row.low:+.1f} to {row.high:+.1f})"
        sure = " **shown**" if row.p_holm <= 0.05 and row.covers.startswith("distillation") else ""
        rates = (row.learning_rate, row.reference_learning_rate)
        unlike = rates[0] != rates[1] and not np.isnan(rates).any()
        other = f"; learning rates {rates[0]:g} and {rates[1]:g}" if unlike else ""
        rows.append(f"* `{row.variant}` less `{row.reference}`: {row.effect:+.1f} points{interval}{sure}{other}")
    return "\n".join([f"**Found.** {lead}", "", *rows])


def write_effects(results: Results, folder: str | os.PathLike) -> pd.DataFrame:
    """Write effects.csv into ``folder``, rounded but for learning rates, and return :func:`effects`.

    Raises:
        StudyError: scores are incomplete, or the folder cannot be written.
    """
    table = effects(results)
    rounded = table.round({column: 4 for column in table if not column.endswith("learning_rate")})
    write_file(Path(folder) / "effects.csv", rounded.to_csv(index=False, lineterminator="\n"))
    return table
