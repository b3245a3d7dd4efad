"""PreQuant: every matrix is quantised first, at once and for no task; then outliers alone are fine-tuned.

Source: Gong et al. (2306.00014). Standing: our reading. That text was not at hand for the outlier rule, the numbers of
bits of its tables and its scores.
"""

from __future__ import annotations

import copy
import importlib.util
from collections.abc import Iterator
from functools import lru_cache
from pathlib import Path
from statistics import fmean
from typing import Any, cast

import torch
from datasets import Dataset
from torch import Tensor, nn
from torch.nn.utils import parametrize
from transformers import PreTrainedModel

from study.data.pretrained import load_model, load_tokenizer
from study.data.tasks import Task
from study.descriptions import NeighbourSystem
from study.evaluation.finetune import Collator, MeanPoolingClassifier, frozen_score
from study.files import Layout, StudyError
from study.neighbours.stages import on_tasks
from study.neighbours.system import Measured, System
from study.neighbours_options import PreQuant, Scaling, Tuned
from study.records_beside import Check

#: Steps that are tried for the least squared error, as shares of the one that reaches the largest weight.
STEPS = tuple(step / 50 for step in range(1, 51))
#: Bits of a tuned value, and of a quantiser's step.
FULL = 32
SCALINGS = {"row": "by row", "mse": "by matrix", "minmax": "by matrix, to the largest weight"}
TUNED = {"outliers": "outliers", "random": "random weights", "error": "weights of largest error", "biases": "biases"}
TUNED |= {"lora": "LoRA of the nearest rank", "head": "head alone"}


def quantise(weight: Tensor, bits: int, scaling: Scaling) -> Tensor:
    r"""A matrix on a grid of :math:`2^b` values, as floats.

    .. math:: q = s \cdot \operatorname{clip}(\operatorname{round}(w / s), -2^{b-1}, 2^{b-1} - 1)

    ``minmax``: s = max|w| / (2^(b-1) - 1), one a matrix. ``mse``: the one of STEPS times that with the least squared
    error. ``row``: the same for each row.

    Source: the uniform symmetric quantiser; which one the paper uses is not known.
    """
    top = 2 ** (bits - 1) - 1
    rows = weight if scaling == "row" else weight.reshape(1, -1)
    largest = rows.abs().amax(dim=1, keepdim=True).clamp_min(torch.finfo(weight.dtype).tiny) / top
    best, error = rows, torch.full_like(largest, torch.inf)
    for share in STEPS[-1:] if scaling == "minmax" else STEPS:
        step = share * largest
        tried = step * (rows / step).round().clamp(-top - 1, top)
        missed = (tried - rows).square().sum(dim=1, keepdim=True)
        better = missed < error
        best, error = torch.where(better, tried, best), torch.where(better, missed, error)
    return best.reshape(weight.shape)


def matrices(encoder: nn.Module) -> Iterator[tuple[str, Tensor]]:
    """Names of modules and weights of all linear maps and embeddings: what is quantised."""
    for name, module in encoder.named_modules():
        if isinstance(module, nn.Linear | nn.Embedding):
            yield name, module.weight


def positions(original: nn.Module, quantised: nn.Module, rule: Tuned, share: float, seed: int = 0) -> dict[str, Tensor]:
    r"""Which weights of linear maps are tuned: module -> flat positions in its weight, rising.

    The ``share`` of all of them together that has the largest

    - ``outliers``: :math:`|w - \mu| / \sigma`, with mean and standard deviation of the weight's matrix;
    - ``error``: :math:`|w - q(w)| / \sigma`;
    - ``random``: random number.

    Embeddings are left out: a row of them gets a gradient only where its token occurs. Source: this study's reading of
    "about 0.5 % outliers"; their rule is not known.
    """
    generator = torch.Generator().manual_seed(seed)
    after = dict(matrices(quantised))
    scores: dict[str, Tensor] = {}
    for name, module in original.named_modules():
        if not isinstance(module, nn.Linear):
            continue
        weight = module.weight.detach().flatten()
        spread = weight.std(correction=0).clamp_min(torch.finfo(weight.dtype).tiny)
        if rule == "random":
            scores[name] = torch.rand(len(weight), generator=generator)
        elif rule == "error":
            scores[name] = (weight - after[name].detach().flatten()).abs() / spread
        else:
            scores[name] = (weight - weight.mean()).abs() / spread
    together = torch.cat(list(scores.values()))
    chosen = torch.zeros(len(together), dtype=torch.bool)
    chosen[together.topk(max(1, round(share * len(together)))).indices] = True
    parts = chosen.split([len(own) for own in scores.values()])
    return {name: part.nonzero()[:, 0] for name, part in zip(scores, parts, strict=True) if part.any()}


