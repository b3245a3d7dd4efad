"""Every number of one comparison, each computed once: what figures, report and notebooks are made of."""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property
from typing import Any

import pandas as pd

from study.analysis.numbers import ablations, claims, statistics, tables
from study.analysis.numbers.recommendation import FINE_TUNED, recommendation
from study.analysis.numbers.results import Results, load_results, macro
from study.analysis.numbers.selection import selection
from study.descriptions import REFERENCE, Comparison
from study.files import Layout


@dataclass(frozen=True)
class Analysis:
    """Results and all that follows from them, computed when first asked for; tables are shared and not to be changed.

    Each is what the function of its name gives, of the grid unless it is said to be of the ablations; tables of
    functions that know no setting have it as their first column here. ``timed``: the latency of every model at the
    smallest batch size and number of threads.
    """

    results: Results

    comparison = cached_property(lambda own: own.results.comparison)
    setting = cached_property(lambda own: own.comparison.setting)
    timed = cached_property(lambda own: tables.timed(own.results))

    scores = cached_property(lambda own: statistics.score_array(own.results))
    teacher_scores = cached_property(lambda own: statistics.teacher_array(own.results))
    macro = cached_property(lambda own: macro(own.results))
    summary = cached_property(lambda own: tables.summary(own.macro, own.scores, own.teacher_scores))
    headline = cached_property(lambda own: tables.headline(own.comparison, own.summary, own.scores, own.timed))
    selection = cached_property(lambda own: selection(own.summary))
    per_task = cached_property(lambda own: tables.per_task(own.results, own.summary))
    per_language = cached_property(lambda own: tables.per_language(own.results))
    costs = cached_property(lambda own: tables.costs(own.results))
    distillation = cached_property(lambda own: tables.distillation(own.results))
    sampling_error = cached_property(lambda own: tables.sampling_error(own.results))
    aggregates = cached_property(lambda own: own._placed(tables.aggregates(own.scores, own.teacher_scores)))
    differences = cached_property(lambda own: own._placed(tables.differences(own.scores)))

    #: Rows beside the students: of ``per_task``, with ``milliseconds`` of a sequence as in ``timed``; empty: none.
    beside = cached_property(lambda own: own._beside())

    #: Results of the ablated students, methods of the grid and their variants; where none were run, of the grid.
    ablated = cached_property(lambda own: own.results.ablations or own.results)
    ablation_scores = cached_property(lambda own: statistics.score_array(own.ablated))
    ablation_macro = cached_property(lambda own: macro(own.ablated))
    effects = cached_property(lambda own: ablations.effects(own.ablated, own.ablation_scores))

    claim_scores = cached_property(lambda own: claims.claim_scores(own.results, own.scores, own._of_variants))
    contrasts = cached_property(lambda own: own._placed(claims.contrasts(own.claim_scores)))
    verdicts = cached_property(lambda own: own._placed(claims.verdicts(own.claim_scores, own.contrasts)))
    _of_variants = cached_property(lambda own: own.ablation_scores if own.results.ablations else None)

    def _beside(self) -> pd.DataFrame:
        if self.results.references is None:
            return pd.DataFrame()
        own = Analysis(self.results.references)
        rows = own.per_task[own.per_task["student"] == REFERENCE]
        return rows.assign(milliseconds=1000 * rows["method"].map(own.timed["median_seconds"]))

    @cached_property
    def recommendation(self) -> pd.DataFrame:
        main = self.results.scores[self.results.scores["main"]]
        place: dict[str, Any] = {f"{column}s": ",".join(main[column].unique()) for column in ("task", "language")}
        place |= {"group": FINE_TUNED, "tokens": self.comparison.tokens}
        return recommendation(self.headline, self.scores, self.differences, place, self.timed)

    def _placed(self, table: pd.DataFrame) -> pd.DataFrame:
        table.insert(0, "setting", self.setting)
        return table


def analyse(comparison: Comparison, layout: Layout) -> Analysis:
    """The analysis of a comparison's result files.

    Raises:
        StudyError: as :func:`results.load_results`; scores are incomplete (when they are first asked for).
    """
    return Analysis(load_results(comparison, layout))
