"""FP8 rows on the GPU: the same bytes as `kernels.fp8`, which says what they mean."""

# What a kernel's values are, Triton's decorators hide from a type checker.
# pyright: reportCallIssue=false, reportArgumentType=false, reportOperatorIssue=false
# pyright: reportAttributeAccessIssue=false
# ruff: noqa: ANN001, ANN201, ANN202
from __future__ import annotations

import triton
import triton.language as tl
from torch import Tensor

from ..fp8 import E4M3, scales_of

_NOT_FINITE = tl.constexpr(255)
_INFINITY_BITS = tl.constexpr(0x7F800000)


def head_stride(kv: Tensor) -> int:
    """Items from one head's [block_size, dim] of a layer to the next; in FP8 its scales, too."""
    _, _, kv_heads, size, dim = kv.shape
    if kv.dtype != E4M3:
        assert kv.is_contiguous(), "heads lie side by side"
        return size * dim
    step = kv.stride(2)
    assert kv.stride() == (2 * kv_heads * step, kv_heads * step, step, dim, 1)
    return step


def scales_or_layer(kv: Tensor) -> Tensor:
    """The scales of an FP8 layer; of another, something that a kernel takes and never reads."""
    return scales_of(kv) if kv.dtype == E4M3 else kv


@triton.jit
def magnitude(x):
    """The bits of |x|, float32, which are ordered as the numbers are; NaN is above inf."""
    return x.to(tl.int32, bitcast=True) & 0x7FFFFFFF


@triton.jit
def scale_of(largest):
    """Scale byte of rows whose largest `magnitude` this is."""
    exponent = tl.maximum(((largest + 0x1FFFFF) >> 23) - 8, 1)
    return tl.where(largest >= _INFINITY_BITS, _NOT_FINITE, exponent)


@triton.jit
def scaled(x, scale, INTERPRETED: tl.constexpr):
    """float32 x under its scale byte: what e4m3 holds of it, once converted."""
    inverse = ((254 - scale) << 23).to(tl.float32, bitcast=True)
    y = tl.where(scale == _NOT_FINITE, 0.0, x * inverse)
    return _to_grid(y) if INTERPRETED else y


@triton.jit
def power_of(scale):
    """float32 of a scale byte; inf of 255, under which every value is NaN."""
    return (scale.to(tl.int32) << 23).to(tl.float32, bitcast=True)


@triton.jit
def _to_grid(x):
    """float32 x rounded to the nearest value of e4m3, ties to even.

    What the conversion does on a GPU; Triton's interpreter drops the carry out of the mantissa.
    """
    bits = x.to(tl.int32, bitcast=True)
    normal = ((bits + 0x7FFFF + ((bits >> 20) & 1)) & ~0xFFFFF).to(tl.float32, bitcast=True)
    subnormal = (x + 24576.0) - 24576.0  # 1.5 * 2**14: what is left has steps of 2**-9
    return tl.where(tl.abs(x) < 0.015625, subnormal, normal)
