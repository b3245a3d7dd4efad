"""Text to tokens, as other processes do it, and tokens on disk."""

from __future__ import annotations

import os
import tempfile
from array import array
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, NamedTuple, TypeVar

import numpy
from tokenizers import Tokenizer

Key = TypeVar("Key")


class Stream:
    """Tokens, one after another, in a file without a name that is gone with the process; the first ``size`` count.

    Args:
        folder: on whose disk they are, 4 bytes each. size: None: all.
    """

    def __init__(self, folder: Path, size: int | None = None):
        self._file: Any = tempfile.TemporaryFile(dir=folder, buffering=2**20)  # noqa: SIM115
        self._written, self.size = 0, size

    def extend(self, tokens: Sequence[int] | numpy.ndarray) -> None:
        """Put tokens behind the others."""
        self._file.write(numpy.asarray(tokens, dtype=numpy.int32).tobytes())
        self._written += len(tokens)

    def __len__(self) -> int:
        return self._written if self.size is None else min(self._written, self.size)

    @property
    def full(self) -> bool:
        """Whether it has all that is wanted."""
        return len(self) == self.size

    def read(self, first: int, last: int) -> numpy.ndarray:
        """Tokens ``first`` to ``last`` - 1, of int32."""
        self._file.flush()
        return numpy.frombuffer(os.pread(self._file.fileno(), 4 * (last - first), 4 * first), numpy.int32)

    def parts(self, count: int, last: int | None = None) -> Iterator[numpy.ndarray]:
        """The tokens up to ``last``, by default all, ``count`` at a time."""
        end = len(self) if last is None else last
        yield from (self.read(first, min(first + count, end)) for first in range(0, end, count))


def read_again(documents: Iterator[tuple[Key, numpy.ndarray]], folder: Path) -> Iterator[tuple[Any, numpy.ndarray]]:
    """Documents with their tokens, over and over; from the second time on the tokens are those kept on disk."""
    kept, keys, ends = Stream(folder), [], array("Q", [0])
    for key, tokens in documents:
        kept.extend(tokens)
        keys.append(key)
        ends.append(len(kept))
        yield key, tokens
    while keys:
        for place, key in enumerate(keys):
            yield key, kept.read(ends[place], ends[place + 1])


class Tokeniser(NamedTuple):
    """What :func:`encode` needs of a tokenizer; a fast one without the rest of transformers."""

    tokenizer: Any
    end: int

    @classmethod
    def of(cls, tokenizer: Any) -> Tokeniser:
        """That of a tokenizer of transformers, whose own stays as it is."""
        if not tokenizer.is_fast:
            return cls(tokenizer, tokenizer.sep_token_id)
        own = Tokenizer.from_str(tokenizer.backend_tokenizer.to_str())
        own.no_truncation()
        own.no_padding()
        own.encode_special_tokens = tokenizer.backend_tokenizer.encode_special_tokens
        return cls(own, tokenizer.sep_token_id)


def encode(tokeniser: Tokeniser, texts: Sequence[str]) -> list[numpy.ndarray]:
    """The tokens of each text, [SEP] last, no other special token added: (N,) of int32."""
    own = tokeniser.tokenizer
    if isinstance(own, Tokenizer):
        ids = (one.ids for one in own.encode_batch_fast(list(texts), add_special_tokens=False))
    else:
        ids = iter(own(list(texts), add_special_tokens=False, return_attention_mask=False, verbose=False)["input_ids"])
    return [numpy.array([*one, tokeniser.end], dtype=numpy.int32) for one in ids]
