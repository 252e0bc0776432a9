"""What the process that runs the interpreter does when it plays the prefill worker."""

from __future__ import annotations

from phasewise.kernels.cuda import transfer
from torch import Tensor


def push(source: Tensor, target: Tensor, ids: Tensor, to: Tensor, first: int) -> int:
    """What the prefill process does: from its pool into the mapped pool of another process."""
    transfer.copy_blocks(
        transfer.pool_place(source, ids, first_layer=first),
        transfer.pool_place(target, to, first_layer=first),
        num_layers=source.shape[0] - first,
        num_blocks=ids.shape[0],
        piece_bytes=source.stride(1) * source.itemsize,
    )
    return target.data_ptr()


def push_heads(source: Tensor, target: Tensor, ids: Tensor, to: Tensor, first_head: int) -> None:
    """Heads of a wide pool into a pool that has only them (a tensor-parallel rank's)."""
    transfer.copy_blocks(
        transfer.head_place(source, ids, first_head=first_head),
        transfer.head_place(target, to),
        num_layers=source.shape[0],
        num_blocks=ids.shape[0],
        piece_bytes=target.stride(2) * target.itemsize,
        pieces=2,
    )
