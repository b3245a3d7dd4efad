"""The study's commands, as called by the Makefile and by dvc.yaml.

python -m study check [PROFILE]           validate params.yaml
python -m study new NAME --teacher T --text X --task Y   write a profile: a study of one's own
python -m study plan [PROFILE]            write the descriptions of a profile's stages, and the list of them
python -m study run NOTEBOOK -p KEY VALUE execute a notebook with parameters
python -m study tunings [PROFILE]         print the descriptions of what `make tune` tries
python -m study tuned [PROFILE]           print the learning rates that reports/tuning speaks for
python -m study cells [PROFILE]           print what is stale, or commands that run it on any engine
python -m study grid [PROFILE]            run what is stale on a Ray cluster, and put it on record
python -m study distil DESCRIPTION        train one student, by as many processes as torchrun starts
python -m study report [PROFILE]          turn the executed analyses into the HTML report
python -m study students [PROFILE]        print the students that the report recommends
python -m study export RUN [--format F]   write a trained student as programs load it, with its card
"""

from __future__ import annotations

import argparse
import sys
from pathlib import Path
from typing import Any

from ruamel.yaml import YAML
from ruamel.yaml.error import YAMLError

from study.descriptions import own_data
from study.execution import be_quiet, declared_parameters, end_with_starter, run_notebook, take_one_gpu, unchanged
from study.files import DEFAULT_PROFILE, StudyError, find_root, tuning_folder
from study.plan import resolve, write_plan
from study.teachers import EMBEDDED_SIZES


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
    plan = resolve(options.profile)
    names = {plan.params.settings[setting].teacher.name for setting in plan.params.grid.settings}
    if names - EMBEDDED_SIZES.keys():  # else nothing heavy is loaded
        from study.data.teachers import check_teachers

        for note in check_teachers(plan.params, plan.root):
            print(f"note: {note}")
    if any(own_data(description) for description in plan.descriptions):
        from study.data.examine import check_data

        print("\n".join(check_data(plan)))
    print(f"params.yaml is valid (profile {options.profile})")


def _new(options: argparse.Namespace) -> None:
    from study.new import new_study

    path, data = new_study(options.name, options.teacher, options.text, options.task, options.language, options.student)
    print("\n".join([f"written: {path.relative_to(find_root())}", *data]))
    print(f"next: make repro PROFILE={options.name} (deleting profiles/{options.name} undoes it)")


def _plan(options: argparse.Namespace) -> None:
    count = write_plan(resolve(options.profile), options.listed)
    print(f"plan: {count} descriptions of profile {options.profile}")


def _run(options: argparse.Namespace) -> None:
    executed = options.executed or find_root() / "scratch" / "notebooks" / options.notebook.name
    end_with_starter()
    known = declared_parameters(options.notebook) if options.parameters else {}
    values = {key: _value(key, text, known.get(key, "")) for key, text in options.parameters}
    run_notebook(options.notebook, executed, values)


def _value(key: str, text: str, default: str) -> Any:
    """What is given for a parameter: text where its default is text, else a YAML value."""
    if default.startswith(("'", '"')):
        return text
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


def _cells(options: argparse.Namespace) -> None:
    from study.cells import Cells

    cells = Cells(resolve(options.profile))
    if options.record:
        with cells.alone():
            recorded, refused = cells.record()
        print("\n".join(f"on record: {name}" for name in recorded) or "nothing finished since the last time")
        if refused:
            raise StudyError("; ".join(f"run {name} again: {why}" for name, why in refused.items()))
        return
    ready, waiting = (cells.all(options.stage), []) if options.all else cells.ready(options.stage)
    if options.commands:
        print("".join(f"{cells.command(stage)}\n" for stage in ready), end="")
    else:
        print("".join(f"{stage.name} {cells.state(stage)}\n" for stage in ready), end="")
    if waiting:
        print(f"{len(waiting)} more wait for these or others to be on record", file=sys.stderr)


def _grid(options: argparse.Namespace) -> None:
    from study.cells import Cells
    from study.grid import Request, run_grid

    end_with_starter()
    run_grid(Cells(resolve(options.profile)), Request(options.cpus, options.gpus, options.address or None))


def _distil(options: argparse.Namespace) -> None:
    be_quiet()
    take_one_gpu()
    from study.descriptions import Run, open_description, runs_beside
    from study.distillation import processes
    from study.distillation.distil import distil

    end_with_starter()
    with processes.one_voice():
        processes.join()
        run, layout = open_description(options.description, Run)
        output = options.output or layout.student(run.model)
        with unchanged(options.description):
            distil(run, layout, output, runs_beside(options.description))
        print(f"distil: {output}")
        processes.leave()


