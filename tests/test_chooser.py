"""The page to choose on: what a browser shows of it, offline, is what the tables say."""

from __future__ import annotations

import base64
import json
import re
import shutil
import subprocess
from dataclasses import replace
from pathlib import Path

import pytest
from constructed_results import (
    METRICS,
    SPLITS,
    add_languages,
    latency_result,
    make_study,
    run_result,
    several_languages,
    write,
    write_grid,
)
from ruamel.yaml import YAML

from study import resolve
from study.analysis.chooser import _task_names, budgets_data, write_chooser
from study.analysis.figures.style import label
from study.analysis.numbers.analysis import analyse
from study.analysis.numbers.budgets import all_closed, load_budgets, table
from study.analysis.numbers.statistics import difference, estimate, of_method, replicates
from study.descriptions import Comparison
from study.params import read_yaml

BROWSER = shutil.which("chromium") or shutil.which("chromium-browser") or shutil.which("google-chrome")
STUDENTS = ("L3-H384", "L3-H192")
TEST = {"none": (0.50, 0.40), "mlm": (0.46, 0.52), "od": (0.60, 0.55)}
DEVELOPMENT = {"none": (0.50, 0.40), "mlm": (0.70, 0.50), "od": (0.60, 0.60)}


def page(root: Path, seeds: tuple[int, ...]):
    """A study with scores that differ by task, fine-tuning and distillation seed, and its page."""
    made = make_study(root, list(TEST), STUDENTS, seeds)
    made.layout.results.mkdir(parents=True)
    write(made.layout.results / "teacher.json", run_result("teacher", "teacher", 0, 0.8))
    write(made.layout.results / "latency.json", latency_result(STUDENTS))
    write(made.layout.results / "tasks.json", SPLITS)
    for place, method in enumerate(TEST):
        for student, test, development in zip(STUDENTS, TEST[method], DEVELOPMENT[method], strict=True):
            for seed in seeds:
                result = run_result(method, student, seed, test + 0.004 * ((place + 2 * seed) % 3), development)
                for number, task in enumerate(result["tasks"].values()):
                    for run in task["runs"]:
                        run["test"][task["metric"]] += 0.002 * ((number + place + run["seed"]) % 3)
                if method == "od":
                    result["tasks"]["sts-b"]["runs"][0]["test"]["spearman"] -= 0.2
                write(made.layout.results / f"{method}_{student}_{seed}.json", result)
    analysis = made.analyse()
    return analysis, write_chooser(made.plan, [analysis], root / "explore.html", {"": {"index.html": "report"}})


def several_budgets(root: Path):
    """Two methods that change places with more tokens: three seeds at two budgets, one at the largest."""
    made = make_study(root, ["none", "mlm", "od"], ["L3-H192"], (1, 2, 3))
    values = read_yaml(root / "params.yaml")
    values["budgets"] = {"large": {"steps": 500}, "huge": {"steps": 1000, "seeds": [1]}}
    values["grid"] |= {"budgets": {"english": ["large", "huge"]}, "analyses": ["budgets"]}
    YAML(typ="safe").dump(values, root / "params.yaml")
    made.layout.results.mkdir(parents=True)
    write(made.layout.results / "teacher.json", run_result("teacher", "teacher", 0, 0.8))
    scores = {"none": (0.4,), "mlm": (0.5, 0.6, 0.65), "od": (0.45, 0.65, 0.7)}
    for method, of_budgets in scores.items():
        for budget, score in zip(("base", "large", "huge"), of_budgets, strict=False):
            for seed in (1,) if budget == "huge" else (1, 2, 3):
                result = run_result(method, "L3-H192", seed, score + (0.01 * seed**2 if method != "none" else 0))
                if result["distillation"]:
                    steps = {"base": 100, "large": 500, "huge": 1000}[budget]
                    result["distillation"]["curve"][-1]["tokens"] = 2000 * steps
                name = f"{method}_L3-H192_{seed}" + (f"_{budget}" if budget != "base" else "")
                write(made.layout.results / f"{name}.json", result | {"budget": budget})
    plan = resolve(root=root)
    (comparison,) = plan.of(Comparison)
    return load_budgets(comparison, plan.layout("english")), plan.layout("english"), plan


