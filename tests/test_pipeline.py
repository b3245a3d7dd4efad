"""dvc.yaml against notebooks, library and parameters; and the smoke profile from sources to report."""

from __future__ import annotations

import ast
import json
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path
from urllib.parse import unquote

import nbformat
import pytest
from papermill.translators import PythonTranslator
from ruamel.yaml import YAML

from study import load_params

ROOT = Path(__file__).parents[1]
STAGES = YAML(typ="safe").load(ROOT / "dvc.yaml")["stages"]
NOTEBOOKS = sorted(path.stem for path in (ROOT / "notebooks").glob("*.ipynb"))
INTERACTIVE = {"70_explore"}  # writes nothing; executed on the smoke results below
NOTEBOOK_STAGES = [name for name, stage in STAGES.items() if "python -m study run" in str(stage["cmd"])]
#: What dvc.yaml says is left out on purpose.
NOT_TRACKED = {"study/__init__.py", "study/config.py", "study/__main__.py", "study/lockfile.py"}


def commands(stage: dict) -> list[str]:
    return stage["cmd"] if isinstance(stage["cmd"], list) else [stage["cmd"]]


def notebook_of(stage: dict) -> str:
    (name,) = re.findall(r"study run \S*?([\w-]+)\.ipynb", " ".join(commands(stage)))
    return name


def tracked(stage: dict, section: str) -> list[str]:
    """What a stage depends on (``deps`` or ``params``), by itself and through the fingerprints that it reads."""
    written = {next(iter(s["outs"])): s for name, s in STAGES.items() if name.startswith("fingerprint-")}
    through = [written[path][section] for path in stage["deps"] if path in written]
    return [*stage[section], *(entry for entries in through for entry in entries)]


def code_of(name: str) -> str:
    cells = nbformat.read(ROOT / "notebooks" / f"{name}.ipynb", as_version=4).cells
    return "\n".join(cell.source for cell in cells if cell.cell_type == "code")


def imported_files(source: str) -> set[str]:
    """Files of the study that Python source imports by itself."""
    names = set()
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Import):
            names |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom) and node.module:
            names |= {node.module} | {f"{node.module}.{alias.name}" for alias in node.names}
    files = set()
    for name in names:
        if name.partition(".")[0] == "study":
            path = Path(*name.split("."))
            files |= {str(p) for p in (path.with_suffix(".py"), path / "__init__.py") if (ROOT / p).is_file()}
    return files


def closure(source: str) -> set[str]:
    """All files of the study that running the source loads, packages' own __init__ and the untracked left out."""
    found, waiting = set(), imported_files(source)
    while waiting:
        file = waiting.pop()
        if file not in found | NOT_TRACKED and not file.endswith("__init__.py"):
            found.add(file)
            waiting |= imported_files((ROOT / file).read_text())
    return found


def test_imports_are_followed_through_packages_and_from_imports():
    files = closure("import study\nfrom study.training.objectives import OBJECTIVES")
    assert {"study/losses.py", "study/mappings.py", "study/models/taps.py", "study/training/objectives.py"} <= files
    assert closure("from study.data import sources") == {"study/data/sources.py"}


def test_every_notebook_is_run_by_a_stage_or_by_make():
    by_make = set(re.findall(r"study run notebooks/([\w-]+)\.ipynb", (ROOT / "Makefile").read_text()))
    assert {notebook_of(STAGES[name]) for name in NOTEBOOK_STAGES} | by_make | INTERACTIVE == set(NOTEBOOKS)


def test_parameters_given_by_make_exist_in_its_notebooks():
    """A recipe is everything up to the next target."""
    for recipe in re.split(r"\n(?=[a-z]+:)", (ROOT / "Makefile").read_text()):
        for notebook in re.findall(r"study run notebooks/([\w-]+)\.ipynb", recipe):
            assert set(re.findall(r"-p (\S+)", recipe)) <= set(parameters_of(notebook))


def parameters_of(notebook: str) -> list[str]:
    cells = nbformat.read(ROOT / "notebooks" / f"{notebook}.ipynb", as_version=4).cells
    (cell,) = (cell for cell in cells if "parameters" in cell.metadata.get("tags", []))
    return [parameter.name for parameter in PythonTranslator.inspect(cell)]


