"""Systems beside the grid: what is run and kept, the result file, verdicts by hand, the page, and the plan."""

from __future__ import annotations

import json
import re
import shutil
from dataclasses import replace
from pathlib import Path

import pytest
import tiny
from constructed_results import HEAD, make_study, write_grid
from pydantic import ValidationError
from ruamel.yaml import YAML
from test_report import REPOSITORY, Page, executed

from study import StudyError, resolve
from study.analysis.figures import neighbours as figures
from study.analysis.numbers.neighbours import arms, called, load_neighbours, verdicts
from study.analysis.numbers.overview import ASKED_FOR, READ, SYSTEMS, overview
from study.analysis.report import write_report
from study.data import storage
from study.descriptions import Comparison, Neighbours, NeighbourSystem
from study.distillation.objectives import OBJECTIVES
from study.execution import run_notebook
from study.files import write_file
from study.neighbours.prequant import PREQUANT
from study.neighbours.system import run_system
from study.neighbours_options import NOTEBOOKS
from study.params import load_params, read_yaml
from study.plan import write_plan
from study.records import read_record, write_record
from study.records_beside import NeighbourResult

OPTIONS = {"system": "prequant", "seeds": [1, 2, 3], "bits": [4, 2], "compared_bits": 4, "scalings": ["row"]}
OPTIONS |= {"tuned": ["outliers", "random"], "share": 0.01, "finetuned": False, "learning_rates": {"outliers": 0.005}}
#: Differences of seeds 0.02, 0.04, 0.03: mean 0.03, standard deviation 0.01, t(2, 97.5 %) = 4.302653.
VALUES = {"own": [0.82, 0.85, 0.81], "other": [0.80, 0.81, 0.78]}
HALF = 4.302653 * 0.01 / 3**0.5


def result(claims=(("own", "other", "above"),), values=VALUES, **changes) -> NeighbourResult:
    checks = [{"claim": f"{a} {sign} {b}", "first": a, "second": b, "measure": "score", "sign": sign}
              for a, b, sign in claims]  # fmt: skip
    rows = [{"name": name, "words": f"arm {name}", "values": {"score": own}} for name, own in values.items()]
    told = {
        "neighbour": "prequant",
        "system": "prequant",
        "title": "PreQuant: quantise",
        "source": "arXiv 1",
        "standing": "our reading",
    }
    told |= {"equation": "x", "reproduced": "All.", "unknown": ["much"], "model": "teacher", "options": {}}
    told |= {"revisions": {}, "seeds": [1, 2, 3], "measures": {"score": "macro score"}, "seconds": 60.0}
    return NeighbourResult.model_validate(HEAD | told | {"arms": rows, "checks": checks} | changes)


@pytest.mark.fast
def test_what_every_objective_reads_of_the_teacher_has_words():
    assert OBJECTIVES.keys() <= READ.keys()


@pytest.mark.fast
def test_verdicts_by_hand():
    shown = verdicts(result((("own", "other", "above"), ("own", "other", "below"), ("other", "own", "below"))))
    assert shown["verdict"].tolist() == ["supported", "contradicted", "supported"]
    first = shown.iloc[0]
    assert [first["difference"], first["low"], first["high"]] == pytest.approx([0.03, 0.03 - HALF, 0.03 + HALF])
    wide = VALUES | {"other": [0.80, 0.86, 0.78]}  # differences 0.02, -0.01, 0.03
    assert verdicts(result(values=wide))["verdict"].tolist() == ["undecided"]
    two = {name: own[:2] for name, own in VALUES.items()}
    assert verdicts(result(values=two, seeds=[1, 2]))["verdict"].tolist() == ["not judged"]


@pytest.mark.fast
def test_systems_have_the_names_of_their_sources():
    assert called(result()) == "PreQuant" and called(result(neighbour="prequant-student")) == "PreQuant (student)"
    assert called(result(neighbour="mine")) == "PreQuant (mine)"
    told = figures.about(result()).data
    assert told.startswith("**PreQuant**: quantise, arXiv 1.")


@pytest.mark.fast
def test_of_arms_and_measures_the_fewer_are_columns():
    rows = figures.arms_table(result()).data
    assert list(rows.columns) == ["arm", "macro score"] and list(rows["arm"]) == ["arm own", "arm other"]
    many = {f"m{n}": [n, n, n + 1] for n in range(4)}
    arms = [{"name": name, "words": f"arm {name}", "values": many} for name in ("own", "other")]
    rows = figures.arms_table(result(arms=arms, claims=(), measures={name: name for name in many})).data
    assert list(rows.columns) == ["measure", "arm own", "arm other"] and list(rows["measure"]) == [
        "m0",
        "m1",
        "m2",
        "m3",
    ]


