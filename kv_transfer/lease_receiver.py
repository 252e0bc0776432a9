"""The receiver's half of the lease protocol: whose blocks are written. Pure; see `lease`."""

from __future__ import annotations

import enum
from collections import Counter
from dataclasses import dataclass

from ..engine.request import WorkerId
from .events import Asked, Ended, Outcome, Released, Side
from .lease import Action, Extent, Send, Verify
from .messages import (
    Abort,
    Ask,
    Beat,
    Committed,
    Grant,
    Refuse,
    Sent,
    pack_blocks,
    pack_leases,
    unpack_leases,
)


class State(enum.Enum):
    ASKED = enum.auto()  # the worker has not answered yet
    GRANTED = enum.auto()  # the sender may write
    VERIFYING = enum.auto()  # all written; checksums are being compared
    REVOKED = enum.auto()  # over, but the sender may still write: quarantined


@dataclass(kw_only=True, slots=True)
class Receiving:
    """One lease as its receiver sees it."""

    lease: int
    pair: int
    peer: WorkerId
    state: State
    attempt: int = 0
    generation: int = 0
    blocks: tuple[int, ...] = ()
    units: tuple[int, ...] = ()  # of the blocks; once all is sent, those that are filled
    skip: int = 0  # blocks before these that were here already
    extent: Extent
    fetched: bool = False
    digest: int = 0  # of the tokens whose KV was fetched
    writes_here: bool = False  # this process writes the blocks itself (TCP)
    covered: list[int] | None = None  # units written, layer by layer; None: the sender counts
    deadline_s: float = 0.0
    begun_s: float = 0.0
    sent: Sent | None = None


