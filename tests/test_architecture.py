"""Imports point one way, files and functions stay small, and no file of the library is left unused."""

from __future__ import annotations

import ast
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
PACKAGE = ROOT / "study"
FILES = sorted(PACKAGE.rglob("*.py"))
#: Rooms from the ground up: a room imports from those before it, never from one behind it.
FLOORS = [
    ["study.files", "study.families"],
    ["study.methods", "study.teachers"],
    ["study.declarations"],
    ["study.sections"],
    ["study.neighbours_options"],
    ["study.config"],
    ["study.params", "study.revisions", "study.records"],
    ["study.descriptions", "study.records_beside"],
    ["study.plan", "study.runtime"],
    ["study"],
    ["study.execution"],
    ["study.data"],
    ["study.distillation"],
    ["study.evaluation"],
    ["study.neighbours"],
    ["study.analysis"],
    ["study.shipping", "study.new", "study.cells"],
    ["study.grid"],
    ["study.speed"],
    ["study.__main__"],
]
#: Analyses read small files alone; the explorer looks into models.
WITHOUT_MODELS = [path for path in FILES if "analysis" in path.relative_to(ROOT).parts and path.name != "explore.py"]
pytestmark = pytest.mark.fast


def module_of(path: Path) -> str:
    parts = path.relative_to(ROOT).with_suffix("").parts
    return ".".join(parts[:-1] if parts[-1] == "__init__" else parts)


MODULES = {module_of(path): path for path in FILES}


def room_of(module: str) -> str:
    parts = module.split(".")
    return ".".join(parts[:2])


def imports(path: Path) -> Iterator[str]:
    """Modules of the study that a file imports, inside functions too."""
    tree = ast.parse(path.read_text())
    for node in ast.walk(tree):  # what is imported for type checkers alone is not imported
        if isinstance(node, ast.If) and isinstance(node.test, ast.Name) and node.test.id == "TYPE_CHECKING":
            node.body = []
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names if alias.name.split(".")[0] == "study")
        elif isinstance(node, ast.ImportFrom) and node.module and node.module.split(".")[0] == "study":
            for alias in node.names:
                inner = f"{node.module}.{alias.name}"
                yield inner if inner in MODULES else node.module


ARROWS = {module: set(imports(path)) - {module} for module, path in MODULES.items()}


def test_rooms_import_from_rooms_below_them_alone():
    floor = {room: level for level, rooms in enumerate(FLOORS) for room in rooms}
    assert {room_of(module) for module in MODULES} == set(floor)
    upward = {
        f"{module} -> {target}"
        for module, targets in ARROWS.items()
        for target in targets
        if room_of(target) != room_of(module) and floor[room_of(target)] >= floor[room_of(module)]
    }
    assert upward == set()


def test_no_modules_import_each_other_in_a_circle():
    done: set[str] = set()

    def visit(module: str, path: tuple[str, ...]) -> None:
        assert module not in path, " -> ".join([*path[path.index(module) :], module])
        if module not in done:
            for target in sorted(ARROWS[module]):
                visit(target, (*path, module))
            done.add(module)

    for module in MODULES:
        visit(module, ())


def test_losses_and_mappings_import_nothing_of_the_study():
    assert ARROWS["study.distillation.losses"] == ARROWS["study.distillation.mappings"] == set()


@pytest.mark.parametrize("path", WITHOUT_MODELS, ids=lambda path: path.stem)
def test_analyses_import_neither_training_nor_torch(path):
    rooms = {room_of(target) for target in imports(path)}
    assert not rooms & {"study.data", "study.distillation", "study.evaluation", "study.neighbours", "study.speed"}
    names = {
        alias.name.split(".")[0]
        for node in ast.walk(ast.parse(path.read_text()))
        if isinstance(node, ast.Import)
        for alias in node.names
    }
    names |= {
        node.module.split(".")[0]
        for node in ast.walk(ast.parse(path.read_text()))
        if isinstance(node, ast.ImportFrom) and node.module
    }
    assert not names & {"torch", "transformers", "datasets"}


@pytest.mark.parametrize("path", FILES, ids=lambda path: str(path.relative_to(PACKAGE)))
def test_files_and_functions_are_short(path):
    assert len(path.read_text().splitlines()) <= 450
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.FunctionDef):
            assert node.end_lineno - node.lineno < 80, f"{node.name} has {node.end_lineno - node.lineno + 1} lines"
