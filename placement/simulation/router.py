"""The router's decisions in a simulation: its counts, its policies, and what it knows of caches."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple, TypeVar

from ...engine.routing import POLICIES, KnownPrefixes, WorkerView
from .decode import SimulatedDecode
from .deployment import Deployment
from .prefill import SimulatedPrefill
from .sequence import SimulatedSequence

NEWS_S = 0.25  # between a worker's news of its prefix cache: its heartbeat

Pooled = TypeVar("Pooled", SimulatedPrefill, SimulatedDecode)


class Pair(NamedTuple):
    """Where an attempt goes. `prefill` None: the decode worker computes the prompt itself."""

    prefill: SimulatedPrefill | None
    decode: SimulatedDecode


class SimulatedRouter:
    """Picks as `cluster.router` does, over the policies that run live."""

    def __init__(self, deployment: Deployment) -> None:
        self._deployment = deployment
        self._policies = {role: POLICIES[deployment.policy]() for role in ("prefill", "decode")}
        self._looks_at_caches = deployment.prefix_cache and deployment.policy == "prefix_aware"
        self._caches: dict[SimulatedPrefill | SimulatedDecode, _KnownCache] = {}

    def pick(
        self,
        prefill: Sequence[SimulatedPrefill],
        decode: Sequence[SimulatedDecode],
        sequence: SimulatedSequence,
        avoid: str | None,
        now_s: float,
    ) -> Pair | None:
        """None: nobody who is needed is ready."""
        decoder = self.choose(decode, sequence, avoid, now_s)
        if decoder is None:
            return None
        if self._computed_locally(prefill, decoder, sequence, now_s):
            return Pair(None, decoder)
        prefiller = self.choose(prefill, sequence, avoid, now_s)
        return None if prefiller is None else Pair(prefiller, decoder)

    def choose(
        self, pool: Sequence[Pooled], sequence: SimulatedSequence, avoid: str | None, now_s: float
    ) -> Pooled | None:
        """A worker that is ready, not the one that was just lost if there is another."""
        if len(pool) == 1:
            return pool[0] if pool[0].alive else None
        candidates = [worker for worker in pool if worker.alive]
        if avoid is not None:
            others = [worker for worker in candidates if worker.model.name != avoid]
            candidates = others or candidates
        if not candidates:
            return None
        views = [self._view(worker, sequence, now_s) for worker in candidates]
        policy = self._policies[candidates[0].role]
        return candidates[policy.choose(views, sequence.num_tokens)]

    def _computed_locally(
        self,
        prefill: Sequence[SimulatedPrefill],
        decode: SimulatedDecode,
        sequence: SimulatedSequence,
        now_s: float,
    ) -> bool:
        mode, most = self._deployment.local_prefill, self._deployment.local_prefill_tokens
        if mode != "auto":
            return mode == "always"
        if sequence.num_tokens <= most or not any(worker.alive for worker in prefill):
            return True
        return sequence.num_tokens - self._cached_tokens(decode, sequence, now_s) <= most

    def _view(
        self, worker: SimulatedPrefill | SimulatedDecode, sequence: SimulatedSequence, now_s: float
    ) -> WorkerView:
        told, sent = worker.reported_tokens(now_s), worker.outstanding_tokens
        cached = self._cached_tokens(worker, sequence, now_s) if self._looks_at_caches else 0
        return WorkerView(worker.model.name, told if told > sent else sent, cached, worker.requests)

    def _cached_tokens(
        self, worker: SimulatedPrefill | SimulatedDecode, sequence: SimulatedSequence, now_s: float
    ) -> int:
        """Of the prompt, as the worker last told."""
        if not self._looks_at_caches:
            return 0
        cache = self._caches.get(worker)
        if cache is None:
            cache = self._caches[worker] = _KnownCache(worker)
        cache.hear(now_s)
        return cache.known.count(sequence.block_hashes) * self._deployment.block_size


class _KnownCache:
    """What a worker has told of its prefix cache; a pipeline's lanes have one each, and the first
    speaks for them."""

    def __init__(self, worker: SimulatedPrefill | SimulatedDecode) -> None:
        index = worker.allocators()[0].prefixes
        assert index is not None, "asked only where caches are on"
        self.known = KnownPrefixes()
        self._index = index
        self._cursor = -1
        self._told_s = float("-inf")

    def hear(self, now_s: float) -> None:
        """Take the news, if a heartbeat is due."""
        if now_s < self._told_s + NEWS_S:
            return
        self._told_s = now_s
        news = self._index.news(self._cursor)
        self._cursor = news.cursor
        self.known.learn(reset=news.reset, added=news.added, removed=news.removed)
