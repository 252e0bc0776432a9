"""CUDA IPC: the writer maps the receiver's pool on the same GPU, or a neighbouring one, and a
kernel copies every block of every layer that is ready, in one launch.

It waits for its launch before it says so, sleeping: two processes on one GPU take turns, so a
kernel that waits for the other would hold it up. What it has said is therefore out of the
peer's blocks, as over shared memory.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

import torch

from ..engine.layout import KVLayout
from .copier import Push
from .device_memory import DeviceMemory, PeerDeviceMemory

if TYPE_CHECKING:
    from ..kernels.cuda.transfer import Place

PIECE_BYTES = 1 << 30  # an abort waits for so much at most: half a millisecond on an H200


class CudaIpcWriter:
    """Writes from this worker's pool into the peer's."""

    name = "cuda_ipc"
    immediate = False  # the loop never waits for a device
    piece_bytes = PIECE_BYTES
    pending = False

    def __init__(
        self,
        mine: DeviceMemory,
        layout: KVLayout,
        theirs: PeerDeviceMemory,
        their_layout: KVLayout,
    ) -> None:
        assert layout.block_bytes == their_layout.block_bytes, "the handshake refuses others"
        self._mine, self._theirs, self._copy = mine, theirs, mine.gpu.copy
        self._layout, self._their_layout = layout, their_layout
        self._device = torch.device(mine.gpu.device)
        self._stream = None
        if self._device.type == "cuda":
            self._stream = torch.cuda.Stream(self._device, priority=-1)

    def write(self, push: Push, layers: range) -> None:
        """Returns when the bytes stand in the peer's pool. Raises OSError where CUDA fails."""
        try:
            if self._stream is None:
                self._launch(push, layers)
                return
            with torch.cuda.stream(self._stream):
                mark = push.clock.mark_of(layers.stop - 1)
                if mark is not None:
                    self._stream.wait_event(mark)
                self._launch(push, layers)
                done = torch.cuda.Event(blocking=True)
                done.record(self._stream)
            done.synchronize()
        except RuntimeError as error:
            raise OSError(f"copying to the peer's GPU memory: {error}") from error

    def write_now(self, push: Push, layers: range) -> None:
        raise AssertionError("a GPU is written in the copier's thread only")

    def flush(self) -> None:
        """Nothing is ever left over."""

    def write_canary(self, slot: int, pattern: bytes) -> None:
        self._theirs.put_canary(slot, pattern)

    def leave(self) -> bool:
        return False

    def close(self) -> None:
        self._theirs.unmap()

    def _launch(self, push: Push, layers: range) -> None:
        self._copy(
            self._place(self._mine.address, self._layout, layers.start, push.source),
            self._place(self._theirs.address, self._their_layout, layers.start, push.target),
            num_layers=len(layers),
            num_blocks=len(push.source),
            block_bytes=self._layout.block_bytes,
        )

    def _place(self, address: int, layout: KVLayout, layer: int, blocks: Sequence[int]) -> Place:
        from ..kernels.cuda.transfer import Place  # Triton, where there is a GPU

        return Place(
            address=address + layout.offset(layer, 0),
            layer_stride=layout.layer_bytes,
            block_stride=layout.block_bytes,
            blocks=torch.tensor(blocks, dtype=torch.int32, device=self._device),
        )
