"""Pages of executed notebooks: what they show, where they link, and that nothing is lost where nothing was executed."""

from __future__ import annotations

import base64
import io
import re
import shutil
from pathlib import Path
from xml.etree import ElementTree

import nbformat
import numpy as np
import pandas as pd
import PIL.Image
import pytest
from constructed_results import make_study

from study.analysis.notebooks import TARGETS, TEXTS, WIDGET, executed_copies, readable, write_notebooks
from study.files import write_file
from study.methods import HiddenState
from study.sections import Encoder

REPOSITORY = Path(__file__).parents[1]
NAV = {"": {"index.html": "Answers", "../notebooks/index.html": "Notebooks"}}
PROSE = r"""# How far does it fall?

The loss $\|W_{ij} h_i\|^2$, a mean of
$$\mathcal{L} = \frac{1}{N} \sum_n a_n * b_n.$$
Next: [scores](40_evaluate.ipynb), [all](50_compare.ipynb), [how](../docs/design.md)."""


def notebook(path, source, prose=PROSE, outputs=(), failed=False, stopped=False):
    made = nbformat.v4.new_notebook()
    made.cells = [
        nbformat.v4.new_markdown_cell(prose),
        nbformat.v4.new_code_cell("fall = 1 < 2", outputs=list(outputs)),
    ]
    made.metadata["papermill"] = {"input_path": f"scratch/notebooks/{source}.ipynb", "exception": failed or None}
    made.cells[-1].metadata["papermill"] = {"status": "pending" if stopped else "completed"}
    write_file(path, nbformat.writes(made))


def picture() -> bytes:
    drawn = io.BytesIO()
    PIL.Image.fromarray(np.arange(48, dtype=np.uint8).reshape(4, 4, 3)).save(drawn, format="png")
    return drawn.getvalue()


@pytest.fixture
def study(tmp_path):
    plan = make_study(tmp_path, ["none", "mlm"]).plan
    for name in ("30_distill", "40_evaluate", "50_compare", "80_report"):
        notebook(tmp_path / "notebooks" / f"{name}.ipynb", name)
    outputs = [
        nbformat.v4.new_output("stream", name="stdout", text=f"saved in {tmp_path}/runs\n"),
        nbformat.v4.new_output("stream", name="stderr", text="a warning\n"),
        nbformat.v4.new_output("display_data", {"image/png": base64.b64encode(picture()).decode()}),
    ]
    notebook(tmp_path / "runs/notebooks/distill_english_b.ipynb", "30_distill", "# Another")
    notebook(tmp_path / "runs/notebooks/distill_english_a.ipynb", "30_distill", outputs=outputs)
    notebook(tmp_path / "runs/notebooks/distill_english_0.ipynb", "30_distill", "# Failed", failed=True)
    notebook(tmp_path / "runs/notebooks/distill_english_1.ipynb", "30_distill", "# Stopped", stopped=True)
    notebook(tmp_path / "runs/analyses/comparison_english.ipynb", "50_compare")
    return plan


def test_a_setting_stands_before_those_that_lengthen_its_name(study):
    for setting in ("english-base", "english"):
        notebook(study.folder / f"runs/analyses/budgets_{setting}.ipynb", "56_budgets")
    assert [copy.stem for copy in executed_copies(study)["56_budgets"]] == ["budgets_english", "budgets_english-base"]


def test_the_first_executed_copy_is_a_page_with_code_outputs_and_formulas(study):
    folder = write_notebooks(study, NAV).parent
    text = (folder / "30_distill.html").read_text()
    assert {path.name for path in folder.iterdir()} == {"index.html", "30_distill.html", "30_distill_1.png"}
    assert "<h1>How far does it fall?</h1>" in text and "executed copy distill_english_a" in text
    assert "fall" in text and "saved in …/runs" in text and "a warning" not in text and str(study.root) not in text
    shown = np.array(PIL.Image.open(folder / "30_distill_1.png").convert("RGB"))
    assert (shown == np.array(PIL.Image.open(io.BytesIO(picture())))).all()  # 16 colours stay as they are
    inline, block = (ElementTree.fromstring(maths) for maths in re.findall(r"<math.*?</math>", text, re.S))
    assert (inline.get("display"), block.get("display")) == ("inline", "block")
    assert "".join(inline.itertext()) == "‖Wijhi‖2" and "*" in "".join(block.itertext())
    assert "$" not in text and "formula" not in text
    assert not re.search(r"""(src|href)=["'](\w+:|//|data:)""", text) and "<script" not in text


def test_texts_of_others_stay_out_of_the_repository(study):
    path = study.root / "runs/notebooks/tasks_english.ipynb"
    shown = [nbformat.v4.new_output("stream", text="A film that someone reviewed\n")]
    for name in (study.root / "notebooks" / "10_tasks.ipynb", path):
        notebook(name, "10_tasks", outputs=shown)
    made = nbformat.read(path, as_version=4)
    made.cells[1].metadata["tags"] = ["texts"]
    nbformat.write(made, path)
    text = (write_notebooks(study, NAV).parent / "10_tasks.html").read_text()
    assert "someone" not in text and "executing the notebook shows them" in text


