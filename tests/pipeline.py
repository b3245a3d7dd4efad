"""A clone of the study with the parameters of the fixtures, and commands in it: for the tests of the pipeline."""

from __future__ import annotations

import json
import os
import re
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path

ROOT = Path(__file__).parents[1]
FIXTURES = Path(__file__).parent / "fixtures"


def command(folder: Path, *arguments: str, seconds: int = 60, **environment: str) -> subprocess.CompletedProcess:
    """Run a command in a folder of a clone (the first folder upward with study/ in it lends its code)."""
    path = os.pathsep.join([str(Path(sys.executable).parent), os.environ["PATH"]])
    root = next((above for above in (folder, *folder.parents) if (above / "study").is_dir()), folder)
    variables = os.environ | {"PATH": path, "PYTHONPATH": str(root), **environment}
    variables.pop("PYTHONDONTWRITEBYTECODE", None)  # as for most users: bytecode is left beside the code
    return subprocess.run(arguments, cwd=folder, env=variables, capture_output=True, text=True, timeout=seconds)


def clone(folder: Path) -> None:
    """The files of a fresh clone if everything here were committed now: parameters of the fixtures, no results."""
    with tempfile.TemporaryDirectory() as empty:  # a repository of its own, since the files may be from a ZIP
        assert command(ROOT, "git", "init", "--quiet", "--bare", empty).returncode == 0
        here = ["git", "--git-dir", empty, "--work-tree", str(ROOT)]
        listed = command(ROOT, *here, "ls-files", "-o", "--exclude-standard").stdout.splitlines()
    for name in listed:
        made = re.match(r"(profiles/\w+/)?(reports/(?!tuning/)|dvc\.lock|plan\.yaml)", name)
        other = name.startswith("profiles/") and not name.startswith("profiles/smoke/")
        source, target = ROOT / name, folder / name
        if (source.is_file() or source.is_symlink()) and not made and not other:
            target.parent.mkdir(parents=True, exist_ok=True)
            shutil.copy(source, target, follow_symlinks=False)
    shutil.copy(FIXTURES / "params.yaml", folder / "params.yaml")
    shutil.copy(FIXTURES / "smoke.yaml", folder / "profiles" / "smoke" / "params.yaml")
    for profile in ("laptop", "smoke"):
        assert command(folder, sys.executable, "-m", "study", "plan", profile).returncode == 0
    for arguments in (["init", "--quiet"], ["add", "--all"]):
        assert command(folder, "git", *arguments).returncode == 0
    identity = ["-c", "user.name=tester", "-c", "user.email=tester@localhost", "-c", "commit.gpgsign=false"]
    assert command(folder, "git", *identity, "commit", "--quiet", "--no-verify", "-m", "all").returncode == 0


def stages(folder: Path) -> list[str]:
    """Names of all stages of a profile's folder."""
    outcome = command(folder, "dvc", "stage", "list", "--name-only", seconds=300)
    assert outcome.returncode == 0, outcome.stderr
    return outcome.stdout.split()


def stages_run(outcome: subprocess.CompletedProcess) -> list[str]:
    """Names of the stages that a `dvc repro` ran."""
    return re.findall(r"Running stage '([^']+)'", outcome.stdout)


def stale(folder: Path) -> set[str]:
    """Names of the stages that `dvc repro` would run, those behind others left out."""
    outcome = command(folder, "dvc", "status", "--json", "dvc.yaml", seconds=300)
    assert outcome.returncode == 0, outcome.stderr
    return {name.rpartition(":")[2] for name in json.loads(outcome.stdout)}


def files_below(folder: Path) -> dict[str, bytes]:
    """Every file of a folder by its relative name."""
    return {str(path.relative_to(folder)): path.read_bytes() for path in sorted(folder.rglob("*")) if path.is_file()}
