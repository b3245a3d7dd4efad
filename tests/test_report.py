"""The analysis notebooks, executed once as the pipeline does (some seconds), and the report made from it."""

from __future__ import annotations

import json
import os
import re
import shutil
from html.parser import HTMLParser
from pathlib import Path
from urllib.parse import unquote

import nbformat
import numpy as np
import papermill
import pytest
from constructed_results import (
    ENVIRONMENT,
    REPOSITORY,
    add_languages,
    change,
    make_study,
    results_of_scores,
    write_grid,
)

from study import StudyError
from study.analysis import figures, report
from study.analysis.report import TABLES, write_report
from study.analysis.numbers.results import load_results
from study.analysis.numbers.tables import write_headline, write_tables
from study.analysis.numbers.claims import CLAIMS, write_verdicts
from study.files import Layout

FIGURES = set(figures.CAPTIONS) - {"per_language"}  # tasks of one language


class Page(HTMLParser):
    """Tags with their attributes, and the text between them."""

    def __init__(self, path: Path):
        super().__init__()
        self.tags, self.text = [], ""
        self.feed(path.read_text())

    def handle_starttag(self, tag, attributes):
        self.tags.append((tag, dict(attributes)))

    def handle_data(self, data):
        self.text += data

    def named(self, tag: str) -> list[dict]:
        return [attributes for name, attributes in self.tags if name == tag]


@pytest.fixture(scope="module")
def study(tmp_path_factory):
    root = tmp_path_factory.mktemp("study")
    params = make_study(root, ["none", "mlm", "hs-uniform+last"])
    for path in write_grid(root, params).glob("*_1.json"):
        change(path, environment=ENVIRONMENT | {"processor": "<b>quick & new</b>"}, commit="0123456789ab")
    shutil.copytree(REPOSITORY / "notebooks", root / "notebooks", ignore=shutil.ignore_patterns(".*"))
    layout = Layout(params, "english", root)
    outputs = {"50_compare": "../reports/laptop", "52_ablations": "../reports/laptop/ablations/english"}
    outputs["54_representations"] = "../reports/laptop/representations/english"
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("PYTHONPATH", str(REPOSITORY), prepend=os.pathsep)
        for executed, (name, output) in zip(layout.analyses, outputs.items(), strict=True):
            executed.parent.mkdir(parents=True, exist_ok=True)
            papermill.execute_notebook(
                str(REPOSITORY / "notebooks" / f"{name}.ipynb"),
                str(executed),
                parameters={"profile": "laptop", "output": output},
                kernel_name="python3",
                language="python",
                cwd=str(root / "notebooks"),
                progress_bar=False,
            )
    return root, params, layout.analyses


@pytest.fixture(scope="module")
def pages(study):
    root, params, _ = study
    index = write_report(params, root)
    return {path.name: Page(path) for path in index.parent.glob("*.html")}


def test_the_notebook_writes_every_figure_table_and_the_headline(study):
    reports = study[0] / "reports" / "laptop"
    names = {path.relative_to(reports).as_posix() for path in reports.rglob("*.*") if "results" not in path.parts}
    names = {name for name in names if not name.startswith("html/")}
    expected = {f"figures/english/{name}.{kind}" for name in FIGURES for kind in ("png", "svg")}
    expected |= {f"tables/english/{name}" for name in TABLES}
    expected |= {"headline/english.json", "ablations/english/effects.csv"}
    drawn = ("layer_similarity", "relation_divergence")
    expected |= {f"representations/english/{name}.{kind}" for name in drawn for kind in ("png", "svg")}
    expected |= {f"representations/english/{name}.csv" for name in ("layers", "likeness", "probes")}
    assert names == expected


def test_settings_are_shown_side_by_side(tmp_path, study):
    """A second setting with tasks in several languages, made of the same numbers."""
    root, _, executed = study
    params = make_study(tmp_path, ["none", "mlm", "hs-uniform+last"])
    add_languages(write_grid(tmp_path, params))
    english = params.settings["english"]
    several = english.model_copy(update={"tasks": [*english.tasks, "retrieval"]})
    grid = params.grid.model_copy(
        update={"settings": ["english", "several"], "students": dict.fromkeys(("english", "several"), ["L3-H384"])}
    )
    params = params.model_copy(update={"settings": {"english": several, "several": several}, "grid": grid})
    for setting in params.grid.settings:
        layout = Layout(params, setting, tmp_path)
        if setting == "several":
            shutil.copytree(tmp_path / "reports/laptop/results/english", layout.results)
            for path in layout.results.glob("*.json"):
                change(path, setting=setting)
        results = load_results(params, setting, tmp_path)
        for name in figures.names(results):
            figures.save(getattr(figures, name)(results), layout.figures, name)
        write_tables(results, layout.tables)
        write_verdicts(results, layout.tables)
        write_headline(results, layout.headline)
        for notebook, copy in zip(executed, layout.analyses, strict=True):
            copy.parent.mkdir(parents=True, exist_ok=True)
            shutil.copy(notebook, copy)
    page = Page(write_report(params, tmp_path))
    text = " ".join(page.text.split())
    for setting in ("english", "several"):
        assert f"Setting {setting}, teacher all-minilm-l6-v2" in text
        assert f"{setting.capitalize()}: scores per language" in text
        shown = [image["src"] for image in page.named("img")]
        assert f"../figures/{setting}/quality_heatmap.png" in shown
    for link in [a[key] for _, a in page.tags for key in ("src", "href") if key in a]:
        assert (tmp_path / "reports/laptop/html" / unquote(link)).is_file(), link


