"""What comes from outside is read, never executed: no pickle, no code of a model's folder, every source by checksum."""

from __future__ import annotations

import ast
import json
import re
from pathlib import Path

import pytest
from audit import report

from study.data.sources import SOURCES

ROOT = Path(__file__).parents[2]
NOTEBOOKS = sorted((ROOT / "notebooks").glob("*.ipynb"))
CODE = {path: path.read_text() for path in sorted((ROOT / "study").rglob("*.py"))} | {
    path: "\n".join(
        "".join(cell["source"]) for cell in json.loads(path.read_text())["cells"] if "code" in cell.values()
    )
    for path in NOTEBOOKS
}
EXECUTES = {"pickle", "cPickle", "dill", "cloudpickle", "joblib", "marshal", "shelve"}
CALLS = re.compile(r"torch\.load|read_pickle|allow_pickle\s*=\s*True|trust_remote_code|use_safetensors\s*=\s*False")


@pytest.mark.parametrize("path", CODE, ids=lambda path: str(path.relative_to(ROOT)))
def test_nothing_is_unpickled_and_no_remote_code_is_run(path):
    nodes = list(ast.walk(ast.parse(CODE[path])))
    modules = {alias.name for node in nodes if isinstance(node, ast.Import) for alias in node.names}
    modules |= {node.module or "" for node in nodes if isinstance(node, ast.ImportFrom)}
    assert not {module.split(".")[0] for module in modules} & EXECUTES
    assert not CALLS.search(CODE[path])


def test_every_source_has_a_checksum():
    assert all(re.fullmatch("[0-9a-f]{64}", source.sha256) for source in SOURCES.values())


def test_extracted_models_hold_no_pickle():
    members = [member for source in SOURCES.values() for member in source.members]
    assert not [member for member in members if member.endswith((".pt", ".pth", ".pkl", "pytorch_model.bin"))]


def test_the_audit_tells_vulnerabilities_and_counts_what_was_not_looked_up():
    found = {"id": "PYSEC-2026-1", "fix_versions": ["2.0"], "aliases": [], "description": "..."}
    answer = {
        "dependencies": [
            {"name": "a", "version": "1.0", "vulns": [found]},
            {"name": "b", "version": "1.0", "vulns": []},
            {"name": "c", "skip_reason": "Dependency not found"},
        ]
    }
    assert report(json.dumps(answer)) == [
        "pip-audit: 2 of 3 pinned packages are in the database that was asked",
        "a 1.0: PYSEC-2026-1, mended in 2.0",
    ]
