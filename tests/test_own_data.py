"""Texts and tasks that params.yaml declares: files read as they are, every mistake in one line."""

from __future__ import annotations

import gzip
import json
import shutil
from pathlib import Path

import own_data
import pipeline
import pytest
import tiny
from datasets import ClassLabel, Dataset, Features, Value
from pydantic import ValidationError

from study.data import tasks
from study.data.cleaning import Overlap, clean
from study.data.examine import check_data
from study.data.tasks.own import load_own
from study.data.texts.own import read_own
from study.declarations import OwnTask, OwnText, SplitsOf, content_of
from study.descriptions import CorpusData, TaskData, open_description
from study.files import StudyError
from study.new import new_study
from study.params import PRESETS, one_line, read_yaml
from study.plan import resolve, write_plan

pytestmark = pytest.mark.fast
BUDGET = {"train": None, "development": None, "test": None, "max_length": 64}


@pytest.fixture
def folder(tmp_path) -> Path:
    return own_data.write(tmp_path)


def read(folder: Path, **declared) -> list[str]:
    return list(read_own(OwnText(**{"language": "en"} | declared), folder))


def load(folder: Path, name: str, **changes):
    return load_own(name, OwnTask.model_validate(own_data.TASKS[name] | changes), folder)


def test_a_folder_of_plain_text_is_read_file_by_file(folder):
    contents = read(folder, files="texts/*.txt")
    assert len(contents) == 4 and contents == [(folder / "texts" / f"{n}.txt").read_text("utf-8-sig") for n in range(4)]
    assert not contents[0].startswith("\ufeff") and "\r" not in contents[0] and contents[0].count("\n") == 7


def test_a_long_file_of_plain_text_is_cut_at_ends_of_lines(tmp_path):
    lines = [f"line {number} " + "word " * 30 for number in range(20_000)]
    (tmp_path / "long.txt").write_text("\n".join(lines))
    pieces = read(tmp_path, files="long.txt")
    assert len(pieces) > 2 and max(map(len, pieces)) < 1_001_000 and "".join(pieces) == "\n".join(lines)


@pytest.mark.parametrize("kind", ["csv", "tsv", "jsonl", "parquet", "csv.gz", "jsonl.gz"])
def test_every_format_gives_the_same_documents(tmp_path, kind):
    """Written by pandas and datasets, not by what reads them."""
    texts = ["Ümlaut, and more", "None", "NA", "1.50", "a fifth"]
    table, file = Dataset.from_dict({"n": list(range(5)), "body": texts}), tmp_path / f"rows.{kind}"
    if kind == "parquet":
        table.to_parquet(str(file))
    elif kind.startswith("jsonl"):
        table.to_json(str(file), compression="gzip" if kind.endswith("gz") else None)
    else:
        table.to_pandas().to_csv(file, index=False, sep="\t" if kind == "tsv" else ",")
    assert read(tmp_path, files=f"*.{kind}", column="body") == texts
    assert read(tmp_path, files=f"*.{kind}", column="body", where={"n": 3}) == ["1.50"]
    assert read(tmp_path, files=f"*.{kind}", column="body", limit=2) == texts[:2]


def test_a_text_of_the_hub_is_read_from_a_folder_of_its_form(tmp_path, monkeypatch):
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    part = tmp_path / "wikipedia" / "20231101.en"
    part.mkdir(parents=True)
    columns = {"id": ["1", "2"], "url": ["a", "b"], "title": ["One", "Two"], "text": ["first", "second"]}
    Dataset.from_dict(columns).to_parquet(str(part / "train-00000-of-00001.parquet"))
    files = "configs:\n- config_name: 20231101.en\n  data_files:\n  - split: train\n    path: 20231101.en/train-*\n"
    (tmp_path / "wikipedia" / "README.md").write_text(f"---\n{files}---\n")
    declared = {"dataset": "wikipedia", "config": "20231101.en", "split": "train", "column": "text"}
    assert read(tmp_path, **declared, name="encyclopedia") == ["first", "second"]
    with pytest.raises(StudyError, match="wikipedia test: cannot be read: .*split"):
        read(tmp_path, **declared | {"split": "test"}, name="encyclopedia")


