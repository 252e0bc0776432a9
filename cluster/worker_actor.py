"""The process of one worker, as the launcher's actor: starts the server, tells how it ends.

Imports nothing that computes before the thread counts are set: OpenMP and MKL read them once.
Knows nothing of Ray.
"""

from __future__ import annotations

import os
import socket
import threading
import time
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING

from ..configs.errors import InvalidConfig, PhasewiseError
from .heap import settle_heap
from .spec import WorkerSpec

if TYPE_CHECKING:
    from ..engine.ranks import RankHost
    from .endpoint import WorkerServer

POLL_S = 0.1
THREAD_VARIABLES = (
    "OMP_NUM_THREADS",
    "MKL_NUM_THREADS",
    "OPENBLAS_NUM_THREADS",
    "NUMBA_NUM_THREADS",
)


@dataclass(frozen=True, kw_only=True, slots=True)
class Started:
    """A worker that is ready."""

    address: str
    pid: int
    host: str  # name of the machine, to know whether it is ours


@dataclass(frozen=True, kw_only=True, slots=True)
class Refused:
    """A worker that named what keeps it from starting, and the key to mend where it is one."""

    reason: str
    key: str = ""
    remedy: str = ""


class LaunchError(PhasewiseError):
    """Ray or a worker process could not be started."""


class WorkerActor:
    """`start` once; `wait` returns when it has ended; `stop` ends it. Called from threads."""

    def __init__(self, spec: WorkerSpec) -> None:
        self.spec = spec
        self._server: WorkerServer | None = None
        self._ranks: RankHost | None = None
        _settle(spec)

    def listen(self, host: str | None = None) -> str:
        """Where the followers of a worker of several ranks shall come, before `start`."""
        from ..engine.ranks import RankHost

        self._ranks = RankHost(host or self.spec.host)
        return self._ranks.address

    def start(self, host: str | None = None) -> Started | Refused:
        """Load and listen on `host`, or on what the spec says."""
        spec = self.spec if host is None else replace(self.spec, host=host)
        try:
            from .endpoint import WorkerServer

            self._server = WorkerServer(spec, self._ranks)
            address = self._server.start()
            settle_heap()
        except InvalidConfig as error:  # as values: named errors do not survive pickling
            return Refused(key=error.where, reason=error.reason, remedy=error.remedy)
        except PhasewiseError as error:
            return Refused(reason=str(error))
        return Started(address=address, pid=os.getpid(), host=socket.gethostname())

    def wait(self) -> str:
        """Why the worker ended, once it has."""
        while True:
            assert self._server is not None, "start comes first"
            reason = self._server.failure()
            if reason is not None:
                return reason
            time.sleep(POLL_S)

    def stop(self, drain_s: float) -> None:
        if self._server is not None:
            self._server.stop(drain_s)


class FollowerActor:
    """The process of a rank above 0. `follow` returns when its leader has ended."""

    def __init__(self, spec: WorkerSpec, rank: int) -> None:
        self.spec = spec
        self.rank = rank
        _settle(spec)

    def where(self) -> Started:
        """The process, before it does anything."""
        return Started(address="", pid=os.getpid(), host=socket.gethostname())

    def follow(self, address: str, host: str | None = None) -> str:
        """Why it ended. Its own servers listen on `host`, or on what the spec says."""
        from .follower import follow

        spec = self.spec if host is None else replace(self.spec, host=host)
        try:
            follow(spec, self.rank, address)
        except PhasewiseError as error:  # told to the leader too, or by it
            return str(error)
        return "its leader ended"


def _settle(spec: WorkerSpec) -> None:
    """Set up the process of a rank before it imports what computes."""
    for variable in THREAD_VARIABLES if spec.threads_a_rank else ():
        os.environ[variable] = str(spec.threads_a_rank)
    # A thread that waits for the next step must not spin on a core that another worker needs.
    os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")
    threading.Thread(target=_die_with_parent, args=(os.getppid(),), daemon=True).start()


def _die_with_parent(parent: int) -> None:
    """Ends this process when its parent has, whatever else it is doing."""
    while os.getppid() == parent:
        time.sleep(POLL_S)
    os._exit(1)
