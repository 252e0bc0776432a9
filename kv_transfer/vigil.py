"""Looking out for an answer instead of sleeping, on pairs where answers have come soon."""

from __future__ import annotations

LOOK_S = 300e-6  # longest look-out; the loop does nothing else meanwhile
_MOST_TRUST = 3


class Vigil:
    """Whether it is worth it to look out for a pair's next word, from how the last ones came.

    Putting a process to sleep and waking it on another core takes longer (30 to 80 µs each way on
    two shared cores) than a peer takes to answer for a small transfer (about 20 µs). So after what
    a peer answers at once its word is looked out for, as kernels do before halting a core: only
    while that has paid, and never for longer than LOOK_S. An idle worker never does.
    """

    __slots__ = ("_asked_s", "_trust")

    def __init__(self) -> None:
        self._asked_s: float | None = None
        self._trust = 0

    def begin(self, now_s: float) -> float | None:
        """An answer is due from now on: until when to look out for it; None: sleep."""
        self._asked_s = now_s
        return now_s + LOOK_S if self._trust else None

    def heard(self, now_s: float) -> None:
        """The peer said something."""
        if self._asked_s is None:
            return
        came_soon = now_s - self._asked_s <= LOOK_S
        self._trust = min(_MOST_TRUST, self._trust + 1) if came_soon else max(0, self._trust - 1)
        self._asked_s = None
