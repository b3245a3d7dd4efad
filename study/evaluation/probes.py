"""Probes of frozen encoders on development data: what admission, tuning and comparisons of layers rest on."""

from __future__ import annotations

from functools import cached_property
from pathlib import Path
from statistics import mean

from datasets import Dataset
from transformers import PreTrainedTokenizerBase

from study.data.pretrained import load_tokenizer
from study.data.tasks import find_task
from study.evaluation.finetune import Judging, linear_probe, splits_without_test
from study.evaluation.masked_word import masked_word_scores
from study.files import Layout


class Probes:
    """Readouts of encoders of one setting; the data that they need are read when they are first needed.

    Args:
        description: with the tasks and budgets. seed: which training examples are drawn.
    """

    def __init__(self, description: Judging, layout: Layout, seed: int):
        self.description, self.layout, self.seed = description, layout, seed

    @cached_property
    def tokenizer(self) -> PreTrainedTokenizerBase:
        """The teacher's, which is the students', too."""
        return load_tokenizer(self.layout.teacher)

    @cached_property
    def splits(self) -> dict[str, dict[str, Dataset]]:
        """Training and development examples of the tasks that are learnt."""
        return splits_without_test(self.description, self.layout, self.tokenizer, self.seed)

    def score(self, folder: Path, name: str) -> float:
        """The main metric of a task on development data, of the encoder saved in ``folder`` as it is.

        That of :func:`study.evaluation.finetune.linear_probe`; of masked words the mean over languages.
        """
        task, tasks = find_task(self.layout.tasks, name), self.layout.tasks
        if task.kind == "masked-word":
            languages = masked_word_scores(self.description, folder, name, tasks, self.tokenizer)
            return mean(own["development"] for own in languages.values())
        return linear_probe(self.description, folder, task, self.splits[name], self.tokenizer, self.seed)
