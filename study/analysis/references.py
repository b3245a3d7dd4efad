"""Rows beside the students: models that no method of the study trained, with their scores and speed."""

from __future__ import annotations

import pandas as pd
from pandas.io.formats.style import Styler

from study.analysis.numbers.analysis import Analysis
from study.analysis.numbers.text import number, with_interval
from study.analysis.presentation import styled
from study.methods import Published

#: What a reader has to know of each kind.
MARKS = {"published": "trained by others, on other data", "static_table": "a vector a token, no layers; not distilled"}


def reference_table(analysis: Analysis) -> pd.DataFrame:
    """One row per reference: :func:`study.analysis.numbers.tables.per_task`, size and speed. Empty where none is run.

    Columns beside those: ``marked`` (what it is), ``model`` (its published name), parameters, encoder_parameters and
    ``speed_up_batch_<size>``, with the first number of threads.
    """
    found, table = analysis.results.references, analysis.beside
    if found is None:
        return table
    options = analysis.comparison.references or {}
    sizes = found.runs.set_index("method")[["parameters", "encoder_parameters"]]
    table = table.join(sizes, on="method").assign(
        marked=[MARKS[options[name].kind] for name in table["method"]],
        model=[own.model if isinstance(own := options[name], Published) else name for name in table["method"]],
    )
    measured = found.latency[found.latency["threads"] == analysis.comparison.threads[0]]
    speed = measured.pivot(index="student", columns="batch_size", values="speed_up").add_prefix("speed_up_batch_")
    return table.join(speed, on="method").drop(columns="selected")


def references(analysis: Analysis) -> list[Styler | None]:
    """The table for readers: test scores x 100, macro, retained, size, speed-up; nothing where there is none."""
    table = reference_table(analysis)
    if table.empty:
        return []
    tasks = [task for task in analysis.comparison.tasks if task in table]
    sizes = analysis.comparison.batch_sizes
    rows = [
        {"model": row["model"], "what it is": row["marked"]}
        | {task: number(100 * row[task], 1) for task in tasks}
        | {"macro": number(100 * row["macro"], 1)}
        | {"kept, % (interval)": with_interval(100 * row[["retained", "retained_low", "retained_high"]], 1)}
        | {"parameters (M)": number(row["parameters"] / 1e6, 1)}
        | {f"speed-up, batch of {size}": f"{number(row[f'speed_up_batch_{size}'], 1)} ×" for size in sizes}
        for _, row in table.iterrows()
    ]
    caption = "Rows beside the students, evaluated by the same protocol; no method of this study trained them."
    return [styled(rows, "references", caption, setting=analysis.setting, words=["model"], wide=["what it is"])]
