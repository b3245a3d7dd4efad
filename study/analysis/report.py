"""The HTML report: the executed notebooks of the index and of the analyses, readable offline and byte-stable."""

from __future__ import annotations

import base64
import os
from dataclasses import dataclass
from pathlib import Path

import jinja2
import nbformat
from markupsafe import Markup
from nbconvert import HTMLExporter

from study.analysis.chooser import explorer
from study.analysis.figures import comparison as figures
from study.analysis.figures.style import DPI
from study.analysis.numbers.analysis import analyse
from study.analysis.numbers.results import result_files
from study.analysis.numbers.tables import comparison_tables
from study.descriptions import Comparison
from study.execution import run_notebook
from study.files import Layout, StudyError, write_file
from study.plan import ANALYSES, Plan

INDEX = "80_report"
TEMPLATE, EXPLORER = (Path(__file__).with_name(name) for name in ("page.html", "explore.html"))
#: Result files of a setting beside those of its models.
OTHER_RESULTS = ("latency", "tasks", "corpus", "representations")
PICTURE = '<figure>\n<a href="{0}"><img src="{0}" width="{1}" alt="{2}"></a>\n<figcaption>{2}</figcaption>\n</figure>'


@dataclass(frozen=True)
class Page:
    """A page to be: what the others call it, its executed notebook and what that was made from, and its files.

    ``folders``: those of the pictures that it may show; ``files``: heading -> files that it links.
    """

    name: str
    title: str
    executed: Path
    notebook: str
    folders: list[Path]
    files: dict[str, list[Path]]


def write_report(plan: Plan) -> Path:
    """Write ``reports/html`` of the plan's profile: the index, explore.html, a page per analysis and setting.

    The index is notebooks/80_report.ipynb, executed here; the other pages are the executed analyses in
    ``runs/analyses``. Pages hold no picture of their own: they show the files of figures beside them. Nothing in them
    comes from the clock or from the network, so the same results, figures and notebooks give the same bytes.

    Returns:
        The index.

    Raises:
        StudyError: a result, figure, table or executed notebook is missing, or the folder cannot be written.
    """
    layouts = {comparison.setting: plan.layout(comparison.setting) for comparison in plan.of(Comparison)}
    _check(plan)
    index = plan.folder / "runs" / "notebooks" / f"{INDEX}.ipynb"
    run_notebook(plan.root / "notebooks" / f"{INDEX}.ipynb", index, {"profile": plan.profile}, plan.root)

    folders = [layout.analysis(name) for layout in layouts.values() for name in ANALYSES]
    pages = [Page("index.html", "report", index, INDEX, folders, _linked(plan))]
    titles = {"index.html": "report", "explore.html": "choose a student"}
    for setting, layout in layouts.items():
        for name, notebook in ANALYSES.items():
            files = {"Its numbers": sorted(layout.analysis(name).glob("*.csv"))}
            executed, title = _executed(layout, name), f"{name}, {setting}"
            pages.append(Page(f"{name}_{setting}.html", title, executed, notebook, [layout.analysis(name)], files))

    html = plan.folder / "reports" / "html"
    environment = jinja2.Environment(autoescape=True, trim_blocks=True)
    template = environment.from_string(TEMPLATE.read_text(encoding="utf-8"))
    titles |= {page.name: page.title for page in pages}
    content = explorer(EXPLORER.read_text(encoding="utf-8"), plan)
    text = template.render(
        title=f"Choose a student ({plan.profile})", content=content, pages=titles, here="explore.html"
    )
    write_file(html / "explore.html", text + "\n")
    for page in pages:
        title, notebook = notebook_page(page.executed, page.folders, html)
        text = template.render(
            title=f"{title} ({page.title}, {plan.profile})",
            content=Markup(notebook),
            pages=titles,
            here=page.name,
            notebook=_link(plan.root / "notebooks" / f"{page.notebook}.ipynb", html),
            files={heading: [_link(file, html) for file in files] for heading, files in page.files.items()},
        )
        write_file(html / page.name, text + "\n")
    return html / "index.html"


def _executed(layout: Layout, analysis: str) -> Path:
    return layout.folder / "runs" / "analyses" / f"{analysis}_{layout.setting}.ipynb"


def _link(file: Path, folder: Path) -> str:
    return Path(os.path.relpath(file, folder)).as_posix()


