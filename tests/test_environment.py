"""One list of versions, constraints.txt, for what pyproject.toml names; environment.yml (conda) takes both."""

from __future__ import annotations

import ast
import json
import re
import sys
import tomllib
from pathlib import Path

from ruamel.yaml import YAML

ROOT = Path(__file__).parents[1]


def normal(name: str) -> str:
    """A package's name as PyPI compares it."""
    return re.sub(r"[-_.]+", "-", name).lower()


def project() -> dict:
    return tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]


def declared_packages() -> list[str]:
    """What the project needs, for everything and for its extras."""
    return [*project()["dependencies"], *(name for own in project()["optional-dependencies"].values() for name in own)]


def constraints() -> list[tuple[str, str]]:
    """Name and version of every line of constraints.txt that is not a comment."""
    lines = (line.partition("#")[0].strip() for line in (ROOT / "constraints.txt").read_text().splitlines())
    pairs = []
    for line in filter(None, lines):
        assert re.fullmatch(r"[\w.-]+==[\w.]+", line), f"{line}: not one version of one package"
        name, version = line.split("==")
        pairs.append((normal(name), version))
    return pairs


def conda() -> tuple[list[str], list[str]]:
    """Lines of the pip section, and what conda itself installs."""
    dependencies = YAML(typ="safe").load(ROOT / "environment.yml")["dependencies"]
    (section,) = (entry["pip"] for entry in dependencies if isinstance(entry, dict))
    return section, [entry for entry in dependencies if isinstance(entry, str)]


def test_every_dependency_of_the_project_is_pinned_to_one_version():
    names = [name for name, _ in constraints()]
    assert len(set(names)) == len(names)
    for requirement in declared_packages():
        assert re.fullmatch(r"[\w.-]+", requirement), f"{requirement}: the version belongs into constraints.txt"
        assert normal(requirement) in names, requirement


def test_conda_installs_the_same_versions():
    """By the study's own list of what it needs, under the constraints, and by nothing else."""
    section, packages = conda()
    assert section == ["--constraint constraints.txt", "--editable .[export]"]
    assert {re.match(r"[\w.-]+", entry)[0] for entry in packages} == {"python", "pip"}


def test_make_installs_the_same_versions():
    (line,) = (line for line in (ROOT / "Makefile").read_text().splitlines() if "--editable" in line)
    assert "--constraint constraints.txt" in line


def test_conda_brings_a_python_that_the_project_allows():
    _, packages = conda()
    (python,) = (entry for entry in packages if re.match(r"python\b", entry))
    version = tuple(map(int, re.search(r"\d+(\.\d+)+", python)[0].split(".")))
    least = tuple(map(int, re.search(r"\d+(\.\d+)+", project()["requires-python"])[0].split(".")))
    assert version[:2] >= least[:2]
    assert any(re.match(r"pip\b", entry) for entry in packages)


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
    ours = {"study", *(path.stem for path in ROOT.glob("tests/*.py"))}
    declared = set(map(normal, declared_packages()))
    packages = {
        "sentence_transformers": "sentence-transformers",
        "sklearn": "scikit-learn",
        "ruamel": "ruamel-yaml",
        "PIL": "pillow",
    }
    used = {normal(packages.get(name, name)) for name in imported - ours - set(sys.stdlib_module_names)}
    assert used - declared == set(), "imported but not declared in pyproject.toml"
