"""The analysis notebooks, executed once as the pipeline does (some seconds), and the report made from them."""

from __future__ import annotations

import json
import os
import re
import shutil
from dataclasses import replace
from html.parser import HTMLParser
from pathlib import Path
from urllib.parse import unquote

import nbformat
import numpy as np
import pytest
from constructed_results import (
    ENVIRONMENT,
    add_languages,
    change,
    make_study,
    results_of_scores,
    run_result,
    several_languages,
    write,
    write_grid,
)
from ruamel.yaml import YAML

from study import StudyError, resolve
from study.analysis import materials, presentation
from study.analysis.figures import comparison as figures
from study.analysis.figures.style import in_words, save
from study.analysis.numbers.analysis import Analysis, analyse
from study.analysis.numbers.claims import CLAIMS
from study.analysis.numbers.tables import write_comparison
from study.analysis.pages import run_words
from study.analysis.report import CHOOSER, named, write_report
from study.descriptions import BudgetCells, Comparison
from study.execution import run_notebook
from study.params import read_yaml
from study.plan import write_plan
from study.sections import ANALYSES as KNOWN

REPOSITORY = Path(__file__).parents[1]
#: The study has one budget and nothing beside its grid.
ANALYSES = {name: notebook for name, notebook in KNOWN.items() if name not in ("budgets", "neighbours")}
FIGURES = set(figures.CAPTIONS) - {"per_language", "claims"}  # tasks of one language; no contrast has both methods
TABLES = {
    "verdicts",
    "contrasts",
    "differences",
    "aggregates",
    "per_task",
    "costs",
    "distillation",
    "selection",
    "recommendation",
}


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
    made = make_study(root, ["none", "mlm", "hs-uniform+last"])
    folder = write_grid(made)
    for path in (folder / "teacher.json", *folder.glob("*_1.json")):
        change(path, environment=ENVIRONMENT | {"processor": "<b>quick & new</b>"}, commit="0123456789ab")
    shutil.rmtree(root / "notebooks")
    shutil.copytree(REPOSITORY / "notebooks", root / "notebooks", ignore=shutil.ignore_patterns(".*"))
    (root / "dvc.yaml").touch()
    write_plan(made.plan)
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("PYTHONPATH", str(REPOSITORY), prepend=os.pathsep)
        patch.chdir(root)
        for name, notebook in ANALYSES.items():
            parameters = {"description": "../plan/compare/english.json", "output": f"../reports/{name}/english"}
            run_notebook(root / "notebooks" / f"{notebook}.ipynb", executed(root, name), parameters)
    return made


def executed(root: Path, analysis: str) -> Path:
    return root / "runs" / "analyses" / f"{analysis}_english.ipynb"


@pytest.fixture(scope="module")
def pages(study):
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("PYTHONPATH", str(REPOSITORY), prepend=os.pathsep)
        patch.chdir(study.plan.root)
        index = write_report(study.plan)
    return {path.name: Page(path) for path in index.parent.glob("*.html") if path.name != CHOOSER}


def words_of(page: Page) -> str:
    return " ".join(page.text.split())


def test_the_notebooks_write_every_figure_table_and_the_headline(study):
    reports = study.plan.root / "reports"
    names = {path.relative_to(reports).as_posix() for path in reports.rglob("*.*") if "results" not in path.parts}
    names = {name for name in names if not name.startswith("html/")}
    expected = {f"comparison/english/{name}.png" for name in FIGURES}
    expected |= {f"comparison/english/{name}.csv" for name in TABLES}
    expected |= {"comparison/english/headline.json", "ablations/english/effects.csv"}
    expected |= {f"representations/english/{name}.png" for name in ("layer_similarity", "relation_divergence")}
    expected |= {f"representations/english/{name}.csv" for name in ("layers", "likeness", "probes")}
    assert names == expected