@pytest.mark.parametrize("name", NOTEBOOK_STAGES)
def test_parameters_given_by_a_stage_exist_in_its_notebook(name):
    known = parameters_of(notebook_of(STAGES[name]))
    given = re.findall(r"-p (\S+)", " ".join(commands(STAGES[name])))
    assert "output" in given and "profile" in given
    assert set(given) == set(known)  # one that is not given would silently keep its default


@pytest.mark.parametrize("name", NOTEBOOK_STAGES)
def test_a_stage_depends_on_the_notebook_it_runs_in_its_canonical_copy(name):
    copy = f"scratch/notebooks/canonical/{notebook_of(STAGES[name])}.ipynb"
    assert copy in STAGES[name]["deps"] and copy in " ".join(commands(STAGES[name]))


@pytest.mark.parametrize("name", NOTEBOOK_STAGES)
def test_modules_that_a_stage_loads_are_its_dependencies(name):
    stage = STAGES[name]
    source = code_of(notebook_of(stage))
    if any("study report" in command for command in commands(stage)):
        source += "\nimport study.analysis.report"
    dependencies = [path for path in tracked(stage, "deps") if path.startswith("study")]
    assert all((ROOT / path).exists() for path in dependencies)
    missing = {
        file
        for file in closure(source)
        if not any(file == path or file.startswith(f"{path}/") for path in dependencies)
    }
    assert missing == set(), f"stage {name} loads files that it does not depend on"


#: Sections of params.yaml whose values change what a stage writes.
READ = {
    "tasks": {"settings.${item.setting}.tasks"},
    "corpus": {"corpus", *(f"settings.${{item.setting}}.{key}" for key in ("teacher", "texts", "vocabulary"))},
    "teacher": {"adaptation", "attention_implementation", "masking", "precision"},
    "distill": {
        "attention_implementation",
        "distillation",
        "initialisation",
        "masking",
        "methods.${item.method}",
        "precision",
        "students.${item.student}",
    },
    "evaluate": {
        "attention_implementation",
        "finetuning",
        "latency.sequence_length",  # of the operations counted
        "masking",
        "precision",
        "settings.${item.setting}.tasks",
    },
    "ceiling": {
        "attention_implementation",
        "finetuning",
        "latency.sequence_length",
        "masking",
        "precision",
        "settings.${item.setting}.tasks",
    },
    "latency": {"attention_implementation", "grid.students.${item.setting}", "latency", "precision", "students"},
    "represent": {
        "attention_implementation",
        "finetuning",
        "grid.methods",
        "grid.seeds",
        "grid.students.${item.setting}",
        "precision",
        "representations",
        "settings.${item.setting}.tasks",
    },
    "compare": {"grid"},
    "ablate": {"grid", "methods"},
    "similarity": {"grid"},
    "report": {"grid"},
}


@pytest.mark.parametrize("name", READ)
def test_parameters_that_a_stage_reads_are_tracked(name):
    given = set(tracked(STAGES[name], "params"))
    missing = {key for key in READ[name] if not any(key == entry or key.startswith(f"{entry}.") for entry in given)}
    assert missing == set()


def test_a_fingerprint_changes_with_files_and_parameters_of_its_stage_alone(tmp_path):
    shutil.copytree(ROOT / "study", tmp_path / "study", ignore=shutil.ignore_patterns("__pycache__"))
    for name in ("dvc.yaml", "params.yaml"):
        shutil.copy(ROOT / name, tmp_path / name)
    written = tmp_path / "out.json"

    def printed(stage: str = "fingerprint-distill") -> bytes:
        outcome = command(tmp_path, sys.executable, "-m", "study", "fingerprint", stage, str(written))
        assert outcome.returncode == 0, outcome.stderr
        return written.read_bytes()

    first = printed()
    assert "study/models/taps.py" in json.loads(first)["files"] and "masking" in json.loads(first)["parameters"]
    (tmp_path / "study" / "data" / "notes.txt").write_text("no code")
    with (tmp_path / "study" / "analysis" / "figures.py").open("a") as stream:
        stream.write("# a comment\n")
    params = (tmp_path / "params.yaml").read_text()
    (tmp_path / "params.yaml").write_text(params.replace("threads: [1]", "threads: [2]"))
    assert printed() == first and printed("fingerprint-evaluate") != first
    (tmp_path / "params.yaml").write_text(params.replace("fraction: 0.15", "fraction: 0.25"))
    second = printed()
    with (tmp_path / "study" / "losses.py").open("a") as stream:
        stream.write("# a comment\n")
    third = printed()
    (tmp_path / "study" / "models" / "another.py").write_text("")
    assert len({first, second, third, printed()}) == 4

    outcome = command(tmp_path, sys.executable, "-m", "study", "fingerprint", "distil", str(tmp_path / "none.json"))
    assert outcome.returncode == 1 and len(outcome.stderr.splitlines()) == 1
    assert "'distil'" in outcome.stderr and "fingerprint-distill" in outcome.stderr
    shutil.rmtree(tmp_path / "study" / "models")
    (tmp_path / "study" / "models").mkdir()
    outcome = command(tmp_path, sys.executable, "-m", "study", "fingerprint", "fingerprint-distill", str(written))
    assert outcome.returncode == 1 and "study/models" in outcome.stderr


