"""A follower: a rank that computes what its leader tells it, and ends when its leader does."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch

from .cache import AllocateBuffer
from .errors import InvalidConfig, RankLost
from .rank import Rank, RankOptions, build_rank
from .ranks import LeaderLink, join_leader
from .shard import RankLinks, join_store
from .shard_plan import plan_shards
from .spec import load_spec

JOIN_S = 120.0  # for the leader to open its store, and the other ranks to come


class Follower:
    """One rank above 0. `run` is its compute thread's whole life."""

    def __init__(self, rank: Rank, link: LeaderLink) -> None:
        self.rank = rank
        self._link = link

    def run(self, clock_of: Callable[[int], Callable[[int], None]] | None = None) -> None:
        """Compute every step until the leader closes or is lost. Raises RankLost when a rank is.

        `clock_of(step)` gives what is called with each layer whose KV of that step is in this
        rank's pool, for steps whose layers the leader watches too; their numbers are the leader's.
        """
        try:
            for step, columns in self._link.steps():
                clock = None if clock_of is None or step < 0 else clock_of(step)
                self.rank.compute(columns, clock)
        finally:
            self.close()

    @property
    def note(self) -> dict[str, Any]:
        """What else the leader told."""
        return self._link.message["note"]

    def close(self) -> None:
        """End `run` from any thread. Idempotent."""
        self._link.close()
        if self.rank.links is not None:
            self.rank.links.abort()


def build_follower(address: str, rank: int, allocate: AllocateBuffer | None = None) -> Follower:
    """Join the leader at `address`, meet the other ranks, load the shard.

    Raises RankLost, or InvalidConfig and UnsupportedModel, which the leader is told too.
    """
    link = join_leader(address, rank, JOIN_S)
    try:
        return _build(link, rank, allocate)
    except InvalidConfig as error:
        link.ready(error)
        link.close()
        raise
    except RankLost:
        link.close()
        raise


def _build(link: LeaderLink, rank: int, allocate: AllocateBuffer | None) -> Follower:
    options = RankOptions(**link.message["options"])
    shards = plan_shards(
        load_spec(options.directory),
        tensor_parallel=options.tensor_parallel,
        pipeline_parallel=options.pipeline_parallel,
    )
    store = join_store(link.leader_host, link.message["store"], JOIN_S)
    links = RankLinks(shards[rank], store, torch.device(options.device), link.own_host)
    vocab = [shard.vocab for shard in shards[: options.tensor_parallel]]
    built = build_rank(options, shards[rank], vocab, links, allocate)
    link.ready()
    return Follower(built, link)
