"""What results say of the paper's claims: claims as data, one rule that judges them.

A claim is a set of contrasts. A contrast is a difference of macro test scores and a region in which the claim has it:

* ``superior``: effect > 0 (the claims' words "beats", "lags", "best" name no size);
* ``non-inferior``: effect > -margin;
* ``equivalent``: -margin < effect < margin (two one-sided tests, Schuirmann 1987).

A claim is **supported** if every contrast is shown to lie in its region, **contradicted** if one is shown to lie
outside, and **undecided** otherwise: what is not shown is not claimed. "Shown" means one-sided tests at 2.5 %, so a
single contrast is in its region exactly if its 95 % interval is. Showing that *all* contrasts hold needs no correction
(intersection-union test, Berger 1982); that *one* fails does: p-values are Holm-corrected over the contrasts of the
claim in its setting. These are the families; claims are judged one by one, as the paper states them (this study's
choice).

One distillation seed never judges a method, whatever its intervals: they hold fine-tuning's chance alone.

Claims: Udagawa et al. (2023), arXiv 2310.08797; ``standing`` says how we know of them. How they are put as contrasts,
and the margin of one point, are this study's choice: one point is about what the choice of the laptop profile's test
examples may move a macro score by (five tasks, standard errors of about two points each).
"""

from __future__ import annotations

import os
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import numpy as np
import pandas as pd

from study.analysis.ablations import variants
from study.analysis.results import FLOOR, TEACHER, Results
from study.analysis.statistics import (
    BOTH_SEEDS,
    aggregates,
    covered,
    differences,
    estimate,
    holm,
    replicates,
    score_arrays,
)
from study.files import write_file

SUPPORTED, CONTRADICTED, UNDECIDED = "supported", "contradicted", "undecided"
ALPHA = 0.025
MARGIN = 1.0
FIGURE = "claims"
#: Contrasts that a reason names; of more it says how many they are.
LISTED = 2
IN_PAPER, IN_NOTES = "stated in the paper", "a reader's notes on the paper"

OD, LAST, MINILMV2, DIRECT = "od", "hs-last", "mha-minilmv2", "mha-direct"
ONE_TO_N = ("hs-uniform-consecutive", "hs-uniform+last")
SIMPLE = (LAST, "hs-top", "hs-uniform")
HS = (*SIMPLE, *ONE_TO_N)

#: Layers of the upper half that a teacher of twelve layers has and one of six lacks.
LOWER = ("L_T-4", "L_T-5")

#: Means over methods that contrasts name. ``<method>@L_T-k`` is that method with its teacher layer k from the top.
GROUPS = {
    "HS": HS,
    "HS 1-to-N": ONE_TO_N,
    "HS single or 1-to-1": SIMPLE,
    "mha-minilmv2@upper-middle": (f"{MINILMV2}@L_T-1", f"{MINILMV2}@L_T-2"),
    "mha-direct@upper-middle": (f"{DIRECT}@L_T-1", f"{DIRECT}@L_T-2"),
}


@dataclass(frozen=True)
class Contrast:
    """effect = score of ``first`` - score of ``second``, in points; each a method, or the mean over one of GROUPS.

    ``margin`` (points) bounds the region of tests for non-inferiority and equivalence; of a superiority that is not
    shown it only tells whether the methods are at least shown to be less apart. ``if_run``: where the results lack a
    method, the claim does without the contrast instead of staying undecided.
    """

    first: str
    second: str
    test: Literal["superior", "non-inferior", "equivalent"] = "superior"
    margin: float = MARGIN
    if_run: bool = False

    @property
    def label(self) -> str:
        return f"{self.first} − {self.second}"

    @property
    def methods(self) -> tuple[str, ...]:
        return tuple(method for side in (self.first, self.second) for method in GROUPS.get(side, (side,)))

    @property
    def region(self) -> tuple[float, float]:
        """Where the claim has the effect, between these bounds (points)."""
        lower = 0.0 if self.test == "superior" else -self.margin
        return lower, self.margin if self.test == "equivalent" else np.inf


@dataclass(frozen=True)
class Claim:
    id: str
    text: str
    standing: str
    contrasts: tuple[Contrast, ...]


