"""A teacher of one's own: what its files tell, what `make check` refuses in one line, and its way to results."""

from __future__ import annotations

import json
import math
import os
import shutil
import socket
from itertools import islice

import own_data
import pytest
import tiny
import torch
from safetensors.torch import load_file, save_file
from tokenizers import Tokenizer, models, pre_tokenizers, processors, trainers
from transformers import AutoModelForMaskedLM, PreTrainedTokenizerFast

from study.data import cleaning
from study.data.corpus import build_corpus, load_corpus
from study.data.pretrained import load_tokenizer
from study.data.tasks import build_tasks
from study.data.teachers import check_teachers
from study.data.texts import TEXTS
from study.descriptions import CorpusData, Evaluation, Run, TaskData, TeacherAdaptation
from study.distillation.distil import distil
from study.distillation.masking import MaskedSequences
from study.distillation.teacher import adapt_teacher
from study.evaluation.scores import evaluate
from study.families import FAMILIES
from study.files import StudyError
from study.new import new_study
from study.params import load_params
from study.plan import resolve
from study.teachers import EMBEDDED_SIZES, HUB_NAMES, hub_name, read_teacher

SIZES = dict(tiny.TEACHER)
#: Parameters of the way from a teacher's folder to results: as little as shows it.
SMALL = {
    "precision": "fp32",
    "initialisation": "teacher-layers",
    "distillation": {"steps": 12, "batch_size": 8, "evaluate_every": 6, "validation_sequences": 16, "save_every": 12},
}


def byte_level(texts: list[str], size: int = 300) -> PreTrainedTokenizerFast:
    """A byte-level BPE tokenizer as RoBERTa's, trained on texts."""
    backend = Tokenizer(models.BPE())
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    special = ["<s>", "<pad>", "</s>", "<unk>", "<mask>"]
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(
        vocab_size=size, special_tokens=special, initial_alphabet=alphabet, show_progress=False
    )
    backend.train_from_iterator(texts, trainer)
    backend.post_processor = processors.RobertaProcessing(("</s>", 2), ("<s>", 0), add_prefix_space=False)
    names = {"bos": "<s>", "cls": "<s>", "eos": "</s>", "sep": "</s>", "pad": "<pad>", "unk": "<unk>", "mask": "<mask>"}
    return PreTrainedTokenizerFast(tokenizer_object=backend, **{f"{key}_token": token for key, token in names.items()})


@pytest.fixture
def study(tmp_path, monkeypatch):
    """A study's folder with a teacher of BERT's family in models/own, and a profile `mine` that names it."""
    monkeypatch.chdir(tmp_path)
    (tmp_path / "notebooks").mkdir()
    shutil.copy(tiny.FIXTURES / "params.yaml", tmp_path)
    tiny.masked_language_model(**SIZES).save_pretrained(tmp_path / "models" / "own")
    tiny.tokenizer(tmp_path / "words").save_pretrained(tmp_path / "models" / "own")
    write(tmp_path)
    return tmp_path


def write(root, teacher: dict | None = None, setting: dict | None = None, **changes) -> None:
    """profiles/mine/params.yaml: the teacher by its name alone, small students of its family."""
    nothing = dict.fromkeys(("layers", "width", "heads", "intermediate"))
    values = {
        "grid": {
            "settings": ["english"],
            "methods": ["none", "od", "hs-last", "mha-minilmv2"],
            "students": {"english": ["S"], "multilingual": []},
        },
        "settings": {
            "english": {"teacher": nothing | {"name": "models/own"} | (teacher or {}), "tasks": ["topic"]}
            | (setting or {})
        },
        "students": {"S": {"layers": 2, "width": 24, "heads": 4, "intermediate": 48}},
        "corpus": {"sequence_length": 16, "validation_sequences": 16, "max_tokens": 4000},
        "methods": {"mha-minilmv2": {"relation_heads": 4}},
        "latency": {"sequence_length": 16},
        "finetuning": {
            "seeds": [1],
            "tasks": {"topic": {"train": 32, "development": 16, "test": 16, "max_length": 16}},
        },
        "tuning": {"students": {"english": [], "multilingual": []}},
    }
    for key, change in changes.items():
        values[key] = {**values.get(key, {}), **change} if isinstance(change, dict) else change
    (root / "profiles" / "mine").mkdir(parents=True, exist_ok=True)
    (root / "profiles" / "mine" / "params.yaml").write_text(json.dumps(values, indent=1))


