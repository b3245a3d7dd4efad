"""dvc.yaml against notebooks, library and parameters; notebooks; commands; what a killed command leaves running."""

from __future__ import annotations

import ast
import os
import re
import signal
import subprocess
import sys
import time
from pathlib import Path

import nbformat
import pipeline
import pytest
from papermill.translators import PythonTranslator
from ruamel.yaml import YAML

from study.cells import Cells
from study.neighbours_options import NOTEBOOKS as SYSTEMS
from study.plan import resolve
from study.sections import ANALYSES

ROOT = Path(__file__).parents[1]
LINES = (ROOT / "dvc.yaml").read_text().splitlines()
STAGES = YAML(typ="safe").load(ROOT / "dvc.yaml")["stages"]
#: A stage as it stands, or what is repeated of one.
BODIES = {name: stage.get("do", stage) for name, stage in STAGES.items()}
NOTEBOOKS = sorted(path.stem for path in (ROOT / "notebooks").glob("*.ipynb"))
INTERACTIVE = {"05_methods", "70_explore"}  # they write nothing; executed by tests/test_smoke.py
BY_THE_REPORT = {"80_report"}
#: Stages whose cost is minutes or more: they depend on descriptions and never on code.
EXPENSIVE = ("tasks", "corpus", "teacher", "distill", "evaluate", "represent", "latency", "neighbour")
NOTEBOOK_STAGES = [name for name, body in BODIES.items() if "study run" in body["cmd"]]


def notebooks_of(name: str) -> list[str]:
    """Names of the notebooks that a stage runs; those of analyses and neighbours are values of plan.yaml, here of
    every plan."""
    (notebook,) = re.findall(r"study run \S*?scratch/notebooks/(\S+)\.ipynb", BODIES[name]["cmd"])
    if not notebook.startswith("${"):
        return [notebook]
    return sorted((SYSTEMS if name == "neighbour" else ANALYSES).values())


def plan() -> dict:
    return YAML(typ="safe").load(ROOT / "plan.yaml")


def outputs_of(name: str) -> dict[str, dict]:
    outs = [*BODIES[name].get("outs", ()), *BODIES[name].get("metrics", ())]
    return {key: value for out in outs for key, value in (out.items() if isinstance(out, dict) else [(out, {})])}


def parameters_of(notebook: str) -> list[str]:
    cells = nbformat.read(ROOT / "notebooks" / f"{notebook}.ipynb", as_version=4).cells
    (cell,) = (cell for cell in cells if "parameters" in cell.metadata.get("tags", []))
    return [parameter.name for parameter in PythonTranslator.inspect(cell)]


def test_each_stage_stands_once():
    assert len(LINES) <= 200 and "<<" not in (ROOT / "dvc.yaml").read_text()
    notebooks = [notebook for name in NOTEBOOK_STAGES for notebook in notebooks_of(name)]
    assert len(notebooks) == len(set(notebooks))


def test_every_notebook_is_run_by_a_stage_or_by_make():
    by_make = set(re.findall(r"study run notebooks/([\w-]+)\.ipynb", (ROOT / "Makefile").read_text()))
    by_stages = {notebook for name in NOTEBOOK_STAGES for notebook in notebooks_of(name)}
    assert by_stages | by_make | INTERACTIVE | BY_THE_REPORT == set(NOTEBOOKS)


def test_make_runs_every_kind_of_stage_once_in_the_order_of_their_numbers():
    """Those of their lines in the list of stages, which is in the order of dvc.yaml."""
    (recipe,) = re.findall(r"^else\n((?:\t.*\n)+)endif", (ROOT / "Makefile").read_text(), re.M)
    patterns = [pattern.replace("$$", "$") for pattern in re.findall(r"\$\(STAGES\) '(\S+)'", recipe)]
    names = {name: f"{name}@x" if "do" in stage else name for name, stage in STAGES.items()}
    assert [name for pattern in patterns for name, own in names.items() if re.search(pattern, own)] == list(STAGES)


