"""The study's commands, as called by the Makefile and by dvc.yaml: ``python -m study --help`` lists them."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any, NoReturn

from ruamel.yaml import YAML
from ruamel.yaml.error import YAMLError

from study.descriptions import own_data
from study.execution import (
    be_quiet,
    declared_parameters,
    end_with_starter,
    run_notebook,
    take_one_gpu,
    unchanged,
    write_code,
)
from study.files import DEFAULT_PROFILE, StudyError, find_root, own_tuning_folder
from study.plan import resolve, write_plan
from study.teachers import EMBEDDED_SIZES


def main(arguments: list[str] | None = None) -> int:
    """Run one command; the exit code is 1 after a mistake that a user can mend, which is told in one line."""
    options = _parser().parse_args(arguments)
    be_quiet()  # before a command loads the libraries
    try:
        options.run(options)
        return 0
    except StudyError as error:
        problem = str(error)
    except OSError as error:  # a full disk, a folder that cannot be written
        problem = f"{error.filename or options.command}: {error.strerror or error}"
    print(f"error: {problem}", file=sys.stderr, flush=True)
    return 1


def _check(options: argparse.Namespace) -> None:
    """Validate params.yaml."""
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
    """Write a profile: a study of one's own."""
    from study.new import new_study

    path, data = new_study(options.name, options.teacher, options.text, options.task, options.language, options.student)
    print("\n".join([f"written: {path.relative_to(find_root())}", *data]))
    print(f"next: make repro PROFILE={options.name} (deleting profiles/{options.name} undoes it)")


def _plan(options: argparse.Namespace) -> None:
    """Write the descriptions of a profile's stages, and the list of them."""
    plan = resolve(options.profile)
    count = write_plan(plan, options.listed)
    if options.unlock:
        from study.cells import unlock

        unlock(plan)
    print(f"plan: {count} descriptions of profile {options.profile}")


def _run(options: argparse.Namespace) -> None:
    """Execute a notebook with parameters."""
    executed = options.executed or find_root() / "scratch" / "notebooks" / options.notebook.name
    end_with_starter()
    known = declared_parameters(options.notebook) if options.parameters else {}
    values = {key: _value(key, text, known.get(key, "")) for key, text in options.parameters}
    run_notebook(options.notebook, executed, values)


def _code(options: argparse.Namespace) -> None:
    """Keep the code of notebooks alone: what expensive stages depend on."""
    write_code(options.notebooks, options.folder)


def _value(key: str, text: str, default: str) -> Any:
    """What is given for a parameter: text where its default is text, else a YAML value."""
    if default.startswith(("'", '"')):
        return text
    try:
        return YAML(typ="safe").load(text)
    except (YAMLError, ValueError):
        raise StudyError(f"parameter {key} = {text!r} is no YAML value; allowed: a number, text or [list]") from None


def _tunings(options: argparse.Namespace) -> None:
    """Print what `make tune` tries: setting, name of the result file and its folder a line."""
    from study.descriptions import Tuning

    plan = resolve(options.profile)
    tunings = plan.of(Tuning)
    if not tunings:
        raise StudyError(f"tuning.students: profile {options.profile} names none in the settings of its grid")
    folder = own_tuning_folder(plan.folder).relative_to(plan.root).as_posix()
    print("\n".join(f"{tuning.setting} {tuning.file} {folder}" for tuning in tunings))


def _tuned(options: argparse.Namespace) -> None:
    """Print the learning rates chosen by `make tune`."""
    from study.evaluation.tune import chosen_rates

    plan = resolve(options.profile)
    folder = own_tuning_folder(plan.folder)
    rates = chosen_rates(folder, plan.params.students)
    if not rates:
        raise StudyError(f"{folder}: nothing was tried; `make tune PROFILE={plan.profile}` does it")
    for key, rate in rates.items():
        print(f"{key}: {rate}")


def _cells(options: argparse.Namespace) -> None:
    """Print the stale stages that can run now, or their commands."""
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
    for stage in ready:
        print(cells.command(stage) if options.commands else f"{stage.name} {cells.state(stage)}")
    if waiting:
        print(f"{len(waiting)} more wait for these or others to be on record", file=sys.stderr)


def _grid(options: argparse.Namespace) -> None:
    """Run the stale stages as tasks of Ray (docs/cluster.md), and put them on record."""
    from study.cells import Cells
    from study.grid import Request, run_grid

    end_with_starter()
    run_grid(Cells(resolve(options.profile)), Request(options.cpus, options.gpus, options.address or None))


def _distil(options: argparse.Namespace) -> None:
    """Train one student as its description says, by as many processes as torchrun starts."""
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
    """Write the HTML report."""
    from study.analysis.report import write_report

    print(f"report: {write_report(resolve(options.profile))}")


