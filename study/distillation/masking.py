"""The stream of masked sequences that every method of a seed is trained on."""

from __future__ import annotations

import numpy as np
from datasets import Dataset
from torch.utils import data
from transformers import PreTrainedTokenizerBase

from study.files import StudyError
from study.sections import Masking


class MaskedSequences(data.Dataset):
    """A stream of packed sequences with masks, a pure function of (seed, position in the stream).

    Every method of one seed therefore sees the same sequences under the same masks in the same order, whatever it does
    to random number generators, and a resumed run sees what an uninterrupted one would have seen. Each pass over the
    sequences has an order and masks of its own. The number of masked tokens M = round(fraction x T) is the same for
    every sequence, so shapes stay static; special tokens are never masked.

    Args:
        sequences: rows of ``input_ids``, all of T tokens.
        length: items of the stream; None means one pass in the given order (for evaluation).
        first: ``item`` of the first sequence; the others follow.
        mask_sets: None: every pass has masks of its own, and ``item`` counts what is read. A number K: a sequence has K
            masks, the same for every seed, which passes take in turn; ``item`` tells sequence and mask. A teacher's
            outputs then serve every seed, budget and pass. Source: BERT masks its text ten times, once for all.
        sampled: whether an item has ``sampled``, too: as many positions as are masked, drawn from all words anew at
            every reading.
    """

    def __init__(
        self,
        sequences: Dataset,
        masking: Masking,
        tokenizer: PreTrainedTokenizerBase,
        seed: int,
        length: int | None = None,
        first: int = 0,
        mask_sets: int | None = None,
        sampled: bool = False,
    ):
        self.sequences = sequences
        self._rows = _rows(sequences)
        self._firsts = np.cumsum([0, *map(len, self._rows)])
        self.masking, self.seed, self.first = masking, seed, first
        self.length = len(sequences) if length is None else length
        self.mask_sets, self.sampled = mask_sets, sampled
        self.shuffled = length is not None
        self.mask_id, self.vocabulary = tokenizer.mask_token_id, len(tokenizer)
        self._special = np.zeros(self.vocabulary, dtype=bool)
        self._special[tokenizer.all_special_ids] = True
        self._order = (-1, np.empty(0, dtype=int))

    def __len__(self) -> int:
        return self.length

    @property
    def numbered(self) -> int:
        """How many numbers its items may have: those from ``first`` on."""
        return self.length if self.mask_sets is None else self.mask_sets * len(self.sequences)

    def __getitem__(self, item: int) -> dict[str, np.ndarray]:
        epoch, index = divmod(item, len(self.sequences))
        if self.shuffled:
            if self._order[0] != epoch:
                self._order = (epoch, np.random.default_rng([self.seed, epoch]).permutation(len(self.sequences)))
            index = int(self._order[1][index])
        chunk = int(np.searchsorted(self._firsts, index, side="right")) - 1
        tokens = self._rows[chunk][index - self._firsts[chunk]].astype(np.int64)
        number = item if self.mask_sets is None else epoch % self.mask_sets * len(self.sequences) + index
        generator = np.random.default_rng([self.seed if self.mask_sets is None else 0, 1, number])
        count = max(1, round(self.masking.fraction * len(tokens)))
        words = np.flatnonzero(~self._special[tokens])
        if len(words) < count:
            raise StudyError(
                f"masking.fraction = {self.masking.fraction} masks {count} of {len(tokens)} tokens;"
                f" allowed: at most the {len(words)} of sequence {index} that are no special tokens"
            )
        positions = np.sort(generator.permutation(words)[:count])
        draw = generator.random(count)
        replaced = np.where(
            draw < self.masking.mask_token,
            self.mask_id,
            np.where(
                draw < self.masking.mask_token + self.masking.random_token,
                generator.integers(self.vocabulary, size=count),
                tokens[positions],
            ),
        )
        masked = tokens.copy()
        masked[positions] = replaced
        sampled = (
            {"sampled": np.random.default_rng([self.seed, 2, item]).permutation(words)[:count]} if self.sampled else {}
        )
        return {
            "input_ids": tokens,
            "masked_input_ids": masked,
            "positions": positions,
            "labels": tokens[positions],
            "item": self.first + number,
        } | sampled


def _rows(sequences: Dataset) -> list[np.ndarray]:
    """The token ids as arrays (rows, T), one for each piece they are stored in; views of the file wherever possible."""
    pieces = sequences.with_format("arrow")[:].column("input_ids").chunks
    return [piece.flatten().to_numpy(zero_copy_only=False).reshape(len(piece), -1) for piece in pieces if len(piece)]
