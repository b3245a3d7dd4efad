"""What the campaign of kills compares is compared: times aside, a byte, a missing or half a file are found."""

from __future__ import annotations

import json

import pytest
from kill_anywhere import differences

FILES = {
    "runs/english/teacher/model.safetensors": b"weights",
    "reports/results/english/od.json": json.dumps({"loss": 1.5, "seconds": 3, "curve": [{"seconds": 1}]}).encode(),
    "reports/comparison/english/distillation.csv": b"method,seconds,loss\nod,3,1.5\n",
    "runs/notebooks/distill.ipynb": b"{}",
}
CHANGES = {
    "runs/english/teacher/model.safetensors": [(b"Weights", "differs"), (None, "missing")],
    "reports/results/english/od.json": [
        (FILES["reports/results/english/od.json"].replace(b'"seconds": 3', b'"seconds": 4'), None),
        (FILES["reports/results/english/od.json"].replace(b"1.5", b"1.6"), "differs"),
        (b'{"loss": 1.5, "seco', "half-written"),
    ],
    "reports/comparison/english/distillation.csv": [
        (b"method,seconds,loss\nod,4,1.5\n", None),
        (b"method,seconds,loss\nod,3,1.6\n", "differs"),
    ],
    "runs/notebooks/distill.ipynb": [(b"{2}", None)],
    "runs/english/other": [(b"", "is there")],
}


@pytest.mark.parametrize(("name", "content", "told"), [(n, *own) for n, all_own in CHANGES.items() for own in all_own])
def test_a_difference_is_found(tmp_path, name, content, told):
    for study in ("alone", "killed"):
        for file, own in (FILES | {name: content if study == "killed" else FILES.get(name)}).items():
            path = tmp_path / study / "profiles" / "tiny" / file
            path.parent.mkdir(parents=True, exist_ok=True)
            if own is not None:
                path.write_bytes(own)
    found = differences(tmp_path / "alone", tmp_path / "killed")
    assert len(found) == (told is not None) and all(name in line and told in line for line in found), found
