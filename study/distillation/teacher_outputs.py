"""Teacher outputs kept on disk: runs that read the same of a teacher on the same sequences compute it once."""

from __future__ import annotations

import math
import os
import shutil
import zlib
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from study.distillation.taps import PROJECTIONS, Activations, Layers

#: One file: ``hidden``, ``query``, ``key`` or ``value``, and the layer.
Part = tuple[str, int]


class TeacherOutputs:
    """Activations of one teacher on numbered sequences, in memory-mapped files, filled by whoever needs them first.

    One file per part and layer holds (sequences, tokens, width) in the type in which a step reads it; a second holds a
    checksum per sequence. A row counts only where its checksum agrees, so that processes may load and save side by
    side and be killed at any time. In bfloat16 a hidden state, or one of queries, keys and values, takes 2 x width
    bytes a token (768 for width 384). Source: this study's choice.

    Args:
        folder: names everything that the activations depend on; made when missing.
        shape: (sequences, tokens, width).
        dtype: torch.bfloat16 or torch.float32.
        needed: what :meth:`load` gives back.
        others: what is kept beside it for other runs: a step that has to compute the teacher does so for all of
            ``layers``, both together.
    """

    def __init__(
        self,
        folder: Path,
        shape: tuple[int, int, int],
        dtype: torch.dtype,
        needed: Layers,
        others: Layers | None = None,
    ):
        self.folder, self.shape, self.dtype = folder, shape, dtype
        self.layers: Layers = {
            key: needed.get(key, set()) | (others or {}).get(key, set())
            for key in ("hidden_layers", "attention_layers")
        }
        self.needed, self.kept = _parts(needed), _parts(self.layers)

    def open(self) -> bool:
        """Map the files, making those that are missing, with all of their space reserved.

        False if they would take half of the free disk or more, or the disk cannot hold them; none made is then left.
        """
        missing = [part for part in self.kept if not self._file(part).is_file()]
        self.folder.mkdir(parents=True, exist_ok=True)
        if len(missing) * math.prod(self.shape) * self.dtype.itemsize >= shutil.disk_usage(self.folder).free / 2:
            return False
        bits = np.dtype(f"u{self.dtype.itemsize}")  # numpy has no bfloat16: bits are kept as they are
        try:
            self._rows = {part: _map(self._file(part), self.shape, bits) for part in self.kept}
            self._checksums = {
                part: _map(self._file(part).with_suffix(".crc32"), self.shape[:1], np.dtype("u4")) for part in self.kept
            }
        except OSError:
            for part in missing:
                self._file(part).unlink(missing_ok=True)
                self._file(part).with_suffix(".crc32").unlink(missing_ok=True)
            return False
        return True

    def load(self, items: Tensor) -> Activations | None:
        """``needed`` of the sequences numbered ``items`` (B,), each (B, T, H); None unless all of it is there."""
        numbers, activations = items.cpu().numpy(), Activations()
        for name, layer in self.needed:
            rows = self._rows[name, layer][numbers]  # a copy: what was checked is what is used
            if not np.array_equal(self._checksums[name, layer][numbers], [zlib.crc32(row) for row in rows]):
                return None
            states = torch.from_numpy(rows).view(self.dtype).to(items.device)
            if name == "hidden":
                activations.hidden[layer] = states
            else:
                activations.attention.setdefault(layer, {})[name] = states
        return activations

    def save(self, items: Tensor, activations: Activations) -> None:
        """Keep ``activations``, of ``layers`` and this store's type, of the sequences numbered ``items`` (B,)."""
        numbers = items.cpu().numpy()
        bits = torch.uint16 if self.dtype.itemsize == 2 else torch.uint32
        for name, layer in self.kept:
            states = activations.hidden[layer] if name == "hidden" else activations.attention[layer][name]
            rows = states.cpu().contiguous().view(bits).numpy()
            self._rows[name, layer][numbers] = rows
            self._checksums[name, layer][numbers] = [zlib.crc32(row) for row in rows]

    def _file(self, part: Part) -> Path:
        return self.folder / f"{part[0]}-{part[1]}.bin"


def _parts(layers: Layers) -> list[Part]:
    hidden = [("hidden", layer) for layer in sorted(layers.get("hidden_layers", ()))]
    return hidden + [(name, layer) for layer in sorted(layers.get("attention_layers", ())) for name in PROJECTIONS]


def _map(file: Path, shape: tuple[int, ...], dtype: np.dtype) -> np.memmap:
    size = math.prod(shape) * dtype.itemsize
    with file.open("ab") as stream:  # a new file gets its size, one that another process has made stays as it is
        stream.truncate(size)
        if hasattr(os, "posix_fallocate"):  # a hole in a mapped file that finds the disk full ends in SIGBUS
            os.posix_fallocate(stream.fileno(), 0, size)
    return np.memmap(file, dtype=dtype, mode="r+", shape=shape)
