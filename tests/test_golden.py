"""Golden values: behaviour may not change while its revision does not (study/revisions.py, CONTRIBUTING.md).

``golden.json`` holds, per family, the revision at which values were recorded, numbers that are compared to one in a
thousand, and exact values. ``pytest tests/test_golden.py --record`` writes families whose revision is another.
"""

from __future__ import annotations

import copy
import hashlib
import json
import math
from collections.abc import Callable
from functools import partial
from itertools import islice
from pathlib import Path
from typing import Any

import numpy as np
import own_data
import pytest
import tiny
import torch
from datasets import Dataset, DatasetDict
from tiny_training import adapted, distilled, stream
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors
from transformers import PreTrainedTokenizerFast, default_data_collator

from study.data import cleaning, storage
from study.data.corpus import pack
from study.data.pretrained import load_pretrained
from study.data.references import published
from study.data.static_table import static_table
from study.data.tasks import TASKS
from study.data.tasks.own import load_own
from study.data.texts import TEXTS
from study.data.texts.own import read_own
from study.data.vocabulary import pieces_to_keep, trim_tokenizer
from study.declarations import OwnTask, OwnText
from study.descriptions import Evaluation, LatencyMeasurement
from study.distillation.heads import with_language_modelling_head
from study.distillation.masking import MaskedSequences
from study.distillation.objectives import OBJECTIVES
from study.distillation.pruning import unit_importance
from study.distillation.students import create_student
from study.distillation.taps import read_activations
from study.distillation.trainer import switch_off_dropout
from study.evaluation import latency
from study.evaluation.admission import majority
from study.evaluation.classifier import Collator
from study.evaluation.finetune import start_from_probe
from study.evaluation.masked_word import guess_masked_words
from study.evaluation.representations import compare_layers
from study.evaluation.retrieval import retrieve
from study.evaluation.scores import evaluate_task, masked_language_modelling, size
from study.evaluation.tagging import WordClassifier, align, tag_metrics, tagged
from study.families import FAMILIES as FAMILIES_OF_STUDY
from study.families import keep_layers
from study.files import Layout
from study.methods import PRUNING
from study.methods import TEXTS as TEXT_NAMES
from study.neighbours.cr_ild import IntermediateDistillation, logits_loss, mislabelled
from study.neighbours.miniend import IGNORED, WORDS, SpanDistillation, corrupted, encoder_decoder
from study.neighbours.prequant import SCALINGS, bits_per_weight, matrices, positions, quantise_in_place
from study.neighbours.xtreme_distil import VARIANTS, Representation, StagedClassifier, compressed
from study.revisions import REVISIONS
from study.sections import Encoder, TaskBudget, Teacher
from study.teachers import EMBEDDED_SIZES

GOLDEN = Path(__file__).parent / "golden.json"
FAMILIES = ("bert", "xlm-roberta")  # of the models of the two settings
TOLERANCE = 1e-3
Values = dict[str, Any]


def digest(content: Any) -> str:
    return hashlib.sha256(json.dumps(content, ensure_ascii=False, sort_keys=True).encode()).hexdigest()[:16]


def teacher_and_student(family: str, initialisation: str = "teacher-layers", student: str = "L2-H12", **options):
    teacher = tiny.masked_language_model(family)
    sizes = tiny.parameters(Path(), **options).students[student]
    sample = torch.from_numpy(tiny.sequences(24, 5).astype(np.int64))
    return teacher, create_student(teacher, sizes, initialisation, sample, seed=1).eval()


def objective(name: str, folder: Path) -> Values:
    """Loss and norm of the student's gradient, of every option of the objective, fused and not."""
    params, values = tiny.parameters(folder), {}
    methods = {key: own for key, own in params.methods.items() if own.objective == name}
    methods = {key: own for key, own in methods.items() if getattr(own, "relation_heads", 4) in (4, 6)}
    for family in FAMILIES:
        batches = stream(params, tiny.tokenizer(folder / "words"))
        batch = default_data_collator([batches[i] for i in range(24)])
        for key, method in methods.items():
            if getattr(method, "teacher_layer_from_top", 0) > 3:
                continue
            if getattr(method, "relation_heads", 4) == 6:
                method = method.model_copy(update={"relation_heads": 3})
            for fused in (True, False):
                teacher, student = teacher_and_student(family)
                inputs = method.inputs or "masked"
                trained = OBJECTIVES[name](student, teacher, method, inputs, fused=fused)
                trained.start(batch)
                loss = trained(**batch)["loss"]
                loss.backward()
                gradient = sum(p.grad.square().sum() for p in trained.parameters() if p.grad is not None)
                values[f"{family} {key} {'fused' if fused else 'plain'}"] = [loss.item(), math.sqrt(gradient)]
    return values


