"""Pages of the report: templates of this folder filled, and executed notebooks as HTML."""

from __future__ import annotations

import json
import os
import re
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import jinja2
import nbformat
from latex2mathml.converter import convert
from nbconvert import HTMLExporter

from study.analysis.figures.style import in_words
from study.analysis.numbers.text import millions
from study.descriptions import TEACHER, Comparison
from study.files import StudyError, write_file
from study.plan import Plan

#: The page of a profile's report that the others start from.
INDEX_PAGE = "index.html"
#: Group -> file, from the page's folder -> title, of the pages that a page leads to.
Navigation = dict[str, dict[str, str]]
MATHS = re.compile(r"\$\$(.+?)\$\$|\$([^$\n]+?)\$", re.S)
TEMPLATES = jinja2.Environment(autoescape=True, trim_blocks=True, loader=jinja2.FileSystemLoader(Path(__file__).parent))


def write_page(path: Path, template: str, plan: Plan, nav: Navigation, data: Any = None, **values: Any) -> None:
    """Write a page; the same values give the same bytes.

    Args:
        template: one of this folder; all extend page.html. data: what its script reads. values: others of the template.

    Raises:
        StudyError: the file cannot be written.
    """
    embedded = json.dumps(data, ensure_ascii=True, separators=(",", ":"), allow_nan=False).replace("<", "\\u003c")
    values |= {"profile": plan.profile, "nav": nav, "here": path.name, "data": embedded}
    write_file(path, TEMPLATES.get_template(template).render(values) + "\n")


def page_title(about: str, heading: str, plan: Plan) -> str:
    """What a browser's tab says of a page: its name in the navigation first."""
    return f"{about} · {heading} · profile {plan.profile}"


def frame_anew(page: str, template: str, **values: Any) -> str:
    """The text of a page that was written before, in the style and under the navigation of its template today.

    Args:
        values: of the template, as :func:`write_page` has them; what stands in the page needs none.
    """
    today = TEMPLATES.get_template(template).render(values)
    for part in (r'(?:<link rel="stylesheet"[^>]*>\s*)?<style>.*?</style>', r"<nav>.*?</nav>"):
        if own := re.search(part, today, re.S):
            page = re.sub(part, own[0].replace("\\", r"\\"), page, count=1, flags=re.S)
    return page


def link(file: Path, folder: Path) -> str:
    """A file as a page in a folder links it."""
    return Path(os.path.relpath(file, folder)).as_posix()


def other_profiles(plan: Plan) -> list[Path]:
    """The folders of the other profiles, the study's own first; without smoke, whose numbers mean nothing."""
    folders = [plan.root, *(path for path in sorted((plan.root / "profiles").glob("*")) if path.name != "smoke")]
    return [folder for folder in folders if folder != plan.folder and folder.is_dir()]


def result_file(plan: Plan, result: str) -> Path | None:
    """The first setting's file of a result, of those that have it."""
    paths = (plan.layout(setting).result(result) for setting in plan.params.grid.settings)
    return next((path for path in paths if path.is_file()), None)


def run_words(run: str, plan: Plan) -> str:
    """A run's name as readers see it: method, student, and the budget if it has one, by its tokens; or the teacher."""
    if run == TEACHER:
        return "the teacher"
    tokens = {name: f"{millions(b.tokens)} tokens" for own in plan.of(Comparison) for name, b in own.budgets.items()}
    method, student, _, *budget = run.split("_")
    return ", ".join([in_words(method), student, *(tokens.get(name, f"budget {name}") for name in budget)])


def read_notebook(path: Path) -> nbformat.NotebookNode:
    """A notebook of the format 4; its cells are numbered, since papermill gives the one that it injects a random id.

    Raises:
        StudyError: the file is none.
    """
    try:
        notebook = nbformat.read(path, as_version=4)
    except (nbformat.reader.NotJSONError, nbformat.ValidationError, AttributeError) as error:
        raise StudyError(f"{path.name}: not a notebook: {' '.join(str(error).split())[:200]}") from None
    for place, cell in enumerate(notebook.cells):
        cell["id"] = str(place)
    return notebook


def take_heading(cell: nbformat.NotebookNode) -> str:
    """The heading that a cell starts with, which leaves it."""
    heading, *rest = cell.source.splitlines()
    cell.source = "\n".join(rest)
    return heading.lstrip("# ")


def as_html(notebook: nbformat.NotebookNode, cells: Sequence[nbformat.NotebookNode], code: bool) -> str:
    """Some cells of a notebook, with their code or without; formulas of its text become MathML, which browsers draw."""
    exporter = HTMLExporter(
        template_name="basic",
        exclude_input=not code,
        exclude_input_prompt=True,
        exclude_output_prompt=True,
        exclude_anchor_links=True,
    )
    formulas: list[str] = []

    def set_aside(maths: re.Match) -> str:
        """A word in the place of a formula, which Markdown would misread."""
        formulas.append(convert(maths[1] or maths[2], display="block" if maths[1] else "inline"))
        return f"formula{len(formulas) - 1}formula"

    prose = [cell.cell_type == "markdown" for cell in cells]
    shown = [
        nbformat.from_dict(cell | {"source": MATHS.sub(set_aside, cell.source)}) if text else cell
        for cell, text in zip(cells, prose, strict=True)
    ]
    part = nbformat.v4.new_notebook(metadata=notebook.metadata, cells=shown)
    body = exporter.from_notebook_node(part)[0].strip()
    return re.sub(r"\bformula(\d+)formula\b", lambda place: formulas[int(place[1])], body)
