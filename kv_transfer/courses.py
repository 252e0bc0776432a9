"""Which ranks of a worker exchange what with which of a peer's, from the peer's address."""

from __future__ import annotations

from ..engine.request import TransferAddress, WorkerId
from .events import Side
from .fit import Held, Pairing, pairing, parts_at

Leg = tuple[int, TransferAddress]  # its number, and the counterpart's own address


class Courses:
    """Of one worker to all its peers. What a peer's ranks hold is looked at once a peer."""

    def __init__(self, held: Held) -> None:
        self._held = held
        self._known: dict[str, tuple[WorkerId, dict[Side, Pairing]]] = {}

    def legs(self, peer: TransferAddress, side: Side, rank: int) -> tuple[Leg, ...]:
        """Of a lease in which `rank` of this worker is on `side`; none where it sends nothing.
        Raises PeerRefused."""
        if len(self._held.parts) == 1 and not peer.ranks:
            return ((0, peer),)
        addresses = (peer, *peer.ranks)
        found = self._pairings(peer)[side].items()
        if side is Side.SENDER:
            return tuple((leg, addresses[there]) for (here, there), leg in found if here == rank)
        return tuple((leg, addresses[there]) for (there, here), leg in found if here == rank)

    def counterparts(self, peer: TransferAddress, rank: int) -> list[TransferAddress]:
        """All with which `rank` may ever exchange KV, whichever of the two sends."""
        legs = (*self.legs(peer, Side.SENDER, rank), *self.legs(peer, Side.RECEIVER, rank))
        return list({address.worker: address for _, address in legs}.values())

    def _pairings(self, peer: TransferAddress) -> dict[Side, Pairing]:
        worker, found = self._known.get(peer.worker.name, (None, {}))
        if worker != peer.worker:
            mine = self._held.parts
            theirs = parts_at(peer, mine[0].layout)
            found = {Side.SENDER: pairing(mine, theirs), Side.RECEIVER: pairing(theirs, mine)}
            self._known[peer.worker.name] = peer.worker, found
        return found
