"""Blocks between pools and buffers, and into the pool of another process.

One kernel. A *side* of a place is (base address, bytes from layer to layer, from block to block):
a pool, or a dense buffer, whose blocks are its numbers in order. Addresses are plain integers, so
that a peer's pool, mapped through CUDA IPC (or shared memory, in a test), needs no tensor around
it. What is called a block is any number of neighbouring bytes that every block has at a multiple of
one stride: a block of the pool, or a grain of it where only some heads move. 16 bytes a thread and
access; nothing waits.

The readable version is `reference.copy_blocks`.
"""

# What a kernel's values are, Triton's decorators hide from a type checker.
# pyright: reportCallIssue=false, reportArgumentType=false, reportOperatorIssue=false
# pyright: reportAttributeAccessIssue=false
# ruff: noqa: ANN001
from __future__ import annotations

from dataclasses import dataclass

import triton
import triton.language as tl
from torch import Tensor

_TILE = 2048  # words of 8 bytes a program moves: four accesses of 16 bytes a thread in flight


@triton.jit
def copy_kernel(
    source,  # addresses and strides in bytes
    target,
    source_blocks,
    target_blocks,
    source_layer,
    target_layer,
    source_block,
    target_block,
    words,
    WORD: tl.constexpr,  # bytes
    ALIGNED: tl.constexpr,  # every address and stride is a multiple of 16 bytes
    SOURCE_DENSE: tl.constexpr,
    TARGET_DENSE: tl.constexpr,
    TILE: tl.constexpr,
) -> None:
    parts = tl.cdiv(words, TILE)
    index = tl.program_id(0) // parts
    layer = tl.program_id(1).to(tl.int64)
    origin = index.to(tl.int64)
    if not SOURCE_DENSE:
        origin = tl.load(source_blocks + index).to(tl.int64)
    goal = index.to(tl.int64)
    if not TARGET_DENSE:
        goal = tl.load(target_blocks + index).to(tl.int64)
    read = source + layer * source_layer + origin * source_block
    write = target + layer * target_layer + goal * target_block
    if WORD == 8:
        read = read.to(tl.pointer_type(tl.int64))
        write = write.to(tl.pointer_type(tl.int64))
    else:
        read = read.to(tl.pointer_type(tl.int32))
        write = write.to(tl.pointer_type(tl.int32))
    if ALIGNED:
        # What is known of an integer is forgotten when it becomes an address.
        read = tl.multiple_of(read, 16)
        write = tl.multiple_of(write, 16)
    place = tl.program_id(0) % parts * TILE + tl.arange(0, TILE)
    kept = place < words
    tl.store(write + place, tl.load(read + place, mask=kept), mask=kept)


@dataclass(frozen=True, kw_only=True, slots=True)
class Place:
    """Where blocks lie. All in bytes, multiples of 4 (of 16 for full speed)."""

    address: int  # of the first layer's block 0
    layer_stride: int
    block_stride: int
    blocks: Tensor | None = None  # int32 or int64 on the device; None: 0, 1, 2, ...


def pool_place(pool: Tensor, blocks: Tensor | None, *, first_layer: int = 0) -> Place:
    """Whole blocks of a contiguous `pool` [layers, blocks, ...]."""
    assert pool.is_contiguous()
    layer, block = pool.stride(0) * pool.itemsize, pool.stride(1) * pool.itemsize
    return Place(
        address=pool.data_ptr() + first_layer * layer,
        layer_stride=layer,
        block_stride=block,
        blocks=blocks,
    )


def copy_blocks(
    source: Place,
    target: Place,
    *,
    num_layers: int,
    num_blocks: int,
    block_bytes: int,
) -> None:
    """Copy `block_bytes` of each block and layer. Both places on the current device.

    The target's blocks must differ from one another, and from what is read. Grid: blocks x parts
    of a block (neighbours in memory side by side), layers.
    """
    numbers = [block_bytes]
    for place in (source, target):
        numbers += [place.address, place.layer_stride, place.block_stride]
    word = 8 if all(n % 8 == 0 for n in numbers) else 4
    assert all(n % word == 0 for n in numbers), "blocks are whole 4-byte words"
    if num_layers == 0 or num_blocks == 0:
        return
    words = block_bytes // word
    tile = min(_TILE, triton.next_power_of_2(words))
    copy_kernel[(num_blocks * triton.cdiv(words, tile), num_layers)](
        source.address,
        target.address,
        source.blocks,
        target.blocks,
        source.layer_stride,
        target.layer_stride,
        source.block_stride,
        target.block_stride,
        words,
        WORD=word,
        ALIGNED=all(n % 16 == 0 for n in numbers),
        SOURCE_DENSE=source.blocks is None,
        TARGET_DENSE=target.blocks is None,
        TILE=tile,
        num_warps=8 if tile == _TILE else 4,
        enable_fp_fusion=False,
    )


def gather_blocks(pool: Tensor, blocks: Tensor, buffer: Tensor, *, first_layer: int = 0) -> None:
    """buffer[l, i] = pool[first_layer + l, blocks[i]], for a dense `buffer` [layers, n, ...]."""
    copy_blocks(
        pool_place(pool, blocks, first_layer=first_layer),
        pool_place(buffer, None),
        num_layers=buffer.shape[0],
        num_blocks=blocks.shape[0],
        block_bytes=pool.stride(1) * pool.itemsize,
    )


def scatter_blocks(buffer: Tensor, pool: Tensor, blocks: Tensor, *, first_layer: int = 0) -> None:
    """pool[first_layer + l, blocks[i]] = buffer[l, i], for a dense `buffer` [layers, n, ...]."""
    copy_blocks(
        pool_place(buffer, None),
        pool_place(pool, blocks, first_layer=first_layer),
        num_layers=buffer.shape[0],
        num_blocks=blocks.shape[0],
        block_bytes=pool.stride(1) * pool.itemsize,
    )