def test_settings_are_shown_side_by_side(tmp_path, study, monkeypatch):
    """A second setting with tasks in several languages, made of the same numbers."""
    made = make_study(tmp_path, ["none", "mlm", "hs-uniform+last"])
    add_languages(write_grid(made))
    values = read_yaml(tmp_path / "params.yaml")
    english = values["settings"]["english"]
    values["settings"] = {"english": english, "several": english | {"tasks": [*english["tasks"], "retrieval"]}}
    values["grid"] |= {"settings": ["english", "several"]}
    values["grid"] |= {"students": dict.fromkeys(("english", "several"), ["L3-H384"]), "ablations": {}}
    values["tuning"] |= {"students": {}}
    YAML(typ="safe").dump(values, tmp_path / "params.yaml")
    shutil.copy(REPOSITORY / "notebooks" / "80_report.ipynb", tmp_path / "notebooks")
    for notebook in ANALYSES.values():
        shutil.copy(REPOSITORY / "notebooks" / f"{notebook}.ipynb", tmp_path / "notebooks")
    plan = resolve(root=tmp_path)
    for comparison in plan.of(Comparison):
        layout = plan.layout(comparison.setting)
        if comparison.setting == "several":
            shutil.copytree(made.layout.results, layout.results)
            for path in layout.results.glob("*.json"):
                change(path, setting="several")
        analysis = analyse(comparison, layout)
        for name in figures.names(analysis):
            save(getattr(figures, name)(analysis), layout.analysis("comparison"), name)
        write_comparison(analysis, layout.analysis("comparison"))
        for name in ANALYSES:
            layout.analysis(name).mkdir(parents=True, exist_ok=True)
            copy = executed(tmp_path, name).with_stem(f"{name}_{comparison.setting}")
            copy.parent.mkdir(parents=True, exist_ok=True)
            shutil.copy(executed(study.plan.root, name), copy)
    monkeypatch.setenv("PYTHONPATH", str(REPOSITORY), prepend=os.pathsep)
    page = Page(write_report(plan))
    text = words_of(page)
    assert "English Several teacher all-minilm-l6-v2 all-minilm-l6-v2" in text
    assert "English. Task topic." in text and "Several. Task topic." in text and "Several. Task retrieval." in text
    shown = [image["src"] for image in page.named("img")]
    names = ("quality_latency", "per_language", "quality")
    assert shown == [f"../comparison/{s}/{name}.png" for name in names for s in ("english", "several")]
    for link in [a[key] for _, a in page.tags for key in ("src", "href") if key in a]:
        assert (tmp_path / "reports/html" / unquote(link)).is_file(), link


def test_readers_see_what_was_trained_of_a_teacher(tmp_path):
    make_study(tmp_path, ["none", "mlm"])
    values = read_yaml(tmp_path / "params.yaml")
    said = []
    for head_only in (None, True):
        values["settings"]["english"]["adaptation"] = {"head_only": head_only} if head_only else {}
        YAML(typ="safe").dump(values, tmp_path / "params.yaml")
        plan = resolve(root=tmp_path)
        said.append(materials.materials(plan).data["what"].iloc[0])
        assert ("no longer the encoder" in materials.limits(plan).data) != bool(head_only)
    assert said == ["teacher, trained whole as a language model", "teacher, a head alone fitted on it"]


def test_without_scores_to_choose_by_no_page_links_the_chooser(study, tmp_path, monkeypatch):
    root = shutil.copytree(study.plan.root, tmp_path / "study", ignore=shutil.ignore_patterns("html"))
    values = read_yaml(root / "params.yaml")
    values["grid"]["analyses"] = ["representations"]
    YAML(typ="safe").dump(values, root / "params.yaml")
    plan = resolve(root=root)
    write_plan(plan)
    monkeypatch.setenv("PYTHONPATH", str(REPOSITORY), prepend=os.pathsep)
    monkeypatch.chdir(root)
    index = write_report(plan)
    assert not (index.parent / CHOOSER).exists() and "representations_english.html" in index.read_text()
    for path in index.parent.glob("*.html"):
        assert CHOOSER not in path.read_text(), path.name