DRIVER = """
<script>
const seen = STEPS.map(step => {
  for (const [selector, value] of step) {
    const control = document.querySelector(selector);
    if (value === "click") control.click();
    else { control.value = value; control.dispatchEvent(new Event("change")); }
  }
  const rows = [...document.querySelectorAll(".row")].map(row => ({ ...row.dataset, text: row.textContent }));
  const lines = [...document.querySelectorAll("#numbers tr")];
  const numbers = lines.map(line => [...line.cells].map(cell => cell.textContent));
  const silent = byId("silent").textContent;
  const detail = byId("detail").innerHTML;
  return { rows, numbers, silent, detail, controls: byId("controls").innerHTML, hash: location.hash };
});
const said = document.createElement("pre");
said.id = "seen";
said.textContent = btoa(JSON.stringify(seen).replace(/[^\\x00-\\x7f]/g, "?"));
document.body.append(said);
</script>
"""


def driven(path: Path, *steps: dict[str, str]) -> list[dict]:
    """What a browser shows after each step: selector of a control -> its new value, or "click"."""
    if BROWSER is None:
        pytest.skip("no chromium here: the page's script cannot be run")
    copy = path.with_name("driven.html")
    copy.write_text(path.read_text() + DRIVER.replace("STEPS", json.dumps([list(step.items()) for step in steps])))
    command = [BROWSER, "--headless", "--no-sandbox", "--disable-gpu", f"--user-data-dir={path.parent / 'browser'}"]
    done = subprocess.run(
        [*command, "--dump-dom", copy.as_uri()], capture_output=True, text=True, timeout=60, check=True
    )
    return json.loads(base64.b64decode(re.search(r'<pre id="seen">([^<]*)</pre>', done.stdout)[1]))


def chosen(key: str) -> str:
    return f'[data-key="{key}"]'


@pytest.mark.parametrize("seeds", [(1,), (1, 2, 3)])
def test_shares_intervals_floors_and_regrets_are_those_of_the_tables(tmp_path, seeds):
    analysis, path = page(tmp_path, seeds)
    table = analysis.summary.set_index(["method", "student"])
    rules = ("development", "oracle")
    start, every, *picks = (
        seen["rows"] for seen in driven(path, {}, *({chosen("rule"): rule} for rule in ("all", *rules)))
    )
    assert {row["model"] for row in start} == {"mlm_L3-H384", "od_L3-H192"}
    shares = [float(row["kept"]) for row in every]
    assert len(shares) == 4 and shares == sorted(shares, reverse=True)
    for row in every:
        method, student = row["model"].split("_")
        expected = table.loc[(method, student)]
        for key, column in (("kept", "retained"), ("low", "retained_low"), ("high", "retained_high")):
            assert float(row[key]) == pytest.approx(100 * expected[column], abs=0.0501), (row["model"], key)
        assert float(row["floor"]) == pytest.approx(100 * table.loc[("none", student), "retained"], abs=0.0501)
        doubted = "not shown to be beaten" in row["text"]
        pair = (of_method(analysis.scores, name, student) for name in (method, "none"))
        assert doubted == (not estimate(replicates(difference(*pair))).interval()[0] > 0)
    assert {True, False} == {"not shown to be beaten" in row["text"] for row in every}
    for rule, rows in zip(rules, picks, strict=True):
        picked = analysis.selection[analysis.selection["rule"] == rule]
        regrets = {f"{r.method}_{r.student}": r.regret for r in picked.itertuples()}
        assert {row["model"]: float(row["regret"]) for row in rows} == pytest.approx(regrets, abs=0.0501)


