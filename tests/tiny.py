"""Small real models, tokenizer, corpus and parameters: every loading path of the study, on files of a few kilobytes."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import torch
from datasets import ClassLabel, Dataset, DatasetDict, Features, List, Value
from torch import nn
from transformers import AutoConfig, AutoModelForMaskedLM, BertTokenizerFast

from study import families
from study.config import Params
from study.data import storage
from study.descriptions import Run
from study.files import Layout
from study.params import expand, read_yaml
from study.plan import Plan, _descriptions, make_run

FIXTURES = Path(__file__).parent / "fixtures"
#: Families whose parts have the same names, the head aside.
FAMILIES = ("camembert", "bert", "roberta", "xlm-roberta")
SPECIAL = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]"]
WORDS = [a + b for a in "abcdefghijk" for b in ("", "x", "y", "z", "q")]
VOCABULARY = 60
LENGTH = 16
TEACHER = {"layers": 4, "width": 24, "heads": 4, "intermediate": 48}


#: Families whose parts have other names, or none of their own in tests.
OTHERS = ("ernie", "mpnet", "distilbert", "electra", "modernbert")


def masked_language_model(
    family="bert", attention="eager", seed=0, layers=4, width=24, heads=4, intermediate=48, **changes
):
    """A model whose every parameter is random, biases and layer norms too, so that no term can be forgotten unseen."""
    sizes = dict(zip(families.FAMILIES[family].sizes, (layers, width, heads, intermediate), strict=True))
    options = {"embedding_size": width} if family == "electra" else {}
    if family == "modernbert":  # whose own special tokens are beyond this vocabulary
        options = {key: 2 for key in ("bos_token_id", "cls_token_id")} | {"eos_token_id": 3, "sep_token_id": 3}
        options |= {"local_attention": 6, "embedding_dropout": 0.1, "attention_dropout": 0.1}
    options |= {"vocab_size": VOCABULARY, "max_position_embeddings": 40, "initializer_range": 0.2}
    padding = 1 if family in ("roberta", "xlm-roberta", "camembert", "mpnet") else 0
    config = AutoConfig.for_model(family, pad_token_id=padding, **sizes | options | changes)
    torch.manual_seed(seed)
    model = AutoModelForMaskedLM.from_config(config, attn_implementation=attention).eval()
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.dim() == 1:
                parameter.add_(0.2 * torch.randn_like(parameter))
    return model


def tokenizer(folder: Path) -> BertTokenizerFast:
    """WordPiece over five special tokens and 55 words of one or two letters."""
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "vocab.txt").write_text("\n".join(SPECIAL + WORDS) + "\n")
    return BertTokenizerFast(vocab=str(folder / "vocab.txt"))


def sentences(count: int, seed: int, flip: bool = False) -> Dataset:
    """Label yes where the words come from the second half of the vocabulary, of 3 to 12 words."""
    generator = np.random.default_rng(seed)
    rows = {"text": [], "label": []}
    for _ in range(count):
        label = int(generator.integers(2))
        words = generator.integers(27, size=generator.integers(3, 13)) + 27 * label
        rows["text"].append(" ".join(WORDS[word] for word in words))
        rows["label"].append(1 - label if flip else label)
    return Dataset.from_dict(
        rows, features=Features({"text": Value("string"), "label": ClassLabel(names=["no", "yes"])})
    )


def sequences(count: int, seed: int) -> np.ndarray:
    """[CLS] w, w+1 or w+2, ... [SEP]: text in which neighbours tell much about a word."""
    generator = np.random.default_rng(seed)
    steps = generator.integers(1, 3, (count, LENGTH - 2)).cumsum(axis=1)
    words = len(SPECIAL) + (generator.integers(0, 55, (count, 1)) + steps) % 55
    return np.pad(words, ((0, 0), (1, 1)), constant_values=((0, 0), (2, 3))).astype(np.uint16)


def save_corpus(folder: Path, train: int = 64, validation: int = 16) -> None:
    features = Features({"input_ids": List(Value("uint16"), length=LENGTH)})
    splits = {"train": sequences(train, 1), "validation": sequences(validation, 2)}
    rows = {name: Dataset.from_dict({"input_ids": ids}, features=features) for name, ids in splits.items()}
    storage.save(DatasetDict(rows), folder)


def parameters(folder: Path, **changes: dict) -> Params:
    """Parameters of the fixtures with tiny sizes; ``changes`` are laid over their sections."""
    values = read_yaml(FIXTURES / "params.yaml")
    values |= {"precision": "fp32", "initialisation": "teacher-layers"}
    values["grid"] = {
        "settings": ["english"],
        "methods": ["none", "mlm"],
        "students": {"english": ["L2-H24"]},
        "seeds": [1],
    }
    teacher = {"name": str(folder / "pretrained"), **TEACHER}
    values["settings"] = {
        "english": {"teacher": teacher, "vocabulary": "full", "texts": ["wikipedia"], "tasks": ["topic"]}
    }
    values["students"] = {
        "L2-H24": {"layers": 2, "width": 24, "heads": 4, "intermediate": 48},
        "L2-H12": {"layers": 2, "width": 12, "heads": 4, "intermediate": 24},
    }
    values["methods"]["mha-minilmv2"] |= {"relation_heads": 4}
    values["corpus"] |= {"sequence_length": LENGTH, "validation_sequences": 16}
    values["adaptation"] |= {"steps": 8, "batch_size": 8, "evaluate_every": 2, "warmup_steps": 1}
    values["distillation"] |= {
        "steps": 6,
        "batch_size": 8,
        "accumulation_steps": 1,
        "evaluate_every": 3,
        "validation_sequences": 16,
        "save_every": 2,
    }
    values["tuning"] |= {"steps": 4, "students": {}}
    for section, entries in changes.items():
        values[section] = values.get(section, {}) | entries if isinstance(entries, dict) else entries
    methods, memberships = expand(values["methods"], values["variants"])
    return Params.model_validate(values | {"methods": methods, "memberships": memberships})


def run(
    folder: Path, method: str = "mlm", student: str = "L2-H24", seed: int = 1, **changes: dict
) -> tuple[Run, Layout]:
    """One run of :func:`parameters`, and where its files are."""
    return make_run(parameters(folder, **changes), "english", method, student, seed), Layout(folder, "english")


def plan(folder: Path, **changes: dict) -> Plan:
    """Every description of :func:`parameters`, of the profile ``test``; its files are in ``folder``."""
    params = parameters(folder, **changes)
    return Plan("test", folder, folder, params, list(_descriptions(params, "test")))


def workspace(folder: Path, train: int = 64) -> Path:
    """A study's folder with a pre-trained encoder, the same as the corpus stage's output, an adapted teacher and a
    corpus, to run in."""
    (folder / "params.yaml").touch()
    (folder / "notebooks").mkdir(exist_ok=True)
    runs = Layout(folder, "english").runs
    model = masked_language_model(**TEACHER)
    words = tokenizer(folder / "pretrained")
    for target in (folder / "pretrained", runs / "encoder", runs / "teacher"):
        model.save_pretrained(target)
        words.save_pretrained(target)
    save_corpus(runs / "corpus", train)
    return folder


def weights(folder: Path) -> dict[str, torch.Tensor]:
    from safetensors.torch import load_file

    return load_file(folder / "model.safetensors")


def identical(first: dict[str, torch.Tensor], second: dict[str, torch.Tensor]) -> bool:
    return first.keys() == second.keys() and all(torch.equal(first[name], second[name]) for name in first)


def snapshot(model: nn.Module) -> dict[str, torch.Tensor]:
    return {name: parameter.detach().clone() for name, parameter in model.named_parameters()}
