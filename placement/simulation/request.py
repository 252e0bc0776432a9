"""A request on its way through a simulated cluster: where it is, and what is noted of it."""

from __future__ import annotations

from math import nan
from typing import Any

import numpy as np

from ..workload.workload import Workload
from .decode import SimulatedDecode
from .lane import Lane
from .network import Flow
from .prefill import SimulatedPrefill
from .run import StopRule
from .sequence import SimulatedSequence


class Attempt:
    """One way of a request through the cluster; a lost worker ends it, and another begins."""

    __slots__ = (
        "blocks",
        "decode",
        "flow",
        "found",
        "handed_s",
        "lane",
        "landed",
        "lost",
        "num_tokens",
        "prefill",
        "row",
        "sequence",
        "told",
    )

    def __init__(self, row: int, sequence: SimulatedSequence) -> None:
        self.row = row
        self.num_tokens = sequence.num_tokens  # known when it began
        self.sequence = sequence
        self.prefill: SimulatedPrefill | None = None  # until its blocks there are free
        self.decode: SimulatedDecode | None = None
        self.lane: Lane | None = None  # where it has, or waits for, its blocks in decode
        self.found: list[int] = []  # blocks of its beginning that decode had already
        self.blocks: list[int] | None = None  # leased in decode
        self.flow: Flow | None = None
        self.handed_s = nan  # prompt computed
        self.told = False  # decode knows that it shall go on
        self.landed = False  # its KV is there
        self.lost = False

    @property
    def handed(self) -> bool:
        return self.handed_s == self.handed_s


class Notes:
    """What becomes a run's columns, and how many have missed their targets."""

    def __init__(self, workload: Workload, stop: StopRule | None) -> None:
        n = workload.num_requests
        self.arrival_s: list[float] = workload.arrival_s.tolist()
        self.outputs: list[int] = workload.output_tokens.tolist()
        self.first_s = [nan] * n
        self.last_s = [nan] * n
        self.queue_s = [nan] * n
        self.prefill_s = [nan] * n
        self.transfer_s = [0.0] * n
        self.preemptions = [0] * n
        self.failovers = [0] * n
        self.stop = stop
        self.misses = 0
        self._ttft_limit_s: list[float] = [] if stop is None else stop.ttft_s.tolist()
        self._tpot_limit_s: list[float] = [] if stop is None else stop.tpot_s.tolist()

    @property
    def hopeless(self) -> bool:
        return self.stop is not None and self.misses > self.stop.max_misses

    def first(self, row: int, at_s: float, now_s: float, started_s: float | None) -> None:
        """The client has its first token at `at_s`; later attempts have none."""
        if self.first_s[row] == self.first_s[row]:
            return
        assert started_s is not None, "a computed prompt was scheduled once"
        self.first_s[row] = at_s
        self.queue_s[row] = started_s - self.arrival_s[row]
        self.prefill_s[row] = now_s - started_s
        if self.stop is not None and self._late(row):
            self.misses += self.stop.first_row <= row < self.stop.last_row

    def last(self, row: int, at_s: float) -> None:
        self.last_s[row] = at_s
        if self.stop is not None and self.outputs[row] > 1 and not self._late(row):
            tpot_s = (at_s - self.first_s[row]) / (self.outputs[row] - 1)
            if tpot_s > self._tpot_limit_s[row]:
                self.misses += self.stop.first_row <= row < self.stop.last_row

    def columns(self) -> dict[str, Any]:
        arrival_s, first_s, last_s = map(np.array, (self.arrival_s, self.first_s, self.last_s))
        steps = np.array(self.outputs) - 1
        spread_s = np.where(steps > 0, last_s - first_s, last_s * 0.0)
        return {
            "ttft_s": first_s - arrival_s,
            "tpot_s": spread_s / np.maximum(steps, 1),
            "e2e_s": last_s - arrival_s,
            "queue_s": np.array(self.queue_s),
            "prefill_s": np.array(self.prefill_s),
            "transfer_s": np.array(self.transfer_s),
            "preemptions": np.array(self.preemptions, dtype=np.int32),
            "failovers": np.array(self.failovers, dtype=np.int32),
        }

    def _late(self, row: int) -> bool:
        return self.first_s[row] - self.arrival_s[row] > self._ttft_limit_s[row]