def masking(folder: Path) -> Values:
    params, words = tiny.parameters(folder), tiny.tokenizer(folder / "words")
    streams = [stream(params, words, seed=seed, length=200) for seed in (1, 2)]
    items = [own[item] for own in streams for item in range(200)]  # so many that every share of the draws is met
    once = MaskedSequences(stream(params, words).sequences, params.masking, words, seed=0, first=7)
    items += [once[item] for item in (0, 5)]
    return {"items": digest([{key: np.asarray(value).tolist() for key, value in item.items()} for item in items])}


def start(folder: Path) -> Values:
    ids, values = torch.from_numpy(tiny.sequences(4, 9).astype(np.int64)), {}
    for family in FAMILIES:
        for student in ("L2-H24", "L2-H12"):
            for initialisation in ("random", "teacher-embeddings", "teacher-layers"):
                _, model = teacher_and_student(family, initialisation, student)
                with torch.no_grad():
                    states = read_activations(model, ids, hidden_layers=[0, 1, 2]).hidden.values()
                    values[f"{family} {student} {initialisation}"] = [
                        *(state.abs().mean().item() for state in states),
                        model(ids).logits.logsumexp(dim=-1).mean().item(),
                    ]
    return values


def pruned(folder: Path) -> Values:
    """What importance tells of every head and neuron, and students that keep some of them."""
    params, words, values = tiny.parameters(folder), tiny.tokenizer(folder / "words"), {}
    ids = torch.from_numpy(tiny.sequences(4, 9).astype(np.int64))
    for family in FAMILIES:
        teacher = tiny.masked_language_model(family)
        importance = unit_importance(teacher, stream(params, words, length=12))
        values[family] = [*importance.heads.flatten().tolist(), *importance.neurons[:, ::8].flatten().tolist()]
        for name in PRUNING:
            sizes = Encoder(layers=2, width=24, heads=2, intermediate=20)
            student = create_student(teacher, sizes, name, seed=1, importance=importance).eval()
            with torch.no_grad():
                values[f"{family} {name}"] = [student(ids).logits.logsumexp(dim=-1).mean().item()]
    return values


def head(folder: Path) -> Values:
    ids = torch.from_numpy(tiny.sequences(4, 9).astype(np.int64))
    counts = torch.arange(tiny.VOCABULARY)
    with torch.no_grad():
        heads = {f: with_language_modelling_head(tiny.masked_language_model(f).base_model, counts) for f in FAMILIES}
        return {f: [x.eval()(ids).logits.abs().mean().item()] for f, x in heads.items()}


def family(name: str, folder: Path) -> Values:
    """What is read of a teacher, its logits, a fitted head, and students of every start that it gives."""
    ids, values = torch.from_numpy(tiny.sequences(4, 9).astype(np.int64)), {}
    teacher = tiny.masked_language_model(name)
    with torch.no_grad():
        read = read_activations(teacher, ids, hidden_layers=range(5), attention_layers=[3])
        values["hidden"] = [state.abs().mean().item() for state in read.hidden.values()]
        values["attention"] = [state.abs().mean().item() for state in read.attention[3].values()]
        fitted = with_language_modelling_head(teacher.base_model, torch.arange(tiny.VOCABULARY)).eval()
        values["logits"] = [model(ids).logits.logsumexp(dim=-1).mean().item() for model in (teacher, fitted)]
    layers = ["teacher-layers"] * (FAMILIES_OF_STUDY[name].copied is not None)
    for initialisation in ("random", "teacher-embeddings", *layers):
        _, student = teacher_and_student(name, initialisation, "L2-H24")
        with torch.no_grad():
            values[initialisation] = [student(ids).logits.logsumexp(dim=-1).mean().item()]
    return values


