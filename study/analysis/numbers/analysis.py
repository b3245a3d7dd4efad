"""Every number of one comparison, each computed once: what figures, report and notebooks are made of."""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property
from typing import Any

import pandas as pd
import xarray as xr

from study.analysis.numbers import ablations, claims, recommendation, selection, statistics, tables
from study.analysis.numbers.results import Results, load_results, macro
from study.descriptions import Comparison
from study.files import Layout


@dataclass(frozen=True)
class Analysis:
    """Results and all that follows from them, computed when first asked for; tables are shared and not to be changed.

    Tables of functions that know no setting have it as their first column here.
    """

    results: Results

    @property
    def comparison(self) -> Comparison:
        return self.results.comparison

    @property
    def profile(self) -> str:
        return self.comparison.profile

    @property
    def setting(self) -> str:
        return self.comparison.setting

    @cached_property
    def scores(self) -> xr.DataArray:
        """:func:`statistics.score_array` of the grid."""
        return statistics.score_array(self.results)

    @cached_property
    def teacher_scores(self) -> xr.DataArray:
        """:func:`statistics.teacher_array`."""
        return statistics.teacher_array(self.results)

    @cached_property
    def ablation_scores(self) -> xr.DataArray | None:
        """:func:`statistics.score_array` of the ablated students: methods of the grid and their variants."""
        return statistics.score_array(self.results.ablations) if self.results.ablations else None

    @cached_property
    def macro(self) -> pd.DataFrame:
        """:func:`results.macro` of the grid."""
        return macro(self.results)

    @cached_property
    def ablation_macro(self) -> pd.DataFrame:
        """:func:`results.macro` of what :attr:`effects` compares."""
        return macro(self.results.ablations) if self.results.ablations else self.macro

    @cached_property
    def summary(self) -> pd.DataFrame:
        """:func:`tables.summary`."""
        return tables.summary(self.macro, self.scores, self.teacher_scores)

    @cached_property
    def headline(self) -> dict[str, Any]:
        """:func:`tables.headline`."""
        return tables.headline(self.results, self.summary, self.scores)

    @cached_property
    def recommendation(self) -> pd.DataFrame:
        """:func:`recommendation.recommendation`."""
        return recommendation.recommendation(self.results, self.headline, self.scores)

    @cached_property
    def selection(self) -> pd.DataFrame:
        """:func:`selection.selection`."""
        return selection.selection(self.results, self.summary)

    @cached_property
    def per_task(self) -> pd.DataFrame:
        """:func:`tables.per_task`."""
        return tables.per_task(self.results, self.summary)

    @cached_property
    def per_language(self) -> pd.DataFrame:
        """:func:`tables.per_language`."""
        return tables.per_language(self.results)

    @cached_property
    def costs(self) -> pd.DataFrame:
        """:func:`tables.costs`."""
        return tables.costs(self.results)

    @cached_property
    def distillation(self) -> pd.DataFrame:
        """:func:`tables.distillation`."""
        return tables.distillation(self.results)

    @cached_property
    def sampling_error(self) -> pd.DataFrame:
        """:func:`tables.sampling_error`."""
        return tables.sampling_error(self.results)

    @cached_property
    def aggregates(self) -> pd.DataFrame:
        """:func:`statistics.aggregates`."""
        return self._of_setting(statistics.aggregates(self.scores, self.teacher_scores))

    @cached_property
    def differences(self) -> pd.DataFrame:
        """:func:`statistics.differences`."""
        return self._of_setting(statistics.differences(self.scores))

    @cached_property
    def effects(self) -> pd.DataFrame:
        """:func:`ablations.effects` of the ablations; where none were run, of the grid."""
        scores = self.scores if self.ablation_scores is None else self.ablation_scores
        return ablations.effects(self.results.ablations or self.results, scores)

    @cached_property
    def claim_scores(self) -> dict[str, xr.DataArray]:
        """:func:`claims.claim_scores`."""
        return claims.claim_scores(self.results, self.scores, self.ablation_scores)

    @cached_property
    def contrasts(self) -> pd.DataFrame:
        """:func:`claims.contrasts`."""
        return self._of_setting(claims.contrasts(self.claim_scores))

    @cached_property
    def verdicts(self) -> pd.DataFrame:
        """:func:`claims.verdicts`."""
        return self._of_setting(claims.verdicts(self.claim_scores, self.contrasts))

    def _of_setting(self, table: pd.DataFrame) -> pd.DataFrame:
        table.insert(0, "setting", self.setting)
        return table


def analyse(comparison: Comparison, layout: Layout) -> Analysis:
    """The analysis of a comparison's result files.

    Raises:
        StudyError: as :func:`results.load_results`; scores are incomplete (when they are first asked for).
    """
    return Analysis(load_results(comparison, layout))
