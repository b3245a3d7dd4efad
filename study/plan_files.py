"""The plan as files: a description for each stage, and the list that dvc.yaml repeats its stages for."""

from __future__ import annotations

import io
import os
import re
from pathlib import Path
from typing import Any

from ruamel.yaml import YAML

from study.descriptions import Admission, Comparison, Evaluation, NeighbourSystem, ReferenceModel, Run, with_hashes
from study.files import Layout, StudyError, tuning_folder, write_file
from study.neighbours_options import NOTEBOOKS
from study.plan import Plan

LIST = "plan.yaml"
#: Analysis -> what it reads: its folders in plan/ and in reports/; None: of all others.
READ: dict[str | None, tuple[str, str]] = {None: ("compare", "results"), "neighbours": ("neighbours", "systems")}


def write_plan(plan: Plan, listed: bool = False) -> int:
    """Write every description to ``plan/<stage>/<name>.json`` of the profile's folder, and the list of them for DVC.

    Files that have their content already are left alone, descriptions that the plan no longer has are deleted, and
    dvc.yaml is linked into the folder of a profile that lacks it.

    Args:
        listed: write descriptions alone, for a list (plan.yaml) that has to be right already.

    Returns:
        The number of descriptions.

    Raises:
        StudyError: the list is not right, dvc.lock belongs to another profile, or a file cannot be written.
    """
    content = _list(plan)
    path = plan.folder / LIST
    if listed and (not path.is_file() or path.read_text() != content):
        raise StudyError(
            f"{path.relative_to(plan.root)} does not list the runs that params.yaml asks for; run"
            f" `python -m study plan {plan.profile}`"
        )
    _check_lock(plan)
    described = [with_hashes(d, plan.root) for d in plan.descriptions]
    files = {plan.folder / "plan" / d.stage / f"{d.name}.json": d for d in described}
    for file, description in files.items():
        _update(file, description.model_dump_json(indent=1) + "\n")
    for file in set((plan.folder / "plan").glob("*/*.json")) - files.keys():
        file.unlink()
    _update(path, content)
    link = plan.folder / "dvc.yaml"
    target = Path(*[".."] * len(plan.folder.relative_to(plan.root).parts), "dvc.yaml")
    if not link.exists() or link.read_text() == target.as_posix():  # some unpack a link as a file with its target
        link.unlink(missing_ok=True)
        link.symlink_to(target)
    return len(files)


def _list(plan: Plan) -> str:
    """What dvc.yaml repeats its stages for, as the text of plan.yaml."""
    here = plan.folder.relative_to(plan.root)
    root = "/".join([".."] * len(here.parts)) or "."
    evaluated = {}
    for one in plan.of(Evaluation):
        layout = Layout(here, one.setting)
        model = one.folder(layout).relative_to(layout.runs).as_posix()
        evaluated[one.name] = {"setting": one.setting, "model": one.model, "folder": model}
    systems = {
        one.name: {
            "setting": one.setting,
            "name": one.neighbour,
            "notebook": NOTEBOOKS[one.options.system],
            "model": one.folder(layout).relative_to(layout.runs).as_posix(),
        }
        for one in plan.of(NeighbourSystem)
        for layout in [Layout(here, one.setting)]
    }
    rates = os.path.relpath(tuning_folder(plan.folder, plan.root), plan.folder)
    values = {
        "profile": plan.profile,
        "here": here.as_posix(),
        "root": root,
        "prepared": list(plan.params.grid.settings),
        "admitted": [admission.setting for admission in plan.of(Admission)],
        "referenced": {r.name: {"setting": r.setting, "model": r.model} for r in plan.of(ReferenceModel)},
        "distilled": {run.name: {"setting": run.setting, "model": run.model} for run in plan.of(Run)},
        "evaluated": evaluated,
        "analyses": {
            f"{analysis}_{setting}": {"analysis": analysis, "setting": setting, "notebook": notebook}
            | dict(zip(("plan", "results"), READ.get(analysis, READ[None]), strict=True))
            | {"beside": f"reports/results/{setting}" if analysis == "neighbours" else rates}
            for comparison in plan.of(Comparison)
            for setting in [comparison.setting]
            for analysis, notebook in plan.analyses(setting).items()
        },
        "systems": systems,
    }
    yaml: Any = YAML(typ="safe")
    stream = io.StringIO()
    yaml.sort_base_mapping_type_on_output = False
    yaml.width = 200
    yaml.dump(values, stream)
    return (
        f"# What dvc.yaml repeats its stages for; `python -m study plan {plan.profile}` writes it.\n{stream.getvalue()}"
    )


def _check_lock(plan: Plan) -> None:
    lock = plan.folder / "dvc.lock"
    if not lock.is_file():
        return
    stated = re.search(r"study plan --listed ([\w.-]+)", " ".join(lock.read_text().split()))
    if stated and stated[1] != plan.profile:
        raise StudyError(
            f"{lock.relative_to(plan.root)} belongs to profile {stated[1]!r}; allowed: that of {plan.profile!r} (delete"
            " it to run everything anew)"
        )


def _update(file: Path, content: str) -> None:
    if not file.is_file() or file.read_text() != content:
        write_file(file, content)
