"""params.yaml: every mistake one line naming key, value and what is allowed; profiles laid over it; variants."""

from __future__ import annotations

import copy
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path
from typing import get_args

import pytest
from pydantic import ValidationError
from ruamel.yaml import YAML

from study import StudyError
from study.config import Params
from study.files import find_root
from study.methods import TEXTS, TaskName
from study.params import load_params, merge, one_line, read_yaml
from study.revisions import REVISIONS
from study.sections import TASK_LANGUAGES

ROOT = Path(__file__).parents[1]
FIXTURES = Path(__file__).parent / "fixtures"
pytestmark = pytest.mark.fast


@pytest.fixture
def folder(tmp_path):
    """A study's folder with the parameters of the fixtures and one profile."""
    shutil.copy(FIXTURES / "params.yaml", tmp_path)
    (tmp_path / "notebooks").mkdir()
    (tmp_path / "profiles" / "short").mkdir(parents=True)
    (tmp_path / "profiles" / "short" / "params.yaml").write_text("distillation: {steps: 7}\ngrid: {seeds: [4, 5]}\n")
    return tmp_path


def edit(folder: Path, change) -> Path:
    yaml, path = YAML(), folder / "params.yaml"
    document = yaml.load(path)
    change(document)
    with path.open("w") as stream:
        yaml.dump(document, stream)
    return path


def put(value, *keys):
    def change(document):
        for key in keys[:-1]:
            document = document[key]
        document[keys[-1]] = value

    return change


def both(*changes):
    def change(document):
        for each in changes:
            each(document)

    return change