def _export(options: argparse.Namespace) -> None:
    """Write a trained student as programs load it, with its card."""
    plan = resolve(options.profile)
    plan.named(options.name)  # a mistake is told before the libraries load
    if options.task and options.keep_pieces_from:
        raise StudyError("--keep-pieces-from: classifiers keep their vocabulary; allowed: without --task")
    take_one_gpu()
    from study.shipping.export import export

    if options.task:
        from study.shipping.classifier import export_classifier

        print(f"export: {export_classifier(plan, options.name, options.task, options.format, options.to)}")
        return
    print(f"export: {export(plan, options.name, options.format, options.to, options.keep_pieces_from)}")


def _students(options: argparse.Namespace) -> None:
    """Print the runs of the students that the report recommends."""
    from study.shipping.recommended import recommended

    for run, seconds, sure in recommended(resolve(options.profile)):
        note = "recommended" if sure else "the best of its size, not recommended"
        print(f"{run.name}: {note}; its training took {seconds / 60:.1f} minutes", file=sys.stderr)
        print(run.name)


class _Parser(argparse.ArgumentParser):
    def error(self, message: str) -> NoReturn:
        """Refuse arguments in one line, with the exit code 2."""
        self.exit(2, f"error: {message} (see {self.prog} --help)\n")


def _parser() -> argparse.ArgumentParser:
    parser = _Parser(prog="python -m study", description="The commands of the study.")
    commands = parser.add_subparsers(dest="command", required=True)
    profile = _Parser(add_help=False)
    profile.add_argument("profile", nargs="?", default=DEFAULT_PROFILE, help="a folder of profiles/ (laptop: none)")

    def command(run: Callable[[argparse.Namespace], None], *parents: _Parser) -> Callable[..., Any]:
        made = commands.add_parser(run.__name__[1:], help=run.__doc__, parents=parents)
        made.set_defaults(run=run)
        return made.add_argument

    for run in (_check, _tunings, _tuned, _report, _students):
        command(run, profile)
    add = command(_plan, profile)
    add("--listed", action="store_true", help="descriptions alone: plan.yaml must be right")
    add("--unlock", action="store_true", help="drop DVC's locks of processes that have ended: dvc runs next")
    add = command(_cells, profile)
    add("--commands", action="store_true", help="one a line, for the study's folder")
    add("--record", action="store_true", help="put what has finished on record (one process)")
    add("--stage", metavar="KIND", help="of one kind alone: tasks, corpus, ..., report")
    add("--all", action="store_true", help="what is not stale, too")
    add = command(_grid, profile)
    add("--cpus", type=int, default=1, help="of a task, which are its threads too (default: 1)")
    add("--gpus", type=float, help="of a task with models: 0 to 1, or n to train by n processes (default: 1)")
    add("--address", help="auto or host:port of a running Ray (default: one of this machine)")
    add = command(_run)
    add("notebook", type=Path)
    add("--executed", type=Path, help="where the executed copy goes (default: scratch/notebooks/)")
    add("-p", dest="parameters", nargs=2, metavar=("KEY", "VALUE"), action="append", default=[])
    add = command(_code)
    add("notebooks", type=Path, help="a folder of notebooks")
    add("folder", type=Path, help="where NAME.py goes; files that would stay as they are are left alone")
    add = command(_distil)
    add("description", type=Path, help="plan/distill/RUN.json of a profile's folder")
    add("--output", type=Path, help="the student's folder (default: where the pipeline has it)")
    add = command(_new)
    add("name")
    add("--teacher", required=True, help="an embedded one, or a folder")
    add("--text", action="append", required=True, help="a name, 'files/*.txt' or '{files: ..., ...}'")
    add("--task", action="append", required=True, help="a name, or 'name={files: ..., ...}'")
    add("--language", default="en", help="of texts and tasks that do not say theirs (default: en)")
    add("--student", help="a name under `students` (default: the first that fits the teacher)")
    add = command(_export)
    add("name", metavar="RUN", help="<setting>_<method>_<student>_<seed>, then the budget if not the base")
    add("--profile", default=DEFAULT_PROFILE)
    formats = "transformers, sentence-transformers, onnx, onnx-int8, onnx-int8-static, openvino"
    add("--format", default="transformers", help=formats)
    add("--to", type=Path, help="a new or empty folder (default: exports/RUN/FORMAT)")
    add("--keep-pieces-from", type=Path, metavar="TEXTS", help="trim the vocabulary to these texts")
    add("--task", help="fine-tune on this task and write the classifier, with its labels")
    return parser


if __name__ == "__main__":
    sys.exit(main())
