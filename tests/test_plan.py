"""The plan: every default and learning rate resolved once, one description a stage, written and read back."""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import tiny
from ruamel.yaml import YAML

from study import StudyError, open_description, resolve
from study.descriptions import Comparison, CorpusData, Evaluation, Run, TaskData, TeacherAdaptation, Tuning
from study.files import DEFAULT_PROFILE, Layout, profile_folder
from study.plan import make_run, write_plan

FIXTURES = Path(__file__).parent / "fixtures"
PROFILE = "grid: {methods: [none, od], seeds: [3], students: {english: [L3-H192], multilingual: [L4-H192]}}\n"
pytestmark = pytest.mark.fast


@pytest.fixture
def root(tmp_path):
    """A study's folder with the parameters of the fixtures and a profile."""
    shutil.copy(FIXTURES / "params.yaml", tmp_path)
    shutil.copy(FIXTURES.parents[1] / "dvc.yaml", tmp_path)
    (tmp_path / "notebooks").mkdir()
    (tmp_path / "profiles" / "short").mkdir(parents=True)
    (tmp_path / "profiles" / "short" / "params.yaml").write_text(PROFILE)
    return tmp_path


def edit(root: Path, change) -> None:
    yaml, path = YAML(), root / "params.yaml"
    document = yaml.load(path)
    change(document)
    with path.open("w") as stream:
        yaml.dump(document, stream)


def files_below(folder: Path) -> dict[str, bytes]:
    return {str(path.relative_to(folder)): path.read_bytes() for path in sorted(folder.rglob("*")) if path.is_file()}


def test_a_run_holds_what_the_method_sets_in_the_place_of_what_all_share(tmp_path):
    params = tiny.parameters(tmp_path)
    run = make_run(params, "english", "hs-uniform+last", "L2-H24", 5)
    assert (run.initialisation, run.distillation, run.seed) == ("teacher-layers", params.distillation, 5)
    assert run.objective == params.methods["hs-uniform+last"] and run.sizes.width == 24
    plain = make_run(params, "english", "hs-uniform+last-plain", "L2-H24", 5)
    assert plain.distillation == params.distillation.model_copy(update={"inputs": "plain"})
    assert plain.objective == run.objective  # what it sets for itself is told once
    random = make_run(params, "english", "none-random", "L2-H24", 5)
    assert random.initialisation == "random" and random.revisions.keys() == {"start"}


def test_analyses_are_those_that_a_study_has_or_that_params_choose(root):
    def names() -> list[str]:
        return list(resolve(root=root).analyses())

    assert names() == ["comparison", "ablations", "representations"]
    edit(root, lambda values: values.update(budgets={"long": {"steps": 9}}))
    edit(root, lambda values: values["grid"].update(budgets={"english": ["long"]}, analyses=["comparison", "budgets"]))
    assert names() == ["comparison", "budgets"]
    write_plan(resolve(root=root))
    listed = YAML(typ="safe").load(root / "plan.yaml")["analyses"]
    places = [(name, setting) for setting in ("english", "multilingual") for name in ("comparison", "budgets")]
    assert list(listed) == [f"{name}_{setting}" for name, setting in places]
    edit(root, lambda values: values["grid"].update(budgets={}))
    assert names() == ["comparison", "budgets"]  # shares of the gap at the one budget


def test_steps_of_its_own_and_steps_of_equal_compute(tmp_path):
    methods = {"long": {"objective": "hidden_state", "mapping": "last", "learning_rate": 0.1, "steps": 77}}
    assert tiny.run(tmp_path, "long", methods=methods)[0].distillation.steps == 77
    run = tiny.run(tmp_path, "mha-minilmv2-equal-compute")[0]
    reference = tiny.run(tmp_path, "od")[0]
    assert run.equal_compute.method == "od" and run.equal_compute.steps == reference.distillation.steps
    assert run.equal_compute.objective == reference.objective


def test_a_student_has_the_rates_it_was_tuned_for_and_every_other_the_methods_own(root):
    params = resolve(root=root).params
    for method in params.grid.methods[1:]:
        tuned = params.students["L3-H384"].learning_rates[method]
        assert make_run(params, "multilingual", method, "L3-H384", 1).objective.learning_rate == tuned
        own = make_run(params, "multilingual", method, "L4-H192", 1).objective
        assert own.learning_rate == params.methods[method].learning_rate


def test_a_variant_takes_the_rate_of_what_it_extends_unless_it_changes_it(root):
    params = resolve(root=root).params
    rates = params.students["L3-H384"].learning_rates
    heads = make_run(params, "multilingual", "mha-minilmv2-heads-6", "L3-H384", 1)
    assert heads.objective.learning_rate == rates["mha-minilmv2"] != params.methods["mha-minilmv2"].learning_rate
    assert make_run(params, "multilingual", "mha-minilmv2-higher-rate", "L3-H384", 1).objective.learning_rate == 1e-4
    compared = make_run(params, "multilingual", "hs-uniform+last-equal-compute", "L3-H384", 1)
    assert compared.equal_compute.objective.learning_rate == rates["od"]


