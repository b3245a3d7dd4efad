"""Executed notebooks as pages, with their code and outputs: nobody has to execute one to read it."""

from __future__ import annotations

import base64
import re
from dataclasses import dataclass
from pathlib import Path

import nbformat
from latex2mathml.converter import convert
from markupsafe import Markup
from nbconvert import HTMLExporter

from study.analysis.chooser import template
from study.analysis.figures.style import small
from study.files import StudyError, profile_of, write_file
from study.plan import Plan
from study.sections import ANALYSES

INDEX, STYLE = "index.html", "../html/page.css"
#: Tag of cells that print texts of others, which are not kept in the repository.
TEXTS = "texts"
MATHS = re.compile(r"\$\$(.+?)\$\$|\$([^$\n]+?)\$", re.S)
#: Where executed copies are; those of analyses are pages of the report already.
RUNS, ANALYSED = "runs/notebooks", "runs/analyses"


@dataclass(frozen=True)
class Entry:
    """A notebook in the list of all: its file, what it asks, and its pages (name -> file from the list's folder)."""

    name: str
    question: str
    pages: dict[str, str]


def write_notebooks(plan: Plan, nav: dict[str, dict[str, str]]) -> Path:
    """Write ``reports/notebooks``: a page for every executed notebook in ``runs/notebooks``, and index.html, the list.

    Of several copies of one notebook (a setting, a student each) the first by name that did not fail is shown. A page
    that is there stays where nothing was executed: it was made by a run elsewhere. The same executed notebooks give the
    same bytes.

    Args:
        nav: group -> file from ``reports/html`` -> title, of the report's pages.

    Returns:
        The list.

    Raises:
        StudyError: an executed copy is no notebook, or the folder cannot be written.
    """
    folder = plan.folder / "reports" / "notebooks"
    nav = {group: {_beside(file): title for file, title in pages.items()} for group, pages in nav.items()}
    copies: dict[str, list[Path]] = {}
    for path in (path for kept in (RUNS, ANALYSED) for path in sorted((plan.folder / kept).glob("*.ipynb"))):
        done = read_notebook(path).metadata.get("papermill", {})
        if not done.get("exception"):
            copies.setdefault(Path(done.get("input_path") or path).stem, []).append(path)
    entries: list[Entry] = []
    shown: dict[Path, Path] = {}
    for notebook in sorted((plan.root / "notebooks").glob("*.ipynb")):
        name, page = notebook.stem, folder / f"{notebook.stem}.html"
        own = copies.get(name, [])
        analyses = {copy.stem: f"../html/{copy.stem}.html" for copy in own if copy.parent.name == "analyses"}
        if name == "80_report":
            pages = {"index": "../html/index.html"}
        elif analyses:
            pages = analyses
        else:
            pages = {name: page.name} if own or page.is_file() else _elsewhere(plan, name)
            shown |= {page: own[0]} if own else {}
        entries.append(Entry(name, _title(read_notebook(notebook)), pages))
    links = {
        entry.name: next(iter(entry.pages.values()), f"{_up(plan)}notebooks/{entry.name}.ipynb") for entry in entries
    }
    for page, copy in shown.items():
        write_file(page, _page(plan, page, copy, links, nav))
    text = template("notebooks.html").render(
        title=f"Notebooks · profile {plan.profile}", nav=nav, here=INDEX, entries=entries, up=_up(plan), style=STYLE,
        profile=plan.profile,
    )  # fmt: skip
    write_file(folder / INDEX, text + "\n")
    return folder / INDEX


def read_notebook(path: Path) -> nbformat.NotebookNode:
    """A notebook of the format 4.

    Raises:
        StudyError: the file is none.
    """
    try:
        return nbformat.read(path, as_version=4)
    except (nbformat.reader.NotJSONError, nbformat.ValidationError, AttributeError) as error:
        raise StudyError(f"{path.name}: not a notebook: {' '.join(str(error).split())[:200]}") from None


def _beside(file: str) -> str:
    """A file as ``reports/notebooks`` links it."""
    return file.removeprefix("../notebooks/") if file.startswith("../notebooks/") else f"../html/{file}"


