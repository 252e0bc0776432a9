"""The folder of one running cluster: what its processes write, gone when it ends.

Promises: a folder belongs to a living process as long as that holds its lock, so what a killed
one left behind is known and swept by the next start.
"""

from __future__ import annotations

import contextlib
import fcntl
import os
import shutil
import tempfile
from pathlib import Path

PREFIX = "phasewise-"
MAX_PATH = 40  # Ray's sockets lie some 60 characters below; a socket's path ends at 107


class RunFolder:
    """A folder of our own below the system's temporary one."""

    def __init__(self, parent: Path | None = None) -> None:
        parent = _short_parent() if parent is None else parent
        sweep(parent)
        self.path = Path(tempfile.mkdtemp(prefix=PREFIX, dir=parent))
        self._lock = os.open(self.path / "lock", os.O_CREAT | os.O_RDWR, 0o600)
        fcntl.flock(self._lock, fcntl.LOCK_EX)

    def remove(self) -> None:
        """Idempotent. Waits for nobody: the processes that write here have ended."""
        if self._lock >= 0:
            remove_folder(self.path)
            os.close(self._lock)
            self._lock = -1


def remove_folder(path: Path) -> None:
    """Remove what is there, if it is."""
    shutil.rmtree(path, ignore_errors=True)


def sweep(parent: Path) -> list[Path]:
    """Remove what dead processes left behind in `parent`; returns the folders removed."""
    swept = []
    for path in parent.glob(f"{PREFIX}*/lock"):
        with contextlib.suppress(OSError):  # another user's, alive, or just swept by another start
            lock = os.open(path, os.O_RDWR)
            try:
                fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
                shutil.rmtree(path.parent)
                swept.append(path.parent)
            finally:
                os.close(lock)
    return swept


def _short_parent() -> Path:
    folder = tempfile.gettempdir()
    return Path(folder if len(folder) <= MAX_PATH else "/tmp")
