"""The ports at which a worker's peers call, and how their calls are picked up.

A process that has no file descriptor left picks up none. It says so, and looks again a little
later: callers wait in the kernel's queue meanwhile, or give up, and connected peers are served.
"""

from __future__ import annotations

import asyncio
import logging
import math
import os
import secrets
import socket
from collections import Counter
from collections.abc import Callable

from .tcp import SOCKET_BUFFER

log = logging.getLogger(__name__)

BACK_OFF_S = 0.1
SAY_AGAIN_S = 60.0
_QUEUE = 64  # calls that the kernel holds for each port


class Listener:
    """`answer` takes every call, on the loop."""

    def __init__(
        self, name: str, answer: Callable[[socket.socket], None], counters: Counter[str]
    ) -> None:
        self._name, self._answer, self._counters = name, answer, counters
        self._sockets: list[socket.socket] = []
        self._again: asyncio.TimerHandle | None = None
        self._said_s = -math.inf

    def bind_unix(self) -> str:
        """Its abstract name, of this incarnation only."""
        name = f"phasewise-{self._name}-{os.getpid()}-{secrets.token_hex(6)}"
        self._open(socket.AF_UNIX).bind("\0" + name)
        return name

    def bind_tcp(self, host: str) -> str:
        """Its "host:port"."""
        sock = self._open(socket.AF_INET)
        sock.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, SOCKET_BUFFER)
        sock.bind((host, 0))
        return f"{host}:{sock.getsockname()[1]}"

    def listen(self) -> None:
        for sock in self._sockets:
            sock.listen(_QUEUE)
        self._go_on()

    def close(self) -> None:
        if self._again is not None:
            self._again.cancel()
        self._pause()
        for sock in self._sockets:
            sock.close()
        self._sockets.clear()

    def _open(self, family: socket.AddressFamily) -> socket.socket:
        self._sockets.append(socket.socket(family, socket.SOCK_STREAM | socket.SOCK_NONBLOCK))
        return self._sockets[-1]

    def _go_on(self) -> None:
        for sock in self._sockets:
            asyncio.get_running_loop().add_reader(sock, self._pick_up, sock)

    def _pause(self) -> None:
        for sock in self._sockets:
            asyncio.get_running_loop().remove_reader(sock)

    def _pick_up(self, listening: socket.socket) -> None:
        try:
            sock, _ = listening.accept()
        except (BlockingIOError, ConnectionAbortedError):
            return
        except OSError as error:  # the call waits on, and would bring us back here at once
            self._back_off(error)
            return
        sock.setblocking(False)
        self._answer(sock)

    def _back_off(self, error: OSError) -> None:
        self._counters["no descriptor for a call"] += 1
        loop = asyncio.get_running_loop()
        self._pause()
        self._again = loop.call_later(BACK_OFF_S, self._go_on)
        if loop.time() - self._said_s >= SAY_AGAIN_S:
            self._said_s = loop.time()
            log.warning(
                "%s cannot take calls for KV transfers: %s; it tries again every %g s. "
                "Raise the limit of file descriptors (ulimit -n) if there are too few",
                self._name,
                error,
                BACK_OFF_S,
            )