def checked(root) -> list[str]:
    return check_teachers(load_params("mine", root), root)


def edit(file, **values) -> None:
    file.write_text(json.dumps(json.loads(file.read_text()) | values))


def test_sizes_family_and_head_are_read_where_they_are_not_typed(study):
    assert checked(study) == []
    plan = resolve("mine", study)
    (corpus,), (adaptation,) = plan.of(CorpusData), plan.of(TeacherAdaptation)
    expected = SIZES | {"family": "bert", "name": "models/own", "head": "own"}
    assert corpus.teacher.model_dump() == expected and adaptation.head == "own"
    assert adaptation.revisions.keys() == {"masked_language_modelling", "masking"}
    write(study, SIZES)  # typed, the same
    assert resolve("mine", study).of(CorpusData) == plan.of(CorpusData)
    tiny.masked_language_model(**SIZES, seed=1).save_pretrained(study / "models" / "own")  # other weights, same name
    assert resolve("mine", study).of(CorpusData) != plan.of(CorpusData)


@pytest.mark.parametrize("head", ["fit", "adapt"])
def test_a_head_that_is_trained_is_an_adaptation_and_leaves_the_corpus_alone(study, head):
    write(study, {"head": head})
    plan = resolve("mine", study)
    assert plan.of(TeacherAdaptation)[0].head is None and plan.of(CorpusData)[0].teacher.head is None
    assert plan.of(TeacherAdaptation)[0].adaptation.head_only == (True if head == "fit" else None)


def test_a_teacher_without_a_head_gets_one_fitted(study):
    tiny.masked_language_model(**SIZES).base_model.save_pretrained(study / "models" / "own")
    assert resolve("mine", study).of(TeacherAdaptation)[0].adaptation.head_only is True


def test_a_card_names_a_teacher_where_others_find_it(study):
    assert set(HUB_NAMES) == set(EMBEDDED_SIZES)
    assert hub_name("all-minilm-l6-v2", study) == "sentence-transformers/all-MiniLM-L6-v2"
    assert hub_name("FacebookAI/roberta-base", study) == "FacebookAI/roberta-base"
    assert hub_name("models/own", study) is None


def test_an_embedded_teacher_needs_no_sizes(study):
    write(study, {"name": "all-minilm-l6-v2"}, initialisation="random")
    teacher = load_params("mine", study).settings["english"].teacher
    assert teacher.model_dump() == {"layers": 6, "width": 384, "heads": 12, "intermediate": 1536, "name": teacher.name}


@pytest.mark.parametrize(
    ("teacher", "changes", "problem"),
    [
        ({"layers": 12}, {}, r"settings\.english\.teacher\.layers = 12; the model has 6; allowed: 6"),
        ({"head": "own"}, {}, r"settings\.english\.teacher\.head = own: .*; allowed: fit, adapt"),
        ({}, {"corpus": {"sequence_length": 513}}, r"corpus\.sequence_length = 513; allowed: at most 512"),
        (
            {},
            {"finetuning": {"tasks": {"topic": {"max_length": 600}}}},
            r"finetuning\.tasks\.topic\.max_length = 600; allowed: at most 512",
        ),
    ],
)
def test_what_is_wrong_of_an_embedded_teacher_is_one_line(study, teacher, changes, problem):
    write(study, {"name": "all-minilm-l6-v2"} | teacher, initialisation="random", **changes)
    with pytest.raises(StudyError, match=problem) as error:
        load_params("mine", study)
    assert "\n" not in str(error.value)


@pytest.mark.parametrize("family", FAMILIES)
def test_every_family_says_its_sizes_in_its_own_words(study, family):
    model = tiny.masked_language_model(family, **SIZES)
    model.save_pretrained(study / "models" / "own")
    assert read_teacher("models/own", study) == SIZES | {"family": family, "head": "own"}


