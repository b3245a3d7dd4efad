"""``attention.html``: what teacher and students relate in a few sentences, layer by layer, offline."""

from __future__ import annotations

from pathlib import Path

from study.analysis.figures import methods as figures
from study.analysis.figures.style import save
from study.analysis.pages import Navigation, link, page_title, result_file, run_words, write_page
from study.descriptions import TEACHER
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


def write_attention(plan: Plan, html: Path, nav: Navigation) -> None:
    """Write the page into ``html``, with a picture for browsers that run no scripts; nothing where nothing was read.

    Raises:
        StudyError: the result file is invalid, or the page cannot be written.
    """
    path = result_file(plan, RESULT)
    if path is None:
        return
    maps = read_record(path, AttentionMaps, profile=plan.profile)
    first = maps.sentences[0]
    students = [name for name in first.models if name != TEACHER]
    words = {name: run_words(name, plan) for name in (TEACHER, *students)}
    last = students[-1]
    shown = {kind: (first.matrices(TEACHER, kind)[-2], first.matrices(last, kind)[-1]) for kind in list(KINDS)[:3]}
    picture = save(figures.relations(shown, first.tokens), html, f"attention_{maps.setting}")
    read = [sentence.model_dump() for sentence in maps.sentences]
    data = {"words": words, "teacher": TEACHER, "students": students, "kinds": KINDS, "sentences": read}
    facts = {"title": page_title("Attention", "What does a student look at?", plan), "heads": maps.relation_heads}
    facts |= {"last": words[last], "picture": picture.name, "result": link(path, html)}
    write_page(html / PAGE, PAGE, plan, nav, data, **facts)
