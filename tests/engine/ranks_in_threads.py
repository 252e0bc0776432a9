"""A worker of several ranks in one process: followers on threads, over real sockets and groups."""

from __future__ import annotations

import contextlib
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from phasewise.engine.errors import RankLost
from phasewise.engine.follower import Follower, build_follower
from phasewise.engine.ranks import RankHost
from phasewise.engine.runner import Runner, build_runner


def follow(address: str) -> None:
    """The first follower, in a process of its own."""
    build_follower(address, 1).run()


def _follow(address: str, rank: int, followers: dict[int, Follower]) -> None:
    follower = followers[rank] = build_follower(address, rank)
    with contextlib.suppress(RankLost):  # the test's own leader went first
        follower.run()


@contextmanager
def ranks(
    directory: Path, tensor: int, pipeline: int, **options: Any
) -> Iterator[tuple[Runner, dict[int, Follower]]]:
    """A leader and its followers, by rank; all ended on exit."""
    followers: dict[int, Follower] = {}
    host = RankHost()
    threads = [
        threading.Thread(target=_follow, args=(host.address, rank, followers), daemon=True)
        for rank in range(1, tensor * pipeline)
    ]
    for thread in threads:
        thread.start()
    runner = build_runner(
        directory,
        ranks=host,
        threads=1,
        tensor_parallel=tensor,
        pipeline_parallel=pipeline,
        **options,
    )
    try:
        yield runner, followers
    finally:
        runner.close()
        for thread in threads:
            thread.join(30.0)
            assert not thread.is_alive(), "a follower ends with its leader"