@pytest.mark.parametrize("subfolder", ["", "0_Transformer/"])
def test_a_folder_of_sentence_transformers_is_recognised(study, subfolder):
    top, own = study / "models" / "sentence", study / "models" / "sentence" / subfolder
    shutil.copytree(study / "models" / "own", own)
    kind = "sentence_transformers.models."
    modules = [
        {"path": subfolder.strip("/"), "type": f"{kind}Transformer"},
        {"path": "1_Pooling", "type": f"{kind}Pooling"},
    ]
    (top / "modules.json").write_text(json.dumps(modules))
    (top / "1_Pooling").mkdir()
    modes = {"pooling_mode_cls_token": True, "pooling_mode_mean_tokens": False, "word_embedding_dimension": 24}
    (top / "1_Pooling" / "config.json").write_text(json.dumps(modes))
    write(study, {"name": "models/sentence"})
    assert checked(study) == []
    assert resolve("mine", study).of(CorpusData)[0].teacher.pooling == "cls"
    write(study, {"name": "models/sentence", "pooling": "mean"})
    with pytest.raises(StudyError, match=r"teacher\.pooling = mean; the model has cls"):
        load_params("mine", study)
    (top / "1_Pooling" / "config.json").write_text(json.dumps({"pooling_mode": "max"}))  # as newer versions write it
    assert read_teacher("models/sentence", study)["pooling"] == "max"


def no_token(study, token):
    file = study / "models" / "own" / "tokenizer_config.json"
    values = {key: value for key, value in json.loads(file.read_text()).items() if key != token}
    words = tiny.tokenizer(study / "words").backend_tokenizer
    names = {key: value for key, value in values.items() if key.endswith("_token") and isinstance(value, str)}
    PreTrainedTokenizerFast(tokenizer_object=words, **names).save_pretrained(study / "models" / "own")


def without_head(study):
    file = study / "models" / "own" / "model.safetensors"
    kept = {key: value for key, value in load_file(file).items() if not key.startswith("cls.")}
    save_file(kept, file, metadata={"format": "pt"})


def byte_level_words(study):
    words = byte_level(tiny.WORDS, 261)
    words.save_pretrained(study / "models" / "own")
    model = tiny.masked_language_model("roberta", **SIZES, vocab_size=len(words))
    model.save_pretrained(study / "models" / "own")


def config(root, **values):
    edit(root / "models" / "own" / "config.json", **values)


def headless(root):
    config(root, architectures=["BertModel"])
    write(root, {"head": "own"})


def said_twice(root):
    write(root, {"head": "fit"}, setting={"adaptation": {"head_only": True}})


def too_long_behind_the_offset(root):
    byte_level_words(root)
    write(root, finetuning={"tasks": {"topic": {"max_length": 39}}})


def trimmed(root):
    byte_level_words(root)
    write(root, setting={"vocabulary": "trimmed"})


def other_family(root):
    tiny.masked_language_model("modernbert", **SIZES).save_pretrained(root / "models" / "own")


def other_student(root):
    write(root, students={"S": {"layers": 2, "width": 24, "heads": 4, "intermediate": 48, "family": "roberta"}})


