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

from collections.abc import Collection, Iterable
from dataclasses import dataclass, replace
from typing import Any, Literal

import numpy as np
import pandas as pd
import xarray as xr
from scipy import stats

from study.analysis.numbers.results import FLOOR, Results
from study.analysis.numbers.statistics import (
    DISTILLATION_SEEDS,
    Pooled,
    covered,
    difference,
    estimate,
    holm,
    models,
    of_method,
    pool,
    replicates,
)

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
    method, the claim does without the contrast instead of staying undecided. ``without``: members of groups that were
    not run and that means leave out.
    """

    first: str
    second: str
    test: Literal["superior", "non-inferior", "equivalent"] = "superior"
    margin: float = MARGIN
    if_run: bool = False
    without: tuple[str, ...] = ()

    @property
    def label(self) -> str:
        return f"{self.first} − {self.second}"

    @property
    def methods(self) -> tuple[str, ...]:
        return self.members(self.first) + self.members(self.second)

    def members(self, side: str) -> tuple[str, ...]:
        """The methods that a side stands for."""
        return tuple(method for method in GROUPS.get(side, (side,)) if method not in self.without)

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
        (*(Contrast(MINILMV2, other) for other in (OD, *HS)), Contrast(MINILMV2, DIRECT, "non-inferior")),
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
        "For both MHA variants an upper-middle teacher layer (the last but one or two) is the one to distil from",
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


def claim_scores(results: Results, scores: xr.DataArray, ablations: xr.DataArray | None) -> dict[str, xr.DataArray]:
    """Scores of everything that contrasts may name: methods of the grid, and MHA variants by their teacher layer.

    ``<method>@L_T-k`` is the method itself, at its own layer, or the variant of it that changes the layer alone; where
    ablations were run, all of them on the ablated students, which may be fewer than the grid's.

    Args:
        results: those of the grid, with ablations if there are any.
        scores: the grid's, as :func:`statistics.score_array`. ablations: those of ``results.ablations``.
    """
    layer = "teacher_layer_from_top"
    by_layer: dict[str, xr.DataArray] = {}
    compared, scored = (results, scores) if ablations is None else (results.ablations or results, ablations)
    recorded = compared.runs.groupby("method", sort=False)["options"].first()
    for base in (MINILMV2, DIRECT):
        members = compared.comparison.memberships.items()
        varied = [method for method, member in members if member.extends == base and set(member.changes) == {layer}]
        for method in (base, *varied):
            if layer in recorded.get(method, {}):
                above = recorded[method][layer]
                by_layer.setdefault(f"{base}@L_T-{above}" if above else f"{base}@L_T", of_method(scored, method))
    return {method: of_method(scores, method) for method in scores["method"].to_numpy().tolist()} | by_layer


def judged_on(
    methods: Collection[str], margin: float = MARGIN, claims: tuple[Claim, ...] = CLAIMS
) -> tuple[Claim, ...]:
    """The claims as far as these methods can judge them: means over the members that are there, no other contrasts.

    Claims that nothing is left of are left out.
    """
    judged = []
    absent = tuple(dict.fromkeys(m for members in GROUPS.values() for m in members if m not in methods))
    for claim in claims:
        own = (replace(contrast, margin=margin, without=absent) for contrast in claim.contrasts)
        left = tuple(c for c in own if all(_run(c.members(side), methods) for side in (c.first, c.second)))
        if left:
            judged.append(replace(claim, contrasts=left))
    return tuple(judged)


def _run(members: tuple[str, ...], methods: Collection[str]) -> bool:
    return bool(members) and set(members) <= set(methods)


def contrasts(scores: dict[str, xr.DataArray], claims: tuple[Claim, ...] = CLAIMS) -> pd.DataFrame:
    """Every contrast of every claim, one row each, in their order; effects in points of macro test score (0-100).

    Effects are means of differences paired by student, task and seeds; intervals:
    :class:`statistics.Pooled`, by what methods of the grid share and what variants by teacher layer share.

    Columns: claim, contrast, first, second, test, margin, lower, upper (bounds of the region), effect, low, high (95 %,
    of this contrast alone; NaN with one run per method, student and task), freedom (of these), p_inside (of the effect
    lying outside the region: small if it is shown inside), p_outside (the reverse, Holm-corrected over the claim's
    contrasts), runs (distilled models compared), finetunings, covers (the seeds whose chance low and high hold),
    missing (methods that the results lack, joined by commas; effects are then NaN), shown (supported if the effect is
    shown inside the region, contradicted if outside, else undecided).

    Args:
        scores: :func:`claim_scores`.
    """
    pools = {
        layered: pool({method: own for method, own in scores.items() if ("@" in method) == layered})
        for layered in (False, True)
    }
    return pd.concat([_claim_rows(scores, claim, pools) for claim in claims], ignore_index=True)


def _claim_rows(scores: dict[str, xr.DataArray], claim: Claim, pools: dict[bool, Pooled]) -> pd.DataFrame:
    rows = []
    for contrast in claim.contrasts:
        if contrast.if_run and not all(method in scores for method in contrast.methods):
            continue
        there = [method for method in contrast.methods if method in scores]
        missing = [method for method in contrast.methods if method not in scores]
        lower, upper = contrast.region
        row: dict[str, Any] = {"claim": claim.id, "contrast": contrast.label}
        row |= {"first": contrast.first, "second": contrast.second, "test": contrast.test, "margin": contrast.margin}
        row |= {"lower": lower, "upper": upper}
        row |= dict.fromkeys(("effect", "low", "high", "freedom", "p_inside", "p_outside"), np.nan)
        if not missing:
            sides = contrast.members(contrast.first), contrast.members(contrast.second)
            effect = pools["@" in contrast.first].effect(*sides)
            row |= effect.named("effect") | {"freedom": float(effect.freedom)}
            row["p_inside"] = float(np.maximum(effect.p_above(lower), effect.p_below(upper)))
            row["p_outside"] = float(np.minimum(effect.p_below(lower), effect.p_above(upper)))
        row["runs"] = sum(models(scores[method]) for method in there)
        row["finetunings"] = sum(scores[method].size for method in there)
        row["covers"] = covered(scores[there[0]]) if there else ""
        rows.append(row | {"missing": ", ".join(missing)})
    table = pd.DataFrame(rows)
    table["p_outside"] = holm(table["p_outside"])
    judged = table["covers"].isin(DISTILLATION_SEEDS)
    shown = [judged & (table["p_outside"] <= ALPHA), judged & (table["p_inside"] <= ALPHA)]
    return table.assign(shown=np.select(shown, [CONTRADICTED, SUPPORTED], UNDECIDED))


def verdicts(scores: dict[str, xr.DataArray], table: pd.DataFrame, claims: tuple[Claim, ...] = CLAIMS) -> pd.DataFrame:
    """The verdict on every claim, one row each; the rule is in this module's description.

    Columns: claim, text, standing, verdict (supported, contradicted or undecided), reason (of an undecided one; else
    empty), contrast (the one that settles it: the least sure one or, of a contradicted claim, the one surest to fail),
    test, margin, effect, low, high, p_inside, p_outside (of that contrast, as in :func:`contrasts`), p (what the
    verdict rests on: p_outside if contradicted, else p_inside), runs (distilled models behind the claim), finetunings,
    covers, not_above_floor (methods of the claim not shown to score above the untrained floor on the students that they
    were run on, joined by commas: a ranking below the floor is worth little), figure (that shows it).

    low and high agree with the verdict: of a supported claim they are the 95 % interval, which lies inside the region,
    as that of every other contrast does; else they are simultaneous over the k contrasts of the claim (Bonferroni,
    100 - 5 / k %), and lie outside the region exactly if the claim is contradicted.

    Args:
        scores: :func:`claim_scores`. table: their :func:`contrasts`, of the same claims.
    """
    rows = []
    for claim in claims:
        of_claim = table[table["claim"] == claim.id]
        verdict, reason = _judge(of_claim)
        column = "p_outside" if verdict == CONTRADICTED else "p_inside"
        row: dict[str, Any] = {"claim": claim.id, "text": claim.text, "standing": claim.standing}
        row |= {"verdict": verdict, "reason": reason}
        known = of_claim[of_claim["effect"].notna()]
        ranks = known[column].fillna(0).sort_values(ascending=verdict == CONTRADICTED, kind="stable")
        decisive = of_claim.loc[next(iter(ranks.index), of_claim.index[0])].to_dict()
        row |= {name: decisive[name] for name in ("contrast", "test", "margin", "effect")}
        row |= _interval(decisive, 1 if verdict == SUPPORTED else int(known["p_outside"].notna().sum()))
        row |= {"p_inside": decisive["p_inside"], "p_outside": decisive["p_outside"], "p": decisive[column]}
        methods = dict.fromkeys(method for contrast in claim.contrasts for method in contrast.methods)
        run = {method: scores[method] for method in methods if method in scores}
        row |= {"runs": sum(map(models, run.values())), "finetunings": sum(score.size for score in run.values())}
        row |= {"covers": decisive["covers"], "not_above_floor": ", ".join(_not_above_floor(run, scores.get(FLOOR)))}
        rows.append(row | {"figure": FIGURE})
    return pd.DataFrame(rows)


def _interval(decisive: dict[str, Any], contrasts: int) -> dict[str, float]:
    """Bounds of a contrast, simultaneous over so many, from its 95 % interval."""
    half, freedom = (decisive["high"] - decisive["low"]) / 2, decisive["freedom"]
    wider = stats.t.ppf(1 - ALPHA / max(contrasts, 1), freedom) / stats.t.ppf(1 - ALPHA, freedom)
    return {"low": decisive["effect"] - wider * half, "high": decisive["effect"] + wider * half}


def _not_above_floor(scores: dict[str, xr.DataArray], floor: xr.DataArray | None) -> list[str]:
    if floor is None:
        return []
    gaps = {
        method: estimate(replicates(difference(runs, floor.sel(student=runs["student"].to_numpy()))))
        for method, runs in scores.items()
    }
    return [method for method, gap in gaps.items() if not gap.p_above(0) <= ALPHA]


def _judge(rows: pd.DataFrame) -> tuple[str, str]:
    """Verdict and, if undecided, the reason, from the contrasts of one claim."""
    missing = list(dict.fromkeys(name for names in rows["missing"] if names for name in names.split(", ")))
    if missing:
        return UNDECIDED, f"not run: {', '.join(missing)}"
    if rows["low"].isna().any():
        return UNDECIDED, "one distillation seed and one fine-tuning seed: no interval"
    if not rows["covers"].isin(DISTILLATION_SEEDS).all():
        return UNDECIDED, "one distillation seed: the interval covers fine-tuning seeds only"
    if (rows["shown"] == CONTRADICTED).any():
        return CONTRADICTED, ""
    if (rows["shown"] == SUPPORTED).all():
        return SUPPORTED, ""
    undecided = rows[rows["shown"] == UNDECIDED]
    inside = undecided[(undecided["low"] > -undecided["margin"]) & (undecided["high"] < undecided["margin"])]
    reason = f"not shown either way: {_listed(undecided['contrast'], len(rows))}"
    if len(inside):
        margin = inside["margin"].iloc[0]
        points = "point" if margin == 1 else "points"
        reason += f"; less than {margin:g} {points} apart: {_listed(inside['contrast'], len(rows))}"
    return UNDECIDED, reason


def _listed(names: Iterable[str], of: int) -> str:
    """The names, or how many ``of`` how many if they are too many to read."""
    names = list(names)
    return ", ".join(names) if len(names) <= LISTED else f"{len(names)} of {of} contrasts"
