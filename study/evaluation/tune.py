"""Choosing a method's learning rate on development data."""

from __future__ import annotations

import tempfile
from collections import defaultdict
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from statistics import mean

import numpy as np
from scipy.stats import sem

from study import descriptions, records
from study.descriptions import Run
from study.distillation.distil import distil
from study.distillation.trainer import DivergedError, digest
from study.evaluation.probes import Probes
from study.evaluation.provenance import input_hashes, provenance
from study.files import Layout, StudyError
from study.methods import Trained
from study.records import Candidate, read_record, write_record
from study.sections import BASE_BUDGET, MASKED_WORDS, Student

#: What decides the scores of a candidate beside its run.
PROBED = {"tasks", "finetuning", "revisions", "precision", "attention_implementation", "fast_paths"}


def tune(description: descriptions.Tuning, layout: Layout, output: Path, others: Sequence[Run] = ()) -> records.Tuning:
    """Try every candidate learning rate on one method and student, and write what was tried.

    What counts (:func:`choose`) is the main metric of a linear probe on the development data of each of the setting's
    tasks, and the held-out value of the method's own loss. No test data is touched, and every method gets the same
    candidates, steps and examples. Source: this study's choice.

    The file is written after every candidate. Where it is there already, of the same data, teacher, steps and seed,
    candidates in it are not tried again, unless something else in their descriptions has changed.

    Args:
        others: candidates of other methods: what they read of the teacher is kept for them, too.

    Raises:
        StudyError: as :func:`study.distillation.distil.distil`; tasks are missing.
    """
    others = others or description.candidates
    first = description.candidates[0]
    probes = Probes(description, layout, first.seed)
    result = records.Tuning(
        **provenance(description, layout, input_hashes(layout)),
        method=description.method,
        student=description.student,
        budget=description.budget,
        steps=first.distillation.steps,
        seed=first.seed,
        initialisation=first.initialisation,
        tried=[],
    )
    known = _known(output, result)
    for run in description.candidates:
        candidate = _tried(probes, run, others, known)
        result = result.model_copy(update={"tried": [*result.tried, candidate]})
        write_record(output, result)
    return result


def _known(output: Path, result: records.Tuning) -> dict[float, Candidate]:
    """Learning rate -> what an earlier call found of it, if it was asked the same."""
    if not output.is_file():
        return {}
    earlier = read_record(output, records.Tuning)
    same = {"method", "student", "budget", "steps", "seed", "initialisation", "hashes"}
    if earlier.model_dump(include=same) != result.model_dump(include=same):
        return {}
    return {candidate.learning_rate: candidate for candidate in earlier.tried}


def _tried(probes: Probes, run: Run, others: Sequence[Run], known: dict[float, Candidate]) -> Candidate:
    """One candidate that is known or is trained, and probed on every task but retrieval; or that it diverged."""
    assert isinstance(run.objective, Trained)  # the plan tunes no others
    rate = run.objective.learning_rate
    judged = probes.description.model_dump(mode="json", include=PROBED)
    asked = digest({"run": run.model_dump(mode="json"), "probes": judged})
    if rate in known and known[rate].digest in (None, asked):
        return known[rate]
    with tempfile.TemporaryDirectory() as folder:
        try:
            curve = distil(run, probes.layout, Path(folder), others)["training"]["curve"]
        except DivergedError as error:
            return Candidate(learning_rate=rate, digest=asked, diverged=str(error))
        masked = [name for name in probes.description.tasks if name in MASKED_WORDS]
        scores = {name: probes.score(Path(folder), name) for name in (*probes.splits, *masked)}
    return Candidate(
        learning_rate=rate,
        digest=asked,
        development_mean=mean(scores.values()),
        development=scores,
        held_out_loss_before=curve[0]["loss"],
        held_out_loss=curve[-1]["loss"],
    )


