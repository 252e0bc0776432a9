"""Edits of single logits: bias, suppression, penalties. A launch each; cells as in `engine.logits`.

The readable versions are `engine.logits.add_bias`, `suppress` and `penalise`.
"""

# What a kernel's values are, Triton's decorators hide from a type checker.
# pyright: reportCallIssue=false, reportArgumentType=false, reportOperatorIssue=false
# pyright: reportAttributeAccessIssue=false
# ruff: noqa: ANN001
from __future__ import annotations

import triton
import triton.language as tl
from torch import Tensor

_TILE = 256


@triton.jit
def add_bias_kernel(logits, rows, ids, bias, stride, size, TILE: tl.constexpr) -> None:
    at = tl.program_id(0) * TILE + tl.arange(0, TILE)
    mask = at < size
    cell = logits + tl.load(rows + at, mask=mask) * stride + tl.load(ids + at, mask=mask)
    value = tl.load(cell, mask=mask) + tl.load(bias + at, mask=mask)
    tl.store(cell, value, mask=mask)


@triton.jit
def suppress_kernel(logits, rows, ids, stride, size, TILE: tl.constexpr) -> None:
    at = tl.program_id(0) * TILE + tl.arange(0, TILE)
    mask = at < size
    cell = logits + tl.load(rows + at, mask=mask) * stride + tl.load(ids + at, mask=mask)
    tl.store(cell, tl.full([TILE], float("-inf"), tl.float32), mask=mask)


@triton.jit
def penalise_kernel(
    logits, rows, ids, repetition, frequency, presence, counts, stride, size, TILE: tl.constexpr
) -> None:
    at = tl.program_id(0) * TILE + tl.arange(0, TILE)
    mask = at < size
    cell = logits + tl.load(rows + at, mask=mask) * stride + tl.load(ids + at, mask=mask)
    value = tl.load(cell, mask=mask, other=0.0)
    factor = tl.load(repetition + at, mask=mask, other=1.0)
    value = tl.where(value > 0, tl.div_rn(value, factor), value * factor)
    count = tl.load(counts + at, mask=mask, other=0.0)
    value -= tl.load(frequency + at, mask=mask, other=0.0) * count
    value -= tl.where(count > 0, tl.load(presence + at, mask=mask, other=0.0), 0.0)
    tl.store(cell, value, mask=mask)


def add_bias(logits: Tensor, rows: Tensor, ids: Tensor, bias: Tensor) -> None:
    """Add `bias` [n] float32 to the cells (rows, ids) [n] int64. Cells must differ."""
    size = rows.shape[0]
    if size:
        add_bias_kernel[(triton.cdiv(size, _TILE),)](
            logits,
            rows,
            ids,
            bias,
            logits.stride(0),
            size,
            TILE=_TILE,
            num_warps=4,
            enable_fp_fusion=False,
        )


def suppress(logits: Tensor, rows: Tensor, ids: Tensor) -> None:
    """Make the cells (rows, ids) [n] int64 impossible."""
    size = rows.shape[0]
    if size:
        suppress_kernel[(triton.cdiv(size, _TILE),)](
            logits,
            rows,
            ids,
            logits.stride(0),
            size,
            TILE=_TILE,
            num_warps=4,
            enable_fp_fusion=False,
        )


def penalise(
    logits: Tensor,
    rows: Tensor,
    ids: Tensor,
    *,
    repetition: Tensor,
    frequency: Tensor,
    presence: Tensor,
    output_counts: Tensor,
) -> None:
    """Penalise the cells (rows, ids) [n] int64; the columns float32 [n]. Cells must differ."""
    size = rows.shape[0]
    if size:
        penalise_kernel[(triton.cdiv(size, _TILE),)](
            logits,
            rows,
            ids,
            repetition,
            frequency,
            presence,
            output_counts,
            logits.stride(0),
            size,
            TILE=_TILE,
            num_warps=4,
            enable_fp_fusion=False,  # rounds as the readable version does
        )
