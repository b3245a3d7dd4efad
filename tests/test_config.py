"""params.yaml: every mistake one line naming key, value and what is allowed; profiles that switch back and forth."""

from __future__ import annotations

import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
from ruamel.yaml import YAML

from study.__main__ import main
from study.config import Layout, StudyError, cell_title, find_root, load_params, use_profile

ROOT = Path(__file__).parents[1]
PROFILES = sorted(path.stem for path in (ROOT / "profiles").glob("*.yaml"))


@pytest.fixture
def folder(tmp_path):
    shutil.copy(ROOT / "params.yaml", tmp_path)
    shutil.copy(ROOT / "dvc.yaml", tmp_path)
    shutil.copytree(ROOT / "profiles", tmp_path / "profiles")
    use_profile("laptop", tmp_path / "params.yaml")
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
    "unknown key at the top": (put(1, "grids"), ["grids", "unknown key"]),
    "unknown key of a method": (put(1, *METHOD, "temperature"), ["methods.mha-minilmv2.temperature", "unknown key"]),
    "unknown key of the method none": (put(1, "methods", "none", "steps"), ["methods.none.steps", "unknown key"]),
    "missing key": (lambda document: document["corpus"].pop("seed"), ["corpus.seed", "missing"]),
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
        put(["hs-reverse"], "grid", "ablations", "english", "methods"),
        ["grid.ablations.english", "['hs-reverse']", "both"],
    ),
    "ablations of a student that is not run": (
        put({"methods": ["hs-reverse"], "students": ["L6-H192"]}, "grid", "ablations", "english"),
        ["grid.ablations.english.students", "'L6-H192'", "L3-H384, L3-H192"],
    ),
    "an ablation that the grid runs anyway": (
        put({"methods": ["od"], "students": ["L3-H192"]}, "grid", "ablations", "english"),
        ["grid.ablations.english.methods", "'od'", "other methods"],
    ),
    "ablations of an unknown setting": (
        put({"methods": [], "students": []}, "grid", "ablations", "german"),
        ["grid.ablations", "'german'", "english, multilingual"],
    ),
    "an unknown ablation": (
        put({"methods": ["magic"], "students": ["L3-H192"]}, "grid", "ablations", "english"),
        ["grid.ablations.english.methods", "'magic'", "hs-reverse"],
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
            put(7, "methods", "mha-direct-from-top-3", "teacher_layer_from_top"),
            put({"methods": ["mha-direct-from-top-3"], "students": ["L3-H192"]}, "grid", "ablations", "english"),
        ),
        ["methods.mha-direct-from-top-3.teacher_layer_from_top = 7", "0 to 5"],
    ),
    "a setting without students": (
        put([], "grid", "students", "english"),
        ["grid.students.english", "[]", "at least one student"],
    ),
    "students of a setting that is not run": (
        put(["english"], "grid", "settings"),
        ["grid.students.multilingual", "['L6-H384', 'L4-H192']", "grid.settings"],
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
    "not a number": (
        put(float("nan"), *METHOD, "learning_rate"),
        ["methods.mha-minilmv2.learning_rate", "nan"],
    ),
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
    "string for an integer": (
        put("200", "distillation", "steps"),
        ["distillation.steps", "'200'", "integer"],
    ),
    "fraction for an integer": (put(1.5, "distillation", "steps"), ["distillation.steps", "1.5", "integer"]),
    "boolean for an integer": (put(True, "distillation", "steps"), ["distillation.steps", "True", "integer"]),
    "number for a list": (put(1, "grid", "seeds"), ["grid.seeds", "= 1", "list"]),
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
    "misspelt precision": (put("fp16", "precision"), ["precision", "'fp16'", "auto", "bf16", "fp32"]),
}


@pytest.mark.parametrize("name", MISTAKES)
def test_a_mistake_is_one_line_naming_key_value_and_allowed(folder, name):
    change, named = MISTAKES[name]
    path = edit(folder, change)
    with pytest.raises(StudyError) as error:
        load_params(path)
    line = str(error.value)
    assert "\n" not in line and line.startswith("params.yaml: ")
    assert [part for part in named if part not in line] == [], line


def test_the_mistakes_start_from_a_valid_file(folder):
    assert load_params(folder / "params.yaml").profile == "laptop"


BROKEN = {
    "invalid YAML": ("profile: [smoke", ["not valid YAML"]),
    "duplicate key": ("profile: smoke\nprofile: laptop\n", ["not valid YAML", "duplicate", "profile"]),
    "tab": ("grid:\n\tseeds: [1]\n", ["not valid YAML"]),
    "list": ("- profile\n", ["list", "mapping"]),
    "empty": ("", ["NoneType", "mapping"]),
}