def training(folder: Path) -> Values:
    """Held-out losses of whole runs: optimiser, schedule, order, freezing, checkpoints of learning curves."""
    tiny.workspace(folder)
    values = {}
    for method in ("mlm", "hs-uniform+last", "mha-minilmv2"):
        curve = distilled(folder, method, method)["training"]["curve"]
        values[method] = [point["loss"] for point in curve]
    values["teacher"] = [point["loss"] for point in adapted(folder, "adapted")["training"]["curve"]]
    return values


def cleaned(folder: Path, monkeypatch) -> Values:
    words = " ".join(tiny.WORDS)
    texts = {
        "wikipedia": [
            "One two three four five six seven eight nine ten.\nshort line",
            "<p>A b c d e f g h i j k [12]</p>",
        ],
        "wikipedia-es": ["uno dos tres cuatro cinco seis siete ocho nueve diez", words],
        "sotu": [f"{words}\n{words}", "held out words that follow each other in a task of ours, thirteen of them here"],
    }
    monkeypatch.setattr(cleaning, "TEXTS", {name: partial(iter, own) for name, own in texts.items()})
    heldout = ["held out words that follow each other in a task of ours, thirteen of them here"]
    documents, counts = cleaning.clean(texts, cleaning.Overlap(heldout, 13))
    packed = pack(np.arange(5, 60), tiny.tokenizer(folder / "words"), 16)
    return {
        "documents": digest([list(document) for document in documents]),
        "counts": counts,
        "packed": packed.tolist(),
    }


def unigram() -> PreTrainedTokenizerFast:
    special = ["<s>", "<pad>", "</s>", "<unk>"]
    pieces = [(piece, 0.0) for piece in special] + [(word, -2.0 - 0.01 * i) for i, word in enumerate(tiny.WORDS)]
    backend = Tokenizer(models.Unigram([*pieces, ("\u2581", -3.0), ("<mask>", 0.0)], unk_id=3))
    backend.pre_tokenizer, backend.decoder = pre_tokenizers.Metaspace(), decoders.Metaspace()
    backend.post_processor = processors.TemplateProcessing(
        single=["<s>", "$A", "</s>"], special_tokens=[("<s>", 0), ("</s>", 2)]
    )
    names = {"bos": "<s>", "cls": "<s>", "eos": "</s>", "sep": "</s>", "pad": "<pad>", "unk": "<unk>", "mask": "<mask>"}
    return PreTrainedTokenizerFast(tokenizer_object=backend, **{f"{key}_token": name for key, name in names.items()})


def vocabulary(folder: Path) -> Values:
    values = {}
    for name, words in (("WordPiece", tiny.tokenizer(folder / "words")), ("Unigram", unigram())):
        kept = pieces_to_keep(words, range(10, len(words), 3))
        trimmed = trim_tokenizer(words, kept)
        values[name] = {"kept": kept.tolist(), "pieces": digest(sorted(trimmed.get_vocab().items()))}
    return values


def teacher(name: str, folder: Path) -> Values:
    """Hidden states of the embedded teacher on a sentence."""
    layers = EMBEDDED_SIZES[name][0]
    encoder, words = load_pretrained(Teacher(name=name, layers=layers, width=384, heads=12, intermediate=1536))
    ids = words("The committee read the report, Straße 12.", return_tensors="pt")["input_ids"]
    with torch.no_grad():
        states = encoder.eval()(ids).last_hidden_state[0]
    return {"ids": ids[0].tolist(), "states": states[:, ::48].flatten().tolist()}


def published_reference(folder: Path) -> Values:
    """Hidden states of the published student on a sentence."""
    model, words = published("paraphrase-minilm-l3")
    ids = words("The committee read the report, Straße 12.", return_tensors="pt")["input_ids"]
    with torch.no_grad():
        states = model.eval()(ids).last_hidden_state[0]
    return {"ids": ids[0].tolist(), "states": states[:, ::48].flatten().tolist()}


def table_reference(folder: Path) -> Values:
    """Likeness of tokens, which the signs of directions do not change."""
    words, values = tiny.tokenizer(folder / "words"), {}
    for family in FAMILIES:
        rows = static_table(tiny.masked_language_model(family).base_model, words, 6, 0.01).embeddings.weight
        values[family] = (rows @ rows[5:60:11].T).detach().flatten().tolist()
    return values