def test_the_report_has_an_index_and_the_notebook(pages):
    assert set(pages) == {
        "index.html",
        "compare_english.html",
        "ablations_english.html",
        "representations_english.html",
    }
    assert "No variant was run" in pages["ablations_english.html"].text
    shown = {attributes["src"] for attributes in pages["compare_english.html"].named("img")}
    assert shown == {f"../figures/english/{name}.png" for name in FIGURES}


def test_pages_load_nothing_from_elsewhere_and_run_nothing(pages):
    for page in pages.values():
        assert not page.named("script")
        assert not page.named("link")
        for _, attributes in page.tags:
            for key in ("src", "href"):
                assert not re.match(r"(\w+:)?//|data:", attributes.get(key) or "")


def test_every_link_leads_to_a_file(study, pages):
    folder = study[0] / "reports" / "laptop" / "html"
    links = [a[key] for page in pages.values() for _, a in page.tags for key in ("src", "href") if key in a]
    files = [folder / unquote(link) for link in links if not link.startswith("#")]
    assert [str(file) for file in files if not file.is_file()] == []
    linked = {file.resolve() for file in files}
    kinds = ("results/english/*.json", "figures/*/*", "tables/*/*.csv", "headline/*.json", "ablations/*/*.csv")
    for kind in (*kinds, "representations/*/*.csv"):
        assert {path.resolve() for path in folder.parent.glob(kind)} <= linked


def test_the_index_tells_the_headline(study, pages):
    text = " ".join(pages["index.html"].text.split())
    best = json.loads((study[0] / "reports/laptop/headline/english.json").read_text())["students"]["L3-H384"]
    assert best["method"] == "hs-uniform+last" and best["retained_percent"] == 77.5  # 0.62 / 0.80
    for words in ("HS: uniform+last", "77.5 %", "+2.00 points", "2.00 ×", "laptop", "2026-11-22", "torch 2.13.0"):
        assert words in text
    assert "62.0 for always giving the commonest label" in text  # boolq
    for words in ("contrastively tuned sentence encoders", "not about RoBERTa or XLM-R", "One distillation seed"):
        assert words in text


def test_the_index_tells_what_was_spent(pages):
    """Six students, four of them trained in 190.2 s, each evaluated in 140 s: 1,600.8 s."""
    text = " ".join(pages["index.html"].text.split())
    assert "English: 6 students, 0.4 million tokens of distillation each, 0.4 hours of distillation" in text


def test_the_index_gives_a_verdict_and_a_reason_for_every_claim(pages):
    text = " ".join(pages["index.html"].text.split())
    assert "English: what do these results say of the paper's claims?" in text
    for claim in CLAIMS:
        assert f"{claim.id} {claim.text} ({claim.standing}) undecided: not run: " in text
    assert "not run: mha-minilmv2, mha-direct" in text  # D6


def test_methods_are_named_by_their_labels():
    labels = {"od": "OD", "hs-uniform": "HS: uniform", "hs-uniform+last": "HS: uniform+last"}
    text = "hs-uniform+last − od, hs-uniform − HS, hs-uniform-consecutive, od@L_T-2: 2 models"
    words = "HS: uniform+last − OD, HS: uniform − HS, hs-uniform-consecutive, OD@L_T-2: 2 models"
    assert report.in_words(text, labels) == words