CLAIMS = (
    Claim(
        "D1",
        "MHA transfer by MiniLMv2 is generally the best option",
        IN_PAPER,
        (
            *(Contrast(MINILMV2, other) for other in (OD, *HS)),
            Contrast(MINILMV2, DIRECT, "non-inferior"),
        ),
    ),
    Claim(
        "D2",
        "Both MHA variants generally beat HS transfer",
        IN_PAPER,
        (Contrast(MINILMV2, "HS"), Contrast(DIRECT, "HS")),
    ),
    Claim(
        "D3",
        "HS transfer stays competitive, especially under a 1-to-N layer mapping",
        IN_PAPER,
        (Contrast("HS 1-to-N", MINILMV2, "non-inferior"), Contrast("HS 1-to-N", "HS single or 1-to-1")),
    ),
    Claim(
        "D4",
        "OD transfer consistently lags the others",
        IN_PAPER,
        tuple(Contrast(other, OD) for other in (*HS, MINILMV2, DIRECT)),
    ),
    Claim(
        "D5",
        "For both MHA variants an upper-middle teacher layer, L_T-1 or L_T-2, is the one to distil from",
        f"{IN_PAPER}, its verb inferred",
        tuple(
            Contrast(f"{method}@upper-middle", f"{method}@{layer}", if_run=layer in LOWER)
            for method in (MINILMV2, DIRECT)
            for layer in ("L_T", "L_T-3", *LOWER)
        ),
    ),
    Claim(
        "D6",
        "DirectMiniLM brings no consistent gain over MiniLMv2",
        IN_NOTES,
        (Contrast(MINILMV2, DIRECT, "non-inferior"),),
    ),
    Claim(
        "D7",
        "The mapping last is a simple but effective baseline of HS transfer",
        IN_NOTES,
        tuple(Contrast(LAST, other, "non-inferior") for other in HS if other != LAST),
    ),
)


def contrasts(results: Results, claims: tuple[Claim, ...] = CLAIMS) -> pd.DataFrame:
    """Every contrast of every claim, one row each, in their order; effects in points of macro test score (0-100).

    Effects are means of differences paired by student, task and seeds; intervals: :func:`statistics.estimate`.

    Columns: setting, claim, contrast, first, second, test, margin, lower, upper (bounds of the region), effect, low,
    high (95 %; NaN with one run per cell), p_inside (of the effect lying outside the region: small if it is shown
    inside), p_outside (the reverse, Holm-corrected over the claim's contrasts), runs (distilled models compared),
    finetunings, covers (the seeds whose chance low and high hold), missing (methods that the results lack, joined by
    commas; effects are then NaN), shown (supported if the effect is shown inside the region, contradicted if outside,
    else undecided).

    Raises:
        StudyError: scores are incomplete (:func:`statistics.score_arrays`).
    """
    return _contrasts(_scores(results), results.runs["setting"].iloc[0], claims)


def _scores(results: Results) -> dict[str, np.ndarray]:
    arrays = score_arrays(results)
    del arrays[TEACHER]
    return arrays | _by_teacher_layer(results.ablations or results)


def _contrasts(arrays: dict[str, np.ndarray], setting: str, claims: tuple[Claim, ...]) -> pd.DataFrame:
    return pd.concat([_claim_rows(arrays, setting, claim) for claim in claims], ignore_index=True)


def _claim_rows(arrays: dict[str, np.ndarray], setting: str, claim: Claim) -> pd.DataFrame:
    rows = []
    for contrast in claim.contrasts:
        if contrast.if_run and not all(method in arrays for method in contrast.methods):
            continue
        there = [method for method in contrast.methods if method in arrays]
        missing = [method for method in contrast.methods if method not in arrays]
        lower, upper = contrast.region
        row = {"setting": setting, "claim": claim.id, "contrast": contrast.label}
        row |= {"first": contrast.first, "second": contrast.second, "test": contrast.test, "margin": contrast.margin}
        row |= {"lower": lower, "upper": upper}
        row |= dict.fromkeys(("effect", "low", "high", "p_inside", "p_outside"), np.nan)
        if not missing:
            first, second = (_mean(arrays, side) for side in (contrast.first, contrast.second))
            found = estimate(replicates(100 * (first - second)))
            low, high = found.interval()
            row |= {"effect": float(found.mean), "low": float(low), "high": float(high)}
            row["p_inside"] = float(np.maximum(found.p_above(lower), found.p_below(upper)))
            row["p_outside"] = float(np.minimum(found.p_below(lower), found.p_above(upper)))
        row["runs"] = sum(arrays[method].shape[0] * arrays[method].shape[2] for method in there)
        row["finetunings"] = sum(arrays[method].size for method in there)
        row["covers"] = covered(arrays[there[0]]) if there else ""
        rows.append(row | {"missing": ", ".join(missing)})
    table = pd.DataFrame(rows)
    table["p_outside"] = holm(table["p_outside"])
    judged = table["covers"] == BOTH_SEEDS
    shown = [judged & (table["p_outside"] <= ALPHA), judged & (table["p_inside"] <= ALPHA)]
    return table.assign(shown=np.select(shown, [CONTRADICTED, SUPPORTED], UNDECIDED))


def _mean(arrays: dict[str, np.ndarray], side: str) -> np.ndarray:
    return np.mean([arrays[method] for method in GROUPS.get(side, (side,))], axis=0)


def _by_teacher_layer(results: Results) -> dict[str, np.ndarray]:
    """Scores of methods that differ from MiniLMv2 or DirectMiniLM in the teacher layer alone, as <method>@L_T-k.

    What they differ in is read from the result files, not from their names; learning rates are each method's own.
    """
    layer, arrays, found = "teacher_layer_from_top", score_arrays(results), {}
    options = results.runs.groupby("method", sort=False)["options"].first()
    for base in (MINILMV2, DIRECT):
        for method in (base, *variants(results, base, (layer,))):
            if layer in options.get(method, {}):
                above = options[method][layer]
                found.setdefault(f"{base}@L_T-{above}" if above else f"{base}@L_T", arrays[method])
    return found


