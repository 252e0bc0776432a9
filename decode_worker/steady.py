"""How long a batch of decodes goes on unchanged, so that a simulator can jump there."""

from __future__ import annotations

from ..engine.blocks import BlockAllocator
from ..engine.sequence import Sequence


def num_steady_steps(rows: list[Sequence], allocator: BlockAllocator) -> int:
    """Steps in which no row reaches its last token and each finds the blocks it needs."""
    most = min([row.max_total_tokens - row.num_tokens for row in rows]) - 1
    if most <= 0 or _blocks_needed(rows, most, allocator.block_size) <= allocator.num_available:
        return max(0, most)
    least = 0
    while least < most - 1:
        middle = (least + most) // 2
        if _blocks_needed(rows, middle, allocator.block_size) <= allocator.num_available:
            least = middle
        else:
            most = middle
    return least


def _blocks_needed(rows: list[Sequence], num_steps: int, block_size: int) -> int:
    """Blocks that the rows lack for the positions of the next steps."""
    ahead = num_steps + block_size - 1
    lacking = [(row.num_computed + ahead) // block_size - len(row.blocks) for row in rows]
    return sum([count for count in lacking if count > 0])


def advance_steadily(rows: list[Sequence], num_steps: int, allocator: BlockAllocator) -> None:
    """Apply that many steps to every row, without tokens; the blocks are known to be there."""
    block_size = allocator.block_size
    for row in rows:
        assert row.tokens is None, "tokens of skipped steps are not known"
        row.num_computed = num_computed = row.num_computed + num_steps
        row.num_tokens += num_steps
        while len(row.blocks) * block_size < num_computed:
            grown = allocator.extend(row.blocks)
            assert grown, "more steps than num_steady_steps() allows"