class TunedEntries(nn.Module):
    """A weight of which some entries are parameters, and the others stay what they are whatever the optimiser does.

    Args:
        weight: as it is. index: flat positions of its tuned entries.
    """

    def __init__(self, weight: Tensor, index: Tensor):
        super().__init__()
        self.index: Tensor
        self.register_buffer("index", index.to(weight.device))
        self.values = nn.Parameter(weight.detach().flatten()[self.index].clone())

    def forward(self, weight: Tensor) -> Tensor:
        return weight.flatten().index_put((self.index,), self.values).view_as(weight)


def tune(encoder: nn.Module, rule: Tuned, chosen: dict[str, Tensor], size: int) -> int:
    """Freeze an encoder but for what the rule tunes, in place; the number of parameters that are tuned.

    Args:
        chosen: of a rule that tunes weights, :func:`positions`. size: that LoRA is to have; its rank, the same for all
            linear maps, is the one whose size is nearest.
    """
    encoder.requires_grad_(False)
    if rule == "biases":
        for name, parameter in encoder.named_parameters():
            parameter.requires_grad_(name.endswith("bias"))
    elif rule == "lora":
        from peft import LoraConfig, inject_adapter_in_model

        linear = {name: module for name, module in encoder.named_modules() if isinstance(module, nn.Linear)}
        of_rank_one = sum(sum(module.weight.shape) for module in linear.values())
        rank = max(1, round(size / of_rank_one))
        config = LoraConfig(r=rank, lora_alpha=rank, lora_dropout=0.0, target_modules=list(linear))
        inject_adapter_in_model(config, encoder)
    else:
        for name, index in chosen.items():
            module = encoder.get_submodule(name)
            weight: Any = module.weight
            parametrize.register_parametrization(module, "weight", TunedEntries(weight, index))
    return sum(parameter.numel() for parameter in encoder.parameters() if parameter.requires_grad)


def bits_per_weight(
    encoder: nn.Module, bits: int, scaling: Scaling, chosen: dict[str, Tensor], added: int = 0
) -> float:
    r"""What the quantised matrices take, tuned entries and their places included, by weight.

    .. math:: \frac1N \sum_m \left( b n_m + 32 r_m + k_m (32 + \lceil \log_2 n_m \rceil) \right) + \frac{32 a}{N}

    with the n weights, r steps and k tuned entries of every matrix m, N weights of all, and a parameters added (LoRA).
    """
    total, weights = FULL * added, 0
    for name, weight in matrices(encoder):
        count, steps = weight.numel(), len(weight) if scaling == "row" else 1
        places = len(chosen[name]) if name in chosen else 0
        total += bits * count + FULL * steps + places * (FULL + (count - 1).bit_length())
        weights += count
    return total / weights


@lru_cache(maxsize=1)
def _quantised(folder: Path, attention: str, bits: int, scaling: Scaling) -> tuple[PreTrainedModel, PreTrainedModel]:
    """The encoder saved in a folder as it is, and quantised; kept for the next seed."""
    original = load_model(folder, attention, head=False)
    return original, quantise_in_place(copy.deepcopy(original), bits, scaling)


@torch.no_grad()
def quantise_in_place(encoder: Any, bits: int, scaling: Scaling) -> Any:
    """Quantise every matrix of an encoder, which is given back."""
    for _, weight in matrices(encoder):
        weight.copy_(quantise(weight, bits, scaling))
    return encoder


def jobs(options: PreQuant) -> list[str]:
    """``full``, or rule, scaling and bits joined by dashes.

    Raises:
        StudyError: LoRA is asked for and peft is not installed.
    """
    if "lora" in options.tuned and importlib.util.find_spec("peft") is None:
        raise StudyError("tuned: lora needs peft; `pip install -c constraints.txt -e '.[lora]'`, or leave it out")
    scaling, at = options.scalings[0], options.compared_bits
    named = [f"outliers-{scaling}-{bits}" for bits in options.bits]
    named += [f"outliers-{other}-{at}" for other in options.scalings[1:]]
    named += [f"{rule}-{scaling}-{at}" for rule in options.tuned if rule != "outliers"]
    return [*named, *["full"] * options.finetuned]


def words(arm: str) -> str:
    """An arm's name in words."""
    if arm == "full":
        return "fine-tuned in fp32"
    rule, scaling, bits = arm.split("-")
    if rule == "after":
        return f"fine-tuned, then {bits} bits {SCALINGS[scaling]}"
    return f"{bits} bits {SCALINGS[scaling]}: {TUNED[rule]}"


def run(description: NeighbourSystem, layout: Layout, job: str, seed: int) -> Measured:
    """Fine-tune on every task; the linear probe that this starts from gives an arm of its own, ``head``."""
    return _full(description, layout, seed) if job == "full" else _tuned(description, layout, job, seed)