def test_own_text_is_cleaned_and_kept_apart_from_the_tasks(folder):
    _, splits = load(folder, "moods")
    heldout = [row["text"] for row in splits["test"]]
    (folder / "leak.txt").write_text(f"{heldout[0]}\n{heldout[0]}\ntoo short\n" + "one two three four five six seven 8")
    text = OwnText(files="leak.txt", language="de")
    documents, counts = clean([text, "sotu"][:1], Overlap(heldout, 13), folder)
    assert [tuple(document) for document in documents] == [("leak-de", "one two three four five six seven 8")]
    assert documents[0].language == "de"
    assert counts == {"leak-de": {"documents": 1, "paragraphs": 1, "short": 1, "duplicates": 1, "overlaps": 1}}


@pytest.mark.parametrize(
    ("declared", "content", "message"),
    [
        ({"files": "no/*.txt"}, None, "no/*.txt matches no file"),
        ({"files": ".", "column": "a"}, None, "is a folder; allowed: a pattern of files"),
        ({"files": "x.csv", "column": "body"}, b"a,b\n1,2\n", "no column 'body'; allowed: a, b"),
        ({"files": "x.csv", "column": "a"}, b'a,b\n1,"x" y\n', "x.csv: cannot be read: "),
        ({"files": "x.csv", "column": "a"}, b"a,b\n1,2\n1,2,3\n", "line 3 has 3 cells; allowed: 2"),
        ({"files": "x.csv", "column": "a"}, b"a,a\n1,2\n", "names a column twice"),
        ({"files": "x.txt"}, b"\xe9t\xe9", "invalid continuation byte; allowed: UTF-8"),
        ({"files": "x.jsonl", "column": "a"}, b"[1]\n", "line 1 is no object"),
        ({"files": "x.jsonl", "column": "a"}, b'{"a": 1}\n', "a = '1' is no text"),
        ({"files": "x.jsonl", "column": "a"}, b'{"a": "b"}\n{"a": \n', "x.jsonl: line 2 is no JSON (Expecting value)"),
        ({"files": "x.parquet", "column": "a"}, b"PAR1", "x.parquet: cannot be read: "),
        ({"files": "x.csv.gz", "column": "a"}, gzip.compress(b"a\n1\n")[:12], "x.csv.gz: cannot be read: "),
        ({"files": "x.docx", "column": "a"}, b"", "cannot be read; allowed: .txt, .csv"),
    ],
)
def test_a_text_that_cannot_be_read_is_one_line(tmp_path, declared, content, message):
    if content is not None:
        (tmp_path / declared["files"]).write_bytes(content)
    with pytest.raises(StudyError) as raised:
        read(tmp_path, **declared)
    assert message in str(raised.value) and "\n" not in str(raised.value)


@pytest.mark.parametrize(
    ("kind", "declared", "message"),
    [
        (OwnText, {"files": "a.txt"}, "language: key is missing"),
        (OwnText, {"files": "a.txt", "language": "English"}, "language = 'English'"),
        (OwnText, {"files": "a.csv", "language": "en"}, "column is missing"),
        (OwnText, {"files": "data/texts", "language": "en"}, "a pattern such as texts/*.txt; names end in .txt, .csv"),
        (OwnText, {"language": "en", "column": "a"}, "either files or dataset"),
        (OwnText, {"dataset": "a/b", "language": "en", "column": "a"}, "split is missing"),
        (OwnText, {"files": "wikipedia.txt", "language": "de"}, "'wikipedia-de' is that of an embedded text"),
        (OwnText, {"files": "a.txt", "language": "en", "name": "my-text"}, "name = 'my-text'"),
        (OwnTask, {"files": {"train": "a.csv", "test": "b.csv"}}, "language is missing"),
        (OwnTask, {"files": {"test": "b.csv"}, "language": "en"}, "train is missing"),
        (OwnTask, {"files": {"train": "a", "test": {"de": "b"}}, "language": "fr"}, "test lacks 'fr'"),
        (OwnTask, {"files": {"train": "a", "test": "b"}, "language": "en", "metric": "bleu"}, "metric = 'bleu'"),
        (OwnTask, {"dataset": "a/b", "language": "en"}, "either files, or a dataset and its splits"),
        (OwnTask, {"kind": "retrieval", "files": {"test": {"fr": "a"}}}, "language: that of the column `text`"),
    ],
)
def test_a_declaration_that_says_too_little_is_one_line(kind, declared, message):
    with pytest.raises(ValidationError) as raised:
        kind.model_validate(declared)
    assert message in one_line(raised.value)


