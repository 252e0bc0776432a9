"""New keys and values into their blocks: plain, with norm and rotary positions on the way, or FP8.

A slot is block * block_size + offset; a slot below zero is padding (of a CUDA graph's bucket) and
writes nothing. The readable versions are `kernels.reference.append`, `rms_norm` and `rotate`, and
`reference.append_fp8`.
"""

# What a kernel's values are, Triton's decorators hide from a type checker.
# pyright: reportCallIssue=false, reportArgumentType=false, reportOperatorIssue=false
# pyright: reportAttributeAccessIssue=false
# ruff: noqa: ANN001, ANN202
from __future__ import annotations

import triton
import triton.language as tl
from torch import Tensor

_HEADS = 8  # heads a program of the fused kernel takes: 2 KiB of bfloat16 at dim 128
_SMALLEST_EXPONENT = tl.constexpr(1)  # of a float32 that is not subnormal
_E4M3_INVERSE = tl.constexpr(1 / 448.0)


@triton.jit
def append_kernel(
    kv,
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
) -> None:
    token = tl.program_id(0).to(tl.int64)
    slot = tl.load(slots + token)
    heads = tl.arange(0, HEADS_PAD)[:, None]
    dims = tl.arange(0, DIM_PAD)[None, :]
    cells = (heads < tl.where(slot >= 0, KV_HEADS, 0)) & (dims < DIM)
    SIDE: tl.constexpr = KV_HEADS * BLOCK_SIZE * DIM
    line = slot // BLOCK_SIZE * (2 * SIDE) + slot % BLOCK_SIZE * DIM
    target = kv + line + heads * (BLOCK_SIZE * DIM) + dims
    source = heads * DIM + dims
    tl.store(target, tl.load(k + token * k_stride + source, mask=cells), mask=cells)
    tl.store(target + SIDE, tl.load(v + token * v_stride + source, mask=cells), mask=cells)


def append(kv: Tensor, k: Tensor, v: Tensor, slots: Tensor) -> None:
    """Write k, v [tokens, kv_heads, dim] (tokens may be strided) at `slots` int64 [tokens].

    `kv` [blocks, 2, kv_heads, block_size, dim] is one layer of the pool.
    """
    tokens, kv_heads, dim = k.shape
    assert k.stride(1) == dim and v.stride(1) == dim and kv.is_contiguous()
    if tokens == 0:
        return
    append_kernel[(tokens,)](
        kv,
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
        num_warps=4 if kv_heads * dim >= 512 else 1,
        enable_fp_fusion=False,
    )


@triton.jit
def rope_append_kernel(
    qkv,
    kv,
    slots,
    positions,
    angles,
    q_weight,
    k_weight,
    eps,
    qkv_stride,
    HEADS: tl.constexpr,
    KV_HEADS: tl.constexpr,
    HALF: tl.constexpr,
    HALF_PAD: tl.constexpr,
    BLOCK_SIZE: tl.constexpr,
    TAKEN: tl.constexpr,  # heads a program takes
    NORMED: tl.constexpr,
    ROTATED: tl.constexpr,
    STORED: tl.constexpr,
) -> None:
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
    SIDE: tl.constexpr = KV_HEADS * BLOCK_SIZE * DIM
    line = slot // BLOCK_SIZE * (2 * SIDE) + slot % BLOCK_SIZE * DIM
    # Keys and then values of a block lie head by head, as they do in `qkv`.
    target = kv + line + (head - HEADS) * (BLOCK_SIZE * DIM) + dims
    stays = cells & (is_query if STORED else turned)
    tl.store(source, left.to(kind), mask=stays)
    tl.store(source + HALF, right.to(kind), mask=stays)
    if STORED:
        moves = cells & (head >= tl.where(slot >= 0, HEADS, HEADS + 2 * KV_HEADS))
        tl.store(target, left.to(kind), mask=moves)
        tl.store(target + HALF, right.to(kind), mask=moves)


