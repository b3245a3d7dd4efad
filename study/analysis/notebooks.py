"""Executed notebooks as pages, with their code and outputs: nobody has to execute one to read it."""

from __future__ import annotations

import base64
import itertools
import re
from dataclasses import dataclass
from pathlib import Path

import nbformat
from markupsafe import Markup

from study.analysis.figures.style import small
from study.analysis.numbers.text import NOTHING
from study.analysis.pages import (
    Navigation,
    as_html,
    frame_anew,
    link,
    other_profiles,
    read_notebook,
    take_heading,
    write_page,
)
from study.descriptions import NeighbourSystem
from study.files import profile_of, write_file
from study.neighbours_options import NOTEBOOKS as SYSTEMS
from study.plan import Plan
from study.sections import ANALYSES

INDEX, STYLE = "index.html", "../html/page.css"
#: A table as pandas shows it.
FRAME = re.compile('<table[^>]*class="dataframe".*?</table>', re.S)
#: Tag of cells that print texts of others, which are not kept in the repository.
TEXTS = "texts"
#: Type of outputs that are controls; they need a running kernel and scripts from elsewhere.
WIDGET = "application/vnd.jupyter.widget-view+json"
#: Notebook -> the target of the Makefile that executes it; all others are stages of `make repro`.
TARGETS = {
    "05_methods": "notebooks",
    "35_tune": "tune",
    "60_benchmark": "benchmark",
    "65_cost_model": "costs",
    "65_grid_cost": "costs",
    "66_clusters": "costs",
    "67_runtimes": "runtimes",
    "68_dynamics": "dynamics",
    "72_attention": "attention",
    "74_translations": "translations",
}
#: Where executed copies are: of stages, of `make tune`, of analyses, which are pages of the report already.
EXECUTED = ("runs/notebooks", "scratch/executed", "runs/analyses")


@dataclass(frozen=True)
class Entry:
    """A notebook in the list of all: its file, what it asks, the command that leaves an executed copy, and its pages.

    ``pages``: name -> file from the list's folder.
    """

    name: str
    question: str
    command: str
    pages: dict[str, str]


def write_notebooks(plan: Plan, nav: Navigation) -> Path:
    """Write ``reports/notebooks``: a page for every notebook that was executed, and index.html, the list.

    Of several copies of one notebook (a setting, a student each) the first by name that did not fail is shown. A page
    that is there stays where nothing was executed: it was made by a run elsewhere, and its navigation and links to
    other notebooks follow the pages that there are. The same executed notebooks give the same bytes.

    Args:
        nav: of the report's pages, in ``reports/html``.

    Returns:
        The list.

    Raises:
        StudyError: an executed copy is no notebook, or the folder cannot be written.
    """
    folder, copies = plan.folder / "reports" / "notebooks", executed_copies(plan)
    html, up = folder.with_name("html"), f"{link(plan.root, folder)}/"
    nav = {group: {link(html / file, folder): title for file, title in own.items()} for group, own in nav.items()}
    entries: list[Entry] = []
    for notebook in _all(plan):
        pages = {words: link(page, folder) for words, page in _pages(plan, notebook.stem, copies).items()}
        question = take_heading(read_notebook(notebook).cells[0])
        entries.append(Entry(notebook.stem, question, _command(plan, notebook.stem), pages))
    links = links_of(plan, folder, copies)
    for name in links:
        page = folder / f"{name}.html"
        if link(page, folder) != links[name]:
            continue
        if not (own := copies.get(name)):
            _write_anew(page, links, nav)
            continue
        title, content = _content(page, own[0], links, plan.root, up)
        write_page(
            page, "notebook.html", plan, nav, title=f"{title} · profile {plan.profile}", heading=title,
            copy=own[0].stem, content=content, notebook=f"{up}notebooks/{name}.ipynb", files={}, style=STYLE,
        )  # fmt: skip
    title = f"Notebooks · profile {plan.profile}"
    write_page(folder / INDEX, "notebooks.html", plan, nav, title=title, entries=entries, up=up, style=STYLE)
    return folder / INDEX


def links_of(plan: Plan, folder: Path, copies: dict[str, list[Path]]) -> dict[str, str]:
    """Notebook -> its first page, itself where nobody executed it, as pages in ``folder`` link it.

    Args:
        copies: :func:`executed_copies`.
    """
    places = {path: next(iter(_pages(plan, path.stem, copies).values()), path) for path in _all(plan)}
    return {path.stem: link(place, folder) for path, place in places.items()}


def linked(page: str, links: dict[str, str], but: str = "") -> str:
    """The text of a page whose links to notebooks, ``but`` one, lead to where ``links`` says."""
    others = "|".join(name for name in links if name != but)
    return re.sub(rf'href="(?:[^":]*/)?({others})\.(?:html|ipynb)"', lambda own: f'href="{links[own[1]]}"', page)


