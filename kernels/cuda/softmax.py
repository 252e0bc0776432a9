"""The inner step that both attention kernels share: scores, and the running softmax.

Running softmax: Milakov and Gimelshein 2018, "Online normalizer calculation for softmax",
algorithm 3, here in base 2 as the hardware's exponential is.
"""

# What a kernel's values are, Triton's decorators hide from a type checker.
# pyright: reportCallIssue=false, reportArgumentType=false, reportOperatorIssue=false
# pyright: reportAttributeAccessIssue=false
# ruff: noqa: ANN001, ANN201
from __future__ import annotations

import triton
import triton.language as tl

LOG2E = tl.constexpr(1.4426950408889634)


@triton.jit
def capped_scores(q, k, k_scales, scale, SOFT_CAP: tl.constexpr, FP8: tl.constexpr):
    """Scores in units of log2: q [M, D] times k [N, D]; `k_scales` [N] where the cache is FP8.

    SOFT_CAP > 0 squeezes a score s to cap * tanh(s / cap) (Gemma 2, section 2). There is no
    tanh outside libdevice: tanh(x) = 1 - 2 / (exp(2x) + 1), right at both infinities.
    """
    scores = tl.dot(q, tl.trans(k), input_precision="ieee") * scale
    if FP8:
        scores *= k_scales[None, :]
    if SOFT_CAP > 0:
        scores = SOFT_CAP * (1 - 2 / (tl.exp(scores * (2 / SOFT_CAP)) + 1))
    return scores * LOG2E


@triton.jit
def accumulate(scores, v, v_scales, maxima, sums, acc, FP8: tl.constexpr):
    """Fold scores [M, N] and v [N, D] into (maxima [M], sums [M], acc [M, D]).

    A row that has seen only -inf keeps sum 0 and never meets inf - inf.
    """
    new_maxima = tl.maximum(maxima, tl.max(scores, 1))
    safe = tl.where(new_maxima == float("-inf"), 0.0, new_maxima)
    decay = tl.exp2(maxima - safe)
    weights = tl.exp2(scores - safe[:, None])
    sums = sums * decay + tl.sum(weights, 1)
    if FP8:
        weights *= v_scales[None, :]
    acc = acc * decay[:, None]
    acc = tl.dot(weights.to(v.dtype), v, acc, input_precision="ieee")
    return new_maxima, sums, acc