def test_a_csv_with_quotes_commas_empty_cells_and_windows_line_ends(folder, capsys):
    assert b"\r\n" in (folder / "reviews.csv").read_bytes() and b'""' in (folder / "reviews.csv").read_bytes()
    task, splits = load(folder, "reviews")
    assert task.labels == ("bad", "good") and task.metrics == ("accuracy", "f1", "macro_f1", "matthews")
    expected = [f'He said "{text}", twice' for text, _ in own_data.sentences("en", 20, 500)] + ["NA"]
    assert [row["text"] for row in splits["test"]] == expected
    assert [row["label"] for row in splits["test"]] == ["good", "bad"] * 10 + ["good"]
    assert len(splits["train"]) == 55 and len(splits["development"]) == 6
    assert "train: 2 rows without text or label left out" in capsys.readouterr().out


def test_a_task_learnt_in_german_and_tested_in_three_languages(folder):
    task, splits = load(folder, "moods")
    assert task.languages == ("de", "en", "fr") and task.labels == ("0", "1")
    assert list(splits) == ["train", "development", "test", "test-en", "test-fr"] == task.splits
    assert splits["test"][0]["text"] == own_data.sentences("de", 1, 700)[0][0]
    assert splits["test-en"][0] == {"text": own_data.sentences("en", 1)[0][0], "label": "1"}


def test_a_split_named_for_development_and_test_is_halved(folder):
    task, splits = load(folder, "closeness")
    own = own_data.sentences("en", 30, 300)
    assert task.labels is None and task.pair and task.metrics == ("spearman", "pearson")
    halves = splits["development"] + splits["test"]
    assert sorted(row["text"] for row in halves) == sorted(text for text, _ in own)
    assert min(len(splits["development"]), len(splits["test"])) >= 8 and len(splits["train"]) == 30
    assert {row["label"] for row in splits["train"]} == {4.5, -0.5}


def test_names_of_classes_are_those_of_the_data(folder):
    task, splits = load(folder, "classes")
    assert task.labels == ("gloomy", "cheerful") and splits["test"][1]["label"] == "cheerful"


def test_retrieval_of_translations_from_aligned_columns(folder):
    task, splits = load(folder, "translations")
    assert task.probe and task.languages == ("de", "fr") and list(splits) == ["test-fr"] and task.labels is None
    (de, _), (fr, _) = own_data.sentences("de", 1)[0], own_data.sentences("fr", 1)[0]
    assert splits["test-fr"][0] == {"text": de, "text_pair": fr}


@pytest.mark.parametrize(
    ("name", "changes", "rows", "message"),
    [
        ("reviews", {"label": "stars"}, "", "no column 'stars'; allowed: number, sentence, mood"),
        ("reviews", {}, "1,Fine,neutral\r\n", "test has the label 'neutral'; allowed: bad, good"),
        ("reviews", {"labels": ["bad", "good", "neutral"]}, "1,Fine,neutral\r\n", "'neutral', which train lacks"),
        ("reviews", {"metric": "spearman"}, "", "mood = 'good' is no number; spearman needs numbers"),
        ("closeness", {"metric": "f1", "language": "en"}, "", ""),
    ],
)
def test_a_task_whose_files_do_not_fit_is_one_line(folder, name, changes, rows, message):
    with (folder / "reviews-test.csv").open("a") as stream:
        stream.write(rows)
    if not message:
        assert load(folder, name, **changes)[0].labels == ("-0.5", "4.5")
        return
    with pytest.raises(StudyError) as raised:
        load(folder, name, **changes)
    assert message in str(raised.value) and "\n" not in str(raised.value)


def test_labels_that_are_not_public_are_told(tmp_path):
    rows = {"text": [f"text {n}" for n in range(8)], "label": [0, 1] * 4}
    Dataset.from_dict(rows).to_json(str(tmp_path / "train.jsonl"))
    Dataset.from_dict(rows | {"label": [-1] * 8}).to_json(str(tmp_path / "test.jsonl"))
    declared = {"files": {"train": "train.jsonl", "test": "test.jsonl"}, "language": "en"}
    with pytest.raises(StudyError, match="test.jsonl has no labels .* name the development split for both"):
        load_own("mine", OwnTask.model_validate(declared), tmp_path)