METHOD = ("methods", "mha-minilmv2")
MPNET = {"layers": 12, "width": 768, "heads": 12, "intermediate": 3072}
RATES = ("students", "L4-H192", "learning_rates")
MISTAKES = {  # name: (change, what the line has to hold: key, value, allowed)
    "a student's rate for a method that does not exist": (
        put({"magic": 1e-3}, *RATES),
        ["students.L4-H192.learning_rates", "'magic'", "allowed: mlm, od"],
    ),
    "a student's rate for the untrained floor": (
        put({"none": 1e-3}, *RATES),
        ["students.L4-H192.learning_rates", "'none'", "allowed: mlm, od"],
    ),
    "a student with a rate for some of its methods": (
        put({"mlm": 1e-3}, *RATES),
        ["students.L4-H192.learning_rates", "od is missing", "every method"],
    ),
    "a student's rate of zero": (put({"mlm": 0.0}, *RATES), ["students.L4-H192.learning_rates.mlm", "0.0"]),
    "unknown key": (put(1, "distillation", "step"), ["distillation.step", "unknown key"]),
    "mistyped key": (
        lambda params: params["masking"].update(fractoin=params["masking"].pop("fraction")),
        ["masking.fractoin = 0.15: unknown key, where fraction is missing"],
    ),
    "unknown key at the top": (put(1, "grids"), ["grids", "unknown key"]),
    "unknown key of a method": (put(1, *METHOD, "temperature"), ["methods.mha-minilmv2.temperature", "unknown key"]),
    "unknown key of the method none": (put(1, "methods", "none", "steps"), ["methods.none.steps", "unknown key"]),
    "missing key": (
        lambda document: document["corpus"].pop("seed"),
        ["corpus.seed: key is missing; allowed: a value such as 1"],
    ),
    "unknown method in the grid": (
        lambda document: document["grid"]["methods"].append("mha-minilm"),
        ["grid.methods", "'mha-minilm'", "allowed", "mha-minilmv2", "none", "od"],
    ),
    "unknown student in the grid": (
        put(["L2-H128"], "grid", "students", "english"),
        ["grid.students.english", "'L2-H128'", "L3-H192"],
    ),
    "plain inputs for a method that predicts masked tokens": (
        put("plain", "methods", "od", "inputs"),
        ["methods.od.inputs", "'plain'", "'masked'"],
    ),
    "unknown student to tune on": (
        put(["L9"], "tuning", "students", "english"),
        ["tuning.students.english", "'L9'", "L3-H192"],
    ),
    "unknown setting to tune in": (put({"klingon": []}, "tuning", "students"), ["tuning.students", "'klingon'"]),
    "student to tune on that is larger than its teacher": (
        both(put(12, "students", "L6-H192", "layers"), put(["L6-H192"], "tuning", "students", "english")),
        ["students.L6-H192.layers = 12", "settings.english.teacher.layers", "at most 6"],
    ),
    "ablations without students": (
        put(["mapping"], "grid", "ablations", "english", "variants"),
        ["grid.ablations.english", "['mapping']", "both"],
    ),
    "ablations of a student that is not run": (
        put({"variants": ["mapping"], "students": ["L6-H192"]}, "grid", "ablations", "english"),
        ["grid.ablations.english.students", "'L6-H192'", "L3-H384, L3-H192"],
    ),
    "an ablation that the grid runs anyway": (
        both(
            put({"variants": ["od-and-mlm"], "students": ["L3-H192"]}, "grid", "ablations", "english"),
            lambda document: document["grid"]["methods"].append("od-and-mlm"),
        ),
        ["grid.ablations.english.variants", "'od-and-mlm'", "other methods"],
    ),
    "ablations of an unknown setting": (
        put({"variants": [], "students": []}, "grid", "ablations", "german"),
        ["grid.ablations", "'german'", "english, multilingual"],
    ),
    "an unknown ablation": (
        put({"variants": ["magic"], "students": ["L3-H192"]}, "grid", "ablations", "english"),
        ["grid.ablations.english.variants", "'magic'", "mapping", "hs-uniform+last-mapping-reverse"],
    ),
    "a seed named twice": (put([1, 2, 1], "grid", "seeds"), ["grid: seeds = [1, 2, 1]", "twice", "each once"]),
    "a student named twice": (
        put(["L3-H192", "L3-H192"], "grid", "students", "english"),
        ["grid: students.english = ['L3-H192', 'L3-H192']", "each once"],
    ),
    "a negative seed": (put([-1], "finetuning", "seeds"), ["finetuning.seeds.0", "-1", "greater than or equal to 0"]),
    "a probe alone": (
        put(["retrieval"], "settings", "multilingual", "tasks"),
        ["settings.multilingual", "['retrieval']", "at least one task that is learnt"],
    ),
    "an ablation below the teacher's layers": (
        both(
            put([7], "variants", "from-top", "teacher_layer_from_top"),
            put({"variants": ["from-top"], "students": ["L3-H192"]}, "grid", "ablations", "english"),
        ),
        ["methods.mha-minilmv2-from-top-7.teacher_layer_from_top = 7", "0 to 5"],
    ),
    "a setting without students": (
        put([], "grid", "students", "english"),
        ["grid.students.english", "[]", "at least one student"],
    ),
    "unknown setting in the grid": (put(["german"], "grid", "settings"), ["grid.settings", "'german'", "english"]),
    "empty grid": (put([], "grid", "seeds"), ["grid.seeds", "[]", "at least 1"]),
    "student without layers": (
        put(0, "students", "L3-H192", "layers"),
        ["students.L3-H192.layers", "= 0", "greater than 0"],
    ),
    "width not divisible by heads": (
        put(190, "students", "L3-H192", "width"),
        ["students.L3-H192", "heads = 12", "width = 190", "allowed"],
    ),
    "relation heads do not divide": (
        put(128, *METHOD, "relation_heads"),
        ["methods.mha-minilmv2.relation_heads", "= 128", "192", "allowed"],
    ),
    "no relation heads": (
        put(0, *METHOD, "relation_heads"),
        ["methods.mha-minilmv2.relation_heads", "= 0", "greater than 0"],
    ),
    "negative learning rate": (
        put(-1e-4, *METHOD, "learning_rate"),
        ["methods.mha-minilmv2.learning_rate", "-0.0001", "greater than 0"],
    ),
    "not a number": (put(float("nan"), *METHOD, "learning_rate"), ["methods.mha-minilmv2.learning_rate", "nan"]),
    "negative fine-tuning rate": (
        put([3e-4, -1.0], "finetuning", "learning_rates"),
        ["finetuning.learning_rates", "-1.0"],
    ),
    "student deeper than its teacher": (
        put(7, "students", "L3-H192", "layers"),
        ["students.L3-H192.layers", "= 7", "teacher.layers", "at most 6"],
    ),
    "student wider than its teacher": (
        both(put(768, "students", "L3-H192", "width")),
        ["students.L3-H192.width", "= 768", "at most 384"],
    ),
    "teacher layer below the first": (
        put(6, *METHOD, "teacher_layer_from_top"),
        ["methods.mha-minilmv2.teacher_layer_from_top", "= 6", "0 to 5"],
    ),
    "unknown mapping": (
        put("bottom", "methods", "hs-top", "mapping"),
        ["methods.hs-top.mapping", "'bottom'", "uniform-consecutive", "uniform+last"],
    ),
    "unknown task of a setting": (
        put(["sst-2"], "settings", "english", "tasks"),
        ["settings.english.tasks", "'sst-2'", "sentiment", "boolq"],
    ),
    "unknown task among candidates": (
        put(["sst-2"], "settings", "english", "candidates"),
        ["settings.english.candidates", "'sst-2'", "sentiment", "boolq"],
    ),
    "budgets without the untrained student": (
        both(
            put({"long": {"steps": 400}}, "budgets"),
            put({"english": ["long"]}, "grid", "budgets"),
            put(["mlm", "od"], "grid", "methods"),
        ),
        ["grid.methods", "'none'", "grid.budgets.english = ['long']", "allowed: none and any of"],
    ),
    "an analysis of budgets without the untrained student": (
        both(put(["budgets"], "grid", "analyses"), put(["mlm", "od"], "grid", "methods")),
        ["grid.methods", "'none'", "grid.analyses = ['budgets']", "allowed: none and any of"],
    ),
    "unknown task of the budget": (
        lambda document: document["finetuning"]["tasks"].update({"mnli": document["finetuning"]["tasks"]["topic"]}),
        ["finetuning.tasks", "mnli", "sentiment", "boolq"],
    ),
    "task without a budget": (
        lambda document: document["finetuning"]["tasks"].pop("topic"),
        ["settings.english.tasks", "'topic'", "finetuning.tasks"],
    ),
    "unknown text": (put(["wiki"], "settings", "english", "texts"), ["settings.english.texts", "'wiki'", "wikipedia"]),
    "text in a language without data": (
        put(["wikipedia-de"], "settings", "multilingual", "texts"),
        ["settings.multilingual.texts", "'wikipedia-de'", "wikipedia-es", "interface-de"],
    ),
    "task in a language without data": (
        lambda document: document["finetuning"]["tasks"]["topic-multilingual"]["languages"].append("de"),
        ["finetuning", "tasks.topic-multilingual.languages", "'de'", "allowed: en, es, fr"],
    ),
    "English task in another language": (
        lambda document: document["finetuning"]["tasks"]["topic"].update({"languages": ["en", "es"]}),
        ["finetuning", "tasks.topic.languages", "'es'", "allowed: en"],
    ),
    "task without the language it is trained on": (
        put(["es", "fr"], "finetuning", "tasks", "intents", "languages"),
        ["finetuning", "tasks.intents.languages = ['es', 'fr']", "lacks 'en'", "allowed: en and any of ar, bg"],
    ),
    "retrieval without another language": (
        put(["en"], "finetuning", "tasks", "retrieval", "languages"),
        ["finetuning", "tasks.retrieval.languages", "['en']", "allowed: en and any of ar, bg"],
    ),
    "language exponent above one": (
        put(1.5, "corpus", "language_exponent"),
        ["corpus.language_exponent", "= 1.5", "less than or equal to 1"],
    ),
    "string for an integer": (put("200", "distillation", "steps"), ["distillation.steps", "'200'", "integer"]),
    "a value of a variant of a wrong type": (
        put("two", "variants", "temperature", "temperature"),
        ["variants.temperature.temperature = 'two'", "of od", "a valid number; allowed: a value such as 0.1"],
    ),
    "fraction for an integer": (put(1.5, "distillation", "steps"), ["distillation.steps", "1.5", "integer"]),
    "boolean for an integer": (put(True, "distillation", "steps"), ["distillation.steps", "True", "integer"]),
    "number for a list": (put(1, "grid", "seeds"), ["grid.seeds", "= 1", "list; allowed: a value such as [1]"]),
    "null for a number": (put(None, "distillation", "steps"), ["distillation.steps", "None", "integer"]),
    "unknown objective": (
        put("attention", *METHOD, "objective"),
        ["methods.mha-minilmv2", "'attention'", "attention_relation", "hidden_state"],
    ),
    "method without objective": (
        lambda document: document["methods"]["od"].pop("objective"),
        ["methods.od", "objective"],
    ),
    "unknown initialisation": (
        put("teacher", "initialisation"),
        ["initialisation", "'teacher'", "teacher-layers", "random"],
    ),
    "heads that projection cannot keep": (
        put(6, "students", "L3-H192", "heads"),
        ["students.L3-H192.heads", "= 6", "teacher-layers", "12"],
    ),
    "shares above one": (
        put(0.95, "masking", "mask_token"),
        ["masking", "mask_token + random_token", "= 1.05", "at most 1"],
    ),
    "accumulation does not divide": (
        put(3, "distillation", "accumulation_steps"),
        ["distillation", "accumulation_steps = 3", "batch_size = 16"],
    ),
    "a variant that extends nothing": (
        lambda document: document["variants"]["plain"].pop("extends"),
        ["variants.plain extends nothing", "extends: one or more of none, mlm, od"],
    ),
    "a variant that extends itself": (
        put("plain", "variants", "plain", "extends"),
        ["variants.plain extends itself", "allowed: none, mlm, od"],
    ),
    "a variant that extends another": (
        put("random", "variants", "plain", "extends"),
        ["variants.plain extends 'random'", "no entry of methods"],
    ),
    "a variant that changes nothing": (
        put({"extends": "od"}, "variants", "plain"),
        ["variants.plain changes nothing", "at least one key"],
    ),
    "a variant with two lists": (
        put({"extends": "od", "temperature": [1.0], "positions": ["all"]}, "variants", "plain"),
        ["variants.plain", "temperature, positions are lists", "one list"],
    ),
    "a variant with an empty list": (
        put({"extends": "od", "temperature": []}, "variants", "plain"),
        ["variants.plain", "temperature", "not empty"],
    ),
    "a value the method does not have": (
        put("everywhere", "variants", "all-positions", "positions"),
        ["variants.all-positions.positions = 'everywhere'", "of od", "'masked', 'sampled' or 'all'"],
    ),
    "a key the method does not have": (
        put(3, "variants", "heads", "layers"),
        ["variants.heads.layers = 3", "of mha-minilmv2", "unknown key"],
    ),
    "two methods of the same name": (
        put({"objective": "output_distribution", "learning_rate": 1e-4}, "methods", "od-and-mlm"),
        ["variants.and-mlm makes 'od-and-mlm', which is there already"],
    ),
    "as many operations as a method that is not trained": (
        put("none", "variants", "equal-compute", "equal_compute"),
        ["equal_compute", "'none'", "not trained"],
    ),
    "as many operations and a number of steps": (
        put(5, "variants", "equal-compute", "steps"),
        ["variants.equal-compute", "steps = 5", "one of them"],
    ),
    "an ablation of a method that is not run": (
        both(
            put(["od-and-mlm"], "grid", "ablations", "english", "variants"),
            put(["L3-H192"], "grid", "ablations", "english", "students"),
            put(["none", "mlm"], "grid", "methods"),
        ),
        ["grid.ablations.english.variants", "'od-and-mlm' extends 'od'", "not in grid.methods"],
    ),
    "a grid that is none": (put(5, "grid"), ["grid = 5", "dictionary"]),
    "settings of the grid that are no list": (put(1e9, "grid", "settings"), ["grid.settings = 1000000000.0", "list"]),
    "tasks that are none": (put(3, "tasks"), ["tasks = 3", "dictionary"]),
    "a task tested on nothing": (
        put({"mine": {"files": {"train": "a.csv", "test": {}}}}, "tasks"),
        ["tasks.mine.files: test = {}", "one for each language"],
    ),
    "an unknown analysis": (put(["budget"], "grid", "analyses"), ["grid.analyses", "'budget'", "comparison"]),
    "a variant that extends a number": (
        put(5, "variants", "plain", "extends"),
        ["variants.plain.extends = 5; allowed: one or more of none, mlm"],
    ),
    "attention scores of a teacher that has others": (
        both(
            put({"name": "all-mpnet-base-v2", **MPNET}, "settings", "english", "teacher"),
            put({"objective": "attention_score", "mapping": "last", "learning_rate": 0.1}, "methods", "maps"),
            put(["none", "maps"], "grid", "methods"),
            put(["L3-H192"], "grid", "students", "english"),
        ),
        ["methods.maps: objective attention_score: english is mpnet", "allowed: bert, roberta, xlm-roberta"],
    ),
    "attention scores of a teacher that has others, in a system": (
        both(
            put({"name": "all-mpnet-base-v2", **MPNET}, "settings", "english", "teacher"),
            put({"english": ["cr-ild"]}, "grid", "neighbours"),
        ),
        ["neighbours.cr-ild.model = teacher: mpnet has no scores", "allowed: a model of bert, roberta"],
    ),
    "a decoder made of an encoder that has none": (
        both(
            put({"name": "all-mpnet-base-v2", **MPNET}, "settings", "english", "teacher"),
            put({"english": ["miniend"]}, "grid", "neighbours"),
        ),
        ["neighbours.miniend.model = teacher: mpnet has no decoder", "allowed: a model of bert, roberta"],
    ),
    "a source task whose labels are numbers": (
        both(
            put({"english": ["xtremedistil"]}, "grid", "neighbours"),
            put({"xtremedistil": {"source": "sts-b"}}, "neighbours"),
        ),
        ["neighbours.xtremedistil.source: labels of 'sts-b' are numbers", "allowed: sentiment, boolq"],
    ),
    "rates chosen on a seed of the grid": (
        put([0, 1], "grid", "seeds"),
        ["tuning.seed = 0", "grid.seeds = [0, 1]", "allowed: any other seed"],
    ),
    "rates chosen on a seed of a budget": (
        both(
            put({"long": {"steps": 9, "seeds": [0]}}, "budgets"),
            put({"english": ["long"], "multilingual": []}, "grid", "budgets"),
        ),
        ["tuning.seed = 0", "budgets.long.seeds = [0]", "allowed: any other seed"],
    ),
    "a seed of a budget without an untrained student": (
        both(
            put({"long": {"steps": 9, "seeds": [1, 7]}}, "budgets"),
            put({"english": ["long"], "multilingual": []}, "grid", "budgets"),
        ),
        ["budgets.long.seeds = [1, 7]: 7 is not in grid.seeds; allowed: some of"],
    ),
    "an adaptation that ends in its warm-up": (
        put(40, "adaptation", "steps"),
        ["adaptation.warmup_steps = 40", "adaptation.steps = 40", "allowed: 0 to 39"],
    ),
    "an adaptation of one teacher that ends in the warm-up of all": (
        put({"steps": 30}, "settings", "english", "adaptation"),
        ["adaptation.warmup_steps = 40", "settings.english.adaptation.steps = 30", "allowed: 0 to 29"],
    ),
    "a teacher's own warm-up of more than all steps": (
        put({"warmup_steps": 401}, "settings", "english", "adaptation"),
        ["settings.english.adaptation.warmup_steps = 401", "adaptation.steps = 400", "allowed: 0 to 399"],
    ),
    "training that is warm-up alone": (
        put(1.0, "distillation", "warmup_fraction"),
        ["distillation.warmup_fraction = 1.0", "less than 1"],
    ),
    "fine-tuning that is warm-up alone": (
        put(1.0, "finetuning", "warmup_fraction"),
        ["finetuning.warmup_fraction = 1.0", "less than 1"],
    ),
    "misspelt precision": (put("fp16", "precision"), ["precision", "'fp16'", "auto", "bf16", "fp32"]),
}