@pytest.mark.fast
def test_arms_have_students_intervals_and_one_seed_has_none():
    row = arms(result()).iloc[1]
    spread = 4.302653 * 0.01527525 / 3**0.5  # of 0.80, 0.81, 0.78
    assert [row["mean"], row["low"], row["high"]] == pytest.approx([0.796667, 0.796667 - spread, 0.796667 + spread])
    one = arms(result(values={"own": [0.5]}, claims=(), seeds=[1]))
    assert one["low"].isna().all() and one["mean"].tolist() == [0.5]


@pytest.mark.fast
@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"values": VALUES | {"own": [0.8]}}, "arm own: score has 1 values"),
        ({"claims": (("own", "nothing", "above"),)}, "score of arm 'nothing' was not measured"),
        ({"standing": "guessed"}, "standing"),
    ],
)
def test_a_result_that_does_not_fit_is_refused(changes, message):
    with pytest.raises(ValidationError, match=message):
        result(**changes)


def planned(folder: Path, **changes) -> NeighbourSystem:
    """PreQuant on the tiny teacher and the task ``topic``, which is on disk."""
    splits = {"train": tiny.sentences(64, 1), "development": tiny.sentences(32, 2), "test": tiny.sentences(32, 3)}
    storage.save(storage.DatasetDict(splits), folder / "runs" / "english" / "tasks" / "topic")
    budget = {"topic": {"train": 64, "development": 32, "test": None, "max_length": 16}}
    finetuning = {"epochs": 1, "batch_size": 16, "learning_rates": [5e-3], "seeds": [1], "tasks": budget}
    own = {"prequant": OPTIONS | changes}
    grid = {"neighbours": {"english": ["prequant"]}}
    (described,) = tiny.plan(folder, grid=grid, neighbours=own, finetuning=finetuning).of(NeighbourSystem)
    return described


def test_what_was_finished_is_kept_and_another_description_starts_anew(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tiny.workspace(tmp_path))
    described, layout = planned(tmp_path), tiny.Layout(tmp_path, "english")
    ran: list[tuple[str, int]] = []

    def measure(description, layout, job, seed):
        if len(ran) == 4:
            raise KeyboardInterrupt
        ran.append((job, seed))
        return {job: {"score": seed / 10}}

    system = replace(PREQUANT, run=measure)
    output = tmp_path / "prequant.json"
    with pytest.raises(KeyboardInterrupt):
        run_system(system, described, layout, output)
    assert len(ran) == 4 and not output.exists()
    everything = [(job, seed) for job in PREQUANT.jobs(described.options) for seed in (1, 2, 3)]
    rest = replace(PREQUANT, run=lambda d, la, job, seed: ran.append((job, seed)) or {job: {"score": seed / 10}})
    (layout.checkpoints / next(layout.checkpoints.iterdir()).name / f"{ran[0][0]}_{ran[0][1]}.json").write_text("{")
    made = run_system(rest, described, layout, output)
    assert ran == [*everything[:4], everything[0], *everything[4:]]  # the damaged one is run again
    assert "1 of 9 left" in capsys.readouterr().out
    assert read_record(output, NeighbourResult, neighbour="prequant") == made
    assert made.hashes.keys() == {"corpus", "tasks", "teacher", "weights"}
    assert made.arms[0].values["score"] == [0.1, 0.2, 0.3]
    assert not list(layout.checkpoints.iterdir())
    unfinished = replace(PREQUANT, run=lambda *_: {"outliers-row-4": {"score": float("nan")}})
    with pytest.raises(StudyError, match="english_prequant: outliers-row-4 seed 1: values are not finite"):
        run_system(unfinished, described, layout, tmp_path / "other.json")
    assert not (tmp_path / "other.json").exists()


def params_with(root: Path, options: dict, grid: dict) -> Path:
    values = read_yaml(root / "params.yaml")
    values["grid"] |= grid
    values["neighbours"] = {"prequant": options}
    YAML(typ="safe").dump(values, root / "params.yaml")
    return root


