"""New keys and values into their blocks: plain, or with norm and rotary positions on the way.

A slot is block * block_size + offset; a slot below zero is padding (of a CUDA graph's bucket) and
writes nothing. Into an FP8 layer a row goes under a scale of its own, quantised from what another
layer would hold. The readable versions are `kernels.reference.append`, `rms_norm` and `rotate`.
"""

# What a kernel's values are, Triton's decorators hide from a type checker.
# pyright: reportCallIssue=false, reportArgumentType=false, reportOperatorIssue=false
# pyright: reportAttributeAccessIssue=false
# ruff: noqa: ANN001, ANN202
from __future__ import annotations

import triton
import triton.language as tl
from torch import Tensor

from ..fp8 import E4M3
from .e4m3 import head_stride, magnitude, scale_of, scaled, scales_or_layer

_HEADS = 8  # heads a program of the fused kernel takes: 2 KiB of bfloat16 at dim 128


@triton.jit
def append_kernel(
    kv,
    scales,
    k,
    v,
    slots,
    k_stride,
    v_stride,
    KV_HEADS: tl.constexpr,
    HEADS_PAD: tl.constexpr,
    DIM: tl.constexpr,
    DIM_PAD: tl.constexpr,
    BLOCK_SIZE: tl.constexpr,
    HEAD_STRIDE: tl.constexpr,
    FP8: tl.constexpr,
    INTERPRETED: tl.constexpr,
) -> None:
    token = tl.program_id(0).to(tl.int64)
    slot = tl.load(slots + token)
    heads = tl.arange(0, HEADS_PAD)[:, None]
    dims = tl.arange(0, DIM_PAD)[None, :]
    cells = (heads < tl.where(slot >= 0, KV_HEADS, 0)) & (dims < DIM)
    SIDE: tl.constexpr = KV_HEADS * HEAD_STRIDE
    tile = slot // BLOCK_SIZE * (2 * SIDE) + heads * HEAD_STRIDE
    target = kv + tile + slot % BLOCK_SIZE * DIM + dims
    source = heads * DIM + dims
    key = tl.load(k + token * k_stride + source, mask=cells, other=0.0)
    value = tl.load(v + token * v_stride + source, mask=cells, other=0.0)
    if FP8:
        own_scales = scales + tile + slot % BLOCK_SIZE
        own = heads < tl.where(slot >= 0, KV_HEADS, 0)
        key, value = key.to(tl.float32), value.to(tl.float32)
        key_scale = scale_of(tl.max(magnitude(key), 1, keep_dims=True))
        value_scale = scale_of(tl.max(magnitude(value), 1, keep_dims=True))
        tl.store(own_scales, key_scale.to(tl.uint8), mask=own)
        tl.store(own_scales + SIDE, value_scale.to(tl.uint8), mask=own)
        key = scaled(key, key_scale, INTERPRETED).to(kv.dtype.element_ty)
        value = scaled(value, value_scale, INTERPRETED).to(kv.dtype.element_ty)
    tl.store(target, key, mask=cells)
    tl.store(target + SIDE, value, mask=cells)


def append(kv: Tensor, k: Tensor, v: Tensor, slots: Tensor) -> None:
    """Write k, v [tokens, kv_heads, dim] (tokens may be strided) at `slots` int64 [tokens].

    `kv` [blocks, 2, kv_heads, block_size, dim] is one layer of the pool.
    """
    tokens, kv_heads, dim = k.shape
    assert k.stride(1) == dim and v.stride(1) == dim
    if tokens == 0:
        return
    append_kernel[(tokens,)](
        kv,
        scales_or_layer(kv),
        k,
        v,
        slots,
        k.stride(0),
        v.stride(0),
        KV_HEADS=kv_heads,
        HEADS_PAD=triton.next_power_of_2(kv_heads),
        DIM=dim,
        DIM_PAD=triton.next_power_of_2(dim),
        BLOCK_SIZE=kv.shape[3],
        HEAD_STRIDE=head_stride(kv),
        FP8=kv.dtype == E4M3,
        INTERPRETED=k.device.type == "cpu",
        num_warps=4 if kv_heads * dim >= 512 else 1,
        enable_fp_fusion=False,
    )


