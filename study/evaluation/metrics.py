"""Task metrics, from scikit-learn and scipy."""

from __future__ import annotations

import numpy as np
from scipy.stats import pearsonr, spearmanr
from sklearn.metrics import accuracy_score, f1_score, matthews_corrcoef

from study.data.tasks import Task
from study.evaluation.tagging import tag_metrics


def task_metrics(task: Task, outputs: np.ndarray, labels: np.ndarray) -> dict[str, float]:
    """The metrics named by ``task.metrics``.

    ``accuracy``; ``f1`` of the class with index 1; ``macro_f1`` (unweighted mean over classes); ``matthews``
    correlation; ``pearson`` and ``spearman`` correlation (0 where the outputs are constant and a correlation is not
    defined).

    Args:
        outputs: logits (examples, classes), or (examples, 1) for regression. labels: (examples,). Of tasks that tag
            words: as of :func:`study.evaluation.tagging.tag_metrics`.
    """
    if task.kind == "tokens":
        return tag_metrics(task.labels or (), task.metrics, outputs, labels)
    if task.labels is None:
        values = outputs[:, 0]
        constant = np.ptp(values) == 0
        correlations = {"pearson": pearsonr, "spearman": spearmanr}
        return {name: 0.0 if constant else float(correlations[name](values, labels).statistic) for name in task.metrics}
    predicted = outputs.argmax(axis=1)
    metrics = {
        "accuracy": lambda: accuracy_score(labels, predicted),
        "f1": lambda: f1_score(labels, predicted, zero_division=0),
        "macro_f1": lambda: f1_score(labels, predicted, average="macro", zero_division=0),
        "matthews": lambda: matthews_corrcoef(labels, predicted),
    }
    return {name: float(metrics[name]()) for name in task.metrics}
