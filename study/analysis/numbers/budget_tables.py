"""The tables of scores against tokens, and their files."""

from __future__ import annotations

from pathlib import Path

import pandas as pd

from study.analysis.numbers.budgets import Budgets, all_closed, gains, references, table, verdicts
from study.analysis.numbers.recommendation import by_score, choices
from study.analysis.numbers.sensitivity import sensitivity
from study.analysis.numbers.tables import write_tables
from study.analysis.numbers.trends import trends
from study.files import StudyError

#: Their names.
TABLES = ("gap", "gains", "references", "verdicts", "contrasts", "sensitivity", "trends", "recommendation", "selection")


def budget_tables(budgets: Budgets) -> dict[str, pd.DataFrame]:
    """Name of TABLES -> table: what the functions of these names give.

    ``gap`` is :func:`budgets.table`, ``selection`` :func:`recommendation.choices`.

    Raises:
        StudyError: scores are incomplete.
    """
    closed = all_closed(budgets)
    gap = table(budgets, closed)
    judged, compared = verdicts(budgets, closed, gap)
    tables = {"gap": gap, "gains": gains(budgets), "references": references(budgets)}
    tables |= {"verdicts": judged, "contrasts": compared, "recommendation": by_score(budgets)}
    tables["selection"] = choices(budgets)
    return tables | {"sensitivity": sensitivity(budgets, closed, judged), "trends": trends(closed, budgets.tokens)}


def write_budgets(budgets: Budgets, folder: Path) -> dict[str, pd.DataFrame]:
    """Write :func:`budget_tables` as CSV, and return them.

    Raises:
        StudyError: as :func:`budget_tables`, or the folder cannot be written.
    """
    tables = budget_tables(budgets)
    digits = {name: {column: 4 for column in rows if column != "learning_rate"} for name, rows in tables.items()}
    write_tables(folder, {name: rows.round(digits[name]) for name, rows in tables.items()})
    return tables


def read_budgets(folder: Path) -> dict[str, pd.DataFrame]:
    """What :func:`write_budgets` wrote.

    Raises:
        StudyError: a table is missing.
    """
    missing = [name for name in TABLES if not (folder / f"{name}.csv").is_file()]
    if missing:
        raise StudyError(f"{folder}: {', '.join(missing)}.csv missing; `dvc repro` makes them")
    return {name: pd.read_csv(folder / f"{name}.csv") for name in TABLES}
