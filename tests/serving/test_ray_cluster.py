"""A Ray that runs already, on more than one node: joined, used and left as it was."""

from __future__ import annotations

import os
import secrets
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest
from phasewise.cluster import processes
from phasewise.tests.serving.launched import Launched

pytestmark = [pytest.mark.slow, pytest.mark.timeout(300)]
NODES = Path(__file__).with_name("ray_of_two_nodes.py")
END_S = 60.0


@contextmanager
def ray_of_two_nodes() -> Iterator[tuple[str, dict[str, str]]]:
    """Its address, and the environment of whoever joins it."""
    environment = {
        "RAY_AUTH_TOKEN": secrets.token_hex(32),
        # By default Ray takes a loopback address for the machine's outer one.
        "RAY_ENABLE_WINDOWS_OR_OSX_CLUSTER": "0",
        "RAY_USAGE_STATS_ENABLED": "0",
    }
    process = subprocess.Popen(
        [sys.executable, str(NODES)],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        stderr=subprocess.DEVNULL,
        text=True,
        env=os.environ | environment,
    )
    try:
        assert process.stdout is not None
        lines = iter(process.stdout.readline, "")
        yield next(line.strip() for line in lines if line.startswith("127.0.0.1:")), environment
    finally:
        process.communicate(timeout=END_S)


def tokens_of(launched: Launched) -> list[int]:
    with launched.client() as client:
        stream = client.generate(
            token_ids=[5, 6, 7] * 20, max_tokens=8, temperature=0, ignore_eos=True
        )
        tokens = [token for output in stream for token in output.token_ids]
        assert {row.state for row in client.status().workers} == {"ready"}
    return tokens


def test_a_ray_of_two_nodes_is_joined_and_left_as_it_was() -> None:
    """A worker with a thread of its own takes one CPU, as many as a node has: they stand on
    different nodes. The second start finds the places that the first has left."""
    with ray_of_two_nodes() as (address, environment):
        threads = ["prefill.threads=1", "decode.threads=1"]
        joined = [f"ray.address={address}", "decode.local_prefill=never", *threads]
        answers = []
        for _ in range(2):
            launched = Launched(joined, environment=environment)
            launched.wait_ready()
            answers.append(tokens_of(launched))
            workers = launched.worker_pids()
            assert launched.stop() == 0, launched.error_text()
            assert not any(processes.find(pid) for pid in workers)
        assert len(answers[0]) == 8 and answers[0] == answers[1]
        refused = Launched([*joined, "decode.replicas=2"], environment=environment)
        assert refused.wait() == 2
        assert "decode.replicas" in refused.error_text()
