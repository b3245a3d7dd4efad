"""Result files become tables: complete, checked, and aggregated as computed by hand."""

from __future__ import annotations

import json
import math
import re
import warnings
from dataclasses import replace

import pandas as pd
import pytest
from constructed_results import ENVIRONMENT, add_languages, change, make_study, several_languages, write_grid
from scipy import stats

from study import StudyError
from study.analysis.figures.style import label
from study.analysis.numbers import results as analysis
from study.analysis.numbers import tables
from study.analysis.numbers.analysis import Analysis

METHODS = ["none", "mlm", "od", "mha-minilmv2"]
SCORES = {
    ("none", "L3-H384"): 0.60,
    ("mlm", "L3-H384"): 0.62,
    ("od", "L3-H384"): (0.72, 0.65),  # test, development: best on test data
    ("mha-minilmv2", "L3-H384"): (0.70, 0.68),  # best on development data
}


@pytest.fixture
def study(tmp_path):
    made = make_study(tmp_path, METHODS)
    return tmp_path, made, write_grid(made, SCORES)


def load(study):
    return study[1].load()


def test_missing_files_are_named_in_one_line(study):
    root, params, folder = study
    gone = ["teacher.json", "od_L3-H192_1.json", "latency.json", "tasks.json"]
    for name in gone:
        (folder / name).unlink()
    with pytest.raises(StudyError) as error:
        load(study)
    assert all(f"reports/results/english/{name}" in str(error.value) for name in gone)
    assert "mlm" not in str(error.value) and str(root) not in str(error.value) and "\n" not in str(error.value)
    files = len([*folder.glob("*_*_*.json")])
    for file in folder.glob("*_*_*.json"):
        file.unlink()
    with pytest.raises(StudyError, match=rf" and {files + len(gone) - 5} more$"):
        load(study)


def test_of_several_devices_the_first_is_shown(study):
    once = load(study).latency
    path = study[2] / "latency.json"
    measured = json.loads(path.read_text())["measurements"]
    slow = [entry | {"median_seconds": 9.0, "device": "cpu", "precision": "fp32"} for entry in measured]
    change(path, measurements=[entry | {"device": "cuda", "processor": "a card"} for entry in measured] + slow)
    shown = load(study).latency
    assert set(shown["device"]) == {"cuda"} and list(shown["median_seconds"]) == list(once["median_seconds"])


def test_a_truncated_file_is_named(study):
    path = study[2] / "od_L3-H384_1.json"
    path.write_text(path.read_text()[:500])
    with pytest.raises(StudyError, match=r"^results/english/od_L3-H384_1\.json: .*JSON") as error:
        load(study)
    assert "\n" not in str(error.value)


@pytest.mark.parametrize(
    "values",
    [{"profile": "smoke"}, {"setting": "multilingual"}, {"method": "mlm"}, {"student": "L3-H192"}, {"seed": 2}],
)
def test_a_file_in_another_files_place_is_refused(study, values):
    change(study[2] / "od_L3-H384_1.json", **values)
    (key, value), *_ = values.items()
    with pytest.raises(StudyError, match=rf"od_L3-H384_1\.json: {key} = {value!r}; at this place allowed"):
        load(study)


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (lambda tasks: tasks.pop("boolq"), "'boolq' is missing"),
        (lambda tasks: tasks["boolq"]["runs"].pop(), r"tasks.boolq: fine-tuning seeds \[1\]; allowed: \[1, 2\]"),
        (lambda tasks: tasks["boolq"].update(test_examples=10), "tasks.boolq.test_examples = 10; allowed: 1000"),
        (lambda tasks: tasks["boolq"].update(metric="f1"), "lack 'f1'"),
        (lambda tasks: tasks["boolq"]["runs"][0]["test"].update(accuracy=float("nan")), "boolq.runs.0.test.accuracy"),
    ],
)
def test_an_incomplete_run_is_refused(study, damage, message):
    path = study[2] / "od_L3-H384_1.json"
    tasks = json.loads(path.read_text())["tasks"]
    damage(tasks)
    change(path, tasks=tasks)
    with pytest.raises(StudyError, match=message):
        load(study)


def test_a_missing_latency_measurement_is_named(study):
    path = study[2] / "latency.json"
    measurements = json.loads(path.read_text())["measurements"]
    change(path, measurements=measurements[:-1])
    with pytest.raises(StudyError, match="L3-H192 at batch size 32 with 1 threads"):
        load(study)


