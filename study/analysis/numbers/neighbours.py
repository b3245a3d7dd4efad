"""Systems beside the grid: their result files, arms with intervals over seeds, and verdicts on their ordinal claims."""

from __future__ import annotations

import numpy as np
import pandas as pd

from study.analysis.numbers.claims import CONTRADICTED, SUPPORTED, UNDECIDED
from study.analysis.numbers.statistics import Estimate, estimate
from study.analysis.numbers.tables import write_tables
from study.descriptions import Neighbours
from study.files import Layout
from study.records import read_record
from study.records_beside import NeighbourResult

#: Seeds that a verdict needs at least.
SEEDS = 3
NOT_JUDGED = "not judged"


def load_neighbours(description: Neighbours, layout: Layout) -> list[NeighbourResult]:
    """The result files of a setting's systems, in the order of params.yaml.

    Raises:
        StudyError: one is missing, invalid or of another place.
    """
    where = {"profile": description.profile, "setting": description.setting}
    paths = {name: layout.systems / f"{name}.json" for name in description.neighbours}
    return [read_record(path, NeighbourResult, **where, neighbour=name) for name, path in paths.items()]


def called(result: NeighbourResult) -> str:
    """A system's name as its source writes it; where params.yaml has it under more names, what sets this one apart."""
    name = result.title.partition(":")[0]
    apart = result.neighbour.removeprefix(result.system).strip("-")
    return f"{name} ({apart})" if apart else name


def over_seeds(values: list[float]) -> Estimate:
    """Mean over seeds with its standard error; NaN of one seed."""
    return estimate(np.array([values]))


def arms(result: NeighbourResult) -> pd.DataFrame:
    """One row per arm and measure: neighbour, arm, words, measure, mean, its 95 % interval (Student's) low to high."""
    rows = []
    for arm in result.arms:
        for measure, values in arm.values.items():
            row = {"neighbour": result.neighbour, "arm": arm.name, "words": arm.words, "measure": measure}
            rows.append(row | over_seeds(values).named("mean") | {"seeds": len(values)})
    return pd.DataFrame(rows)


def verdicts(result: NeighbourResult) -> pd.DataFrame:
    """One row per claim: its arms, their difference paired by seed with its 95 % interval, and the verdict.

    Supported where the whole interval has the sign that is claimed, contradicted where it has the other, else
    undecided; not judged with fewer than SEEDS seeds. Claims are judged one by one.
    """
    values, rows = {arm.name: arm.values for arm in result.arms}, []
    for check in result.checks:
        pairs = zip(values[check.first][check.measure], values[check.second][check.measure], strict=True)
        own = over_seeds([a - b for a, b in pairs]).named("difference")
        verdict = UNDECIDED
        if len(result.seeds) < SEEDS:
            verdict = NOT_JUDGED
        elif own["low"] > 0 or own["high"] < 0:
            verdict = SUPPORTED if (own["low"] > 0) == (check.sign == "above") else CONTRADICTED
        rows.append({"neighbour": result.neighbour} | check.model_dump() | own | {"verdict": verdict})
    return pd.DataFrame(rows)


def write_neighbours(results: list[NeighbourResult], overview: pd.DataFrame, folder: str) -> None:
    """Write ``arms.csv`` and ``verdicts.csv`` of all systems and ``overview.csv`` to a folder.

    Raises:
        StudyError: the folder cannot be written.
    """
    of_all = {"arms": pd.concat(map(arms, results)), "verdicts": pd.concat(map(verdicts, results))}
    write_tables(folder, of_all | {"overview": overview.round(2)})
