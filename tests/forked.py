"""Processes that may be killed, forked from one that has imported torch: a start takes milliseconds
where a new interpreter takes one to two seconds."""

from __future__ import annotations

import multiprocessing
import os
import socket
import sys
from collections.abc import Callable
from multiprocessing.context import ForkServerProcess
from typing import Any

_context = multiprocessing.get_context("forkserver")
_context.set_forkserver_preload(
    [
        "phasewise.engine.follower",
        "phasewise.kv_transfer.collective",
        "phasewise.tests.kv_transfer.peer_process",
        "phasewise.tests.kv_transfer.rank_process",
    ]
)


def forked(work: Callable[..., None], *arguments: Any) -> ForkServerProcess:
    """A process that does `work`, which a module's top level has."""
    process = _context.Process(target=work, args=arguments, daemon=True)
    process.start()
    return process


def forked_with_lines(
    work: Callable[..., None], *arguments: Any
) -> tuple[ForkServerProcess, socket.socket]:
    """A process whose standard input and output are the other end of the socket."""
    ours, theirs = socket.socketpair()
    with theirs:
        return forked(_work_on_lines, theirs, work, *arguments), ours


def _work_on_lines(sock: socket.socket, work: Callable[..., None], *arguments: Any) -> None:
    for number in (0, 1):
        os.dup2(sock.fileno(), number)
    sock.close()
    sys.stdin, sys.stdout = open(0), open(1, "w")  # noqa: SIM115
    work(*arguments)
