"""Routing by prefix: what a policy is told, what it chooses, and what that is worth on a trace."""

from __future__ import annotations

from phasewise.benchmarks.prefix_routing import DATA, read, replay
from phasewise.engine.routing import (
    HIT_WEIGHT,
    KnownPrefixes,
    PrefixAware,
    RoundRobin,
    WorkerView,
)


def view(outstanding_tokens: int, cached_tokens: int = 0, requests: int = 0) -> WorkerView:
    return WorkerView(
        name="",
        outstanding_tokens=outstanding_tokens,
        cached_tokens=cached_tokens,
        requests=requests,
    )


def test_known_prefixes_are_what_the_worker_last_told() -> None:
    known = KnownPrefixes()
    names = [1, 1 << 70 | 2, 3]
    known.learn(reset=True, added=[1, 2], removed=[])
    assert known.count(names) == 2
    known.learn(reset=False, added=[3], removed=[1])
    assert known.count(names) == 0
    known.learn(reset=True, added=[1], removed=[])
    assert known.count(names) == 1


def test_a_prefix_is_worth_a_longer_queue_but_not_any() -> None:
    policy = PrefixAware()
    assert policy.choose([view(0), view(HIT_WEIGHT * 512 - 1, 512)], 600) == 1
    assert policy.choose([view(0), view(HIT_WEIGHT * 512 + 1, 512)], 600) == 0


def test_without_a_prefix_the_shortest_queue_is_chosen_and_equals_in_turn() -> None:
    policy = PrefixAware()
    assert policy.choose([view(10), view(5), view(7)], 100) == 1
    assert [policy.choose([view(5)] * 3, 100) for _ in range(4)] == [2, 0, 1, 2]


def test_prefix_aware_comes_near_one_big_cache_on_a_public_trace_with_even_load() -> None:
    rows = read(DATA)[:800]
    tokens_per_s = sum(r.num_tokens for r in rows) / (rows[-1].arrival_s - rows[0].arrival_s) / 0.7
    num_blocks = 3000  # far fewer than the trace's
    aware = replay(rows, PrefixAware(), 4, num_blocks, tokens_per_s)
    blind = replay(rows, RoundRobin(), 4, num_blocks, tokens_per_s)
    one = replay(rows, RoundRobin(), 1, num_blocks, tokens_per_s)
    assert blind["hit_rate"] < 0.85 * one["hit_rate"] <= aware["hit_rate"]
    assert aware["imbalance_computed"] <= 1.3 and aware["imbalance_requests"] <= 1.3
