"""What one step computes, and what it returned. Plain columns; knows neither torch nor ray."""

from __future__ import annotations

from collections.abc import Container
from dataclasses import dataclass, field

from .request import FinishReason, TokenLogprobs
from .sequence import Sequence


@dataclass(frozen=True, kw_only=True, slots=True)
class Batch:
    """Rows of one model step, prompts' chunks and decoding rows alike.

    Row i computes positions `[starts[i], starts[i] + counts[i])` of `sequences[i]`, whose blocks
    are already allocated. A row samples when it reaches its sequence's last known token.
    Decoding rows (count 1, sampling) stand before chunks.
    """

    sequences: list[Sequence]
    starts: list[int]
    counts: list[int]

    @property
    def num_rows(self) -> int:
        return len(self.sequences)

    @property
    def num_tokens(self) -> int:
        return sum(self.counts)

    def samples(self, row: int) -> bool:
        """Whether the row's last position is the last known one, so that a token follows."""
        return self.starts[row] + self.counts[row] == self.sequences[row].num_tokens


@dataclass(frozen=True, kw_only=True, slots=True)
class StepTimes:
    """Moments of a step in the compute thread, on `time.perf_counter`."""

    begun_s: float
    prepared_s: float  # the batch is there as columns
    computed_s: float  # the logits are
    ended_s: float


@dataclass(frozen=True, kw_only=True, slots=True)
class StepOutput:
    """What the runner returned: one entry a row, -1 where the row does not sample."""

    token_ids: list[int]
    logprobs: list[TokenLogprobs | None] | None = None  # None: no row asked
    times: StepTimes | None = None  # None: the runner does not tell


@dataclass(kw_only=True, slots=True)
class Progress:
    """What a scheduler made of a step's output. Columns, because it is sent as columns."""

    sequences: list[Sequence] = field(default_factory=list)  # rows that got a token, in order
    token_ids: list[int] = field(default_factory=list)
    rows: list[int] = field(default_factory=list)  # their row in the batch
    finished: list[tuple[Sequence, FinishReason]] = field(default_factory=list)

    def drop(self, sequence_ids: Container[str]) -> None:
        """Take out these sequences' tokens."""
        rows = list(zip(self.sequences, self.token_ids, self.rows, strict=True))
        kept = [row for row in rows if row[0].id not in sequence_ids]
        self.sequences = [sequence for sequence, _, _ in kept]
        self.token_ids = [token_id for _, token_id, _ in kept]
        self.rows = [row for _, _, row in kept]
