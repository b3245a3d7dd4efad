"""The model card of an exported student."""

from __future__ import annotations

import io
import json
from pathlib import Path
from typing import Any

from ruamel.yaml import YAML

from study.analysis.figures.style import label
from study.analysis.runtimes import LABELS, TEXTS, RuntimesResult, timings
from study.data.pretrained import PACKAGES
from study.data.sources import SOURCES
from study.declarations import language_of
from study.descriptions import TEACHER, Run, model_name
from study.evaluation.provenance import weights_hash
from study.files import Layout, write_file
from study.plan import Plan
from study.records import LatencyResult, RunResult, read_record
from study.runtime import commit
from study.shipping.parity import Parity
from study.teachers import hub_name

_MEANS = """
real = texts["attention_mask"][..., None]
embeddings = (states * real).sum(1) / real.sum(1)  # means over real tokens"""
_USE = {
    "transformers": """import torch
from transformers import {auto}, AutoTokenizer

folder = "."  # of this file
tokenizer, model = AutoTokenizer.from_pretrained(folder), {auto}.from_pretrained(folder{options})
texts = tokenizer(["A text.", "Another text."], padding=True, return_tensors="pt")
with torch.inference_mode():
    states = model(**texts, output_hidden_states=True).hidden_states[-1]"""
    + _MEANS,
    "sentence-transformers": """from sentence_transformers import SentenceTransformer

folder = "."  # of this file
embeddings = SentenceTransformer(folder).encode(["A text.", "Another text."])""",
    "onnx": """from onnxruntime import InferenceSession
from transformers import AutoTokenizer

folder = "."  # of this file
tokenizer, session = AutoTokenizer.from_pretrained(folder), InferenceSession(f"{{folder}}/model.onnx")
texts = tokenizer(["A text.", "Another text."], padding=True, return_tensors="np")
states = session.run(None, {{key: texts[key] for key in ("input_ids", "attention_mask")}})[0]"""
    + _MEANS,
    "openvino": """import openvino
from transformers import AutoTokenizer

folder = "."  # of this file
tokenizer, model = AutoTokenizer.from_pretrained(folder), openvino.compile_model(f"{{folder}}/openvino_model.xml")
texts = tokenizer(["A text.", "Another text."], padding=True, return_tensors="np")
states = model({{key: texts[key] for key in ("input_ids", "attention_mask")}})[0]"""
    + _MEANS,
}


def write_card(
    plan: Plan,
    run: Run,
    record: dict[str, Any],
    kind: str,
    head: bool,
    measured: Parity | None,
    folder: Path,
    more: str = "",
) -> None:
    """Write ``README.md``: what it is, its teacher, scores beside floor and teacher, latency, limits, how to make it.

    Scores and latency are those of the profile's result files; what was not measured yet, the card says.

    Args:
        record: the student's ``record.json``. head: whether the export has a trained language-modelling head.
        measured: of an export that changes the arithmetic. more: a section about this export.
    """
    setting, layout = plan.params.settings[run.setting], plan.layout(run.setting)
    languages = sorted({language_of(text) for text in setting.texts})
    package = SOURCES.get(PACKAGES.get(setting.teacher.name, ""))
    facts = {
        "language": languages,
        "license": "other",
        "license_name": package.licence if package else "that of the teacher",
        "library_name": kind if kind == "sentence-transformers" else "transformers",
        "pipeline_tag": "fill-mask" if head else "feature-extraction",
        "base_model": hub_name(setting.teacher.name, plan.root),
        "tags": ["distillation", run.method, kind],
    }
    auto, options = ("AutoModelForMaskedLM", "") if head else ("AutoModel", ", add_pooling_layer=False")
    yaml, header = YAML(), io.StringIO()
    yaml.dump({key: fact for key, fact in facts.items() if fact}, header)
    parts = [
        f"---\n{header.getvalue()}---\n",
        f"# {run.name}\n",
        _what(run, setting.teacher.name, record, head),
        f"```python\n{_USE['onnx' if 'onnx' in kind else kind].format(auto=auto, options=options)}\n```\n",
        "## Scores\n\n" + _scores(plan, run, layout),
        *([f"## Beside the original\n\n{_parity(measured)}"] if measured else []),
        *([more] if more else []),
        "## Latency\n\n" + _latency(plan, run, layout),
        "## Limits\n\n" + _limits(languages),
        "## How to make it again\n\n" + provenance_section(plan, run, layout),
    ]
    write_file(folder / "README.md", "\n".join(parts))


def command_of(plan: Plan, stage: str) -> str:
    """What runs a stage with those it needs, from the study's folder: another profile may have one of the same name."""
    if plan.folder == plan.root:
        return f"make plan && dvc repro {stage}"
    return (
        f"make plan PROFILE={plan.profile} && cd {plan.folder.relative_to(plan.root).as_posix()} && dvc repro {stage}"
    )


def _what(run: Run, teacher: str, record: dict[str, Any], head: bool) -> str:
    sizes, training = run.sizes, record["training"]
    read = f"on {training['tokens']:,} tokens" if training else "and not trained"
    holds = "It has a trained language-modelling head." if head else "It is an encoder without a head."
    return (
        f"A text encoder of {sizes.layers} layers, {sizes.width} wide, distilled from `{teacher}` by"
        f" {label(run.method)} {read} (seed {run.seed}). {holds} A text is represented by the mean of its last hidden"
        " states over real tokens.\n"
    )


