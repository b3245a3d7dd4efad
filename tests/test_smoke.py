"""The smoke profile from sources to report, as `make` runs it, and once more from the committed results alone."""

from __future__ import annotations

import json
import re
import shutil
import sys
from urllib.parse import unquote

import pipeline
import pytest
from pipeline import command, files_below, stages_run

from study import resolve
from study.descriptions import Comparison, Evaluation


@pytest.mark.pipeline
def test_the_notebook_of_methods_needs_nothing_but_the_pinned_wheels(tmp_path):
    """It asserts that every loss it writes out is the library's; a clone without results has all that it needs."""
    pipeline.clone(tmp_path)
    executed = tmp_path / "scratch" / "executed.ipynb"
    arguments = ["run", "notebooks/05_methods.ipynb", "--executed", str(executed)]
    outcome = command(tmp_path, sys.executable, "-m", "study", *arguments, seconds=600)
    assert outcome.returncode == 0, outcome.stdout[-2000:] + outcome.stderr[-2000:]
    assert executed.read_text().count('"image/png"') == 6 + 2  # and those of its controls
    assert command(tmp_path, "git", "status", "--porcelain").stdout == ""


@pytest.mark.pipeline
def test_the_smoke_profile_end_to_end(tmp_path):
    pipeline.clone(tmp_path)
    folder = tmp_path / "profiles" / "smoke"
    (tmp_path / ".venv").symlink_to(sys.prefix)
    make = ["make", "--old-file", ".venv/ready"]  # the environment is there
    outcome = command(tmp_path, *make, "repro", "PROFILE=smoke", seconds=3600, MAKEFLAGS="")
    assert outcome.returncode == 0, outcome.stdout[-2000:] + outcome.stderr[-2000:]

    # Nothing that git knows has changed.
    assert command(tmp_path, "git", "status", "--porcelain").stdout == ""

    # Everything is there.
    plan, reports = resolve("smoke", tmp_path), folder / "reports"
    assert plan.params.grid.settings == ["english", "multilingual"]
    for evaluation in plan.of(Evaluation):
        result = json.loads(plan.layout(evaluation.setting).result(evaluation.model).read_text())
        assert {*result["tasks"], *result.get("probes", {})} == set(evaluation.tasks)
        assert result["schema"] == 2 and result["hashes"].keys() >= {"corpus", "tasks", "weights"}
        assert (result["distillation"] is None) == (evaluation.method == "none")
    for setting in plan.params.grid.settings:
        for name in ("latency.json", "tasks.json", "corpus.json", "representations.json"):
            assert json.loads((reports / "results" / setting / name).read_text())
        figures = {path.stem for path in (reports / "comparison" / setting).glob("*.png")}
        assert {"quality", "quality_latency", "per_task", "learning_curves"} <= figures
        assert ("per_language" in figures) == (setting == "multilingual")
        assert list((reports / "comparison" / setting).glob("*.csv"))
        assert json.loads((reports / "comparison" / setting / "headline.json").read_text())["students"]
        assert (reports / "representations" / setting / "layer_similarity.png").stat().st_size > 1000
    arms = {"prequant": ["outliers-row-4", "head-row-4", "random-row-4"], "xtremedistil": ["topmost-pca", "start"]}
    arms["cr-ild"] = ["last-task-regularised", "logits", "teacher"]
    for system, names in arms.items():
        beside = json.loads((reports / "systems" / "english" / f"{system}.json").read_text())
        assert [arm["name"] for arm in beside["arms"]] == names
    effects = (reports / "ablations" / "english" / "effects.csv").read_text()
    assert "from-top,mha-minilmv2,mha-minilmv2-from-top-0" in effects
    pages = {path.name: path.read_text() for path in (reports / "html").glob("*.html")}
    names = [
        f"{name}_{s}.html" for name in ("comparison", "ablations", "representations") for s in plan.params.settings
    ]
    assert set(pages) == {"index.html", "explore.html", "neighbours_english.html", *names}
    for page in pages.values():
        assert str(tmp_path) not in page  # no path of this machine
    for link in re.findall(r'(?:href|src)="([^"#:]+)"', pages["index.html"]):
        assert (reports / "html" / unquote(link)).exists(), link

    # The interactive notebook has something to show of these results. IPython runs it: papermill's client now and then
    # waits for ever for a widget's answer (jupyter/nbclient#312).
    own = (tmp_path / "notebooks" / "70_explore.ipynb").read_text()
    own = own.replace(r"profile = \"laptop\"", r"profile = \"smoke\"")
    own = own.replace(r"student = \"L3-H384\"", r"student = \"L3-H192\"")
    (tmp_path / "explored.ipynb").write_text(own)
    ipython = ["ipython", "--colors=NoColor", "explored.ipynb"]
    outcome = command(tmp_path, *ipython, seconds=600, PYTHONPATH=str(tmp_path))
    assert outcome.returncode == 0 and "Error" not in outcome.stdout, outcome.stdout[-2000:] + outcome.stderr[-2000:]
    shown = ("<Figure size", "teacher layer", "[MASK] rank")
    assert all(text in outcome.stdout for text in shown) and outcome.stdout.count("interactive(") == 3
    still = json.loads(own)
    still["cells"] = [cell for cell in still["cells"] if "interact(" not in "".join(cell["source"])]
    (tmp_path / "still.ipynb").write_text(json.dumps(still))
    outcome = command(
        tmp_path, sys.executable, "-m", "study", "run", "still.ipynb", "--executed", "seen.ipynb", seconds=300
    )
    assert outcome.returncode == 0 and '"image/png"' in (tmp_path / "seen.ipynb").read_text()  # a picture, not its name

    # A second time nothing is done, although Python left its bytecode in folders that stages depend on.
    assert list((tmp_path / "study" / "analysis" / "numbers").glob("__pycache__/*.pyc"))
    outcome = command(folder, "dvc", "repro", seconds=600)
    assert outcome.returncode == 0 and stages_run(outcome) == []
    assert pipeline.stale(folder) == set()

    # A bare clone without cache makes every figure from the small results.
    before = files_below(reports)
    for made in (folder / "runs", folder / "scratch", folder / "plan", tmp_path / ".dvc" / "cache"):
        shutil.rmtree(made)
    for made in ("html", "comparison", "ablations", "representations", "neighbours"):
        shutil.rmtree(reports / made)
    outcome = command(tmp_path, *make, "report", "PROFILE=smoke", seconds=1200, MAKEFLAGS="")
    assert outcome.returncode == 0, outcome.stdout[-2000:] + outcome.stderr[-2000:]
    after = files_below(reports)
    assert after.keys() == before.keys()
    changed = {name for name in before if before[name] != after[name] and not name.startswith("html/")}
    assert changed == set()  # byte for byte

    # A missing result stops the comparison by name.
    missing = plan.of(Comparison, "multilingual")[0].cells()[-1]
    plan.layout("multilingual").result("{}_{}_{}".format(*missing)).unlink()
    outcome = command(tmp_path, *make, "report", "PROFILE=smoke", seconds=600, MAKEFLAGS="")
    assert outcome.returncode != 0 and "{}_{}".format(*missing) in outcome.stdout + outcome.stderr
