"""Exporting a student fine-tuned on one task as a classifier, with its labels."""

from __future__ import annotations

import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from study.data.pretrained import load_tokenizer
from study.data.tasks import Task, find_task
from study.descriptions import Evaluation, Run
from study.evaluation.finetune import Collator, MeanPoolingClassifier, finetune, splits_without_test
from study.evaluation.metrics import task_metrics
from study.files import Layout, StudyError, write_file, write_json
from study.plan import Plan
from study.records import RunResult, read_record
from study.shipping.card import provenance_section
from study.shipping.export import draft_of, trained
from study.shipping.formats import MODEL, WRITERS, quantise, write_onnx
from study.shipping.parity import evaluation_of, extra
from study.teachers import hub_name

FORMATS = ("sentence-transformers", "onnx", "onnx-int8")
#: The largest share of development texts whose label an export may change. Source: this study's choice.
CHANGED = 0.05
_USE = {
    "sentence-transformers": """from sentence_transformers import SentenceTransformer

classify = SentenceTransformer(folder)
logits = classify.encode(["A text."])
classify[0].auto_model.config.id2label[int(logits[0].argmax())]""",
    "onnx": """from onnxruntime import InferenceSession
from transformers import AutoConfig, AutoTokenizer

tokenizer, session = AutoTokenizer.from_pretrained(folder), InferenceSession(f"{folder}/model.onnx")
texts = tokenizer(["A text."], return_tensors="np")
(logits,) = session.run(None, {key: texts[key] for key in ("input_ids", "attention_mask")})
AutoConfig.from_pretrained(folder).id2label[int(logits[0].argmax())]""",
}


def export_classifier(plan: Plan, name: str, task: str, kind: str, to: Path | None = None) -> Path:
    """Fine-tune a trained student on a task as the study does, first seed, and write it as a classifier.

    ``sentence-transformers``: encoder, pooling by the mean, which no class of transformers has, and a linear layer;
    ``encode`` gives logits. ``onnx``, ``onnx-int8``: ``model.onnx`` from token ids and mask to ``logits``.

    Args:
        task: one of single texts and classes that the run is evaluated on.
        to: an empty or new folder; by default ``exports/<name>/<task>-<format>`` in the profile's folder.

    Raises:
        StudyError: no such format, run or task, a student that is not trained, a folder that is not empty, an export
            that changes more development labels than CHANGED.
    """
    if kind not in FORMATS:
        raise StudyError(f"format {kind!r} is none of classifiers; allowed: {', '.join(FORMATS)}")
    run = plan.named(name)
    description, layout = evaluation_of(plan, run.setting, run.model), plan.layout(run.setting)
    known = {name: find_task(layout.tasks, name) for name in description.tasks}
    able = [name for name, own in known.items() if own.labels and own.kind == "labelled" and not own.pair]
    if task not in able:
        raise StudyError(f"task {task!r} classifies no single texts here; allowed: {', '.join(able) or 'none'}")
    learnt, source = known[task], trained(plan, run)
    target = to or plan.folder / "exports" / name / f"{task}-{kind}"
    with draft_of(target) as folder:
        tokenizer = load_tokenizer(source)
        splits = splits_without_test(description, layout, tokenizer, description.finetuning.seeds[0])[task]
        kept: list[MeanPoolingClassifier] = []
        seed, rate = description.finetuning.seeds[0], _learning_rate(description, layout, task)
        finetune(description, source, learnt, splits, tokenizer, seed, rate, look_at_test=False, keep=kept.append)
        model: Any = kept[0].cpu().eval()
        names = dict(enumerate(learnt.labels or ()))
        model.encoder.config.id2label = names
        model.encoder.config.label2id = {name: index for index, name in names.items()}
        _write(model, tokenizer, kind, folder, layout)
        collate = Collator(tokenizer, description.finetuning.pad_to_multiple_of)
        labels = np.array(splits["development"]["labels"])
        calls = (lambda inputs: model(**inputs)["logits"].numpy()), _loaded(folder, kind)
        pair = [_logits(call, splits["development"], collate) for call in calls]
        scores = [task_metrics(learnt, logits, labels)[learnt.metric] for logits in pair]
        changed = float(np.mean(pair[0].argmax(axis=1) != pair[1].argmax(axis=1)))
        said = (
            f"{task}: development {learnt.metric} {100 * scores[0]:.1f} -> {100 * scores[1]:.1f},"
            f" {100 * changed:.1f} % of {len(labels)} labels changed"
        )
        if changed > CHANGED:
            raise StudyError(f"{name}: {said}; allowed: at most {100 * CHANGED:g} %")
        facts = {"run": name, "format": kind, "task": task, "labels": list(learnt.labels or ())}
        write_json(folder / "export.json", facts | {"scores": scores, "changed": changed})
        write_file(folder / "README.md", _card(plan, run, learnt, kind, said, layout))
        print(f"parity: {said}")
    return target