def _report(options: argparse.Namespace) -> None:
    from study.analysis.report import write_report

    print(f"report: {write_report(resolve(options.profile))}")


def _export(options: argparse.Namespace) -> None:
    take_one_gpu()
    from study.shipping.export import export

    plan = resolve(options.profile)
    if options.task:
        if options.keep_pieces_from:
            raise StudyError("--keep-pieces-from: classifiers keep their vocabulary; allowed: without --task")
        from study.shipping.classifier import export_classifier

        print(f"export: {export_classifier(plan, options.name, options.task, options.format, options.to)}")
        return
    print(f"export: {export(plan, options.name, options.format, options.to, options.keep_pieces_from)}")


def _students(options: argparse.Namespace) -> None:
    from study.shipping.recommended import recommended

    for run, seconds, sure in recommended(resolve(options.profile)):
        note = "recommended" if sure else "the best of its size, not recommended"
        print(f"{run.name}: {note}; its training took {seconds / 60:.1f} minutes", file=sys.stderr)
        print(run.name)


COMMANDS = {"check": _check, "plan": _plan, "run": _run, "tunings": _tunings, "tuned": _tuned, "report": _report}
COMMANDS |= {"cells": _cells, "grid": _grid, "distil": _distil, "export": _export, "new": _new, "students": _students}


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
        "cells": "print the stale stages that can run now, or their commands",
        "grid": "run the stale stages as tasks of Ray (docs/cluster.md)",
        "students": "print the runs of the students that the report recommends",
    }
    for name, text in helps.items():
        command = commands.add_parser(name, help=text)
        command.add_argument("profile", nargs="?", default=DEFAULT_PROFILE, help="a folder of profiles/ (laptop: none)")
        if name == "cells":
            command.add_argument("--commands", action="store_true", help="one a line, for the study's folder")
            command.add_argument("--record", action="store_true", help="put what has finished on record (one process)")
            command.add_argument("--stage", metavar="KIND", help="of one kind alone: tasks, corpus, ..., report")
            command.add_argument("--all", action="store_true", help="what is not stale, too")
        if name == "grid":
            command.add_argument(
                "--cpus", type=int, default=1, help="of a task, which are its threads too (default: 1)"
            )
            command.add_argument(
                "--gpus",
                type=float,
                help="of a task with models: 0 to 1, or n to train by n processes (default: 1)",
            )
            command.add_argument("--address", help="auto or host:port of a running Ray (default: one of this machine)")
        if name == "plan":
            command.add_argument("--listed", action="store_true", help="descriptions alone: plan.yaml must be right")
    run = commands.add_parser("run", help="execute a notebook")
    run.add_argument("notebook", type=Path)
    run.add_argument("--executed", type=Path, help="where the executed copy goes (default: scratch/notebooks/)")
    run.add_argument("-p", dest="parameters", nargs=2, metavar=("KEY", "VALUE"), action="append", default=[])
    trained = commands.add_parser("distil", help="train one student as its description says")
    trained.add_argument("description", type=Path, help="plan/distill/RUN.json of a profile's folder")
    trained.add_argument("--output", type=Path, help="the student's folder (default: where the pipeline has it)")
    made = commands.add_parser("new", help="write a profile: a study of one's own")
    made.add_argument("name")
    made.add_argument("--teacher", required=True, help="an embedded one, or a folder")
    made.add_argument("--text", action="append", required=True, help="a name, 'files/*.txt' or '{files: ..., ...}'")
    made.add_argument("--task", action="append", required=True, help="a name, or 'name={files: ..., ...}'")
    made.add_argument("--language", default="en", help="of texts and tasks that do not say theirs (default: en)")
    made.add_argument("--student", help="a name under `students` (default: the first that fits the teacher)")
    shipped = commands.add_parser("export", help="write a trained student as programs load it")
    shipped.add_argument(
        "name", metavar="RUN", help="<setting>_<method>_<student>_<seed>, then the budget if not the base"
    )
    shipped.add_argument("--profile", default=DEFAULT_PROFILE)
    shipped.add_argument(
        "--format",
        default="transformers",
        help="transformers, sentence-transformers, onnx, onnx-int8, onnx-int8-static, openvino",
    )
    shipped.add_argument("--to", type=Path, help="a new or empty folder (default: exports/RUN/FORMAT)")
    shipped.add_argument("--keep-pieces-from", type=Path, metavar="TEXTS", help="trim the vocabulary to these texts")
    shipped.add_argument("--task", help="fine-tune on this task and write the classifier, with its labels")
    return parser


if __name__ == "__main__":
    sys.exit(main())