def test_a_method_removed_from_the_grid_is_ignored(study):
    folder = study[2]
    (folder / "od_L3-H192_1.json").write_text("cut off {")
    comparison = study[1].comparison.model_copy(update={"methods": ["none", "mlm", "mha-minilmv2"]})
    results = analysis.load_results(comparison, study[1].layout)
    for table in (results.scores, results.runs, results.curves):
        assert "od" not in set(table["method"])
        assert set(table["setting"]) == {"english"}


def test_a_methods_own_parameters_are_those_recorded(study):
    path = study[2] / "od_L3-H384_1.json"
    options = {"objective": "output_distribution", "temperature": 2.0, "positions": "masked"}
    change(path, distillation=json.loads(path.read_text())["distillation"] | {"options": options})
    runs = load(study).runs.set_index(["method", "student"])
    assert runs.loc[("od", "L3-H384"), "options"] == options
    assert runs.loc[("none", "L3-H384"), "options"] == {"objective": "none"}


def test_a_task_that_is_learnt_in_german(study):
    """Its test is German, the gap from German; English is one of the others."""
    add_languages(study[2])
    for path in [study[2] / "teacher.json", *study[2].glob("*_[0-9].json")]:
        tasks = json.loads(path.read_text())["tasks"]
        tasks["topic"]["language"] = "de"
        tasks["topic"]["language_examples"] = {"en": 500, "fr": 250}
        for run in tasks["topic"]["runs"]:
            run["languages"]["en"] = run["languages"].pop("es")
        change(path, tasks=tasks)
    table = several_languages(study[1]).analyse().per_language.set_index(["method", "student", "task"])
    row = table.loc[("teacher", "teacher", "topic")]
    assert row[["de", "en", "fr"]].tolist() == pytest.approx([0.82, 0.72, 0.62])
    assert row[["mean", "mean_of_others", "gap"]].tolist() == pytest.approx([0.72, 0.67, 0.15])
    assert pd.isna(table.loc[("none", "L3-H384", "retrieval"), "gap"])


def test_languages_by_hand(study):
    """The teacher scores 0.80 + 0.02 on topic, fifth of the tasks, in English; less by 0.1 and 0.2 elsewhere."""
    add_languages(study[2])
    table = several_languages(study[1]).analyse().per_language.set_index(["method", "student", "task"])
    assert list(table.columns) == ["setting", "metric", "en", "es", "fr", "hi", "mean", "mean_without_english", "gap"]
    assert len(table) == 2 * (1 + len(METHODS) * 2)
    row = table.loc[("teacher", "teacher", "topic")]
    assert row[["en", "es", "fr"]].tolist() == pytest.approx([0.82, 0.72, 0.62]) and pd.isna(row["hi"])
    assert row[["mean", "mean_without_english", "gap"]].tolist() == pytest.approx([0.72, 0.67, 0.15])
    row = table.loc[("none", "L3-H384", "retrieval")]
    means = row[["es", "hi", "mean", "mean_without_english"]].tolist()
    assert means == pytest.approx([0.5, 0.25, 0.375, 0.375])
    assert row[["en", "fr", "gap"]].isna().all()


def test_the_macro_takes_the_mean_over_languages_and_no_probe(study):
    """Topic loses 0.1 on average over its three languages, so the macro of five tasks loses 0.02."""
    before = study[1].analyse().summary.set_index(["method", "student"])
    add_languages(study[2], probe=0.9)
    after = several_languages(study[1]).analyse().summary.set_index(["method", "student"])
    assert (before["test"] - after["test"]).tolist() == pytest.approx([0.02] * len(before))
    assert after["development"].tolist() == pytest.approx(before["development"].tolist())
    # Languages shift every seed alike: the chance of fine-tuning, and so the interval, stays what it was.
    width = (before["test_high"] - before["test_low"]).tolist()
    assert (after["test_high"] - after["test_low"]).tolist() == pytest.approx(width)
    errors = several_languages(study[1]).analyse().sampling_error.set_index("task")
    assert errors.loc["topic", "test_examples"] == 1000 + 500 + 250 and errors.loc["boolq", "test_examples"] == 1000