def _elsewhere(plan: Plan, name: str) -> dict[str, str]:
    """The page of a notebook that another profile executed, the study's own first; numbers of smoke mean nothing."""
    folders = [plan.root, *(path for path in sorted((plan.root / "profiles").glob("*")) if path.name != "smoke")]
    pattern = next(
        (f"html/{own}_*.html" for own, made_by in ANALYSES.items() if made_by == name), f"notebooks/{name}.html"
    )
    pages = (page for folder in folders if folder != plan.folder for page in sorted((folder / "reports").glob(pattern)))
    found = next(pages, None)
    if found is None:
        return {}
    return {f"profile {profile_of(found.parents[2])}": _up(plan) + found.relative_to(plan.root).as_posix()}


def _title(notebook: nbformat.NotebookNode) -> str:
    return notebook.cells[0].source.splitlines()[0].removeprefix("# ")


def _up(plan: Plan) -> str:
    """From ``reports/notebooks`` of the plan's profile to the study's folder."""
    return "../" * (2 + len(plan.folder.relative_to(plan.root).parts))


def _page(plan: Plan, page: Path, executed: Path, links: dict[str, str], nav: dict[str, dict[str, str]]) -> str:
    """A page of an executed notebook; its pictures are written beside it."""
    notebook = read_notebook(executed)
    title, pictures = _title(notebook), 0
    formulas: list[str] = []
    notebook.cells[0].source = "\n".join(notebook.cells[0].source.splitlines()[1:])
    for place, cell in enumerate(notebook.cells):
        cell["id"] = str(place)
        if cell.cell_type == "markdown":
            cell.source = cell.source.replace("](../", f"]({_up(plan)}")
            cell.source = MATHS.sub(lambda maths: _set_aside(maths, formulas), cell.source)
            cell.source = re.sub(r"\]\((\w+)\.ipynb\)", lambda link: f"]({links.get(link[1], link[0])})", cell.source)
        printed = "".join(output.text for output in cell.get("outputs", []) if output.get("name") == "stdout")
        outputs = [output for output in cell.get("outputs", []) if output.output_type != "stream"]
        outputs[:0] = [nbformat.v4.new_output("stream", text=printed)] if printed else []
        for output in outputs:
            if encoded := output.get("data", {}).get("image/png"):
                pictures += 1
                picture = page.with_name(f"{page.stem}_{pictures}.png")
                write_file(picture, small(base64.b64decode(encoded)))
                shown = Markup('<figure><img src="{}" alt="{}"></figure>').format(picture.name, f"{title} {pictures}")
                output["data"] = {"text/html": str(shown)}
        if TEXTS in cell.metadata.get("tags", []):
            outputs = [nbformat.v4.new_output("stream", text="Texts of others: executing the notebook shows them.\n")]
        if cell.cell_type == "code":
            cell.outputs, cell.execution_count = outputs, None
    exporter = HTMLExporter(
        template_name="basic", exclude_input_prompt=True, exclude_output_prompt=True, exclude_anchor_links=True
    )
    body = exporter.from_notebook_node(notebook)[0].strip().replace(str(plan.root.resolve()), "…")
    body = re.sub(r"\bformula(\d+)formula\b", lambda place: formulas[int(place[1])], body)
    text = template("notebook.html").render(
        title=f"{title} · profile {plan.profile}", heading=title, content=Markup(body), nav=nav, here=page.name,
        notebook=f"{_up(plan)}notebooks/{page.stem}.ipynb", files={}, copy=executed.stem, style=STYLE,
        profile=plan.profile,
    )  # fmt: skip
    return re.sub(r"[ \t]+\n", "\n", text) + "\n"


def _set_aside(maths: re.Match, formulas: list[str]) -> str:
    """A word in the place of a formula, which Markdown would misread; the formula as MathML, which browsers draw."""
    formulas.append(convert(maths[1] or maths[2], display="block" if maths[1] else "inline"))
    return f"formula{len(formulas) - 1}formula"
