"""What one step computes, and what it returned. Plain columns; knows neither torch nor ray."""

from __future__ import annotations

from collections.abc import Container
from dataclasses import dataclass, field
from typing import Protocol

from .request import FinishReason, TokenLogprobs
from .sequence import Sequence


@dataclass(frozen=True, kw_only=True, slots=True)
class Batch:
    """Rows of one model step, prompts' chunks and decoding rows alike.

    Row i computes positions `[starts[i], starts[i] + counts[i])` of `sequences[i]`, whose blocks
    are already allocated. A row samples when it reaches its sequence's last known token.
    Decoding rows (count 1, sampling) stand before chunks.

    A batch may be given out before the tokens of the one before it are known (`follows`). Then
    every row decodes, and nothing but its place in `starts` and its blocks may be read of a
    sequence's progress: its owner appends the earlier token while this step runs.
    """

    sequences: list[Sequence]
    starts: list[int]
    counts: list[int]
    # Row i computes the token that row follows[i] of the step before chooses; None: all are known.
    follows: list[int] | None = None

    @property
    def num_rows(self) -> int:
        return len(self.sequences)

    @property
    def num_tokens(self) -> int:
        return sum(self.counts)

    def samples(self, row: int) -> bool:
        """Whether the row's last position is the last known one, so that a token follows."""
        if self.follows is not None:
            return True
        return self.starts[row] + self.counts[row] == self.sequences[row].num_tokens

    def tokens_of(self, former: StepOutput) -> list[int]:
        """What the rows compute, of a batch that follows the step that returned `former`."""
        assert self.follows is not None, "the rows' sequences know their tokens"
        return [former.token_ids[row] for row in self.follows]


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


class Underway(Protocol):
    """A step that a device computes by itself."""

    def output(self) -> StepOutput:
        """Wait for its tokens. Later steps may have been launched behind it."""
        ...


@dataclass(kw_only=True, slots=True)
class Progress:
    """What a scheduler made of a step's output. Columns, because it is sent as columns."""

    sequences: list[Sequence] = field(default_factory=list)  # rows that got a token, in order
    token_ids: list[int] = field(default_factory=list)
    rows: list[int] = field(default_factory=list)  # their row in the batch
    finished: list[tuple[Sequence, FinishReason]] = field(default_factory=list)

    def add(self, sequence: Sequence, token_id: int, row: int) -> None:
        self.sequences.append(sequence)
        self.token_ids.append(token_id)
        self.rows.append(row)

    def drop(self, sequence_ids: Container[str]) -> None:
        """Take out these sequences' tokens."""
        rows = list(zip(self.sequences, self.token_ids, self.rows, strict=True))
        kept = [row for row in rows if row[0].id not in sequence_ids]
        self.sequences = [sequence for sequence, _, _ in kept]
        self.token_ids = [token_id for _, token_id, _ in kept]
        self.rows = [row for _, _, row in kept]
