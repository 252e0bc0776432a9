"""Which worker a request goes to. Plain classes that decide and never perform.

They know neither torch, ray nor grpc: the simulator drives the same classes.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Protocol


@dataclass(frozen=True, kw_only=True, slots=True)
class WorkerView:
    """What a policy may know about a worker that is ready.

    `outstanding_tokens` is the larger of what the worker last reported and what this router has
    sent it and not seen ended. For prefill these are prompt tokens not computed yet, for decode
    tokens whose KV is or will be held there.
    """

    name: str
    outstanding_tokens: int = 0
    requests: int = 0  # of this router, not ended
    free_blocks: int = 0
    total_blocks: int = 0
    max_batch_size: int = 0


class Policy(Protocol):
    def choose(self, workers: Sequence[WorkerView], num_tokens: int) -> int:
        """Index of the worker for a request of `num_tokens`; `workers` is never empty."""
        ...


class RoundRobin:
    """Each worker in turn."""

    def __init__(self) -> None:
        self._turn = 0

    def choose(self, workers: Sequence[WorkerView], num_tokens: int) -> int:
        chosen = self._turn % len(workers)
        self._turn = chosen + 1
        return chosen


class LeastOutstandingTokens:
    """The worker with the fewest tokens before it; among equals, fewest requests, then in turn."""

    def __init__(self) -> None:
        self._turn = 0

    def choose(self, workers: Sequence[WorkerView], num_tokens: int) -> int:
        count = len(workers)
        chosen = min(
            range(count),
            key=lambda i: (
                workers[i].outstanding_tokens,
                workers[i].requests,
                (i - self._turn) % count,
            ),
        )
        self._turn = (chosen + 1) % count
        return chosen


POLICIES: dict[str, type[RoundRobin] | type[LeastOutstandingTokens]] = {
    "round_robin": RoundRobin,
    "least_outstanding_tokens": LeastOutstandingTokens,
}
