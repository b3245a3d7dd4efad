"""What one choice within a method changes: methods that differ from one of the grid in that choice alone.

A variant of params.yaml names the choice, its memberships say which methods it makes and what each extends. Methods of
the grid that differ in their layer mapping alone are compared beside the variant ``mapping``.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Mapping
from typing import TYPE_CHECKING, Any

import numpy as np
import pandas as pd
import xarray as xr

from study.analysis.numbers.results import Results
from study.analysis.numbers.statistics import (
    DISTILLATION_SEEDS,
    TOLD_APART,
    by_method,
    covered,
    holm,
    models,
    pool,
    two_sided,
)
from study.analysis.numbers.tables import write_tables
from study.analysis.numbers.text import interval, number, rate
from study.descriptions import Comparison
from study.methods import Membership

if TYPE_CHECKING:
    from study.analysis.numbers.analysis import Analysis

#: The variant whose references stand in the grid beside methods with other mappings, and that method.
MAPPING, MAPPED = "mapping", "hs-uniform+last"
#: Key of a variant that trains for as many steps as cost the operations of another method, which is its value.
EQUAL_COMPUTE = "equal_compute"
COLUMNS = ["setting", "variant", "reference", "method", "macro", "effect", "low", "high", "covers", "p_holm", "runs"]
COLUMNS += ["learning_rate", "reference_learning_rate"]


def rate_variants(comparison: Comparison) -> list[str]:
    """The variants that change the learning rate and nothing else, in the order of the comparison."""
    members = comparison.memberships.values()
    return list(dict.fromkeys(member.variant for member in members if set(member.changes) == {"learning_rate"}))


def other_mappings(results: Results) -> list[str]:
    """Methods of the grid whose recorded options differ from those of MAPPED in ``mapping`` and in nothing else.

    Learning rates are each method's own and do not count.
    """
    recorded = results.runs.groupby("method", sort=False)["options"].first()
    grid = [method for method in recorded.index if method not in results.comparison.memberships]
    if MAPPED not in grid:
        return []

    def rest(method: str) -> dict[str, Any]:
        options = {key: value for key, value in recorded[method].items() if value is not None}
        return {key: value for key, value in options.items() if key not in (MAPPING, "learning_rate")}

    return [
        method
        for method in grid
        if rest(method) == rest(MAPPED) and recorded[method].get(MAPPING) != recorded[MAPPED].get(MAPPING)
    ]


def pairs(results: Results) -> dict[str, list[tuple[str, str]]]:
    """Reference and method of every comparison, by variant, in the order of the grid.

    A variant is compared with what it extends or, if a single other variant of that changes all but one of its keys in
    the same way, with that one. A method of equal compute is also compared with that whose operations its steps cost.
    """
    members = results.comparison.memberships.items()
    named = [(own.variant, _reference(own, results.comparison.memberships), method) for method, own in members]
    equalled = [(own.variant, str(own.changes.get(EQUAL_COMPUTE)), method) for method, own in members]
    named += [own for own in equalled if own[1] in results.comparison.methods]
    by_variant: dict[str, list[tuple[str, str]]] = {}
    for variant, reference, method in [*((MAPPING, MAPPED, other) for other in other_mappings(results)), *named]:
        by_variant.setdefault(variant, []).append((reference, method))
    return by_variant


def _reference(own: Membership, members: Mapping[str, Membership]) -> str:
    closest = [
        name
        for name, other in members.items()
        if other.extends == own.extends
        and len(other.changes) == len(own.changes) - 1
        and all(key in own.changes and own.changes[key] == value for key, value in other.changes.items())
    ]
    return closest[0] if len(closest) == 1 else own.extends


def effects(results: Results, scores: xr.DataArray) -> pd.DataFrame:
    """Method less reference in points of macro test score (0-100), one row per method, grouped by variant.

    Columns: setting, variant, reference, method, macro (of the method), effect (paired by student, task and seeds),
    low, high (95 %, :class:`statistics.Pooled`), covers (the seeds behind them), p_holm (two-sided, of no effect,
    corrected over the rows of the variant), runs (distilled models of the method), learning_rate,
    reference_learning_rate (NaN: not trained, or not the same for all students; methods of the grid have rates of their
    own).

    Args:
        results: those of the ablated students, with the methods of the ablations; without any, those of the grid, whose
            mappings are compared.
        scores: their scores, as :func:`statistics.score_array`.
    """
    rates = results.runs["options"].map(lambda options: options.get("learning_rate", np.nan)).astype(float)
    rates = rates.groupby(results.runs["method"]).agg(lambda rate: rate.iloc[0] if rate.nunique() == 1 else np.nan)
    recorded = results.runs.groupby("method")["options"].first().items()
    pooled = pool(by_method(scores), untrained=[m for m, options in recorded if "learning_rate" not in options])
    rows = []
    for variant, compared in pairs(results).items():
        for reference, method in compared:
            varied = pooled.scores[method]
            effect = pooled.effect([method], [reference])
            row: dict[str, Any] = {"setting": results.comparison.setting, "variant": variant, "reference": reference}
            row |= {"method": method, "macro": 100 * varied.mean(skipna=False).item()}
            row |= effect.named("effect")
            row |= {"covers": covered(varied), "p_holm": two_sided(effect), "runs": models(varied)}
            rows.append(row | {"learning_rate": rates[method], "reference_learning_rate": rates[reference]})
    table = pd.DataFrame(rows, columns=COLUMNS)
    table["p_holm"] = table.groupby("variant", sort=False)["p_holm"].transform(holm)
    return table


def sentences(table: pd.DataFrame, *variants: str, named: Callable[[str], str] = "`{}`".format) -> str:
    """What the rows of some variants show: made from the numbers, so that other results say other things.

    An effect is said to be there if its Holm-corrected p-value is at most 5 % and the interval covers distillation.

    Args:
        table: of :func:`effects`. variants: those told of, together. named: what methods are called.
    """
    rows = table[table["variant"].isin(variants)]
    if rows.empty:
        return "**Found.** No variant was run beside its reference in this profile (`grid` of params.yaml)."
    if not rows["covers"].isin(DISTILLATION_SEEDS).all():
        lead = "One distillation seed tells nothing apart; as numbers alone, against the reference:"
    else:
        shown = rows[rows["p_holm"] <= TOLD_APART]
        lead = f"{len(shown)} of {len(rows)} variants are told apart from their reference (Holm, 5 %):"
    lines = []
    for row in rows.itertuples():
        line = f"* {named(row.method)} less {named(row.reference)}: {number(row.effect, 1, '+')} points"
        line += interval(row.low, row.high, 1, "+")
        line += " **told apart**" * (row.p_holm <= TOLD_APART and row.covers in DISTILLATION_SEEDS)
        rates = (row.learning_rate, row.reference_learning_rate)
        if rates[0] != rates[1] and not np.isnan(rates).any():
            line += f"; learning rates {rate(rates[0])} and {rate(rates[1])}"
        lines.append(line)
    return "\n".join([f"**Found.** {lead}", "", *lines])


def write_effects(analysis: Analysis, folder: str | os.PathLike[str]) -> pd.DataFrame:
    """Write effects.csv into ``folder``, rounded but for learning rates, and return the effects.

    Raises:
        StudyError: scores are incomplete, or the folder cannot be written.
    """
    digits = {column: 4 for column in COLUMNS if not column.endswith("learning_rate")}
    write_tables(folder, {"effects": analysis.effects.round(digits)})
    return analysis.effects
