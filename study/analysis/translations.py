"""``translations.html``: a sentence's nearest neighbours in other languages, for teacher and students, offline."""

from __future__ import annotations

import os
from pathlib import Path

from study.analysis.attention import name_in_words, result_file
from study.analysis.chooser import embedded, template
from study.descriptions import TEACHER
from study.files import Layout, write_file
from study.plan import Plan
from study.records import read_record
from study.records_beside import Translations

PAGE = "translations.html"
#: Name of the result file, in the results of a setting.
RESULT = "translations"


def write_translations(plan: Plan, html: Path, nav: dict[str, dict[str, str]]) -> None:
    """Write the page into ``html``; the same result, the same bytes. Nothing where no sentences were read.

    Args:
        nav: as of :func:`study.analysis.chooser.write_chooser`.

    Raises:
        StudyError: the result file is invalid, or the page cannot be written.
    """
    path = result_file(plan, RESULT)
    if path is None:
        return
    read = read_record(path, Translations, profile=plan.profile)
    words = {name: "the teacher" if name == TEACHER else name_in_words(name) for name in read.models}
    shares = {name: read.found(name) for name in read.models}
    languages = list(read.sentences)
    found = [
        {"from": first, "to": second, "shares": [f"{100 * own[place, other]:.0f} %" for own in shares.values()]}
        for place, first in enumerate(languages)
        for other, second in enumerate(languages)
        if first != second
    ]
    content = template(PAGE).render(
        title=f"Which sentence means the same? profile {plan.profile}",
        nav=nav,
        here=PAGE,
        words=words,
        count=len(next(iter(read.sentences.values()))),
        found=found,
        result=Path(os.path.relpath(Layout(plan.folder, read.setting).result(RESULT), html)).as_posix(),
        data=embedded({"words": words, "sentences": read.sentences, "models": read.models}),
    )
    write_file(html / PAGE, content + "\n")