def test_scores_by_language_are_a_table_where_there_are_several(study, tmp_path):
    one = study[1].analyse()
    names = {path.name for path in tables.write_comparison(one, tmp_path / "one")}
    assert {"per_task.csv", "costs.csv", "distillation.csv"} <= names and one.per_language.empty
    add_languages(study[2])
    several = several_languages(study[1]).analyse()
    written = {path.name for path in tables.write_comparison(several, tmp_path / "several")}
    assert written == names | {"per_language.csv"}
    results = several.results
    table = pd.read_csv(tmp_path / "several" / "per_language.csv")
    assert table.loc[0, ["method", "task", "en", "es", "gap"]].tolist() == ["teacher", "topic", 0.82, 0.72, 0.15]
    assert set(results.probes["language"]) == {"es", "hi"} and results.probes["from_english"].iloc[0] == 0.4


def topic(content: dict) -> dict:
    return content["tasks"]["topic"]


def retrieval(content: dict) -> dict:
    return content["probes"]["retrieval"]


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (
            lambda content: topic(content)["runs"][1]["languages"].pop("es"),
            r"tested in \['fr'\]; allowed: \['es', 'fr'\]",
        ),
        (lambda content: topic(content)["runs"][0]["languages"].update(es={"f1": 0.5}), "es scores .* lack 'macro_f1'"),
        (
            lambda content: topic(content)["language_examples"].update(es=9),
            "topic.language_examples = .*'es': 9.*allowed",
        ),
        (lambda content: content.pop("probes"), "'retrieval' is missing"),
        (
            lambda content: retrieval(content).update(test_examples=9),
            "probes.retrieval.test_examples = 9; allowed: 300",
        ),
        (lambda content: retrieval(content)["languages"].pop("hi"), r"probes.retrieval.languages = \['es'\]; allowed"),
        (lambda content: retrieval(content)["languages"]["hi"].pop("accuracy"), "'hi' lack 'accuracy'"),
    ],
)
def test_a_run_that_lacks_a_language_or_a_probe_is_refused(study, damage, message):
    add_languages(study[2])
    path = study[2] / "od_L3-H384_1.json"
    content = json.loads(path.read_text())
    damage(content)
    path.write_text(json.dumps(content))
    with pytest.raises(StudyError, match=message) as error:
        several_languages(study[1]).load()
    assert "\n" not in str(error.value) and "od_L3-H384_1.json" in str(error.value)


def test_macro_and_retained_are_those_computed_by_hand(study):
    table = analysis.macro(load(study)).set_index(["method", "student"])
    assert table.loc[("teacher", "teacher"), "test"].item() == pytest.approx(0.80)
    assert table.loc[("mha-minilmv2", "L3-H384"), "test"].item() == pytest.approx(0.70)
    assert table.loc[("mha-minilmv2", "L3-H384"), "development"].item() == pytest.approx(0.68)
    assert table.loc[("mha-minilmv2", "L3-H384"), "retained"].item() == pytest.approx(0.70 / 0.80)
    assert table.loc[("none", "L3-H384"), "test"].item() == pytest.approx((0.59 + 0.61) / 2)


def test_interval_of_one_distillation_seed_is_that_of_its_fine_tunings(study):
    """Five tasks, two fine-tunings at -+0.01 each: a task mean's standard error is 0.01, and each adds a degree of
    freedom. The teacher's lie at -+0.01 too, seed by seed: of 0.72 - 0.9 x 0.80, a tenth of that is left to chance."""
    row = study[1].analyse().summary.query("method == 'od' and student == 'L3-H384'").iloc[0]
    half = stats.t.ppf(0.975, 5) * 0.01 / 5**0.5
    assert (row["test_low"], row["test_high"]) == pytest.approx((0.72 - half, 0.72 + half))
    half *= 0.1 / 0.80
    assert (row["retained_low"], row["retained_high"]) == pytest.approx((0.90 - half, 0.90 + half))


def test_intervals_of_several_distillation_seeds_count_their_spread(tmp_path):
    """Macros 0.600, 0.604, 0.608. The teacher's chance (5 degrees of freedom) is independent of it."""
    made = make_study(tmp_path, METHODS, seeds=(1, 2, 3))
    write_grid(made, SCORES)
    row = made.analyse().summary.query("method == 'none'").iloc[0]
    assert row["test"] == pytest.approx(0.604)
    error = 0.004 / 3**0.5
    half = stats.t.ppf(0.975, 2) * error
    assert (row["test_low"], row["test_high"]) == pytest.approx((0.604 - half, 0.604 + half))
    share, of_teacher = 0.604 / 0.80, 0.604 / 0.80 * 0.01 / 5**0.5
    total = error**2 + of_teacher**2
    freedom = total**2 / (error**4 / 2 + of_teacher**4 / 5)
    half = stats.t.ppf(0.975, freedom) * total**0.5 / 0.80
    assert (row["retained_low"], row["retained_high"]) == pytest.approx((share - half, share + half))


