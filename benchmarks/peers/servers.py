"""The servers under comparison, each started on a free port of 127.0.0.1 and surely ended."""

from __future__ import annotations

import contextlib
import http.client
import json
import os
import shutil
import socket
import subprocess
import sys
import tempfile
import time
import urllib.request
from collections.abc import Callable, Iterator
from pathlib import Path

from .keeper import KILL_S, PATIENCE_S

KEEPER = Path(__file__).with_name("keeper.py")
PHASEWISE = Path(sys.executable).parent / "phasewise"
READY_S = 240.0
ANSWER_S, ANSWERED_S = 15.0, 30.0  # a try at a first completion, and all tries

Process = subprocess.Popen[bytes]


class PeerMissing(Exception):
    """A peer that is not installed here; the comparison says so and goes on."""


class ServerDied(Exception):
    """A server ended by itself."""


@contextlib.contextmanager
def phasewise(checkpoint: Path, *, prefill: int, decode: int, threads: int) -> Iterator[int]:
    """`phasewise serve` on Ray; yields the HTTP port."""
    port, grpc = free_port(), free_port()
    settings = {
        "model.path": checkpoint,
        "model.dtype": "bfloat16",
        "model.served_name": checkpoint.name,
        "prefill.replicas": prefill,
        "decode.replicas": decode,
        "decode.local_prefill": "never" if prefill else "always",
        "decode.max_batch_size": 64,
        "decode.max_batch_tokens": 2048,
        "prefill.threads": threads,
        "decode.threads": threads,
        "kv.memory": "256MiB",
        "gateway.http": f"127.0.0.1:{port}",
        "gateway.grpc": f"127.0.0.1:{grpc}",
    }
    config = Path(__file__).resolve().parents[2] / "configs" / "local.yaml"
    sets = [part for key, value in settings.items() for part in ("--set", f"{key}={value}")]
    with _running([str(PHASEWISE), "serve", str(config), *sets], {}) as process:
        _wait_ready(port, [process])
        _wait_answer(port, checkpoint.name, [process])
        yield port


@contextlib.contextmanager
def vllm(venv: Path, checkpoint: Path) -> Iterator[int]:
    """One vLLM server on both cores; yields its port."""
    port = free_port()
    with _vllm_server(venv, checkpoint, port, {"OMP_NUM_THREADS": "2"}, []) as process:
        _wait_ready(port, [process])
        _wait_answer(port, checkpoint.name, [process])
        yield port


@contextlib.contextmanager
def vllm_pair(venv: Path, checkpoint: Path) -> Iterator[int]:
    """vLLM's own 1P1D: two servers, a core each, KV over NIXL, behind vllm-router.

    The router says that it is healthy before its servers can answer, so that readiness is a
    completion that came back whole.
    """
    router = venv / "bin" / "vllm-router"
    if not router.exists():
        raise PeerMissing(f"{router} is not there; install vllm-router and nixl in that venv")
    transfer = (
        '{"kv_connector":"NixlConnector","kv_role":"kv_both","kv_buffer_device":"cpu",'
        '"kv_load_failure_policy":"fail"}'
    )
    ports = [free_port(), free_port()]
    processes: list[Process] = []
    with contextlib.ExitStack() as stack:
        for port in ports:
            environment = {
                "OMP_NUM_THREADS": "1",
                "VLLM_NIXL_SIDE_CHANNEL_PORT": str(free_port()),
                "UCX_TLS": "tcp,sm,self",
                "UCX_NET_DEVICES": "lo",
            }
            arguments = ["--kv-transfer-config", transfer]
            server = _vllm_server(venv, checkpoint, port, environment, arguments)
            processes.append(stack.enter_context(server))
        for port in ports:
            _wait_ready(port, processes)
        front = free_port()
        command = [str(router), "--policy", "round_robin", "--vllm-pd-disaggregation"]
        command += ["--prefill", f"http://127.0.0.1:{ports[0]}"]
        command += ["--decode", f"http://127.0.0.1:{ports[1]}"]
        command += ["--host", "127.0.0.1", "--port", str(front)]
        processes.append(stack.enter_context(_running(command, {})))
        _wait_ready(front, processes)
        _wait_answer(front, checkpoint.name, processes)
        yield front