def _check(plan: Plan) -> None:
    missing: list[str] = []
    for comparison in plan.of(Comparison):
        layout = plan.layout(comparison.setting)
        analysis, folder = analyse(comparison, layout), layout.analysis("comparison")
        needed = [folder / f"{name}.png" for name in figures.names(analysis)]
        needed += [folder / f"{name}.csv" for name in comparison_tables(analysis)]
        needed += [folder / "headline.json", *(_executed(layout, name) for name in ANALYSES)]
        missing += [_link(path, plan.root) for path in needed if not path.is_file()]
    if missing:
        raise StudyError(f"the report lacks {', '.join(missing)}; `dvc repro` makes them")


def _linked(plan: Plan) -> dict[str, list[Path]]:
    """The files that the index links, by heading."""
    linked: dict[str, list[Path]] = {}
    for comparison in plan.of(Comparison):
        layout, setting = plan.layout(comparison.setting), comparison.setting.capitalize()
        made = [path for name in ANALYSES for path in sorted(layout.analysis(name).iterdir())]
        results = list(result_files(comparison, layout))
        results += [path for name in OTHER_RESULTS if (path := layout.result(name)).is_file()]
        linked |= {
            f"{setting}, figures": [path for path in made if path.suffix == ".png"],
            f"{setting}, numbers": [path for path in made if path.suffix in (".csv", ".json")],
            f"{setting}, result files": results,
        }
    return linked


def notebook_page(path: Path, folders: list[Path], html: Path) -> tuple[str, str]:
    """Title (its first heading) and HTML of an executed notebook, without code, for a page in the folder ``html``.

    A picture that is byte for byte one of ``folders`` becomes a reference to that file; others stay inside. Sections
    (from one heading of the second rank to the next) whose cells of code show nothing are left out.

    Raises:
        StudyError: the file is no notebook.
    """
    try:
        notebook = nbformat.read(path, as_version=4)
    except (nbformat.reader.NotJSONError, nbformat.ValidationError, AttributeError) as error:
        raise StudyError(f"{path.name}: not a notebook: {' '.join(str(error).split())[:200]}") from None
    notebook.cells = [cell for section in _sections(notebook.cells) for cell in section]
    pictures: dict[bytes, list[Path]] = {}
    for file in (file for folder in folders for file in sorted(folder.glob("*.png"))):
        pictures.setdefault(file.read_bytes(), []).append(file)
    for place, cell in enumerate(notebook.cells):
        cell["id"] = str(place)  # papermill gives the cell that it injects a random one
        for output in cell.get("outputs", []):
            encoded = output.get("data", {}).get("image/png")
            if same := pictures.get(base64.b64decode(encoded)) if encoded else None:
                file = same.pop(0) if len(same) > 1 else same[0]  # equal pictures are shown in the order of folders
                alternative = output.get("metadata", {}).get("image/png", {}).get("alt", file.stem)
                output["data"] = {"text/html": _picture(file, html, alternative)}
    exporter = HTMLExporter(
        template_name="basic",
        exclude_input=True,
        exclude_input_prompt=True,
        exclude_output_prompt=True,
        exclude_anchor_links=True,
    )
    content, _ = exporter.from_notebook_node(notebook)
    lines = (line for cell in notebook.cells if cell.cell_type == "markdown" for line in cell.source.splitlines())
    title = next((line.removeprefix("# ") for line in lines if line.startswith("# ")), path.stem)
    return title, content


def _sections(cells: list[nbformat.NotebookNode]) -> list[list[nbformat.NotebookNode]]:
    """Cells by section, without the sections whose cells of code show nothing."""
    sections: list[list[nbformat.NotebookNode]] = [[]]
    for cell in cells:
        if cell.cell_type == "markdown" and cell.source.startswith("## "):
            sections.append([])
        sections[-1].append(cell)
    shown = []
    for place, section in enumerate(sections):
        code = [cell for cell in section if cell.cell_type == "code"]
        if place == 0 or not code or any(cell.outputs for cell in code):
            shown.append(section)
    return shown


def _picture(file: Path, html: Path, alternative: str) -> str:
    """A picture at its printed size or narrower, its caption below; it leads to the file."""
    width = int.from_bytes(file.read_bytes()[16:20], "big") * 96 // DPI  # in the PNG header; CSS has 96 pixels an inch
    return str(Markup(PICTURE).format(_link(file, html), width, alternative))