def test_budgets_alone_make_a_report(tmp_path, monkeypatch):
    """None of what the comparison needs is there: no latency, no representations. One method, so no claim is judged."""
    made = make_study(tmp_path, ["none", "mlm"], ["L3-H192"])
    folder = write_grid(made)
    values = read_yaml(tmp_path / "params.yaml")
    values["budgets"] = {"long": {"steps": 1000}}
    values["grid"] |= {"budgets": {"english": ["long"]}, "analyses": ["budgets"]}
    YAML(typ="safe").dump(values, tmp_path / "params.yaml")
    for name in ("latency", "representations"):
        (folder / f"{name}.json").unlink()
    longer = run_result("mlm", "L3-H192", 1, 0.7) | {"budget": "long"}
    write(folder / "mlm_L3-H192_1_long.json", longer)
    for notebook in ("56_budgets", "80_report"):
        shutil.copy(REPOSITORY / "notebooks" / f"{notebook}.ipynb", tmp_path / "notebooks")
    (tmp_path / "dvc.yaml").touch()
    plan = resolve(root=tmp_path)
    write_plan(plan)
    monkeypatch.setenv("PYTHONPATH", str(REPOSITORY), prepend=os.pathsep)
    monkeypatch.chdir(tmp_path)
    parameters = {"description": "../plan/compare/english.json", "output": "../reports/budgets/english"}
    run_notebook(tmp_path / "notebooks" / "56_budgets.ipynb", executed(tmp_path, "budgets"), parameters)
    page = Page(write_report(plan))
    text = words_of(page)
    assert {path.name for path in (tmp_path / "reports/html").iterdir()} == {
        "index.html",
        "explore.html",
        "budgets_english.html",
        "page.css",
    }
    # floor: 0.60, teacher: 0.80; mlm: 0.61 at the base, 0.70 at the longer budget
    assert "English: 2 M tokens 50 % of the gap on sentence tasks closed by MLM: no teacher" in text
    assert "the highest of 1 methods on test data; one distilled model, 95 % interval" in text
    assert "What does speed cost?" not in text
    answer = "Which student should I ship? English No recommendation because: one distillation seed teacher: all-minilm"
    assert answer in text.replace("not shown above the untrained student; ", "")
    assert "English: L3-H192 after 2 M tokens; the score is the mean of" in text
    assert "Speed was not measured beside these scores: scores alone decide." in text
    assert run_words("mlm_L3-H192_1_long", plan) == "MLM: no teacher, L3-H192, 2 M tokens"
    assert [image["src"] for image in page.named("img")] == ["../budgets/english/gap_closed.png"]
    linked = {a["href"].rpartition("/")[2] for a in page.named("a")}
    assert {"gap.csv", "references.csv", "mlm_L3-H192_1_long.json", "mlm_L3-H192_1.json"} <= linked


def test_what_shows_nothing_is_left_out(pages):
    """No task has several languages, no variant was run, and no training did harm."""
    assert "languages that fine-tuning did not see" not in pages["comparison_english.html"].text
    assert "Temperature, positions" not in pages["ablations_english.html"].text
    for heading in ("Scores per language", "Where the learning rate decides"):
        assert heading not in pages["index.html"].text


def test_the_report_has_an_index_and_the_notebooks(pages):
    assert set(pages) == {"index.html", *(f"{name}_english.html" for name in ANALYSES)}
    assert "No variant was run" in pages["ablations_english.html"].text
    shown = {attributes["src"] for attributes in pages["comparison_english.html"].named("img")}
    assert shown == {f"../comparison/english/{name}.png" for name in FIGURES}
    shown = [image["src"] for image in pages["index.html"].named("img")]
    assert shown == [f"../comparison/english/{name}.png" for name in ("quality_latency", "quality")]


def test_pages_load_nothing_from_elsewhere_and_run_nothing(pages):
    for page in pages.values():
        assert not page.named("script")
        assert page.named("link") == [{"rel": "stylesheet", "href": "page.css"}]
        for _, attributes in page.tags:
            for key in ("src", "href"):
                assert not re.match(r"(\w+:)?//|data:", attributes.get(key) or "")


def test_files_of_one_name_are_told_apart_by_their_folders():
    links = ["../budgets/english/verdicts.csv", "../neighbours/english/arms.csv", "../neighbours/verdicts.csv"]
    assert list(named(links).items()) == list(
        zip(links, ["english/verdicts.csv", "arms.csv", "neighbours/verdicts.csv"], strict=True)
    )