@pytest.mark.fast
@pytest.mark.parametrize(
    ("options", "neighbours", "message"),
    [
        ({"bits": [9]}, ["prequant"], r"neighbours.prequant.bits.0 = 9: .*less than or equal to 8"),
        ({"bits": [1]}, ["prequant"], r"neighbours.prequant.bits.0 = 1: .*greater than or equal to 2"),
        ({"compared_bits": 7}, ["prequant"], r"compared_bits = 7; allowed: one of bits"),
        ({"learning_rates": {"lora": None}}, ["prequant"], r"neighbours.prequant.learning_rates"),
        ({"tasks": ["retrieval"]}, ["prequant"], r"'retrieval' is none that settings.english learns; allowed: sentim"),
        ({"tuned": ["weights"]}, ["prequant"], r"tuned.0 = 'weights'"),
        ({"model": "od_L9"}, ["prequant"], r"neighbours.prequant.model = 'od_L9' is no run of english; allowed: teach"),
        ({"seed": 1}, ["prequant"], r"neighbours.prequant.seed = 1: unknown key"),
        (["bits"], ["prequant"], r"neighbours.prequant = \['bits'\]: .*dictionary"),
        ({}, ["postquant"], r"grid.neighbours.english: 'postquant' is unknown; allowed: prequant"),
    ],
)
def test_mistakes_are_one_line(tmp_path, options, neighbours, message):
    make_study(tmp_path, ["none", "mlm"])
    params_with(tmp_path, options, {"neighbours": {"english": neighbours}})
    with pytest.raises(StudyError, match=message) as told:
        resolve(root=tmp_path)
    assert "\n" not in str(told.value)


@pytest.mark.fast
def test_a_neighbour_changes_no_other_description(tmp_path):
    before = make_study(tmp_path, ["none", "mlm"]).plan
    assert "neighbours" not in before.analyses()
    own = {"model": "mlm_L3-H192_1", "tasks": ["topic"], "test": 30, "train": 10**6}
    after = resolve(root=params_with(tmp_path, own, {"neighbours": {"english": ["prequant"]}}))
    new = [d for d in after.descriptions if d not in before.descriptions]
    assert [type(d) for d in new] == [NeighbourSystem, Neighbours]
    assert [d for d in after.descriptions if d not in new] == before.descriptions
    described = after.of(NeighbourSystem)[0]
    budget, full = described.tasks["topic"], load_params(root=tmp_path).task_budget("topic")
    assert (budget.test, budget.train, budget.development) == (30, full.train, full.development)
    assert described.folder(after.layout("english")).name == "mlm_L3-H192_1"
    assert "neighbours" in after.analyses("english") and "neighbours" not in after.analyses("multilingual")


def test_everything_side_by_side_by_hand(tmp_path):
    made = make_study(tmp_path, ["none", "mlm"], ["L3-H192"], seeds=[1, 2, 3])
    write_grid(made, {("mlm", "L3-H192"): 0.64})  # and 0.004 more with each seed
    plan = resolve(root=params_with(tmp_path, {}, {"neighbours": {"english": ["prequant"]}}))
    write_plan(plan)
    layout = plan.layout("english")
    fine = VALUES | {"full": [0.9, 0.9, 0.9]}
    shown = overview([result(values=fine, claims=())], layout).set_index("row")
    assert list(shown.index) == ["teacher", "none, L3-H192", "mlm, L3-H192", *ASKED_FOR, "PreQuant"]
    left = layout.result("mlm_L3-H192_1")
    write_file(left.with_name("mlm_L9-H9_1.json"), left.read_text())  # of a student that is no more
    assert list(overview([], layout)["row"]) == list(shown.index[:-1])
    nothing = overview([result(values=fine | {"full": [0.0] * 3}, claims=())], layout).set_index("row")
    assert nothing.isna().loc["PreQuant", "kept"]
    with pytest.raises(StudyError, match="another; overview.SYSTEMS lacks it"):
        overview([result(claims=()).model_copy(update={"system": "another"})], layout)
    assert set(SYSTEMS) == set(NOTEBOOKS)
    own = shown.loc["mlm, L3-H192"]
    mean, half = 100 * 0.644 / 0.8, 4.302653 * 100 * 0.004 / 0.8 / 3**0.5
    assert [own["kept"], own["low"], own["high"]] == pytest.approx([mean, mean - half, mean + half])
    assert own["cost"] == "0.41 M tokens, 190 s, CPU" and shown.loc["none, L3-H192", "cost"] == "no training"
    assert shown.loc["PreQuant", "kept"] == pytest.approx(100 * (0.82 + 0.85 + 0.81) / 3 / 0.9)
    assert shown["latency"].isna().all() and figures.overview_figure(shown.reset_index()) is None
    assert (shown.loc[[*ASKED_FOR], "of"] == "not run").all() and shown.loc[[*ASKED_FOR], "kept"].isna().all()
    timed = "model,runtime,input,batch_size,threads,p50\nteacher,eager,texts,1,1,12\nL3-H192,eager,texts,1,1,3\n"
    timed += "L3-H192,onnx,texts,1,1,2\nL3-H192,eager,16,1,1,1\nteacher,eager,texts,1,2,8\n"
    write_file(layout.reports / "runtimes" / "english" / "timings.csv", timed)
    student = result(model="mlm_L3-H192_1", claims=())
    sizes = plan.of(Comparison)[0].students["L3-H192"].model_dump(include={"layers", "width", "heads", "intermediate"})
    scored = {"topmost-pca": [0.5] * 3, "start": [0.4] * 3}
    others = result(system="xtremedistil", values=scored, claims=(), options={"student": sizes})
    lower = {"od": [300.0] * 3, "teacher": [200.0] * 3}
    writer = result(system="miniend", values=lower, claims=(), measures={"score": "perplexity"})
    rows = overview([result(), student, others, writer], layout)
    found = rows.set_index("kind").loc["system"]
    assert found["latency"].tolist()[:3] == [12, 3, 3] and found["latency"].isna().tolist()[3]
    assert found["kept"].isna().all()  # neither has a reference of the same kind
    expected = ["not measured", "not measured", "score 50.0, arm start 40.0", "score 300.0, arm teacher 200.0"]
    assert found["of"].tolist() == expected
    texts = [one.get_text() for one in figures.overview_figure(rows).axes[0].texts]
    assert texts == ["untrained  75.5", "MLM  80.5", "teacher  100.0"]
    page = figures.overview_table(rows, "english").to_html()
    page = re.sub(r"\s+", " ", re.sub("<.*?>", " ", page))
    assert "MLM, L3-H192 80.5 (79.3 – 81.7) teacher, all tasks 3.0" in page
    assert "static-256 not run not measured" in page and "not measured score 50.0, arm start 40.0 3.0" in page


