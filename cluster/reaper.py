"""A small process beside a running cluster that ends what a killed one leaves behind.

Ray's own processes die with the process that started them, but not all of their children do so
within a minute. This one is told who they are, and sees its input end when the cluster does.
"""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Iterable
from pathlib import Path

from . import processes
from .processes import Process
from .run_folder import remove_folder

GRACE_S = 1.0  # for processes to end by themselves
EXIT_S = 5.0


class Reaper:
    """Started before what it watches over, closed after it."""

    def __init__(self, folder: Path) -> None:
        self._process = subprocess.Popen(
            [sys.executable, "-c", f"import {__name__} as r; r.main()", str(folder)],
            stdin=subprocess.PIPE,
            text=True,
            start_new_session=True,  # a terminal's signals are for the cluster alone
        )
        self.process = processes.find(self._process.pid)

    def watch(self, watched: Iterable[Process]) -> None:
        """These end with the cluster. May be said again."""
        assert self._process.stdin is not None
        lines = "".join(f"{process.pid} {process.started}\n" for process in watched)
        self._process.stdin.write(lines)
        self._process.stdin.flush()

    def close(self) -> None:
        """Idempotent."""
        assert self._process.stdin is not None
        self._process.stdin.close()
        self._process.wait(EXIT_S)


def main() -> None:
    watched: set[Process] = set()
    for line in sys.stdin:
        pid, started = line.split()
        watched.add(Process(int(pid), started=int(started), parent=0))
    processes.end(watched, within_s=GRACE_S)
    remove_folder(Path(sys.argv[1]))
