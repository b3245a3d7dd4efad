"""Tuning: what is tried on one method and student, and which learning rate is chosen."""

from __future__ import annotations

import math
import shutil
from pathlib import Path

import pytest
import tiny
from datasets import DatasetDict
from ruamel.yaml import YAML

from study import StudyError
from study.__main__ import main
from study.data.storage import save
from study.descriptions import Tuning, candidates_beside
from study.distillation import trainer
from study.evaluation import tune as tune_module
from study.evaluation.tune import choose, chosen_rates, tune
from study.files import Layout
from study.params import read_yaml
from study.plan import write_plan
from study.records import Candidate, read_record, write_record
from study.records import Tuning as Record

SHAPE = {"layers": 2, "width": 12, "heads": 4, "intermediate": 24}


@pytest.fixture
def folder(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    return tiny.workspace(tmp_path)


def tuning(folder: Path, budget: dict, **changes: dict) -> tuple[Tuning, Layout]:
    """Of ``mlm`` and L2-H12, with the plan's other descriptions left out."""
    plan = tiny.plan(folder, tuning=budget | {"students": {"english": ["L2-H12"]}}, **changes)
    (description,) = plan.of(Tuning)
    return description, plan.layout("english")


def save_topic(layout: Layout, train: int = 32, development: int = 16, test: int = 16, **options) -> None:
    splits = {
        "train": tiny.sentences(train, 1),
        "development": tiny.sentences(development, 2),
        "test": tiny.sentences(test, 3, **options),
    }
    save(DatasetDict(splits), layout.tasks / "topic")


def test_tuning_tries_every_candidate_and_looks_at_development_data_only(folder):
    description, layout = tuning(folder, {"learning_rates": [1e-6, 1e-3], "steps": 20})
    save_topic(layout, 128, 64, 64)
    result = tune(description, layout, folder / "tuning" / "mlm.json")
    names = {"profile": "test", "setting": "english", "method": "mlm", "student": "L2-H12"}
    assert read_record(folder / "tuning" / "mlm.json", Record, **names) == result
    assert (result.steps, result.seed, result.initialisation) == (20, 0, "teacher-layers")
    assert set(result.hashes) == {"corpus", "tasks", "teacher"}
    tried = {entry.learning_rate: entry for entry in result.tried}
    assert set(tried) == {1e-6, 1e-3} and tried[1e-3].held_out_loss < tried[1e-6].held_out_loss
    assert len({entry.held_out_loss_before for entry in result.tried}) == 1
    for entry in tried.values():
        assert entry.development.keys() == {"topic"}
        assert entry.development_mean == entry.development["topic"] > 0.75
    shutil.rmtree(layout.tasks / "topic")
    save_topic(layout, 128, 64, 64, flip=True)
    again = tune(description, layout, folder / "tuning" / "again.json")
    assert again.tried == result.tried and again.hashes["tasks"] != result.hashes["tasks"]


def test_an_interrupted_tuning_goes_on_where_it_ended_and_equals_an_uninterrupted_one(folder, monkeypatch):
    description, layout = tuning(folder, {"learning_rates": [1e-6, 1e-3], "steps": 8})
    save_topic(layout)
    output, whole = folder / "tuning" / "mlm.json", folder / "tuning" / "whole.json"
    tune(description, layout, whole)
    trained = []
    original = tune_module.distil

    def killed(run, *arguments):
        trained.append(run.objective.learning_rate)
        if len(trained) == 2:
            raise KeyboardInterrupt
        return original(run, *arguments)

    monkeypatch.setattr(tune_module, "distil", killed)
    with pytest.raises(KeyboardInterrupt):
        tune(description, layout, output)
    assert [entry.learning_rate for entry in read_record(output, Record).tried] == [1e-6]
    tune(description, layout, output)
    assert trained == [1e-6, 1e-3, 1e-3]
    assert read_record(output, Record).tried == read_record(whole, Record).tried
    tune(description, layout, output)
    assert len(trained) == 3
    save_topic(layout, train=48)  # other data: nothing of the file counts
    tune(description, layout, output)
    assert trained[3:] == [1e-6, 1e-3]


def test_candidates_of_another_description_are_tried_again(folder, monkeypatch):
    """Another rate alone retries nothing; another option of the objective, batch size or probe does."""
    output, trained, original = folder / "tuning" / "mlm.json", [], tune_module.distil

    def counted(run, *arguments):
        trained.append(run.objective.learning_rate)
        return original(run, *arguments)

    monkeypatch.setattr(tune_module, "distil", counted)
    description, layout = tuning(folder, {"learning_rates": [1e-3], "steps": 4})
    save_topic(layout)
    tune(description, layout, output)
    more, _ = tuning(folder, {"learning_rates": [1e-4, 1e-3], "steps": 4})
    tune(more, layout, output)
    assert trained == [1e-3, 1e-4]
    (first, second), finetuning = more.candidates, more.finetuning
    distillation = first.distillation.model_copy(update={"batch_size": first.distillation.batch_size // 2})
    masking = first.masking.model_copy(update={"fraction": first.masking.fraction / 2})
    for change in ({"distillation": distillation}, {"masking": masking}):
        first = first.model_copy(update=change)
        tune(more.model_copy(update={"candidates": [first, second]}), layout, output)
        assert trained[2:] == [1e-4]
        trained.pop()
    probes = finetuning.model_copy(update={"batch_size": finetuning.batch_size // 2})
    other = more.model_copy(update={"candidates": [first, second], "finetuning": probes})
    tune(other, layout, output)
    assert trained[2:] == [1e-4, 1e-3]
    record = read_record(output, Record)
    bare = [candidate.model_copy(update={"digest": None}) for candidate in record.tried]
    write_record(output, record.model_copy(update={"tried": bare}))  # as files without digests: they count
    tune(more, layout, output)
    assert len(trained) == 4


def test_what_other_methods_read_of_the_teacher_is_kept_while_one_is_tuned(folder):
    """The second method to be tuned then computes no teacher; what is tried does not depend on it."""
    budget = {"learning_rates": [1e-3], "steps": 8, "students": {"english": ["L2-H12"]}}
    plan = tiny.plan(folder, tuning=budget, grid={"methods": ["hs-last", "mha-direct"]})
    layout = plan.layout("english")
    save_topic(layout)
    write_plan(plan)
    first, second = plan.of(Tuning)
    alone = tune(first, layout, folder / "alone.json")
    shutil.rmtree(layout.teacher_outputs)
    others = candidates_beside(folder / "plan" / "tune" / f"{first.name}.json")
    assert others == [*first.candidates, *second.candidates]
    assert tune(first, layout, folder / "together.json", others).tried == alone.tried
    kept = {file.name for file in layout.teacher_outputs.rglob("*.bin")}
    assert kept == {"hidden-4.bin", "query-3.bin", "key-3.bin", "value-3.bin"}


def test_budgets_are_tuned_at_their_own_steps_and_say_their_own_rates(folder, capsys):
    budget = {"learning_rates": [1e-6, 1e-3], "steps": None, "budgets": ["base", "long"]}
    plan = tiny.plan(
        folder,
        tuning=budget | {"students": {"english": ["L2-H12"]}},
        budgets={"long": {"steps": 16}},
        grid={"methods": ["mlm"]},
    )
    assert [(t.file, t.candidates[0].distillation.steps) for t in plan.of(Tuning)] == [
        ("mlm_L2-H12", 6),
        ("mlm_L2-H12_long", 16),
    ]
    save_topic(plan.layout("english"))
    for description in plan.of(Tuning):
        output = folder / "reports" / "tuning" / "english" / f"{description.file}.json"
        tune(description, plan.layout("english"), output)
    rates = chosen_rates(folder / "reports" / "tuning", plan.params.students)
    assert set(rates) == {"methods.mlm.learning_rate", "budgets.long.learning_rates.mlm"}


def test_every_trained_method_of_the_grid_is_tuned_at_every_candidate(folder):
    budget = {"learning_rates": [1e-6, 1e-3], "steps": 20, "students": {"english": ["L2-H12", "L2-H24"]}}
    plan = tiny.plan(folder, tuning=budget, grid={"methods": ["none", "mlm", "od"]})
    described = plan.of(Tuning)
    assert [(entry.method, entry.student) for entry in described] == [
        (method, student) for method in ("mlm", "od") for student in ("L2-H12", "L2-H24")
    ]
    for entry in described:
        assert [run.objective.learning_rate for run in entry.candidates] == [1e-6, 1e-3]
        assert all((run.distillation.steps, run.seed) == (20, 0) for run in entry.candidates)
    with pytest.raises(StudyError, match="'magic'.*mlm"):
        plan.run("english", "magic", "L2-H12", 0)


def test_tuning_looks_past_the_rate_that_a_student_has_already(folder):
    rates = {"learning_rates": {"mlm": 5e-3}}
    students = {"L2-H12": SHAPE | rates, "L2-H24": SHAPE | rates | {"width": 24, "intermediate": 48}}
    save_topic(Layout(folder, "english"))
    results = [
        tune(*tuning(folder, {"learning_rates": [1e-6, 1e-2]}, **changes), folder / "tuning" / "mlm.json")
        for changes in ({}, {"students": students})
    ]
    assert results[0].tried == results[1].tried
    assert results[0].tried[0].held_out_loss != results[0].tried[1].held_out_loss


def test_a_candidate_that_diverges_is_recorded_and_the_others_are_tried(folder, monkeypatch):
    description, layout = tuning(folder, {"learning_rates": [1e-3, 1.0]})
    save_topic(layout)
    calm = trainer.DistillationTrainer.log

    def log(trainer, logs, start_time=None):
        calm(trainer, logs | ({"loss": math.nan} if trainer.args.learning_rate == 1.0 else {}), start_time)

    monkeypatch.setattr(trainer.DistillationTrainer, "log", log)
    result = tune(description, layout, folder / "mlm.json")
    first, second = result.tried
    assert first.diverged is None and first.development_mean >= 0
    assert "loss = nan" in second.diverged and second.development == {} and choose([result]) == {"mlm": 1e-3}
    assert read_record(folder / "mlm.json", Record) == result


def test_a_candidate_neither_diverged_nor_scored_is_no_candidate():
    with pytest.raises(ValueError, match="learning rate 0.1 neither diverged nor has held-out losses"):
        Candidate(learning_rate=0.1)


def test_tuned_chooses_by_itself_for_a_student_with_rates_of_its_own(folder, capsys):
    """Of two students, the one prefers 1e-3 and the other 2e-3; together they would share the better on average."""
    values = read_yaml(tiny.FIXTURES / "params.yaml")
    values["students"]["L4-H192"]["learning_rates"] = {
        name: 1e-3 for name, method in values["methods"].items() if method["objective"] != "none"
    }
    YAML().dump(values, folder / "params.yaml")
    rates = {"L3-H192": {1e-3: ([0.9], 0.5), 2e-3: ([0.4], 0.5)}, "L4-H192": {1e-3: ([0.7], 0.5), 2e-3: ([0.8], 0.5)}}
    for student, scores in rates.items():
        file = folder / "reports" / "tuning" / "english" / f"od_{student}.json"
        write_record(file, tried("od", scores, student=student))
    assert main(["tuned"]) == 0
    assert capsys.readouterr().out.splitlines() == [
        "methods.od.learning_rate: 0.001",
        "students.L4-H192.learning_rates.od: 0.002",
    ]
    file.write_text("{}")
    assert main(["tuned"]) == 1
    (line,) = capsys.readouterr().err.splitlines()
    assert line.startswith("error: ") and "od_L4-H192.json" in line


def test_a_profile_keeps_what_it_tries_in_its_own_folder(folder, capsys):
    """Rates of another teacher, tasks or budget never come among those of the study."""
    YAML().dump(read_yaml(tiny.FIXTURES / "params.yaml"), folder / "params.yaml")
    (folder / "profiles" / "other").mkdir(parents=True)
    (folder / "profiles" / "other" / "params.yaml").write_text("distillation: {steps: 3}\n")
    for profile, own in (("laptop", "reports/tuning"), ("other", "profiles/other/reports/tuning")):
        assert main(["tunings", profile]) == 0
        lines = capsys.readouterr().out.splitlines()
        assert lines and {line.split()[2] for line in lines} == {own}


ENVIRONMENT = {"python": "3", "torch": "2", "transformers": "5", "datasets": "5", "processor": "none"}


def tried(method: str, rates: dict, student: str = "L3-H192", before: float = 1.0) -> Record:
    """A record of tuning: rate -> development scores and held-out loss as a share of the one before training.

    The scores are None where training diverged.
    """
    candidates = [
        Candidate(learning_rate=rate, diverged="loss = nan")
        if scores is None
        else Candidate(
            learning_rate=rate,
            development=dict(zip("abc", scores, strict=False)),
            held_out_loss_before=before,
            held_out_loss=share * before,
        )
        for rate, (scores, share) in rates.items()
    ]
    return Record(
        schema=2,
        profile="laptop",
        setting="english",
        environment=ENVIRONMENT | {"cores": 2, "threads": 1, "date": "2026-01-01"},
        method=method,
        student=student,
        steps=100,
        seed=0,
        initialisation="teacher-layers",
        tried=candidates,
    )


def test_a_rate_told_from_the_best_on_development_data_is_not_chosen_however_low_its_loss():
    """Behind by 0.2, 0.1 and 0.3: mean 0.2, standard error 0.058."""
    assert choose([tried("od", {1.0: ([0.7, 0.8, 0.9], 0.9), 2.0: ([0.5, 0.7, 0.6], 0.1)})]) == {"od": 1.0}


def test_of_rates_not_told_from_the_best_the_one_with_the_lowest_loss_is_chosen():
    """Behind by 0.2, -0.1 and 0: mean 0.033, standard error 0.088. A third, behind by 0.3 each time, is told apart."""
    rates = {1.0: ([0.7, 0.8, 0.9], 0.9), 2.0: ([0.5, 0.9, 0.9], 0.8), 3.0: ([0.4, 0.5, 0.6], 0.1)}
    assert choose([tried("od", rates), tried("mlm", {1.0: ([0.2], 0.9), 2.0: ([0.3], 0.95)})]) == {
        "od": 2.0,
        "mlm": 2.0,
    }


def test_differences_are_taken_over_all_students_and_losses_count_as_shares_of_their_start():
    """Behind by 0.02, 0.04 and 0.03 with a standard error of 0.006. Without the second student not told apart."""
    first = tried("od", {1.0: ([0.52, 0.54], 0.9), 2.0: ([0.5, 0.5], 0.8)})
    other = tried("od", {1.0: ([0.53], 0.9), 2.0: ([0.5], 0.8)})
    assert choose([first, other]) == {"od": 1.0}
    other = tried("od", {1.0: ([0.5], 0.9), 2.0: ([0.9], 0.8)})
    assert choose([first, other]) == {"od": 2.0}
    rates = {1.0: ([0.5], 0.7), 2.0: ([0.5], 0.9)}
    level = tried("od", {1.0: ([0.5, 0.5], 0.9), 2.0: ([0.5, 0.5], 0.8)})
    assert choose([level]) == {"od": 2.0}
    large, small = tried("od", rates, before=10.0), tried("od", rates, before=0.1)
    assert choose([level, large]) == {"od": 1.0}  # 0.9 and 0.7 against 0.8 and 0.9
    assert choose([level, small]) == {"od": 1.0}  # the larger loss does not weigh more


def test_a_rate_at_which_any_student_diverges_or_its_loss_rises_is_not_chosen():
    calm = {1.0: ([0.7, 0.8], 0.9), 2.0: ([0.9, 0.9], 0.8)}
    assert choose([tried("od", calm), tried("od", calm)]) == {"od": 2.0}
    assert choose([tried("od", calm), tried("od", calm | {2.0: ([0.9, 0.9], 1.1)})]) == {"od": 1.0}
    diverged = tried("od", calm | {2.0: (None, None)})
    assert choose([tried("od", calm), diverged]) == {"od": 1.0}
    with pytest.raises(StudyError, match=r"od: diverged, or its loss rose, at every learning rate of \[1.0, 2.0\]"):
        choose([tried("od", calm | {1.0: (None, None)}), diverged])


def test_rates_that_were_not_tried_everywhere_are_not_compared():
    records = [tried("od", {1.0: ([0.7], 0.9), 2.0: ([0.9], 0.8)}), tried("od", {1.0: ([0.7], 0.9)})]
    with pytest.raises(StudyError, match="od was tried at 2.0 1 times, at others 2"):
        choose(records)
