"""Cores that workers share with each other, the gateway and its clients, and who waits for whom.

The gateway and its clients wake for every step's tokens, for a short time. They run where a core is
idle. Where each has a worker computing they take time from these, as the operating system favours
whoever has had least of late: from each in proportion to how long its step is, so that the long
steps of prompts wait and decoding hardly does. (Measured on 1P1D at 22 requests a second: while
prefill ran, four fifths of the waiting was its own.)
"""

from __future__ import annotations

from ..engine.step_time import StepFeatures
from .deployment import Overheads


class SharedCores:
    """What the steps of all workers on one machine's cores do to each other."""

    def __init__(self, overheads: Overheads) -> None:
        assert overheads.cores > 0
        self._costs = overheads
        self._users: list[CoreUse] = []

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

    def serve(self, tokens: int, now_s: float) -> None:
        """Gateway and clients take what a step has brought, once what follows it has begun."""
        if not tokens:
            return
        busy = [one for one in self._users if one.end_s > now_s]
        if len(busy) < self._costs.cores:
            return
        seconds = self._costs.serve_s + self._costs.serve_row_s * tokens
        share = seconds / sum([one.end_s - one.begun_s for one in busy])
        for one in busy:
            late_s = share * (one.end_s - one.begun_s)
            one.end_s += late_s
            one.late_s += late_s


class CoreUse:
    """The last step of one worker."""

    __slots__ = ("begun_s", "end_s", "late_s")

    def __init__(self) -> None:
        self.begun_s = self.end_s = 0.0
        self.late_s = 0.0  # that it ends later than was said when it began

    def take_late_s(self) -> float:
        late_s, self.late_s = self.late_s, 0.0
        return late_s
