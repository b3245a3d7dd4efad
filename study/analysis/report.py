"""The HTML report: the executed notebooks of the index and of the analyses, readable offline and byte-stable."""

from __future__ import annotations

import base64
import re
from collections import Counter
from dataclasses import dataclass
from pathlib import Path

import nbformat
from markupsafe import Markup

from study.analysis import attention, translations
from study.analysis.chooser import write_chooser
from study.analysis.figures import comparison as figures
from study.analysis.figures.style import DPI, titled
from study.analysis.notebooks import executed_copies, linked, links_of, write_notebooks
from study.analysis.numbers.analysis import Analysis, analyse
from study.analysis.numbers.budgets import load_budgets
from study.analysis.numbers.results import result_files
from study.analysis.numbers.tables import comparison_tables
from study.analysis.pages import (
    INDEX_PAGE,
    Navigation,
    as_html,
    link,
    page_title,
    read_notebook,
    result_file,
    take_heading,
    write_page,
)
from study.descriptions import Comparison, NeighbourSystem, model_name
from study.execution import run_notebook
from study.files import Layout, StudyError, write_file
from study.plan import Plan
from study.sections import BASE_BUDGET

INDEX = "80_report"
CHOOSER = "explore.html"
#: How pages look, beside them; those that may be taken elsewhere alone have it inside.
STYLE = "page.css"
#: Tag of a heading whose section pages fold.
FOLD = "fold"
#: Result files of a setting beside those of its models.
OTHER_RESULTS = ("latency", "tasks", "corpus", "representations", "admission", attention.RESULT, translations.RESULT)
#: Pixels of a page that show an inch of a picture.
PIXELS = 120
PICTURE = '<figure>\n<a href="{0}"><img src="{0}" width="{1}" alt="{2}"></a>\n<figcaption>{3}</figcaption>\n</figure>'
FOLDED = "<details><summary>{}</summary>\n<div id={}>\n{}</div>\n</details>"


@dataclass(frozen=True)
class Page:
    """A page to be: its place in the navigation, its executed notebook and what that was made from, and its files.

    ``setting``: what it is of; empty: all. ``folders``: those of the pictures that it may show; ``files``: heading ->
    files that it links.
    """

    name: str
    title: str
    setting: str
    executed: Path
    notebook: str
    folders: list[Path]
    files: dict[str, list[Path]]


