"""What a KV endpoint tells its worker, and the slice of the configuration it takes."""

from __future__ import annotations

import enum
from dataclasses import dataclass

from ..engine.errors import InvalidConfig, PhasewiseError, Unavailable
from ..engine.request import WorkerId

TRANSPORTS = ("shm", "tcp", "gloo", "nccl", "cuda_ipc")


class Outcome(enum.StrEnum):
    """How a lease ended. Every lease ends exactly once on each side."""

    COMMITTED = "committed"  # the receiver has every block of every layer
    ABORTED = "aborted"  # one side gave it up
    EXPIRED = "expired"  # no progress, or no renewal, for `lease_s`
    LOST = "lost"  # the peer died, hung or was cut off


class Side(enum.StrEnum):
    SENDER = "sender"  # its pool is read: the prefill worker
    RECEIVER = "receiver"  # its pool is written: the decode worker


class PeerUnavailable(Unavailable):
    """No connection to a peer: it is gone, hung, or its circuit breaker is open."""


class PeerRefused(PhasewiseError):
    """A handshake that can never succeed: another layout, model, protocol or incarnation."""


@dataclass(frozen=True, kw_only=True, slots=True)
class TransferConfig:
    """An endpoint's slice of the cluster file. Times in seconds."""

    transport: str = "auto"  # auto, or one of TRANSPORTS
    lease_s: float = 10.0  # a granted lease without progress ends after this
    park_s: float = 60.0  # KV that nobody fetched is dropped after this
    silence_s: float = 1.0  # within it a connected peer that says nothing is lost
    answer_s: float = 1.0  # longest wait for the answer to `ask`, and for a handshake
    nccl_s: float = 15.0  # the same, where it ends in an NCCL group, whose first takes seconds
    host: str = "127.0.0.1"  # where TCP listens, as peers reach it
    checksum: bool = False  # compare block contents before a commit; either side may ask for it
    small_bytes: int = 512 << 10  # KV up to this size is sent whole at commit, not layer by layer
    pace_bytes_per_s: float = 0.0  # of all that this worker sends; 0: as fast as it goes

    def __post_init__(self) -> None:
        if self.transport not in ("auto", *TRANSPORTS):
            known = f"use auto or one of {', '.join(TRANSPORTS)}"
            raise InvalidConfig("transfer.transport", f"unknown {self.transport!r}", known)
        for name in ("lease_s", "park_s", "silence_s", "answer_s", "nccl_s"):
            if getattr(self, name) <= 0:
                raise InvalidConfig(f"transfer.{name}", "must be positive", "give seconds > 0")


@dataclass(frozen=True, kw_only=True, slots=True)
class Asked:
    """A prefill worker wants to write `num_blocks` blocks here. Settle it with `answer`."""

    peer: WorkerId
    pair: int  # the connection it came by; 0: several, for one lease
    attempt: int  # tells this ask from an earlier one for the same lease
    lease: int
    num_blocks: int
    names: bytes = b""  # of the first blocks, as the asker gave them


@dataclass(frozen=True, kw_only=True, slots=True)
class Ended:
    """The one terminal event of a lease on this side.

    Sender: nothing reads `blocks` for this lease any more; they may be released. Receiver,
    committed: the KV of `num_tokens` tokens stands in `blocks`; compare `digest` with
    `token_digest` of the request before use. Receiver, otherwise: the request must be served
    another way, and `Released` gives the blocks back, now or when the writer is out of them.
    """

    lease: int
    side: Side
    peer: WorkerId | None  # None: parked, and nobody came
    outcome: Outcome
    reason: str
    blocks: tuple[int, ...]  # in this side's pool, in token order
    num_tokens: int = 0
    digest: int = 0
    num_bytes: int = 0
    seconds: float = 0.0  # from the grant to this event
    exposed_s: float = 0.0  # from the end of its computation to the commit; committed only


@dataclass(frozen=True, kw_only=True, slots=True)
class Released:
    """Receiver only: nobody can write these blocks any more. Once for each lease that ended
    other than committed, right after its `Ended` or, when a writer over shared memory hangs,
    once it has answered or died."""

    lease: int
    blocks: tuple[int, ...]


@dataclass(frozen=True, kw_only=True, slots=True)
class PairStatus:
    """One peer as `status` shows it."""

    peer: WorkerId
    transport: str
    ready: bool
    num_bytes: int  # sent and received
    transfers: int  # committed
    failures: int  # ended otherwise
    exposed_s: float  # from the end of the computation to the commit, over all transfers
    live_leases: int
    quarantined_blocks: int  # ended, but the writer has not acknowledged yet
