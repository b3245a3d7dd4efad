"""README states what committed results state, and its links lead somewhere."""

from __future__ import annotations

import csv
import re
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
TABLES = ROOT / "profiles" / "overnight" / "reports" / "comparison"
README = (ROOT / "README.md").read_text()
PAGES = [ROOT / "README.md", ROOT / "CONTRIBUTING.md", *sorted((ROOT / "docs").glob("*.md"))]
KEPT = re.findall(r"^\| (\w+), `([\w-]+)` \| `([\w+-]+)`.* \| ([\d.]+) % \| ([\d.]+) % \| ([\d.]+) x \|$", README, re.M)
VERDICTS = re.findall(r"^\| (D\d): .* \| (\w+) \| (\w+) \|$", README, re.M)


def rows(setting: str, table: str) -> list[dict[str, str]]:
    with (TABLES / setting / f"{table}.csv").open(newline="") as file:
        return list(csv.DictReader(file))


def test_readme_states_what_students_keep() -> None:
    assert len(KEPT) == README.count(" x |\n") > 0
    for setting, student, method, kept, floor, speed_up in KEPT:
        retained = {r["method"]: r["retained_percent"] for r in rows(setting, "per_task") if r["student"] == student}
        faster = {r["student"]: float(r["speed_up_batch_1"]) for r in rows(setting, "costs")}
        stated = (retained[method], retained["none"], f"{faster[student]:.1f}")
        assert (kept, floor, speed_up) == stated, (setting, student, method)


def test_rows_are_what_readme_calls_them() -> None:
    for setting, student, method, *_ in KEPT:
        line = next(r for r in README.splitlines() if r.startswith(f"| {setting}, `{student}` | `{method}`"))
        table = [r for r in rows(setting, "per_task") if r["student"] == student]
        chosen = next(r["method"] for r in table if r["selected"] == "True")
        best = max(table, key=lambda r: float(r["retained_percent"]))["method"]
        assert ("chosen on development data" in line) == (method == chosen), line
        assert ("best on test data" in line) <= (method == best), line


def test_readme_states_the_regret_of_english_development_data() -> None:
    (stated,) = re.findall(r"keeps ([\d.]+) % of the teacher's score less than the best method", README)
    picks = {(r["student"], r["rule"]): r for r in rows("multilingual", "selection")}
    assert picks["L3-H384", "development"]["method"] == "od" and picks["L3-H384", "development"]["regret"] == stated
    assert float(picks["L3-H384", "retrieval"]["regret"]) < 1 and float(picks["L4-H192", "retrieval"]["regret"]) < 1


def test_readme_is_short_and_its_first_command_is_near_the_top() -> None:
    lines = README.splitlines()
    assert len(lines) <= 110 and len(README.split()) <= 1000
    assert next(place for place, line in enumerate(lines, start=1) if line.startswith("make ")) < 30


def test_readme_states_every_verdict() -> None:
    english = {r["claim"]: r["verdict"] for r in rows("english", "verdicts")}
    multilingual = {r["claim"]: r["verdict"] for r in rows("multilingual", "verdicts")}
    assert {c: (e, m) for c, e, m in VERDICTS} == {c: (english[c], multilingual[c]) for c in english}


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_links_lead_somewhere(page: Path) -> None:
    for link in re.findall(r"\]\(([^)#\s]+)\)", page.read_text()):
        assert link.startswith("https://") or (page.parent / link).exists(), link