def test_methods_whose_students_read_fewer_tokens_say_so(tmp_path):
    made = make_study(tmp_path, ["none", "mlm", "od"], ["L3-H192"], seeds=[1, 2, 3])
    write_grid(made, {})
    plan = resolve(root=params_with(tmp_path, {}, {}))
    write_plan(plan)
    layout = plan.layout("english")
    for seed in (1, 2, 3):
        file = layout.result(f"od_L3-H192_{seed}")
        record = json.loads(file.read_text())
        record["distillation"]["tokens"] = 31_000_000
        write_file(file, json.dumps(record))
    rows = overview([], layout).assign(latency=3.0)
    assert rows.set_index("row")["tokens"].filter(like="L3").to_dict() == {
        "none, L3-H192": "",
        "mlm, L3-H192": "0.41 M",
        "od, L3-H192": "",
    }
    texts = [one.get_text() for one in figures.overview_figure(rows).axes[0].texts]
    assert any(text.startswith("MLM (0.41 M tokens)  ") for text in texts)
    assert "MLM, L3-H192, 0.41 M tokens" in figures.overview_table(rows, "english").to_html()


def test_the_page_tells_standing_arms_and_verdicts_and_other_pages_stay_as_they_are(tmp_path, monkeypatch):
    made = make_study(tmp_path, ["none", "mlm"], ["L3-H192"])
    write_grid(made)
    for notebook in ("58_neighbours", "80_report"):
        shutil.copy(REPOSITORY / "notebooks" / f"{notebook}.ipynb", tmp_path / "notebooks")
    grid = {"neighbours": {"english": ["prequant"]}, "analyses": ["neighbours"]}
    plan = resolve(root=params_with(tmp_path, {}, grid))
    (tmp_path / "dvc.yaml").touch()
    write_plan(plan)
    layout, (described,) = plan.layout("english"), plan.of(Neighbours)
    with pytest.raises(StudyError, match="prequant.json: No such file"):
        load_neighbours(described, layout)
    write_record(
        layout.systems / "prequant.json", result(title="<b>T & more", options={"tasks": ["topic"], "train": 1000})
    )
    monkeypatch.setenv("PYTHONPATH", str(REPOSITORY), prepend=":")
    monkeypatch.chdir(tmp_path)
    parameters = {"description": "../plan/neighbours/english.json", "output": "../reports/neighbours/english"}
    run_notebook(tmp_path / "notebooks/58_neighbours.ipynb", executed(tmp_path, "neighbours"), parameters)
    page = Page(write_report(plan).parent / "neighbours_english.html")
    text = re.sub(r"\s+", " ", page.text)
    assert "Standing: our reading." in text and "What could not be known: much" in text
    assert "On the teacher, 3 seeds; topic; at most so many examples: train 1,000; 1 min of computing." in text
    assert "arm own 82.7 (77.5 – 87.8)" in text  # 0.826667 -+ 4.302653 * 0.02081666 / sqrt(3)
    assert "own above other supported +3.00 (+0.52 to +5.48)" in text
    assert [image["src"] for image in page.named("img")] == ["../neighbours/english/prequant.png"]
    linked = {a["href"].rpartition("/")[2] for a in Page(tmp_path / "reports/html/index.html").named("a")}
    assert {"neighbours_english.html", "prequant.json", "verdicts.csv", "arms.csv"} <= linked
    assert figures.arms_figure(result()).axes[0].get_xlabel() == "macro score × 100"