def test_every_tracked_parameter_exists():
    params = YAML(typ="safe").load(ROOT / "params.yaml")
    examples = {"setting": "english", "method": "od", "student": "L3-H192"}
    for name, stage in STAGES.items():
        for key in (part for part in stage.get("params", []) if isinstance(part, str)):
            value = params
            for part in re.sub(r"\$\{item\.(\w+)\}", lambda match: examples[match[1]], key).split("."):
                assert part in value, f"{name}: {key}"
                value = value[part]


def test_small_results_are_in_git_and_runs_are_not():
    for name, stage in STAGES.items():
        for out in stage["outs"]:
            path, options = next(iter(out.items())) if isinstance(out, dict) else (out, {})
            if path.startswith("reports/"):
                assert options.get("cache") is False, f"{name}: {path} would not be in git"
            elif path.startswith("runs/"):
                assert options.get("cache", True), f"{name}: {path} would be neither cached nor in git"


def test_profiles_never_share_a_file():
    for name, stage in STAGES.items():
        for out in stage["outs"]:
            path = next(iter(out)) if isinstance(out, dict) else out
            assert "${item.profile}" in path or path.startswith("scratch/"), f"{name}: {path}"


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
    assert "study.load_params(profile=profile)" in code[1].source
    defaults = {target.id: node.value.value for node in ast.parse(code[0].source).body for target in node.targets}
    assert defaults["profile"] == "smoke"
    assert name in INTERACTIVE or defaults["output"].startswith("../scratch/")  # by hand, no run is overwritten


def command(folder: Path, *arguments: str, seconds: int = 60, **environment: str) -> subprocess.CompletedProcess:
    path = os.pathsep.join([str(Path(sys.executable).parent), os.environ["PATH"]])
    variables = os.environ | {"PATH": path, "PYTHONPATH": str(folder), **environment}
    variables.pop("PYTHONDONTWRITEBYTECODE", None)  # as for most users: bytecode is left beside the code
    return subprocess.run(arguments, cwd=folder, env=variables, capture_output=True, text=True, timeout=seconds)


def test_a_misspelt_parameter_on_the_command_line(tmp_path):
    executed = tmp_path / "executed.ipynb"
    arguments = ["-m", "study", "run", "notebooks/30_distill.ipynb", "--executed", str(executed), "-p", "sead", "1"]
    outcome = command(ROOT, sys.executable, *arguments)
    assert outcome.returncode == 1 and outcome.stdout == "" and not executed.exists()
    assert len(outcome.stderr.splitlines()) == 1
    assert all(name in outcome.stderr for name in ("'sead'", "30_distill", "seed", "method", "student", "output"))


def test_a_notebook_that_does_not_exist():
    outcome = command(ROOT, sys.executable, "-m", "study", "run", "notebooks/31_distil.ipynb")
    assert outcome.returncode == 1 and len(outcome.stderr.splitlines()) == 1 and "31_distil" in outcome.stderr