@pytest.mark.parametrize("name", MISTAKES)
def test_a_mistake_is_one_line_naming_key_value_and_allowed(folder, name):
    change, named = MISTAKES[name]
    edit(folder, change)
    with pytest.raises(StudyError) as error:
        load_params(root=folder)
    line = str(error.value)
    assert "\n" not in line and line.startswith("params.yaml: ")
    assert [part for part in named if part not in line] == [], line


def places(values, *above):
    """Every key of nested values, and the first entry of every list, with the keys above it."""
    entries = values.items() if isinstance(values, dict) else enumerate(values[:1]) if isinstance(values, list) else ()
    for key, value in entries:
        yield (*above, key)
        yield from places(value, *above, key)


def test_a_value_of_a_wrong_kind_is_told_with_a_right_one(folder):
    """Of every key: nothing is bytes. What is told, in its place, is of the right kind."""
    values = load_params(root=folder).model_dump(exclude={"memberships", "variants"})
    values["methods"]["sum"] = {"objective": "sum", "learning_rate": 0.1, "parts": [dict(values["methods"]["mlm"])]}
    values["methods"]["sum"]["parts"][0].pop("learning_rate")
    told = 0
    for place in list(places(values)):
        changed = copy.deepcopy(values)
        put(b"none of it", *place)(changed)
        with pytest.raises(ValidationError) as error:
            Params.model_validate(changed)
        line = one_line(error.value)
        if right := re.search(r"; allowed: a value such as (.*?)(?: \(and \d+ more\))?$", line):
            told += 1
            put(YAML(typ="safe").load(right[1]), *place)(changed)
            try:
                Params.model_validate(changed)
            except ValidationError as other:  # of names, and of sizes that do not fit others
                kinds = {mistake["type"] for mistake in other.errors()}
                assert kinds == {"value_error"}, (line, one_line(other))
        else:
            assert re.search(r"allowed: |Input should be ('|True|False)|expected tags: '", line), line
    assert told > 200