@pytest.mark.parametrize(("name", "call"), [("10_tasks", "load_task"), ("15_corpus", "corpus.samples")])
def test_cells_that_print_texts_say_so(name, call):
    cells = nbformat.read(REPOSITORY / "notebooks" / f"{name}.ipynb", as_version=4).cells
    (cell,) = (cell for cell in cells if cell.cell_type == "code" and call in cell.source)
    assert TEXTS in cell.metadata["tags"]


def test_links_lead_to_pages_where_there_are_any(study):
    folder = write_notebooks(study, NAV).parent
    text = (folder / "30_distill.html").read_text()
    assert '<a href="../../notebooks/40_evaluate.ipynb">scores</a>' in text  # nobody executed it
    assert '<a href="../html/comparison_english.html">all</a>' in text
    assert '<a href="../../docs/design.md">how</a>' in text and '<a href="../html/index.html">Answers</a>' in text
    listed = (folder / "index.html").read_text()
    missing = "no executed copy is at hand"
    assert f"40_evaluate</a>: {missing}; <code>make repro PROFILE=laptop</code> leaves one" in listed
    assert f"30_distill</a>: {missing}" not in listed


def test_the_list_names_the_command_that_leaves_an_executed_copy(study):
    """As the Makefile has it; none for a system that no run of the profile asks for."""
    recipes = re.split(r"\n(?=[a-z-]+:)", (REPOSITORY / "Makefile").read_text())
    by_make = {name: own.split(":")[0] for own in recipes for name in re.findall(r"run notebooks/(\w+)\.ipynb", own)}
    assert by_make == TARGETS
    for name in ("48_miniend", "60_benchmark"):
        notebook(study.root / "notebooks" / f"{name}.ipynb", name)
    listed = write_notebooks(study, NAV).read_text()
    missing = "no executed copy is at hand"
    assert f"48_miniend</a>: {missing}</dd>" in listed
    assert f"60_benchmark</a>: {missing}; <code>make benchmark PROFILE=laptop</code> leaves one" in listed


PAGES = [page for place in ("", "profiles/*/") for page in sorted(REPOSITORY.glob(f"{place}reports/html/*.html"))]


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.relative_to(REPOSITORY).as_posix())
def test_tables_of_a_committed_page_have_names_of_their_own(page):
    """Two of one name would take each other's colours."""
    names = re.findall(r'<table[^>]* id="([^"]+)"', page.read_text())
    assert len(names) == len(set(names)), [name for name in names if names.count(name) > 1]


def test_controls_leave_words_and_no_script(study):
    control = nbformat.v4.new_output("display_data", {WIDGET: {"model_id": "1"}, "text/plain": "interactive()"})
    notebook(study.folder / "runs/notebooks/evaluate_english.ipynb", "40_evaluate", outputs=[control])
    executed = study.folder / "runs/notebooks/evaluate_english.ipynb"
    with_state = nbformat.read(executed, 4)
    state = {"1": {"model_name": "VBoxModel", "model_module": "@jupyter-widgets/controls", "state": {}}}
    with_state.metadata["widgets"] = {"application/vnd.jupyter.widget-state+json": {"state": state}}
    nbformat.write(with_state, executed)
    page = (write_notebooks(study, NAV).parent / "40_evaluate.html").read_text()
    assert "Controls: executing the notebook shows them." in page
    assert "<script" not in page and "interactive()" not in page


def test_headings_of_tables_may_be_broken_behind_underscores():
    page = '<th class="a_b">lower_quartile_seconds</th><td>a_b</td><thead>'
    broken = '<th class="a_b">lower_<wbr>quartile_<wbr>seconds</th><td>a_b</td><thead>'
    assert readable(page) == broken == readable(broken)


def test_tables_of_pandas_have_dashes_and_no_index_that_only_counts():
    frame = pd.DataFrame({"task": ["topic", "retrieval"], "es": [0.5, np.nan], "said": [None, "nan of all"]})
    sizes = pd.Series({"loss": np.nan, "parameters": 7}).map("{:,.12g}".format).to_frame("this model")
    layers = pd.DataFrame({"likeness": [0.9, 0.8]}, index=pd.Index([1, 2], name="layer"))
    by_year = pd.DataFrame({"count": [1, 2]}, index=[2025, 2024])
    pages = [own.to_html() for own in (frame, frame[frame["es"].isna()], sizes, layers, by_year)]
    shown = [
        [[cell.text or "" for cell in row] for row in ElementTree.fromstring(readable(page)).iter("tr")]
        for page in pages
    ]
    assert shown[0] == [["task", "es", "said"], ["topic", "0.5", "–"], ["retrieval", "–", "nan of all"]]
    assert shown[1] == [["task", "es", "said"], ["retrieval", "–", "nan of all"]]
    assert shown[2] == [["", "this model"], ["loss", "–"], ["parameters", "7"]]
    assert shown[3] == [["", "likeness"], ["layer", ""], ["1", "0.9"], ["2", "0.8"]]
    assert shown[4] == [["", "count"], ["2025", "1"], ["2024", "2"]]  # these do not count rows
    assert [readable(readable(page)) for page in pages] == [readable(page) for page in pages]


