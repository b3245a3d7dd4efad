"""The real dvc.yaml: for each kind of edit, exactly which stages become stale.

Outputs are stand-ins of a few bytes, put on record with `dvc commit`: what DVC compares is their hashes. Nothing is
trained here; tests/test_smoke.py runs the stages themselves.
"""

from __future__ import annotations

import re
import shutil
import sys
from pathlib import Path

import nbformat
import pipeline
import pytest
from ruamel.yaml import YAML

SETTINGS = ("english", "multilingual")


@pytest.fixture(scope="module")
def recorded(tmp_path_factory) -> Path:
    """A clone whose profile smoke is up to date, with stand-ins for every output of a stage that trains or measures."""
    root = tmp_path_factory.mktemp("recorded")
    pipeline.clone(root)
    folder = root / "profiles" / "smoke"
    outcome = pipeline.command(folder, "dvc", "repro", "plan", "notebooks", seconds=300)
    assert outcome.returncode == 0, outcome.stderr
    listed = YAML(typ="safe").load(folder / "plan.yaml")
    outputs = ["runs/sources.json", "reports/html/index.html"]
    for setting in listed["prepared"]:
        outputs += [
            f"reports/results/{setting}/{name}.json" for name in ("tasks", "corpus", "representations", "latency")
        ]
        outputs += [f"runs/{setting}/{name}/data" for name in ("tasks", "corpus", "encoder", "teacher")]
    outputs += [f"runs/{run['setting']}/students/{run['model']}/data" for run in listed["distilled"].values()]
    outputs += [f"reports/results/{run['setting']}/{run['model']}.json" for run in listed["evaluated"].values()]
    outputs += [f"reports/systems/{own['setting']}/{own['name']}.json" for own in listed["systems"].values()]
    for key, analysis in listed["analyses"].items():
        outputs += [f"runs/analyses/{key}.ipynb", f"reports/{analysis['analysis']}/{analysis['setting']}/table.csv"]
    for name in outputs:
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_text(name)
    outcome = pipeline.command(folder, "dvc", "commit", "--force", "dvc.yaml", seconds=600)
    assert outcome.returncode == 0, outcome.stderr
    assert pipeline.stale(folder) == set()
    return root


@pytest.fixture
def study(recorded, tmp_path) -> Path:
    """A copy of the clone for one edit."""
    shutil.copytree(recorded, tmp_path / "study", symlinks=True)
    return tmp_path / "study"


def stale_after(root: Path) -> set[str]:
    """What is stale in the profile smoke once the plan is made again, as `make` does first."""
    folder = root / "profiles" / "smoke"
    planned = pipeline.command(root, sys.executable, "-m", "study", "plan", "smoke")
    assert planned.returncode == 0, planned.stderr
    outcome = pipeline.command(folder, "dvc", "repro", "plan", "notebooks", seconds=300)
    assert outcome.returncode == 0, outcome.stderr
    return pipeline.stale(folder)


def edit(path: Path, pattern: str, replacement: str) -> None:
    text = path.read_text()
    changed, count = re.subn(pattern, replacement, text, count=1, flags=re.MULTILINE)
    assert count == 1, f"{path}: no {pattern}"
    path.write_text(changed)


def edit_profile(root: Path, change) -> None:
    yaml, path = YAML(typ="safe"), root / "profiles" / "smoke" / "params.yaml"
    values = yaml.load(path)
    change(values)
    yaml.dump(values, path)


def expensive(names: set[str]) -> set[str]:
    """Of the names, those of stages that prepare, train or measure."""
    return {name for name in names if not name.startswith(("analyse@", "report", "represent@"))}


def both(*patterns: str) -> set[str]:
    return {pattern.format(setting) for pattern in patterns for setting in SETTINGS}


STUDENT = {"english": "L3-H192", "multilingual": "L4-H192"}


def runs_of(stage: str, *methods: str) -> set[str]:
    return {f"{stage}@{setting}_{method}_{STUDENT[setting]}_1" for method in methods for setting in SETTINGS}


def test_nothing_changed(study):
    assert stale_after(study) == set()


@pytest.mark.parametrize(
    "file", ["distillation/trainer.py", "distillation/losses.py", "data/texts/wikipedia.py", "evaluation/scores.py"]
)
def test_a_refactoring_or_a_message_reruns_nothing(study, file):
    with (study / "study" / file).open("a") as stream:
        stream.write("\n# a comment\n")
    assert stale_after(study) == set()


@pytest.mark.parametrize("file", ["config.py", "plan.py", "descriptions.py", "methods.py", "params.py"])
def test_how_defaults_are_resolved_is_looked_at_by_the_plan(study, file):
    """What decides learning rates and defaults is a dependency: the plan runs anew, all else only if it differs."""
    with (study / "study" / file).open("a") as stream:
        stream.write("\n# a comment\n")
    assert pipeline.stale(study / "profiles" / "smoke") == {"plan"}
    assert stale_after(study) == set()


