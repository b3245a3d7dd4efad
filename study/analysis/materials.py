"""What a study was made of, as its params say: teachers, texts and tasks; and what its numbers do not say."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

from IPython.display import Markdown
from pandas.io.formats.style import Styler

from study.analysis.figures.style import titled
from study.analysis.presentation import styled
from study.declarations import Origin, OwnTask, OwnText, language_of
from study.descriptions import TeacherAdaptation
from study.plan import Plan
from study.sections import TASK_LANGUAGES
from study.teachers import EMBEDDED_SIZES

EMBEDDED = """\
* The embedded teachers are contrastively tuned sentence encoders, not freshly pre-trained language models. Their \
masked-language-modelling head, which output-distribution transfer needs, was fitted by this study.{more}
"""
#: What was trained of a teacher before it taught.
WHOLE = "trained whole as a language model"
LIMITS = """\
* The results are about these teachers and these budgets, not about {others}training runs many thousand times longer.
* One distillation seed per method, where there is no more, leaves intervals that hold the \
chance of fine-tuning, not that of initialisation and data order in distillation. Small differences between methods \
may be chance.
* The best of several methods looks better than it is, even when it is chosen on development data.
* The macro score averages unlike metrics: it ranks models and has no meaning beyond that.
"""


def materials(plan: Plan) -> Styler | None:
    """Teacher, texts and tasks of every setting, where they are from, their languages, and their licence if known."""
    rows = [row for setting in plan.params.grid.settings for row in _rows(plan, setting)]
    words, wide = ["setting", "what", "name"], ["what", "from", "languages", "licence"]
    return styled(rows, "materials", words=words, wide=wide, groups="setting")


def limits(plan: Plan) -> Markdown:
    """What the numbers do not say, of the teachers that were used."""
    used = [plan.params.settings[setting].teacher.name for setting in plan.params.grid.settings]
    embedded = [name for name in used if name in EMBEDDED_SIZES]
    others = "RoBERTa or XLM-R, nor about " if len(embedded) == len(used) else ""
    whole = any(_trained(plan, setting) == WHOLE for setting in plan.params.grid.settings)
    more = f" A teacher {WHOLE} is no longer the encoder that was published." if whole else ""
    return Markdown((EMBEDDED.format(more=more) if embedded else "") + LIMITS.format(others=others))


def _rows(plan: Plan, setting: str) -> Iterator[dict[str, Any]]:
    params, chosen = plan.params, plan.params.settings[setting]

    def row(what: str, name: str, origin: Origin | str | None, languages: str) -> dict[str, Any]:
        place, licence = (origin, "unknown") if origin else ("embedded", "docs/sources.md")
        if isinstance(origin, Origin):
            place, licence = _place(origin), origin.licence or "unknown"
        facts = {"setting": titled(setting), "what": what, "name": name}
        return facts | {"from": place, "languages": languages, "licence": licence}

    teacher = chosen.teacher.name
    yield row(f"teacher, {_trained(plan, setting)}", _base(teacher), None if teacher in EMBEDDED_SIZES else teacher, "")
    for text in chosen.texts:
        own = text if isinstance(text, OwnText) else None
        yield row("text", own.label if own else str(text), own, language_of(text))
    for name in chosen.tasks:
        task = params.tasks.get(name)
        languages = task.languages if task else TASK_LANGUAGES.get(name, ("en",))
        tested = params.task_budget(name).languages
        yield row("task", name, task, ", ".join(language for language in languages if language in tested))


def teacher_words(plan: Plan, setting: str) -> str:
    """A setting's teacher: its name, and what was trained of it before it taught."""
    return f"{_base(plan.params.settings[setting].teacher.name)}, {_trained(plan, setting)}"


def _base(teacher: str) -> str:
    return teacher.rstrip("/").rpartition("/")[2]


def _trained(plan: Plan, setting: str) -> str:
    """What was trained of a setting's teacher before it taught."""
    (made,) = plan.of(TeacherAdaptation, setting)
    if made.head:
        return "as it came, its own head too"
    return "a head alone fitted on it" if made.adaptation.head_only else WHOLE


def _place(origin: Origin) -> str:
    if origin.dataset:
        return " ".join(part for part in (origin.dataset, origin.config, origin.revision) if part)
    patterns = origin.patterns() if isinstance(origin, OwnText | OwnTask) else []
    return ", ".join(patterns)