@contextlib.contextmanager
def _vllm_server(
    venv: Path, checkpoint: Path, port: int, environment: dict[str, str], arguments: list[str]
) -> Iterator[Process]:
    binary = venv / "bin" / "vllm"
    if not binary.exists():
        raise PeerMissing(f"{binary} is not there; see benchmarks/peers/README.md")
    command = [str(binary), "serve", str(checkpoint), "--served-model-name", checkpoint.name]
    command += ["--host", "127.0.0.1", "--port", str(port), "--dtype", "bfloat16"]
    command += ["--max-model-len", "2048", "--max-num-seqs", "64", "--enforce-eager"]
    quiet = {
        "HF_HUB_OFFLINE": "1",
        "VLLM_CPU_KVCACHE_SPACE": "1",
        "VLLM_CPU_OMP_THREADS_BIND": "nobind",
        "VLLM_NO_USAGE_STATS": "1",
    }
    with _running([*command, *arguments], quiet | environment) as process:
        yield process


@contextlib.contextmanager
def _running(command: list[str], environment: dict[str, str]) -> Iterator[Process]:
    """A process group of its own, whose keeper ends all of it when we do, or when we are gone."""
    folder = tempfile.mkdtemp(prefix="bench-")
    log = open(Path(folder) / "log", "w+")  # noqa: SIM115 - closed below, after the process
    process = subprocess.Popen(
        [sys.executable, str(KEEPER), *command],
        stdin=subprocess.PIPE,
        stdout=log,
        stderr=subprocess.STDOUT,
        env={**os.environ, **environment},
        start_new_session=True,
    )
    try:
        yield process
    except Exception:  # whatever it was, the server's last words may say why
        log.seek(0)
        print("".join(log.readlines()[-30:]), file=sys.stderr)
        raise
    finally:
        _end(process)
        log.close()
        shutil.rmtree(folder, ignore_errors=True)


def _end(process: Process) -> None:
    assert process.stdin is not None
    process.stdin.close()
    process.wait(PATIENCE_S + KILL_S + 10.0)  # the keeper's own bounds, and some


def _wait_ready(port: int, processes: list[Process]) -> None:
    """Until the server says that it is healthy. Raises ServerDied, TimeoutError."""

    def healthy() -> bool:
        url = f"http://127.0.0.1:{port}/health"
        return urllib.request.urlopen(url, timeout=2).status == 200

    _wait_until(healthy, f"port {port}: healthy", processes, READY_S)


def _wait_answer(port: int, model: str, processes: list[Process]) -> None:
    """Until a completion comes back whole. Raises ServerDied, TimeoutError."""
    ask = {"model": model, "prompt": list(range(5, 69)), "max_tokens": 4, "ignore_eos": True}

    def answers() -> bool:
        request = urllib.request.Request(
            f"http://127.0.0.1:{port}/v1/completions",
            json.dumps(ask).encode(),
            {"Content-Type": "application/json"},
        )
        with urllib.request.urlopen(request, timeout=ANSWER_S) as response:
            return json.load(response)["usage"]["completion_tokens"] == ask["max_tokens"]

    _wait_until(answers, f"port {port}: a whole answer", processes, ANSWERED_S)


def _wait_until(
    holds: Callable[[], bool], what: str, processes: list[Process], limit_s: float
) -> None:
    deadline_s, last = time.monotonic() + limit_s, ""
    while time.monotonic() < deadline_s:
        dead = [process for process in processes if process.poll() is not None]
        if dead:
            raise ServerDied(f"{what}: {dead[0].args!r} ended with {dead[0].returncode}")
        try:
            if holds():
                return
        except (OSError, http.client.HTTPException, ValueError, LookupError) as error:
            last = repr(error)  # not there yet, or not whole yet
        time.sleep(0.5)
    raise TimeoutError(f"{what}: not within {limit_s:g} s; the last try: {last}")


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]