@pytest.mark.parametrize("name", BROKEN)
def test_what_is_no_mapping_is_one_line_naming_the_file(tmp_path, name):
    text, named = BROKEN[name]
    (tmp_path / "params.yaml").write_text(text)
    with pytest.raises(StudyError) as error:
        load_params(tmp_path / "params.yaml")
    line = str(error.value)
    assert "\n" not in line and "params.yaml" in line and [part for part in named if part not in line] == []


def test_a_file_that_is_not_there(tmp_path):
    with pytest.raises(StudyError, match="No such file"):
        load_params(tmp_path / "params.yaml")
    with pytest.raises(StudyError, match="no params.yaml beside a dvc.yaml"):
        find_root(tmp_path)


def leaves(values: dict, prefix: str = "") -> set[str]:
    keys = set()
    for key, value in values.items():
        keys |= leaves(value, f"{prefix}{key}.") if isinstance(value, dict) else {prefix + key}
    return keys


def test_the_profiles_exist():
    assert PROFILES == ["laptop", "overnight", "smoke"]


def test_profiles_override_the_same_keys_so_that_switching_back_restores_everything():
    keys = {name: leaves(YAML(typ="safe").load(ROOT / "profiles" / f"{name}.yaml")) for name in PROFILES}
    for name in PROFILES:
        assert keys[name] == keys["laptop"], (name, keys[name] ^ keys["laptop"])


@pytest.mark.parametrize("name", PROFILES)
def test_overlaid_and_written_profile_are_the_same(folder, name):
    overlaid = load_params(folder / "params.yaml", profile=name)
    use_profile(name, folder / "params.yaml")
    assert load_params(folder / "params.yaml") == overlaid
    assert overlaid.profile == name
    assert load_params(folder / "params.yaml", profile=name) == overlaid


def test_there_and_back_again_is_the_same_file_byte_for_byte(folder):
    path = folder / "params.yaml"
    first = path.read_bytes()
    for name in ("smoke", "overnight", "laptop"):
        use_profile(name, path)
    assert path.read_bytes() == first


def test_a_long_list_in_the_place_of_an_empty_one_gets_a_line_for_each_value(folder):
    use_profile("overnight", folder / "params.yaml")
    lines = (folder / "params.yaml").read_text().splitlines()
    ablations = load_params(folder / "params.yaml").grid.ablations["multilingual"]
    assert len(ablations.methods) > 4 and all(f"        - {name}" in lines for name in ablations.methods)
    assert f"      students: [{', '.join(ablations.students)}]" in lines


def test_writing_the_active_profile_again_changes_nothing(tmp_path):
    """Line breaks, the style of lists and all: what is in git is what switching writes."""
    for name in ("params.yaml", "dvc.yaml"):
        shutil.copy(ROOT / name, tmp_path)
    shutil.copytree(ROOT / "profiles", tmp_path / "profiles")
    use_profile(load_params(tmp_path / "params.yaml").profile, tmp_path / "params.yaml")
    assert (tmp_path / "params.yaml").read_text() == (ROOT / "params.yaml").read_text()


def test_switching_keeps_every_comment_and_what_profiles_do_not_set(folder):
    path = edit(folder, put(2.0, "methods", "od", "temperature"))
    comments = re.findall(r"#.*", (ROOT / "params.yaml").read_text())
    assert len(comments) > 50
    use_profile("overnight", path)
    assert re.findall(r"#.*", path.read_text()) == comments
    assert load_params(path).methods["od"].temperature == 2.0


def test_switching_leaves_no_draft_behind(folder):
    before = sorted(path.name for path in folder.iterdir())
    use_profile("smoke", folder / "params.yaml")
    assert sorted(path.name for path in folder.iterdir()) == before


def test_a_failing_switch_leaves_the_file_as_it_was(folder):
    path = folder / "params.yaml"
    before, files = path.read_bytes(), sorted(path.name for path in folder.iterdir())
    with pytest.raises(StudyError) as error:
        use_profile("weekend", path)
    assert "'weekend'" in str(error.value) and all(name in str(error.value) for name in PROFILES)
    (folder / "profiles" / "smoke.yaml").write_text("grid: {methods: [magic]}\n")
    with pytest.raises(StudyError, match="'magic'"):
        use_profile("smoke", path)
    (folder / "profiles" / "smoke.yaml").write_text("grid: [\n")
    with pytest.raises(StudyError, match="smoke.yaml: not valid YAML"):
        use_profile("smoke", path)
    assert path.read_bytes() == before and sorted(path.name for path in folder.iterdir()) == files


