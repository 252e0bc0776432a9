"""Leases in parts: what became of each part, and from that what becomes of the whole.

A worker's lease is a part a rank, a rank's is a leg a counterpart. It is committed when every part
is and fails as a whole when one fails; its blocks are released when no part's writer is left.
"""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Coroutine, Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

from ..engine.request import TransferAddress
from .events import Asked, Ended, Outcome, PeerUnavailable, Released, Side

Event = Asked | Ended | Released
SEVERAL = 0  # as the number of the pair by which an ask came
STALE_S = 10.0  # asks that not every part has brought are dropped after this


class PartSilent(PeerUnavailable):
    """A part has not said in time whether it has begun: it may, or may still do so."""


@dataclass(kw_only=True, slots=True)
class PartedLease:
    """One lease, over its parts."""

    lease: int
    side: Side
    blocks: tuple[int, ...]
    parts: set[int]  # those that hold something of it
    source: TransferAddress | None = None  # where it is fetched from
    ended: dict[int, Ended] = field(default_factory=dict)
    unreleased: set[int] = field(default_factory=set)  # failed, and may still be written to
    unfetched: set[int] = field(default_factory=set)  # sure to hold nothing of it
    is_told: bool = False


class LeaseParts:
    """All of one owner's. `tell` takes what became of a whole lease. Where a part has failed while
    others go on, `abort(lease)` ends these, and `discard(source, lease)` what was to be fetched."""

    def __init__(
        self,
        tell: Callable[[Event], None],
        abort: Callable[[int], None],
        discard: Callable[[TransferAddress, int], None],
    ) -> None:
        self._tell, self._abort, self._discard = tell, abort, discard
        self._leases: dict[tuple[int, Side], PartedLease] = {}

    def open(
        self, lease: int, side: Side, blocks: Sequence[int], parts: Iterable[int]
    ) -> PartedLease:
        entry = PartedLease(lease=lease, side=side, blocks=tuple(blocks), parts=set(parts))
        self._leases[lease, side] = entry
        return entry

    def get(self, lease: int, side: Side) -> PartedLease | None:
        return self._leases.get((lease, side))

    def forget(self, lease: int, side: Side) -> None:
        """It has not begun on any part."""
        self._leases.pop((lease, side), None)

    async def begin(
        self, lease: int, side: Side, calls: Mapping[int, Coroutine[Any, Any, Any]]
    ) -> bool:
        """A call a part. Whether it has begun on any; where only some have, it begins and ends.
        Raises what every part raised."""
        try:
            results = await asyncio.gather(*calls.values(), return_exceptions=True)
        except asyncio.CancelledError:
            self._abort(lease)  # on every part that has begun
            self.forget(lease, side)  # whoever began to ask wants no more of it
            raise
        return self._began(lease, side, dict(zip(calls, results, strict=True)))

    def _began(self, lease: int, side: Side, results: dict[int, object]) -> bool:
        failed = [part for part, result in results.items() if _is_failure(result)]
        silent = {part for part in failed if isinstance(results[part], PartSilent)}
        if len(failed) == len(results) and not silent:
            self.forget(lease, side)
            errors = [result for result in results.values() if isinstance(result, BaseException)]
            if errors:
                raise errors[0]
            return False
        for part in failed:
            self.never_began(part, lease, side, is_known=part not in silent)
        return True

    def never_began(self, part: int, lease: int, side: Side, *, is_known: bool = True) -> None:
        """This part has nothing of a lease that others have: it ends for all. Where that is not
        known, the blocks wait for `was_not_fetched`, or for the part's own end."""
        entry = self._leases.get((lease, side))
        if entry is not None:
            reason = "a part did not reach its counterpart"
            ended = Ended(
                lease=lease, side=side, peer=None, outcome=Outcome.LOST, reason=reason, blocks=()
            )
            may_begin = not is_known and part not in entry.unfetched
            self._end(part, entry, ended, is_open=may_begin and side is Side.RECEIVER)

    def was_not_fetched(self, part: int, lease: int) -> None:
        """Nor will be: for sure, be the part taken for silent before or after."""
        entry = self._leases.get((lease, Side.RECEIVER))
        if entry is not None:
            entry.unfetched.add(part)
            self.is_released(part, lease)

    def has_ended(self, part: int, lease: int, ended: Ended) -> None:
        entry = self._leases.get((lease, ended.side))
        if entry is not None and part in entry.unreleased and part in entry.ended:
            if ended.outcome is Outcome.COMMITTED:  # the word of one that was taken for silent
                self.is_released(part, lease)
        elif entry is not None and part in entry.parts:
            is_open = ended.outcome is not Outcome.COMMITTED and ended.side is Side.RECEIVER
            self._end(part, entry, ended, is_open=is_open)

    def is_released(self, part: int, lease: int) -> None:
        entry = self._leases.get((lease, Side.RECEIVER))
        if entry is not None:
            entry.unreleased.discard(part)
            self._release(entry)

    def leave_out(self, parts: Iterable[int], lease: int) -> None:
        """Nothing is read of these for a sender's lease, and nobody will."""
        entry = self._leases.get((lease, Side.SENDER))
        if entry is not None:
            entry.parts -= set(parts)
            if entry.ended.keys() >= entry.parts:
                self._tell_end(entry)

    def _end(self, part: int, entry: PartedLease, ended: Ended, *, is_open: bool) -> None:
        """One part is over; `is_open`: its blocks may still be written to."""
        fails_first = ended.outcome is not Outcome.COMMITTED and not any(
            other.outcome is not Outcome.COMMITTED for other in entry.ended.values()
        )
        entry.ended[part] = ended
        if is_open:
            entry.unreleased.add(part)
        if entry.ended.keys() >= entry.parts:
            self._tell_end(entry)
        elif fails_first:
            self._abort(entry.lease)
        if fails_first and entry.source is not None:  # a part that was never fetched waits there
            self._discard(entry.source, entry.lease)

    def _tell_end(self, entry: PartedLease) -> None:
        parts = list(entry.ended.values())
        failures = [part for part in parts if part.outcome is not Outcome.COMMITTED]
        worst = failures[0] if failures else parts[0]
        if not failures and len({(part.digest, part.num_tokens) for part in parts}) > 1:
            worst = replace(worst, outcome=Outcome.ABORTED, reason="the parts' KV differs")
        ended = replace(
            worst,
            lease=entry.lease,
            peer=next((part.peer for part in parts if part.peer is not None), None),
            blocks=next((part.blocks for part in parts if part.blocks), entry.blocks),
            num_bytes=sum(part.num_bytes for part in parts),
            seconds=max(part.seconds for part in parts),
            exposed_s=max(part.exposed_s for part in parts),
        )
        self._tell(ended)
        entry.is_told = True
        if entry.side is Side.SENDER or ended.outcome is Outcome.COMMITTED:
            del self._leases[entry.lease, entry.side]
        else:
            entry.blocks = ended.blocks
            self._release(entry)

    def _release(self, entry: PartedLease) -> None:
        if entry.is_told and not entry.unreleased:
            del self._leases[entry.lease, Side.RECEIVER]
            self._tell(Released(lease=entry.lease, blocks=entry.blocks))


class AskParts:
    """Asks whose parts arrive one by one: an ask is one when all are there."""

    def __init__(self) -> None:
        self._asked: dict[int, tuple[float, dict[int, Asked]]] = {}

    def add(
        self, part: int, lease: int, asked: Asked, num_parts: int, now_s: float
    ) -> Asked | None:
        """The whole ask, once the last part is there; `take` then gives its parts."""
        for old in [key for key, (since_s, _) in self._asked.items() if since_s < now_s - STALE_S]:
            del self._asked[old]
        _, parts = self._asked.setdefault(lease, (now_s, {}))
        parts[part] = asked
        return replace(asked, lease=lease, pair=SEVERAL) if len(parts) == num_parts else None

    def take(self, lease: int) -> dict[int, Asked]:
        """Empty: it was given up meanwhile."""
        return self._asked.pop(lease, (0.0, {}))[1]


def _is_failure(result: object) -> bool:
    return result is False or isinstance(result, BaseException)
