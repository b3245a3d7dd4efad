"""One set of pins: environment.yml (conda) and pyproject.toml (pip) give the same environment."""

from __future__ import annotations

import ast
import json
import re
import sys
import tomllib
from pathlib import Path

from ruamel.yaml import YAML

ROOT = Path(__file__).parents[1]


def split(requirement: str) -> tuple[str, str]:
    name, version = requirement.replace(" ", "").split("==")
    return re.sub(r"[-_.]+", "-", name).lower(), version


def project() -> dict:
    return tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]


def conda() -> tuple[dict[str, str], list[str]]:
    """Pins of the pip section, and what conda itself installs."""
    dependencies = YAML(typ="safe").load(ROOT / "environment.yml")["dependencies"]
    (section,) = (entry["pip"] for entry in dependencies if isinstance(entry, dict))
    requirements = [line for line in section if not line.startswith("-")]
    return dict(map(split, requirements)), [entry for entry in dependencies if isinstance(entry, str)]


def test_every_dependency_of_the_project_is_pinned_to_one_version():
    for requirement in project()["dependencies"]:
        assert re.fullmatch(r"[\w.-]+==[\w.]+", requirement), requirement


def test_conda_installs_the_same_versions():
    pins, _ = conda()
    assert pins == dict(map(split, project()["dependencies"]))


def test_conda_brings_a_python_that_the_project_allows():
    _, packages = conda()
    (python,) = (entry for entry in packages if re.match(r"python\b", entry))
    version = tuple(map(int, re.search(r"\d+(\.\d+)+", python)[0].split(".")))
    least = tuple(map(int, re.search(r"\d+(\.\d+)+", project()["requires-python"])[0].split(".")))
    assert version[:2] >= least[:2]
    assert any(re.match(r"pip\b", entry) for entry in packages)


def test_constraints_do_not_contradict_the_pins():
    constraints = (line.partition("#")[0].strip() for line in (ROOT / "constraints.txt").read_text().splitlines())
    constraints = dict(split(line.partition(";")[0]) for line in constraints if "==" in line)
    for name, version in map(split, project()["dependencies"]):
        assert constraints.get(name, version) == version, name


def test_what_the_study_imports_is_declared():
    """Third-party modules imported by the study, its tests and its notebooks, by the names of their packages."""
    sources = [path.read_text() for path in [*ROOT.glob("study/**/*.py"), *ROOT.glob("tests/*.py")]]
    for notebook in ROOT.glob("notebooks/*.ipynb"):
        cells = json.loads(notebook.read_text())["cells"]
        sources += ["".join(cell["source"]) for cell in cells if cell["cell_type"] == "code"]
    imported = set()
    for source in sources:
        for node in ast.walk(ast.parse(source)):
            if isinstance(node, ast.Import):
                imported |= {alias.name.partition(".")[0] for alias in node.names}
            elif isinstance(node, ast.ImportFrom) and not node.level:
                imported.add(node.module.partition(".")[0])
    own = {"study", *(path.stem for path in ROOT.glob("tests/*.py"))}
    declared = {split(requirement)[0] for requirement in project()["dependencies"]}
    packages = {"sklearn": "scikit-learn", "ruamel": "ruamel-yaml"}
    used = {packages.get(name, name).lower() for name in imported - own - set(sys.stdlib_module_names)}
    assert used - declared == set(), "imported but not declared in pyproject.toml"
