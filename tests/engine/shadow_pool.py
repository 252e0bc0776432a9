"""What stands at each position of a KV pool, as far as tests of schedulers can know it."""

from __future__ import annotations

from phasewise.engine.batch import Batch
from phasewise.engine.sequence import Sequence

Content = tuple[str, int]  # KV at a position depends on the tenant and on all tokens up to it


class ShadowPool:
    """Written as a runner and remote writers write. Reading what another prefix left fails."""

    def __init__(self, block_size: int) -> None:
        self.block_size = block_size
        self._contents: dict[tuple[int, int], Content] = {}

    def spoil(self, blocks: list[int]) -> None:
        """A remote writer may write anything there from now on."""
        for block in blocks:
            for offset in range(self.block_size):
                self._contents.pop((block, offset), None)

    def write(self, sequence: Sequence, start: int, end: int, blocks: list[int]) -> None:
        """KV of positions `[start, end)` of the sequence, whose blocks are `blocks`."""
        for position in range(start, end):
            block, offset = divmod(position, self.block_size)
            self._contents[blocks[block], offset] = self._content(sequence, position)

    def compute(self, batch: Batch) -> None:
        """A step: each row reads all positions before its own, then all are written."""
        rows = zip(batch.sequences, batch.starts, batch.counts, strict=True)
        for sequence, start, _ in rows:
            self.check(sequence, start)
        written: set[tuple[int, int]] = set()
        for sequence, start, count in zip(batch.sequences, batch.starts, batch.counts, strict=True):
            for position in range(start, start + count):
                place = (sequence.blocks[position // self.block_size], position % self.block_size)
                assert place not in written, "two rows write to one place"
                written.add(place)
            self.write(sequence, start, start + count, sequence.blocks)

    def check(self, sequence: Sequence, num_tokens: int) -> None:
        """The sequence's blocks hold the KV of its first tokens."""
        for position in range(num_tokens):
            block, offset = divmod(position, self.block_size)
            found = self._contents.get((sequence.blocks[block], offset))
            assert found == self._content(sequence, position), (sequence.id, position)

    @staticmethod
    def _content(sequence: Sequence, position: int) -> Content:
        assert sequence.tokens is not None
        return sequence.request.cache_salt, hash(tuple(sequence.tokens[: position + 1]))
