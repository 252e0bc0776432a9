"""The next token on the device: argmax, sampling keys, and the draw among what filters leave.

Keys are `engine.logits.KeyFormat`'s: a fixed-point weight above the token id. All that is decided
about them is integer arithmetic, so `draw` gives the token that KeyFormat's top_k, top_p_floor and
draw give, bit for bit, from the same keys. Where those sort, this searches: a filter is one
threshold, found two bits a pass (32 passes over a row that the second-level cache holds), without
a sort, without scratch and without the host. Keys themselves go through exp: a GPU's differs from
a CPU's in the last place, so equal tokens on both are certain only up to a weight of about 1e-7.
"""

# What a kernel's values are, Triton's decorators hide from a type checker.
# pyright: reportCallIssue=false, reportArgumentType=false, reportOperatorIssue=false
# pyright: reportAttributeAccessIssue=false
# ruff: noqa: ANN001, ANN202
from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from .philox import uniform

_TILE = 4096
_DRAW_TILE = 2048  # three running sums of it, in 64 bits, stay in registers
_NO_PLACE = tl.constexpr(2**31 - 1)
_TINY = tl.constexpr(1.1754943508222875e-38)  # smallest normal float32


@triton.jit
def argmax_kernel(token_ids, maxima, logits, stride, vocab, TILE: tl.constexpr) -> None:
    row = tl.program_id(0).to(tl.int64)
    best = tl.full([TILE], float("-inf"), tl.float32)
    best_place = tl.full([TILE], _NO_PLACE, tl.int32)
    broken = tl.zeros([TILE], tl.int32)
    for start in range(0, vocab, TILE):
        place = start + tl.arange(0, TILE)
        value = tl.load(logits + row * stride + place, mask=place < vocab, other=float("-inf"))
        value = value.to(tl.float32)
        broken |= (value != value).to(tl.int32)
        better = value > best
        best_place = tl.where(better, place, best_place)
        best = tl.where(better, value, best)
    largest = tl.max(best, 0)
    first = tl.min(tl.where(best == largest, best_place, _NO_PLACE), 0)
    is_broken = tl.max(broken, 0) > 0
    tl.store(token_ids + row, tl.where(first == _NO_PLACE, 0, first).to(tl.int64))
    tl.store(maxima + row, tl.where(is_broken, float("nan"), largest))


@triton.jit
def keys_kernel(
    keys,
    logits,
    maxima,
    temperatures,
    stride,
    vocab,
    ID_BITS: tl.constexpr,
    TILE: tl.constexpr,
) -> None:
    row = tl.program_id(0).to(tl.int64)
    place = tl.program_id(1) * TILE + tl.arange(0, TILE)
    given = tl.load(temperatures + row)
    if given == 0:
        return
    temperature = tl.maximum(given.to(tl.float32), _TINY)
    value = tl.load(logits + row * stride + place, mask=place < vocab, other=float("-inf"))
    weight = tl.exp(tl.div_rn(value.to(tl.float32) - tl.load(maxima + row), temperature))
    ONE: tl.constexpr = 1 << (62 - ID_BITS)
    MASK: tl.constexpr = (1 << ID_BITS) - 1
    key = ((weight * ONE).to(tl.int64) << ID_BITS) + (MASK - place)
    tl.store(keys + row * vocab + place, key, mask=place < vocab)


@triton.jit
def _threshold(row_keys, vocab, floor, needed, ID_BITS: tl.constexpr, TILE: tl.constexpr):
    """Largest t for which the keys >= max(t, floor) are worth at least `needed`.

    A key is worth its weight, or 1 where ID_BITS is 0. Two bits of t a pass, from the top.
    """
    found = needed * 0
    for step in range(32):
        shift = tl.maximum(61 - 2 * step, 0)
        quarter = (found * 0 + 1) << shift
        one = tl.zeros([TILE], tl.int64)
        two = tl.zeros([TILE], tl.int64)
        three = tl.zeros([TILE], tl.int64)
        for start in range(0, vocab, TILE):
            place = start + tl.arange(0, TILE)
            key = tl.load(row_keys + place, mask=place < vocab, other=-1)
            worth = (key >= floor).to(tl.int64)
            if ID_BITS > 0:
                worth *= key >> ID_BITS
            one += tl.where(key >= found + quarter, worth, 0)
            two += tl.where(key >= found + 2 * quarter, worth, 0)
            three += tl.where(key >= found + 3 * quarter, worth, 0)
        reached = (tl.sum(one, 0) >= needed).to(tl.int64)
        reached += (tl.sum(two, 0) >= needed).to(tl.int64)
        reached += (tl.sum(three, 0) >= needed).to(tl.int64)
        found += reached * quarter
    return tl.maximum(found, floor)


@triton.jit
def _total(row_keys, vocab, floor, ID_BITS: tl.constexpr, TILE: tl.constexpr):
    """Sum of the weights of keys >= floor."""
    total = tl.zeros([TILE], tl.int64)
    for start in range(0, vocab, TILE):
        place = start + tl.arange(0, TILE)
        key = tl.load(row_keys + place, mask=place < vocab, other=0)
        total += tl.where(key >= floor, key >> ID_BITS, 0)
    return tl.sum(total, 0)


