"""``translations.html``: a sentence's nearest neighbours in other languages, for teacher and students, offline."""

from __future__ import annotations

import itertools
from pathlib import Path

from study.analysis.pages import Navigation, link, page_title, result_file, run_words, write_page
from study.plan import Plan
from study.records import read_record
from study.records_beside import Translations

PAGE = "translations.html"
#: Name of the result file, in the results of a setting.
RESULT = "translations"


def write_translations(plan: Plan, html: Path, nav: Navigation) -> None:
    """Write the page into ``html``; nothing where no sentences were read.

    Raises:
        StudyError: the result file is invalid, or the page cannot be written.
    """
    path = result_file(plan, RESULT)
    if path is None:
        return
    read = read_record(path, Translations, profile=plan.profile)
    words = {name: run_words(name, plan) for name in read.models}
    shares = [read.found(name) for name in read.models]
    found = [
        {"from": first, "to": second, "shares": [f"{100 * own[place, other]:.0f} %" for own in shares]}
        for (place, first), (other, second) in itertools.permutations(enumerate(read.sentences), 2)
    ]
    title = page_title("Translations", "Which sentence means the same?", plan)
    count = len(next(iter(read.sentences.values())))
    data = {"words": words, "sentences": read.sentences, "models": read.models}
    facts = {"count": count, "result": link(path, html)}
    write_page(html / PAGE, PAGE, plan, nav, data, title=title, words=words, found=found, **facts)