def write_report(plan: Plan) -> Path:
    """Write ``reports/html`` of the plan's profile: index.html, explore.html, a page per analysis and setting.

    Returns the index. Pages of all other notebooks go to ``reports/notebooks`` (:mod:`study.analysis.notebooks`).

    The index is notebooks/80_report.ipynb, executed here; the other pages are the executed analyses in
    ``runs/analyses``. What the profile does not analyse (``grid.analyses``) has no page, and with neither a comparison
    nor budgets there is no explore.html. Pages hold no picture of their own: they show the files of figures beside
    them. Nothing in them comes from the clock or from the network, so the same results, figures and notebooks give the
    same bytes.

    Raises:
        StudyError: a result, figure, table or executed notebook is missing, or the folder cannot be written.
    """
    comparisons = plan.of(Comparison)
    compared = [comparison for comparison in comparisons if "comparison" in plan.analyses()]
    analyses = [analyse(comparison, plan.layout(comparison.setting)) for comparison in compared]
    _check(plan, analyses)
    index = plan.folder / "runs" / "notebooks" / f"{INDEX}.ipynb"
    run_notebook(plan.root / "notebooks" / f"{INDEX}.ipynb", index, {"profile": plan.profile}, plan.root)

    folders = [plan.layout(s).analysis(name) for s in (c.setting for c in comparisons) for name in plan.analyses(s)]
    pages = [Page(INDEX_PAGE, "answers", "", index, INDEX, folders, _linked(plan))]
    for comparison in comparisons:
        layout = plan.layout(comparison.setting)
        for name, notebook in plan.analyses(comparison.setting).items():
            numbers = {"Its numbers": sorted(layout.analysis(name).glob("*.csv"))}
            place = f"{name}_{layout.setting}.html", name, layout.setting, _executed(layout, name)
            pages.append(Page(*place, notebook, [layout.analysis(name)], numbers))

    html = plan.folder / "reports" / "html"
    nav: Navigation = {"": {INDEX_PAGE: "Answers"}}
    if compares := not {"comparison", "budgets"}.isdisjoint(plan.analyses()):
        nav[""][CHOOSER] = "Choose a student"
    for beside, words in ((attention, "Attention"), (translations, "Translations")):
        nav[""] |= {beside.PAGE: words} if result_file(plan, beside.RESULT) else {}
    nav[""]["../notebooks/index.html"] = "Notebooks"
    for page in pages[1:]:
        nav.setdefault(titled(page.setting), {})[page.name] = page.title
    write_file(html / STYLE, (Path(__file__).parent / STYLE).read_text())
    write_notebooks(plan, nav)
    attention.write_attention(plan, html, nav)
    translations.write_translations(plan, html, nav)
    if compares:
        budgets = [] if analyses else [load_budgets(own, plan.layout(own.setting)) for own in comparisons]
        write_chooser(plan, analyses or budgets, html / CHOOSER, nav)
    links = links_of(plan, html, executed_copies(plan))
    for page in pages:
        heading, content = notebook_page(page, html, f"Profile {plan.profile}")
        same = plan.analyses(page.setting) if page.setting else {}
        content = linked(content, links | {own: f"{name}_{page.setting}.html" for name, own in same.items()})
        about = ", ".join(titled(part) for part in (page.title, page.setting) if part)
        title = page_title(about, heading, plan)
        files = {heading: named([link(file, html) for file in files]) for heading, files in page.files.items()}
        made_by = link(plan.root / "notebooks" / f"{page.notebook}.ipynb", html)
        looks = {"style": STYLE, "notebook": made_by, "files": files}
        write_page(html / page.name, "page.html", plan, nav, title=title, content=Markup(content), **looks)
    return html / INDEX_PAGE


def _executed(layout: Layout, analysis: str) -> Path:
    return layout.folder / "runs" / "analyses" / f"{analysis}_{layout.setting}.ipynb"


def _check(plan: Plan, analyses: list[Analysis]) -> None:
    needed: list[Path] = []
    for comparison in plan.of(Comparison):
        layout = plan.layout(comparison.setting)
        shown = plan.analyses(comparison.setting)
        needed += [_executed(layout, name) for name in shown]
        needed += [layout.analysis(name) / "gap_closed.png" for name in shown if name == "budgets"]
    for analysis in analyses:
        folder = plan.layout(analysis.setting).analysis("comparison")
        needed += [folder / f"{name}.png" for name in figures.names(analysis)]
        needed += [folder / f"{name}.csv" for name in comparison_tables(analysis)]
        needed.append(folder / "headline.json")
    if missing := [link(path, plan.root) for path in needed if not path.is_file()]:
        raise StudyError(f"the report lacks {', '.join(missing)}; `dvc repro` makes them")


def named(links: list[str]) -> dict[str, str]:
    """Link -> its file's name, after its folder's where another file has the name, too."""
    parts = {link: link.split("/") for link in links}
    often = Counter(part[-1] for part in parts.values())
    return {link: "/".join(part[-2:] if often[part[-1]] > 1 else part[-1:]) for link, part in parts.items()}


def _linked(plan: Plan) -> dict[str, list[Path]]:
    """The files that the index links, by heading."""
    linked: dict[str, list[Path]] = {}
    for comparison in plan.of(Comparison):
        layout, setting = plan.layout(comparison.setting), titled(comparison.setting)
        made = [path for name in plan.analyses(comparison.setting) for path in sorted(layout.analysis(name).iterdir())]
        results = [*result_files(comparison, layout)]
        results += [layout.result(model_name(*cell)) for cell in comparison.every_cell() if cell[-1] != BASE_BUDGET]
        results += [layout.systems / f"{own.neighbour}.json" for own in plan.of(NeighbourSystem, comparison.setting)]
        results += [path for name in OTHER_RESULTS if (path := layout.result(name)).is_file()]
        linked |= {
            f"{setting}, figures": [path for path in made if path.suffix == ".png"],
            f"{setting}, numbers": [path for path in made if path.suffix in (".csv", ".json")],
            f"{setting}, result files": results,
        }
    return linked