def test_choices_change_the_ranking_and_a_click_leads_to_command_and_path(tmp_path):
    _, path = page(tmp_path, (1,))
    fast, alone, clicked, nothing = driven(
        path,
        {chosen("rule"): "all", chosen("budget"): "5"},  # of 10 and 5 ms
        {chosen(f"task.{task}"): "0" for task in METRICS if task != "sts-b"},
        {'[data-model="mlm_L3-H192"]': "click"},
        {chosen("rule"): "all", chosen("task.sts-b"): "0"},
    )
    assert [row["model"] for row in fast["rows"]] == ["od_L3-H192", "mlm_L3-H192"]
    assert [row["model"] for row in alone["rows"]] == ["mlm_L3-H192", "od_L3-H192"]  # OD is bad at sts-b
    assert (
        "make plan &amp;&amp; . .venv/bin/activate &amp;&amp; dvc repro distill@english_mlm_L3-H192_1</code>"
        in clicked["detail"]
    )
    assert ">runs/english/students/mlm_L3-H192_1<" in clicked["detail"] and "<polyline" in clicked["detail"]
    assert 'data-task="sts-b" data-language="en"' in clicked["detail"]
    assert "model=mlm_L3-H192" in clicked["hash"]
    assert nothing["rows"] == []
    rules = re.findall(r'<option value="(\w+)"', driven(path, {"body": "click"})[0]["controls"].split('"rule"')[1])
    assert rules[:3] == ["development", "oracle", "all"]  # retrieval was not run: nothing to go by, so not offered


def test_the_rule_in_use_is_shown_first(tmp_path):
    """Development scores prefer OD; MLM finds more of the development data's translations."""
    made = make_study(tmp_path, ["none", "mlm", "od"], STUDENTS)
    scores = {(m, student): score for m, score in (("none", 0.4), ("mlm", 0.5), ("od", 0.6)) for student in STUDENTS}
    add_languages(write_grid(made, scores), found={"none": 0.9, "mlm": 0.5, "od": 0.4})
    pages = {"": {"index.html": "report"}}
    path = write_chooser(made.plan, [several_languages(made).analyse()], tmp_path / "explore.html", pages)
    first, development = driven(path, {}, {chosen("rule"): "development"})
    assert {row["model"] for row in first["rows"]} == {f"mlm_{student}" for student in STUDENTS}
    assert {row["model"] for row in development["rows"]} == {f"od_{student}" for student in STUDENTS}
    assert all(float(row["regret"]) > 0 for row in first["rows"])
    assert "retrieval of translations</option>" in first["controls"]


def test_budgets_of_tokens_have_rankings_and_curves_of_their_own(tmp_path):
    """Shares and intervals at each budget are those of the budgets' own table; the largest with most seeds is first."""
    budgets, layout, plan = several_budgets(tmp_path)
    closed = all_closed(budgets)
    gap = table(budgets, closed).query("group == 'all'").set_index(["budget", "method"])
    path = write_chooser(plan, [budgets], tmp_path / "explore.html", {"": {"index.html": "report"}})
    every, least, clicked, most = driven(
        path,
        {},  # one student: every method is shown until a rule is asked for
        {chosen("tokens"): "base"},
        {'[data-model="od_L3-H192"]': "click"},
        {chosen("tokens"): "huge"},
    )
    for budget, seen in (("large", every), ("base", least), ("huge", most)):
        own = gap.loc[budget]
        assert [row["model"] for row in seen["rows"]] == [f"{m}_L3-H192" for m in own["rank"].sort_values().index]
        for row in seen["rows"]:
            expected = own.loc[row["model"].split("_")[0]]
            assert float(row["kept"]) == pytest.approx(expected["retained"], abs=0.0501)
            # the method's own chance: of the gap it spans as much as of the teacher, by the ratio of the two
            spans = estimate(replicates(100 * closed["all", budget][row["model"].split("_")[0]])).interval()
            width = (spans[1] - spans[0]) * (0.8 - 0.4) / 0.8
            low, high = (float(row[key].replace("–", "nan")) for key in ("low", "high"))
            assert high - low == pytest.approx(width, abs=0.11, nan_ok=True)
    assert every["rows"][0]["model"] != least["rows"][0]["model"]
    assert "tokens" in least["rows"][0]["text"] and "ms a sequence" not in least["rows"][0]["text"]
    assert "distill@english_od_L3-H192_1<" in clicked["detail"] and "over 0.20 million tokens" in clicked["detail"]
    assert "distill@english_od_L3-H192_1_huge<" in most["detail"] and "over 2.00 million tokens" in most["detail"]


def test_development_scores_choose_where_a_task_has_none(tmp_path):
    """Of retrieval there are no development data: the mean is over the other tasks."""
    budgets, layout, _ = several_budgets(tmp_path)
    scores = budgets.scores.copy()
    scores.loc[scores["task"] == scores["task"].iloc[0], "development"] = float("nan")
    models = budgets_data(replace(budgets, scores=scores), layout)["models"]
    trained = [model for model in models if "signals" in model]
    assert trained and all(set(model["signals"]) == {"development", "oracle"} for model in trained)