def rope_append(
    qkv: Tensor,
    kv: Tensor | None,
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
    `kv` None: k is written back in place as q is (what an FP8 append then reads).
    """
    tokens, width = qkv.shape
    half = width // (heads + 2 * kv_heads) // 2
    assert (q_weight is None) == (k_weight is None) and qkv.stride(1) == 1
    if tokens == 0:
        return
    rope_append_kernel[(tokens, triton.cdiv(heads + 2 * kv_heads, _HEADS))](
        qkv,
        qkv if kv is None else kv,
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
        BLOCK_SIZE=1 if kv is None else kv.shape[3],
        TAKEN=_HEADS,
        NORMED=q_weight is not None,
        ROTATED=angles is not None,
        STORED=kv is not None,
        num_warps=2,
        enable_fp_fusion=False,  # rounds as the reference does
    )


@triton.jit
def _to_e4m3_grid(x):
    """float32 x rounded to the nearest value of e4m3, ties to even.

    What the conversion does on a GPU; Triton's interpreter drops the carry out of the mantissa.
    """
    bits = x.to(tl.int32, bitcast=True)
    normal = ((bits + 0x7FFFF + ((bits >> 20) & 1)) & ~0xFFFFF).to(tl.float32, bitcast=True)
    subnormal = (x + 24576.0) - 24576.0  # 1.5 * 2**14: what is left has steps of 2**-9
    return tl.where(tl.abs(x) < 0.015625, subnormal, normal)


@triton.jit
def append_fp8_kernel(
    kv,
    scales,
    k,
    v,
    tables,
    token_starts,
    lengths,
    k_stride,
    v_stride,
    table_stride,
    KV_HEADS: tl.constexpr,
    DIM: tl.constexpr,
    DIM_PAD: tl.constexpr,
    BLOCK_SIZE: tl.constexpr,
    SIZE_PAD: tl.constexpr,
    INTERPRETED: tl.constexpr,
) -> None:
    row = tl.program_id(0)
    begin = tl.load(token_starts + row)
    count = tl.load(token_starts + row + 1) - begin
    start = tl.load(lengths + row) - count
    index = start // BLOCK_SIZE + tl.program_id(1)
    if (count == 0) | (index * BLOCK_SIZE >= start + count):
        return
    side = tl.program_id(2)  # key heads, then value heads
    block = tl.load(tables + row.to(tl.int64) * table_stride + index).to(tl.int64)
    here = block * (2 * KV_HEADS) + side
    position = index * BLOCK_SIZE + tl.arange(0, SIZE_PAD)[:, None]
    inside = tl.arange(0, SIZE_PAD)[:, None] < BLOCK_SIZE
    dims = tl.arange(0, DIM_PAD)[None, :]
    is_old = inside & (position < start) & (dims < DIM)
    is_new = inside & (position >= start) & (position < start + count) & (dims < DIM)
    token = (begin + position - start).to(tl.int64)
    is_key = side < KV_HEADS
    source = tl.where(is_key, k + token * k_stride, v + token * v_stride)
    source += side % KV_HEADS * DIM + dims
    new = tl.load(source, mask=is_new, other=0.0).to(tl.float32)
    largest = tl.max(tl.max(tl.abs(new), 1), 0) * _E4M3_INVERSE
    exponent = (largest.to(tl.int32, bitcast=True) + 0x7FFFFF) >> 23
    scale = (tl.maximum(exponent, _SMALLEST_EXPONENT) << 23).to(tl.float32, bitcast=True)
    old_scale = tl.load(scales + here)
    old_scale = tl.where(index * BLOCK_SIZE < start, old_scale, 0.0)
    scale = tl.maximum(scale, old_scale)
    target = kv + here * (BLOCK_SIZE * DIM) + tl.arange(0, SIZE_PAD)[:, None] * DIM + dims
    old = tl.load(target, mask=is_old, other=0.0).to(tl.float32)
    both = tl.where(is_old, old * old_scale, new) / scale
    if INTERPRETED:
        both = _to_e4m3_grid(both)
    tl.store(target, both.to(kv.dtype.element_ty), mask=is_old | is_new)
    tl.store(scales + here, scale)


def append_fp8(
    kv: Tensor,
    scales: Tensor,
    k: Tensor,
    v: Tensor,
    tables: Tensor,
    token_starts: Tensor,
    lengths: Tensor,
    *,
    max_count: int,
) -> None:
    """Quantise each row's new k, v [tokens, kv_heads, dim] into its last positions.

    `kv` float8_e4m3fn [blocks, 2, kv_heads, block_size, dim], `scales` float32 [blocks, 2,
    kv_heads], a power of two each; rows as in `prefill_attention`, `lengths` with the new tokens.
    `max_count`: at least the most tokens a row appends. A block whose scale must grow is
    quantised again, so a block must belong to one row.
    """
    _, kv_heads, dim = k.shape
    size = kv.shape[3]
    assert k.stride(1) == dim and v.stride(1) == dim and kv.is_contiguous()
    if lengths.shape[0] == 0 or max_count == 0:
        return
    append_fp8_kernel[(lengths.shape[0], (max_count + size - 2) // size + 1, 2 * kv_heads)](
        kv,
        scales,
        k,
        v,
        tables,
        token_starts,
        lengths,
        k.stride(0),
        v.stride(0),
        tables.stride(0),
        KV_HEADS=kv_heads,
        DIM=dim,
        DIM_PAD=triton.next_power_of_2(dim),
        BLOCK_SIZE=size,
        SIZE_PAD=triton.next_power_of_2(size),
        INTERPRETED=k.device.type == "cpu",
        num_warps=2,
        enable_fp_fusion=False,
    )