def prequant(folder: Path) -> Values:
    """Encoders of two bits, what is tuned of them, and what they take."""
    values: Values = {}
    for family in FAMILIES:
        encoder = tiny.masked_language_model(family).base_model
        for scaling in SCALINGS:
            smaller = quantise_in_place(copy.deepcopy(encoder), 3, scaling)
            values[f"{family} {scaling}"] = [own.abs().mean().item() for _, own in matrices(smaller)]
        for rule in ("outliers", "error", "random"):
            chosen = positions(encoder, smaller, rule, 0.01, seed=1)
            values[f"{family} {rule}"] = digest({name: own.tolist() for name, own in chosen.items()})
            values[f"{family} {rule} bits"] = [bits_per_weight(smaller, 3, "row", chosen)]
    return values


def cr_ild(folder: Path) -> Values:
    """Losses of its stages and norms of the student's gradient, mixed and not."""
    values: Values = {}
    for family in FAMILIES:
        ids = torch.from_numpy(tiny.sequences(6, 9).astype(np.int64))
        mask = (torch.arange(ids.shape[1]) < torch.arange(6, 12)[:, None]).long()
        for consistency, mapping in ((None, "uniform"), (0.1, "last")):
            for objects in (["attention", "hidden"], ["query", "key", "value"]):
                student, teacher = (tiny.masked_language_model(family, seed=seed).base_model for seed in (1, 2))
                keep_layers(student, 2)
                made = IntermediateDistillation(student, teacher, objects, mapping, consistency).train()
                switch_off_dropout(made)
                made.progress = 0.5
                torch.manual_seed(1)
                loss = made(input_ids=ids, attention_mask=mask)["loss"]
                loss.backward()
                gradient = sum(p.grad.square().sum() for p in student.parameters() if p.grad is not None)
                values[f"{family} {mapping} {objects[0]}"] = [loss.item(), math.sqrt(gradient)]
    torch.manual_seed(1)
    values["logits"] = [logits_loss(torch.randn(4, n), torch.randn(4, n), 2.0).item() for n in (1, 3)]
    values["labels"] = digest(mislabelled([0, 1, 2] * 30, 3, 0.3, seed=1))
    return values


def xtreme_distil(folder: Path) -> Values:
    """Compressed embeddings, losses of the first stage, and those of the classifier."""
    values: Values = {}
    ids = torch.from_numpy(tiny.sequences(6, 9).astype(np.int64))
    batch = {"input_ids": ids, "attention_mask": (torch.arange(ids.shape[1]) < torch.arange(6, 12)[:, None]).long()}
    for family in FAMILIES:
        teacher, student = teacher_and_student(family)
        table = teacher.get_input_embeddings().weight.detach()
        values[f"{family} embeddings"] = compressed(table, 8).abs().mean(dim=0).tolist()
        for variant in VARIANTS:
            torch.manual_seed(1)
            made = Representation(student.base_model, teacher.base_model, variant).eval()
            classifier = StagedClassifier(made, 3).eval()
            losses = [made(**batch)["loss"].item()]
            for classifier.from_logits in (True, False):
                told = {"labels": torch.arange(6) % 3, "targets": torch.ones(6, 3)}
                losses.append(classifier(**told, **batch)["loss"].item())
            values[f"{family} {variant}"] = losses
    return values


def miniend(folder: Path) -> Values:
    """Spans taken out, and the loss of every arm under padding."""
    generator = np.random.default_rng(0)
    rows = [corrupted(row, 0.3, 2, 4, generator) for row in tiny.sequences(6, 9).tolist()]
    values: Values = {"spans": digest(rows)}
    batch = {key: torch.tensor([row[place] for row in rows]) for place, key in enumerate(("input_ids", "labels"))}
    batch["attention_mask"] = (torch.arange(batch["input_ids"].shape[1]) < torch.arange(6, 12)[:, None]).long()
    batch["labels"][0, 3:] = IGNORED
    for family in FAMILIES:
        models = [encoder_decoder(own, "miniend").eval() for own in teacher_and_student(family)]
        for place, model in enumerate(models):
            model.config.pad_token_id, model.config.decoder_start_token_id = 0, 2
            torch.manual_seed(place)
            for name, own in model.decoder.named_parameters():  # random weights differ from version to version
                if "crossattention" in name:
                    own.data.copy_(0.2 * torch.randn(own.shape) + ("LayerNorm.weight" in name))
        for arm in WORDS.keys() - {"teacher"}:
            made = SpanDistillation(models[1], models[0], arm, heads=4).train()
            switch_off_dropout(made)
            values[f"{family} {arm}"] = made(**batch)["loss"].item()
    return values


