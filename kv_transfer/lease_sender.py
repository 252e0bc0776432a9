"""The sender's half of the lease protocol: whose blocks are read. Pure; see `lease`."""

from __future__ import annotations

import enum
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, field, replace

from ..engine.request import WorkerId
from .events import Ended, Outcome, Side
from .lease import Action, Answered, Extent, Send, Start, Stop
from .messages import (
    Abort,
    Ask,
    Beat,
    Committed,
    Discard,
    Grant,
    Refuse,
    Sent,
    pack_leases,
    unpack_blocks,
    unpack_leases,
)


class State(enum.Enum):
    ASKED = enum.auto()
    PARKED = enum.auto()
    GRANTED = enum.auto()  # being written
    SENT = enum.auto()  # all written; the receiver's word is awaited
    DRAINING = enum.auto()  # over, but the copier may still be in it


@dataclass(kw_only=True, slots=True)
class Sending:
    """One lease as its sender sees it."""

    lease: int
    num_blocks: int
    state: State
    deadline_s: float
    pair: int | None = None
    peer: WorkerId | None = None
    attempt: int = 0
    generation: int = 0
    target: tuple[int, ...] = ()  # the receiver's blocks
    skip: int = 0  # blocks of the KV that the receiver holds already, before the lease's own
    source: list[int] = field(default_factory=list)  # ours, as far as pushed
    extent: Extent  # how it is counted, once granted
    num_units: int = 0  # that go, once granted
    lead: int = 0  # units of the first block before them: the receiver holds these, too
    num_tokens: int = 0
    digest: int = 0
    begun_s: float = 0.0
    computed_s: float = 0.0  # when the step that computed the last of it was over
    num_bytes: int = 0
    outcome: Outcome = Outcome.ABORTED
    reason: str = ""


