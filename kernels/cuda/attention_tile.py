"""The step that both attention kernels repeat: one tile of keys and values, folded in.

Running softmax: Milakov and Gimelshein 2018, "Online normalizer calculation for softmax",
algorithm 3, here in base 2 as the hardware's exponential is.
"""

# What a kernel's values are, Triton's decorators hide from a type checker.
# pyright: reportCallIssue=false, reportArgumentType=false, reportOperatorIssue=false
# pyright: reportAttributeAccessIssue=false
# ruff: noqa: ANN001, ANN201, ANN202
from __future__ import annotations

import triton
import triton.language as tl

from .e4m3 import power_of

LOG2E = tl.constexpr(1.4426950408889634)


@triton.jit
def attend_tile(
    query, state, kv, scales, block, position, known, visible, scale, kv_head,
    KV_HEADS: tl.constexpr, DIM: tl.constexpr, DIM_PAD: tl.constexpr, BLOCK_SIZE: tl.constexpr,
    HEAD_STRIDE: tl.constexpr, SOFT_CAP: tl.constexpr, FP8: tl.constexpr, MASKED: tl.constexpr,
):  # fmt: skip
    """Fold one tile of the context into `state` (maxima [M], sums [M], acc [M, DIM_PAD]).

    `query` [M, DIM_PAD]; the tile's keys stand at `position` [N] in `block` int64 [N]; those that
    are not `known` [N] are never read. Where MASKED, `visible` [M, N] or [1, N] says who sees
    what. HEAD_STRIDE items lie between two heads' tiles in a block. `scales`, bytes that begin in
    the first tile of the layer, is read where FP8.
    """
    SIDE: tl.constexpr = KV_HEADS * HEAD_STRIDE
    dims = tl.arange(0, DIM_PAD)
    tile = block * (2 * SIDE) + kv_head * HEAD_STRIDE
    at = (tile + position % BLOCK_SIZE * DIM)[:, None] + dims[None, :]
    there = known[:, None] & (dims < DIM)[None, :]
    k = tl.load(kv + at, mask=there, other=0.0).to(query.dtype)
    v = tl.load(kv + SIDE + at, mask=there, other=0.0).to(query.dtype)
    scores = tl.dot(query, tl.trans(k), input_precision="ieee") * scale
    own_scales = scales + tile + position % BLOCK_SIZE
    if FP8:
        scores *= power_of(tl.load(own_scales, mask=known, other=0))[None, :]
    if SOFT_CAP > 0:
        scores = _capped(scores, SOFT_CAP)
    scores *= LOG2E
    if MASKED:
        scores = tl.where(visible, scores, float("-inf"))
    maxima, sums, acc = state
    new_maxima = tl.maximum(maxima, tl.max(scores, 1))
    # A row that has seen only -inf keeps sum 0 and never meets inf - inf.
    safe = tl.where(new_maxima == float("-inf"), 0.0, new_maxima)
    decay = tl.exp2(maxima - safe)
    weights = tl.exp2(scores - safe[:, None])
    sums = sums * decay + tl.sum(weights, 1)
    if FP8:
        weights *= power_of(tl.load(own_scales + SIDE, mask=known, other=0))[None, :]
    acc = tl.dot(weights.to(v.dtype), v, acc * decay[:, None], input_precision="ieee")
    return new_maxima, sums, acc


@triton.jit
def empty_state(SIZE: tl.constexpr, DIM_PAD: tl.constexpr):
    """The state of SIZE queries that have seen nothing."""
    maxima = tl.full([SIZE], float("-inf"), tl.float32)
    return maxima, tl.zeros([SIZE], tl.float32), tl.zeros([SIZE, DIM_PAD], tl.float32)


@triton.jit
def _capped(scores, SOFT_CAP: tl.constexpr):
    """cap * tanh(score / cap) (Gemma 2, section 2).

    There is no tanh outside libdevice: tanh(x) = 1 - 2 / (exp(2x) + 1), right at both infinities.
    """
    return SOFT_CAP * (1 - 2 / (tl.exp(scores * (2 / SOFT_CAP)) + 1))
