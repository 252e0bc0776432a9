"""A pool as words, gathered into staging buffers and scattered from them.

On a CPU torch's indexing moves them, as words of 8 bytes: single bytes take six times as long. On a
GPU a kernel does, one launch for all layers of a frame.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch
from torch import Tensor

from ..engine.layout import KVLayout
from .device_memory import DeviceMemory
from .memory import KVMemory

BUFFER_BYTES = 8 << 20  # of a staging buffer, unless one block is larger; four a pair at most
# A program of the kernel moves one row: of smaller ones most of its threads would be idle, and
# torch's indexing, which spreads words over threads, is the better.
KERNEL_ROW_BYTES = 1024
_WORDS = {8: torch.int64, 4: torch.int32, 2: torch.int16, 1: torch.uint8}


class Words:
    """A pool as `[layers, rows, words]`, and staging buffers for blocks of it. Here a block is a
    row. `layers` of a gather are the pool's own; a scatter counts its `layer` from `first_layer`.
    """

    first_layer = 0

    def __init__(self, memory: KVMemory, layout: KVLayout, row_bytes: int | None = None) -> None:
        self.num_layers = layout.num_layers
        self._set_block(layout.block_bytes)
        self._row_bytes = row_bytes or layout.block_bytes
        word = _WORDS[min(8, self._row_bytes & -self._row_bytes)]
        flat = memory.buffer
        if not isinstance(flat, Tensor):
            flat = torch.from_numpy(np.frombuffer(flat, np.uint8))
        row_words = self._row_bytes // word.itemsize
        self._pool = flat.view(word).view(layout.num_layers, -1, row_words)
        self._gather, self._scatter = _gather_rows, _scatter_rows
        if isinstance(memory, DeviceMemory) and self._row_bytes >= KERNEL_ROW_BYTES:
            self._gather, self._scatter = memory.gpu.gather, memory.gpu.scatter

    def warm_up(self) -> None:
        """Have what moves rows compiled, on scratch: the loop, where frames are scattered, would
        be silent for so long."""
        here, there = (torch.zeros_like(self._pool[0, 0]) for _ in range(2))
        alike, dense = here.as_strided((1, 1, len(here)), self._pool.stride()), there.view(1, 1, -1)
        first = torch.zeros(1, dtype=torch.int64, device=here.device)
        self._gather(alike, first, dense, first_layer=0)
        self._scatter(dense, alike, first, first_layer=0)

    def staging(self) -> Tensor:
        """On the current stream, whose work alone may use it."""
        num_words = self.staging_bytes // self._pool.itemsize
        return torch.empty(num_words, dtype=self._pool.dtype, device=self._pool.device)

    def part(self, buffer: Tensor, layers: int, count: int) -> Tensor:  # [layers, count, words]
        words = self.block_bytes // self._pool.itemsize
        return buffer[: layers * count * words].view(layers, count, words)

    def gather(self, layers: range, blocks: Sequence[int], buffer: Tensor) -> Tensor:
        """`blocks` of `layers`, dense, in the front of `buffer`."""
        payload = self.part(buffer, len(layers), len(blocks))
        rows = payload.view(len(layers), -1, self._pool.shape[2])
        self._gather(self._pool, self._index(blocks), rows, first_layer=layers.start)
        return payload

    def scatter(self, payload: Tensor, layer: int, blocks: Sequence[int]) -> None:
        rows = payload.view(1, -1, self._pool.shape[2])
        first = self.first_layer + layer
        self._scatter(rows, self._pool, self._index(blocks), first_layer=first)

    def _set_block(self, num_bytes: int) -> None:
        self.block_bytes, self.staging_bytes = num_bytes, max(BUFFER_BYTES, num_bytes)

    def _index(self, blocks: Sequence[int]) -> Tensor:
        """int64 [rows]: where these blocks lie."""
        return torch.tensor(blocks, dtype=torch.int64).to(self._pool.device, non_blocking=True)


def _gather_rows(pool: Tensor, rows: Tensor, buffer: Tensor, *, first_layer: int) -> None:
    """As `kernels.cuda.transfer.gather_blocks`, a layer at a time."""
    for index, dense in enumerate(buffer):
        torch.index_select(pool[first_layer + index], 0, rows, out=dense)


def _scatter_rows(buffer: Tensor, pool: Tensor, rows: Tensor, *, first_layer: int) -> None:
    """As `kernels.cuda.transfer.scatter_blocks`, a layer at a time."""
    for index, dense in enumerate(buffer):
        pool[first_layer + index].index_copy_(0, rows, dense)
