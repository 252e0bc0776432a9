"""The processes below this one: who they are, and that they are gone when they must be.

Linux's /proc is read directly; a process that vanishes while it is looked at counts as gone.
"""

from __future__ import annotations

import os
import signal
import time
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path

POLL_S = 0.02


@dataclass(frozen=True, slots=True)
class Process:
    """A process id and when it started, which tells it from a later one of the same id."""

    pid: int
    started: int  # clock ticks since boot
    parent: int


def find(pid: int) -> Process | None:
    """The live process of this id; a zombie is dead."""
    try:
        stat = Path(f"/proc/{pid}/stat").read_text()
    except OSError:
        return None
    fields = stat.rpartition(")")[2].split()  # the name before it may hold anything
    if fields[0] in "ZX":
        return None
    return Process(pid, started=int(fields[19]), parent=int(fields[1]))


def descendants(pid: int) -> list[Process]:
    """All live processes below `pid`, parents before children."""
    below: dict[int, list[Process]] = {}
    for name in os.listdir("/proc"):
        process = find(int(name)) if name.isdigit() else None
        if process is not None:
            below.setdefault(process.parent, []).append(process)
    found, parents = [], [pid]
    while parents:
        children = below.get(parents.pop(), [])
        found += children
        parents += [child.pid for child in children]
    return found


def is_alive(process: Process) -> bool:
    now = find(process.pid)
    return now is not None and now.started == process.started


def kill(processes: Iterable[Process]) -> None:
    """SIGKILL to those that still are who they were."""
    for process in processes:
        if is_alive(process):
            try:
                os.kill(process.pid, signal.SIGKILL)
            except ProcessLookupError:  # it ended in between
                continue


def end(processes: Iterable[Process], *, within_s: float) -> list[Process]:
    """Wait for all to end, kill what has not by then; returns those that had to be killed."""
    waiting = list(processes)
    deadline_s = time.monotonic() + within_s
    while time.monotonic() < deadline_s:
        waiting = [process for process in waiting if is_alive(process)]
        if not waiting:
            return []
        time.sleep(POLL_S)
    kill(waiting)
    return waiting
