"""dvc.lock: every profile's stages are kept, word for word, and the active one's are where DVC looks for them."""

from __future__ import annotations

import re
import shutil
from pathlib import Path

import pytest
from ruamel.yaml import YAML

from study.__main__ import main
from study.config import StudyError, load_params
from study.lockfile import check_lock, switch_lock

ROOT = Path(__file__).parents[1]
PROFILES = sorted(path.stem for path in (ROOT / "profiles").glob("*.yaml"))
SHARED = "  params:\n    cmd: check\n  notebooks:\n    cmd: >-\n      copy\n      them"


def cell(profile: str, name: str = "distill", score: int = 1) -> str:
    stage = f"{name}@{profile}-english-hs-uniform+last-L3-H192-1"
    return f"  {stage}:\n    cmd: run\n    outs:\n    - path: x\n      size: {score}"


def lock(*entries: str) -> str:
    return "\n".join(["schema: '2.0'", "stages:", *entries, ""])


@pytest.fixture
def folder(tmp_path):
    (tmp_path / "profiles").mkdir()
    for name in PROFILES:
        (tmp_path / "profiles" / f"{name}.yaml").touch()
    return tmp_path


def files(folder: Path) -> dict[str, str]:
    return {path.name: path.read_text() for path in sorted(folder.rglob("*.lock"))}


def test_the_active_profile_is_in_dvc_lock_and_every_other_waits(folder):
    sources = "  sources@overnight:\n    cmd: run"
    (folder / "dvc.lock").write_text(lock(SHARED, cell("smoke"), sources, cell("laptop"), cell("overnight")))
    switch_lock(folder, "laptop")
    expected = {
        "dvc.lock": lock(SHARED, cell("laptop")),
        "overnight.lock": lock(sources, cell("overnight")),
        "smoke.lock": lock(cell("smoke")),
    }
    assert files(folder) == expected
    switch_lock(folder, "laptop")
    assert files(folder) == expected  # again: nothing
    switch_lock(folder, "overnight")
    assert files(folder) == {
        "dvc.lock": lock(SHARED, sources, cell("overnight")),
        "laptop.lock": lock(cell("laptop")),
        "smoke.lock": lock(cell("smoke")),
    }
    switch_lock(folder, "laptop")
    assert files(folder) == expected


def test_what_dvc_lock_says_is_newer_and_what_it_does_not_say_is_kept(folder):
    """As after a switch that was interrupted before the waiting copy was removed."""
    (folder / "dvc.lock").write_text(lock(cell("laptop", score=2)))
    (folder / "profiles" / "laptop.lock").write_text(lock(cell("laptop"), cell("laptop", "evaluate")))
    switch_lock(folder, "laptop")
    assert files(folder) == {"dvc.lock": lock(cell("laptop", score=2), cell("laptop", "evaluate"))}


def test_without_dvc_lock_there_is_nothing_to_move(folder):
    switch_lock(folder, "smoke")
    assert files(folder) == {}


@pytest.mark.parametrize(
    ("text", "told"),
    [
        ("stages:\n", "line 1 = 'stages:'; allowed: \"schema: '2.0'\""),
        ("schema: '2.0'\n", None),
        (lock(cell("laptop"), "<<<<<<< HEAD", cell("laptop", "evaluate")), "line 8 = '<<<<<<< HEAD'; allowed: '  '"),
    ],
)
def test_what_is_no_lock_file_of_dvc_is_one_line_and_stays_as_it_was(folder, text, told):
    (folder / "profiles" / "smoke.lock").write_text(lock(cell("smoke")))
    (folder / "dvc.lock").write_text(text)
    before = files(folder)
    if told:
        with pytest.raises(StudyError, match=re.escape(f"dvc.lock: {told}")):
            switch_lock(folder, "smoke")
        assert files(folder) == before
    else:
        switch_lock(folder, "smoke")
        assert files(folder) == {"dvc.lock": lock(cell("smoke"))}


def test_a_profile_whose_stages_still_wait_is_not_run(folder):
    check_lock(folder, "laptop")
    (folder / "profiles" / "laptop.lock").write_text(lock(cell("laptop")))
    check_lock(folder, "overnight")
    with pytest.raises(StudyError, match="profiles/laptop.lock .* `make profile PROFILE=laptop`"):
        check_lock(folder, "laptop")


def test_the_studys_own_lock_files_go_round_all_profiles_and_lose_nothing(tmp_path, monkeypatch, capsys):
    """By the command, and read as YAML before and after."""
    for name in ("params.yaml", "dvc.yaml", "dvc.lock"):
        shutil.copy(ROOT / name, tmp_path)
    shutil.copytree(ROOT / "profiles", tmp_path / "profiles")
    monkeypatch.chdir(tmp_path)
    active = load_params(tmp_path / "params.yaml").profile

    def states() -> dict[str, dict]:
        read = YAML(typ="safe", pure=False)
        return {name: read.load(text)["stages"] for name, text in files(tmp_path).items()}

    before, texts = states(), files(tmp_path)
    waiting = [name for name in PROFILES if f"{name}.lock" in before]
    assert waiting and active not in waiting and len(before["dvc.lock"]) > 50
    assert main(["use", waiting[0]]) == 0
    after = states()
    assert f"{waiting[0]}.lock" not in after
    assert {k: v for own in after.values() for k, v in own.items()} == {
        k: v for own in before.values() for k, v in own.items()
    }
    assert not any(f"@{active}" in stage for stage in after["dvc.lock"])
    assert set(before[f"{waiting[0]}.lock"]) <= set(after["dvc.lock"])
    assert main(["use", active]) == 0
    assert files(tmp_path) == texts
    shutil.copy(tmp_path / "dvc.lock", tmp_path / "profiles" / f"{active}.lock")
    capsys.readouterr()
    assert main(["check"]) == 1
    outcome = capsys.readouterr()
    assert len(outcome.err.splitlines()) == 1 and f"profiles/{active}.lock" in outcome.err
