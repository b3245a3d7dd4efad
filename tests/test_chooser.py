"""The page explore.html in a real browser: opens from a file, loads nothing, ranks as the tables do, and filters."""

from __future__ import annotations

import json
import re
import shutil
import subprocess

import jinja2
import pandas as pd
import pytest
from constructed_results import Study, add_languages, make_study, several_languages, write, write_grid

from study import StudyError
from study.analysis import chooser
from study.analysis.chooser import choices, explorer
from study.analysis.report import EXPLORER, TEMPLATE
from study.descriptions import BudgetCells

BROWSER = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), None)
#: After the page's own script: each step is set and the ranking read; then what was loaded is listed.
SCRIPT = """<script>
const set = (id, value) => { const input = document.getElementById(id) || document.getElementsByName(id)[0];
  input.value = value; input.dispatchEvent(new Event("input", { bubbles: true })); };
const read = () => [...document.querySelectorAll("#ranking tbody tr")].map((row) => [row.dataset.model,
  ...[...row.cells].slice(3, 6).map((cell) => cell.textContent)]);
const seen = [read()];
for (const [id, value] of STEPS) { set(id, value); seen.push(document.getElementById("ranking").hidden ? [] : read()); }
document.querySelector("#ranking tbody tr")?.click();
const loaded = performance.getEntriesByType("resource").map((entry) => entry.name);
const one = document.getElementById("one");
document.body.replaceChildren(Object.assign(document.createElement("pre"), { id: "seen",
  textContent: JSON.stringify({ seen, loaded, one: one.innerText, address: location.href }) }));
</script>"""


def page_of(study: Study) -> str:
    """explore.html of a study, as the report has it."""
    template = jinja2.Environment(autoescape=True, trim_blocks=True).from_string(TEMPLATE.read_text())
    content = explorer(EXPLORER.read_text(), study.plan)
    return template.render(title="Choose", content=content, pages={"explore.html": "choose"}, here="explore.html")


def visit(page: str, folder, steps=()) -> dict:
    """The ranking before and after each step, what was loaded, and what stood below the ranking after a click."""
    if BROWSER is None:
        pytest.skip("no chromium here")
    path = folder / "explore.html"
    path.write_text(page.replace("</body>", SCRIPT.replace("STEPS", json.dumps(steps)) + "</body>"))
    options = ["--headless", "--no-sandbox", "--disable-gpu", f"--user-data-dir={folder / 'browser'}", "--dump-dom"]
    shown = subprocess.run([BROWSER, *options, path.as_uri()], capture_output=True, text=True, timeout=120).stdout
    (seen,) = re.findall(r'<pre id="seen">(.*?)</pre>', shown, re.DOTALL)
    return json.loads(seen.replace("&lt;", "<").replace("&gt;", ">").replace("&amp;", "&"))


def numbers(text: str) -> list[float]:
    return [float(number) for number in re.findall(r"[\d.]+", text.replace("\u2212", "-"))]


def test_the_ranking_is_that_of_the_tables_and_filters_change_it(tmp_path):
    """Three seeds, so that intervals cover distillation; latencies are 10 ms of L3-H384 and 5 ms of L3-H192."""
    made = make_study(tmp_path, ["none", "mlm", "hs-uniform+last"], seeds=(1, 2, 3))
    folder = write_grid(made)
    for place, path in enumerate(sorted(folder.glob("*_[123].json"))):  # seeds and tasks differ
        content = json.loads(path.read_text())
        for task, by in (("topic", 0.1 if "mlm_L3-H192" in path.name else 0.004), ("boolq", -0.003)):
            for run in content["tasks"][task]["runs"]:
                run["test"] = {name: score + by * (place * 7 % 5) for name, score in run["test"].items()}
        write(path, content)
    table = made.analyse().per_task.set_index(["student", "method"])
    steps = [["latency", 6], ["latency", 1], ["latency", 20], ["task.topic", 0]]
    outcome = visit(page_of(made), tmp_path, steps)
    assert [name for name in outcome["loaded"] if not name.startswith(("file:", "data:"))] == []
    everything, fast, none, again, boolq = outcome["seen"]
    expected = table.drop("teacher", level="method").sort_values("macro", ascending=False, kind="stable")
    assert [row[0] for row in everything] == [f"{method}_{student}_1" for student, method in expected.index]
    floors = expected.xs("none", level="method")["retained"]
    for (_, kept, floor, score), (model, row) in zip(everything, expected.iterrows(), strict=True):
        assert numbers(floor) == [pytest.approx(100 * floors[model[0]], abs=0.051)]
        bounds = [100 * row[key] for key in ("retained", "retained_low", "retained_high")]
        assert numbers(kept) == pytest.approx(bounds, abs=0.051)
        assert numbers(score) == pytest.approx([100 * row["macro"]], abs=0.0051)
    assert fast == [row for row in everything if "L3-H192" in row[0]] and 0 < len(fast) < len(everything)
    assert none == [] and again == everything
    others = [task for task in made.comparison.tasks if task != "topic"]
    means = expected[others].mean(axis=1)
    assert [numbers(row[3])[0] for row in boolq] == pytest.approx(sorted(100 * means, reverse=True), abs=0.0051)
    assert [row[0] for row in boolq] != [row[0] for row in everything]
    assert f"runs/english/students/{boolq[0][0]}" in outcome["one"]
    assert f"dvc repro distill@english_{boolq[0][0]}" in outcome["one"] and "task.topic=0" in outcome["address"]