@triton.jit
def draw_kernel(
    token_ids,
    keys,
    floors,
    top_k,
    top_p,
    seeds,
    positions,
    temperatures,
    vocab,
    ID_BITS: tl.constexpr,
    TILE: tl.constexpr,
    SOME: tl.constexpr,
) -> None:
    row = tl.program_id(0).to(tl.int64)
    # SOME is known when the kernel is compiled, what is loaded is not.
    if SOME:  # noqa: SIM102
        if tl.load(temperatures + row) == 0:
            return
    row_keys = keys + row * vocab
    floor = tl.load(floors + row)
    count = tl.load(top_k + row)
    share = tl.load(top_p + row)
    if (count > 0) & (count < vocab):
        kth = _threshold(row_keys, vocab, floor * 0, count, 0, TILE)
        floor = tl.maximum(floor, kth)
    total = _total(row_keys, vocab, floor, ID_BITS, TILE)
    if share < 1:
        needed = tl.ceil(share * total.to(tl.float64)).to(tl.int64)
        needed = tl.minimum(tl.maximum(needed, 1), total)
        floor = _threshold(row_keys, vocab, floor, needed, ID_BITS, TILE)
        total = _total(row_keys, vocab, floor, ID_BITS, TILE)
    drawn = uniform(tl.load(seeds + row), tl.load(positions + row))
    target = tl.minimum((drawn * total.to(tl.float64)).to(tl.int64), total - 1)
    token_id = tl.full([], 0, tl.int64)
    before = total * 0
    for start in range(0, vocab, TILE):
        place = start + tl.arange(0, TILE)
        key = tl.load(row_keys + place, mask=place < vocab, other=0)
        weight = tl.where(key >= floor, key >> ID_BITS, 0)
        after = before + tl.sum(weight, 0)
        if (before <= target) & (target < after):
            hit = before + tl.cumsum(weight, 0) > target
            token_id = tl.min(tl.where(hit, place, _NO_PLACE), 0).to(tl.int64)
        before = after
    tl.store(token_ids + row, token_id)


def _tile(vocab: int, largest: int = _TILE) -> int:
    return min(largest, triton.next_power_of_2(vocab))


def argmax(logits: Tensor, out: tuple[Tensor, Tensor] | None = None) -> tuple[Tensor, Tensor]:
    """(token ids int64 [rows], maxima float32 [rows]) of logits [rows, vocab], into `out`.

    Of equal logits the smallest id wins. A row with a NaN has the maximum NaN.
    """
    rows, vocab = logits.shape
    if out is None:
        out = (logits.new_empty(rows, dtype=torch.int64), logits.new_empty(rows))
    token_ids, maxima = out
    assert logits.dtype == maxima.dtype == torch.float32
    if rows:
        argmax_kernel[(rows,)](
            token_ids,
            maxima,
            logits,
            logits.stride(0),
            vocab,
            TILE=_tile(vocab),
            num_warps=16,
            enable_fp_fusion=False,
        )
    return token_ids, maxima


def keys(logits: Tensor, maxima: Tensor, temperatures: Tensor) -> Tensor:
    """Keys int64 [rows, vocab] in the order of the vocabulary; `maxima`, `temperatures` [rows].

    Rows of temperature 0 are greedy: they get no keys. One so small that it is 0 in float32 must
    come in float64.
    """
    rows, vocab = logits.shape
    out = torch.empty((rows, vocab), dtype=torch.int64, device=logits.device)
    tile = _tile(vocab)
    if rows:
        keys_kernel[(rows, triton.cdiv(vocab, tile))](
            out,
            logits,
            maxima,
            temperatures,
            logits.stride(0),
            vocab,
            ID_BITS=vocab.bit_length(),
            TILE=tile,
            num_warps=8,
            enable_fp_fusion=False,
        )
    return out


def draw(
    keys: Tensor,
    floors: Tensor,
    top_k: Tensor,
    top_p: Tensor,
    seeds: Tensor,
    positions: Tensor,
    *,
    temperatures: Tensor | None = None,
    token_ids: Tensor | None = None,
) -> Tensor:
    """Token ids int64 [rows] from `keys` int64 [rows, vocab]; all columns are [rows].

    `floors` int64: the smallest key that min_p leaves (0: all); `top_k` int64 (0: all); `top_p`
    float64 (1: all); `seeds` and `positions` integers, for the counter-based generator. With
    `temperatures`, rows of temperature 0 keep what stands in `token_ids`, which is returned.
    """
    rows, vocab = keys.shape
    assert keys.is_contiguous() and top_p.dtype == torch.float64
    assert temperatures is None or token_ids is not None, "a greedy row has its token already"
    if token_ids is None:
        token_ids = torch.empty(rows, dtype=torch.int64, device=keys.device)
    if rows:
        draw_kernel[(rows,)](
            token_ids,
            keys,
            floors,
            top_k,
            top_p,
            seeds,
            positions,
            temperatures,
            vocab,
            ID_BITS=vocab.bit_length(),
            TILE=_tile(vocab, _DRAW_TILE),
            SOME=temperatures is not None,
            num_warps=16,
            enable_fp_fusion=False,
        )
    return token_ids
