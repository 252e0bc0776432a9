"""The lease protocol's vocabulary: what the two tables ask their owner to do.

A lease is one request's KV on its way from a sender's blocks into a receiver's. The tables
(`lease_sender`, `lease_receiver`) are pure: no clock, no socket, no thread; messages and times
come in, actions go out. They keep these laws under loss, duplication and reordering:

1. Each lease ends exactly once on each side (`Ended`).
2. A receiver's blocks come back only when nobody can write them: by commit, by the sender's
   word that its copier is out (`Abort.drained`), or by the sender's known death.
3. A commit means that every block of every layer was written under the granted generation.

The sender's rule behind the second: a grant is taken only if its generation is above all that
were seen from that peer, and it answers the ask of that very attempt or fetches parked KV. So
what a sender has disowned once it can never write later.
"""

from __future__ import annotations

from dataclasses import dataclass

from .events import Ended, Released
from .messages import Message


@dataclass(frozen=True, slots=True)
class Extent:
    """How a lease is counted. A unit is as many positions as the smaller side's blocks have:
    between blocks of one size it is a block."""

    num_layers: int  # that move
    unit_bytes: int  # of a unit in one layer, as far as it moves
    mine: int = 1  # units in a block of this side
    theirs: int = 1  # units in a block of the peer's
    step: int = 0  # positions a unit; needed where the sizes differ only

    @property
    def is_cut(self) -> bool:
        """Blocks are of different sizes: what a lease covers follows from its tokens."""
        return self.mine != self.theirs

    def units(self, num_tokens: int) -> int:
        return -(-num_tokens // self.step)


@dataclass(frozen=True, slots=True)
class Send:
    """Tell the peer at the other end of `pair`."""

    pair: int
    message: Message


@dataclass(frozen=True, slots=True)
class Answered:
    """Sender: the ask was settled."""

    lease: int
    granted: bool


@dataclass(frozen=True, slots=True)
class Start:
    """Sender: parked KV was granted. Push all of it and commit."""

    lease: int


@dataclass(frozen=True, slots=True)
class Stop:
    """Sender: get the copier out of this lease, then call `drained`."""

    pair: int
    lease: int


@dataclass(frozen=True, slots=True)
class Verify:
    """Receiver: compare the blocks' checksum, then call `verified`."""

    pair: int
    lease: int
    generation: int
    units: tuple[int, ...]  # blocks, where both sides' are of one size
    checksum: int


Action = Send | Answered | Start | Stop | Verify | Ended | Released
