"""A server's rounds of one load, each counted as what it was: whole, or with streams lost."""

from __future__ import annotations

import contextlib
import statistics
import sys
from collections.abc import Callable
from contextlib import AbstractContextManager
from dataclasses import dataclass
from typing import Self

from .openai_load import Load, LoadResult, NothingWhole, run_load
from .servers import ServerDied

Server = Callable[[], AbstractContextManager[int]]
# Several times what the slowest server takes: a stream that is lost was lost by its server.
WARM_LIMIT_S, ROUND_LIMIT_S = 60.0, 120.0


@dataclass(frozen=True, kw_only=True, slots=True)
class Contender:
    """`fresh`: the server is begun anew for every round, not only after one that lost streams."""

    name: str
    server: Server
    model: str
    load: Load
    warm_up: Load  # sent after every start, in place of a first round, and not counted
    fresh: bool = False


class Rounds:
    """The server runs from its start to the exit at most.

    `results` holds a round's figures under its seed; one of which nothing was whole has none.
    """

    def __init__(self, contender: Contender) -> None:
        self.contender = contender
        self.results: dict[int, LoadResult] = {}
        self.starts = self.failed_starts = self.rounds = 0
        self.lost = self.lost_in_warm_up = 0
        self._stack = contextlib.ExitStack()
        self._port: int | None = None

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self._end()

    def start(self) -> bool:
        """Starts and warms up, once; whether the server runs. Raises PeerMissing."""
        self.starts += 1
        try:
            self._port = self._stack.enter_context(self.contender.server())
        except (ServerDied, TimeoutError) as error:
            self.failed_starts += 1
            self._say(f"start {self.starts} failed: {error}")
            return False
        _, lost = self._send(self._port, self.contender.warm_up, 0, WARM_LIMIT_S)
        if lost:
            self.lost_in_warm_up += lost
            self._say(f"{lost} streams of the warm-up were lost")
        return True

    def run(self, seed: int) -> None:
        """One round. A server that does not start loses it whole. Raises PeerMissing."""
        self.rounds += 1
        if self._port is None and not self.start():
            self.lost += self.contender.load.num_requests
            return
        assert self._port is not None
        result, lost = self._send(self._port, self.contender.load, seed, ROUND_LIMIT_S)
        self.lost += lost
        if result is not None:
            self.results[seed] = result
        speed = f"{result.output_tokens_per_s:.0f} tok/s" if result else "no figure"
        self._say(f"round {seed}: {speed}, {lost} streams lost")
        if lost or self.contender.fresh:
            self._end()

    def counted(self) -> dict[int, LoadResult]:
        """The whole rounds; if there is none, the fastest of the others stands for the server."""
        whole = {seed: result for seed, result in self.results.items() if not result.lost}
        if whole or not self.results:
            return whole
        best = max(self.results, key=lambda seed: self.results[seed].output_tokens_per_s)
        return {best: self.results[best]}

    def medians(self) -> dict[str, float]:
        """Of the rounds that count, field by field; empty when none does."""
        rows = list(self.counted().values())
        fields = LoadResult.__dataclass_fields__ if rows else ()
        return {f: round(statistics.median(getattr(r, f) for r in rows), 2) for f in fields}

    def as_json(self) -> dict[str, object]:
        whole = sum(not result.lost for result in self.results.values())
        best = "the fastest round, though it lost streams" if self.results else "nothing"
        return {
            "rounds": self.rounds,
            "whole": whole,
            "counted": "the median of the whole rounds" if whole else best,
            "starts": self.starts,
            "failed_starts": self.failed_starts,
            "lost_streams": self.lost,
            "lost_in_warm_up": self.lost_in_warm_up,
            "by_round": {seed: result.as_json() for seed, result in self.results.items()},
        }

    def _end(self) -> None:
        self._port = None
        self._stack.close()

    def _send(
        self, port: int, load: Load, seed: int, limit_s: float
    ) -> tuple[LoadResult | None, int]:
        """The figures, and how many streams were lost."""
        try:
            result = run_load(port, self.contender.model, load, seed, limit_s)
        except NothingWhole:
            return None, load.num_requests
        return result, result.lost

    def _say(self, what: str) -> None:
        print(f"{self.contender.name}: {what}", file=sys.stderr)