def test_parameters_given_by_make_exist_in_its_notebooks():
    for command in (ROOT / "Makefile").read_text().replace("\\\n", " ").splitlines():
        for notebook in re.findall(r"study run notebooks/([\w-]+)\.ipynb", command):
            assert set(re.findall(r"-p (\S+)", command)) <= set(parameters_of(notebook))


@pytest.mark.parametrize("name", NOTEBOOK_STAGES)
def test_parameters_given_by_a_stage_exist_in_its_notebooks(name):
    given = re.findall(r"-p (\S+)", BODIES[name]["cmd"])
    assert "output" in given
    for notebook in notebooks_of(name):
        assert set(given) == set(parameters_of(notebook))  # one that is not given would silently keep its default


@pytest.mark.parametrize("name", NOTEBOOK_STAGES)
def test_an_analysis_depends_on_its_notebook_and_any_other_stage_on_its_code_alone(name):
    (copy,) = re.findall(r"study run scratch/notebooks/(\S+)\.ipynb", BODIES[name]["cmd"])
    whole, code = f"scratch/notebooks/{copy}.ipynb", f"scratch/code/{copy}.py"
    assert [path for path in (whole, code) if path in BODIES[name]["deps"]] == [whole if name == "analyse" else code]


@pytest.mark.parametrize("name", EXPENSIVE)
def test_expensive_stages_depend_on_their_description_and_on_no_code(name):
    dependencies = BODIES[name]["deps"]
    described = [path for path in dependencies if path.startswith("plan/")]
    assert len(described) == 1 and described[0].startswith(f"plan/{name}/")
    assert f"-p description ../${{here}}/{described[0]}" in BODIES[name]["cmd"]
    assert not [path for path in dependencies if "study" in path] and "params" not in BODIES[name]


def test_the_plan_depends_on_all_that_resolves_it():
    """The files that `study.plan` is made of, followed through their imports."""
    waiting, files = {"study/plan.py"}, set()
    while waiting:
        file = waiting.pop()
        files.add(file)
        for node in ast.walk(ast.parse((ROOT / file).read_text())):
            if isinstance(node, ast.ImportFrom) and node.module and node.module.startswith("study."):
                waiting |= {f"{node.module.replace('.', '/')}.py"} - files
    assert {f"${{root}}/{file}" for file in files} - {"${root}/study/files.py"} <= set(BODIES["plan"]["deps"])


def test_analyses_depend_on_the_code_they_load():
    for analysis, notebook in {(a["analysis"], a["notebook"]) for a in plan()["analyses"].values()}:
        dependencies = [path.replace("${item.analysis}", analysis) for path in BODIES["analyse"]["deps"]]
        dependencies = [path.removeprefix("${root}/") for path in dependencies]
        cells = nbformat.read(ROOT / "notebooks" / f"{notebook}.ipynb", as_version=4).cells
        source = "\n".join(cell.source for cell in cells if cell.cell_type == "code")
        loaded = set()
        for node in ast.walk(ast.parse(source)):
            if isinstance(node, ast.ImportFrom) and (node.module or "").startswith("study.analysis"):
                names = [f"{node.module}.{alias.name}".replace(".", "/") for alias in node.names]
                loaded |= {f"{name}.py" for name in names if (ROOT / f"{name}.py").is_file()}
                if (ROOT / f"{node.module.replace('.', '/')}.py").is_file():
                    loaded.add(f"{node.module.replace('.', '/')}.py")
        assert loaded
        missing = {
            file for file in loaded if not any(file == path or file.startswith(f"{path}/") for path in dependencies)
        }
        assert missing == set(), notebook
        assert {"study/records.py", "study/records_beside.py"} <= {*dependencies}  # what their files hold


def test_small_results_are_in_git_and_runs_are_not():
    for name in STAGES:
        for path, options in outputs_of(name).items():
            if path.startswith("reports/"):
                assert options.get("cache") is False, f"{name}: {path} would not be in git"
            elif path.startswith("runs/"):
                assert options.get("cache", True), f"{name}: {path} would be neither cached nor in git"