def _learning_rate(description: Evaluation, layout: Layout, task: str) -> float:
    """The rate that evaluation chose on development data; the only candidate where it was not evaluated yet."""
    path, rates = layout.result(description.model), description.finetuning.learning_rates
    if path.is_file():
        return read_record(path, RunResult).tasks[task].learning_rate
    if len(rates) > 1:
        raise StudyError(f"{path}: missing, so no learning rate is chosen; run `dvc repro evaluate@{description.name}`")
    return rates[0]


def _write(model: Any, tokenizer: Any, kind: str, folder: Path, layout: Layout) -> None:
    if kind == "sentence-transformers":
        with extra():
            from sentence_transformers import SentenceTransformer
            from sentence_transformers.sentence_transformer.modules import Dense
        with tempfile.TemporaryDirectory() as plain:
            WRITERS[kind](model.encoder, tokenizer, Path(plain), layout)
            encoder = SentenceTransformer(plain, device="cpu")
            width, labels = model.output.in_features, model.output.out_features
            encoder.append(Dense(width, labels, activation_function=nn.Identity()))
            encoder[-1].linear.load_state_dict(model.output.state_dict())  # type: ignore[union-attr, operator]
            encoder.save(str(folder), create_model_card=False)
        return
    model.encoder.set_attn_implementation("eager")
    write_onnx(model, model.encoder.config, "logits", tokenizer, folder)
    if kind == "onnx-int8":
        quantise(folder)


def _loaded(folder: Path, kind: str) -> Callable[[dict[str, Tensor]], np.ndarray]:
    with extra():
        from onnxruntime import InferenceSession
        from sentence_transformers import SentenceTransformer
    if kind == "sentence-transformers":
        classify = SentenceTransformer(str(folder), device="cpu").eval()
        return lambda inputs: classify(inputs)["sentence_embedding"].numpy()
    session = InferenceSession(str(folder / MODEL), providers=["CPUExecutionProvider"])
    return lambda inputs: session.run(None, {key: value.numpy() for key, value in inputs.items()})[0]


@torch.inference_mode()
def _logits(call: Callable[[dict[str, Tensor]], np.ndarray], rows: Any, collate: Collator) -> np.ndarray:
    """(N, labels), in the order of the rows, each read alone."""
    batches = (collate([{"input_ids": row["input_ids"]}]) for row in rows)
    return np.concatenate([call({key: own[key] for key in ("input_ids", "attention_mask")}) for own in batches])


def _card(plan: Plan, run: Run, task: Task, kind: str, said: str, layout: Layout) -> str:
    teacher, labels = plan.params.settings[run.setting].teacher.name, task.labels or ()
    library = "sentence-transformers" if kind == "sentence-transformers" else "onnx"
    head = f"---\nlicense: other\nlibrary_name: {library}\npipeline_tag: text-classification\n"
    if base := hub_name(teacher, plan.root):
        head += f"base_model: {base}\n"
    parts = [
        f"{head}---\n",
        f"# {run.name}, fine-tuned on {task.name}\n",
        f"A classifier of texts ({task.citation}) into {', '.join(labels)}: a student distilled from `{teacher}`"
        " under one linear layer over the mean of its last states.\n",
        f"```python\n{_USE.get(kind, _USE['onnx'])}\n```\n",
        f"## Scores\n\n{said[0].upper()}{said[1:]}. Test scores over several seeds are in the study's report.\n",
        "## How to make it again\n\n" + provenance_section(plan, run, layout),
    ]
    return "\n".join(parts)