def test_one_value_has_no_interval(study):
    results = load(study)
    single = Analysis(replace(results, scores=results.scores.query("finetuning_seed == 1")))
    table = single.summary
    assert table[["test_low", "test_high", "retained_low", "retained_high"]].isna().all(axis=None)
    best = single.headline["students"]["L3-H384"]
    assert best["retained_percent_low"] is None and best["retained_percent"] is not None


def test_the_best_method_is_chosen_on_development_and_reported_on_test_data(study):
    best = study[1].analyse().headline["students"]["L3-H384"]
    assert best["method"] == "mha-minilmv2"
    assert best["test"] == 0.70 and best["development"] == 0.68
    assert best["retained_percent"] == 87.5
    assert best["speed_up"] == 2.0
    assert best["margin_over_none"] == 10.0 and best["margin_over_mlm"] == 8.0
    # Both have the same fine-tuning noise, seed by seed: nothing of their difference is left to chance.
    assert best["margin_over_none_low"] == 10.0 == best["margin_over_none_high"]


def test_the_floor_is_never_the_best_method(tmp_path):
    made = make_study(tmp_path, ["none", "od"], students=["L3-H384"])
    write_grid(made, {("none", "L3-H384"): 0.7, ("od", "L3-H384"): 0.6})
    best = made.analyse().headline["students"]["L3-H384"]
    assert best["method"] == "od" and best["margin_over_none"] == -10.0
    assert "margin_over_mlm" not in best


def test_sampling_error_is_binomial_and_for_accuracy_alone(study):
    table = study[1].analyse().sampling_error.set_index("task")
    assert table.loc["boolq", "standard_error"] == pytest.approx((0.8 * 0.2 / 1000) ** 0.5)
    assert table.loc["boolq", "majority_share"] == 0.62
    assert table.loc[["sts-b", "topic"], ["standard_error", "majority_share"]].isna().all(axis=None)


def test_tables_hold_every_cell(study, tmp_path):
    tables.write_comparison(study[1].analyse(), tmp_path / "tables")
    per_task, costs, distillation = (
        pd.read_csv(tmp_path / "tables" / f"{name}.csv") for name in ("per_task", "costs", "distillation")
    )
    assert len(per_task) == 1 + len(METHODS) * 2
    row = per_task.set_index(["method", "student"]).loc[("none", "L3-H384")]
    assert row[["sentiment", "topic", "macro", "retained_percent"]].tolist() == [0.58, 0.62, 0.60, 75.0]
    assert row["topic_sd"] == pytest.approx(0.01 * 2**0.5, abs=1e-4)  # two fine-tunings at -+0.01
    assert costs["student"].tolist() == ["teacher", "L3-H384", "L3-H192"]
    assert costs["latency_ms_batch_1"].tolist() == [20.0, 10.0, 5.0]
    assert costs["speed_up_batch_32"].tolist() == [1.0, 2.0, 4.0]
    assert set(distillation["method"]) == {"teacher", "mlm", "od", "mha-minilmv2"}  # `none` does not train


def test_deviations_are_those_between_distilled_models_where_there_are_several(tmp_path):
    made = make_study(tmp_path, METHODS, seeds=(1, 2, 3))
    write_grid(made, SCORES)
    row = made.analyse().per_task.query("method == 'none'").iloc[0]
    assert row["topic"] == pytest.approx(0.624) and row["topic_sd"] == pytest.approx(0.004)


def test_what_was_found_is_said_from_the_numbers(study):
    said = tables.sentences(study[1].analyse())
    assert "* L3-H384: mha-minilmv2, chosen on development data, keeps 87.5 % of the teacher's score" in said
    assert "methods lie between 77.5 and 90.0 %" in said
    assert "Over no training, the floor: +10.0 points, its 95 % interval above zero." in said
    assert "Over training without a teacher: +8.0 points, its 95 % interval above zero." in said
    assert "L3-H384: MHA: MiniLMv2, chosen" in tables.sentences(study[1].analyse(), label)
    assert "(median of 6 runs;" in said