def test_variants_are_tuned_on_students_with_rates_of_their_own(root):
    ablations = {"students": ["L6-H384", "L4-H192"], "variants": ["heads", "higher-rate"]}
    edit(root, lambda document: document["grid"]["ablations"].update(multilingual=ablations))
    edit(root, lambda document: document["grid"]["students"].update(multilingual=["L6-H384", "L4-H192"]))
    edit(root, lambda document: document["tuning"]["students"].update(multilingual=["L4-H192", "L6-H384"]))
    plan = resolve(root=root)
    made = {(t.method, t.student) for t in plan.of(Tuning, "multilingual") if t.method in plan.params.memberships}
    assert made == {(f"mha-minilmv2-heads-{heads}", "L6-H384") for heads in (6, 24, 48)}
    rates = plan.params.students["L6-H384"].learning_rates
    rates["mha-minilmv2-heads-24"] = 0.5
    for heads, rate in ((6, rates["mha-minilmv2"]), (24, 0.5)):
        run = make_run(plan.params, "multilingual", f"mha-minilmv2-heads-{heads}", "L6-H384", 1)
        assert run.objective.learning_rate == rate


def test_revisions_are_those_that_a_run_rests_on(tmp_path):
    families = {"masking", "start", "training"}
    for method, family in (
        ("mlm", "masked_language_modelling"),
        ("od", "output_distribution"),
        ("hs-last", "hidden_state"),
        ("mha-minilmv2", "attention_relation"),
        ("mha-direct", "direct_attention"),
    ):
        assert tiny.run(tmp_path, method)[0].revisions.keys() == families | {family}


def test_every_run_has_one_description_and_every_model_one_evaluation(root):
    plan = resolve("short", root)
    runs, evaluations = plan.of(Run), plan.of(Evaluation)
    cells = [("english", m, "L3-H192", 3) for m in ("none", "od")]
    cells += [("multilingual", m, "L4-H192", 3) for m in ("none", "od")]
    assert [(run.setting, run.method, run.student, run.seed) for run in runs] == cells
    assert [e.model for e in evaluations if e.setting == "english"] == ["teacher", "none_L3-H192_3", "od_L3-H192_3"]
    for kind in (TaskData, CorpusData, TeacherAdaptation, Comparison):
        assert [description.setting for description in plan.of(kind)] == ["english", "multilingual"]
    assert plan.of(Run, "multilingual") == runs[2:]
    with pytest.raises(StudyError, match="setting 'german' is unknown; allowed: english, multilingual"):
        plan.layout("german")
    with pytest.raises(StudyError, match="method 'magic' is unknown; allowed: none, mlm"):
        plan.run("english", "magic", "L3-H192", 1)


def test_ablations_are_runs_of_some_students(root):
    ablations = {"students": ["L3-H192"], "variants": ["heads"]}
    edit(root, lambda document: document["grid"]["ablations"].update(english=ablations))
    plan = resolve(root=root)
    (comparison,) = plan.of(Comparison, "english")
    made = [f"mha-minilmv2-heads-{heads}" for heads in (6, 24, 48)]
    assert list(comparison.memberships) == made and comparison.ablated_students == ["L3-H192"]
    assert [run.model for run in plan.of(Run, "english")][-3:] == [f"{name}_L3-H192_1" for name in made]


def test_candidates_of_tuning_differ_in_their_rate_alone(root):
    plan = resolve(root=root)
    budget, tunings = plan.params.tuning, plan.of(Tuning)
    tried = {(t.setting, t.method, t.student) for t in tunings}
    trained = plan.params.grid.methods[1:]
    assert tried == {
        (s, m, student) for s, students in budget.students.items() for student in students for m in trained
    }
    for tuning in tunings:
        assert [run.objective.learning_rate for run in tuning.candidates] == budget.learning_rates
        assert {(run.seed, run.distillation.steps) for run in tuning.candidates} == {(budget.seed, budget.steps)}
        same = [run.objective.model_copy(update={"learning_rate": 1.0}) for run in tuning.candidates]
        assert all(objective == same[0] for objective in same)


@pytest.mark.parametrize("profile", [DEFAULT_PROFILE, "short"])
def test_what_is_written_is_what_is_read(root, profile):
    plan = resolve(profile, root)
    assert write_plan(plan) == len(plan.descriptions)
    folder = profile_folder(profile, root)
    for description in plan.descriptions:
        path = folder / "plan" / description.stage / f"{description.name}.json"
        opened, layout = open_description(path, type(description))
        assert opened == description
        assert (layout.folder, layout.setting) == (folder, description.setting)