def test_a_start_that_is_not_trained_is_ranked_and_has_no_curve(tmp_path):
    budgets, layout, _ = several_budgets(tmp_path)
    pruned = replace(budgets, training=budgets.training.query("method != 'od'"))
    curves = {model["method"]: model["curve"] for model in budgets_data(pruned, layout)["models"] if "signals" in model}
    assert curves["od"] == [] and curves["mlm"]


def test_every_number_is_in_a_table_that_a_click_sorts(tmp_path):
    analysis, path = page(tmp_path, (1, 2, 3))
    head = '#numbers [data-column="{}"]'.format
    first, rising, falling, lone = driven(
        path,
        {chosen("budget"): "5"},  # rules and times that choose leave the table as it is
        {head("STS-B"): "click"},
        {head("STS-B"): "click"},
        {chosen(f"task.{task}"): "0" for task in METRICS if task != "sts-b"},
    )
    columns, *lines = first["numbers"]
    assert columns == ["method", "student", "kept", "low", "high", "floor", "regret"] + [
        {"sts-b": "STS-B", "boolq": "BoolQ", "privacy-qa": "privacy questions"}.get(task, task) for task in METRICS
    ]
    table = analysis.per_task.set_index(["method", "student"])
    assert {tuple(line[:2]) for line in lines} == {(label(m), s) for m in ("mlm", "od") for s in STUDENTS}
    for method, student in ((m, s) for m in ("mlm", "od") for s in STUDENTS):
        (line,) = [line for line in lines if line[:2] == [label(method), student]]
        known = table.loc[(method, student)]
        for value, column in zip(line[2:5], ("retained", "retained_low", "retained_high"), strict=True):
            assert float(value) == pytest.approx(100 * known[column], abs=0.0501)
        for value, task in zip(line[7:], METRICS, strict=True):
            assert float(value) == pytest.approx(100 * known[task], abs=0.0501)
    assert [line[2] for line in lines] == sorted((line[2] for line in lines), key=float, reverse=True)
    place = columns.index("STS-B")
    scores = [[float(line[place]) for line in seen["numbers"][1:]] for seen in (rising, falling)]
    assert scores[0] == sorted(scores[0]) and scores[1] == scores[0][::-1] and len({*scores[0]}) > 1
    assert lone["numbers"][0][7:] == ["STS-B"]


def test_languages_count_by_their_weights(tmp_path):
    """The table's score of a task is the mean over languages, each as often as its weight says."""
    made = make_study(tmp_path, ["none", "mlm"], ("L3-H192",))
    written = write_grid(made, {("none", "L3-H192"): 0.4, ("mlm", "L3-H192"): 0.5})
    add_languages(written, found={"none": 0.9, "mlm": 0.5})
    path = write_chooser(made.plan, [several_languages(made).analyse()], tmp_path / "explore.html", {"": {}})
    (data,) = json.loads(re.search(r'id="data">(.*?)</script>', path.read_text())[1])["settings"]
    (mlm,) = [model for model in data["models"] if model["method"] == "mlm"]
    task, scores = next((task, own) for task, own in mlm["scores"].items() if len(own) > 1)
    means = {language: sum(map(sum, own)) / sum(map(len, own)) for language, own in scores.items()}
    first, second, *others = means
    assert means[first] != means[second]
    weights = {chosen(f"language.{first}"): "3"} | {chosen(f"language.{name}"): "0" for name in others}
    head, line = driven(path, weights)[0]["numbers"]
    named = dict(zip(head, line, strict=True))
    assert float(named[data["tasks"][task]]) == pytest.approx(25 * (3 * means[first] + means[second]), abs=0.0501)


def test_tasks_that_would_be_called_the_same_keep_their_names():
    scored = {"topic-multilingual": {}, "topic": {}, "bigram-shift-multilingual": {}}
    assert _task_names([{"scores": scored}]) == {
        "topic-multilingual": "topic-multilingual",
        "topic": "topic",
        "bigram-shift-multilingual": "bigram shift",
    }


