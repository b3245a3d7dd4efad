"""Files of one's own as people have them, and their declarations: a folder of .txt, CSV, TSV, JSONL and Parquet."""

from __future__ import annotations

import csv
import io
import json
import random
from pathlib import Path
from typing import Any

from datasets import ClassLabel, Dataset, Features, Value

#: Words that a sentence is about its label by, in three languages.
GOOD = {"en": ["lovely", "bright", "warm"], "de": ["schön", "hell", "warm"], "fr": ["joli", "clair", "chaud"]}
BAD = {"en": ["awful", "dark", "cold"], "de": ["furchtbar", "dunkel", "kalt"], "fr": ["affreux", "sombre", "froid"]}
FILLER = {
    "en": ["the", "room", "in", "our", "hotel", "near", "the", "old", "harbour", "was", "on", "that", "day"],
    "de": ["das", "Zimmer", "in", "unserem", "Hotel", "am", "alten", "Hafen", "war", "an", "diesem", "Tag"],
    "fr": ["la", "chambre", "de", "notre", "hôtel", "près", "du", "vieux", "port", "était", "ce", "jour", "là"],
}

TEXTS: dict[str, dict[str, Any]] = {
    "notes": {"files": "texts/*.txt", "language": "en"},
    "articles": {"files": "articles.jsonl", "column": "body", "where": {"lang": "de"}, "language": "de"},
    "first articles": {"files": "articles.jsonl", "column": "body", "language": "fr", "limit": 3},
    "table": {"files": "table.parquet", "column": "sentence", "language": "en"},
}
TASKS: dict[str, dict[str, Any]] = {
    "reviews": {
        "files": {"train": "reviews.csv", "test": "reviews-test.csv"},
        "text": "sentence",
        "label": "mood",
        "metric": "accuracy",
        "language": "en",
    },
    "moods": {
        "files": {
            "train": "moods-de.jsonl",
            "development": 0.25,
            "test": {"de": "moods-test-de.jsonl", "en": "moods-en.jsonl", "fr": "moods-fr.jsonl"},
        },
        "metric": "macro_f1",
    },
    "closeness": {
        "files": {"train": "pairs.tsv", "development": "pairs-held-out.tsv", "test": "pairs-held-out.tsv"},
        "text": "first",
        "text_pair": "second",
        "label": "score",
        "metric": "spearman",
        "language": "en",
    },
    "translations": {
        "kind": "retrieval",
        "language": "de",
        "files": {"test": {"fr": "aligned.csv"}},
        "text": "german",
        "text_pair": "french",
    },
    "classes": {
        "files": {"train": "table.parquet", "test": "table.parquet"},
        "text": "sentence",
        "label": "label",
        "language": "en",
    },
}


def sentence(language: str, good: bool, number: int) -> str:
    draw = random.Random(f"{language} {good} {number}")
    words = draw.sample(FILLER[language], 7)
    words.insert(draw.randrange(8), draw.choice((GOOD if good else BAD)[language]))
    return " ".join([*words, f"{number}."])


def sentences(language: str, count: int, first: int = 0) -> list[tuple[str, bool]]:
    return [(sentence(language, number % 2 == 0, number), number % 2 == 0) for number in range(first, first + count)]


def write(folder: Path) -> Path:
    """All of them, below a folder; returns it."""
    (folder / "texts").mkdir(parents=True, exist_ok=True)
    for file in range(4):
        lines = [" ".join(text for text, _ in sentences("en", 5, 40 * file + 4 * line)) for line in range(8)]
        (folder / "texts" / f"{file}.txt").write_bytes("\r\n".join(lines).encode("utf-8-sig" if file == 0 else "utf-8"))
    articles = [
        {"lang": language, "body": "\n".join(text for text, _ in sentences(language, 6, 10 * number))}
        for number in range(24)
        for language in ("de", "en", "fr")
    ]
    _write(folder / "articles.jsonl", "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in articles))
    for name, count, first in (("reviews", 60, 0), ("reviews-test", 20, 500)):
        rows: list[tuple[str, ...]] = [
            (str(number), f'He said "{text}", twice', "good" if good else "bad")
            for number, (text, good) in enumerate(sentences("en", count, first))
        ]
        rows += [("90", "", "good"), ("91", "a line\nand another, without a mood", ""), ("92", "NA", "good")]
        stream = io.StringIO()
        csv.writer(stream).writerows([("number", "sentence", "mood"), *rows])  # \r\n, quoted where needed
        _write(folder / f"{name}.csv", stream.getvalue())
    for name, language, count, first in (
        ("moods-de", "de", 60, 0),
        ("moods-test-de", "de", 20, 700),
        ("moods-en", "en", 20, 0),
        ("moods-fr", "fr", 20, 0),
    ):
        lines = [json.dumps({"text": text, "label": int(good)}) for text, good in sentences(language, count, first)]
        _write(folder / f"{name}.jsonl", "\n".join(lines) + "\n")
    for name, count, first in (("pairs", 30, 0), ("pairs-held-out", 30, 300)):
        rows = [
            (text, sentences("en", 1, number)[0][0], f"{5 * good - 0.5:.1f}")
            for number, (text, good) in enumerate(sentences("en", count, first))
        ]
        _write(folder / f"{name}.tsv", "".join("\t".join(row) + "\n" for row in [("first", "second", "score"), *rows]))
    pairs = zip(sentences("de", 20), sentences("fr", 20), strict=True)
    _write(folder / "aligned.csv", "german,french\n" + "".join(f"{de[0]},{fr[0]}\n" for de, fr in pairs))
    features = Features({"sentence": Value("string"), "label": ClassLabel(names=["gloomy", "cheerful"])})
    rows_of_table = {"sentence": [text for text, _ in sentences("en", 24)], "label": [n % 2 for n in range(24)]}
    Dataset.from_dict(rows_of_table, features=features).to_parquet(str(folder / "table.parquet"))
    return folder


def _write(path: Path, content: str) -> None:
    path.write_bytes(content.encode())