def test_every_link_leads_to_a_file(study, pages):
    folder = study.plan.root / "reports" / "html"
    links = [a[key] for page in pages.values() for _, a in page.tags for key in ("src", "href") if key in a]
    files = [folder / unquote(link) for link in links if not link.startswith("#")]
    assert [str(file) for file in files if not file.is_file()] == []
    linked = {file.resolve() for file in files}
    for kind in ("results/english/*.json", *(f"{name}/*/*" for name in ANALYSES)):
        assert {path.resolve() for path in folder.parent.glob(kind)} <= linked


def test_pages_lead_to_each_other(pages):
    for page in pages.values():
        links = {attributes["href"] for attributes in page.named("a")}
        assert len(links & set(pages)) >= len(pages) - 1


def test_the_index_tells_the_headline(study, pages):
    text = words_of(pages["index.html"])
    headline = json.loads((study.plan.root / "reports/comparison/english/headline.json").read_text())
    best = headline["students"]["L3-H384"]
    assert best["method"] == "hs-uniform+last" and best["retained_percent"] == 77.5  # 0.62 / 0.80
    for words in (
        "HS: uniform+last",
        "77.5 %",
        "+2.00 points",
        "2.00 ×",
        "profile laptop",
        "2026-11-22",
        "torch 2.13.0",
    ):
        assert words in text, words
    assert "the floor: untrained 75.0 %" in text  # beside it, 0.60 / 0.80
    assert "score of always giving the commonest label" in text and "boolq accuracy 1,000 1.3 62.0" in text
    for words in ("contrastively tuned sentence encoders", "not about RoBERTa or XLM-R", "One distillation seed"):
        assert words in text, words


def test_the_index_tells_what_was_spent(pages):
    """Six students, four of them trained in 190.2 s, each evaluated in 140 s: 1,600.8 s."""
    text = words_of(pages["index.html"])
    spent = "ablations included 6 million tokens of distillation each 0.4 hours of distillation and evaluation 0.4"
    assert f"students distilled or left untrained, {spent} measured" in text


def test_runs_at_other_numbers_of_tokens_are_told_beside_what_was_spent(study):
    results = study.analyse().results
    cells = BudgetCells(tokens=20_000_000, methods=["od", "mlm"], seeds=[1])
    comparison = results.comparison.model_copy(update={"budgets": {"long": cells}})
    spent = presentation.overview([Analysis(replace(results, comparison=comparison))]).data.set_index("")["English"]
    assert spent["trained for other numbers of tokens, beside them"] == "4"  # two methods, two students


def test_the_index_gives_a_verdict_and_a_reason_for_every_claim(pages):
    text = words_of(pages["index.html"])
    for claim in CLAIMS:
        assert f"{claim.id} {claim.text} ({claim.standing}) undecided: not run: " in text
    assert "not run: MHA: MiniLMv2, MHA: DirectMiniLM" in text  # D6


def test_methods_are_named_by_their_labels():
    text = "hs-uniform+last − od, hs-uniform − HS, hs-consecutive, od@L_T-2: 2 models"
    words = "HS: uniform+last − OD: output distribution, HS: uniform − HS, hs-consecutive,"
    assert in_words(text) == words + " OD: output distribution from the last layer but 2: 2 models"


def test_learning_rates_that_matter_are_named():
    """2 points more at the other rate in every seed of `od`, give or take 0.1; of `mlm` 0.2 of either sign."""
    level = np.full((1, 1, 3, 1), 0.5)
    gains = {"od": [0.019, 0.02, 0.021], "mlm": [-0.002, 0, 0.002]}
    scores = {m: level for m in gains} | {f"{m}-other": level + np.reshape(g, (1, 1, 3, 1)) for m, g in gains.items()}
    options = {m: {"objective": m.removesuffix("-other"), "learning_rate": 1e-3 if "-" in m else 1e-4} for m in scores}
    members = {f"{m}-other": {"extends": m, "variant": "other", "changes": {"learning_rate": 1e-3}} for m in gains}
    table = presentation.rates_that_matter([Analysis(results_of_scores(scores, options, members))])
    (row,) = table.data.to_dict("records")
    assert row["method"] == "OD: output distribution" and row["points (interval)"].startswith("+2.0")
    assert (row["at a learning rate of"], row["instead of"]) == ("0.001", "0.0001")
    one_seed = {method: values[:, :, :1] for method, values in scores.items()}
    assert presentation.rates_that_matter([Analysis(results_of_scores(one_seed, options, members))]) is None