def test_a_built_task_is_found_again_as_it_was(folder):
    (folder / "params.yaml").touch()
    (folder / "notebooks").mkdir()
    names = [name for name in own_data.TASKS if name != "classes"]
    declared = {name: OwnTask.model_validate(own_data.TASKS[name]) for name in names}
    hashes = {name: content_of(own, folder) for name, own in declared.items()}
    own = {"tasks": names, "declared": declared, "hashes": hashes}
    description = TaskData(setting="mine", revisions={}, **own)
    rows = tasks.build_tasks(description, folder / "runs" / "tasks")
    assert {row["task"] for row in rows} == set(names)
    for name in names:
        task, found = load(folder, name)[0], tasks.find_task(folder / "runs" / "tasks", name)
        assert {key: getattr(found, key) for key in vars(task)} == vars(task)
        assert tasks.load_task(folder / "runs" / "tasks", name)[task.splits[-1]].features == task.features
    (folder / "pairs.tsv").write_text("first\tsecond\tscore\na\tb\t1\n")
    with pytest.raises(StudyError, match="task closeness: its files have changed since the plan was made"):
        tasks.build_tasks(description, folder / "runs" / "tasks")


def test_contents_are_in_the_plan_and_a_changed_file_changes_what_uses_it_alone(folder):
    tiny.workspace(folder)
    setting = {"vocabulary": "full", "teacher": {"name": str(folder / "pretrained"), **tiny.TEACHER}}
    mine = setting | {"texts": [own_data.TEXTS["notes"], "wikipedia-es"], "tasks": ["topic", "reviews"]}
    other = setting | {"texts": [own_data.TEXTS["table"]], "tasks": ["moods"]}
    plan = tiny.plan(
        folder,
        tasks=own_data.TASKS,
        settings={"english": mine, "other": other},
        grid={"settings": ["english", "other"], "students": {"english": ["L2-H24"], "other": ["L2-H24"]}},
    )

    def written() -> dict[str, bytes]:
        write_plan(plan)
        return {str(path.relative_to(folder)): path.read_bytes() for path in (folder / "plan").glob("*/*.json")}

    before = written()
    description, _ = open_description(folder / "plan" / "corpus" / "english.json", CorpusData)
    assert description.texts == [OwnText(**own_data.TEXTS["notes"]), "wikipedia-es"] and set(description.hashes) == {
        "texts"
    }
    assert "own/text" in description.revisions
    budgets = json.loads(before["plan/evaluate/other_teacher.json"])["tasks"]
    assert budgets["moods"]["languages"] == ["de", "en", "fr"] and budgets["moods"]["max_length"] == 128
    with (folder / "texts" / "2.txt").open("a") as stream:
        stream.write("\nanother line")
    after = written()
    assert {name for name in before if before[name] != after[name]} == {"plan/corpus/english.json"}
    (folder / "reviews.csv").unlink()
    assert {name for name, own in written().items() if after[name] != own} == {"plan/tasks/english.json"}


GLUE = {
    "cola": (["sentence"], ["unacceptable", "acceptable"], "matthews"),
    "sst2": (["sentence"], ["negative", "positive"], "accuracy"),
    "mrpc": (["sentence1", "sentence2"], ["not_equivalent", "equivalent"], "f1"),
    "stsb": (["sentence1", "sentence2"], None, "spearman"),
    "qqp": (["question1", "question2"], ["not_duplicate", "duplicate"], "f1"),
    "mnli": (["premise", "hypothesis"], ["entailment", "neutral", "contradiction"], "accuracy"),
    "qnli": (["question", "sentence"], ["entailment", "not_entailment"], "accuracy"),
    "rte": (["sentence1", "sentence2"], ["entailment", "not_entailment"], "accuracy"),
    "wnli": (["sentence1", "sentence2"], ["not_entailment", "entailment"], "accuracy"),
}
XNLI = ["ar", "bg", "de", "el", "en", "es", "fr", "hi", "ru", "sw", "th", "tr", "ur", "vi", "zh"]