def test_the_mistakes_start_from_a_valid_file(folder):
    assert load_params(root=folder).grid.settings == ["english", "multilingual"]


BROKEN = {
    "invalid YAML": (b"grid: [english", ["line", "not valid YAML"]),
    "duplicate key": (b"masking: 1\ngrid: 1\ngrid: 2\n", ["line 3", "duplicate", "grid"]),
    "duplicate key below another": (b"grid:\n  seeds: [1]\n  seeds: [2]\n", ["line 3", "duplicate", "seeds"]),
    "tab": (b"grid:\n\tseeds: [1]\n", ["line 2", "a tab"]),
    "byte-order mark": (b"\xef\xbb\xbfgrid: 1\n", ["line 1", "a byte-order mark"]),
    "Windows line ends": (b"grid: 1\r\nmasking: 2\r\n", ["line 1", "a Windows line end"]),
    "another encoding": (b"grid: \xff\n", ["not UTF-8 at byte 6"]),
    "list": (b"- profile\n", ["list", "mapping"]),
    "empty": (b"", ["NoneType", "mapping"]),
}


@pytest.mark.parametrize("where", ["params.yaml", "profiles/short/params.yaml"])
@pytest.mark.parametrize("name", BROKEN)
def test_what_cannot_be_read_is_one_line_naming_file_and_line(folder, name, where):
    content, named = BROKEN[name]
    (folder / where).write_bytes(content)
    with pytest.raises(StudyError) as error:
        load_params("short", root=folder)
    line = str(error.value)
    assert "\n" not in line and where in line and [part for part in named if part not in line] == [], line


