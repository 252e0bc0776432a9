"""Blocks arrive where they should, byte for byte, and nothing beside them changes."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from phasewise.kernels.cuda import reference, transfer
from phasewise.tests.kernels.cuda.pushes import push, push_heads
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


def test_blocks_are_pushed_into_the_pool_of_another_process(interpreted: Any) -> None:
    source, target = make_pool(16, torch.float32, 0), make_pool(16, torch.float32, 1)
    target.share_memory_()
    ids, to = torch.tensor([5, 1]), torch.tensor([0, 4], dtype=torch.int32)
    expected = target.clone()
    reference.copy_blocks(source[1:], expected[1:], ids, to)
    there = interpreted(push, source, target, ids, to, 1)
    assert there != target.data_ptr(), "the same memory, mapped elsewhere"
    assert torch.equal(target, expected)


def test_a_range_of_heads_is_pushed_into_a_pool_that_has_only_them(interpreted: Any) -> None:
    source = make_pool(16, torch.float16, 0)
    target = make_pool(16, torch.float16, 1)[:, :, :, :2].contiguous()
    expected = target.clone()
    ids, to = torch.tensor([5, 1, 2]), torch.tensor([0, 4, 3])
    reference.copy_blocks(source[:, :, :, 1:3], expected, ids, to)
    interpreted(push_heads, source, target, ids, to, 1)
    assert torch.equal(target, expected)


def test_blocks_of_few_bytes_travel_too(interpreted: Any) -> None:
    for values in (1, 2):  # a block of 4 bytes, and of 8
        source, target = (torch.randn(LAYERS, BLOCKS, values) for _ in range(2))
        expected = target.clone()
        ids, to = torch.tensor([5, 1, 2]), torch.tensor([0, 4, 3])
        reference.copy_blocks(source, expected, ids, to)
        interpreted(push, source, target, ids, to, 0)
        assert torch.equal(target, expected)