def test_learning_rates_that_matter_are_named():
    """2 points more at the other rate in every seed of `od`, give or take 0.1; of `mlm`, either sign."""
    level = np.full((1, 1, 3, 1), 0.5)
    gains = {"od": [0.019, 0.02, 0.021], "mlm": [-0.02, 0, 0.02]}
    scores = {m: level for m in gains} | {f"{m}-other": level + np.reshape(g, (1, 1, 3, 1)) for m, g in gains.items()}
    options = {m: {"objective": m.removesuffix("-other"), "learning_rate": 1e-3 if "-" in m else 1e-4} for m in scores}
    (row,) = report.rate_effects(results_of_scores(scores, options), {"od": "OD", "mlm": "MLM"})
    assert (row["label"], row["rate"], row["tuned"], row["effect"]) == ("OD", "0.001", "0.0001", "+2.0")
    one_seed = {method: values[:, :, :1] for method, values in scores.items()}
    assert report.rate_effects(results_of_scores(one_seed, options), {"od": "OD", "mlm": "MLM"}) == []


def test_methods_that_training_harmed_are_named(study, pages):
    root, params = study[:2]
    results = load_results(params, "english", root)
    labels = dict.fromkeys(results.runs["method"], "a label")
    assert report.unlearnt(results, labels) == []
    assert "the held-out loss is" not in pages["index.html"].text
    last = results.curves[results.curves["student"] == "L3-H192"].iloc[-1]
    start = results.curves.query("method == @last.method and student == @last.student")["loss"].iloc[0]
    results.curves.loc[last.name, "loss"] = 2 * start
    (row,) = report.unlearnt(results, labels)
    assert row == {"student": "L3-H192", "label": "a label", "rate": "0.0006", "ratio": "2.0"}


def test_values_from_files_are_escaped(study, pages):
    assert "<b>quick & new</b>" in pages["index.html"].text  # as text, not as a tag
    assert "&lt;b&gt;quick &amp; new" in (study[0] / "reports/laptop/html/index.html").read_text()


def test_the_index_names_the_commit(pages):
    assert "evaluated at commit 0123456789ab" in " ".join(pages["index.html"].text.split())


def test_pages_have_titles_languages_and_alternative_texts(pages):
    for name, page in pages.items():
        assert page.named("title") and page.named("html") == [{"lang": "en"}]
        assert any(meta.get("name") == "viewport" for meta in page.named("meta"))
        assert page.named("img") or name == "ablations_english.html"  # no variant among three methods
        assert all(len(image["alt"]) > 20 for image in page.named("img"))


def test_the_report_is_byte_stable_and_small(study, pages):
    root, params, _ = study
    folder = root / "reports" / "laptop" / "html"
    before = {path.name: path.read_bytes() for path in folder.iterdir()}
    notebook, *_ = study[2]
    executed = notebook.read_text()
    again = nbformat.reads(executed, as_version=4)
    for cell in again.cells:
        if "injected-parameters" in cell.metadata.get("tags", []):
            cell.id = "another"  # as after another execution
    nbformat.write(again, notebook)
    write_report(params, root)
    notebook.write_text(executed)
    assert {path.name: path.read_bytes() for path in folder.iterdir()} == before
    assert all(len(content) < 1_000_000 for content in before.values())


def test_what_is_missing_is_named(study, tmp_path):
    params = make_study(tmp_path, ["none", "mlm"])
    write_grid(tmp_path, params)
    with pytest.raises(StudyError) as error:
        write_report(params, tmp_path)
    for name in (
        "compared/compare_english.ipynb",
        "english/per_task.svg",
        "english/costs.csv",
        "english/verdicts.csv",
        "headline/english.json",
    ):
        assert name in str(error.value)


def test_a_damaged_notebook_is_named(study):
    root, params, (executed, *_) = study
    whole = executed.read_text()
    try:
        executed.write_text(whole[:300])
        with pytest.raises(StudyError, match=r"compare_english\.ipynb: not a notebook"):
            write_report(params, root)
    finally:
        executed.write_text(whole)


@pytest.mark.parametrize("name", ["50_compare", "52_ablations", "54_representations"])
def test_the_notebook_is_thin_and_stripped(name):
    notebook = nbformat.read(REPOSITORY / "notebooks" / f"{name}.ipynb", as_version=4)
    nbformat.validate(notebook)
    prose = [cell.source for cell in notebook.cells if cell.cell_type == "markdown"]
    assert not any("$" in text for text in prose)  # pages work offline: nothing renders formulas
    code = [cell for cell in notebook.cells if cell.cell_type == "code"]
    assert all(not cell.outputs and cell.execution_count is None for cell in code)
    assert not re.search(r"^\s*(def|class) ", "\n".join(cell.source for cell in code), flags=re.MULTILINE)
    (parameters,) = (cell.source for cell in code if "parameters" in cell.metadata.get("tags", []))
    assert re.findall(r"^(\w+) = ", parameters, flags=re.MULTILINE) == ["profile", "setting", "output"]