def test_tabs_in_comments_are_no_mistake(folder):
    with (folder / "params.yaml").open("a") as stream:
        stream.write("#\ta comment\n")
    assert load_params(root=folder)


def test_a_file_that_is_not_there(tmp_path):
    with pytest.raises(StudyError, match="No such file"):
        load_params(root=tmp_path)
    with pytest.raises(StudyError, match="no params.yaml beside notebooks/"):
        find_root(tmp_path)


def test_a_profile_is_laid_over_and_undone_by_leaving_it_out(folder):
    before = (folder / "params.yaml").read_bytes()
    default, short = load_params(root=folder), load_params("short", root=folder)
    assert (short.distillation.steps, short.grid.seeds) == (7, [4, 5])
    assert short.distillation.model_copy(update={"steps": default.distillation.steps}) == default.distillation
    assert short.methods == default.methods
    assert load_params(root=folder) == default and (folder / "params.yaml").read_bytes() == before


def test_a_new_profile_is_a_folder_with_params(folder):
    with pytest.raises(StudyError, match="profile 'weekend' is unknown.*allowed: laptop, short"):
        load_params("weekend", root=folder)
    (folder / "profiles" / "weekend").mkdir()
    with pytest.raises(StudyError, match="profile 'weekend' has no params.yaml"):
        load_params("weekend", root=folder)
    (folder / "profiles" / "weekend" / "params.yaml").write_text("distillation: {steps: 9}\n")
    assert load_params("weekend", root=folder).distillation.steps == 9


