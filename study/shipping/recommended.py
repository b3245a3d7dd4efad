"""The students that a profile's report speaks for, to be trained or pulled for export, explorer and server."""

from __future__ import annotations

from collections.abc import Iterator

from study.analysis.numbers.analysis import analyse
from study.descriptions import TEACHER, Comparison, Run, model_name
from study.files import StudyError
from study.plan import Plan
from study.records import RunResult, read_record


def recommended(plan: Plan) -> Iterator[tuple[Run, float, bool]]:
    """Of every setting, the runs that the report recommends, or where it does so for none, the best of each student.

    Yields:
        The run of the first seed, the seconds that training it took, and whether it is recommended.

    Raises:
        StudyError: results of the profile are missing, or its report compares no students.
    """
    if "comparison" not in plan.analyses():
        made = ", ".join(plan.analyses())
        raise StudyError(
            f"profile {plan.profile}: its report has {made} alone; allowed: a profile that compares students"
        )
    for comparison in plan.of(Comparison):
        layout = plan.layout(comparison.setting)
        table = analyse(comparison, layout).recommendation
        students = table[table["student"] != TEACHER]
        chosen = students[students["recommended"]]
        runs = {run.model: run for run in plan.of(Run, comparison.setting)}
        for row in (chosen if len(chosen) else students).itertuples():
            name = model_name(row.method, row.student, comparison.seeds[0])
            distillation = read_record(layout.result(name), RunResult).distillation
            yield runs[name], distillation.seconds if distillation else 0.0, bool(row.recommended)
