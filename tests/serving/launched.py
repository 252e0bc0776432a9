"""`phasewise serve` as a process of its own: what an operator starts, stops and kills."""

from __future__ import annotations

import json
import os
import select
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import IO

from phasewise.cluster import processes
from phasewise.cluster.client import Client
from phasewise.cluster.processes import Process

ROOT = Path(__file__).parents[2]
LOCAL = ROOT / "configs" / "local.yaml"
READY_S = 120.0
END_S = 60.0
PATIENCE = "gateway.heartbeat_timeout_s=10"
MAIN = "import sys; from phasewise.cluster.cli import main; sys.exit(main(sys.argv[1:]))"


class Launched:
    """A cluster file under `serve --json`, on ports that the system picks unless overridden, with
    patience for workers that a busy machine leaves waiting."""

    def __init__(
        self,
        overrides: Sequence[str] = (),
        *,
        config: Path = LOCAL,
        folder: Path | None = None,
        environment: Mapping[str, str] | None = None,
    ) -> None:
        """`folder`: where its run folder goes, short enough for Ray's sockets."""
        given = ("gateway.grpc=127.0.0.1:0", "gateway.http=127.0.0.1:0", PATIENCE)
        words = [word for override in (*given, *overrides) for word in ("--set", override)]
        self.errors: IO[str] = tempfile.TemporaryFile("w+")  # noqa: SIM115
        variables = dict(environment or {}) | ({} if folder is None else {"TMPDIR": str(folder)})
        self.process = subprocess.Popen(
            [sys.executable, "-c", MAIN, "serve", str(config), "--json", *words],
            stdout=subprocess.PIPE,
            stderr=self.errors,
            text=True,
            env=os.environ | variables,
        )
        self.address = ""
        self.http = ""

    @property
    def pid(self) -> int:
        return self.process.pid

    def wait_ready(self) -> None:
        assert self.process.stdout is not None
        readable, _, _ = select.select([self.process.stdout], [], [], READY_S)
        line = self.process.stdout.readline() if readable else ""
        if not line:
            self.kill()
            raise AssertionError(f"not ready: {self.error_text()}")
        ready = json.loads(line)
        self.address, self.http = ready["grpc"], ready["http"]

    def client(self) -> Client:
        return Client(self.address)

    def worker_pids(self) -> list[int]:
        with self.client() as client:
            return [row.pid for row in client.status().workers]

    def descendants(self) -> list[Process]:
        return processes.descendants(self.pid)

    def signal(self, number: int) -> None:
        self.process.send_signal(number)

    def wait(self) -> int:
        """The exit code."""
        return self.process.wait(END_S)

    def stop(self) -> int:
        self.signal(signal.SIGTERM)
        return self.wait()

    def kill(self) -> None:
        """`kill -9` of the serving process alone."""
        self.process.kill()
        self.process.wait(END_S)

    def error_text(self) -> str:
        self.errors.seek(0)
        return self.errors.read()


def all_end(watched: Sequence[Process], within_s: float) -> bool:
    """Whether every process ends by itself in time."""
    deadline_s = time.monotonic() + within_s
    while any(processes.is_alive(process) for process in watched):
        if time.monotonic() > deadline_s:
            return False
        time.sleep(0.05)
    return True