def test_headline_file_is_valid_json(study, tmp_path):
    own = study[1].analyse()
    tables.write_comparison(own, tmp_path / "new")
    assert json.loads((tmp_path / "new" / "headline.json").read_text()) == own.headline


def test_an_unwritable_folder_is_one_line(study, tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(StudyError, match="cannot be written") as error:
        tables.write_comparison(study[1].analyse(), tmp_path / "file" / "tables")
    assert "\n" not in str(error.value)


def test_the_last_interval_says_whether_a_curve_has_flattened(study):
    """Held-out losses 8, 5, 4.25, 4: the last interval brought 0.25 of 4 in all, 6.25 percent."""
    path = study[2] / "od_L3-H384_1.json"
    training = json.loads(path.read_text())["distillation"]
    for point, loss in zip(training["curve"], (8, 5, 4.25, 4), strict=True):
        point["loss"] = loss
    change(path, distillation=training)
    table = study[1].analyse().distillation.set_index(["method", "student"])
    assert table.loc[("od", "L3-H384"), "last_interval_percent"] == pytest.approx(6.25)
    assert "none" not in table.index and len(table) == len(study[1].analyse().distillation)
    # A teacher's own head is measured once: there is no fall, and no warning on the page, which would show a path.
    change(path, distillation=training | {"curve": training["curve"][:1]})
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        table = study[1].analyse().distillation.set_index(["method", "student"])
    assert math.isnan(table.loc[("od", "L3-H384"), "last_interval_percent"])


@pytest.mark.parametrize(
    ("name", "package", "version"),
    [
        ("od_L3-H192_1.json", "torch", "2.14.0"),
        ("latency.json", "transformers", "4.57.0"),
        ("tasks.json", "python", "3.12"),
    ],
)
def test_numbers_of_different_versions_are_not_mixed(study, name, package, version):
    change(study[2] / name, environment=ENVIRONMENT | {package: version})
    with pytest.raises(StudyError) as error:
        load(study)
    line = str(error.value)
    assert "\n" not in line and name in line and package in line and version in line and "allowed" in line


def test_another_patch_of_python_and_another_build_are_the_same_version(study):
    change(study[2] / "od_L3-H192_1.json", environment=ENVIRONMENT | {"python": "3.11.9", "torch": "2.13.0+cpu"})
    assert len(load(study).runs) == 1 + 2 * len(METHODS)


def test_one_table_has_one_teacher_corpus_precision_and_revision(study):
    """The odd one is named, whichever file it is."""
    for path in (study[2] / "teacher.json", *study[2].glob("*_*.json")):
        content = json.loads(path.read_text())
        content["hashes"] = {"teacher": "a", "corpus": "b", "tasks": "c", "weights": path.stem}
        if content["distillation"]:
            content["distillation"] |= {"precision": "fp32", "revisions": {"training": 1}}
        path.write_text(json.dumps(content))
    load(study)
    file = study[2] / "od_L3-H192_1.json"
    whole = json.loads(file.read_text())
    trained = whole["distillation"]
    for key, odd in (
        ("hashes.corpus", whole | {"hashes": whole["hashes"] | {"corpus": "x"}}),
        ("distillation.precision", whole | {"distillation": trained | {"precision": "bf16"}}),
        (
            "distillation.revisions.training",
            whole | {"distillation": whole["distillation"] | {"revisions": {"training": 2}}},
        ),
    ):
        file.write_text(json.dumps(odd))
        with pytest.raises(StudyError, match=rf"od_L3-H192_1.*{re.escape(key)} = .*; allowed: .* delete the file"):
            load(study)
    file.write_text(json.dumps(whole))
    load(study)


@pytest.mark.parametrize("schema", [1, 3, None])
def test_a_file_of_another_schema_is_refused(study, schema):
    path = study[2] / "od_L3-H192_1.json"
    content = json.loads(path.read_text()) | {"schema": schema}
    if schema is None:
        del content["schema"]
    path.write_text(json.dumps(content))
    with pytest.raises(StudyError, match="od_L3-H192_1.json: schema") as error:
        load(study)
    assert "\n" not in str(error.value)


def test_a_field_that_the_schema_does_not_have_is_refused(study):
    change(study[2] / "od_L3-H192_1.json", accuracy=0.9)
    with pytest.raises(StudyError, match="od_L3-H192_1.json: accuracy"):
        load(study)