def text(name: str, folder: Path) -> Values:
    """The first documents of a text in each of its languages."""
    own = [known for known in TEXT_NAMES if known == name or known.startswith(f"{name}-")]
    return {known: digest(list(islice(TEXTS[known](), 40))) for known in own}


def task(name: str, folder: Path) -> Values:
    """Sizes of the splits, and their first and last examples."""
    splits = TASKS[name].loader()
    return {split: [len(rows), digest(rows[:20] + rows[-20:])] for split, rows in splits.items()}


def own_text(folder: Path) -> Values:
    own_data.write(folder)
    declared = own_data.TEXTS
    return {name: digest(list(read_own(OwnText(**own), folder))) for name, own in declared.items()}


def own_task(folder: Path) -> Values:
    own_data.write(folder)
    values: Values = {}
    for name, own in own_data.TASKS.items():
        task, splits = load_own(name, OwnTask.model_validate(own), folder)
        values[name] = {"labels": task.labels and [*task.labels], "metrics": [*task.metrics]}
        values[name] |= {split: [len(rows), digest(rows)] for split, rows in splits.items()}
    return values


def evaluation(folder: Path, **budget) -> tuple[Evaluation, Layout]:
    tiny.workspace(folder)
    layout = Layout(folder, "english")
    splits = {"train": tiny.sentences(48, 1), "development": tiny.sentences(24, 2), "test": tiny.sentences(24, 3)}
    storage.save(DatasetDict(splits), layout.tasks / "topic")
    own = TaskBudget(train=32, development=None, test=None, max_length=16, **budget)
    (described,) = (d for d in tiny.plan(folder).of(Evaluation) if d.method == "teacher")
    return described.model_copy(update={"tasks": {"topic": own}}), layout


def finetuning(folder: Path, monkeypatch) -> Values:
    described, layout = evaluation(folder)
    labelled = TASKS["topic"].__class__(**{**vars(TASKS["topic"]), "labels": ("no", "yes")})
    monkeypatch.setitem(TASKS, "topic", labelled)
    result = evaluate_task(described, layout.teacher, "topic", layout.tasks, tiny.tokenizer(folder / "words"))
    return {f"seed {run.seed}": [*run.development.values(), *run.test.values()] for run in result.runs}


def retrieval(folder: Path) -> Values:
    described, layout = evaluation(folder)
    rows = tiny.sentences(40, 4)
    pairs = rows.remove_columns("label").add_column("text_pair", [" ".join(t.split()[::-1]) for t in rows["text"]])
    storage.save(
        DatasetDict({"test-es": pairs, "test-fr": pairs.select(range(39, -1, -1))}), layout.tasks / "retrieval"
    )
    own = TaskBudget(train=None, development=None, test=30, max_length=8, languages=["en", "es", "fr"])
    described = described.model_copy(update={"tasks": {"retrieval": own}})
    probe = retrieve(described, layout.teacher, "retrieval", layout.tasks, tiny.tokenizer(folder / "words"))
    return {language: list(scores.values()) for language, scores in probe.languages.items()}


def admission(folder: Path) -> Values:
    labels = [1, 1, 1, 0, 2, 2, 0, 1]
    return {metric: majority(labels, metric) for metric in ("accuracy", "macro_f1")}


