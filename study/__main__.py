"""The study's commands, as called by the Makefile and by dvc.yaml.

python -m study check [PROFILE]           validate params.yaml
python -m study plan [PROFILE]            write the descriptions of a profile's stages, and the list of them
python -m study run NOTEBOOK -p KEY VALUE execute a notebook with parameters
python -m study tunings [PROFILE]         print the descriptions of what `make tune` tries
python -m study tuned [PROFILE]           print the learning rates that reports/tuning speaks for
python -m study report [PROFILE]          turn the executed analyses into the HTML report
python -m study export RUN [--format F]   write a trained student as programs load it, with its card
"""

from __future__ import annotations

import argparse
import sys
from pathlib import Path
from typing import Any

from ruamel.yaml import YAML
from ruamel.yaml.error import YAMLError

from study.execution import end_with_starter, run_notebook
from study.files import DEFAULT_PROFILE, StudyError, find_root, tuning_folder
from study.plan import resolve, write_plan


def main(arguments: list[str] | None = None) -> int:
    """Run one command; the exit code is 1 after a mistake that a user can mend, which is told in one line."""
    options = _parser().parse_args(arguments)
    try:
        COMMANDS[options.command](options)
    except StudyError as error:
        print(f"error: {error}", file=sys.stderr, flush=True)
        return 1
    except OSError as error:  # a full disk, a folder that cannot be written
        print(f"error: {error.filename or options.command}: {error.strerror or error}", file=sys.stderr, flush=True)
        return 1
    return 0


def _check(options: argparse.Namespace) -> None:
    resolve(options.profile)
    print(f"params.yaml is valid (profile {options.profile})")


def _plan(options: argparse.Namespace) -> None:
    count = write_plan(resolve(options.profile), options.listed)
    print(f"plan: {count} descriptions of profile {options.profile}")


def _run(options: argparse.Namespace) -> None:
    executed = options.executed or find_root() / "scratch" / "notebooks" / options.notebook.name
    end_with_starter()
    run_notebook(options.notebook, executed, {key: _value(key, text) for key, text in options.parameters})


def _value(key: str, text: str) -> Any:
    try:
        return YAML(typ="safe").load(text)
    except (YAMLError, ValueError):
        raise StudyError(f"parameter {key} = {text!r} is no YAML value; allowed: a number, text or [list]") from None


def _tunings(options: argparse.Namespace) -> None:
    from study.descriptions import Tuning

    plan = resolve(options.profile)
    tunings = plan.of(Tuning)
    if not tunings:
        raise StudyError(f"tuning.students: profile {options.profile} names none in the settings of its grid")
    folder = tuning_folder(plan.folder, plan.root).relative_to(plan.root).as_posix()
    print("\n".join(f"{tuning.setting} {tuning.file} {folder}" for tuning in tunings))


def _tuned(options: argparse.Namespace) -> None:
    from study.evaluation.tune import chosen_rates

    plan = resolve(options.profile)
    for key, rate in chosen_rates(tuning_folder(plan.folder, plan.root), plan.params.students).items():
        print(f"{key}: {rate}")


def _report(options: argparse.Namespace) -> None:
    from study.analysis.report import write_report

    print(f"report: {write_report(resolve(options.profile))}")


def _export(options: argparse.Namespace) -> None:
    from study.shipping.export import export

    print(f"export: {export(resolve(options.profile), options.name, options.format, options.to)}")


COMMANDS = {"check": _check, "plan": _plan, "run": _run, "tunings": _tunings, "tuned": _tuned, "report": _report}
COMMANDS |= {"export": _export}


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="python -m study", description=__doc__, formatter_class=argparse.RawTextHelpFormatter
    )
    commands = parser.add_subparsers(dest="command", required=True)
    helps = {
        "check": "validate params.yaml",
        "plan": "write the descriptions of stages",
        "tunings": "print what `make tune` tries: setting, name of the result file and its folder a line",
        "tuned": "print the learning rates chosen by `make tune`",
        "report": "write the HTML report",
    }
    for name, text in helps.items():
        command = commands.add_parser(name, help=text)
        command.add_argument("profile", nargs="?", default=DEFAULT_PROFILE, help="a folder of profiles/ (laptop: none)")
        if name == "plan":
            command.add_argument("--listed", action="store_true", help="descriptions alone: plan.yaml must be right")
    run = commands.add_parser("run", help="execute a notebook")
    run.add_argument("notebook", type=Path)
    run.add_argument("--executed", type=Path, help="where the executed copy goes (default: scratch/notebooks/)")
    run.add_argument("-p", dest="parameters", nargs=2, metavar=("KEY", "VALUE"), action="append", default=[])
    shipped = commands.add_parser("export", help="write a trained student as programs load it")
    shipped.add_argument(
        "name", metavar="RUN", help="<setting>_<method>_<student>_<seed>, then the budget if not the base"
    )
    shipped.add_argument("--profile", default=DEFAULT_PROFILE)
    shipped.add_argument("--format", default="transformers", help="or sentence-transformers, onnx, onnx-int8")
    shipped.add_argument("--to", type=Path, help="a new or empty folder (default: exports/RUN/FORMAT)")
    return parser


if __name__ == "__main__":
    sys.exit(main())
