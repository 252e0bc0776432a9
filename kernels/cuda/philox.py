"""Random numbers as a function of (seed, position), on the device.

Philox4x32-10 (Salmon et al., SC 2011, section 3.3), bit for bit what `engine.draws` computes on
the host: the seed is the key, the position the counter's first two words.
"""

# What a kernel's values are, Triton's decorators hide from a type checker.
# pyright: reportCallIssue=false, reportArgumentType=false, reportOperatorIssue=false
# pyright: reportAttributeAccessIssue=false
# ruff: noqa: ANN001, ANN201, ANN202
from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

_LOW = tl.constexpr(0xFFFFFFFF)
_TILE = 128


@triton.jit
def _high_and_low(word, FACTOR: tl.constexpr):
    product = word.to(tl.uint64) * tl.full([], FACTOR, tl.uint64)  # 32 x 32 bits: never over 64
    return (product >> 32).to(tl.uint32), product.to(tl.uint32)


@triton.jit
def uniform(seed, position):
    """float64 in [0, 1), a multiple of 2**-53, for int64 (or uint64) seed and position."""
    k0 = (seed.to(tl.uint64) & _LOW).to(tl.uint32)
    k1 = (seed.to(tl.uint64) >> 32).to(tl.uint32)
    c0 = (position.to(tl.uint64) & _LOW).to(tl.uint32)
    c1 = (position.to(tl.uint64) >> 32).to(tl.uint32)
    c2 = c0 * 0
    c3 = c0 * 0
    for _ in tl.static_range(10):  # pyright: ignore[reportGeneralTypeIssues]
        high_0, low_0 = _high_and_low(c0, 0xD2511F53)
        high_1, low_1 = _high_and_low(c2, 0xCD9E8D57)
        c0, c1, c2, c3 = high_1 ^ c1 ^ k0, low_1, high_0 ^ c3 ^ k1, low_0
        k0 = k0 + tl.full([], 0x9E3779B9, tl.uint32)
        k1 = k1 + tl.full([], 0xBB67AE85, tl.uint32)
    bits = (c0.to(tl.uint64) << 32) | c1.to(tl.uint64)
    return (bits >> 11).to(tl.float64) * (1.0 / 9007199254740992.0)


@triton.jit
def uniforms_kernel(out, seeds, positions, size, TILE: tl.constexpr) -> None:
    at = tl.program_id(0) * TILE + tl.arange(0, TILE)
    seed = tl.load(seeds + at, mask=at < size, other=0)
    position = tl.load(positions + at, mask=at < size, other=0)
    tl.store(out + at, uniform(seed, position), mask=at < size)


def uniforms(seeds: Tensor, positions: Tensor) -> Tensor:
    """float64 [n] for int64 `seeds` (64 bits, however signed) and `positions`, each [n]."""
    out = torch.empty(seeds.shape, dtype=torch.float64, device=seeds.device)
    if seeds.numel():
        uniforms_kernel[(triton.cdiv(seeds.numel(), _TILE),)](
            out, seeds, positions, seeds.numel(), TILE=_TILE, num_warps=4, enable_fp_fusion=False
        )
    return out