def test_a_mistake_in_a_profile_names_its_file(folder):
    (folder / "profiles" / "short" / "params.yaml").write_text("grid: {methods: [magic]}\n")
    with pytest.raises(StudyError, match="^profiles/short/params.yaml: grid.methods: 'magic'"):
        load_params("short", root=folder)


def test_values_of_an_alias_change_where_a_profile_changes_them_alone(folder):
    """Two students share rates by a YAML alias; a profile that changes one student's leaves the other's."""
    override = "students: {L3-H384: {learning_rates: {od: 0.5}}}\n"
    (folder / "profiles" / "short" / "params.yaml").write_text(override)
    before, after = load_params(root=folder).students, load_params("short", root=folder).students
    assert before["L3-H384"].learning_rates == before["L6-H384"].learning_rates
    assert after["L3-H384"].learning_rates["od"] == 0.5
    assert after["L6-H384"] == before["L6-H384"]


def test_merging_changes_neither_side():
    base, overrides = {"a": {"b": 1, "c": [1, 2]}}, {"a": {"c": [3]}, "d": None}
    assert merge(base, overrides) == {"a": {"b": 1, "c": [3]}, "d": None}
    assert base == {"a": {"b": 1, "c": [1, 2]}} and overrides == {"a": {"c": [3]}, "d": None}


