"""Tiles over rows of unequal length, laid out so that a device finds its row without the host.

Row r of a ragged batch holds entries `[starts[r], starts[r + 1])`. Its tiles of `SIZE` entries get
the numbers from `starts[r] // SIZE + r` on: distinct for every row, and at most
`total // SIZE + rows` in all, which the host knows without reading `starts`. A few numbers belong
to no entry; their programs leave at once.
"""

# What a kernel's values are, Triton's decorators hide from a type checker.
# pyright: reportCallIssue=false, reportArgumentType=false, reportOperatorIssue=false
# pyright: reportAttributeAccessIssue=false
# ruff: noqa: ANN001, ANN201
from __future__ import annotations

import triton
import triton.language as tl


def num_tiles(num_entries: int, num_rows: int, size: int) -> int:
    """Upper bound of the tile numbers in use: the grid."""
    return num_entries // size + num_rows


@triton.jit
def find_row(starts, num_rows, tile, SIZE: tl.constexpr):
    """The row that tile number `tile` belongs to: the last one whose first number is <= `tile`."""
    low = 0
    high = num_rows
    while high - low > 1:
        middle = (low + high) // 2
        if tl.load(starts + middle) // SIZE + middle <= tile:
            low = middle
        else:
            high = middle
    return low