def test_everything_a_stage_writes_is_in_the_folder_of_its_profile():
    for name in STAGES:
        assert not [path for path in outputs_of(name) if path.startswith(("..", "/", "${root}"))]


@pytest.mark.parametrize("name", NOTEBOOKS)
def test_notebooks_are_thin_clean_and_begin_with_prose(name):
    path = ROOT / "notebooks" / f"{name}.ipynb"
    notebook = nbformat.read(path, as_version=nbformat.NO_CONVERT)
    nbformat.validate(notebook)
    assert (notebook.nbformat, notebook.nbformat_minor) == (4, 5)
    assert not {"kernelspec", "language_info"} & set(notebook.metadata)
    assert len({cell.id for cell in notebook.cells}) == len(notebook.cells)
    assert notebook.cells[0].cell_type == "markdown" and notebook.cells[0].source.startswith("# ")
    code = [cell for cell in notebook.cells if cell.cell_type == "code"]
    assert all(cell.outputs == [] and cell.execution_count is None for cell in code)
    tagged = [cell for cell in code if "parameters" in cell.metadata.get("tags", [])]
    assert tagged == code[:1]
    for cell in code:
        tree = ast.parse(cell.source)
        assert not any(isinstance(n, (ast.FunctionDef, ast.AsyncFunctionDef, ast.ClassDef)) for n in ast.walk(tree))
    defaults = {target.id: node.value.value for node in ast.parse(code[0].source).body for target in node.targets}
    if "output" in defaults:
        assert defaults["output"].startswith("../scratch/")  # by hand, no run is overwritten


@pytest.mark.parametrize("name", sorted(set(NOTEBOOKS) - BY_THE_REPORT))
def test_notebooks_say_what_to_try_and_lead_to_others(name):
    cells = nbformat.read(ROOT / "notebooks" / f"{name}.ipynb", as_version=4).cells
    prose = "\n".join(cell.source for cell in cells if cell.cell_type == "markdown")
    linked = re.findall(r"\]\((\w+)\.ipynb\)", prose)
    assert linked and set(linked) <= set(NOTEBOOKS) - {name}
    assert "Next: [" in prose and ("Before: [" in prose or name in ("00_sources", "05_methods")) and "**Try" in prose
    assert "$" in prose or name == "00_sources"  # an equation


def study_command(*arguments: str, seconds: int = 60) -> subprocess.CompletedProcess:
    return pipeline.command(ROOT, sys.executable, "-m", "study", *arguments, seconds=seconds)


def test_a_misspelt_parameter_on_the_command_line(tmp_path):
    executed = tmp_path / "executed.ipynb"
    outcome = study_command("run", "notebooks/30_distill.ipynb", "--executed", str(executed), "-p", "sead", "1")
    assert outcome.returncode == 1 and outcome.stdout == "" and not executed.exists()
    assert len(outcome.stderr.splitlines()) == 1
    assert all(name in outcome.stderr for name in ("'sead'", "30_distill", "description", "output"))


def test_text_parameters_are_taken_as_they_are_and_others_as_yaml(tmp_path):
    notebook = nbformat.v4.new_notebook()
    cell = nbformat.v4.new_code_cell("words = 'a'\ncount = 1\nnames = ['x']", metadata={"tags": ["parameters"]})
    notebook.cells = [cell, nbformat.v4.new_code_cell("print(repr((words, count, names)))")]
    nbformat.write(notebook, tmp_path / "own.ipynb")
    for words in ("", "12", "null", "[a, b]"):
        given = ["-p", "words", words, "-p", "count", "2", "-p", "names", "[y, z]"]
        outcome = study_command(
            "run", str(tmp_path / "own.ipynb"), "--executed", str(tmp_path / "executed.ipynb"), *given
        )
        assert outcome.returncode == 0 and repr((words, 2, ["y", "z"])) in outcome.stdout, outcome.stderr
    wrong = study_command("run", str(tmp_path / "own.ipynb"), "-p", "count", "two")
    assert wrong.returncode == 1 and "count = 'two'; allowed: int" in wrong.stderr


