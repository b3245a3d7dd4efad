"""Topics of Wikipedia articles, in English and across languages."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterator

from study.data import texts
from study.data.strings import collapse, fold, in_language
from study.data.tasks.task import Splits, Task, empty_splits, fraction

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

#: Topic that articles are listed under in every language -> its name in the others.
SHARED_TOPICS = {
    "Arts": {"es": "Artes", "fr": "Arts et culture"},
    "Everyday life": {"es": "Antropología, sicología y vida cotidiana", "fr": "Vie quotidienne"},
    "Geography": {"es": "Geografía", "fr": "Géographie"},
    "History": {"es": "Historia", "fr": "Histoire"},
    "Mathematics": {"es": "Matemáticas", "fr": "Mathématiques"},
    "People": {"es": "Personas", "fr": "Personnalités"},
    "Philosophy and religion": {"es": "Filosofía y religión", "fr": "Philosophie et religion"},
    "Technology": {"es": "Tecnología", "fr": "Technologie"},
}


def load_topic() -> Splits:
    """Openings of Wikipedia articles and the topic they are listed under; 80/10/10 % of each topic, by title.

    Articles listed under none of the eleven topics ("Uncategorized") are dropped.
    """
    splits = empty_splits()
    for topic, articles in ranked_articles("en", {topic: topic for topic in TOPICS}).items():
        for split, _, text in tenths(articles):
            splits[split].append({"text": text, "label": topic})
    return splits


def load_topic_multilingual() -> Splits:
    """The eight topics that articles are listed under in English, Spanish and French alike; learnt in English.

    English is split as for :func:`load_topic`. A tenth of each Spanish and French topic, by title, is test data; the
    rest is no example of any kind. An article on the same subject must not be learnt in English and tested in Spanish:
    the source does not link articles across languages, so every article whose title (case and accents aside) is also
    that of an English article outside the test split is left out. Subjects whose name is translated are not recognised
    this way. Source: this study's choice.

    Topics are not quite the same: in Spanish, everyday life includes anthropology and psychology.
    """
    splits, learnt = empty_splits(), set()
    for topic, articles in ranked_articles("en", {topic: topic for topic in SHARED_TOPICS}).items():
        for split, title, text in tenths(articles):
            splits[split].append({"text": text, "label": topic})
            if split != "test":
                learnt.add(fold(title))
    for language in ("es", "fr"):
        topics = {names[language]: topic for topic, names in SHARED_TOPICS.items()}
        tested = splits[in_language("test", language)] = []
        for topic, articles in ranked_articles(language, topics).items():
            unlearnt = [text for title, text in articles if fold(title) not in learnt]
            tested.extend({"text": text, "label": topic} for text in unlearnt[: len(articles) // 10])
    return splits


def ranked_articles(language: str, topics: dict[str, str]) -> dict[str, list[tuple[str, str]]]:
    """Title and text of the articles listed under each topic, ordered by a number that only the title decides.

    Args:
        topics: name of a topic in that language -> its label.
    """
    articles = defaultdict(list)
    for title, article in texts.articles(language).items():
        if article["topic"] in topics:
            ranked = (fraction(title), title, collapse(article["extract"]))
            articles[topics[article["topic"]]].append(ranked)
    return {topic: [(title, text) for _, title, text in sorted(articles[topic])] for topic in sorted(articles)}


def tenths(articles: list[tuple[str, str]]) -> Iterator[tuple[str, str, str]]:
    """Split, title and text: the first tenth is test, the second development, the rest training data."""
    tenth = len(articles) // 10
    for rank, (title, text) in enumerate(articles):
        yield "test" if rank < tenth else "development" if rank < 2 * tenth else "train", title, text


TASKS = (
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
        languages=tuple(texts.LOCALES),
    ),
)