def test_a_users_mistake_inside_a_notebook_is_its_own_one_line(tmp_path):
    arguments = ["-m", "study", "run", "notebooks/30_distill.ipynb", "--executed", str(tmp_path / "executed.ipynb")]
    outcome = command(ROOT, sys.executable, *arguments, "-p", "profile", "weekend", seconds=120)
    assert outcome.returncode == 1
    assert (
        outcome.stderr.strip()
        .splitlines()[-1]
        .startswith("error: profile 'weekend' is unknown; allowed: laptop, overnight")
    )
    assert "Traceback" not in outcome.stderr


def clone(folder: Path) -> None:
    """The files of a fresh clone if everything here were committed now, without results of other profiles."""
    listed = command(ROOT, "git", "ls-files", "-co", "--exclude-standard").stdout.splitlines()
    assert listed, "git lists no files: this test needs a clone, not a bare copy of the files"
    for name in listed:
        made = name.startswith(("reports/", "runs/")) and not name.startswith("reports/tuning/")
        if (ROOT / name).is_file() and not made and name != "dvc.lock":
            (folder / name).parent.mkdir(parents=True, exist_ok=True)
            shutil.copy(ROOT / name, folder / name)
    for arguments in (["init", "--quiet"], ["add", "--all"]):
        assert command(folder, "git", *arguments).returncode == 0
    identity = ["-c", "user.name=tester", "-c", "user.email=tester@localhost", "-c", "commit.gpgsign=false"]
    assert command(folder, "git", *identity, "commit", "--quiet", "--no-verify", "-m", "all").returncode == 0


def files_below(folder: Path) -> dict[str, bytes]:
    return {str(path.relative_to(folder)): path.read_bytes() for path in sorted(folder.rglob("*")) if path.is_file()}


def stages_run(outcome: subprocess.CompletedProcess) -> list[str]:
    return re.findall(r"Running stage '([^']+)'", outcome.stdout)


def stale(folder: Path) -> set[str]:
    outcome = command(folder, "dvc", "status", "--json", seconds=300)
    assert outcome.returncode == 0, outcome.stderr
    return set(json.loads(outcome.stdout))


