"""Blocks arrive where they should, byte for byte, and nothing beside them changes."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from phasewise.engine.layout import FP8, KVLayout
from phasewise.kernels.cuda import reference, transfer
from phasewise.kv_transfer.window import Window
from phasewise.tests.kernels.cuda.pushes import push, send_through_staging
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


def test_blocks_of_few_bytes_travel_too(interpreted: Any) -> None:
    for values in (1, 2):  # a block of 4 bytes, and of 8
        source, target = (torch.randn(LAYERS, BLOCKS, values) for _ in range(2))
        expected = target.clone()
        ids, to = torch.tensor([5, 1, 2]), torch.tensor([0, 4, 3])
        reference.copy_blocks(source, expected, ids, to)
        interpreted(push, source, target, ids, to, 0)
        assert torch.equal(target, expected)


def window_of(layout: KVLayout, heads: range, *, layers: range, step: int | None = None) -> Window:
    size = layout.block_size
    return Window(
        layout=layout, layers=layers, heads=heads, step=step or size, is_cut=step is not None
    )


def layout_of(kv_heads: int, layers: int = 3, **changes: Any) -> KVLayout:
    shape: dict[str, Any] = {"block_size": 16, "head_dim": 32, "dtype": "bfloat16", **changes}
    return KVLayout(num_layers=layers, num_blocks=6, num_kv_heads=kv_heads, **shape)


def random_pool(layout: KVLayout, seed: int) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    shape = (layout.num_layers, layout.num_blocks, layout.block_bytes)
    return torch.randint(0, 256, shape, dtype=torch.uint8, generator=generator)


def test_a_groups_frame_is_gathered_and_scattered_by_kernels(interpreted: Any) -> None:
    layout, layers = layout_of(2), range(1, 3)
    whole = window_of(layout, range(2), layers=range(3))
    source, target = random_pool(layout, 0).share_memory_(), random_pool(layout, 1).share_memory_()
    expected = target.clone()
    expected[1:, [1, 5, 2]] = source[1:, [4, 0, 5]]
    sides = (source, whole, [4, 0, 5]), (target, whole, [1, 5, 2])
    assert interpreted(send_through_staging, sides, layers) == (True, True)
    assert torch.equal(target, expected)


def test_heads_and_layers_of_a_pool_go_into_one_that_has_only_them(interpreted: Any) -> None:
    wide, narrow = layout_of(4), layout_of(2, layers=2)
    source, target = random_pool(wide, 0).share_memory_(), random_pool(narrow, 1).share_memory_()
    expected = target.view(2, 6, 2, 2, -1).clone()
    expected[:, [0, 4]] = source.view(3, 6, 2, 4, -1)[1:, [5, 1], :, 1:3]
    sides = (
        (source, window_of(wide, range(1, 3), layers=range(1, 3)), [5, 1]),
        (target, window_of(narrow, range(2), layers=range(2)), [0, 4]),
    )
    assert interpreted(send_through_staging, sides, range(2)) == (True, True)
    assert torch.equal(target.view_as(expected), expected)


def test_rows_too_small_for_a_program_each_are_indexed_by_torch(interpreted: Any) -> None:
    large, small = layout_of(1, dtype=FP8, block_size=32), layout_of(1, dtype=FP8)
    source, target = random_pool(large, 0).share_memory_(), random_pool(small, 1).share_memory_()
    expected = target.view(3, 6, 2, -1).clone()
    values, scales = source.view(3, 6, 2, -1).split((32 * 32, 32), dim=-1)
    expected[:, 2, :, : 16 * 32] = values[:, 4, :, 16 * 32 :]  # unit 9: the second half of block 4
    expected[:, 2, :, 16 * 32 :] = scales[:, 4, :, 16:]
    sides = (
        (source, window_of(large, range(1), layers=range(3), step=16), [9]),
        (target, window_of(small, range(1), layers=range(3), step=16), [2]),
    )
    assert interpreted(send_through_staging, sides, range(3)) == (False, False)
    assert torch.equal(target.view_as(expected), expected)
