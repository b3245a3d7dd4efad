"""The study's commands, as called by the Makefile and by dvc.yaml.

python -m study check                     validate params.yaml
python -m study use PROFILE               write a profile's values into params.yaml
python -m study run NOTEBOOK -p KEY VALUE execute a notebook with parameters
python -m study cells SETTING             print method and student of what `make tune` tries
python -m study tuned                     print the learning rates that reports/tuning speaks for
python -m study fingerprint STAGE OUTPUT  write down the code and parameters that a stage of dvc.yaml depends on
python -m study report                    turn the executed comparison into the HTML report
"""

from __future__ import annotations

import argparse
import hashlib
import itertools
import json
import os
import sys
from collections import defaultdict
from pathlib import Path

from ruamel.yaml import YAML

from study.config import StudyError, find_root, load_params, use_profile
from study.lockfile import check_lock, switch_lock


def run_notebook(notebook: Path, executed: Path, parameters: dict) -> None:
    """Execute a copy of ``notebook`` with papermill, in the folder ``notebooks/``, and keep it at ``executed``.

    What its cells print appears here as it is printed.

    Raises:
        StudyError: no such notebook, a parameter its ``parameters`` cell does not have, or a failure inside it (for a
            StudyError in there its own line, else the exception and where the executed copy with the traceback is).
    """
    import nbformat
    import papermill
    from nbclient.exceptions import DeadKernelError
    from papermill.translators import PythonTranslator

    if not notebook.is_file():
        raise StudyError(f"{notebook}: no such notebook")
    cells = nbformat.read(notebook, as_version=4).cells
    declared = [cell for cell in cells if "parameters" in cell.metadata.get("tags", [])]
    known = [parameter.name for cell in declared for parameter in PythonTranslator.inspect(cell)]
    for name in parameters:
        if name not in known:
            raise StudyError(f"{notebook.name}: parameter {name!r} is unknown; allowed: {', '.join(known)}")
    try:
        executed.parent.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise StudyError(f"{executed.parent}: cannot be written ({error.strerror})") from None
    os.environ.update(
        TRANSFORMERS_VERBOSITY="error", HF_HUB_DISABLE_PROGRESS_BARS="1", HF_DATASETS_DISABLE_PROGRESS_BARS="1"
    )
    try:
        papermill.execute_notebook(
            str(notebook),
            str(executed),
            parameters=parameters,
            kernel_name="python3",
            language="python",
            cwd=str(find_root() / "notebooks"),
            progress_bar=False,
            stdout_file=sys.stdout,
            stderr_file=sys.stderr,
            extra_arguments=["--IPKernelApp.log_level=50"],
            shutdown_kernel="immediate",  # all is written by then; being asked, a kernel takes seconds to end
        )
    except papermill.PapermillExecutionError as error:
        reason = error.evalue if error.ename == "StudyError" else f"{error.ename}: {error.evalue} (see {executed})"
        raise StudyError(reason) from None
    except DeadKernelError:
        raise StudyError(f"{notebook.name}: the notebook's process was killed (often: not enough memory)") from None


def fingerprint(root: Path, stage: str) -> dict:
    """What a stage of dvc.yaml depends on: ``files`` with their SHA-256, ``parameters`` with their values.

    A folder stands for the Python files below it.

    Raises:
        StudyError: dvc.yaml has no such stage, or a dependency or parameter of it does not exist.
    """
    stages = YAML(typ="safe").load(root / "dvc.yaml")["stages"]
    if stage not in stages:
        raise StudyError(f"dvc.yaml: stage {stage!r} is unknown; allowed: {', '.join(stages)}")
    files, parameters = [], {}
    for path in (root / name for name in stages[stage]["deps"]):
        found = sorted(path.rglob("*.py")) if path.is_dir() else [path] if path.is_file() else []
        if not found:
            raise StudyError(f"dvc.yaml: stage {stage!r} depends on {path.relative_to(root)}, which does not exist")
        files += found
    params = YAML(typ="safe").load(root / "params.yaml")
    for key in stages[stage]["params"]:
        value = params
        for part in key.split("."):
            if part not in value:
                raise StudyError(f"dvc.yaml: stage {stage!r} reads {key}, which params.yaml does not have")
            value = value[part]
        parameters[key] = value
    digests = {str(file.relative_to(root)): hashlib.sha256(file.read_bytes()).hexdigest() for file in files}
    return {"files": digests, "parameters": parameters}


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(
        prog="python -m study", description=__doc__, formatter_class=argparse.RawTextHelpFormatter
    )
    commands = parser.add_subparsers(dest="command", required=True)
    commands.add_parser("check", help="validate params.yaml")
    commands.add_parser("use", help="switch to a profile").add_argument("profile")
    run = commands.add_parser("run", help="execute a notebook")
    run.add_argument("notebook", type=Path)
    run.add_argument("--executed", type=Path, help="where the executed copy goes (default: scratch/notebooks/)")
    run.add_argument("-p", dest="parameters", nargs=2, metavar=("KEY", "VALUE"), action="append", default=[])
    cells = commands.add_parser("cells", help="print the methods and students of a setting that `make tune` tries")
    cells.add_argument("setting")
    commands.add_parser("tuned", help="print the learning rates chosen by `make tune`")
    written = commands.add_parser("fingerprint", help="write down the code and parameters that a stage depends on")
    written.add_argument("stage")
    written.add_argument("output", type=Path)
    commands.add_parser("report", help="write the HTML report")
    options = parser.parse_args(arguments)
    try:
        if options.command == "use":
            use_profile(options.profile)
        params = load_params()
        if options.command == "use":
            switch_lock(find_root(), params.profile)
        if options.command == "check":
            check_lock(find_root(), params.profile)
        if options.command in ("use", "check"):
            print(f"params.yaml is valid (profile {params.profile})")
        elif options.command == "run":
            executed = options.executed or find_root() / "scratch" / "notebooks" / options.notebook.name
            values = {key: YAML(typ="safe").load(value) for key, value in options.parameters}
            run_notebook(options.notebook, executed, values)
        elif options.command == "cells":
            trained = [name for name in params.grid.methods if params.methods[name].objective != "none"]
            students = params.tuning.students.get(options.setting)
            if not students:
                known = ", ".join(name for name, own in params.tuning.students.items() if own)
                raise StudyError(f"tuning.students: setting {options.setting!r} has none; allowed: {known}")
            cells = itertools.product(trained, students)
            print("\n".join(f"{method} {student}" for method, student in cells))
        elif options.command == "tuned":
            from study.training.tune import choose

            together = defaultdict(list)
            for file in sorted((find_root() / "reports" / "tuning").glob("*/*.json")):
                record = json.loads(file.read_text())
                tuned = params.students.get(record["student"])
                alone = f"students.{record['student']}.learning_rates.{{}}" if tuned and tuned.learning_rates else None
                together[alone or "methods.{}.learning_rate"].append(record)
            for key, records in together.items():
                for method, rate in choose(records).items():
                    print(f"{key.format(method)}: {rate}")
        elif options.command == "fingerprint":
            from study.files import write_json

            write_json(options.output, fingerprint(find_root(), options.stage))
        elif options.command == "report":
            from study.analysis.report import write_report

            print(f"report: {write_report(params, find_root())}")
    except StudyError as error:
        print(f"error: {error}", file=sys.stderr, flush=True)
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())
