"""Cores that workers share with each other, the gateway and its clients, and who waits for whom.

The gateway and its clients wake for every step's tokens, for a short time. They run where a core is
idle, and go on where they ran last while none is: there a worker's steps wait for them, and the
others' hardly. Beside a decode worker that is seldom idle that is prefill's core; of two workers
that do both it is now the one's, now the other's. (Measured on two cores at 16 and 22 requests a
second. 1P1D: while both computed, nine tenths of the waiting for gateway and clients was prefill's.
Colocated: the two workers' shares of waiting, second by second, had a correlation of -0.6 to -0.8,
and who waited more waited for about seven tenths.)

A crowded core has its price: caches are cold after each turn, and whoever's turn it is comes late.
So there serving and a worker's host work take longer, by one share. (Measured on two colocated
workers: where the neighbour computed, 0.85 ms lay between two decode steps instead of 0.55, serving
took 1.2 times its core time, and a step computed 0.2 s longer for each second it waited. The
neighbour's computing alone, without gateway and clients, made steps 2 to 4% longer.)
"""

from __future__ import annotations

from ...engine.step_time import StepFeatures
from .deployment import Overheads

HOME_SHARE = 0.8  # of what is served where no core is idle, that runs where it ran last


class SharedCores:
    """What the steps of all workers on one machine's cores do to each other."""

    def __init__(self, overheads: Overheads) -> None:
        assert overheads.cores > 0
        self._costs = overheads
        self._users: list[CoreUse] = []
        self._home: CoreUse | None = None  # whose core gateway and clients ran on last

    def join(self) -> CoreUse:
        """One worker more."""
        self._users.append(CoreUse())
        return self._users[-1]

    def begin(self, user: CoreUse, features: StepFeatures, alone_s: float, now_s: float) -> float:
        """A step's seconds of `alone_s`, for the weights may still be in the cache: where it
        follows its worker's last step closely and nobody else has computed meanwhile."""
        seconds = alone_s
        if not features.new_tokens and user.end_s == now_s:
            others = [one for one in self._users if one is not user and one.end_s > user.begun_s]
            if not others:
                seconds = max(0.0, alone_s - self._costs.warm_s)
        user.begun_s = now_s
        return seconds

    def host_s(self, user: CoreUse, alone_s: float, now_s: float) -> float:
        """What host work beside a step takes that begins now."""
        if user is not self._home:
            return alone_s
        others = sum([one.end_s > now_s for one in self._users if one is not user])
        crowded = others + 1 >= self._costs.cores
        return alone_s * (1 + self._costs.crowd_share) if crowded else alone_s

    def serve(self, tokens: int, now_s: float) -> None:
        """Gateway and clients take what a step has brought, once what follows it has begun."""
        if not tokens:
            return
        busy = [one for one in self._users if one.end_s > now_s]
        if len(busy) < self._costs.cores:
            self._go_where_idle(now_s)
            return
        if self._home not in busy:
            self._home = busy[-1]
        costs = self._costs
        seconds = (costs.serve_s + costs.serve_row_s * tokens) * (1 + costs.crowd_share)
        others = len(busy) - 1
        for one in busy:
            share = 1.0 if not others else HOME_SHARE
            if one is not self._home:
                share = (1 - HOME_SHARE) / others
            one.end_s += share * seconds
            one.late_s += share * seconds

    def _go_where_idle(self, now_s: float) -> None:
        """To a core whose worker computes nothing, unless they are on such a one."""
        idle = [one for one in self._users if one.end_s <= now_s]
        if idle and self._home not in idle:
            self._home = idle[0]


class CoreUse:
    """The last step of one worker."""

    __slots__ = ("begun_s", "end_s", "late_s")

    def __init__(self) -> None:
        self.begun_s = self.end_s = 0.0
        self.late_s = 0.0  # that it ends later than was said when it began

    def take_late_s(self) -> float:
        late_s, self.late_s = self.late_s, 0.0
        return late_s
