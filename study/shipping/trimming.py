"""The vocabulary of an export, trimmed to the pieces that texts of its use have."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from study.data.vocabulary import pieces_to_keep, trim_embeddings, trim_tokenizer
from study.files import StudyError


@dataclass(frozen=True)
class Trimmed:
    """What trimming left: ``kept`` are the old ids, ascending; ``unknown`` the new id of what is not kept."""

    tokenizer: PreTrainedTokenizerBase
    kept: np.ndarray
    unknown: int
    facts: dict[str, list[int]]

    def renumbered(self, ids: Tensor) -> Tensor:
        """Old ids as new ones; pieces that are gone become the unknown token."""
        table = torch.full((max(int(ids.max()), int(self.kept[-1])) + 1,), self.unknown)
        table[torch.from_numpy(self.kept)] = torch.arange(len(self.kept))
        return table[ids]

    @property
    def sentence(self) -> str:
        """What became smaller, in one line."""
        (pieces, parameters) = (self.facts[key] for key in ("pieces", "parameters"))
        return (
            f"{pieces[0]:,} -> {pieces[1]:,} pieces, {parameters[0] / 1e6:.2f} -> {parameters[1] / 1e6:.2f} million"
            f" parameters ({parameters[0] * 4 / 1e6:.1f} -> {parameters[1] * 4 / 1e6:.1f} MB in float32)"
        )


def trim(model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, texts: Path) -> Trimmed:
    """Keep the pieces that occur in ``texts`` (a file, or ``*.txt`` below a folder, UTF-8); the model is changed.

    Raises:
        StudyError: there are none, they cannot be read, or the tokenizer cannot be trimmed.
    """
    files = sorted(texts.rglob("*.txt")) if texts.is_dir() else [texts]
    occurring: set[int] = set()
    for file in files:
        try:
            lines = [line for line in file.read_text(encoding="utf-8").splitlines() if line.strip()]
        except (OSError, UnicodeDecodeError) as error:
            reason = getattr(error, "strerror", None) or "not UTF-8"
            raise StudyError(f"{file}: cannot be read: {reason}; allowed: plain text") from None
        if lines:
            occurring.update(*tokenizer(lines, verbose=False)["input_ids"])
    if not occurring:
        raise StudyError(f"{texts}: has no text; allowed: a text file, or a folder with *.txt that are not empty")
    kept = pieces_to_keep(tokenizer, occurring)
    encoder: Any = model.base_model
    before = encoder.num_parameters()
    new: Any = trim_tokenizer(tokenizer, kept)
    trim_embeddings(model, kept)
    facts = {"pieces": [len(tokenizer), len(kept)], "parameters": [before, encoder.num_parameters()]}
    return Trimmed(new, kept, int(new.unk_token_id), facts)
