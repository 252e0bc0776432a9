"""The thread of a pair that writes granted blocks while the loop goes on."""

from __future__ import annotations

import threading
from collections import deque
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Protocol

from .layer_clock import LayerClock
from .lease import Action
from .window import Window

WRITE_BYTES = 1 << 20  # a `piece_bytes` in which an abort waits for less than a millisecond

Run = tuple[int, int, int]  # first block here, first block there, how many


def runs(source: Sequence[int], target: Sequence[int]) -> list[Run]:
    """Blocks that are neighbours on both sides, as one copy each, in order."""
    found: list[Run] = []
    for here, there in zip(source, target, strict=True):
        if found:
            first, other, count = found[-1]
            if (here, there) == (first + count, other + count):
                found[-1] = (first, other, count + 1)
                continue
        found.append((here, there, 1))
    return found


@dataclass(kw_only=True, slots=True)
class Push:
    """Units `[first, first + len(source))` of a lease, each layer once the clock says so: blocks,
    where they are of one size on both sides. Layers are the sender's own."""

    lease: int
    generation: int
    first: int
    source: tuple[int, ...]
    target: tuple[int, ...]
    clock: LayerClock
    layer: int = 0  # the next to write
    runs: list[Run] = field(default_factory=list)

    def __post_init__(self) -> None:
        self.runs = runs(self.source, self.target)


@dataclass(frozen=True, slots=True)
class Finish:
    """After all pushes of the lease: call back, with the checksum of `blocks` if wanted."""

    lease: int
    blocks: tuple[int, ...]
    checksum: Callable[[Sequence[int]], int] | None


@dataclass(frozen=True, slots=True)
class Cancel:
    """Forget the lease; the answer says that no write of it is under way."""

    lease: int


class Writer(Protocol):
    """A transport's way into the peer's pool. `write` blocks and releases the GIL."""

    name: str
    immediate: bool  # has `write_now`
    piece_bytes: int  # layers that are ready together go together up to this size

    @property
    def pending(self) -> bool:
        """Something of `write_now` waits for `flush`."""
        ...

    def write(self, push: Push, layers: range) -> None:
        """In the copier's thread. Raises OSError when the peer is gone."""
        ...

    def write_now(self, push: Push, layers: range) -> None:
        """On the loop, while the copier is idle, for small pushes. What does not go at
        once waits in the writer for `flush`."""
        ...

    def flush(self) -> None:
        """Send what `write_now` left, in the copier's thread."""
        ...

    def write_canary(self, slot: int, pattern: bytes) -> None: ...

    def leave(self) -> bool:
        """The pair is over. True: no block of either pool is touched from now on, even while
        a `write` is stuck; False: that is known when the copier's thread has ended."""
        ...

    def close(self) -> None:
        """After the copier's end: let go of the peer's pool or socket."""
        ...


class Reader(Protocol):
    """A transport's way into this worker's pool, for those whose receiver writes. On the loop."""

    def read(self, now_s: float) -> list[Action]:
        """The data connection is readable: take some. Raises MalformedFrame, OSError."""
        ...

    def close(self) -> None:
        """The pair is over: no block is written from now on."""
        ...


class Copier:
    """Runs one pair's pushes: in order within a lease, whichever lease has a layer ready.

    `tell(what, lease, checksum)` is called in this thread with "finished", "failed" (the step
    broke), "drained" or, at the end of the thread, "broken" or "closed".
    """

    WAIT_S = 1.0  # bound of every sleep, should a bell be missed

    def __init__(
        self, writer: Writer, window: Window, tell: Callable[[str, int, int | None], None]
    ) -> None:
        self._writer = writer
        self._last_layer, self._unit_bytes = window.layers.stop, window.unit_bytes
        self._tell = tell
        self._inbox: deque[Push | Finish | Cancel] = deque()
        self._queues: dict[int, deque[Push | Finish]] = {}
        self._bell = threading.Event()
        self._closing = False
        self._submitted = 0  # counted by the loop
        self._done = 0  # counted by the thread
        self.moved: set[int] = set()  # leases that made progress since the loop last looked
        self._thread = threading.Thread(target=self._run, name="kv-copier", daemon=True)
        self._thread.start()

    def submit(self, item: Push | Finish | Cancel) -> None:
        """Called on the loop."""
        if isinstance(item, Push):
            item.clock.watch(self._bell)
        self._submitted += 1
        self._inbox.append(item)
        self._bell.set()

    @property
    def idle(self) -> bool:
        """Seen from the loop: nothing is being written, nor will be before the next submit."""
        return self._submitted == self._done

    def close(self) -> None:
        """Ask the thread to end after the write under way; it tells "closed"."""
        self._closing = True
        self._bell.set()

    def join(self) -> None:
        """Wait for the thread, which has told its end already."""
        self._thread.join()

    def _run(self) -> None:
        end = "broken"
        try:
            while not self._closing:
                self._bell.clear()
                self._read_inbox()
                if not self._step():
                    self._bell.wait(self.WAIT_S)
            end = "closed"
        except OSError:
            pass  # the peer's end of the data connection is gone: told below
        finally:
            tell, self._tell = self._tell, _nobody  # no cycle keeps the pair's descriptors
            tell(end, 0, None)

    def _read_inbox(self) -> None:
        while self._inbox:
            item = self._inbox.popleft()
            if isinstance(item, Cancel):
                self._done += 1 + len(self._queues.pop(item.lease, ()))
                self._tell("drained", item.lease, None)
            else:
                self._queues.setdefault(item.lease, deque()).append(item)

    def _step(self) -> bool:
        """Do one piece of work; False when every lease waits for its layers."""
        for lease, queue in list(self._queues.items()):
            item = queue[0]
            if isinstance(item, Finish):
                self._finish(item)
                return True
            if item.clock.failed:
                self._done += len(self._queues.pop(lease))
                self._tell("failed", lease, None)
                return True
            ready = min(item.clock.done, self._last_layer)
            if item.layer < ready:
                self._write(item, ready)
                return True
        return False

    def _write(self, push: Push, ready: int) -> None:
        """A layer, or several small ones: an abort never waits for more than that."""
        count = max(1, self._writer.piece_bytes // (len(push.source) * self._unit_bytes))
        layers = range(push.layer, min(push.layer + count, ready))
        self._writer.write(push, layers)
        push.layer = layers.stop
        self.moved.add(push.lease)
        if push.layer == self._last_layer:
            queue = self._queues[push.lease]
            queue.popleft()
            if not queue:
                del self._queues[push.lease]
            self._done += 1

    def _finish(self, item: Finish) -> None:
        self._writer.flush()
        del self._queues[item.lease]
        self._done += 1
        total = item.checksum(item.blocks) if item.checksum else None
        self._tell("finished", item.lease, total)


def _nobody(what: str, lease: int, checksum: int | None) -> None:
    """An ended copier has nothing to tell."""