def test_what_tuning_executes_has_a_page(study):
    for path in ("notebooks/35_tune.ipynb", "scratch/executed/tune_english_mlm_L3-H192.ipynb"):
        notebook(study.root / path, "35_tune", "# Which rate?")
    folder = write_notebooks(study, NAV).parent
    assert "executed copy tune_english_mlm_L3-H192" in (folder / "35_tune.html").read_text()


def test_options_are_shown_as_a_table():
    shown = HiddenState(objective="hidden_state", learning_rate=0.1, mapping="last")._repr_html_()
    rows = {row[0].text: row[1].text for row in ElementTree.fromstring(shown)}
    assert {"objective": "hidden_state", "learning_rate": "0.1", "mapping": "last"}.items() <= rows.items()
    assert "inputs" not in rows  # has no value
    shown = Encoder.model_construct(layers=2, family="<b>")._repr_html_()
    assert [row[1].text for row in ElementTree.fromstring(shown)] == ["2", "<b>"]


def test_a_page_stays_where_nothing_is_executed_and_the_same_copies_give_the_same_bytes(study):
    folder = write_notebooks(study, NAV).parent
    before = {path.name: path.read_bytes() for path in folder.iterdir()}
    write_notebooks(study, NAV)
    assert {path.name: path.read_bytes() for path in folder.iterdir()} == before
    for copy in (study.root / "runs/notebooks").iterdir():
        copy.unlink()
    write_notebooks(study, NAV)
    assert {path.name: path.read_bytes() for path in folder.iterdir()} == before


def test_links_of_a_page_that_stays_follow_the_pages_that_there_are(study):
    notebook(study.root / "runs/notebooks/evaluate_english.ipynb", "40_evaluate", "# How?\n\n[first](30_distill.ipynb)")
    folder = write_notebooks(study, NAV).parent
    kept = folder / "40_evaluate.html"
    before = kept.read_text()
    assert '<a href="30_distill.html">first</a>' in before
    shutil.rmtree(study.root / "runs/notebooks")
    (folder / "30_distill.html").unlink()
    write_notebooks(study, NAV)
    gone = '<a href="../../notebooks/30_distill.ipynb">first</a>'
    assert kept.read_text() == before.replace('<a href="30_distill.html">first</a>', gone)


def test_a_page_that_stays_has_the_style_and_navigation_of_today(study):
    folder = write_notebooks(study, NAV).parent
    kept = folder / "30_distill.html"
    before = kept.read_text()
    link, inline = re.compile(r'<link rel="stylesheet"[^>]*>\n'), "<style>\nnav { white-space: nowrap; }"
    kept.write_text(link.sub("", before, count=1).replace("<style>", inline, 1))  # in a style of its own
    shutil.rmtree(study.root / "runs/notebooks")
    write_notebooks(study, NAV | {"English": {"budgets_english.html": "budgets"}})
    after = kept.read_text()
    new = '<a href="../html/budgets_english.html">budgets</a>'
    assert new in after and new not in before and after.count("<nav>") == after.count("</nav>") == 1
    assert after.split("</nav>")[1] == before.split("</nav>")[1] and after.split("<nav>")[0] == before.split("<nav>")[0]


def test_a_page_of_another_profile_serves_where_there_is_none(study):
    for profile in ("smoke", "evidence"):  # numbers of smoke mean nothing
        write_file(study.root / "profiles" / profile / "reports/notebooks/40_evaluate.html", "page")
    write_file(study.root / "profiles/evidence/reports/html/budgets_english.html", "page")
    notebook(study.root / "notebooks/56_budgets.ipynb", "56_budgets")
    listed = write_notebooks(study, NAV).read_text()
    assert 'href="../../profiles/evidence/reports/notebooks/40_evaluate.html"' in listed
    assert 'href="../../profiles/evidence/reports/html/budgets_english.html"' in listed
    assert "profile evidence</a>" in listed and "profiles/smoke" not in listed
    more = study.root / "profiles/more/reports"
    write_file(more / "html/budgets_german.html", "page")
    assert "profiles/more" not in write_notebooks(study, NAV).read_text()  # of as many results the first
    write_file(more / "results/german/teacher.json", "{}")
    assert 'href="../../profiles/more/reports/html/budgets_german.html"' in write_notebooks(study, NAV).read_text()