def as_on_the_hub(folder: Path, configs: dict[str, list[str]], columns: list[str], names: list[str] | None) -> None:
    """Parquet files of each configuration and split with the hub's features; labels of GLUE's test data are -1."""
    label = Value("float32") if names is None else ClassLabel(names=names)
    features = Features({column: Value("string") for column in columns} | {"label": label, "idx": Value("int32")})
    for config, splits in configs.items():
        for split in splits:
            count = 40 if split == "train" else 8
            rows = {c: [f"{config} {split} {c} {n}" for n in range(count)] for c in columns}
            labels = [
                -1 if split.startswith("test") and len(configs) == 1 else n % len(names or "12") for n in range(count)
            ]
            rows |= {"label": labels, "idx": list(range(count))}
            (folder / config).mkdir(parents=True, exist_ok=True)
            file = folder / config / f"{split}-00000-of-00001.parquet"
            Dataset.from_dict(rows, features=features).to_parquet(str(file))


def readme(folder: Path) -> None:
    lines = ["---", "configs:"]
    for config in sorted(path for path in folder.iterdir() if path.is_dir()):
        lines += [f"- config_name: {config.name}", "  data_files:"]
        for file in sorted(config.glob("*.parquet")):
            split = file.name.partition("-")[0]
            lines += [f"  - split: {split}", f"    path: {config.name}/{split}-*"]
    (folder / "README.md").write_text("\n".join([*lines, "---", ""]))


def test_glue_and_xnli_are_read_as_the_hub_has_them(tmp_path, monkeypatch):
    monkeypatch.setattr("datasets.config.HF_HUB_OFFLINE", True)
    presets = {name: OwnTask.model_validate(own) for name, own in read_yaml(PRESETS)["tasks"].items()}
    assert set(presets) == {*(f"glue-{name}" for name in GLUE), "xnli"}
    for config, (columns, names, _) in GLUE.items():
        splits = ["train", "validation", "test"]
        if config == "mnli":
            splits = ["train", "validation_matched", "validation_mismatched", "test_matched", "test_mismatched"]
        as_on_the_hub(tmp_path / "nyu-mll" / "glue", {config: splits}, columns, names)
    languages = {language: ["train", "validation", "test"] for language in XNLI}
    as_on_the_hub(tmp_path / "facebook" / "xnli", languages, ["premise", "hypothesis"], GLUE["mnli"][1])
    for folder in (tmp_path / "nyu-mll" / "glue", tmp_path / "facebook" / "xnli"):
        readme(folder)
    for config, (columns, names, metric) in GLUE.items():
        task, splits = load_own(f"glue-{config}", presets[f"glue-{config}"], tmp_path)
        assert (task.metric, task.pair, task.labels) == (metric, len(columns) == 2, names and tuple(names))
        matched = "validation_matched" if config == "mnli" else "validation"
        assert len(splits["train"]) == 36 and len(splits["development"]) == 4
        assert [row["text"] for row in splits["test"]] == [f"{config} {matched} {columns[0]} {n}" for n in range(8)]
    mnli = load_own("glue-mnli", presets["glue-mnli"], tmp_path)[1]
    assert mnli["test-en-mismatched"][3]["text_pair"] == "mnli validation_mismatched hypothesis 3"
    task, splits = load_own("xnli", presets["xnli"], tmp_path)
    assert set(task.languages) == set(XNLI) and task.languages[0] == "en" and len(task.splits) == 17
    assert splits["test-sw"][2] == {
        "text": "sw test premise 2",
        "text_pair": "sw test hypothesis 2",
        "label": "contradiction",
    }
    test_of_cola = presets["glue-cola"].model_copy(update={"splits": SplitsOf(train="train", test="test")})
    with pytest.raises(StudyError, match="test has no labels"):
        load_own("cola", test_of_cola, tmp_path)


