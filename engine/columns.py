"""What one model step computes, as columns of numbers: all that a rank needs to know of it."""

from __future__ import annotations

import struct
from dataclasses import dataclass

import numpy as np

from .batch import Batch, StepOutput

_HEADER = struct.Struct("<4I")  # rows, tokens, width of the block tables, wanted


@dataclass(frozen=True, kw_only=True, slots=True)
class Columns:
    """Row r computes `counts[r]` tokens from position `starts[r]`; tokens lie row after row."""

    token_ids: np.ndarray  # int64 [tokens]
    starts: np.ndarray  # int64 [rows]
    counts: np.ndarray  # int64 [rows]
    prompts: np.ndarray  # int64 [rows]: lengths of the client's own prompts
    tables: np.ndarray  # int32 [rows, width]: block ids
    wanted: np.ndarray  # int64: tokens whose logits are wanted, ascending

    @property
    def num_tokens(self) -> int:
        return len(self.token_ids)

    def to_bytes(self) -> bytes:
        header = _HEADER.pack(
            len(self.starts), len(self.token_ids), self.tables.shape[1], len(self.wanted)
        )
        wide = (self.token_ids, self.starts, self.counts, self.prompts, self.wanted)
        return b"".join((header, *(column.tobytes() for column in wide), self.tables.tobytes()))

    @staticmethod
    def from_bytes(data: bytes) -> Columns:
        rows, tokens, width, wanted = _HEADER.unpack_from(data)
        wide = np.frombuffer(data, np.int64, tokens + 3 * rows + wanted, _HEADER.size).copy()
        at = _HEADER.size + wide.nbytes
        ends = np.cumsum([tokens, rows, rows, rows])
        token_ids, starts, counts, prompts, last = np.split(wide, ends)
        return Columns(
            token_ids=token_ids,
            starts=starts,
            counts=counts,
            prompts=prompts,
            tables=np.frombuffer(data, np.int32, rows * width, at).reshape(rows, width).copy(),
            wanted=last,
        )

    def split(self, parts: int) -> list[Columns]:
        """The same step as up to `parts` smaller ones in order, about equally many tokens each.

        A row may be cut: its later part then attends to what its earlier part wrote.
        """
        bounds = [self.num_tokens * part // parts for part in range(parts + 1)]
        return [self._between(*span) for span in zip(bounds, bounds[1:], strict=False)]

    def _between(self, low: int, high: int) -> Columns:
        ends = np.cumsum(self.counts)
        firsts = ends - self.counts
        rows = np.flatnonzero((ends > low) & (firsts < high))
        begins, stops = np.maximum(firsts[rows], low), np.minimum(ends[rows], high)
        wanted = self.wanted[(self.wanted >= low) & (self.wanted < high)]
        return Columns(
            token_ids=self.token_ids[low:high],
            starts=self.starts[rows] + begins - firsts[rows],
            counts=stops - begins,
            prompts=self.prompts[rows],
            tables=self.tables[rows],
            wanted=wanted - low,
        )


def columns_of(
    batch: Batch, sampling: list[int], block_size: int, former: StepOutput | None = None
) -> Columns:
    """A batch's columns; `sampling` are the rows whose last position's logits are wanted.

    `former` is what the step before returned, if the batch follows it.
    """
    token_ids = _known_tokens(batch) if former is None else batch.tokens_of(former)
    counts = np.array(batch.counts, dtype=np.int64)
    prompts = [sequence.num_prompt_tokens for sequence in batch.sequences]
    return Columns(
        token_ids=np.array(token_ids, dtype=np.int64),
        starts=np.array(batch.starts, dtype=np.int64),
        counts=counts,
        prompts=np.array(prompts, dtype=np.int64),
        tables=_tables(batch, block_size),
        wanted=(np.cumsum(counts) - 1)[sampling],
    )


def _known_tokens(batch: Batch) -> list[int]:
    assert batch.follows is None, "its tokens are what the step before returned"
    token_ids: list[int] = []
    for sequence, start, count in zip(batch.sequences, batch.starts, batch.counts, strict=True):
        assert sequence.tokens is not None, "a simulated sequence has no tokens to compute"
        if count == 1:
            token_ids.append(sequence.tokens[start])
        else:
            token_ids += sequence.tokens[start : start + count]
    return token_ids


def _tables(batch: Batch, block_size: int) -> np.ndarray:  # int32 [rows, width]
    """Block tables as one array; entries past a row's context are 0 and never read."""
    needed = [
        -(-(start + count) // block_size)
        for start, count in zip(batch.starts, batch.counts, strict=True)
    ]
    tables = np.zeros((batch.num_rows, max(needed)), dtype=np.int32)
    for row, (sequence, blocks) in enumerate(zip(batch.sequences, needed, strict=True)):
        assert len(sequence.blocks) >= blocks, "a row's blocks are allocated before it runs"
        tables[row, :blocks] = sequence.blocks[:blocks]
    return tables
