"""What the process that runs the interpreter does when it plays a worker with a GPU."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from phasewise.kernels.cuda import transfer
from phasewise.kv_transfer.device_memory import DeviceMemory, Gpu
from phasewise.kv_transfer.resharded_group import WindowWords
from phasewise.kv_transfer.window import Window
from phasewise.kv_transfer.words import Words
from torch import Tensor


class HostPool(DeviceMemory):
    """A pool in host memory, moved as a GPU's is."""

    def __init__(self, pool: Tensor) -> None:
        kernels = (transfer.copy_blocks, transfer.gather_blocks, transfer.scatter_blocks)
        self.gpu, self._bytes = Gpu(None, "cpu", *kernels), pool.view(torch.uint8).view(-1)

    @property
    def buffer(self) -> Tensor:
        return self._bytes


def push(source: Tensor, target: Tensor, ids: Tensor, to: Tensor, first: int) -> int:
    """What the prefill process does: from its pool into the mapped pool of another process."""
    transfer.copy_blocks(
        transfer.pool_place(source, ids, first_layer=first),
        transfer.pool_place(target, to, first_layer=first),
        num_layers=source.shape[0] - first,
        num_blocks=ids.shape[0],
        block_bytes=source.stride(1) * source.itemsize,
    )
    return target.data_ptr()


def send_through_staging(
    sides: Sequence[tuple[Tensor, Window, Sequence[int]]], layers: range
) -> tuple[bool, bool]:
    """Units of one pool into another, as a group's two ends do it; which of them by a kernel.

    `layers` count from the windows' own first ones.
    """
    (source, mine, units), (target, theirs, places) = sides
    here, there = (_words(pool, window) for pool, window in ((source, mine), (target, theirs)))
    there.warm_up()
    first = mine.layers.start
    of_pool = range(first + layers.start, first + layers.stop)
    payload = here.gather(of_pool, units, here.staging())
    for row, layer in zip(payload, layers, strict=True):
        there.scatter(row, layer, places)
    by_kernel = transfer.gather_blocks, transfer.scatter_blocks
    return here._gather is by_kernel[0], there._scatter is by_kernel[1]


def _words(pool: Tensor, window: Window) -> Words:
    memory = HostPool(pool)
    return Words(memory, window.layout) if window.is_whole else WindowWords(memory, window)