class ReceiverTable:
    """Every lease this worker receives. `now_s` is any monotonic clock, the same in all calls."""

    def __init__(self, *, num_layers: int, block_bytes: int, lease_s: float) -> None:
        self._whole = Extent(num_layers, block_bytes)  # between pools that are alike
        self._lease_s = lease_s
        self._leases: dict[int, Receiving] = {}
        self._generation = 0
        self.refused: Counter[str] = Counter()

    def get(self, lease: int) -> Receiving | None:
        return self._leases.get(lease)

    def on_pair(self, pair: int) -> list[Receiving]:
        return [entry for entry in self._leases.values() if entry.pair == pair]

    # What the worker does

    def answer(
        self,
        asked: Asked,
        blocks: tuple[int, ...] | None,
        writes_here: bool,
        now_s: float,
        skip: int = 0,
        extent: Extent | None = None,
    ) -> list[Action] | None:
        """Settle an ask; None when the asker is gone, and the blocks were not taken. `extent`:
        what the pair moves, where that is not the whole of both pools."""
        entry = self._leases.get(asked.lease)
        if entry is None or entry.state is not State.ASKED:
            return None
        if (entry.pair, entry.attempt) != (asked.pair, asked.attempt):
            return None
        if blocks is None:
            del self._leases[asked.lease]
            return [Send(asked.pair, Refuse(asked.lease, entry.attempt))]
        assert skip + len(blocks) == asked.num_blocks, "a grant is for what was asked"
        entry.skip, entry.extent = skip, extent or self._whole
        return self._grant(entry, blocks, writes_here, now_s)

    def fetch(
        self,
        pair: int,
        peer: WorkerId,
        lease: int,
        blocks: tuple[int, ...],
        digest: int,
        writes_here: bool,
        now_s: float,
        skip: int = 0,
        extent: Extent | None = None,
    ) -> list[Action]:
        """Grant blocks for KV that is parked at the peer. `extent` as for `answer`."""
        assert lease not in self._leases, "a lease is fetched once at a time"
        entry = Receiving(
            lease=lease, pair=pair, peer=peer, state=State.ASKED, extent=extent or self._whole
        )
        entry.fetched, entry.digest, entry.skip = True, digest, skip
        self._leases[lease] = entry
        return self._grant(entry, blocks, writes_here, now_s)

    def abort(self, lease: int, outcome: Outcome, reason: str) -> list[Action]:
        """End a lease from this side; the sender is told, and its answer frees the blocks."""
        entry = self._leases.get(lease)
        if entry is None or entry.state is State.REVOKED:
            return []
        if entry.state is State.ASKED:
            del self._leases[lease]
            return [Send(entry.pair, Refuse(lease, entry.attempt))]
        notice = Abort(lease, entry.generation, entry.attempt, outcome.value, reason, False, False)
        return [Send(entry.pair, notice), *self._revoke(entry, outcome, reason, drained=False)]

    # What is written here (TCP)

    def begin_write(
        self, pair: int, lease: int, generation: int, layer: int, first: int, count: int
    ) -> tuple[int, ...] | None:
        """The units to write, or None where the write is refused. `layer` counts those that
        move, `first` and `count` are in units."""
        entry = self._find(pair, lease, generation)
        if entry is None or entry.state is not State.GRANTED or entry.covered is None:
            self.refused["late write"] += 1
            return None
        if layer >= entry.extent.num_layers or first + count > len(entry.units):
            self.refused["write out of range"] += 1
            return None
        if first > entry.covered[layer]:
            self.refused["write with a gap"] += 1
            return None
        return entry.units[first : first + count]

    def writable(self, pair: int, lease: int, generation: int) -> bool:
        """Whether a write that was begun may still go on."""
        entry = self._find(pair, lease, generation)
        return entry is not None and entry.state is State.GRANTED

    def wrote(
        self,
        pair: int,
        lease: int,
        generation: int,
        layer: int,
        first: int,
        count: int,
        now_s: float,
    ) -> list[Action]:
        """What `begin_write` allowed stands in the pool."""
        entry = self._find(pair, lease, generation)
        if entry is None or entry.state is not State.GRANTED or entry.covered is None:
            return []
        entry.covered[layer] = max(entry.covered[layer], first + count)
        return self._settle(entry, now_s) if entry.sent is not None else []

    # What the peer says

    def on_ask(self, pair: int, peer: WorkerId, message: Ask) -> Asked | Send | None:
        entry = self._leases.get(message.lease)
        if entry is None:
            entry = Receiving(
                lease=message.lease, pair=pair, peer=peer, state=State.ASKED, extent=self._whole
            )
            entry.attempt = message.attempt
            self._leases[message.lease] = entry
            return Asked(
                peer=peer,
                pair=pair,
                attempt=message.attempt,
                lease=message.lease,
                num_blocks=message.num_blocks,
                names=message.names,
            )
        if (entry.pair, entry.attempt) == (pair, message.attempt):
            self.refused["ask again"] += 1
            return None
        self.refused["ask for a lease in use"] += 1
        return Send(pair, Refuse(message.lease, message.attempt))

    def on_sent(self, pair: int, message: Sent, now_s: float) -> list[Action]:
        entry = self._find(pair, message.lease, message.generation)
        if entry is None or entry.state is not State.GRANTED or entry.sent is not None:
            self.refused["late sent"] += 1
            return []
        fault = _fault(entry, message)
        if fault:
            self.refused["wrong count or digest"] += 1
            return self.abort(entry.lease, Outcome.ABORTED, fault)
        entry.units = entry.units[: message.num_units]
        entry.sent = message
        return self._settle(entry, now_s)

    def verified(self, lease: int, generation: int, equal: bool, now_s: float) -> list[Action]:
        """The answer to `Verify`."""
        entry = self._leases.get(lease)
        if entry is None or entry.generation != generation or entry.state is not State.VERIFYING:
            return []
        if equal:
            return self._commit(entry, now_s)
        self.refused["wrong checksum"] += 1
        return self.abort(lease, Outcome.ABORTED, "block contents differ from what was sent")

    def on_abort(self, pair: int, message: Abort) -> list[Action]:
        entry = self._leases.get(message.lease)
        if entry is None or entry.pair != pair or not _concerns(message, entry):
            self.refused["late abort"] += 1
            return []
        if entry.state is State.ASKED:
            del self._leases[message.lease]
            return []
        return self._revoke(
            entry, Outcome(message.outcome), message.reason, drained=message.drained
        )

    def on_beat(self, pair: int, message: Beat, now_s: float) -> list[Action]:
        """Renew what the sender lists; end what it has seen and does not list."""
        known = unpack_leases(message.sending)
        actions: list[Action] = []
        for entry in self.on_pair(pair):
            if entry.state is State.ASKED or entry.generation > message.seen:
                continue
            if (entry.lease, entry.generation) in known:
                entry.deadline_s = now_s + self._lease_s
            else:
                self.refused["forgotten by the sender"] += 1
                reason = "forgotten by the sender"
                actions += self._revoke(entry, Outcome.LOST, reason, drained=True)
        return actions

    # What time and the network do

    def expire(self, now_s: float) -> list[Action]:
        actions: list[Action] = []
        for entry in list(self._leases.values()):
            if entry.state in (State.GRANTED, State.VERIFYING) and now_s >= entry.deadline_s:
                actions += self.abort(entry.lease, Outcome.EXPIRED, "not renewed")
        return actions

    def lost(self, pair: int, reason: str, *, drained: bool) -> list[Action]:
        """The connection is gone, or no longer believed in. `drained`: the writer said that it
        is out of everything, or is known to be dead. May be called again with more known."""
        actions: list[Action] = []
        for entry in self.on_pair(pair):
            if entry.state is State.ASKED:
                del self._leases[entry.lease]
            else:
                actions += self._revoke(entry, Outcome.LOST, reason, drained=drained)
        return actions

    def live(self, pair: int) -> bytes:
        """What the sender may still write, for a beat."""
        states = (State.GRANTED, State.VERIFYING)
        entries = [entry for entry in self.on_pair(pair) if entry.state in states]
        return pack_leases([(entry.lease, entry.generation) for entry in entries])

    def quarantined(self, pair: int) -> int:
        """Blocks that ended but may still be written."""
        return sum(len(e.blocks) for e in self.on_pair(pair) if e.state is State.REVOKED)

    def leases(self) -> list[int]:
        return list(self._leases)

    def _grant(
        self, entry: Receiving, blocks: tuple[int, ...], writes_here: bool, now_s: float
    ) -> list[Action]:
        self._generation += 1
        entry.state, entry.generation, entry.blocks = State.GRANTED, self._generation, blocks
        entry.writes_here, per_block = writes_here, entry.extent.mine
        entry.units = blocks
        if per_block > 1:
            entry.units = tuple([b * per_block + i for b in blocks for i in range(per_block)])
        entry.covered = [0] * entry.extent.num_layers if writes_here else None
        entry.begun_s, entry.deadline_s = now_s, now_s + self._lease_s
        packed = pack_blocks(blocks)
        grant = Grant(entry.lease, entry.generation, entry.attempt, packed, entry.skip)
        return [Send(entry.pair, grant)]

    def _find(self, pair: int, lease: int, generation: int) -> Receiving | None:
        entry = self._leases.get(lease)
        if entry is None or (entry.pair, entry.generation) != (pair, generation):
            return None
        return entry

    def _settle(self, entry: Receiving, now_s: float) -> list[Action]:
        """Commit what is all here; over TCP the sender's word may overtake the last blocks."""
        message = entry.sent
        assert message is not None, "a commit follows the sender's word"
        if entry.covered is not None and min(entry.covered) < len(entry.units):
            return []
        if not message.has_checksum:
            return self._commit(entry, now_s)
        entry.state = State.VERIFYING
        return [Verify(entry.pair, entry.lease, entry.generation, entry.units, message.checksum)]

    def _commit(self, entry: Receiving, now_s: float) -> list[Action]:
        assert entry.sent is not None, "a commit follows the sender's word"
        del self._leases[entry.lease]
        ended = Ended(
            lease=entry.lease,
            side=Side.RECEIVER,
            peer=entry.peer,
            outcome=Outcome.COMMITTED,
            reason="",
            blocks=entry.blocks,
            num_tokens=entry.sent.num_tokens,
            digest=entry.sent.digest,
            num_bytes=len(entry.units) * entry.extent.num_layers * entry.extent.unit_bytes,
            seconds=now_s - entry.begun_s,
            exposed_s=entry.sent.exposed_s,
        )
        return [Send(entry.pair, Committed(entry.lease, entry.generation)), ended]

    def _revoke(
        self, entry: Receiving, outcome: Outcome, reason: str, *, drained: bool
    ) -> list[Action]:
        """End a granted lease, once; give its blocks back as soon as that is safe, once."""
        actions: list[Action] = []
        if entry.state is not State.REVOKED:
            entry.state = State.REVOKED
            actions.append(
                Ended(
                    lease=entry.lease,
                    side=Side.RECEIVER,
                    peer=entry.peer,
                    outcome=outcome,
                    reason=reason,
                    blocks=entry.blocks,
                )
            )
        if drained or entry.writes_here:
            del self._leases[entry.lease]
            actions.append(Released(lease=entry.lease, blocks=entry.blocks))
        return actions


def _fault(entry: Receiving, message: Sent) -> str:
    """What keeps a finished transfer from being committed, or nothing."""
    num_layers, num_units = entry.extent.num_layers, _expected(entry, message.num_tokens)
    if (message.num_units, message.num_layers) != (num_units, num_layers):
        return (
            f"sent {message.num_units} blocks × {message.num_layers} layers, "
            f"granted {num_units} × {num_layers}"
        )
    if entry.fetched and message.digest != entry.digest:
        return "the KV is of other tokens than were fetched"
    return ""


def _expected(entry: Receiving, num_tokens: int) -> int:
    """Units that fill what was granted: larger blocks than the sender's end half filled."""
    extent = entry.extent
    if extent.mine == 1:
        return len(entry.units)
    wanted = extent.units(num_tokens) - entry.skip * extent.mine
    return wanted if -(-wanted // extent.mine) == len(entry.blocks) else -1


def _concerns(message: Abort, entry: Receiving) -> bool:
    """Generation 0 withdraws an ask, granted meanwhile or not; else the generation counts."""
    if message.generation == 0:
        return message.attempt == entry.attempt != 0
    return message.generation == entry.generation
