"""The state of decoding rows between steps, where it stays: on the device.

A row is a slot of a CUDA graph's batch. Its numbers stand in one array `columns` int64
[NUM_FIELDS, max_rows], floating-point ones as the bits of a float64, so that a step's changes are
one upload. A row whose position is below zero is padding: it has no context and writes no KV.

The readable versions are in `reference`: `apply_changes`, `locate` and `advance`.
"""

# What a kernel's values are, Triton's decorators hide from a type checker.
# pyright: reportCallIssue=false, reportArgumentType=false, reportOperatorIssue=false
# pyright: reportAttributeAccessIssue=false
# ruff: noqa: ANN001
from __future__ import annotations

import enum

import triton
import triton.language as tl
from torch import Tensor

_TILE = 256


class Field(enum.IntEnum):
    """Rows of `columns`."""

    TOKEN = 0  # the next one to compute
    POSITION = 1  # where it stands; -1: padding
    SEED = 2
    TOP_K = 3
    TOP_P = 4  # float64
    FLOOR = 5  # smallest sampling key that min_p leaves
    TEMPERATURE = 6  # float64; 0: greedy


NUM_FIELDS = len(Field)
_POSITION = tl.constexpr(int(Field.POSITION))


@triton.jit(do_not_specialize=["num_rows", "num_entries"])
def apply_changes_kernel(
    columns, tables, changes, num_rows, num_entries, max_rows,
    FIELDS: tl.constexpr, TILE: tl.constexpr,
) -> None:  # fmt: skip
    """`changes` int64: [num_rows] slots, [FIELDS, num_rows] values, [num_entries] places in the
    flattened tables, [num_entries] block ids."""
    at = tl.program_id(0) * TILE + tl.arange(0, TILE)
    is_row = at < num_rows
    slot = tl.load(changes + at, mask=is_row, other=0)
    for field in tl.static_range(FIELDS):  # pyright: ignore[reportGeneralTypeIssues]
        value = tl.load(changes + (1 + field) * num_rows + at, mask=is_row, other=0)
        tl.store(columns + field * max_rows + slot, value, mask=is_row)
    entries = changes + (1 + FIELDS) * num_rows
    is_entry = at < num_entries
    place = tl.load(entries + at, mask=is_entry, other=0)
    block = tl.load(entries + num_entries + at, mask=is_entry, other=0)
    tl.store(tables + place, block.to(tl.int32), mask=is_entry)


@triton.jit(do_not_specialize=["num_rows"])
def locate_kernel(
    kv_slots, lengths, angles, columns, tables, num_rows, max_rows, table_stride,
    BLOCK_SIZE: tl.constexpr, TILE: tl.constexpr,
) -> None:  # fmt: skip
    row = tl.program_id(0) * TILE + tl.arange(0, TILE)
    inside = row < num_rows
    position = tl.load(columns + _POSITION * max_rows + row, mask=inside, other=-1)
    is_live = position >= 0
    here = tl.where(is_live, position, 0)
    entry = tables + row.to(tl.int64) * table_stride + here // BLOCK_SIZE
    block = tl.load(entry, mask=is_live, other=0).to(tl.int64)
    kv_slot = block * BLOCK_SIZE + here % BLOCK_SIZE
    tl.store(kv_slots + row, tl.where(is_live, kv_slot, -1), mask=inside)
    tl.store(lengths + row, (position + 1).to(tl.int32), mask=inside)
    tl.store(angles + row, here, mask=inside)


@triton.jit(do_not_specialize=["num_rows"])
def advance_kernel(
    columns, reported, token_ids, maxima, num_rows, max_rows, TILE: tl.constexpr
) -> None:
    row = tl.program_id(0) * TILE + tl.arange(0, TILE)
    position = tl.load(columns + _POSITION * max_rows + row, mask=row < num_rows, other=-1)
    is_live = position >= 0
    token = tl.load(token_ids + row, mask=is_live, other=0)
    largest = tl.load(maxima + row, mask=is_live, other=0.0)
    tl.store(columns + row, token, mask=is_live)
    tl.store(columns + _POSITION * max_rows + row, position + 1, mask=is_live)
    is_finite = largest - largest == 0  # NaN minus NaN and inf minus inf are NaN
    tl.store(reported + row, tl.where(is_finite, token, -1), mask=is_live)


def apply_changes(
    columns: Tensor, tables: Tensor, changes: Tensor, *, num_rows: int, num_entries: int
) -> None:
    """Write `num_rows` rows' fields and `num_entries` block ids, packed in `changes` int64.

    `columns` [NUM_FIELDS, max_rows]; `tables` int32 [max_rows, width], contiguous. Slots and
    places must differ.
    """
    assert columns.is_contiguous() and tables.is_contiguous()
    most = max(num_rows, num_entries)
    if most:
        apply_changes_kernel[(triton.cdiv(most, _TILE),)](
            columns, tables, changes, num_rows, num_entries, columns.shape[1],
            FIELDS=NUM_FIELDS, TILE=_TILE, num_warps=4, enable_fp_fusion=False,
        )  # fmt: skip


def locate(
    columns: Tensor, tables: Tensor, kv_slots: Tensor, lengths: Tensor, angles: Tensor,
    *, block_size: int,
) -> None:  # fmt: skip
    """Where each of the first rows' token goes and what it sees.

    Writes `kv_slots` int64 (-1: nowhere), `lengths` int32 with the token itself (0: padding) and
    `angles` int64 (the position, 0 for padding), each [rows].
    """
    rows = kv_slots.shape[0]
    locate_kernel[(triton.cdiv(rows, _TILE),)](
        kv_slots, lengths, angles, columns, tables, rows, columns.shape[1], tables.stride(0),
        BLOCK_SIZE=block_size, TILE=_TILE, num_warps=4, enable_fp_fusion=False,
    )  # fmt: skip


def advance(columns: Tensor, reported: Tensor, token_ids: Tensor, maxima: Tensor) -> None:
    """Each live row's next token is the chosen one, a position on.

    `token_ids` int64 and `maxima` float32 [rows], as `sampling.argmax` and `draw` leave them;
    `reported` int64 [rows] gets the token, or -1 where the row's logits had no finite maximum.
    Padding is left as it is.
    """
    rows = token_ids.shape[0]
    advance_kernel[(triton.cdiv(rows, _TILE),)](
        columns, reported, token_ids, maxima, rows, columns.shape[1],
        TILE=_TILE, num_warps=4, enable_fp_fusion=False,
    )  # fmt: skip
