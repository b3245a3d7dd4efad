"""Teacher outputs kept on disk: cells that read the same of a teacher on the same sequences compute it once."""

from __future__ import annotations

import math
import shutil
import zlib
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from study.models.taps import PROJECTIONS, Readings

KINDS = ("hidden_layers", "attention_layers")


class SharedTeacher:
    """Readings of one teacher on numbered sequences, in memory-mapped files, filled by whoever needs them first.

    One file per layer and kind holds (sequences, tokens, width) in the type in which a step reads it; a second holds a
    checksum per sequence. A row counts only where its checksum agrees, so that processes may read and write side by
    side and be killed at any time. In bfloat16 a hidden state, or one of queries, keys and values, takes 2 x width
    bytes a token (768 for width 384). Source: this study's choice.

    Args:
        folder: names everything that the readings depend on; made when missing.
        shape: (sequences, tokens, width).
        dtype: torch.bfloat16 or torch.float32.
        own: what is read, as keyword arguments of :func:`study.models.taps.read`.
        others: what is kept beside it for other runs, in the same form: a step that has to compute the teacher then
            does so for all of them.
    """

    def __init__(
        self,
        folder: Path,
        shape: tuple[int, int, int],
        dtype: torch.dtype,
        own: dict[str, set[int]],
        others: dict[str, set[int]] | None = None,
    ):
        self.folder, self.shape, self.dtype = folder, shape, dtype
        self.kind = np.dtype(f"u{dtype.itemsize}")  # numpy has no bfloat16: bits are kept as they are
        self.layers = {kind: own.get(kind, set()) | (others or {}).get(kind, set()) for kind in KINDS}
        self.own, self.kept = _keys(own), _keys(self.layers)

    def open(self) -> bool:
        """Map the files, making those that are missing; False if they would take half of the free disk or more."""
        new = [key for key in self.kept if not self._file(key).is_file()]
        self.folder.mkdir(parents=True, exist_ok=True)
        if len(new) * math.prod(self.shape) * self.dtype.itemsize >= shutil.disk_usage(self.folder).free / 2:
            return False
        self._rows = {key: _map(self._file(key), self.shape, self.kind) for key in self.kept}
        self._checksums = {
            key: _map(self._file(key).with_suffix(".crc32"), self.shape[:1], np.dtype("u4")) for key in self.kept
        }
        return True

    def read(self, items: Tensor) -> Readings | None:
        """``own`` of the sequences numbered ``items`` (B,), each (B, T, H); None unless all of it is there."""
        numbers, readings = items.cpu().numpy(), Readings()
        for kind, layer in self.own:
            rows = self._rows[kind, layer][numbers]  # a copy: what was checked is what is used
            if not np.array_equal(self._checksums[kind, layer][numbers], [zlib.crc32(row) for row in rows]):
                return None
            states = torch.from_numpy(rows).view(self.dtype).to(items.device)
            store = readings.hidden if kind == "hidden" else readings.attention.setdefault(layer, {})
            store[layer if kind == "hidden" else kind] = states
        return readings

    def write(self, items: Tensor, readings: Readings) -> None:
        """Keep ``readings``, of ``layers`` and this store's type, of the sequences numbered ``items`` (B,)."""
        numbers = items.cpu().numpy()
        for kind, layer in self.kept:
            states = readings.hidden[layer] if kind == "hidden" else readings.attention[layer][kind]
            bits = torch.uint16 if self.dtype.itemsize == 2 else torch.uint32
            rows = states.cpu().contiguous().view(bits).numpy()
            self._rows[kind, layer][numbers] = rows
            self._checksums[kind, layer][numbers] = [zlib.crc32(row) for row in rows]

    def _file(self, key: tuple[str, int]) -> Path:
        return self.folder / f"{key[0]}-{key[1]}.bin"


def _keys(layers: dict[str, set[int]]) -> list[tuple[str, int]]:
    keys = [("hidden", layer) for layer in sorted(layers.get("hidden_layers", ()))]
    return keys + [(name, layer) for layer in sorted(layers.get("attention_layers", ())) for name in PROJECTIONS]


def _map(file: Path, shape: tuple[int, ...], kind: np.dtype) -> np.memmap:
    with file.open("ab") as stream:  # a new file gets its size, one that another process has made stays as it is
        stream.truncate(math.prod(shape) * kind.itemsize)
    return np.memmap(file, dtype=kind, mode="r+", shape=shape)