def _scores(plan: Plan, run: Run, layout: Layout) -> str:
    def result(name: str) -> RunResult | None:
        path = layout.result(name)
        return read_record(path, RunResult) if path.is_file() else None

    own = result(run.model)
    if own is None:
        return f"Not measured yet: run `{command_of(plan, f'evaluate@{run.name}')}`.\n"
    others = {"floor: untrained": result(model_name("none", run.student, run.seed)), "teacher": result(TEACHER)}
    models = {"this student": own} | {name: found for name, found in others.items() if found}
    lines = [f"| task | metric | {' | '.join(models)} |", "| --- | --- |" + " --- |" * len(models)]
    for task, entry in own.tasks.items():
        scores = []
        for model in models.values():
            tests = [100 * r.test[entry.metric] for r in model.tasks[task].runs] if task in model.tasks else []
            spread = f" ({min(tests):.1f} to {max(tests):.1f})" if len(tests) > 1 else ""
            scores.append(f"{sum(tests) / len(tests):.1f}{spread}" if tests else "–")
        lines.append(f"| {task} | {entry.metric} | {' | '.join(scores)} |")
    for task, probe in own.probes.items():
        scores = []
        for model in models.values():
            found = model.probes.get(task)
            values = [100 * v[probe.metric] for v in found.languages.values()] if found else []
            scores.append(f"{sum(values) / len(values):.1f}" if values else "–")
        lines.append(f"| {task} (not trained) | {probe.metric} | {' | '.join(scores)} |")
    note = "Test scores x 100 after fine-tuning, mean (and range) over fine-tuning seeds; one distilled model."
    return "\n".join([*lines, "", note, ""])


def _parity(measured: Parity) -> str:
    lines = [
        f"{measured.texts} held-out texts of {', '.join(map(str, measured.lengths))} tokens, half of them padded:"
        f" hidden states differ by at most {measured.state:.2g}, embeddings have a cosine of at least"
        f" {measured.cosine:.5f} with the original's.\n",
        "| task (development data, linear probe of the original's states) | original | this file |",
        "| --- | --- | --- |",
        *(f"| {task} | {100 * a:.1f} | {100 * b:.1f} |" for task, (a, b) in measured.tasks.items()),
    ]
    return "\n".join([*lines, ""])


def _latency(plan: Plan, run: Run, layout: Layout) -> str:
    path = layout.analysis("runtimes") / "runtimes.json"
    if path.is_file():
        return _by_runtime(run, read_record(path, RuntimesResult))
    path = layout.results / "latency.json"
    if not path.is_file():
        return f"Not measured yet: run `{command_of(plan, f'latency@{run.setting}')}`.\n"
    measured = read_record(path, LatencyResult)
    rows = [m for m in measured.measurements if m.student == run.student]
    first = measured.measurements[0]
    rows = [row for row in rows if row.device == first.device]
    where = first.processor or measured.environment.processor
    lines = [
        f"PyTorch ({first.precision or measured.precision}) on {where}, {measured.sequence_length} tokens:\n",
        "| batch | threads | milliseconds | times the teacher's speed |",
        "| --- | --- | --- | --- |",
        *(f"| {m.batch_size} | {m.threads} | {1000 * m.median_seconds:.1f} | {m.speed_up:.1f} |" for m in rows),
    ]
    return "\n".join([*lines, ""])


def _by_runtime(run: Run, measured: RuntimesResult) -> str:
    table = timings(measured)
    rows = table[(table["model"] == run.student) & (table["batch_size"] == 1) & (table["threads"] == 1)]
    lines = [
        f"One text, one thread of {measured.environment.processor}; texts are those of the tasks, as served:\n",
        "| read | runtime | milliseconds | slowest tenth above | times the speed of the teacher in PyTorch |",
        "| --- | --- | --- | --- | --- |",
        *(
            f"| {row.input if row.input == TEXTS else f'{row.input} tokens'} | {LABELS[row.runtime]} | {row.p50:.1f} |"
            f" {row.p90:.1f} | {row.speed_up:.1f} |"
            for row in rows.itertuples()
        ),
    ]
    return "\n".join([*lines, ""])


def _limits(languages: list[str]) -> str:
    return (
        f"It read text in {', '.join(languages)} alone, and little of it. Scores are of one distilled model after"
        " fine-tuning on few examples. Biases of teacher and text are its own.\n"
    )


def provenance_section(plan: Plan, run: Run, layout: Layout) -> str:
    """How to make a student again: command, commit, versions and the hashes of what it rests on."""
    record = json.loads((layout.student(run.model) / "record.json").read_text())
    hashes = {"weights of the student": weights_hash(layout.student(run.model))}
    hashes |= {f"{key} of its training": value for key, value in record["hashes"].items()}
    lines = [
        f"`make repro PROFILE={plan.profile}`, or this student alone: `{command_of(plan, f'distill@{run.name}')}`."
        f" Commit {commit(plan.root) or 'unknown'}; trained with torch {record['environment']['torch']} and"
        f" transformers {record['environment']['transformers']}.\n",
        "| SHA-256 of | |",
        "| --- | --- |",
        *(f"| {key} | `{value}` |" for key, value in hashes.items()),
    ]
    return "\n".join([*lines, ""])
