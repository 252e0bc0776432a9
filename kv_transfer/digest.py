"""Fingerprints: of the tokens whose KV is sent, and of the blocks themselves."""

from __future__ import annotations

import hashlib
from array import array
from collections.abc import Sequence

import numpy as np

from ..engine.layout import KVLayout
from .memory import KVMemory

_GOLDEN = 0x9E3779B97F4A7C15  # odd, 2^64 / golden ratio: spreads small integers over 64 bits
_MASK = (1 << 64) - 1


def token_digest(token_ids: Sequence[int]) -> int:
    """64 bits that name a token sequence: both workers compute it from their own request."""
    packed = array("Q", token_ids).tobytes()
    return int.from_bytes(hashlib.blake2b(packed, digest_size=8).digest(), "little")


def block_checksum(memory: KVMemory, layout: KVLayout, blocks: Sequence[int]) -> int:
    """64 bits over the contents of `blocks` in every layer, each mixed with its place.

    The xor of a block's words, times an odd number made from (layer, index in `blocks`): two
    blocks that changed places, or one that stands in another's, change the sum. Order of words
    inside a block is not covered; a copy never changes it.
    """
    word = np.uint64 if layout.block_bytes % 8 == 0 else np.uint32
    total = 0
    for layer in range(layout.num_layers):
        for index, block in enumerate(blocks):
            content = memory.read(layout.offset(layer, block), layout.block_bytes)
            value = int(np.bitwise_xor.reduce(content.view(word)))
            total ^= (value + 1) * _place(layer, index) & _MASK
    return total


def _place(layer: int, index: int) -> int:
    """An odd 64-bit number of its own for each place in a lease."""
    return ((layer << 32 | index) * _GOLDEN & _MASK) | 1