def test_a_variant_makes_a_method_of_each_it_extends_and_of_each_value(folder):
    params = load_params(root=folder)
    assert params.memberships["mha-direct-from-top-4"].model_dump() == {
        "extends": "mha-direct",
        "variant": "from-top",
        "changes": {"teacher_layer_from_top": 4},
    }
    base = params.methods["mha-direct"]
    assert params.methods["mha-direct-from-top-4"] == base.model_copy(update={"teacher_layer_from_top": 4})
    assert params.methods["od-temperature-2"].temperature == 2.0
    assert params.methods["hs-uniform+last-plain"].inputs == "plain"
    made = [name for name, own in params.memberships.items() if own.variant == "heads"]
    assert made == [f"mha-minilmv2-heads-{heads}" for heads in (6, 24, 48)]


def test_a_setting_that_is_not_run_may_keep_its_students(folder):
    edit(folder, put(["english"], "grid", "settings"))
    params = load_params(root=folder)
    assert params.grid.students["multilingual"] and params.grid.settings == ["english"]


def test_ablations_are_named_by_variant_or_one_by_one(folder):
    ablations = {"students": ["L3-H192"], "variants": ["heads", "mha-direct-from-top-2"]}
    edit(folder, put(ablations, "grid", "ablations", "english"))
    params = load_params(root=folder)
    heads = [f"mha-minilmv2-heads-{heads}" for heads in (6, 24, 48)]
    assert params.ablated("english") == ["mha-direct-from-top-2", *heads] and params.ablated("multilingual") == []