def _tuned(description: NeighbourSystem, layout: Layout, job: str, seed: int) -> Measured:
    rule: Any
    scaling: Any
    (rule, scaling, number), options = job.split("-"), cast(PreQuant, description.options)
    bits, place = int(number), description.folder(layout)
    original, quantised = _quantised(place, description.attention_implementation, bits, scaling)
    selective = rule in ("outliers", "random", "error")
    chosen = positions(original, quantised, rule if selective else "outliers", options.share, seed)
    size = sum(len(index) for index in chosen.values())
    chosen = chosen if selective else {}
    rate = options.learning_rates[rule if rule in ("biases", "lora") else "outliers"]
    tuned: list[int] = []
    scores, probes = on_tasks(
        description, layout, quantised, description.tasks, seed, rate,
        prepare=lambda model: tuned.append(tune(model.encoder, rule, chosen, size)),
    )  # fmt: skip
    added = tuned[0] if rule == "lora" else 0
    costs = {"tuned": float(tuned[0]), "bits": bits_per_weight(original, bits, scaling, chosen, added)}
    measured = {job: _scored(scores) | costs}
    if rule == "outliers":
        bare = {"tuned": 0.0, "bits": bits_per_weight(original, bits, scaling, {})}
        measured[f"head-{scaling}-{bits}"] = _scored(probes) | bare
    return measured


def _full(description: NeighbourSystem, layout: Layout, seed: int) -> Measured:
    """Fine-tuning of everything, and the same models quantised afterwards to each number of bits."""
    options = cast(PreQuant, description.options)
    encoder = load_model(description.folder(layout), description.attention_implementation, head=False)
    scaling, rate = options.scalings[0], options.learning_rates["full"]
    collate = Collator(load_tokenizer(description.folder(layout)), description.finetuning.pad_to_multiple_of)
    scores: dict[str, dict[str, float]] = {f"after-{scaling}-{bits}": {} for bits in options.bits}

    def quantised(task: Task, test: Dataset, model: MeanPoolingClassifier) -> None:
        for bits in options.bits:
            smaller = copy.deepcopy(model)
            quantise_in_place(smaller.encoder, bits, scaling)
            score = frozen_score(description, smaller, task, test, collate)
            scores[f"after-{scaling}-{bits}"][task.name] = score

    scores["full"], _ = on_tasks(description, layout, encoder, description.tasks, seed, rate, keep=quantised)
    tuned = float(sum(parameter.numel() for parameter in encoder.parameters()))
    measured = {"full": _scored(scores["full"]) | {"tuned": tuned, "bits": float(FULL)}}
    for bits in options.bits:
        arm = f"after-{scaling}-{bits}"
        measured[arm] = _scored(scores[arm]) | {"tuned": tuned, "bits": bits_per_weight(encoder, bits, scaling, {})}
    return measured


def _scored(scores: dict[str, float]) -> dict[str, float]:
    return {"score": fmean(scores.values())} | scores


def checks(options: PreQuant) -> list[Check]:
    """What the paper's text, as far as it was at hand, says of the order of arms."""
    first, at = options.scalings[0], options.compared_bits
    own = f"outliers-{first}-{at}"
    claims = [
        (f"outliers are worth more than as many random weights ({at} bits)", own, f"random-{first}-{at}"),
        (f"a step a row is at least as good as one a matrix ({at} bits)", f"outliers-row-{at}", f"outliers-mse-{at}"),
        (
            f"least squared error is at least as good as the largest weight ({at} bits)",
            f"outliers-mse-{at}",
            f"outliers-minmax-{at}",
        ),
        *((f"{bits} bits lose more than {at}", own, f"outliers-{first}-{bits}") for bits in options.bits if bits < at),
        (f"this study: outliers bring more than the head alone ({at} bits)", own, f"head-{first}-{at}"),
        (f"this study: quantised before fine-tuning is better than after it ({at} bits)", own, f"after-{first}-{at}"),
    ]
    return [Check(claim=claim, first=a, second=b, measure="score") for claim, a, b in claims if a != b]


PREQUANT = System(
    title="PreQuant: quantise, then fine-tune outliers alone",
    source="arXiv 2306.00014",
    standing="our reading",
    equation="ŵ = s · clip(round(w / s), −2^(b−1), 2^(b−1) − 1); ŵᵢ is tuned where |wᵢ − μ| / σ is among the largest",
    reproduced="All linear maps and embeddings are quantised once, for no task, and stay frozen bit for bit; outliers"
    " of the linear maps start from their quantised values and are fine-tuned together with the head, by this study's"
    " fine-tuning from a linear probe. The quantiser's step is one of 50 shares of the one that reaches the largest"
    " weight, the one with the least squared error, by row or by matrix. Weights are floats on a grid: quality is"
    " measured, not speed.",
    unknown=(
        "the outlier rule: taken as distance from the matrix mean in standard deviations, with one threshold for all",
        "whether outliers start from their own or from their quantised values: taken as quantised",
        "whether outliers of embeddings are tuned: taken as not",
        "the quantiser of its tables, its numbers of bits and its scores",
        "how outliers are stored: counted as 32 bits and a place in their matrix each",
    ),
    jobs=jobs,
    run=run,
    words=words,
    measures=lambda description: (
        {"score": "macro score on test data"}
        | {name: name for name in description.tasks}
        | {"bits": "bits per weight", "tuned": "parameters tuned, without the head"}
    ),
    checks=checks,
)