@triton.jit
def rope_append_kernel(
    qkv, kv, scales, slots, positions, angles, q_weight, k_weight, eps, qkv_stride,
    HEADS: tl.constexpr, KV_HEADS: tl.constexpr, HALF: tl.constexpr, HALF_PAD: tl.constexpr,
    BLOCK_SIZE: tl.constexpr, HEAD_STRIDE: tl.constexpr,
    TAKEN: tl.constexpr,  # heads a program takes
    NORMED: tl.constexpr, ROTATED: tl.constexpr, FP8: tl.constexpr, INTERPRETED: tl.constexpr,
) -> None:  # fmt: skip
    token = tl.program_id(0).to(tl.int64)
    head = tl.program_id(1) * TAKEN + tl.arange(0, TAKEN)[:, None]
    dims = tl.arange(0, HALF_PAD)[None, :]
    DIM: tl.constexpr = 2 * HALF
    cells = (head < HEADS + 2 * KV_HEADS) & (dims < HALF)
    is_query = head < HEADS
    turned = head < HEADS + KV_HEADS  # values are neither normalised nor rotated
    source = qkv + token * qkv_stride + head * DIM + dims
    left = tl.load(source, mask=cells, other=0.0).to(tl.float32)
    right = tl.load(source + HALF, mask=cells, other=0.0).to(tl.float32)
    kind = qkv.dtype.element_ty
    if NORMED:
        squares = tl.sum(left * left, 1, keep_dims=True) + tl.sum(right * right, 1, keep_dims=True)
        factor = tl.rsqrt(squares / DIM + eps)
        # Rounded before and after the weight, where the model's own dtype rounds.
        weight = tl.where(is_query, q_weight + dims, k_weight + dims)
        own = tl.load(weight, mask=cells, other=0.0).to(tl.float32)
        left_normed = (left * factor).to(kind).to(tl.float32) * own
        own = tl.load(weight + HALF, mask=cells, other=0.0).to(tl.float32)
        right_normed = (right * factor).to(kind).to(tl.float32) * own
        left = tl.where(turned, left_normed.to(kind).to(tl.float32), left)
        right = tl.where(turned, right_normed.to(kind).to(tl.float32), right)
    if ROTATED:
        turn = angles + tl.load(positions + token) * DIM + dims
        cos = tl.load(turn, mask=turned & cells, other=1.0)
        sin = tl.load(turn + HALF, mask=turned & cells, other=0.0)
        left, right = left * cos - right * sin, right * cos + left * sin
    slot = tl.load(slots + token)
    # Keys and then values of a block lie head by head, as they do in `qkv`.
    tile = slot // BLOCK_SIZE * (2 * KV_HEADS * HEAD_STRIDE) + (head - HEADS) * HEAD_STRIDE
    target = kv + tile + slot % BLOCK_SIZE * DIM + dims
    left, right = left.to(kind), right.to(kind)
    tl.store(source, left, mask=cells & is_query)
    tl.store(source + HALF, right, mask=cells & is_query)
    first = tl.where(slot >= 0, HEADS, HEADS + 2 * KV_HEADS)
    moves = cells & (head >= first)
    if FP8:
        left, right = left.to(tl.float32), right.to(tl.float32)
        largest = tl.max(tl.maximum(magnitude(left), magnitude(right)), 1, keep_dims=True)
        scale = scale_of(largest)
        own = (head >= first) & (head < HEADS + 2 * KV_HEADS)
        tl.store(scales + tile + slot % BLOCK_SIZE, scale.to(tl.uint8), mask=own)
        left = scaled(left, scale, INTERPRETED).to(kv.dtype.element_ty)
        right = scaled(right, scale, INTERPRETED).to(kv.dtype.element_ty)
    tl.store(target, left, mask=moves)
    tl.store(target + HALF, right, mask=moves)


def rope_append(
    qkv: Tensor,
    kv: Tensor,
    slots: Tensor,
    positions: Tensor,
    angles: Tensor | None,
    *,
    heads: int,
    kv_heads: int,
    q_weight: Tensor | None = None,
    k_weight: Tensor | None = None,
    eps: float = 0.0,
) -> None:
    """Normalise (optionally) and rotate q in place, k into its block; copy v into its block.

    `qkv` [tokens, (heads + 2 kv_heads) * dim] as the fused projection puts it out; `slots` and
    `positions` int64 [tokens]; `angles` float32 [max_positions, dim] (cosines, then sines) or
    None for a model without rotary positions; `q_weight`, `k_weight` [dim] both or neither.
    """
    tokens, width = qkv.shape
    half = width // (heads + 2 * kv_heads) // 2
    assert (q_weight is None) == (k_weight is None) and qkv.stride(1) == 1
    if tokens == 0:
        return
    rope_append_kernel[(tokens, triton.cdiv(heads + 2 * kv_heads, _HEADS))](
        qkv,
        kv,
        scales_or_layer(kv),
        slots,
        positions,
        qkv if angles is None else angles,
        qkv if q_weight is None else q_weight,
        qkv if k_weight is None else k_weight,
        eps,
        qkv.stride(0),
        HEADS=heads,
        KV_HEADS=kv_heads,
        HALF=half,
        HALF_PAD=triton.next_power_of_2(half),
        BLOCK_SIZE=kv.shape[3],
        HEAD_STRIDE=head_stride(kv),
        TAKEN=_HEADS,
        NORMED=q_weight is not None,
        ROTATED=angles is not None,
        FP8=kv.dtype == E4M3,
        INTERPRETED=qkv.device.type == "cpu",
        num_warps=2,
        enable_fp_fusion=False,  # rounds as the reference does
    )
