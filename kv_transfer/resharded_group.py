"""A group's staging buffers, and CUDA IPC, between pools that are split differently.

On a device nothing is copied piece by piece from the host: both pools are seen as grains, the
largest size that divides every piece, and an index says which of them go where.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from torch import Tensor

from .copier import Push
from .cuda_ipc import CudaIpcWriter
from .device_memory import DeviceMemory, PeerDeviceMemory
from .fit import Way
from .memory import KVMemory
from .window import Window
from .words import Words


class WindowWords(Words):
    """As `Words`, of a window's units: a block here is a unit, of several rows."""

    def __init__(self, memory: KVMemory, window: Window) -> None:
        super().__init__(memory, window.layout, window.grain)
        self._window = window
        self.first_layer, self.num_layers = window.layers.start, len(window.layers)
        self._set_block(window.unit_bytes)

    def _index(self, blocks: Sequence[int]) -> Tensor:
        found = torch.from_numpy(self._window.grains(blocks, self._row_bytes))
        return found.to(self._pool.device, non_blocking=True)


class ReshardedCudaIpcWriter(CudaIpcWriter):
    """One launch for all grains of the layers that are ready."""

    def __init__(self, mine: DeviceMemory, theirs: PeerDeviceMemory, way: Way) -> None:
        super().__init__(mine, way.mine.layout, theirs, way.mine.layout)
        self._way = way
        self._grain = math.gcd(way.mine.grain, way.theirs.grain)

    def _launch(self, push: Push, layers: range) -> None:
        from ..kernels.cuda.transfer import Place  # Triton, where there is a GPU

        mine, theirs = self._way.mine, self._way.theirs
        index = layers.start - mine.layers.start
        sides = (
            (self._mine.address, mine, push.source),
            (self._theirs.address, theirs, push.target),
        )
        grains = [window.grains(units, self._grain) for _, window, units in sides]
        source, target = (
            Place(
                address=address + window.layer_offset(index),
                layer_stride=window.layout.layer_bytes,
                block_stride=self._grain,
                blocks=torch.from_numpy(found).to(self._device),
            )
            for (address, window, _), found in zip(sides, grains, strict=True)
        )
        self._copy(
            source,
            target,
            num_layers=len(layers),
            num_blocks=len(grains[0]),
            block_bytes=self._grain,
        )