def test_two_profiles_share_no_file_and_planning_one_leaves_the_other(root):
    write_plan(resolve(root=root))
    before = files_below(root)
    write_plan(resolve("short", root))
    after = files_below(root)
    assert {name: after[name] for name in before} == before
    assert {name.split("/")[0] for name in after.keys() - before.keys()} == {"profiles"}
    first, second = Layout(root, "english"), Layout(root / "profiles" / "short", "english")
    for attribute in ("runs", "reports", "results", "tasks", "corpus", "teacher", "checkpoints"):
        assert getattr(first, attribute) != getattr(second, attribute)


def test_planning_again_touches_no_file(root):
    write_plan(resolve("short", root))
    times = {path: path.stat().st_mtime_ns for path in root.rglob("*")}
    write_plan(resolve("short", root))
    assert {path: path.stat().st_mtime_ns for path in root.rglob("*")} == times


def test_a_new_profile_gets_a_link_to_the_pipeline(root):
    write_plan(resolve("short", root))
    link = root / "profiles" / "short" / "dvc.yaml"
    assert link.is_symlink() and link.resolve() == (root / "dvc.yaml").resolve() and not link.readlink().is_absolute()


def test_descriptions_of_runs_that_are_no_more_are_deleted(root):
    write_plan(resolve(root=root))
    assert (root / "plan" / "distill" / "english_od_L3-H192_1.json").is_file()
    edit(root, lambda document: document["grid"]["methods"].remove("od"))
    write_plan(resolve(root=root))
    assert not (root / "plan" / "distill" / "english_od_L3-H192_1.json").exists()
    assert "od_L3-H192" not in (root / "plan.yaml").read_text()


def test_the_list_of_runs_has_to_be_right_where_it_is_read_already(root):
    with pytest.raises(StudyError, match="plan.yaml does not list the runs.*study plan laptop"):
        write_plan(resolve(root=root), listed=True)
    write_plan(resolve(root=root))
    write_plan(resolve(root=root), listed=True)
    edit(root, lambda document: document["grid"].update(seeds=[1, 2]))
    with pytest.raises(StudyError, match="plan.yaml does not list the runs"):
        write_plan(resolve(root=root), listed=True)


def test_a_lock_of_another_profile_is_refused(root):
    lock = root / "profiles" / "short" / "dvc.lock"
    lock.write_text("schema: '2.0'\nstages:\n  plan:\n    cmd: python -m study plan --listed \n      overnight\n")
    with pytest.raises(StudyError, match="profiles/short/dvc.lock belongs to profile 'overnight'.*'short'"):
        write_plan(resolve("short", root))
    lock.write_text("schema: '2.0'\nstages:\n  plan:\n    cmd: python -m study plan --listed short\n")
    write_plan(resolve("short", root))


DAMAGED = {
    "half-written": lambda content: content[: len(content) // 2],
    "empty": lambda content: b"",
    "a key is missing": lambda content: json.dumps(
        {key: value for key, value in json.loads(content).items() if key != "masking"}
    ).encode(),
    "an unknown key": lambda content: json.dumps(json.loads(content) | {"temprature": 1}).encode(),
    "of another type": lambda content: json.dumps(json.loads(content) | {"seed": "one"}).encode(),
    "of another stage": None,
}


@pytest.mark.parametrize("name", DAMAGED)
def test_a_damaged_description_is_one_line_that_names_it(root, name):
    write_plan(resolve(root=root))
    path = root / "plan" / "distill" / "english_od_L3-H192_1.json"
    damage = DAMAGED[name]
    path.write_bytes(damage(path.read_bytes()) if damage else (root / "plan" / "teacher" / "english.json").read_bytes())
    with pytest.raises(StudyError) as error:
        open_description(path, Run)
    line = str(error.value)
    assert "\n" not in line and "english_od_L3-H192_1.json" in line and "study plan" in line
    path.unlink()
    with pytest.raises(StudyError, match="No such file.*study plan"):
        open_description(path, Run)


def test_on_the_command_line(root):
    def command(*arguments: str) -> subprocess.CompletedProcess:
        return subprocess.run(
            [sys.executable, "-m", "study", *arguments], cwd=root, capture_output=True, text=True, timeout=60
        )

    outcome = command("plan", "short")
    assert (outcome.returncode, outcome.stderr) == (0, "") and "descriptions of profile short" in outcome.stdout
    outcome = command("plan", "weekend")
    assert outcome.returncode == 1 and len(outcome.stderr.splitlines()) == 1 and "'weekend'" in outcome.stderr
    printed = command("tunings").stdout.splitlines()
    assert (
        "english od_L3-H192 reports/tuning" in printed
        and "multilingual od_L3-H384 reports/tuning" in printed
        and len(printed) == 27
    )
    edit(root, lambda document: document["tuning"].update(students={}))
    outcome = command("tunings")
    assert outcome.returncode == 1 and len(outcome.stderr.splitlines()) == 1 and "tuning.students" in outcome.stderr
