"""Blocks of a decode worker that belong to no sequence yet: a prefill worker is to write them.

Knows when a grant may pass (`admission`) and what of a prompt is here already. Decides only.
"""

from __future__ import annotations

from ..engine.prefix_cache import PrefixCache
from .admission import Admission


class Grants:
    """What was found to be here stays here until its sequence takes it, or the grant ends."""

    def __init__(self, prefix: PrefixCache, admission: Admission) -> None:
        self.held: list[list[int]] = []  # prefixes of grants, as they were given out
        self._prefix = prefix
        self._allocator = prefix.allocator
        self._admission = admission

    def lease(
        self, num_blocks: int, hashes: list[int], *, num_here: int, now_s: float
    ) -> tuple[list[int], list[int]] | None:
        """Blocks for a sequence whose first ones are named by `hashes`: those of them that are
        here, and leased ones for the rest, at least one. None: no room, or not its turn."""
        found = self._allocator.lookup(hashes[: num_blocks - 1])
        count = self._prefix.num_to_take(found, num_blocks)
        if not self._admission.may_lease(count, num_here, now_s):
            return None
        self._allocator.share(found)
        blocks = self._allocator.lease(num_blocks - len(found))
        assert blocks is not None, "may_lease() says so"
        if found:
            self.held.append(found)
        return found, blocks

    def take(self, blocks: list[int]) -> None:
        """A sequence has this prefix now."""
        if blocks:
            self.held.remove(blocks)

    def drop(self, blocks: list[int]) -> None:
        """Nobody needs this prefix any more."""
        self.take(blocks)
        self._allocator.release(blocks)