def readable(page: str) -> str:
    """A page whose tables of pandas suit readers.

    Headings may go on in the next line behind an underscore, what is missing is a dash, and an index without a name
    that only counts rows is left out.
    """
    page = re.sub(r"(<th\b[^>]*>)([^<]*)", lambda own: own[1] + re.sub(r"_(?=\w)", "_<wbr>", own[2]), page)
    return FRAME.sub(lambda table: _tidied(table[0]), page)


def _tidied(table: str) -> str:
    table = re.sub("<td>(NaN|nan|None)</td>", f"<td>{NOTHING}</td>", table)
    heads = re.findall(r"<tr>\s*<th>([^<]*)</th>", table)
    counts = heads and all(map(str.isdecimal, heads)) and re.search(r"<thead>\s*<tr[^>]*>\s*<th></th>", table)
    if not counts or [*map(int, heads)] != sorted({*map(int, heads)}):
        return table
    return re.sub(r"(<tr[^>]*>\s*)<th>\d*</th>\s*", r"\1", table)


def _all(plan: Plan) -> list[Path]:
    return sorted((plan.root / "notebooks").glob("*.ipynb"))


def executed_copies(plan: Plan) -> dict[str, list[Path]]:
    """Notebook -> its executed copies that neither failed nor were stopped before their last cell, by name."""
    copies: dict[str, list[Path]] = {}
    found = (sorted((plan.folder / kept).glob("*.ipynb"), key=lambda path: path.stem) for kept in EXECUTED)
    for path in itertools.chain.from_iterable(found):
        notebook = read_notebook(path)
        done = notebook.metadata.get("papermill", {})
        states = {cell.metadata.get("papermill", {}).get("status", "completed") for cell in notebook.cells}
        if not done.get("exception") and states <= {"completed"}:
            copies.setdefault(Path(done.get("input_path") or path).stem, []).append(path)
    return copies


def _pages(plan: Plan, name: str, copies: dict[str, list[Path]]) -> dict[str, Path]:
    """Words -> page of a notebook: to be written where there is a copy; another profile's where there is none."""
    own, reports = copies.get(name, []), plan.folder / "reports"
    page = reports / "notebooks" / f"{name}.html"
    if name == "80_report":
        return {"index": reports / "html" / "index.html"}
    if analysed := [copy.stem for copy in own if copy.parent.name == "analyses"]:
        return {stem: reports / "html" / f"{stem}.html" for stem in analysed}
    return {name: page} if own or page.is_file() else _elsewhere(plan, name)


def _command(plan: Plan, name: str) -> str:
    """What leaves an executed copy for this profile; nothing for what it does not ask for or leaves to readers."""
    asked = {SYSTEMS[own.options.system] for own in plan.of(NeighbourSystem)}
    if name == "70_explore" or name in set(SYSTEMS.values()) - asked:
        return ""
    return f"make {TARGETS.get(name, 'repro')} PROFILE={plan.profile}"


def _write_anew(page: Path, links: dict[str, str], nav: Navigation) -> None:
    """A page that was made elsewhere, in the style, under the navigation and with the links of today."""
    before = page.read_text()
    text = readable(linked(before, links, page.stem))
    if (text := frame_anew(text, "notebook.html", nav=nav, here=page.name, style=STYLE, notebook="")) != before:
        write_file(page, text)


def _elsewhere(plan: Plan, name: str) -> dict[str, Path]:
    """The page of a notebook that another profile executed: that of the most results."""
    analysis = next((own for own, made_by in ANALYSES.items() if made_by == name), None)
    pattern = f"html/{analysis}_*.html" if analysis else f"notebooks/{name}.html"
    pages = (page for folder in other_profiles(plan) for page in sorted((folder / "reports").glob(pattern)))
    made = {}
    for page in pages:
        setting = page.stem.removeprefix(f"{analysis}_") if analysis else "*"
        made[page] = len(list(page.parents[1].glob(f"results/{setting}/*.json")))
    found = max(made, key=made.__getitem__, default=None)
    return {f"profile {profile_of(found.parents[2])}": found} if found else {}


def _content(page: Path, executed: Path, links: dict[str, str], root: Path, up: str) -> tuple[str, Markup]:
    """Title and content of a page of an executed notebook; its pictures are written beside it."""
    notebook = read_notebook(executed)
    notebook.metadata.pop("widgets", None)  # what its controls were set to
    title, pictures = take_heading(notebook.cells[0]), 0
    for cell in notebook.cells:
        if cell.cell_type == "markdown":
            cell.source = cell.source.replace("](../", f"]({up}")
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
        if any(WIDGET in output.get("data", {}) for output in outputs):
            outputs = [nbformat.v4.new_output("stream", text="Controls: executing the notebook shows them.\n")]
        if TEXTS in cell.metadata.get("tags", []):
            outputs = [nbformat.v4.new_output("stream", text="Texts of others: executing the notebook shows them.\n")]
        if cell.cell_type == "code":
            cell.outputs, cell.execution_count = outputs, None
    body = as_html(notebook, notebook.cells, code=True).replace(str(root.resolve()), "…")
    return title, Markup(readable(re.sub(r"[ \t]+\n", "\n", body)))