def study_with(folder: Path, **profile) -> str:
    """The fixtures' study in a folder, with a profile ``mine``: what `check` says of it, or why it refuses."""
    (folder / "params.yaml").write_text((tiny.FIXTURES / "params.yaml").read_text())
    (folder / "notebooks").mkdir(exist_ok=True)
    own = {"teacher": {"name": "all-minilm-l6-v2", "layers": 6, "width": 384, "heads": 12, "intermediate": 1536}}
    own |= {"vocabulary": "full", "texts": [own_data.TEXTS["notes"]], "tasks": ["reviews"]}
    values = {
        "grid": {"settings": ["mine"], "students": {"mine": ["L3-H192"]}},
        "settings": {"mine": own | profile.pop("setting", {})},
        "tasks": {"reviews": own_data.TASKS["reviews"] | profile.pop("task", {})},
    }
    (folder / "profiles" / "mine").mkdir(parents=True, exist_ok=True)
    (folder / "profiles" / "mine" / "params.yaml").write_text(json.dumps(values | profile))
    try:
        return "\n".join(check_data(resolve("mine", folder)))
    except StudyError as error:
        assert "\n" not in str(error)
        return f"error: {error}"


def test_check_says_what_there_is(folder):
    said = study_with(folder, setting={"tasks": ["reviews", "topic"]}).splitlines()
    assert said[0].startswith("settings.mine.texts.0: texts: 4 files, ")
    assert said[1].startswith("tasks.reviews: train 55, development 6") and said[1].endswith("test 21")


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        (
            {"setting": {"texts": [{"files": "no/*.txt", "language": "en"}]}},
            "settings.mine.texts.0: no/*.txt matches no",
        ),
        (
            {"setting": {"texts": [{"files": "torn.jsonl", "column": "a", "language": "en"}]}},
            "torn.jsonl: line 2 is no",
        ),
        ({"setting": {"texts": [own_data.TEXTS["table"] | {"column": "body"}]}}, "no column 'body'; allowed: sentence"),
        (
            {"setting": {"texts": [own_data.TEXTS["articles"] | {"where": {"lang": "it"}}]}},
            "articles.jsonl holds no document with lang = it;",
        ),
        ({"setting": {"texts": [{"files": "blank.txt", "language": "en"}]}}, "blank.txt holds no document;"),
        ({"task": {"text": "review"}}, "tasks.reviews: reviews.csv: no column 'review'"),
        ({"task": {"labels": ["bad", "worse"]}}, "has the label 'good'; allowed: bad, worse"),
        (
            {"task": {"files": {"train": "reviews.csv", "test": "empty.csv"}}},
            "split 'test' (empty.csv) has no examples",
        ),
        (
            {"task": {"files": None, "dataset": "no/such", "splits": {"train": "train", "test": "test"}}},
            "no/such train: cannot be reached: HF_HUB_OFFLINE is set",
        ),
        ({"setting": {"tasks": ["review"]}}, "settings.mine.tasks: 'review' is unknown; allowed: sentiment"),
        (
            {"finetuning": {"tasks": {"reviews": BUDGET | {"languages": ["en", "de"]}}}},
            "allowed: en and any of no other",
        ),
        ({"setting": {"texts": [own_data.TEXTS["notes"]] * 2}}, "twice"),
        ({"setting": {"texts": [{"files": "a.txt"}]}}, "settings.mine.texts.0.language: key is missing"),
        ({"grid": {"settings": ["mine"], "students": {"mine": ["tiny"]}}}, "grid.students.mine: 'tiny' is unknown"),
    ],
)
def test_check_says_in_one_line_what_is_wrong(folder, monkeypatch, changes, message):
    monkeypatch.setattr("datasets.config.HF_HUB_OFFLINE", True)
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    (folder / "blank.txt").write_text(" \n\n")
    (folder / "empty.csv").write_text("number,sentence,mood\n")
    (folder / "torn.jsonl").write_text('{"a": "a whole row"}\n{"a": "half a r\n')
    said = study_with(folder, **changes)
    assert said.startswith("error: ") and message in said


def test_data_of_the_hub_are_left_out_once_without_a_connection(folder, monkeypatch, capsys):
    asked = []

    def unreachable(*arguments, **options):
        asked.append(arguments[0])
        raise ConnectionError("Couldn't reach the hub")

    monkeypatch.setattr("study.data.rows.load_dataset_builder", unreachable)
    monkeypatch.setattr("datasets.config.HF_HUB_OFFLINE", False)
    said = study_with(folder, setting={"tasks": ["glue-rte", "xnli", "reviews"]}).splitlines()
    assert said[1:3] == [
        "tasks.glue-rte: nyu-mll/glue: not looked at, no connection",
        "tasks.xnli: facebook/xnli: not looked at, no connection",
    ]
    assert "asks the hub for nyu-mll/glue" in capsys.readouterr().out
    assert asked == ["nyu-mll/glue"] and said[3].startswith("tasks.reviews: train 55")