#: What is wrong -> how it comes about, and what is said.
MISTAKES = {
    "no such folder": (lambda s: write(s, {"name": "./models/no"}), r"teacher '\./models/no': no such folder; allowed"),
    "no config": (lambda s: (s / "models/own/config.json").unlink(), "has no config.json"),
    "a damaged config": (lambda s: (s / "models/own/config.json").write_text("{"), "config.json cannot be read"),
    "a family": (
        lambda s: config(s, model_type="gpt2"),
        "model_type = gpt2 cannot be read; allowed: bert, .*modernbert",
    ),
    "positions": (
        lambda s: config(s, position_embedding_type="relative_key"),
        "position_embedding_type = relative_key",
    ),
    "a size": (
        lambda s: write(s, {"layers": 6}),
        r"settings\.english\.teacher\.layers = 6; the model has 4; allowed: 4",
    ),
    "a size, all typed": (
        lambda s: write(s, SIZES | {"intermediate": 96, "head": "fit"}),
        r"settings\.english\.teacher\.intermediate = 96; the model has 48",
    ),
    "a head not in the config": (
        headless,
        r"settings\.english\.teacher\.head = own: the model has no language-modelling head; allowed: fit, adapt",
    ),
    "a head not in the file": (without_head, r"teacher\.head = own: its file has no cls\.predictions"),
    "a head said twice": (said_twice, "adaptation.head_only = True beside teacher.head = fit"),
    "no mask": (lambda s: no_token(s, "mask_token"), "its tokenizer has no mask_token"),
    "no padding": (lambda s: no_token(s, "pad_token"), "its tokenizer has no pad_token"),
    "no cls": (lambda s: no_token(s, "cls_token"), "its tokenizer has no cls_token"),
    "no sep": (lambda s: no_token(s, "sep_token"), "its tokenizer has no sep_token"),
    "vocabularies": (lambda s: config(s, vocab_size=90), "its tokenizer has 60 tokens and its embeddings 90"),
    "shapes": (
        lambda s: config(s, intermediate_size=96),
        r"model\.safetensors: .*intermediate\.dense\.\w+ has the shape \[48\b.*; by config\.json it is \[96\b",
    ),
    "long sequences": (
        lambda s: write(s, corpus={"sequence_length": 41}),
        r"corpus\.sequence_length = 41; allowed: at most 40, what settings\.english\.teacher reads",
    ),
    "long texts": (too_long_behind_the_offset, r"finetuning\.tasks\.topic\.max_length = 39; allowed: at most 38"),
    "trimming": (trimmed, "vocabulary of a BPE tokenizer cannot be trimmed; allowed: Unigram, WordPiece"),
    "a hub name": (
        lambda s: write(s, {"name": "somebody/model"}),
        r"settings\.english\.teacher: teacher 'somebody/model': no folder of the project, not in the hub's cache",
    ),
    "layers": (other_family, "students.S: initialisation 'teacher-layers' cannot take layers of modernbert out of"),
    "a student": (other_student, r"students\.S\.family = roberta: initialisation 'teacher-layers' needs the teacher's"),
}


@pytest.mark.parametrize("name", MISTAKES)
def test_what_can_be_known_wrong_is_said_in_one_line_before_any_weight_is_read(study, name, monkeypatch):
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    change, problem = MISTAKES[name]
    change(study)
    monkeypatch.setattr(torch.nn.Module, "load_state_dict", None)  # no model is made
    with pytest.raises(StudyError, match=problem) as error:
        checked(study)
    assert "\n" not in str(error.value)


def test_a_hub_name_with_everything_typed_is_noted_while_no_hub_can_be_reached(study, monkeypatch):
    def unreachable(*_):
        raise socket.gaierror("no such host")

    for key in [key for key in os.environ if key.lower().endswith("_proxy")]:
        monkeypatch.delenv(key)
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", False)
    monkeypatch.setattr("socket.getaddrinfo", unreachable)
    write(study, SIZES | {"name": "somebody/model", "head": "own", "family": "bert"})
    assert checked(study) == ["settings.english.teacher: somebody/model was not looked at: the hub cannot be reached"]
    assert len(resolve("mine", study).of(Run)) == 4  # it plans
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    with pytest.raises(StudyError, match="somebody/model"):
        checked(study)


def pretrain(folder, texts: list[str], steps: int = 100) -> None:
    """A small RoBERTa with a head and a byte-level tokenizer of its own, trained by masked language modelling."""
    words = byte_level(texts)
    model = tiny.masked_language_model("roberta", **SIZES, vocab_size=len(words), initializer_range=0.02).train()
    ids = torch.tensor([token for text in texts for token in words(text, add_special_tokens=False)["input_ids"]])
    draw, optimiser = torch.Generator().manual_seed(0), torch.optim.AdamW(model.parameters(), lr=5e-3)
    for _ in range(steps):
        starts = torch.randint(len(ids) - 14, (32, 1), generator=draw)
        batch = torch.nn.functional.pad(ids[starts + torch.arange(14)], (1, 1))
        batch[:, 0], batch[:, -1] = words.cls_token_id, words.sep_token_id
        masked = torch.rand(batch.shape, generator=draw) < 0.15
        labels = batch.masked_fill(~masked, -100)
        loss = model(input_ids=batch.masked_fill(masked, words.mask_token_id), labels=labels).loss
        loss.backward()
        optimiser.step()
        optimiser.zero_grad()
    model.save_pretrained(folder)
    words.save_pretrained(folder)


