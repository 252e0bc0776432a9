"""Runs a command in a process group of its own, and ends that group surely.

    python keeper.py COMMAND...

Standard input is a pipe that nobody writes to. It ends when whoever holds its other end closes
it, or is gone, by whatever signal; then the group is ended: SIGTERM, and SIGKILL after PATIENCE_S.
What is left of the group when the command ends by itself is ended too. Exits as the command did.
"""

from __future__ import annotations

import contextlib
import os
import select
import signal
import subprocess
import sys

PATIENCE_S, KILL_S = 10.0, 10.0
LOOK_S = 0.25


def keep(command: list[str]) -> int:
    """The command's return code."""
    child = subprocess.Popen(command, stdin=subprocess.DEVNULL, start_new_session=True)
    try:
        while child.poll() is None and not select.select([sys.stdin], [], [], LOOK_S)[0]:
            pass
        if child.poll() is None:
            _signal(child.pid, signal.SIGTERM)
            with contextlib.suppress(subprocess.TimeoutExpired):
                child.wait(PATIENCE_S)
    finally:
        _signal(child.pid, signal.SIGKILL)
    return child.wait(KILL_S)


def _signal(group: int, which: signal.Signals) -> None:
    with contextlib.suppress(ProcessLookupError):
        os.killpg(group, which)


if __name__ == "__main__":
    sys.exit(keep(sys.argv[1:]))