def test_every_name_in_the_schema_has_a_revision():
    families = {"text": {name.partition("-")[0] for name in TEXTS}, "task": set(get_args(TaskName))}
    for room, names in families.items():
        assert {key.partition("/")[2] for key in REVISIONS if key.startswith(f"{room}/")} == names
    assert set(TASK_LANGUAGES) <= families["task"]
    assert all(revision >= 1 for revision in REVISIONS.values())


def test_every_key_has_a_comment():
    """On its own line, or on the line of the mapping whose uniform entries it explains."""
    explained_by_their_mapping = (
        "methods",
        "variants",
        "finetuning.tasks",
        "students",
        "grid.students",
        "grid.ablations",
        "tuning.students",
    )
    text = (FIXTURES / "params.yaml").read_text()
    stack, missing = [], []
    for line in text.splitlines():
        entry = re.match(r"( *)([\w+-]+):(.*)", line)
        if not entry:
            continue
        depth, key, rest = len(entry[1]) // 2, entry[2], entry[3]
        stack = [*stack[:depth], key]
        name = ".".join(stack)
        in_explained = name.rpartition(".")[0] in explained_by_their_mapping or key in (
            "objective",
            "learning_rate",
            "mapping",
        )
        in_explained |= name.startswith(("grid.ablations.", "students."))  # of each: the same keys
        block = not rest.strip()  # its keys explain themselves
        if "#" not in rest and not block and not (in_explained and name.startswith(explained_by_their_mapping)):
            missing.append(name)
    assert missing == []
    assert all(re.search(rf"^ *{name.rpartition('.')[2]}:.*#", text, re.M) for name in explained_by_their_mapping)


def study_command(folder: Path, *arguments: str) -> subprocess.CompletedProcess:
    environment = os.environ | {"PYTHONPATH": str(ROOT)}
    command = [sys.executable, "-m", "study", *arguments]
    return subprocess.run(command, cwd=folder, env=environment, capture_output=True, text=True, timeout=60)


def test_check_on_the_command_line(folder):
    outcome = study_command(folder, "check")
    assert (outcome.returncode, outcome.stderr) == (0, "") and "laptop" in outcome.stdout
    outcome = study_command(folder, "check", "short")
    assert (outcome.returncode, outcome.stderr) == (0, "") and "short" in outcome.stdout
    edit(folder, put(["magic"], "grid", "methods"))
    outcome = study_command(folder, "check")
    assert outcome.returncode == 1 and outcome.stdout == ""
    assert len(outcome.stderr.splitlines()) == 1 and "'magic'" in outcome.stderr


def test_reading_yaml_gives_plain_values(folder):
    assert type(read_yaml(folder / "params.yaml")) is dict