def test_a_teacher_of_ones_own_from_its_folder_to_results(study, monkeypatch):
    """A RoBERTa trained here keeps its head through corpus and teacher stages, and is distilled by OD, HS and MHA."""
    texts = [text[:4_000] for text in islice(TEXTS["sotu"](), 20)]
    monkeypatch.setattr(cleaning, "TEXTS", {"sotu": lambda: iter(texts)})  # the rest of it only takes longer
    shutil.rmtree(study / "models" / "own")
    pretrain(study / "models" / "own", texts)
    write(study, setting={"texts": ["sotu"]}, **SMALL)
    assert checked(study) == []
    plan = resolve("mine", study)
    layout = plan.layout("english")
    (tasks,), (corpus,) = plan.of(TaskData), plan.of(CorpusData)
    build_tasks(tasks, layout.tasks)
    build_corpus(corpus, layout, layout.corpus, layout.encoder)
    (described,) = plan.of(TeacherAdaptation)
    record = adapt_teacher(described, layout, layout.teacher)["training"]

    # The head is the checkpoint's own, bit for bit, and its loss that of the checkpoint: far below that of guessing.
    before, after = tiny.weights(study / "models" / "own"), tiny.weights(layout.teacher)
    assert tiny.identical(before, after)
    words = load_tokenizer(layout.teacher)
    sequences = MaskedSequences(load_corpus(layout.corpus)["validation"], described.masking, words, seed=0)
    original = AutoModelForMaskedLM.from_pretrained(study / "models" / "own", attn_implementation="eager").eval()
    losses = []
    with torch.no_grad():
        for i in range(len(sequences)):
            row = {key: torch.as_tensor(value) for key, value in sequences[i].items()}
            logits = original(input_ids=row["masked_input_ids"][None]).logits[0]
            losses += [
                -logits[p].log_softmax(-1)[t].item() for p, t in zip(row["positions"], row["labels"], strict=True)
            ]
    assert record["steps"] == 0 and record["curve"][0]["loss"] == pytest.approx(sum(losses) / len(losses), rel=1e-4)
    assert record["curve"][0]["loss"] < math.log(len(words)) - 0.5

    for run in plan.of(Run):
        trained = distil(run, layout, layout.student(run.model))["training"]
        if run.method == "none":
            continue
        assert trained["curve"][-1]["loss"] < trained["curve"][0]["loss"], run.method
    for evaluation in plan.of(Evaluation):
        result = evaluate(evaluation, layout, layout.result(evaluation.model))
        assert result.tasks["topic"].runs[0].test["accuracy"] >= 0
        assert (result.masked_language_modelling is not None) == (evaluation.method in ("teacher", "none", "od"))
    told = json.loads(layout.result("teacher").read_text())
    assert told["masked_language_modelling"]["loss"] == pytest.approx(record["curve"][0]["loss"], rel=1e-3)


@pytest.mark.parametrize(("width", "heads", "reads"), [(32, 8, 40), (20, 10, 40), (24, 12, 140)])
def test_a_new_study_of_a_small_teacher_has_relation_heads_and_lengths_that_fit(study, width, heads, reads):
    own_data.write(study / "data")
    model = tiny.masked_language_model(layers=2, width=width, max_position_embeddings=reads)
    model.save_pretrained(study / "models" / "own")
    task = "reviews={files: {train: data/reviews.csv, test: data/reviews-test.csv}, text: sentence, label: mood}"
    new_study("small", "models/own", ["data/texts/*.txt"], [task], "en", None)
    params = load_params("small", study)
    lengths = {params.corpus.sequence_length, params.latency.sequence_length}
    assert lengths | {params.finetuning.tasks["reviews"].max_length} == {min(reads, 128)}
    assert params.methods["mha-minilmv2"].relation_heads == heads
    assert ("\nmethods:" in (study / "profiles" / "small" / "params.yaml").read_text()) == (heads != 12)
