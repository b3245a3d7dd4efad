"""``attention.html``: what teacher and students relate in a few sentences, layer by layer, offline."""

from __future__ import annotations

import os
from pathlib import Path

from study.analysis.chooser import embedded, template
from study.analysis.figures import methods as figures
from study.analysis.figures.style import in_words, save
from study.descriptions import TEACHER
from study.files import Layout, write_file
from study.plan import Plan
from study.records import read_record
from study.records_beside import AttentionMaps

PAGE = "attention.html"
#: Name of the result file, in the results of a setting.
RESULT = "attention"
KINDS = {
    "query": "relations of queries",
    "key": "relations of keys",
    "value": "relations of values",
    "attention": "attention: queries to keys",
}


def result_file(plan: Plan, result: str) -> Path | None:
    """The first setting's file of a result, of those that have it."""
    paths = (plan.layout(setting).result(result) for setting in plan.params.grid.settings)
    return next((path for path in paths if path.is_file()), None)


def write_attention(plan: Plan, html: Path, nav: dict[str, dict[str, str]]) -> None:
    """Write the page into ``html``, with a picture for browsers that run no scripts; the same result, the same bytes.

    Args:
        nav: as of :func:`study.analysis.chooser.write_chooser`.

    Raises:
        StudyError: the result file is invalid, or the page cannot be written.
    """
    path = result_file(plan, RESULT)
    if path is None:
        return
    maps = read_record(path, AttentionMaps, profile=plan.profile)
    layout = Layout(plan.folder, maps.setting)
    students = [name for name in maps.sentences[0].models if name != TEACHER]
    words = {TEACHER: "the teacher"} | {name: name_in_words(name) for name in students}
    first = maps.sentences[0]
    shown = {
        k: (first.matrices(TEACHER, k)[-2], first.matrices(students[-1], k)[-1]) for k in ("query", "key", "value")
    }
    picture = save(figures.relations(shown, first.tokens), html, f"attention_{maps.setting}")
    read = [sentence.model_dump() for sentence in maps.sentences]
    data = {"words": words, "teacher": TEACHER, "students": students, "kinds": KINDS, "sentences": read}
    content = template(PAGE).render(
        title=f"What does a student look at? profile {plan.profile}",
        profile=plan.profile,
        nav=nav,
        here=PAGE,
        words=words,
        last=words[students[-1]],
        heads=maps.relation_heads,
        picture=picture.name,
        result=Path(os.path.relpath(layout.result(RESULT), html)).as_posix(),
        data=embedded(data),
    )
    write_file(html / PAGE, content + "\n")


def name_in_words(run: str) -> str:
    """A run's name as readers see it: method, student, and the budget if it has one."""
    method, student, _, *budget = run.split("_")
    return ", ".join([in_words(method), student, *(f"budget {name}" for name in budget)])
