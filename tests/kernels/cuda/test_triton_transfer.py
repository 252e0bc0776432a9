"""Blocks arrive where they should, byte for byte, and nothing beside them changes."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from phasewise.kernels.cuda import reference, transfer
from torch import Tensor

LAYERS, BLOCKS, KV_HEADS, SIZE = 3, 6, 4, 3


def make_pool(dim: int, dtype: torch.dtype, seed: int) -> Tensor:
    shape = (LAYERS, BLOCKS, 2, KV_HEADS, SIZE, dim)
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed)).to(dtype)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float8_e4m3fn])
def test_a_gathered_layer_range_scatters_back_byte_for_byte(
    interpreted: Any, dtype: torch.dtype
) -> None:
    pool, other = make_pool(20, dtype, 0), make_pool(20, dtype, 1)
    blocks, targets = torch.tensor([4, 0, 5], dtype=torch.int32), torch.tensor([1, 5, 2])
    buffer = torch.empty((2, 3, *pool.shape[2:]), dtype=dtype)
    interpreted(transfer.gather_blocks, pool, blocks, buffer, first_layer=1)
    assert torch.equal(buffer.view(torch.uint8), pool.view(torch.uint8)[1:, blocks.long()])
    expected = other.clone().view(torch.uint8)
    reference.copy_blocks(pool.view(torch.uint8)[1:], expected[1:], blocks, targets)
    interpreted(transfer.scatter_blocks, buffer, other, targets, first_layer=1)
    assert torch.equal(other.view(torch.uint8), expected)


def push(source: Tensor, target: Tensor, ids: Tensor, to: Tensor, first: int) -> int:
    """What the prefill process does: from its pool into the mapped pool of another process."""
    transfer.copy_blocks(
        transfer.pool_place(source, ids, first_layer=first),
        transfer.pool_place(target, to, first_layer=first),
        num_layers=LAYERS - first,
        num_blocks=ids.shape[0],
        piece_bytes=source.stride(1) * source.itemsize,
    )
    return target.data_ptr()


def push_heads(source: Tensor, target: Tensor, ids: Tensor, to: Tensor, first_head: int) -> None:
    """Heads of a wide pool into a pool that has only them (a tensor-parallel rank's)."""
    transfer.copy_blocks(
        transfer.head_place(source, ids, first_head=first_head),
        transfer.head_place(target, to),
        num_layers=LAYERS,
        num_blocks=ids.shape[0],
        piece_bytes=target.stride(2) * target.itemsize,
        pieces=2,
    )


# Lambdas and closures do not travel; the interpreter's process finds these by the file's path.
PUSH = """
import torch
from phasewise.kernels.cuda import transfer
"""


def test_blocks_are_pushed_into_the_pool_of_another_process(interpreted: Any) -> None:
    source, target = make_pool(16, torch.float32, 0), make_pool(16, torch.float32, 1)
    target.share_memory_()
    ids, to = torch.tensor([5, 1]), torch.tensor([0, 4], dtype=torch.int32)
    expected = target.clone()
    reference.copy_blocks(source[1:], expected[1:], ids, to)
    there = interpreted(push, source, target, ids, to, 1)
    assert there != target.data_ptr(), "the same memory, mapped elsewhere"
    assert torch.equal(target, expected)