def test_methods_that_training_harmed_are_named(study, pages):
    results = study.load()
    assert presentation.unlearnt([Analysis(results)]) is None
    assert "held-out loss, times" not in pages["index.html"].text
    curves = results.curves.copy()
    last = curves[curves["student"] == "L3-H192"].iloc[-1]
    start = curves.query("method == @last.method and student == @last.student")["loss"].iloc[0]
    curves.loc[last.name, "loss"] = 2 * start
    (row,) = presentation.unlearnt([Analysis(replace(results, curves=curves))]).data.to_dict("records")
    assert row["student"] == "L3-H192" and row["learning rate"] == "0.0006"
    assert row["held-out loss, times that before"] == "2.0"


def test_values_from_files_are_escaped(study, pages):
    assert "<b>quick & new</b>" in pages["index.html"].text  # as text, not as a tag
    assert "&lt;b&gt;quick &amp; new" in (study.plan.root / "reports/html/index.html").read_text()


def test_the_index_names_the_commit(pages):
    assert "0123456789ab" in pages["index.html"].text


def test_the_answer_comes_first_and_details_are_folded(pages):
    index = pages["index.html"]
    text = words_of(index)
    order = ["No recommendation because: one distillation seed", "What does speed cost?"]
    order += [
        "What do these results say",
        "Which method makes the best",
        "How should the method be chosen?",
        "What these numbers do not say",
    ]
    places = [text.index(words) for words in order]
    assert places == sorted(places) and len(index.named("summary")) >= 8
    for page in pages.values():
        anchors = {a["href"][1:] for a in page.named("a") if a["href"].startswith("#")}
        assert anchors <= {attributes.get("id") for _, attributes in page.tags}
    assert any(a["href"].startswith("#") for a in pages["comparison_english.html"].named("a"))


def test_every_cell_names_its_column_for_narrow_screens(study):
    table = presentation.styled([{"a": "b", 'two "<words>': 1}], "some")
    text = table.to_html()
    assert '--name: ""' in text and r'--name: "two \22 \3c words\3e : "' in text and 'class="cards"' in text


def test_lines_part_groups_of_rows_and_not_single_rows():
    groups = [presentation.styled([{"a": own} for own in rows], "some", groups="a") for rows in ("aab", "abc")]
    assert ["border-top" in table.to_html() for table in groups] == [True, False]


def test_both_speed_ups_name_their_batch(study):
    columns = [name for name in presentation.costs(study.analyse()).data if name.startswith("speed-up")]
    assert columns == ["speed-up, batch of 1", "speed-up, batch of 32"]


def test_a_score_of_one_fine_tuning_has_no_deviation(study):
    analysis = study.analyse()
    analysis.per_task.loc[0, "boolq_sd"] = np.nan
    first, second, *_ = presentation.scores(analysis, deviations=True).data["boolq"]
    assert "±" not in first and "±" in second


def test_differences_are_a_matrix_with_the_best_method_first(study):
    """0.01 between neighbours of the grid, each the same in all seeds."""
    *students, mean = presentation.differences(study.analyse())
    assert ["Mean over students" in mean.caption, *(name in own.caption for name, own in zip(
        ("L3-H384", "L3-H192"), students, strict=True))] == [True] * 3  # fmt: skip
    assert all("Holm over the 3 pairs of this table" in own.caption for own in (*students, mean))
    table = mean.data
    names = ["HS: uniform+last", "MLM: no teacher", "none: as initialised"]
    assert table["row less column"].tolist() == names
    assert table.iloc[0, 1:].tolist() == ["–", "+1.0", "+2.0"] and table.iloc[2, 1:].tolist() == ["−2.0", "−1.0", "–"]


def test_pages_have_titles_languages_and_alternative_texts(pages):
    titles = {page.text.strip().splitlines()[0] for page in pages.values()}
    assert len(titles) == len(pages)
    for name, page in pages.items():
        assert page.named("title") and page.named("html") == [{"lang": "en"}]
        assert any(meta.get("name") == "viewport" for meta in page.named("meta"))
        assert page.named("img") or name == "ablations_english.html"  # no variant among three methods
        assert all(len(image["alt"]) > 20 for image in page.named("img"))