def verdicts(results: Results, claims: tuple[Claim, ...] = CLAIMS) -> pd.DataFrame:
    """The verdict on every claim, one row each; the rule is in this module's description.

    Columns: setting, claim, text, standing, verdict (supported, contradicted or undecided), reason (of an undecided
    one; else empty), contrast (the one that settles it: the least sure one or, of a contradicted claim, the one surest
    to fail), test, margin, effect, low, high (of that contrast, in points, with its 95 % interval), p (of that
    contrast: p_outside if contradicted, else p_inside), runs (distilled models behind the claim), finetunings, covers,
    not_above_floor (methods of the claim not shown to score above the untrained floor, joined by commas: a ranking of
    what does not beat no training is worth little), figure (that shows it).

    Raises:
        StudyError: scores are incomplete (:func:`statistics.score_arrays`).
    """
    arrays, setting = _scores(results), results.runs["setting"].iloc[0]
    table, rows = _contrasts(arrays, setting, claims), []
    for claim in claims:
        own = table[table["claim"] == claim.id]
        verdict, reason = _judge(own)
        column = "p_outside" if verdict == CONTRADICTED else "p_inside"
        row = {"setting": setting, "claim": claim.id, "text": claim.text, "standing": claim.standing}
        row |= {"verdict": verdict, "reason": reason}
        known = own[own["effect"].notna()]
        ranks = known[column].fillna(0)
        chosen = known.loc[[ranks.idxmin() if verdict == CONTRADICTED else ranks.idxmax()]] if len(known) else own[:1]
        (decisive,) = chosen.to_dict("records")
        row |= {name: decisive[name] for name in ("contrast", "test", "margin", "effect", "low", "high")}
        models = {id(arrays[m]): arrays[m] for c in claim.contrasts for m in c.methods if m in arrays}.values()
        row |= {"p": decisive[column], "runs": sum(scores.shape[0] * scores.shape[2] for scores in models)}
        row |= {"finetunings": sum(scores.size for scores in models), "covers": decisive["covers"]}
        methods = dict.fromkeys(method for contrast in claim.contrasts for method in contrast.methods)
        rows.append(row | {"not_above_floor": ", ".join(_not_above_floor(arrays, methods)), "figure": FIGURE})
    return pd.DataFrame(rows)


def _not_above_floor(arrays: dict[str, np.ndarray], methods: Iterable[str]) -> list[str]:
    if FLOOR not in arrays:
        return []
    gaps = {method: estimate(replicates(arrays[method] - arrays[FLOOR])) for method in methods if method in arrays}
    return [method for method, gap in gaps.items() if not gap.p_above(0) <= ALPHA]


def _judge(own: pd.DataFrame) -> tuple[str, str]:
    """Verdict and, if undecided, the reason, from the contrasts of one claim."""
    missing = list(dict.fromkeys(name for names in own["missing"] if names for name in names.split(", ")))
    if missing:
        return UNDECIDED, f"not run: {', '.join(missing)}"
    if own["low"].isna().any():
        return UNDECIDED, "one distillation seed and one fine-tuning seed: no interval"
    if not (own["covers"] == BOTH_SEEDS).all():
        return UNDECIDED, "one distillation seed: the interval covers fine-tuning seeds only"
    if (own["shown"] == CONTRADICTED).any():
        return CONTRADICTED, ""
    if (own["shown"] == SUPPORTED).all():
        return SUPPORTED, ""
    open_ = own[own["shown"] == UNDECIDED]
    inside = open_[(open_["low"] > -open_["margin"]) & (open_["high"] < open_["margin"])]
    reason = f"not shown either way: {_listed(open_['contrast'], len(own))}"
    if len(inside):
        reason += f"; less than {inside['margin'].iloc[0]:g} point apart: {_listed(inside['contrast'], len(own))}"
    return UNDECIDED, reason


def _listed(names: Iterable[str], all_of_them: int) -> str:
    """The names, or how many of how many if they are too many to read."""
    names = list(names)
    return ", ".join(names) if len(names) <= LISTED else f"{len(names)} of {all_of_them} contrasts"


def write_verdicts(results: Results, folder: str | os.PathLike) -> pd.DataFrame:
    """Write verdicts.csv, contrasts.csv, differences.csv and aggregates.csv into ``folder``; return the verdicts.

    Raises:
        StudyError: scores are incomplete, or the folder cannot be written.
    """
    judged = verdicts(results)
    tables = {"verdicts": judged, "contrasts": contrasts(results), "differences": differences(results)}
    tables["aggregates"] = aggregates(results)
    for name, table in tables.items():
        write_file(Path(folder) / f"{name}.csv", table.round(4).to_csv(index=False, lineterminator="\n"))
    return judged