def masked_word(folder: Path) -> Values:
    described, layout = evaluation(folder)
    texts = [[tiny.WORDS[i - 5] for i in row[1:9]] for row in tiny.sequences(300, 4)]
    rows = Dataset.from_dict(
        {"text": [" ".join(t[:4]) + " " for t in texts], "text_pair": [" " + " ".join(t[5:]) for t in texts]}
        | {"label": [t[4][0] for t in texts], "source": [" ".join(t) for t in texts]}
    )
    splits = {"train": rows.select(range(200)), "development": rows.select(range(200, 240))}
    storage.save(DatasetDict(splits | {"test": rows.select(range(240, 300))}), layout.tasks / "masked-word")
    own = TaskBudget(train=None, development=None, test=None, max_length=16, languages=["en"])
    described = described.model_copy(update={"tasks": {"masked-word": own}})
    words = tiny.tokenizer(folder / "words")
    probe = guess_masked_words(described, layout.teacher, "masked-word", layout.tasks, words)
    return {"test": probe.languages["en"]["accuracy"], "development": probe.development["en"]}


def mlm_score(folder: Path) -> Values:
    params, words = tiny.parameters(folder), tiny.tokenizer(folder / "words")
    held_out = MaskedSequences(stream(params, words).sequences, params.masking, words, seed=0)
    scores = {f: masked_language_modelling(tiny.masked_language_model(f), held_out, False) for f in FAMILIES}
    return {family: [score.loss, score.accuracy] for family, score in scores.items()}


def sizes(folder: Path) -> Values:
    return {f: size(tiny.masked_language_model(f).base_model, 16).model_dump() for f in FAMILIES}


def timing(folder: Path, monkeypatch) -> Values:
    """What is timed, in which order: seconds differ from machine to machine."""
    tiny.workspace(folder)
    (described,) = tiny.plan(folder).of(LatencyMeasurement)
    calls = []

    def forward_seconds(model, inputs, bf16):
        calls.append([model.config.num_hidden_layers, list(inputs.shape), int(inputs.sum()), bf16])
        return 1.0 + model.config.num_hidden_layers

    monkeypatch.setattr(latency, "forward_seconds", forward_seconds)
    budget = described.latency.model_copy(update={"runs": 3, "warmup_runs": 1, "batch_sizes": [1, 2], "threads": [1]})
    budget = budget.model_copy(update={"sequence_length": 16})
    described = described.model_copy(update={"latency": budget})
    result = latency.measure_latency(described, Layout(folder, "english"), folder / "latency.json")
    rows = [row.model_dump() for row in result.measurements]
    return {"calls": calls, "rows": digest(rows)}


def representations(folder: Path) -> Values:
    ids, values = torch.from_numpy(tiny.sequences(8, 9).astype(np.int64)), {}
    for family in FAMILIES:
        with torch.no_grad():
            read = [
                read_activations(model.base_model, ids, hidden_layers=layers, attention_layers=layers)
                for model in teacher_and_student(family)[::-1]
                for layers in [range(1, model.config.num_hidden_layers + 1)]
            ]
            compared = compare_layers(*read, relation_heads=4, relation_sequences=4)
        values[f"{family} cka"] = np.ravel(compared["cka"]).tolist()
        values[f"{family} relations"] = np.ravel(list(compared["relation_divergence"].values())).tolist()
    return values


def tagging(folder: Path) -> Values:
    """Tags among sub-words, a probe's weights, and scores of what it says."""
    names, words = ("O", "B-A", "I-A"), tiny.tokenizer(folder / "words")
    texts = [" ".join(tiny.WORDS[i - 5] for i in row[1:9]) for row in tiny.sequences(60, 4)]
    tags = [[(tiny.WORDS.index(word) + place) % 3 for place, word in enumerate(text.split())] for text in texts]
    rows = Dataset.from_dict(align(texts, tags, words, 8))
    classifier, collate = WordClassifier(tiny.masked_language_model().bert, 3, pairs=False), Collator(words, 8)
    start_from_probe(classifier, rows, collate, 16, False)
    scores = tag_metrics(names, ("entity_f1", "accuracy"), *tagged(classifier, rows, collate, 16, False))
    return {"labels": digest(rows["labels"][:]), "weights": classifier.output.weight.flatten().tolist()} | scores


