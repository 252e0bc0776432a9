"""The rows of one step as columns: where each token stands and where its KV lies."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np


@dataclass(frozen=True, kw_only=True, slots=True)
class Rows:
    """Row r computes positions [starts[r], starts[r] + counts[r]); tokens lie row after row."""

    starts: np.ndarray  # int64 [rows]
    counts: np.ndarray  # int64 [rows]
    tables: np.ndarray  # int32 [rows, width]: block ids, in order of position
    firsts: np.ndarray  # int64 [rows]: index of the row's first token
    row_of: np.ndarray  # int64 [tokens]
    positions: np.ndarray  # int64 [tokens]
    slots: np.ndarray  # int64 [tokens]: block * block_size + offset, where the token's KV goes

    @property
    def num_tokens(self) -> int:
        return len(self.positions)


def rows_of(starts: np.ndarray, counts: np.ndarray, tables: np.ndarray, block_size: int) -> Rows:
    """Columns from starts, counts (int64) and block tables (int32, contiguous)."""
    ends = np.cumsum(counts)
    firsts = ends - counts
    row_of = np.repeat(np.arange(len(counts)), counts)
    positions = np.arange(int(ends[-1])) + (starts - firsts)[row_of]
    blocks = tables[row_of, positions // block_size]
    return Rows(
        starts=starts,
        counts=counts,
        tables=tables,
        firsts=firsts,
        row_of=row_of,
        positions=positions,
        slots=blocks * np.int64(block_size) + positions % block_size,
    )