def choose(tunings: Iterable[records.Tuning]) -> dict[str, float]:
    """Per method, the learning rate that fits its own loss best among those that the tasks cannot tell from the best.

    With d the differences, over settings, students and tasks, of a rate's development scores from those of the rate
    with the highest mean, a rate is not told from it if mean(d) <= standard error of mean(d). Among these the one with
    the lowest held-out loss is taken (as a share of the loss before training, mean over settings and students). A rate
    is out at which any student diverged or ended with a held-out loss above the one it began with.

    Probes are few, small and learnt in one language: where they say nothing, how far the method got on all of the
    corpus does. It does not decide alone, since a relation loss may fall while what rests on it gets worse.

    Args:
        tunings: what :func:`tune` wrote, any number of methods, settings and students. One rate serves them all: those
            of a student with rates of its own (``students.<name>.learning_rates``) are to be chosen by themselves.

    Raises:
        StudyError: every rate of a method is out; one was tried in some settings or on some students only.

    Source: the one-standard-error rule (Hastie, Tibshirani and Friedman, The Elements of Statistical Learning, section
    7.10), on paired differences; the held-out loss in place of the simplest model is this study's choice.
    """
    tried: dict[str, dict[float, list[Candidate]]] = defaultdict(lambda: defaultdict(list))
    for tuning in tunings:
        for candidate in tuning.tried:
            tried[tuning.method][candidate.learning_rate].append(candidate)
    return {method: _choice(method, rates) for method, rates in tried.items()}


def chosen_rates(folder: Path, students: Mapping[str, Student]) -> dict[str, float]:
    """Every learning rate that tuning speaks for: its key in params.yaml -> its value.

    Args:
        folder: holds what :func:`tune` wrote, in a folder for each setting.
        students: those of params.yaml; those with rates of their own are chosen for by themselves.

    Raises:
        StudyError: see :func:`choose`; a damaged file.
    """
    together = defaultdict(list)
    for file in sorted(folder.glob("*/*.json")):
        tuning = read_record(file, records.Tuning)
        student = students.get(tuning.student)
        alone = student is not None and bool(student.learning_rates)
        key = f"students.{tuning.student}.learning_rates.{{}}" if alone else _SHARED
        if tuning.budget != BASE_BUDGET:
            key = f"budgets.{tuning.budget}.learning_rates.{{}}"
        together[key].append(tuning)
    return {key.format(method): rate for key, tunings in together.items() for method, rate in choose(tunings).items()}


_SHARED = "methods.{}.learning_rate"  # key of the rate of all students without rates of their own


def _choice(method: str, tried: dict[float, list[Candidate]]) -> float:
    """The rate of one method; ``tried``: rate -> its candidates, one of each setting and student."""
    often = max(map(len, tried.values()))
    for rate, candidates in tried.items():
        if len(candidates) < often:
            raise StudyError(
                f"reports/tuning: {method} was tried at {rate} {len(candidates)} times, at others {often}; allowed: the"
                " same candidates in every setting and on every student (run `make tune` again for each setting)"
            )
    left = {rate: candidates for rate, candidates in tried.items() if not any(map(_failed, candidates))}
    if not left:
        raise StudyError(
            f"{method}: diverged, or its loss rose, at every learning rate of {list(tried)}; lower"
            " tuning.learning_rates"
        )
    scores = {
        rate: np.array([score for candidate in candidates for score in candidate.development.values()])
        for rate, candidates in left.items()
    }
    best = max(scores.values(), key=np.mean)
    behind = {rate: best - scores[rate] for rate in left}
    level = [rate for rate, d in behind.items() if d.mean() <= (sem(d) if len(d) > 1 else 0)]
    return min(level, key=lambda rate: mean(map(_share, left[rate])))


def _failed(candidate: Candidate) -> bool:
    if candidate.held_out_loss is None or candidate.held_out_loss_before is None:
        return True  # it diverged
    return candidate.held_out_loss > candidate.held_out_loss_before


def _share(candidate: Candidate) -> float:
    """The held-out loss after training as a share of the one before, of a candidate that did not diverge."""
    assert candidate.held_out_loss is not None and candidate.held_out_loss_before is not None
    return candidate.held_out_loss / candidate.held_out_loss_before
