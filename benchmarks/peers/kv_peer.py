"""A peer's KV engine as `kv_transfer.py` sees it: `kv_engine.py` in the peer's own venv."""

from __future__ import annotations

import json
import os
import select
import signal
import subprocess
import sys
from pathlib import Path

PEERS = ("nixl", "mooncake")
START_S = 60.0
ANSWER_S = 60.0


class PeerFailed(Exception):
    """The engine could not be started, or gave wrong bytes or none. Says why."""


class KVPeer:
    """One engine. It is stopped between jobs: some spin for progress while they wait."""

    def __init__(self, name: str, venv: Path) -> None:
        """Raises PeerFailed."""
        environment = {**os.environ, "LD_LIBRARY_PATH": str(venv / "lib")}
        python, script = venv / "bin" / "python", Path(__file__).with_name("kv_engine.py")
        if not python.exists():
            raise PeerFailed(f"no python in {venv}; see benchmarks/peers/README.md")
        self.process = subprocess.Popen(
            [python, script, name],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.DEVNULL,
            env=environment,
            start_new_session=True,
        )
        try:
            self._answer(START_S)
        except PeerFailed:
            self.close()
            raise PeerFailed(f"did not start; try: {python} {script} {name}") from None
        self._signal(signal.SIGSTOP)

    def run(self, job: tuple[list[int], list[int]], layers: int, repeats: int = 1) -> list[float]:
        """Seconds of each transfer, all compared. Raises PeerFailed."""
        self._signal(signal.SIGCONT)
        assert self.process.stdin is not None
        try:
            self.process.stdin.write(json.dumps([*job, layers, repeats]).encode() + b"\n")
            self.process.stdin.flush()
        except BrokenPipeError:
            raise PeerFailed("ended") from None
        seconds = json.loads(self._answer(ANSWER_S))
        self._signal(signal.SIGSTOP)
        return seconds

    def close(self) -> None:
        self._signal(signal.SIGKILL)
        self.process.wait()

    def _signal(self, number: signal.Signals) -> None:
        try:
            os.killpg(self.process.pid, number)
        except ProcessLookupError:
            if self.process.poll() is None:
                raise

    def _answer(self, limit_s: float) -> bytes:
        assert self.process.stdout is not None
        ready, _, _ = select.select([self.process.stdout], [], [], limit_s)
        line = self.process.stdout.readline() if ready else b""
        if not line:
            raise PeerFailed("gave wrong bytes, ended, or said nothing")
        return line


def open_peers(venvs: dict[str, Path | None]) -> dict[str, KVPeer]:
    """Those that can be run; the others are skipped aloud."""
    opened: dict[str, KVPeer] = {}
    for name, venv in venvs.items():
        try:
            if venv is None:
                raise PeerFailed(f"no venv given (--{name} VENV)")
            opened[name] = KVPeer(name, venv)
        except PeerFailed as error:
            print(f"skipped: {name}: {error}", file=sys.stderr)
    return opened