def test_a_changed_default_reruns_what_it_decides(study):
    edit(study / "study" / "methods.py", r"positions: (.*) = \"masked\"", r'positions: \1 = "all"')
    edit(study / "params.yaml", r"^    positions: masked.*\n", "")
    stale = stale_after(study)
    assert {name for name in stale if name.startswith("distill@")} == runs_of("distill", "od")


@pytest.mark.parametrize(
    ("family", "methods"),
    [
        ("hidden_state", ["hs-uniform+last"]),
        ("output_distribution", ["od"]),
        ("start", ["none", "od", "hs-uniform+last", "mha-minilmv2"]),
    ],
)
def test_a_raised_revision_reruns_its_family(study, family, methods):
    edit(study / "study" / "revisions.py", rf'"{family}": 1', f'"{family}": 2')
    ablation = {"distill@english_mha-minilmv2-from-top-0_L3-H192_1"} if "mha-minilmv2" in methods else set()
    assert expensive(stale_after(study)) == runs_of("distill", *methods) | ablation


def test_a_raised_revision_of_masking_reruns_all_that_trains_on_masks(study):
    edit(study / "study" / "revisions.py", r'"masking": 1', '"masking": 2')
    stale = stale_after(study)
    assert {f"teacher@{setting}" for setting in SETTINGS} <= stale
    trained = runs_of("distill", "od", "hs-uniform+last", "mha-minilmv2")
    assert {name for name in stale if name.startswith("distill@")} == trained | {
        "distill@english_mha-minilmv2-from-top-0_L3-H192_1"
    }


def test_a_raised_revision_of_a_text_reruns_the_corpora_that_read_it(study):
    edit(study / "study" / "revisions.py", r'"text/sotu": 1', '"text/sotu": 2')
    assert stale_after(study) == {"corpus@english"}
    edit(study / "study" / "revisions.py", r'"text/interface": 1', '"text/interface": 2')
    assert stale_after(study) == {"corpus@english", "corpus@multilingual"}


def test_a_new_method_is_trained_and_evaluated_alone(study):
    edit_profile(study, lambda values: values["grid"]["methods"].append("hs-last"))
    stale = stale_after(study)
    assert expensive(stale) == runs_of("distill", "hs-last") | runs_of("evaluate", "hs-last")
    assert both("represent@{}", "analyse@comparison_{}") | {"report"} <= stale


def test_a_changed_method_reruns_it_and_its_variants(study):
    edit(study / "params.yaml", r"(  mha-minilmv2:\n(.*\n)?    learning_rate:) 0.00003", r"\1 0.0002")
    minilmv2 = runs_of("distill", "mha-minilmv2") | {"distill@english_mha-minilmv2-from-top-0_L3-H192_1"}
    assert expensive(stale_after(study)) == minilmv2


def test_a_new_seed_reruns_no_other(study):
    edit_profile(study, lambda values: values["grid"].update(seeds=[1, 2]))
    stale = expensive(stale_after(study))
    assert stale and all(name.endswith("_2") for name in stale)


def test_a_rate_of_one_student_reruns_its_run(study):
    rates = {"od": 0.1, "hs-uniform+last": 0.003, "mha-minilmv2": 0.00003}
    edit_profile(study, lambda values: values.update(students={"L4-H192": {"learning_rates": rates}}))
    assert expensive(stale_after(study)) == {"distill@multilingual_od_L4-H192_1"}


def test_a_new_text_of_another_setting_reruns_nothing_here(study):
    edit_profile(study, lambda values: values["settings"].update(multilingual={"texts": ["wikipedia", "wikipedia-es"]}))
    assert stale_after(study) == {"corpus@multilingual"}


def test_a_new_task_of_another_setting_reruns_nothing_here(study):
    edit_profile(study, lambda values: values["settings"].update(multilingual={"tasks": ["topic-multilingual"]}))
    assert not {name for name in stale_after(study) if "english" in name}


def test_a_new_task_of_this_setting_reruns_evaluation_and_no_training(study):
    """The corpus is looked at again, since the task's texts must not be in it; training is if it changes by that."""
    edit_profile(study, lambda values: values["settings"]["english"]["tasks"].append("boolq"))
    stale = expensive(stale_after(study))
    runs = ["none", "od", "hs-uniform+last", "mha-minilmv2", "mha-minilmv2-from-top-0"]
    evaluations = {f"evaluate@english_{name}_L3-H192_1" for name in runs} | {"evaluate@english_teacher"}
    assert stale == evaluations | {"tasks@english", "corpus@english"}


@pytest.mark.parametrize("change", [{"seeds": [1, 2]}, {"epochs": 3}, {"learning_rates": [0.0003]}])
def test_another_budget_of_fine_tuning_reruns_evaluation_alone(study, change):
    """Layers are compared by probes, which no fine-tuning touches."""
    edit_profile(study, lambda values: values["finetuning"].update(change))
    stages = {name.partition("@")[0] for name in stale_after(study)}
    assert stages - {"analyse", "report"} == {"evaluate", "neighbour"}


