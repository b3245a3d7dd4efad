"""Sentences through teacher and student: attention, likeness of layers, predicted words, nearest translations."""

from __future__ import annotations

import math
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import pandas as pd
import torch
from matplotlib.figure import Figure
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from study.analysis.figures.methods import draw_relation
from study.analysis.figures.style import drawn, new_figure, short
from study.data.pretrained import has_language_modelling_head, load_model, load_tokenizer
from study.descriptions import TEACHER
from study.distillation.taps import PROJECTIONS, Activations, read_activations
from study.evaluation.provenance import weights_hash
from study.evaluation.representations import linear_cka, relations
from study.files import Layout, StudyError
from study.plan import Plan
from study.records import SCHEMA
from study.records_beside import AttentionMaps, ReadSentence, Translations


@dataclass
class Explorer:
    """A teacher and its students of one setting, loaded when first looked at.

    Raises:
        StudyError: a sentence without words or longer than the model reads, a sentence without ``[MASK]`` where words
            are to be predicted, an unknown setting, method or student, or a model that was not trained yet.
    """

    plan: Plan
    setting: str

    @cached_property
    def layout(self) -> Layout:
        return self.plan.layout(self.setting)

    @cached_property
    def tokenizer(self) -> PreTrainedTokenizerBase:
        return load_tokenizer(self.layout.teacher)

    @cached_property
    def teacher(self) -> PreTrainedModel:
        return load_model(self.layout.teacher, "eager").eval()

    @property
    def methods(self) -> list[str]:
        return list(self.plan.params.grid.methods)

    @property
    def students(self) -> list[str]:
        return list(self.plan.params.grid.students[self.setting])

    def folder(self, method: str, student: str) -> Path:
        """Where the student of the grid's first seed is saved."""
        for name, value, known in (("method", method, self.methods), ("student", student, self.students)):
            if value not in known:
                raise StudyError(f"{name} {value!r} is not in the grid; allowed: {', '.join(known)}")
        return self.layout.student(f"{method}_{student}_{self.plan.params.grid.seeds[0]}")

    def encoder(self, method: str, student: str) -> PreTrainedModel:
        return load_model(self.folder(method, student), "eager", head=False).eval()

    def _read(self, students: list[str]) -> tuple[dict[str, PreTrainedModel], dict[str, Any]]:
        """Teacher and students by the names of their folders, and the head of a record of what is read from them."""
        folders = {TEACHER: self.layout.teacher} | {name: self.layout.student(name) for name in students}
        models = {name: load_model(folder, "eager", head=False).eval() for name, folder in folders.items()}
        hashes = {name: weights_hash(folder) for name, folder in folders.items()}
        return models, {"schema": SCHEMA, "profile": self.plan.profile, "setting": self.setting, "hashes": hashes}

    def encode(self, sentence: str) -> torch.Tensor:
        """(1, T) token ids; ``[MASK]`` stands for the tokenizer's own mask token."""
        ids = self.tokenizer(sentence.replace("[MASK]", self.tokenizer.mask_token), return_tensors="pt")["input_ids"]
        limit = self.plan.params.corpus.sequence_length
        if not 2 < ids.shape[1] <= limit:
            raise StudyError(f"the sentence has {ids.shape[1] - 2} tokens; allowed: 1 to {limit - 2}")
        return ids

    def tokens(self, sentence: str) -> list[str]:
        return list(self.tokenizer.convert_ids_to_tokens(self.encode(sentence)[0].tolist()))

    @torch.inference_mode()
    def activations(self, sentence: str, model: PreTrainedModel) -> Activations:
        layers = range(1, model.config.num_hidden_layers + 1)
        return read_activations(model, self.encode(sentence), hidden_layers=layers, attention_layers=layers)

    @drawn
    def attention(self, sentence: str, method: str, student: str, teacher_layer: int | None = None) -> Figure:
        """Relations of queries, keys and values (mean over heads, as many as the teacher's if they divide both widths).

        Args:
            teacher_layer: 1..L_T; by default the last but one, from which MHA transfer distils. The student's is its
                last.
        """
        model = self.encoder(method, student)
        depth = self.teacher.config.num_hidden_layers
        teacher_layer = depth - 1 if teacher_layer is None else teacher_layer
        if not 1 <= teacher_layer <= depth:
            raise StudyError(f"teacher layer {teacher_layer}; allowed: 1 to {depth}")
        heads = math.gcd(self.teacher.config.num_attention_heads, model.config.hidden_size)
        tokens = self.tokens(sentence)
        shown = (
            (f"teacher, layer {teacher_layer}", self.teacher, teacher_layer),
            (f"{short(method)}, {student}, last layer", model, model.config.num_hidden_layers),
        )
        figure = new_figure(6.4, width=9)
        panels = figure.subplots(2, 3, sharex=True, sharey=True)
        for line, (title, encoder, layer) in zip(panels, shown, strict=True):
            of_layer = self.activations(sentence, encoder).attention[layer]
            for axes, name in zip(line, PROJECTIONS, strict=True):
                draw_relation(axes, relations(of_layer[name], heads)[0].mean(dim=0).numpy(), tokens)
                axes.set_title(f"{title}: {name}")
        return figure

    @torch.inference_mode()
    def maps(self, students: list[str], sentences: list[str]) -> AttentionMaps:
        """Relations of queries, keys and values, and attention itself, in every layer of teacher and students.

        Means over heads; relation heads as in :meth:`attention`, the same number for all.

        Args:
            students: names of their folders: ``<method>_<student>_<seed>``, then the budget if not the base.
        """
        models, head = self._read(students)
        heads = math.gcd(self.teacher.config.num_attention_heads, *(m.config.hidden_size for m in models.values()))
        read = []
        for sentence in sentences:
            ids, of_models = self.encode(sentence), {}
            for name, model in models.items():
                layers = self.activations(sentence, model).attention
                kinds = {
                    kind: torch.stack([relations(layers[i][kind], heads)[0].mean(dim=0) for i in sorted(layers)])
                    for kind in PROJECTIONS
                }
                attentions = model(input_ids=ids, output_attentions=True).attentions
                kinds["attention"] = torch.stack([weights[0].mean(dim=0) for weights in attentions])
                of_models[name] = {kind: ReadSentence.coded(values.double().numpy()) for kind, values in kinds.items()}
            read.append(ReadSentence(tokens=self.tokens(sentence), models=of_models))
        return AttentionMaps(**head, relation_heads=heads, sentences=read)

    @torch.inference_mode()
    def translations(self, students: list[str], sentences: dict[str, list[str]]) -> Translations:
        """How near sentences of several languages are to each other: cosines of the mean last hidden states.

        Args:
            students: as of :meth:`maps`. sentences: language -> sentences, in the same order in each.
        """
        models, head = self._read(students)
        texts, cosines = [text for own in sentences.values() for text in own], {}
        for name, model in models.items():
            means = torch.stack([model(input_ids=self.encode(text)).last_hidden_state[0].mean(dim=0) for text in texts])
            unit = torch.nn.functional.normalize(means.double(), dim=1)
            cosines[name] = Translations.coded((unit @ unit.T).clamp(-1, 1).numpy())
        return Translations(**head, sentences=sentences, models=cosines)

    def nearest_layers(self, sentence: str, method: str, student: str) -> pd.DataFrame:
        """Linear CKA over the sentence's tokens: student layers (rows) by teacher layers; too high for few tokens."""
        model = self.encoder(method, student)
        states, targets = (self.activations(sentence, encoder).hidden for encoder in (model, self.teacher))
        return pd.DataFrame(
            [[linear_cka(states[i][0], targets[j][0]) for j in sorted(targets)] for i in sorted(states)],
            index=pd.Index(sorted(states), name="student layer"),
            columns=pd.Index(sorted(targets), name="teacher layer"),
        )

    @torch.inference_mode()
    def predictions(self, sentence: str, method: str, student: str, count: int = 5) -> pd.DataFrame:
        """The ``count`` most probable words for every ``[MASK]``, the teacher's beside the student's.

        HS and MHA train no output: their students keep no language-modelling head, and have no column.
        """
        ids = self.encode(sentence)
        masks = (ids[0] == self.tokenizer.mask_token_id).nonzero()[:, 0]
        if not len(masks):
            raise StudyError(f"the sentence has no [MASK] to predict: {sentence!r}")
        folder, columns = self.folder(method, student), {}
        models = {"teacher": self.teacher}
        if has_language_modelling_head(folder):
            models[f"{method} {student}"] = load_model(folder, "eager").eval()
        for name, model in models.items():
            best = model(input_ids=ids).logits[0, masks].softmax(dim=-1).topk(count)
            columns[name] = [
                f"{str(self.tokenizer.decode([token])).strip()} ({value:.0%})"
                for values, tokens in zip(best.values.tolist(), best.indices.tolist(), strict=True)
                for value, token in zip(values, tokens, strict=True)
            ]
        index = pd.MultiIndex.from_product([range(1, len(masks) + 1), range(1, count + 1)], names=["[MASK]", "rank"])
        return pd.DataFrame(columns, index=index)