def test_what_an_address_asks_for_in_vain_falls_back(tmp_path):
    """Weights that are no numbers count nothing, too large ones as much as the largest; sorting is by what is kept."""
    budgets, _, plan = several_budgets(tmp_path)
    path = write_chooser(plan, [budgets], tmp_path / "explore.html", {"": {"index.html": "report"}})
    tasks = list(json.loads(re.search(r'id="data">(.*?)</script>', path.read_text())[1])["settings"][0]["tasks"])

    def asked(**wanted: str) -> dict:
        address = f"new URLSearchParams({json.dumps(wanted)})"
        page = path.read_text().replace("new URLSearchParams(location.hash.slice(1))", address)
        (path.parent / "asked.html").write_text(page)
        return driven(path.parent / "asked.html", {"body": "click"})[0]

    plain = asked()
    large = {f"task.{task}": "Infinity" for task in tasks}
    for wanted in ({"tokens": "zzz"}, {"sort": "unknown"}, {"rule": "none"}, large):
        seen = asked(**wanted)
        assert seen["numbers"] == plain["numbers"] and len(seen["rows"]) == len(plain["rows"]) > 1
    assert asked(**{f"task.{task}": "-3" for task in tasks})["rows"] == []


def test_a_task_in_no_language_of_weight_is_named(tmp_path):
    made = make_study(tmp_path, ["none", "mlm"], ("L3-H192",))
    add_languages(write_grid(made, {("none", "L3-H192"): 0.4, ("mlm", "L3-H192"): 0.5}))
    path = write_chooser(made.plan, [several_languages(made).analyse()], tmp_path / "explore.html", {"": {}})
    every, without = driven(path, {"body": "click"}, {chosen("language.en"): "0"})
    (data,) = json.loads(re.search(r'id="data">(.*?)</script>', path.read_text())[1])["settings"]
    (teacher,) = [model for model in data["models"] if model["method"] == "teacher"]
    english = [data["tasks"][task] for task, scores in teacher["scores"].items() if set(scores) == {"en"}]
    assert english and every["silent"] == ""
    assert without["silent"] == f"Not counted: {', '.join(english)}, in no language of weight."
    assert not {*english} & {*without["numbers"][0]}


def test_time_in_every_runtime_stands_beside_a_student_that_was_timed(tmp_path):
    _, path = page(tmp_path, (1,))
    every = {chosen("rule"): "all"}
    assert "on one thread" not in driven(path, every | {'[data-model="mlm_L3-H192"]': "click"})[0]["detail"]
    made = resolve(root=tmp_path)
    timings = made.layout("english").analysis("runtimes") / "timings.csv"
    timings.parent.mkdir(parents=True)
    timings.write_text(
        "model,runtime,input,batch_size,threads,p50\n"
        "teacher,eager,texts,1,1,9\nL3-H192,eager,texts,1,1,3\nL3-H192,eager,texts,8,1,20\nL3-H192,eager,128,1,1,4\n"
        "teacher,onnx-int8,texts,1,1,2.5\nL3-H192,onnx-int8,texts,1,1,1.25\nL3-H192,compiled,texts,1,1,2\n"
    )
    (comparison,) = made.of(Comparison)
    analysis = analyse(comparison, made.layout("english"))
    path = write_chooser(made, [analysis], path, {"": {"index.html": "report"}})
    clicked, other = driven(
        path, every | {'[data-model="mlm_L3-H192"]': "click"}, {'[data-model="mlm_L3-H384"]': "click"}
    )
    assert "on one thread: PyTorch 3.0 (teacher 9.0); ONNX Runtime, int8 1.3 (teacher 2.5).<" in clicked["detail"]
    assert "on one thread" not in other["detail"]


def test_the_page_is_small_loads_nothing_and_is_the_same_from_the_same_results(tmp_path):
    analysis, path = page(tmp_path, (1,))
    made = resolve(root=tmp_path)
    first = path.read_bytes()
    path.unlink()
    write_chooser(made, [analysis], path, {"": {"index.html": "report"}})
    assert path.read_bytes() == first and len(first) < 250_000
    text = first.decode()
    assert not re.search(r"https?://|\burl\(|@import|fetch\(|XMLHttpRequest|<link|<script[^>]*src", text)
    (picture,) = re.findall(r'<noscript>.*?<img src="([^"]*)"', text, re.S)
    assert picture == "reports/comparison/english/quality_latency.png"