def test_a_notebook_that_does_not_exist():
    outcome = study_command("run", "notebooks/31_distil.ipynb")
    assert outcome.returncode == 1 and len(outcome.stderr.splitlines()) == 1 and "31_distil" in outcome.stderr


def test_a_users_mistake_inside_a_notebook_is_its_own_one_line(tmp_path):
    executed = ["--executed", str(tmp_path / "executed.ipynb")]
    missing = ["-p", "description", str(tmp_path / "plan" / "distill" / "nothing.json")]
    outcome = study_command("run", "notebooks/30_distill.ipynb", *executed, *missing, seconds=120)
    assert outcome.returncode == 1 and "Traceback" not in outcome.stderr
    last = outcome.stderr.strip().splitlines()[-1]
    assert last.startswith("error: ") and "nothing.json: No such file" in last and "study plan" in last


@pytest.mark.parametrize("profile", ["laptop", "recipes", "evidence"])
def test_make_runs_every_kind_of_stage_after_what_it_depends_on(profile):
    """`make repro` runs kinds of stages in turn, each stage alone: an order that DVC's own graph has to allow."""
    recipe = (ROOT / "Makefile").read_text().partition("\nrepro: ")[2].partition("\n\n")[0]
    turns = re.findall(r"\$\(STAGES\) '\^\(?([a-z|]+)\)?@'", recipe)
    turn = {kind: place for place, kinds in enumerate(turns) for kind in kinds.split("|")}
    for name, before in Cells(resolve(profile)).graph().items():
        needed = {other.partition("@")[0] for other in before if "@" in other}
        own = turn[name.partition("@")[0]] if "@" in name else len(turns)
        assert all(turn[kind] < own for kind in needed), (name, before)


def test_nothing_is_started_for_a_command_that_has_ended(tmp_path):
    """What is left of the list of a killed `make tune` is not begun: the first to notice stops xargs."""
    starter = subprocess.Popen(["true"])
    starter.wait()
    command = f'echo "$0" >> {tmp_path / "begun"}; {sys.executable} -m study run absent.ipynb --executed x.ipynb'
    done = subprocess.run(
        ["xargs", "-n", "1", "sh", "-c", command],
        input="first second third",
        cwd=ROOT,
        env=os.environ | {"STUDY_STARTER": str(starter.pid)},
        capture_output=True,
        text=True,
    )
    assert done.returncode == 124 and f"STUDY_STARTER = {starter.pid}, " in done.stderr, done.stderr
    assert (tmp_path / "begun").read_text().split() == ["first"]


@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="reads /proc")
def test_a_killed_command_leaves_no_notebook_running(tmp_path):
    """What `make` starts ends soon after `make` itself, kernel and all, even when `make` is killed."""
    notebook = nbformat.v4.new_notebook()
    notebook.cells = [
        nbformat.v4.new_code_cell("output = ''", metadata={"tags": ["parameters"]}),
        nbformat.v4.new_code_cell(
            f"import os, pathlib, time\npathlib.Path({str(tmp_path / 'kernel')!r}).write_text(str(os.getpid()))\n"
            "time.sleep(300)"
        ),
    ]
    nbformat.write(notebook, tmp_path / "waits.ipynb")
    starter = subprocess.Popen(["sleep", "300"])
    run = subprocess.Popen(
        [sys.executable, "-m", "study", "run", str(tmp_path / "waits.ipynb"), "--executed", str(tmp_path / "x.ipynb")],
        cwd=ROOT,
        env=os.environ | {"STUDY_STARTER": str(starter.pid)},
        stdout=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL,
    )
    try:
        deadline = time.monotonic() + 60
        while not (tmp_path / "kernel").exists() and time.monotonic() < deadline:
            time.sleep(0.2)
        kernel = int((tmp_path / "kernel").read_text())
        starter.send_signal(signal.SIGKILL)
        starter.wait()
        run.wait(timeout=60)
        while Path(f"/proc/{kernel}").exists() and time.monotonic() < deadline + 60:
            time.sleep(0.2)
        assert not Path(f"/proc/{kernel}").exists()
    finally:
        for process in (starter, run):
            if process.poll() is None:
                process.kill()