def test_of_large_texts_the_head_alone_is_read(folder, monkeypatch):
    (folder / "torn.jsonl").write_text('{"a": "a whole row"}\n{"a": "half a r\n')
    text = {"files": "torn.jsonl", "column": "a", "language": "en"}
    monkeypatch.setattr("study.data.examine.LARGEST", 10)
    assert "torn: 1 file, 0.0 MB, the head of each read" in study_with(folder, setting={"texts": [text]})


def test_a_new_study_is_written_whole_or_not_at_all(folder, monkeypatch):
    study_with(folder)
    monkeypatch.chdir(folder)
    said = "reviews={files: {train: reviews.csv, test: reviews-test.csv}, text: sentence, label: mood}"
    path, data = new_study("my-study", "all-minilm-l6-v2", ["texts/*.txt", "sotu"], [said, "sts-b"], "en", None)
    params = resolve("my-study", folder).params
    assert params.settings["my-study"].texts == [OwnText(files="texts/*.txt", language="en"), "sotu"]
    assert params.settings["my-study"].tasks == ["reviews", "sts-b"] and params.grid.settings == ["my-study"]
    assert path.read_text().startswith("# my-study: a study of one's own.") and len(data) == 2
    with pytest.raises(StudyError, match="profiles/my-study is there already"):
        new_study("my-study", "all-minilm-l6-v2", ["sotu"], ["topic"], "en", None)
    for teacher, text, family, vocabulary in (
        ("all-mpnet-base-v2", "verses", "mpnet", "full"),
        ("multilingual-e5-small-genuine", "verses-fr", None, "trimmed"),
    ):
        new_study("embedded", teacher, [text], ["sts-b"], "en", None)
        own = resolve("embedded", folder).params.settings["embedded"]
        assert (own.teacher.family, own.vocabulary, own.texts) == (family, vocabulary, [text])
        shutil.rmtree(folder / "profiles" / "embedded")
    other = "reviews={files: {train: reviews.csv, test: reviews-test.csv}, text: said, label: mood}"
    for teacher, text, task, message in (
        ("all-minilm-l6-v2", "no/*.txt", "topic", r"^settings.other.texts.0: no/\*.txt matches no file"),
        ("./nowhere", "sotu", "topic", "^--teacher: teacher './nowhere': no such folder"),
        ("all-minilm-l6-v2", "sotu", "irony", "^--task irony: unknown"),
        ("all-minilm-l6-v2", "sotu", other, "^tasks.reviews: .*'said'.*allowed: .*sentence"),
        (
            "all-minilm-l6-v2",
            "sotu",
            "reviews={files: reviews.csv}",
            "tasks.reviews.files = 'reviews.csv': .*test: name",
        ),
        ("all-minilm-l6-v2", "{files: ", "topic", "^--text: '{files: ' is not valid YAML: "),
        ("all-minilm-l6-v2", "sotu", "reviews={files: ", "^--task reviews: '{files: ' is not valid YAML: "),
        (
            "all-minilm-l6-v2",
            "wiki",
            "topic",
            r"^--text wiki: unknown; allowed: wikipedia, .*, 'files/\*.txt' or '{files",
        ),
    ):
        with pytest.raises(StudyError, match=message) as error:
            new_study("other", teacher, [text], [task], "en", None)
        assert not (folder / "profiles" / "other").exists() and "\n" not in str(error.value)
    before = pipeline.files_below(folder)
    for profile, message in (
        ("a b", "profile 'a b' cannot be a name"),
        ("a/b", "profile 'a/b' cannot be a name"),
        ("laptop", "profile 'laptop' is params.yaml itself; allowed: a new name"),
        ("my-study", "profiles/my-study is there already"),
    ):
        with pytest.raises(StudyError, match=message):
            new_study(profile, "all-minilm-l6-v2", ["sotu"], ["topic"], "en", None)
    assert pipeline.files_below(folder) == before