def notebook_page(page: Page, html: Path, where: str) -> tuple[str, str]:
    """Title (its first heading) and HTML of an executed notebook, without code, for a page in the folder ``html``.

    A picture that is byte for byte one of the page's folders becomes a reference to that file; others stay inside.
    Sections (from one heading of the second rank to the next) whose cells of code show nothing are left out; those
    whose heading has the tag FOLD are folded.

    Raises:
        StudyError: the file is no notebook.
    """
    notebook = read_notebook(page.executed)
    _refer_to_files(notebook.cells, page.folders, html)
    first, *sections = _sections(notebook.cells)
    title = take_heading(first[0])
    first[0].source = first[0].source.strip()
    where = " · ".join(filter(None, (titled(page.setting), where)))
    parts = [str(Markup("<h1>{}</h1>\n<p class=where>{}</p>").format(title, where))]
    parts.append(as_html(notebook, first, code=False))
    names = {_anchor(cells): cells[0].source.splitlines()[0].removeprefix("## ") for cells in sections}
    if len(sections) > 2 and not any(_folded(cells) for cells in sections):
        links = "".join(str(Markup('<li><a href="#{}">{}</a></li>\n').format(*link)) for link in names.items())
        parts.append(f"<ul class=contents>\n{links}</ul>")
    for anchor, cells in zip(names, sections, strict=True):
        look, words = '<section id="{1}">\n{2}\n</section>', names[anchor]
        if _folded(cells):
            look, words = FOLDED, take_heading(cells[0])
        parts.append(str(Markup(look).format(words, anchor, Markup(as_html(notebook, cells, code=False)))))
    return title, "\n".join(parts)


def _refer_to_files(cells: list[nbformat.NotebookNode], folders: list[Path], html: Path) -> None:
    pictures: dict[bytes, list[Path]] = {}
    for file in (file for folder in folders for file in sorted(folder.glob("*.png"))):
        pictures.setdefault(file.read_bytes(), []).append(file)
    for cell in cells:
        for output in cell.get("outputs", []):
            encoded = output.get("data", {}).get("image/png")
            if same := pictures.get(base64.b64decode(encoded)) if encoded else None:
                file = same.pop(0) if len(same) > 1 else same[0]  # equal pictures are shown in the order of folders
                said = output.get("metadata", {}).get("image/png", {})
                alternative = said.get("alt", file.stem)
                output["data"] = {"text/html": _picture(file, html, alternative, said.get("caption", alternative))}


def _folded(cells: list[nbformat.NotebookNode]) -> bool:
    return FOLD in cells[0].metadata.get("tags", [])


def _anchor(cells: list[nbformat.NotebookNode]) -> str:
    return re.sub(r"\W+", "-", cells[0].source.splitlines()[0].lower()).strip("-")


def _sections(cells: list[nbformat.NotebookNode]) -> list[list[nbformat.NotebookNode]]:
    """Cells by section, without the sections whose cells of code show nothing."""
    sections: list[list[nbformat.NotebookNode]] = [[]]
    for cell in cells:
        if cell.cell_type == "markdown" and cell.source.startswith("## "):
            sections.append([])
        sections[-1].append(cell)
    first, *others = sections
    code = [[cell.outputs for cell in section if cell.cell_type == "code"] for section in others]
    return [first, *(section for section, outputs in zip(others, code, strict=True) if not outputs or any(outputs))]


def _picture(file: Path, html: Path, alternative: str, caption: str) -> str:
    """A picture at PIXELS an inch or narrower, its caption below; it leads to the file."""
    width = int.from_bytes(file.read_bytes()[16:20], "big") * PIXELS // DPI  # in the PNG header
    return str(Markup(PICTURE).format(link(file, html), width, alternative, caption))
