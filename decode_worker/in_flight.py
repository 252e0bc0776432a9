"""Steps that were given out and have not advanced, and who leaves when they have."""

from __future__ import annotations

from ..engine.batch import Batch
from ..engine.sequence import Sequence

MOST = 2  # the later one follows the earlier: it is given out before that one's tokens are known


class InFlight:
    """Oldest first. A sequence that a step computes keeps its row and its blocks until the last
    such step has advanced, for that writes to them; *doomed*, it is nobody's meanwhile."""

    def __init__(self, max_batch_size: int) -> None:
        self._max_batch_size = max_batch_size
        self._steps: list[tuple[Batch, int]] = []  # with the number of decoding rows
        self._doomed: dict[Sequence, int] = {}  # positions that are complete, and no surplus

    def __len__(self) -> int:
        return len(self._steps)

    @property
    def is_ahead(self) -> bool:
        """Whether there is a step that follows another."""
        return len(self._steps) == MOST

    @property
    def leaves_place(self) -> bool:
        """Whether there is a step that follows another, and a free place in it."""
        return self.is_ahead and self._steps[-1][0].num_rows < self._max_batch_size

    @property
    def doomed(self) -> set[str]:
        """Ids of those that leave."""
        return {sequence.id for sequence in self._doomed}

    def give_out(self, batch: Batch, num_decode_rows: int) -> Batch:
        assert not self.is_ahead, "advance() a step in flight first"
        self._steps.append((batch, num_decode_rows))
        return batch

    def take(self, batch: Batch) -> int:
        """The oldest step has come back; returns its number of decoding rows."""
        assert self._steps and batch is self._steps[0][0], "not the oldest step in flight"
        return self._steps.pop(0)[1]

    def take_back(self) -> None:
        """While it `is_ahead`: the step that follows has not begun, and does not run."""
        assert self.is_ahead, "only a step that follows another can be taken back"
        self._steps.pop()

    def decodes(self) -> Batch | None:
        """The step in flight, if it is the only one and all its rows decode."""
        if len(self._steps) != 1:
            return None
        batch, num_decode_rows = self._steps[0]
        return batch if num_decode_rows == batch.num_rows else None

    def computes(self, sequence: Sequence) -> bool:
        return any(sequence in batch.sequences for batch, _ in self._steps)

    def doom(self, sequence: Sequence) -> None:
        """It leaves with its last step. What is computed by now is complete, but no later step
        may count: its tokens are nobody's, or it failed."""
        self._doomed.setdefault(sequence, sequence.num_computed)

    def leaving(self) -> list[tuple[Sequence, int]]:
        """The doomed that no step computes any more, with their complete positions; forgotten
        here with that."""
        gone = [pair for pair in self._doomed.items() if not self.computes(pair[0])]
        for sequence, _ in gone:
            del self._doomed[sequence]
        return gone
