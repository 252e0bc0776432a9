"""FP8 keys and values: what their bytes mean, readable in torch. The tests' truth.

Each position of each KV head is quantised by itself: `head_dim` values in float8_e4m3fn under one
power of two, the smallest that brings the largest of them to 448 or less. So what a block holds
depends on the values alone, never on the steps, chunks or neighbours with which they were
written, and nothing that was written is ever quantised again. A floating-point format loses
nothing but range by a scale that is a power of two.

A scale is one byte, its biased exponent (E8M0 of the OCP Microscaling Formats specification, 1.0):
byte b is 2 ** (b - 127). A row with an inf or NaN has scale 255 and is NaN throughout.

A layer is a tensor `kv` float8_e4m3fn [blocks, 2, kv_heads, block_size, head_dim] whose tiles
[block_size, head_dim] are contiguous and each followed by its `block_size` scale bytes.
"""

from __future__ import annotations

import torch
from torch import Tensor

E4M3 = torch.float8_e4m3fn
NOT_FINITE = 255
_INFINITY_BITS = 0x7F800000
_TOP = 8  # 448 is 1.75 * 2 ** 8
_BELOW_TOP = 0x7FFFFF - 0x600000  # carries into the exponent what has a mantissa above 1.75


def scales_of(kv: Tensor) -> Tensor:  # uint8 [blocks, 2, kv_heads, block_size]
    """View of the scales that lie between a layer's tiles."""
    size, dim = kv.shape[3:]
    assert kv.dtype == E4M3 and kv.stride(3) == dim and kv.stride(2) >= size * (dim + 1)
    strides = (*kv.stride()[:3], 1)
    return kv.view(torch.uint8).as_strided(kv.shape[:4], strides, kv.storage_offset() + size * dim)


def power_of(scales: Tensor) -> Tensor:
    """float32 of scale bytes; 255 is inf, under which every value is NaN."""
    return (scales.int() << 23).view(torch.float32)


def quantise(x: Tensor) -> tuple[Tensor, Tensor]:
    """(float8_e4m3fn like x, uint8 scales without the last dimension), a row at a time."""
    wide = x.float().contiguous()
    bits = (wide.view(torch.int32) & 0x7FFFFFFF).amax(-1)
    exponents = (((bits + _BELOW_TOP) >> 23) - _TOP).clamp(min=1)
    inverse = ((254 - exponents) << 23).view(torch.float32)
    finite = bits < _INFINITY_BITS
    codes = torch.where(finite[..., None], wide * inverse[..., None], 0.0).to(E4M3)
    return codes, torch.where(finite, exponents, NOT_FINITE).to(torch.uint8)


def dequantise(codes: Tensor, scales: Tensor) -> Tensor:
    """float32 of codes [..., dim] under scale bytes [...]."""
    return codes.float() * power_of(scales)[..., None]


def append(kv: Tensor, k: Tensor, v: Tensor, slots: Tensor) -> None:
    """Quantise k, v [tokens, kv_heads, dim] into slots [tokens] (block * block_size + offset)."""
    block, offset = slots // kv.shape[3], slots % kv.shape[3]
    values, scales = kv.view(torch.uint8), scales_of(kv)
    for side, x in enumerate((k, v)):
        codes, exponents = quantise(x)
        values[block, side, :, offset] = codes.view(torch.uint8)
        scales[block, side, :, offset] = exponents


def gather(kv: Tensor, blocks: Tensor) -> Tensor:  # float32 [len(blocks), 2, kv_heads, size, dim]
    """The values of some blocks."""
    return dequantise(kv.view(torch.uint8)[blocks].view(E4M3), scales_of(kv)[blocks])
