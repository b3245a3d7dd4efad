"""Executed notebooks as pages, with their code and outputs: nobody has to execute one to read it."""

from __future__ import annotations

import base64
import re
from dataclasses import dataclass
from pathlib import Path

import nbformat
from latex2mathml.converter import convert
from markupsafe import Markup

from study.analysis.figures.style import small
from study.analysis.pages import Navigation, as_html, link, other_profiles, read_notebook, take_heading, write_page
from study.files import profile_of, write_file
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


def write_notebooks(plan: Plan, nav: Navigation) -> Path:
    """Write ``reports/notebooks``: a page for every executed notebook in ``runs/notebooks``, and index.html, the list.

    Of several copies of one notebook (a setting, a student each) the first by name that did not fail is shown. A page
    that is there stays where nothing was executed: it was made by a run elsewhere, and its links to other notebooks
    follow the pages that there are. The same executed notebooks give the same bytes.

    Args:
        nav: of the report's pages, in ``reports/html``.

    Returns:
        The list.

    Raises:
        StudyError: an executed copy is no notebook, or the folder cannot be written.
    """
    folder = plan.folder / "reports" / "notebooks"
    html, up = folder.with_name("html"), f"{link(plan.root, folder)}/"
    nav = {group: {link(html / file, folder): title for file, title in own.items()} for group, own in nav.items()}
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
        pages = {copy.stem: f"../html/{copy.stem}.html" for copy in own if copy.parent.name == "analyses"}
        if name == "80_report":
            pages = {"index": "../html/index.html"}
        elif not pages:
            pages = {name: page.name} if own or page.is_file() else _elsewhere(plan, name, up)
            shown |= {page: own[0]} if own else {}
        entries.append(Entry(name, take_heading(read_notebook(notebook).cells[0]), pages))
    links = {entry.name: next(iter(entry.pages.values()), f"{up}notebooks/{entry.name}.ipynb") for entry in entries}
    for page, copy in shown.items():
        title, content = _content(page, copy, links, plan.root, up)
        write_page(
            page, "notebook.html", plan, nav, title=f"{title} · profile {plan.profile}", heading=title, copy=copy.stem,
            content=content, notebook=f"{up}notebooks/{page.stem}.ipynb", files={}, style=STYLE,
        )  # fmt: skip
    for page in (page for page in sorted(folder.glob("*.html")) if page.stem in links and page not in shown):
        _link_anew(page, links)
    title = f"Notebooks · profile {plan.profile}"
    write_page(folder / INDEX, "notebooks.html", plan, nav, title=title, entries=entries, up=up, style=STYLE)
    return folder / INDEX


def _link_anew(page: Path, links: dict[str, str]) -> None:
    """Links of a page to other notebooks lead to where ``links`` says: pages of them may be gone or new."""
    text = page.read_text()
    others = "|".join(name for name in links if name != page.stem)
    again = re.sub(rf'href="(?:[^":]*/)?({others})\.(?:html|ipynb)"', lambda own: f'href="{links[own[1]]}"', text)
    if again != text:
        write_file(page, again)


def _elsewhere(plan: Plan, name: str, up: str) -> dict[str, str]:
    """The page of a notebook that another profile executed."""
    made = (f"html/{own}_*.html" for own, made_by in ANALYSES.items() if made_by == name)
    pattern = next(made, f"notebooks/{name}.html")
    pages = (page for folder in other_profiles(plan) for page in sorted((folder / "reports").glob(pattern)))
    found = next(pages, None)
    return {f"profile {profile_of(found.parents[2])}": up + link(found, plan.root)} if found else {}


def _content(page: Path, executed: Path, links: dict[str, str], root: Path, up: str) -> tuple[str, Markup]:
    """Title and content of a page of an executed notebook; its pictures are written beside it."""
    notebook = read_notebook(executed)
    title, pictures = take_heading(notebook.cells[0]), 0
    formulas: list[str] = []
    for cell in notebook.cells:
        if cell.cell_type == "markdown":
            cell.source = cell.source.replace("](../", f"]({up}")
            cell.source = MATHS.sub(lambda maths: _set_aside(maths, formulas), cell.source)
            cell.source = re.sub(r"\]\((\w+)\.ipynb\)", lambda own: f"]({links.get(own[1], own[0])})", cell.source)
            continue
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
    body = as_html(notebook, notebook.cells, code=True).replace(str(root.resolve()), "…")
    body = re.sub(r"\bformula(\d+)formula\b", lambda place: formulas[int(place[1])], body)
    return title, Markup(re.sub(r"[ \t]+\n", "\n", body))


def _set_aside(maths: re.Match, formulas: list[str]) -> str:
    """A word in the place of a formula, which Markdown would misread; the formula as MathML, which browsers draw."""
    formulas.append(convert(maths[1] or maths[2], display="block" if maths[1] else "inline"))
    return f"formula{len(formulas) - 1}formula"
