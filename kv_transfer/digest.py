"""Fingerprints: of the tokens whose KV is sent, and of the blocks themselves."""

from __future__ import annotations

import hashlib
from array import array
from collections.abc import Sequence
from functools import lru_cache

import numpy as np
from numpy.typing import NDArray

from ..engine.layout import KVLayout
from .fit import Way
from .memory import KVMemory
from .window import Window

_GOLDEN = 0x9E3779B97F4A7C15  # odd, 2^64 / golden ratio: spreads small integers over 64 bits
_MASK = (1 << 64) - 1
_WORDS = (np.uint64, np.uint32, np.uint8)


def token_digest(token_ids: Sequence[int]) -> int:
    """64 bits that name a token sequence: both workers compute it from their own request."""
    packed = array("Q", token_ids).tobytes()
    return int.from_bytes(hashlib.blake2b(packed, digest_size=8).digest(), "little")


def block_checksum(memory: KVMemory, layout: KVLayout, blocks: Sequence[int]) -> int:
    """64 bits over the contents of `blocks` in every layer, each word mixed with its place in its
    block, and each block with its place (layer, index in `blocks`): bytes that changed places
    change the sum, within a block and among them.
    """
    word = np.uint64 if layout.block_bytes % 8 == 0 else np.uint32
    total = 0
    for layer in range(layout.num_layers):
        for index, block in enumerate(blocks):
            content = memory.read(layout.offset(layer, block), layout.block_bytes)
            value = _sum(content.view(word))
            total ^= (value + 1) * _place(layer, index) & _MASK
    return total


def checksum_of(memory: KVMemory, way: Way, units: Sequence[int]) -> int:
    """Of what moves one way over a pair: this side's `units`."""
    if way.is_plain:
        return block_checksum(memory, way.mine.layout, units)
    return window_checksum(memory, way.mine, units)


def window_checksum(memory: KVMemory, window: Window, units: Sequence[int]) -> int:
    """As `block_checksum`, over what moves of `units`: every piece mixed with its place, so that
    a head or a position in another's place changes the sum. Equal on both sides of a pair."""
    offsets, lengths = window.offsets(units).tolist(), window.lengths(len(units)).tolist()
    word = next(w for w in _WORDS if not any(size % w().itemsize for size in lengths))
    total = 0
    for layer in range(len(window.layers)):
        start = window.layer_offset(layer)
        for index, (offset, size) in enumerate(zip(offsets, lengths, strict=True)):
            content = memory.read(start + offset, size)
            value = _sum(content.view(word))
            total ^= (value + 1) * _place(layer, index) & _MASK
    return total


def _sum(words: NDArray[np.unsignedinteger]) -> int:
    """Words times odd numbers of their places, modulo 2^64 (12 GB/s of 64 KiB blocks, and 2 GB/s
    for a CRC). The upper half of a word is mixed into its lower one first: the difference of two
    odd numbers is even, so two words that differ in the highest bit alone could change places."""
    wide = words.astype(np.uint64, copy=False)
    return int(np.dot(wide ^ (wide >> np.uint64(32)), _weights(len(wide))))


@lru_cache(maxsize=16)  # a pool has blocks of one length; windows have a few
def _weights(count: int) -> NDArray[np.uint64]:
    odd = np.arange(count, dtype=np.uint64) * np.uint64(2) + np.uint64(1)
    return odd * np.uint64(_GOLDEN)


def _place(layer: int, index: int) -> int:
    """An odd 64-bit number of its own for each place in a lease."""
    return ((layer << 32 | index) * _GOLDEN & _MASK) | 1