class SenderTable:
    """Every lease this worker sends. `now_s` is any monotonic clock, the same in all calls."""

    def __init__(self, *, num_layers: int, lease_s: float, park_s: float) -> None:
        self._whole = Extent(num_layers, 0)  # between pools that are alike
        self._lease_s = lease_s
        self._park_s = park_s
        self._leases: dict[int, Sending] = {}
        self._seen: dict[int, int] = {}  # pair -> highest generation
        self._attempts = 0
        self.refused: Counter[str] = Counter()

    def get(self, lease: int) -> Sending | None:
        return self._leases.get(lease)

    def on_pair(self, pair: int) -> list[Sending]:
        return [entry for entry in self._leases.values() if entry.pair == pair]

    # What the worker does

    def ask(
        self,
        pair: int,
        peer: WorkerId,
        lease: int,
        num_blocks: int,
        now_s: float,
        names: bytes = b"",
        num_tokens: int = 0,
        extent: Extent | None = None,
    ) -> list[Action]:
        """`extent`: what the pair moves, where that is not the whole of both pools; then the
        KV's `num_tokens` say how many of the receiver's blocks hold it."""
        assert lease not in self._leases, "a lease is asked for once at a time"
        extent = extent or self._whole
        self._attempts += 1
        self._leases[lease] = Sending(
            lease=lease,
            num_blocks=num_blocks,
            state=State.ASKED,
            deadline_s=now_s + self._lease_s,
            pair=pair,
            peer=peer,
            attempt=self._attempts,
            num_tokens=num_tokens,
            extent=extent,
        )
        if extent.is_cut:
            num_blocks = -(-extent.units(num_tokens) // extent.theirs)
        return [Send(pair, Ask(lease, self._attempts, num_blocks, names))]

    def withdraw(self, lease: int) -> list[Action]:
        """The ask is not waited for any longer. The lease has not begun."""
        entry = self._leases.get(lease)
        if entry is None or entry.state is not State.ASKED:
            return []
        del self._leases[lease]
        return [Send(_pair(entry), _abort(entry, Outcome.ABORTED, "ask withdrawn", drained=True))]

    def park(
        self, lease: int, blocks: list[int], num_tokens: int, digest: int, now_s: float
    ) -> None:
        assert lease not in self._leases, "a lease is parked once"
        self._leases[lease] = Sending(
            lease=lease,
            num_blocks=len(blocks),
            state=State.PARKED,
            deadline_s=now_s + self._park_s,
            source=blocks,
            num_tokens=num_tokens,
            digest=digest,
            extent=self._whole,
        )

    def fork(self, lease: int, legs: Sequence[int]) -> None:
        """What was parked waits under the ids of its legs, each to be fetched by itself."""
        entry = self._leases.pop(lease)
        assert entry.state is State.PARKED, "only what waits is forked"
        for leg in legs:
            assert leg not in self._leases, "a leg is forked once"
            self._leases[leg] = replace(entry, lease=leg, source=list(entry.source))

    def push(self, lease: int, blocks: list[int], first: int, now_s: float) -> Sending | None:
        """Note `blocks` as the lease's `[first, ...)`; None when the lease is over already."""
        entry = self._leases.get(lease)
        if entry is None or entry.state is not State.GRANTED:
            self.refused["push after the end"] += 1
            return None
        assert first <= len(entry.source), "a push leaves no gap"
        assert first + len(blocks) <= entry.num_blocks, "a push stays in its grant"
        entry.source[first : first + len(blocks)] = blocks
        self.touch(lease, now_s)
        return entry

    def touch(self, lease: int, now_s: float) -> None:
        """The lease made progress: its deadline moves."""
        entry = self._leases.get(lease)
        if entry is not None and entry.state in (State.GRANTED, State.SENT):
            entry.deadline_s = now_s + self._lease_s

    def sent(self, lease: int, checksum: int | None, now_s: float) -> Sent | None:
        """All is written: what to tell the receiver, None when the lease is over already."""
        entry = self._leases.get(lease)
        if entry is None or entry.state is not State.GRANTED:
            return None
        assert len(entry.source) == entry.num_blocks, "a commit follows the last push"
        entry.state = State.SENT
        self.touch(lease, now_s)
        return self.describe(entry, checksum, now_s)

    def describe(self, entry: Sending, checksum: int | None, now_s: float) -> Sent:
        return Sent(
            entry.lease,
            entry.generation,
            entry.num_units,
            entry.extent.num_layers,
            entry.num_tokens,
            entry.digest,
            checksum is not None,
            checksum or 0,
            max(0.0, now_s - entry.computed_s),
        )

    def abort(self, lease: int, outcome: Outcome, reason: str) -> list[Action]:
        """End a lease from this side. Its `Ended` follows when the copier is out."""
        entry = self._leases.get(lease)
        if entry is None or entry.state is State.DRAINING:
            return []
        if entry.state is State.ASKED:
            return [*self.withdraw(lease), Answered(lease, False)]
        if entry.state is State.PARKED:
            return self._end(entry, outcome, reason)
        notice = Send(_pair(entry), _abort(entry, outcome, reason, drained=False))
        return [notice, *self._drain(entry, outcome, reason)]

    def drained(self, lease: int) -> list[Action]:
        """The copier is out of a lease that was stopped."""
        entry = self._leases.get(lease)
        if entry is None or entry.state is not State.DRAINING:
            return []
        notice = Send(_pair(entry), _abort(entry, entry.outcome, entry.reason, drained=True))
        return [notice, *self._end(entry, entry.outcome, entry.reason)]

    # What the peer says

    def on_grant(
        self,
        pair: int,
        peer: WorkerId,
        message: Grant,
        now_s: float,
        extent: Extent | None = None,
    ) -> list[Action]:
        """`extent` as for `ask`."""
        entry = self._leases.get(message.lease)
        fresh = message.generation > self._seen.get(pair, 0)
        self._see(pair, message.generation)
        if not fresh:
            self.refused["stale grant"] += 1
            return []
        target = unpack_blocks(message.blocks)
        extent = extent or self._whole
        num_units = 0
        if entry is not None and _answers(entry, pair, message):
            num_units = _covered(entry, extent, message.skip, len(target))
        if entry is None or num_units <= 0:
            self.refused["grant of nothing"] += 1
            reason = "not held here" if entry is None else f"not {entry.num_blocks} blocks, or held"
            return [Send(pair, _disown(message.lease, message.generation, reason))]
        was_parked = entry.state is State.PARKED
        entry.pair, entry.peer, entry.target = pair, peer, target
        entry.extent, entry.num_units = extent, num_units
        entry.skip, entry.lead = divmod(message.skip * extent.theirs, extent.mine)
        entry.num_blocks -= entry.skip
        entry.source = entry.source[entry.skip :]
        entry.generation, entry.state = message.generation, State.GRANTED
        entry.begun_s, entry.deadline_s = now_s, now_s + self._lease_s
        return [Start(entry.lease) if was_parked else Answered(entry.lease, True)]

    def on_refuse(self, pair: int, message: Refuse) -> list[Action]:
        entry = self._leases.get(message.lease)
        if entry is None or (entry.pair, entry.attempt) != (pair, message.attempt):
            self.refused["late refusal"] += 1
            return []
        if entry.state is not State.ASKED:
            self.refused["late refusal"] += 1
            return []
        del self._leases[message.lease]
        return [Answered(message.lease, False)]

    def on_committed(self, pair: int, message: Committed, now_s: float) -> list[Action]:
        entry = self._find(pair, message.lease, message.generation)
        if entry is None or entry.state is not State.SENT:
            self.refused["late commit"] += 1
            return []
        return self._end(entry, Outcome.COMMITTED, "", now_s)

    def on_abort(self, pair: int, message: Abort) -> list[Action]:
        """The receiver ended it, and needs to hear when the copier is out."""
        self._see(pair, message.generation)
        entry = self._find(pair, message.lease, message.generation)
        if entry is None:
            self.refused["late abort"] += 1
            return [Send(pair, _disown(message.lease, message.generation, "not held here"))]
        return self._drain(entry, Outcome(message.outcome), message.reason)

    def on_discard(self, message: Discard) -> list[Action]:
        """Only what is parked still: granted KV ends by its grant."""
        entry = self._leases.get(message.lease)
        if entry is None or entry.state is not State.PARKED:
            self.refused["late discard"] += 1
            return []
        return self._end(entry, Outcome.ABORTED, "discarded by decode")

    def on_beat(self, pair: int, message: Beat) -> list[Action]:
        """End what the receiver does not know any more."""
        known = unpack_leases(message.receiving)
        actions: list[Action] = []
        for entry in self.on_pair(pair):
            live = entry.state in (State.GRANTED, State.SENT)
            if live and (entry.lease, entry.generation) not in known:
                self.refused["forgotten by the receiver"] += 1
                actions += self._drain(entry, Outcome.LOST, "forgotten by the receiver")
        return actions

    # What time and the network do

    def expire(self, now_s: float) -> list[Action]:
        actions: list[Action] = []
        for entry in list(self._leases.values()):
            if now_s < entry.deadline_s or entry.state is State.DRAINING:
                continue
            what = "nobody fetched it" if entry.state is State.PARKED else "no progress"
            actions += self.abort(entry.lease, Outcome.EXPIRED, what)
        return actions

    def lost(self, pair: int, reason: str) -> list[Action]:
        """The connection is gone."""
        self._seen.pop(pair, None)
        actions: list[Action] = []
        for entry in self.on_pair(pair):
            if entry.state is State.ASKED:
                del self._leases[entry.lease]
                actions.append(Answered(entry.lease, False))
            else:
                actions += self._drain(entry, Outcome.LOST, reason)
        return actions

    def live(self, pair: int) -> bytes:
        """What this side may still write, for a beat."""
        states = (State.GRANTED, State.SENT, State.DRAINING)
        entries = [e for e in self.on_pair(pair) if e.state in states]
        return pack_leases([(entry.lease, entry.generation) for entry in entries])

    def seen(self, pair: int) -> int:
        return self._seen.get(pair, 0)

    def leases(self) -> list[int]:
        return list(self._leases)

    def _see(self, pair: int, generation: int) -> None:
        self._seen[pair] = max(self._seen.get(pair, 0), generation)

    def _find(self, pair: int, lease: int, generation: int) -> Sending | None:
        entry = self._leases.get(lease)
        if entry is None or (entry.pair, entry.generation) != (pair, generation):
            return None
        return entry

    def _drain(self, entry: Sending, outcome: Outcome, reason: str) -> list[Action]:
        if entry.state is State.DRAINING:
            return []
        entry.state, entry.outcome, entry.reason = State.DRAINING, outcome, reason
        return [Stop(_pair(entry), entry.lease)]

    def _end(
        self, entry: Sending, outcome: Outcome, reason: str, now_s: float | None = None
    ) -> list[Action]:
        del self._leases[entry.lease]
        return [
            Ended(
                lease=entry.lease,
                side=Side.SENDER,
                peer=entry.peer,
                outcome=outcome,
                reason=reason,
                blocks=tuple(entry.source),
                num_tokens=entry.num_tokens,
                digest=entry.digest,
                num_bytes=entry.num_bytes,
                seconds=0.0 if now_s is None else now_s - entry.begun_s,
                exposed_s=0.0 if now_s is None else max(0.0, now_s - entry.computed_s),
            )
        ]


def _pair(entry: Sending) -> int:
    assert entry.pair is not None, "only a parked lease has no peer"
    return entry.pair


def _answers(entry: Sending, pair: int, message: Grant) -> bool:
    """Whether a grant is for the lease as it stands."""
    if entry.state is State.PARKED:
        return message.attempt == 0
    asked = (entry.pair, entry.attempt) == (pair, message.attempt)
    return entry.state is State.ASKED and asked


def _covered(entry: Sending, extent: Extent, skip: int, count: int) -> int:
    """Units behind the receiver's `skip` blocks, if `count` more of its blocks hold all the KV;
    else 0."""
    num_units, num_blocks = entry.num_blocks, entry.num_blocks
    if extent.is_cut:
        num_units = extent.units(entry.num_tokens)
        num_blocks = -(-num_units // extent.theirs)
    return num_units - skip * extent.theirs if skip + count == num_blocks else 0


def _abort(entry: Sending, outcome: Outcome, reason: str, *, drained: bool) -> Abort:
    return Abort(entry.lease, entry.generation, entry.attempt, outcome.value, reason, True, drained)


def _disown(lease: int, generation: int, reason: str) -> Abort:
    """Nothing is, or ever will be, written under this generation."""
    return Abort(lease, generation, 0, Outcome.ABORTED.value, reason, True, True)
