"""Whom not to call for a while: a circuit breaker per peer. Pure; times come in."""

from __future__ import annotations

from dataclasses import dataclass

FIRST_S, LONGEST_S = 0.1, 5.0


@dataclass(slots=True)
class Breaker:
    """After a failure no call for a delay that doubles with each further failure."""

    failures: int = 0
    open_until_s: float = 0.0

    def wait_s(self, now_s: float) -> float:
        """How long calls are held back; 0 when one may be tried."""
        return max(0.0, self.open_until_s - now_s)

    def failed(self, now_s: float) -> None:
        delay_s = min(LONGEST_S, FIRST_S * 2 ** min(self.failures, 10))
        self.failures += 1
        self.open_until_s = now_s + delay_s

    def succeeded(self) -> None:
        self.failures, self.open_until_s = 0, 0.0
