"""Revisions of behaviour: what makes expensive results stale when code changes what it computes.

A stage's description (:mod:`study.plan`) holds the revisions of the families that it rests on, and DVC reruns it when
one is raised. A change that leaves behaviour as it is (a message, a name, a faster way to the same values) raises
nothing and reruns nothing. Golden tests (``tests/test_golden.py``) compute every family on tiny models and fixed text
and fail when its values change while its revision does not; CONTRIBUTING.md says how to raise one.
"""

from __future__ import annotations

#: Family -> revision. Objectives, texts and tasks by their names in params.yaml.
REVISIONS: dict[str, int] = {
    # objectives: what is read of student and teacher, projections, the loss and its gradient
    "masked_language_modelling": 1,
    "output_distribution": 1,
    "hidden_state": 1,
    "attention_relation": 1,
    "direct_attention": 1,
    "sentence_embedding": 1,
    "attention_score": 1,
    "attention_distribution": 1,
    "sum": 1,
    # the rest of training
    "masking": 1,  # which tokens are masked, how sequences are ordered
    "start": 1,  # students at initialisation
    "pruning": 1,  # importance of heads and neurons, and students that keep the most important
    "head": 1,  # the teacher's language-modelling head before adaptation
    "training": 1,  # optimiser, schedule, freezing
    # rows beside the students
    "reference/published": 1,
    "reference/static_table": 1,
    # families of teachers: what is read of them, their heads, students that start from them
    "family/mpnet": 1,
    "family/distilbert": 1,
    "family/electra": 1,
    "family/modernbert": 1,
    # systems beside the grid
    "neighbour/cr-ild": 1,  # losses, mixing, consistency, both stages
    "neighbour/xtremedistil": 1,  # compressed embeddings, its first stage, its classifier and stages
    "neighbour/miniend": 1,  # spans, the encoder-decoder, its losses and masks
    "neighbour/prequant": 1,  # quantisers, which weights are tuned, bits
    # data
    "cleaning": 1,  # cleaning, overlap with held-out texts, languages in turn, packing
    "vocabulary": 1,  # trimming
    "teacher/all-minilm-l6-v2": 1,
    "teacher/multilingual-e5-small": 1,
    "teacher/multilingual-e5-small-genuine": 1,  # its published tokenizer
    "text/wikipedia": 1,
    "text/boolq": 1,
    "text/quac": 1,
    "text/xsum": 1,
    "text/multilexsum": 1,
    "text/sotu": 1,
    "text/interface": 1,
    "text/verses": 1,
    "own/text": 1,  # those that params.yaml declares
    "own/task": 1,
    "task/sentiment": 1,
    "task/sts-b": 1,
    "task/boolq": 1,
    "task/privacy-qa": 1,
    "task/topic": 1,
    "task/topic-multilingual": 1,
    "task/intents": 1,
    "task/retrieval": 1,
    "task/bigram-shift": 1,
    "task/sentence-order": 1,
    "task/agreement": 1,
    "task/masked-word": 1,
    "task/bigram-shift-multilingual": 1,
    "task/sentence-order-multilingual": 1,
    "task/masked-word-multilingual": 1,
    # measurements
    "admission": 1,  # models without training, on development data
    "tagging": 1,  # words among sub-words, their probe, entities
    "finetuning": 1,  # probe, fine-tuning, choice of rate and epoch, metrics
    "retrieval": 1,  # scoring of retrieval probes
    "masked_word": 1,  # scoring of masked-word probes
    "mlm_score": 1,
    "size": 1,
    "latency": 1,
    "representations": 1,
}


def revisions(*families: str) -> dict[str, int]:
    """The revisions of the families, by name in alphabetical order; one unknown to the table (own data) has none."""
    return {family: REVISIONS[family] for family in sorted(set(families)) if family in REVISIONS}