def test_every_key_has_a_comment():
    """On its own line, or on the line of the mapping whose uniform entries it explains."""
    explained_by_their_mapping = (
        "methods",
        "finetuning.tasks",
        "students",
        "grid.students",
        "grid.ablations",
        "tuning.students",
    )
    stack, missing = [], []
    for line in (ROOT / "params.yaml").read_text().splitlines():
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
    assert all(
        re.search(rf"^ *{name.rpartition('.')[2]}:.*#", (ROOT / "params.yaml").read_text(), re.M)
        for name in explained_by_their_mapping
    )


def study_command(folder: Path, *arguments: str) -> subprocess.CompletedProcess:
    environment = os.environ | {"PYTHONPATH": str(ROOT)}
    command = [sys.executable, "-m", "study", *arguments]
    return subprocess.run(command, cwd=folder, env=environment, capture_output=True, text=True, timeout=60)


def test_check_on_the_command_line(folder):
    outcome = study_command(folder, "check")
    assert (outcome.returncode, outcome.stderr) == (0, "") and "laptop" in outcome.stdout
    edit(folder, put(["magic"], "grid", "methods"))
    outcome = study_command(folder, "check")
    assert outcome.returncode == 1 and outcome.stdout == ""
    assert len(outcome.stderr.splitlines()) == 1 and "'magic'" in outcome.stderr


def test_use_on_the_command_line(folder):
    before = (folder / "params.yaml").read_bytes()
    outcome = study_command(folder, "use", "weekend")
    assert outcome.returncode == 1 and len(outcome.stderr.splitlines()) == 1 and "'weekend'" in outcome.stderr
    assert (folder / "params.yaml").read_bytes() == before
    assert study_command(folder, "use", "smoke").returncode == 0
    assert load_params(folder / "params.yaml").profile == "smoke"


def test_layout_keeps_profiles_apart_and_names_an_unknown_setting(folder):
    params = {name: load_params(folder / "params.yaml", profile=name) for name in ("smoke", "laptop")}
    places = [Layout(params[name], "english", folder) for name in params]
    for attribute in ("runs", "reports", "results", "tasks", "corpus", "teacher"):
        assert getattr(places[0], attribute) != getattr(places[1], attribute)
    assert places[0].student("od", "L3-H192", 1) != places[1].student("od", "L3-H192", 1)
    with pytest.raises(StudyError, match="'german'.*english"):
        Layout(params["smoke"], "german", folder)


def test_a_student_has_the_rates_it_was_tuned_for_and_every_other_the_methods_own(folder):
    params = load_params(folder / "params.yaml")
    trained = [name for name, method in params.methods.items() if method.objective != "none"]
    rates = {name: 1e-5 * (place + 1) for place, name in enumerate(trained)}
    params = load_params(edit(folder, put(rates, *RATES)))
    for name in trained:
        own = params.methods[name]
        assert params.of_method(name, "L4-H192").methods[name] == own.model_copy(update={"learning_rate": rates[name]})
        assert params.of_method(name, "L3-H192").methods == params.of_method(name).methods == params.methods
    assert params.of_method("none", "L4-H192").methods == params.methods


def test_cells_to_tune_are_printed_by_setting_and_a_setting_without_them_is_an_error(folder, monkeypatch, capsys):
    monkeypatch.chdir(folder)
    params = load_params(folder / "params.yaml")
    trained = [method for method in params.grid.methods if method != "none"]
    assert params.tuning.students == {"english": ["L3-H192"], "multilingual": ["L4-H192", "L3-H384"]}
    for setting, tried in params.tuning.students.items():
        assert main(["cells", setting]) == 0
        printed = capsys.readouterr().out.splitlines()
        assert printed == [f"{method} {student}" for method in trained for student in tried]
    assert main(["cells", "klingon"]) == 1
    error = capsys.readouterr().err
    assert error.count("\n") == 1
    assert "tuning.students: setting 'klingon' has none; allowed: english, multilingual" in error


def test_title_counts_the_cells_of_the_grid(folder):
    params = load_params(folder / "params.yaml", profile="smoke")
    last, methods = params.grid.methods[-1], len(params.grid.methods)
    assert cell_title(params, "english", last, "L3-H192", 1).startswith(f"[{methods}/{2 * methods}] ")
    assert cell_title(params, "multilingual", last, "L4-H192", 1).startswith(f"[{2 * methods}/{2 * methods}] ")
    assert cell_title(params, "english", "hs-last", "L6-H192", 5) == "english hs-last L6-H192 seed 5"
    assert cell_title(params, "english", "teacher", "teacher", 0) == "english teacher"
