"""Which worker a request goes to. Plain classes that decide and never perform.

They know neither torch, ray nor grpc: the simulator drives the same classes.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import NamedTuple, Protocol

from .prefix import SHORT_MASK


class WorkerView(NamedTuple):
    """What a policy may know about a worker that is ready.

    `outstanding_tokens` is the larger of what the worker last reported and what this router has
    sent it and not seen ended. For prefill these are prompt tokens not computed yet, for decode
    tokens whose KV is or will be held there.
    """

    name: str
    outstanding_tokens: int = 0
    cached_tokens: int = 0  # of the request at hand, as the worker last told
    requests: int = 0  # of this router, not ended


class KnownPrefixes:
    """Which blocks a worker says that it has, by names cut to 64 bits. Only a hint: it may be
    out of date, and the worker looks for itself."""

    def __init__(self) -> None:
        self._names: set[int] = set()

    def learn(self, *, reset: bool, added: Iterable[int], removed: Iterable[int]) -> None:
        """Take what the worker tells (`engine.prefix.PrefixNews`)."""
        if reset:
            self._names.clear()
        self._names.difference_update(removed)
        self._names.update(added)

    def count(self, names: Sequence[int]) -> int:
        """Blocks of the longest prefix that is there; `names` in full."""
        known = self._names
        for count, name in enumerate(names):
            if name & SHORT_MASK not in known:
                return count
        return len(names)


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
        loads = [worker.outstanding_tokens for worker in workers]
        chosen = _least(loads, workers, self._turn)
        self._turn = (chosen + 1) % len(workers)
        return chosen


HIT_WEIGHT = 3  # queued tokens that a cached one is worth


class PrefixAware:
    """What is queued at a worker against what of the prompt it has: a worker keeps the prompts
    that begin alike until its queue is longer than another's by `HIT_WEIGHT` times what they
    save there; then the other one learns the prefix. Among equals the one with the fewest
    requests, then in turn. Without prefix caches it is `LeastOutstandingTokens`.

    A token computed again costs more than its own time: its copy displaces another prefix. On the
    Mooncake conversation trace (4 workers, 50,000 blocks, load 0.7) weights 1, 2, 3 reach 83, 89
    and 91% of one big cache's hit rate, and TTFT falls with each (benchmarks/prefix_routing.py).
    """

    def __init__(self) -> None:
        self._turn = 0

    def choose(self, workers: Sequence[WorkerView], num_tokens: int) -> int:
        loads = [
            worker.outstanding_tokens - HIT_WEIGHT * worker.cached_tokens for worker in workers
        ]
        chosen = _least(loads, workers, self._turn)
        self._turn = (chosen + 1) % len(workers)
        return chosen


def _least(loads: list[int], workers: Sequence[WorkerView], turn: int) -> int:
    """Of those with the least load the one with the fewest requests, then in turn."""
    least, count = min(loads), len(loads)
    equal = [i for i in range(count) if loads[i] == least]
    return min(equal, key=lambda i: (workers[i].requests, (i - turn) % count))


POLICIES: dict[str, type[RoundRobin | LeastOutstandingTokens | PrefixAware]] = {
    "round_robin": RoundRobin,
    "least_outstanding_tokens": LeastOutstandingTokens,
    "prefix_aware": PrefixAware,
}