def test_one_seed_has_the_intervals_of_fine_tuning_and_languages_are_weighed(tmp_path):
    made = make_study(tmp_path, ["none", "mlm"])
    folder = write_grid(made)
    add_languages(folder)
    for path in folder.glob("mlm_*.json"):  # better than no training in French alone
        content = json.loads(path.read_text())
        for run in content["tasks"]["topic"]["runs"]:
            run["languages"]["fr"] = {name: 0.9 for name in run["languages"]["fr"]}
            run["test"] = {name: 0.3 + run["seed"] / 100 for name in run["test"]}
        write(path, content)
    expected = made.analyse().per_task.set_index(["student", "method"]).drop("teacher", level="method")
    both, french = visit(page_of(made), tmp_path, [["language.en", 0]])["seen"]
    for name, kept, _, _ in both:
        method, student, _ = name.split("_")
        row = expected.loc[(student, method)]
        bounds = [100 * row[key] for key in ("retained", "retained_low", "retained_high")]
        assert numbers(kept) == pytest.approx([bound for bound in bounds if pd.notna(bound)], abs=0.051)
    assert [row[0] for row in both] != [row[0] for row in french]


def test_the_data_hold_every_language_probe_and_budget(tmp_path):
    made = make_study(tmp_path, ["none", "mlm"])
    folder = write_grid(made)
    add_languages(folder)
    made = several_languages(made)
    data = choices(made.analyse(), made.layout)
    assert data["tasks"]["retrieval"]["probe"] and not data["tasks"]["topic"]["probe"]
    assert data["languages"] == ["en", "es", "fr", "hi"] and data["timed"] == "batch of 1, 128 tokens, 1 thread"
    (topic,) = data["teacher"]["scores"]["topic"]["en"]
    assert topic == pytest.approx([0.82, 0.82], abs=0.03) and sum(topic) / 2 == pytest.approx(0.82)
    assert {model["names"][0] for model in data["models"] if model["method"] == "mlm"} >= {"mlm_L3-H384_1"}
    assert sum(model["chosen"] for model in data["models"]) == len(data["students"])


def test_other_budgets_have_students_of_their_own(tmp_path):
    made = make_study(tmp_path, ["none", "mlm"], ("L3-H384",))
    folder = write_grid(made)
    content = json.loads((folder / "mlm_L3-H384_1.json").read_text()) | {"budget": "large"}
    for run in content["tasks"]["topic"]["runs"]:
        run["test"] = {name: 0.125 for name in run["test"]}
    write(folder / "mlm_L3-H384_1_large.json", content)
    cells = BudgetCells(tokens=3_000_000, methods=["mlm"], seeds=[1])
    made = made._replace(comparison=made.comparison.model_copy(update={"budgets": {"large": cells}}))
    data = choices(made.analyse(), made.layout)
    assert data["budgets"] == {"base": made.comparison.tokens, "large": 3_000_000}
    (large,) = (model for model in data["models"] if model["budget"] == "large")
    assert large["names"] == ["mlm_L3-H384_1_large"] and set(large["scores"]["topic"]["en"][0]) == {0.125}
    assert not large["chosen"]
    write(folder / "mlm_L3-H384_1_large.json", content | {"budget": "base"})
    with pytest.raises(StudyError, match="budget = 'base'; at this place allowed: 'large'"):
        choices(made.analyse(), made.layout)


def test_names_close_no_tag_and_the_same_results_give_the_same_bytes(tmp_path, monkeypatch):
    made = make_study(tmp_path, ["none", "mlm"])
    write_grid(made)
    page = page_of(made)
    assert page == page_of(made)
    assert not re.search(r"""(src|href)=["'](\w+:)?//""", page) and "@import" not in page
    monkeypatch.setattr(chooser, "choices", lambda *_: {"teacher": "</script><b>"})
    assert page_of(made).count("</script>") == page.count("</script>")


def test_a_missing_result_is_named(tmp_path):
    made = make_study(tmp_path, ["none", "mlm"])
    folder = write_grid(made)
    (folder / "mlm_L3-H384_1.json").unlink()
    with pytest.raises(StudyError, match="mlm_L3-H384_1"):
        page_of(made)
