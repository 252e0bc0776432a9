"""Transfers at the speed of a pretended link, for workers that pretend to be other hardware."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable

from .copier import Push, Writer


class Lane:
    """One worker's way out: what it sends to all its peers goes one after the other.

    Shared by the threads of its copiers. The receiver's side is taken to be free.
    """

    def __init__(
        self,
        bytes_per_s: float,
        *,
        clock: Callable[[], float] = time.monotonic,
        sleep: Callable[[float], None] = time.sleep,
    ) -> None:
        self._bytes_per_s = bytes_per_s
        self._clock = clock
        self._sleep = sleep
        self._free_s = 0.0  # when all that was sent so far is through
        self._lock = threading.Lock()

    def carry(self, num_bytes: int) -> None:
        """Returns once they would have arrived. Late wake-ups do not add up."""
        with self._lock:
            self._free_s = max(self._free_s, self._clock()) + num_bytes / self._bytes_per_s
            arrived_s = self._free_s
        left_s = arrived_s - self._clock()
        if left_s > 0:
            self._sleep(left_s)


class PacedWriter:
    """A `Writer` whose bytes take a lane's time and then really move."""

    immediate = False  # the loop never waits for a lane

    def __init__(self, writer: Writer, lane: Lane, block_bytes: int) -> None:
        self.name = writer.name
        self.piece_bytes = writer.piece_bytes
        self._writer = writer
        self._lane = lane
        self._block_bytes = block_bytes

    @property
    def pending(self) -> bool:
        return self._writer.pending

    def write(self, push: Push, layers: range) -> None:
        self._lane.carry(len(push.source) * self._block_bytes * len(layers))
        self._writer.write(push, layers)

    def write_now(self, push: Push, layers: range) -> None:
        raise AssertionError("a paced writer is used in the copier's thread only")

    def flush(self) -> None:
        self._writer.flush()

    def write_canary(self, slot: int, pattern: bytes) -> None:
        self._writer.write_canary(slot, pattern)

    def leave(self) -> bool:
        return self._writer.leave()

    def close(self) -> None:
        self._writer.close()