@pytest.mark.parametrize("analysis", ["comparison", "ablations", "representations"])
def test_a_figure_reruns_its_analysis(study, analysis):
    with (study / "study" / "analysis" / "figures" / f"{analysis}.py").open("a") as stream:
        stream.write("\n# a comment\n")
    assert stale_after(study) == both(f"analyse@{analysis}_{{}}") | {"report"}


def test_statistics_rerun_every_analysis_and_nothing_else(study):
    with (study / "study" / "analysis" / "numbers" / "statistics.py").open("a") as stream:
        stream.write("\n# a comment\n")
    names = ("comparison", "ablations", "representations")
    beside = {"analyse@neighbours_english", "report"}
    assert stale_after(study) == both(*(f"analyse@{name}_{{}}" for name in names)) | beside


def test_executing_and_saving_a_notebook_reruns_nothing(study):
    notebook = study / "notebooks" / "30_distill.ipynb"
    content = nbformat.read(notebook, as_version=4)
    content.metadata.update(
        kernelspec={"name": "python3", "display_name": "Python 3"}, language_info={"name": "python"}
    )
    for count, cell in enumerate((cell for cell in content.cells if cell.cell_type == "code"), start=1):
        cell.execution_count = count
        cell.outputs = [nbformat.v4.new_output("stream", name="stdout", text="saved by Jupyter")]
    nbformat.write(content, notebook)
    (notebook.parent / ".ipynb_checkpoints").mkdir()
    shutil.copy(notebook, notebook.parent / ".ipynb_checkpoints" / "30_distill-checkpoint.ipynb")
    assert pipeline.stale(study / "profiles" / "smoke") == {"notebooks"}
    assert stale_after(study) == set()


def test_a_changed_notebook_reruns_its_stages(study):
    notebook = study / "notebooks" / "45_latency.ipynb"
    content = nbformat.read(notebook, as_version=4)
    [*_, last] = (cell for cell in content.cells if cell.cell_type == "code")
    last.source += "\n# a comment"
    nbformat.write(content, notebook)
    assert stale_after(study) == both("latency@{}")


def test_prose_reruns_what_draws_pages_and_nothing_expensive(study):
    for name in ("00_sources", "10_tasks", "20_teacher", "30_distill", "40_evaluate", "54_representations"):
        notebook = study / "notebooks" / f"{name}.ipynb"
        content = nbformat.read(notebook, as_version=4)
        content.cells.insert(1, nbformat.v4.new_markdown_cell("A remark."))
        nbformat.write(content, notebook)
    assert stale_after(study) == both("analyse@representations_{}")


def test_another_profile_is_planned_and_run_without_touching_this_one(study):
    folder = study / "profiles" / "smoke"
    lock = (folder / "dvc.lock").read_bytes()
    (study / "profiles" / "mine").mkdir()
    (study / "profiles" / "mine" / "params.yaml").write_text((folder / "params.yaml").read_text())
    for arguments in ([sys.executable, "-m", "study", "plan", "mine"],):
        assert pipeline.command(study, *arguments).returncode == 0
    outcome = pipeline.command(study / "profiles" / "mine", "dvc", "repro", "plan", "notebooks", seconds=300)
    assert outcome.returncode == 0, outcome.stderr
    assert (folder / "dvc.lock").read_bytes() == lock and stale_after(study) == set()
    tracked = pipeline.command(study, "git", "status", "--porcelain").stdout.splitlines()
    assert [line for line in tracked if not line.startswith("??")] == []


def test_the_list_of_runs_is_checked_by_the_pipeline(study):
    """`dvc repro` by hand, after an edit that asks for other runs, says what to do instead of running the old ones."""
    edit_profile(study, lambda values: values["grid"].update(seeds=[1, 2]))
    outcome = pipeline.command(study / "profiles" / "smoke", "dvc", "repro", "plan", seconds=300)
    assert outcome.returncode != 0 and "study plan smoke" in outcome.stdout + outcome.stderr


def test_a_row_beside_the_students_reruns_what_is_measured_beside_them(study):
    edit_profile(study, lambda values: values["grid"].update(references={"english": ["static-256"]}))
    row = "english_static-256_reference_0"
    assert expensive(stale_after(study)) == {f"reference@{row}", f"evaluate@{row}", "latency@english"}


def test_a_changed_neighbour_is_run_alone(study):
    edit_profile(study, lambda values: values["neighbours"]["prequant"].update(bits=[4, 2]))
    assert stale_after(study) == {"neighbour@english_prequant"}


def test_a_new_neighbour_reruns_nothing_of_another_method(study):
    edit_profile(study, lambda values: values["neighbours"]["prequant"].pop("tasks"))
    edit_profile(study, lambda values: values["grid"]["neighbours"].update(multilingual=["prequant"]))
    beside = {f"neighbour@{setting}_prequant" for setting in SETTINGS} | {"analyse@neighbours_multilingual"}
    assert stale_after(study) - {"report"} == beside


def test_a_raised_revision_of_a_neighbour_reruns_it_alone(study):
    edit(study / "study" / "revisions.py", r'"neighbour/prequant": 1', '"neighbour/prequant": 2')
    assert stale_after(study) == {"neighbour@english_prequant"}