TEACHERS = ("all-minilm-l6-v2", "multilingual-e5-small", "multilingual-e5-small-genuine")
COMPUTED: dict[str, Callable[..., Values]] = {
    **{name: partial(objective, name) for name in OBJECTIVES},
    "masking": masking,
    "start": start,
    "pruning": pruned,
    "head": head,
    **{f"family/{name}": partial(family, name) for name in ("mpnet", "distilbert", "electra", "modernbert")},
    "training": training,
    "cleaning": cleaned,
    "vocabulary": vocabulary,
    **{f"teacher/{name}": partial(teacher, name) for name in TEACHERS},
    "reference/published": published_reference,
    "reference/static_table": table_reference,
    "neighbour/prequant": prequant,
    "neighbour/cr-ild": cr_ild,
    "neighbour/xtremedistil": xtreme_distil,
    "neighbour/miniend": miniend,
    **{key: partial(text, key.partition("/")[2]) for key in REVISIONS if key.startswith("text/")},
    **{key: partial(task, key.partition("/")[2]) for key in REVISIONS if key.startswith("task/")},
    "own/text": own_text,
    "own/task": own_task,
    "admission": admission,
    "finetuning": finetuning,
    "tagging": tagging,
    "retrieval": retrieval,
    "masked_word": masked_word,
    "mlm_score": mlm_score,
    "size": sizes,
    "latency": timing,
    "representations": representations,
}
PATCHED = ("cleaning", "finetuning", "latency")


def differences(recorded: Any, computed: Any, name: str = "") -> list[str]:
    """Where two trees of values differ: numbers by more than the tolerance, everything else at all."""
    if isinstance(recorded, dict) and isinstance(computed, dict) and recorded.keys() == computed.keys():
        return [line for key in recorded for line in differences(recorded[key], computed[key], f"{name}/{key}")]
    if isinstance(recorded, list) and isinstance(computed, list) and len(recorded) == len(computed):
        pairs = enumerate(zip(recorded, computed, strict=True))
        return [line for place, pair in pairs for line in differences(*pair, f"{name}/{place}")]
    if isinstance(recorded, float) and isinstance(computed, (int, float)):
        near = math.isclose(recorded, computed, rel_tol=TOLERANCE, abs_tol=1e-5)
        return [] if near else [f"{name}: {computed}, recorded {recorded}"]
    return [] if recorded == computed else [f"{name}: {computed}, recorded {recorded}"]


def test_every_family_has_golden_values():
    assert COMPUTED.keys() == REVISIONS.keys()


@pytest.mark.fast
def test_tolerance_and_exact_values():
    assert differences({"a": [1.0, 3], "b": "x"}, {"a": [1.0009, 3], "b": "x"}) == []
    assert len(differences({"a": [1.0, 3], "b": "x"}, {"a": [1.002, 4], "b": "y"})) == 3
    assert differences([1.0], [1.0, 2.0]) and differences({"a": 1}, {"b": 1})


@pytest.fixture(autouse=True)
def _signs_are_fixed(monkeypatch):
    """Eigenvectors have no sign of their own, and processors choose other ones: here the largest entry is positive."""
    eigh = torch.linalg.eigh

    def signed(matrix):
        values, vectors = eigh(matrix)
        largest = vectors.gather(-2, vectors.abs().argmax(dim=-2, keepdim=True))
        return torch.return_types.linalg_eigh((values, vectors * largest.sign()))

    monkeypatch.setattr(torch.linalg, "eigh", signed)


@pytest.mark.parametrize(
    "family", [pytest.param(f, marks=() if "/" in f else pytest.mark.fast) for f in COMPUTED], ids=list(COMPUTED)
)
def test_behaviour_is_that_of_its_revision(family, tmp_path, monkeypatch, request):
    patches = {"monkeypatch": monkeypatch} if family in PATCHED else {}
    computed = json.loads(json.dumps(COMPUTED[family](tmp_path, **patches)))
    golden = json.loads(GOLDEN.read_text()) if GOLDEN.is_file() else {}
    recorded = golden.get(family, {"revision": None, "values": None})
    if recorded["revision"] != REVISIONS[family] and request.config.getoption("--record"):
        golden[family] = {"revision": REVISIONS[family], "values": computed}
        GOLDEN.write_text(json.dumps(dict(sorted(golden.items())), indent=1) + "\n")
        return
    assert recorded["revision"] == REVISIONS[family], (
        f"{family} has revision {REVISIONS[family]}, values are recorded for {recorded['revision']}: run"
        " `pytest tests/test_golden.py --record`"
    )
    changed = differences(recorded["values"], computed)
    assert changed == [], f"{family}: behaviour changed while its revision did not; if it is meant, raise the revision"