@pytest.mark.pipeline
def test_the_smoke_profile_end_to_end(tmp_path):
    clone(tmp_path)
    (tmp_path / ".venv").symlink_to(sys.prefix)
    make = ["make", "--old-file", ".venv/ready"]  # the environment is there
    outcome = command(tmp_path, *make, "repro", "PROFILE=smoke", seconds=3600, MAKEFLAGS="")
    assert outcome.returncode == 0, outcome.stdout[-2000:] + outcome.stderr[-2000:]

    # Everything is there.
    params = load_params(tmp_path / "params.yaml")
    reports = tmp_path / "reports" / "smoke"
    assert params.grid.settings == ["english", "multilingual"]
    for setting in params.grid.settings:
        results = reports / "results" / setting
        for method, student, seed in [*params.grid.cells(setting), ("teacher", "teacher", 0)]:
            result = json.loads((results / f"{method}_{student}_{seed}.json").read_text())
            assert {*result["tasks"], *result.get("probes", {})} == set(params.settings[setting].tasks)
        for name in ("latency.json", "tasks.json", "corpus.json", "representations.json"):
            assert json.loads((results / name).read_text())
        figures = {path.stem for path in (reports / "figures" / setting).glob("*.png")}
        assert {"quality_heatmap", "quality_latency", "per_task", "learning_curves", "distillation_cost"} <= figures
        assert ("per_language" in figures) == (setting == "multilingual")
        assert all((reports / "figures" / setting / f"{name}.svg").stat().st_size > 1000 for name in figures)
        assert any((reports / "tables" / setting).iterdir())
        assert json.loads((reports / "headline" / f"{setting}.json").read_text())["students"]
        assert (reports / "representations" / setting / "layer_similarity.svg").stat().st_size > 1000
    effects = (reports / "ablations" / "english" / "effects.csv").read_text()
    assert "teacher_layer,mha-minilmv2,mha-minilmv2-from-top-0" in effects
    pages = {path.name: path.read_text() for path in (reports / "html").glob("*.html")}
    analyses = [f"{name}_{s}.html" for name in ("compare", "ablations", "representations") for s in params.settings]
    assert set(pages) == {"index.html", *analyses}
    for page in pages.values():
        assert str(tmp_path) not in page  # no path of this machine
    for link in re.findall(r'(?:href|src)="([^"#:]+)"', pages["index.html"]):
        assert (reports / "html" / unquote(link)).exists(), link

    # The interactive notebook has something to show of these results. IPython runs it: papermill's client now and then
    # waits for ever for a widget's answer (jupyter/nbclient#312).
    ipython = ["ipython", "--colors=NoColor", "70_explore.ipynb"]
    outcome = command(tmp_path / "notebooks", *ipython, seconds=600, PYTHONPATH=str(tmp_path))
    assert outcome.returncode == 0 and "Error" not in outcome.stdout, outcome.stdout[-2000:] + outcome.stderr[-2000:]
    shown = ("<Figure size", "teacher layer", "[MASK] rank")
    assert all(text in outcome.stdout for text in shown) and outcome.stdout.count("interactive(") == 3

    # A second time nothing is done, although Python left its bytecode in folders that stages depend on.
    assert list((tmp_path / "study" / "training").glob("__pycache__/*.pyc"))
    outcome = command(tmp_path, "dvc", "repro", seconds=600)
    assert outcome.returncode == 0 and stages_run(outcome) == []

    # Executing and saving a notebook in Jupyter changes its copy at most, and so nothing behind it.
    notebook = tmp_path / "notebooks" / "30_distill.ipynb"
    content = nbformat.read(notebook, as_version=4)
    content.metadata.update(
        kernelspec={"name": "python3", "display_name": "Python 3"}, language_info={"name": "python"}
    )
    for count, cell in enumerate((cell for cell in content.cells if cell.cell_type == "code"), start=1):
        cell.execution_count = count
        cell.outputs = [nbformat.v4.new_output("stream", name="stdout", text="saved by Jupyter")]
    nbformat.write(content, notebook)
    (notebook.parent / ".ipynb_checkpoints").mkdir()
    shutil.copy(notebook, notebook.parent / ".ipynb_checkpoints" / "30_distill-checkpoint.ipynb")
    assert stale(tmp_path) == {"notebooks"}
    outcome = command(tmp_path, "dvc", "repro", seconds=600)
    assert outcome.returncode == 0 and stages_run(outcome) == ["notebooks"]

    # A figure's code retrains nothing.
    with (tmp_path / "study" / "analysis" / "figures.py").open("a") as stream:
        stream.write("\n# a comment\n")
    assert {name.partition("@")[0] for name in stale(tmp_path)} == {
        "compare",
        "ablate",
        "similarity",
        "report",
    }

    # Code of the losses concerns every student, by way of the fingerprint.
    with (tmp_path / "study" / "losses.py").open("a") as stream:
        stream.write("\n# a comment\n")
    outcome = command(tmp_path, "dvc", "repro", "--single-item", "fingerprint-distill@smoke", seconds=600)
    assert outcome.returncode == 0, outcome.stderr
    stages = command(tmp_path, "dvc", "stage", "list", "--name-only", seconds=300).stdout.split()
    students = {name for name in stages if name.startswith("distill")}
    cells = [cell for setting in params.grid.settings for cell in params.grid.cells(setting)]
    assert len(students) == len(cells) + 1 and students <= stale(tmp_path)  # that of the ablation, too

    # A bare clone without cache makes every figure from the small results.
    before = files_below(reports)
    shutil.rmtree(tmp_path / "runs")
    shutil.rmtree(tmp_path / ".dvc" / "cache")
    shutil.rmtree(tmp_path / "scratch")
    for made in ("figures", "tables", "headline", "html", "ablations", "representations"):
        shutil.rmtree(reports / made)
    outcome = command(tmp_path, *make, "report", seconds=1200, MAKEFLAGS="")
    assert outcome.returncode == 0, outcome.stdout[-2000:] + outcome.stderr[-2000:]
    after = files_below(reports)
    assert after.keys() == before.keys()
    changed = {name for name in before if before[name] != after[name] and not name.startswith("html/")}
    assert changed == set()  # byte for byte

    # A missing result stops the comparison by name.
    method, student, seed = params.grid.cells("multilingual")[-1]
    (results / f"{method}_{student}_{seed}.json").unlink()
    outcome = command(tmp_path, *make, "report", seconds=600, MAKEFLAGS="")
    assert outcome.returncode != 0 and f"{method}_{student}" in outcome.stdout + outcome.stderr