def test_tables_have_no_index_and_no_missing_numbers(pages):
    for page in pages.values():
        assert not re.search(r"\b(nan|NaN|None)\b", page.text)
        assert not [attributes for attributes in page.named("th") if "row_heading" in (attributes.get("class") or "")]
        names = [attributes["id"] for attributes in page.named("table")]
        assert len(set(names)) == len(names)  # by which each has its looks


def test_scores_per_language_are_shown_where_there_are_several(tmp_path):
    made = make_study(tmp_path, ["none", "mlm"])
    add_languages(write_grid(made))
    topic, retrieval = presentation.languages(several_languages(made).analyse())
    scores = ["en", "es", "fr", "mean", "mean without English", "gap"]
    assert list(topic.data.columns) == ["student", "method", *scores]
    # 0.82 for the teacher in English, 0.1 less in Spanish, twice that in French
    assert topic.data.loc[0].tolist() == ["teacher", "–", "82.0", "72.0", "62.0", "72.0", "67.0", "15.0"]
    assert list(retrieval.data.columns) == ["student", "method", "es", "hi", "mean"]  # no English, no gap
    assert presentation.languages(made.analyse())[0].data.shape[0] == topic.data.shape[0]
    narrow = several_languages(made).analyse()
    vars(narrow)["per_language"] = narrow.per_language.drop(columns="hi")  # of retrieval Spanish alone is left
    assert len(presentation.languages(narrow)) == 1


def test_the_report_is_byte_stable_and_small(study, pages, monkeypatch):
    monkeypatch.setenv("PYTHONPATH", str(REPOSITORY), prepend=os.pathsep)
    monkeypatch.chdir(study.plan.root)
    folder = study.plan.root / "reports" / "html"
    before = {path.name: path.read_bytes() for path in folder.iterdir()}
    notebook = executed(study.plan.root, "comparison")
    whole = notebook.read_text()
    again = nbformat.reads(whole, as_version=4)
    for cell in again.cells:
        if "injected-parameters" in cell.metadata.get("tags", []):
            cell.id = "another"  # as after another execution
    nbformat.write(again, notebook)
    write_report(study.plan)
    notebook.write_text(whole)
    assert {path.name: path.read_bytes() for path in folder.iterdir()} == before
    assert all(len(content) < 250_000 for content in before.values())


def test_what_is_missing_is_named(tmp_path):
    made = make_study(tmp_path, ["none", "mlm"])
    write_grid(made)
    with pytest.raises(StudyError) as error:
        write_report(made.plan)
    for name in (
        "analyses/comparison_english.ipynb",
        "comparison/english/per_task.png",
        "comparison/english/costs.csv",
        "comparison/english/verdicts.csv",
        "comparison/english/headline.json",
    ):
        assert name in str(error.value)


def test_a_damaged_notebook_is_named(study, pages, monkeypatch):
    monkeypatch.setenv("PYTHONPATH", str(REPOSITORY), prepend=os.pathsep)
    monkeypatch.chdir(study.plan.root)
    notebook = executed(study.plan.root, "comparison")
    whole = notebook.read_text()
    try:
        notebook.write_text(whole[:300])
        with pytest.raises(StudyError, match=r"comparison_english\.ipynb: not a notebook"):
            write_report(study.plan)
    finally:
        notebook.write_text(whole)


def test_formulas_are_drawn_by_the_browser(pages):
    """Pages work offline: nothing renders formulas but MathML."""
    for name in ("comparison_english.html", "ablations_english.html", "representations_english.html"):
        assert pages[name].named("math") and not re.search(r"\$|\\\w|formula\d", pages[name].text), name
    text = words_of(pages["comparison_english.html"])
    assert "macro=1K∑k=1Ksk," in text and "kept=macro of the studentmacro of the teacher." in text


def test_analyses_lead_to_those_before_and_after(pages):
    links = [a["href"] for a in pages["ablations_english.html"].named("a") if "href" in a]
    assert {"comparison_english.html", "representations_english.html"} <= {*links[len(pages) :]}
    links = [a["href"] for a in pages["comparison_english.html"].named("a") if "href" in a]
    assert "../../notebooks/47_represent.ipynb" in links  # nobody executed it
