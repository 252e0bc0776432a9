"""Launch a cluster file and stay until told to stop.

Prints a table and the addresses once every worker is ready. SIGTERM or SIGINT drains: what runs is
finished within gateway.drain_s, new requests are answered UNAVAILABLE, then everything ends and
nothing is left behind. A second signal ends what runs at once, a third kills.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import logging
import os
import signal
import sys
import time
from typing import TYPE_CHECKING

from ...configs.load import load_cluster
from ...configs.schema import ClusterConfig
from ..checkpoint import resolve
from ..cli import EXIT_OK, EXIT_RUNTIME, add_config_arguments
from ..heap import settle_heap

if TYPE_CHECKING:
    from ..gateway import Gateway
    from ..service import Service

EXAMPLES = """\
  phasewise serve configs/local.yaml
  phasewise serve configs/local.yaml --set decode.replicas=2 --set gateway.grpc=127.0.0.1:6000
  phasewise serve configs/colocated.yaml --json
"""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    add_config_arguments(parser)
    parser.add_argument(
        "--json", action="store_true", help="print one JSON line with the addresses when ready"
    )


def run(args: argparse.Namespace) -> int:
    logging.basicConfig(format="%(asctime)s %(levelname)s %(message)s", level=logging.WARNING)
    config = resolve(load_cluster(args.config, args.overrides))
    return asyncio.run(_serve(config, as_json=args.json))


class Signals:
    """SIGINT and SIGTERM, counted from the moment this is made in a running loop."""

    def __init__(self) -> None:
        self.first = asyncio.Event()
        self.second = asyncio.Event()
        self.third = asyncio.Event()
        self.install()

    def install(self) -> None:
        """Idempotent; once more after something else has put its own handlers there."""
        loop = asyncio.get_running_loop()
        for number in (signal.SIGINT, signal.SIGTERM):
            loop.add_signal_handler(number, self._count)

    def _count(self) -> None:
        for event in (self.first, self.second, self.third):
            if not event.is_set():
                event.set()
                return


async def _serve(config: ClusterConfig, *, as_json: bool) -> int:
    signals = Signals()
    started_s = time.monotonic()
    from ..service import Service  # Ray and gRPC, which a bad file never waits for

    service = Service(config)
    killer = asyncio.create_task(_kill(service, signals.third))
    start = asyncio.create_task(service.start(signals.install))
    if not await _done_before(start, signals.first):
        start.cancel()  # it takes back what it has started so far
        await asyncio.wait({start})
        print("stopped before it was ready", file=sys.stderr)
        return EXIT_RUNTIME
    start.result()
    settle_heap()
    print(await _ready(service.gateway, time.monotonic() - started_s, as_json=as_json), flush=True)
    await signals.first.wait()
    print(f"draining for up to {config.gateway.drain_s:g} s", file=sys.stderr, flush=True)
    unfinished = await service.stop(config.gateway.drain_s, hurry=signals.second)
    killer.cancel()
    if unfinished:
        print(f"{unfinished} streams were cut off", file=sys.stderr)
    return EXIT_OK


async def _done_before(task: asyncio.Task[None], event: asyncio.Event) -> bool:
    waiting = asyncio.create_task(event.wait())
    try:
        await asyncio.wait({task, waiting}, return_when=asyncio.FIRST_COMPLETED)
    finally:
        waiting.cancel()
    return task.done()


async def _kill(service: Service, event: asyncio.Event) -> None:
    await event.wait()
    service.kill()
    os._exit(EXIT_RUNTIME)


async def _ready(gateway: Gateway, took_s: float, *, as_json: bool) -> str:
    """What is told when the cluster is ready."""
    if as_json:
        addresses = {"grpc": gateway.grpc_address, "http": gateway.http_address}
        return json.dumps({"ready": True, "ready_s": round(took_s, 2), **addresses})
    from .status import render

    lines = [render(await gateway.admin.status()), f"ready in {took_s:.1f} s"]
    lines.append(f"grpc  {gateway.grpc_address}")
    if gateway.http_address is not None:
        lines.append(f"http  http://{gateway.http_address}/v1")
    return "\n".join(lines)
