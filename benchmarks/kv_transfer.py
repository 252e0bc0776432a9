"""How fast KV moves between two processes of one host, and how soon one block is acknowledged.

    python benchmarks/kv_transfer.py [--json FILE] [--repeats 5] [--nixl VENV] [--mooncake VENV]

A job is 32 layers × 128 scattered blocks of 64 KiB from one pool to another (256 MiB). `shm`, `tcp`
and `gloo` are this project's endpoints, timed from `push` to the sender's `Ended(committed)`,
leases and all; `memcpy`, `plain_tcp` and `plain_gloo` are the references of `kv_references`;
`nixl` and `mooncake`, over TCP, run in venvs of their own (benchmarks/peers/README.md).
Engines take turns within each repeat, ratios are to the same repeat's memcpy, and every transfer
is compared byte by byte. The last column is one 64 KiB block of one layer, with acknowledgement;
there `bare_shm` and `bare_tcp` are the transports alone, without leases and event loops.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import multiprocessing
import os
import random
import select
import statistics
import sys
import time
from dataclasses import dataclass, replace
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

import numpy as np
import torch
from kv_references import Gloo, Memcpy, PlainTcp
from peers.kv_peer import PEERS, KVPeer, open_peers
from phasewise.engine.layout import KVLayout
from phasewise.engine.request import TransferAddress, WorkerId
from phasewise.kv_transfer.copier import Push
from phasewise.kv_transfer.endpoint import KVEndpoint
from phasewise.kv_transfer.events import Asked, Ended, Outcome, TransferConfig
from phasewise.kv_transfer.layer_clock import finished_clock
from phasewise.kv_transfer.lease_receiver import ReceiverTable
from phasewise.kv_transfer.memory import PoolMemory
from phasewise.kv_transfer.shm import ShmWriter
from phasewise.kv_transfer.tcp import TcpReader, TcpWriter

# 64 KiB a block: 8 KV heads of 64 in float16, 32 positions
LAYOUT = KVLayout(
    num_layers=32, num_blocks=160, num_kv_heads=8, block_size=32, head_dim=64, dtype="float16"
)
NUM_BLOCKS = 128
REFERENCES = {"memcpy": Memcpy, "plain_tcp": PlainTcp, "plain_gloo": Gloo}
BARE = {"bare_shm": "shm", "bare_tcp": "tcp"}
Job = tuple[list[int], list[int]]
TIMEOUT_S = 60.0


@dataclass(frozen=True, kw_only=True, slots=True)
class Row:
    """One engine's figures."""

    engine: str
    gb_per_s: float  # median
    ratio: float  # median over repeats, to memcpy
    block_us: float  # median, one block of one layer


class Pair:
    """Two processes that run one engine over the two pools."""

    def __init__(self, engine: str, pools: dict[str, PoolMemory], layout: KVLayout) -> None:
        context = multiprocessing.get_context("fork")
        ends = context.Pipe()
        self.control: dict[str, Connection] = {}
        self.processes = []
        for role, peer in zip(("prefill", "decode"), ends, strict=True):
            mine, theirs = context.Pipe()
            process = context.Process(
                target=_child, args=(engine, role, pools, layout, peer, theirs), daemon=True
            )
            process.start()
            self.control[role] = mine
            self.processes.append(process)
        for role in self.control:
            self._result(role)

    def run(self, job: Job, repeats: int = 1) -> list[float]:
        """Seconds of each transfer of the job, on the prefill side's clock."""
        self.control["decode"].send((job, repeats))
        self.control["prefill"].send((job, repeats))
        seconds = self._result("prefill")
        self._result("decode")
        return seconds

    def close(self) -> None:
        for process in self.processes:
            process.kill()
            process.join()

    def _result(self, role: str) -> Any:
        if not self.control[role].poll(TIMEOUT_S):
            raise TimeoutError(f"{role} did not answer")
        return self.control[role].recv()


def _child(
    engine: str,
    role: str,
    pools: dict[str, PoolMemory],
    layout: KVLayout,
    peer: Connection,
    control: Connection,
) -> None:
    mapped = {
        name: PoolMemory.attach(os.dup(pool.fd), pool.num_bytes) for name, pool in pools.items()
    }
    torch.set_num_threads(1)  # as a worker with one core of two, and as the references
    if engine in BARE:
        _serve_reference(Bare(BARE[engine], role, mapped, layout, peer), role, control)
    elif engine in REFERENCES:
        _serve_reference(REFERENCES[engine](role, mapped, layout, peer), role, control)
    else:
        asyncio.run(_serve_endpoint(engine, role, mapped[role], layout, peer, control))


class Bare:
    """A transport with a byte for an acknowledgement: what an endpoint's latency is made of."""

    def __init__(
        self,
        transport: str,
        role: str,
        pools: dict[str, PoolMemory],
        layout: KVLayout,
        peer: Connection,
    ) -> None:
        self.plain = PlainTcp(role, pools, layout, peer)
        self.layout, sock = layout, self.plain.sock
        self.table = ReceiverTable(
            num_layers=layout.num_layers, block_bytes=layout.block_bytes, lease_s=3600.0
        )
        self.reader = None
        if transport == "shm":
            self.writer = ShmWriter(pools["prefill"], layout, pools["decode"], layout)
        else:
            self.writer = TcpWriter(pools[role], layout, sock)
            self.reader = TcpReader(sock, pools[role], layout, self.table, 1)

    def prefill(self, source: list[int], target: list[int]) -> None:
        push = Push(
            lease=1,
            generation=self.table_generation(target),
            first=0,
            source=tuple(source),
            target=tuple(target),
            clock=finished_clock(self.layout.num_layers),
        )
        self.writer.write(push, range(self.layout.num_layers))
        if self.reader is None:
            self.plain.sock.sendall(b"s")
        assert self.plain.sock.recv(1) == b"k"

    def decode(self, source: list[int], target: list[int]) -> None:
        self.table_generation(target)
        entry = self.table.get(1)
        assert entry is not None and entry.covered is not None
        if self.reader is None:
            assert self.plain.sock.recv(1) == b"s"
        while self.reader is not None and min(entry.covered) < len(target):
            select.select([self.plain.sock], [], [])
            self.reader.read(0.0)
        self.plain.sock.sendall(b"k")

    def table_generation(self, target: list[int]) -> int:
        """Both sides grant alike, so that they agree without a word."""
        self.table.lost(1, "next", drained=True)
        self.table.fetch(1, WorkerId(name="p", incarnation=1), 1, tuple(target), 0, True, 0.0)
        entry = self.table.get(1)
        assert entry is not None
        return entry.generation


def _serve_reference(engine: Any, role: str, control: Connection) -> None:
    control.send("ready")
    transfer = engine.prefill if role == "prefill" else engine.decode
    while True:
        (source, target), repeats = control.recv()
        seconds = []
        for _ in range(repeats):
            begin = time.perf_counter()
            transfer(source, target)
            seconds.append(time.perf_counter() - begin)
        control.send(seconds)


async def _serve_endpoint(
    transport: str,
    role: str,
    memory: PoolMemory,
    layout: KVLayout,
    peer: Connection,
    control: Connection,
) -> None:
    config = TransferConfig(
        transport=transport, silence_s=3600.0, lease_s=3600.0, answer_s=TIMEOUT_S
    )
    endpoint = KVEndpoint(WorkerId(name=role, incarnation=1), layout, memory, config)
    address = await endpoint.start()
    if role == "decode":
        peer.send(address)
        await _serve_decode(endpoint, control)
    else:
        decode: TransferAddress = peer.recv()
        assert await endpoint.connect(decode) == transport
        await _serve_prefill(endpoint, decode, layout, control)


async def _serve_prefill(
    endpoint: KVEndpoint, decode: TransferAddress, layout: KVLayout, control: Connection
) -> None:
    control.send("ready")
    events = endpoint.events()
    while True:
        (source, _), repeats = await asyncio.to_thread(control.recv)
        seconds = []
        for _ in range(repeats):
            lease = endpoint.new_lease()
            assert await endpoint.ask(decode, lease, len(source))
            clock = finished_clock(layout.num_layers)
            begin = time.perf_counter()
            endpoint.push(lease, source, 0, clock)
            endpoint.commit(lease, len(source) * layout.block_size, 0)
            ended = await anext(events)
            seconds.append(time.perf_counter() - begin)
            assert isinstance(ended, Ended) and ended.outcome is Outcome.COMMITTED, ended
        control.send(seconds)


async def _serve_decode(endpoint: KVEndpoint, control: Connection) -> None:
    control.send("ready")
    events = endpoint.events()
    while True:
        (_, target), repeats = await asyncio.to_thread(control.recv)
        for _ in range(repeats):
            asked = await anext(events)
            assert isinstance(asked, Asked)
            assert endpoint.answer(asked, target)
            ended = await anext(events)
            assert isinstance(ended, Ended) and ended.outcome is Outcome.COMMITTED, ended
        control.send(None)


def scattered(layout: KVLayout, count: int, rng: random.Random) -> Job:
    """Blocks in an order of their own on each side."""
    return (
        rng.sample(range(layout.num_blocks), count),
        rng.sample(range(layout.num_blocks), count),
    )


class Arrays:
    """The two pools as the parent sees them, to fill, poison and compare."""

    def __init__(self, layout: KVLayout) -> None:
        self.layout = layout
        self.pools = {
            name: PoolMemory(layout.num_bytes, prefault=True) for name in ("prefill", "decode")
        }
        shape = (layout.num_layers, layout.num_blocks, layout.block_bytes // 8)
        self.words = {
            name: np.frombuffer(pool.buffer, np.uint64).reshape(shape)
            for name, pool in self.pools.items()
        }
        words = self.words["prefill"]
        words[:] = np.random.default_rng(0).integers(0, 1 << 63, words.shape, dtype=np.uint64)

    def poison(self) -> None:
        self.words["decode"][:, :, ::64] = 0xDEAD

    def check(self, engine: str, job: Job) -> None:
        source, target = job
        for layer in range(self.layout.num_layers):
            sent, got = self.words["prefill"][layer], self.words["decode"][layer]
            for block, other in zip(source, target, strict=True):
                if not np.array_equal(sent[block], got[other]):
                    raise AssertionError(f"{engine}: wrong bytes in layer {layer}, block {other}")


def measure_throughput(
    engines: list[str], repeats: int, peers: dict[str, KVPeer]
) -> dict[str, list[float]]:
    """Seconds of the whole job, a list per engine, in turns."""
    arrays, rng = Arrays(LAYOUT), random.Random(0)
    pairs = {engine: Pair(engine, arrays.pools, LAYOUT) for engine in engines}
    everyone = [*engines, *peers]
    seconds: dict[str, list[float]] = {engine: [] for engine in everyone}
    try:
        for repeat in range(repeats + 1):  # the first warms up
            for engine in rng.sample(everyone, len(everyone)):
                job = scattered(LAYOUT, NUM_BLOCKS, rng)
                if engine in peers:  # with pools of its own, which it compares
                    taken = peers[engine].run(job, LAYOUT.num_layers)
                else:
                    arrays.poison()
                    taken = pairs[engine].run(job)
                    arrays.check(engine, job)
                if repeat:
                    seconds[engine] += taken
    finally:
        for pair in pairs.values():
            pair.close()
    return seconds


def measure_peer_block(peer: KVPeer, repeats: int) -> float:
    """As `measure_block`."""
    rng, taken = random.Random(1), []
    for _ in range(repeats):
        job = scattered(LAYOUT, 1, rng)
        taken += peer.run(job, 1, 33)[3:]
    return statistics.median(taken)


def measure_block(engines: list[str], repeats: int) -> dict[str, float]:
    """Median seconds of one block of one layer, acknowledged."""
    layout = replace(LAYOUT, num_layers=1)
    arrays, rng = Arrays(layout), random.Random(1)
    medians = {}
    for engine in engines:
        pair = Pair(engine, arrays.pools, layout)
        try:
            taken = []
            for _ in range(repeats):
                job = scattered(layout, 1, rng)
                arrays.poison()
                pair.run(job, 3)
                taken += pair.run(job, 30)
                arrays.check(engine, job)
            medians[engine] = statistics.median(taken)
        finally:
            pair.close()
    return medians


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--json", metavar="FILE", nargs="?", const="-", help="'-': to stdout")
    parser.add_argument("--repeats", type=int, default=5)
    for name in PEERS:
        parser.add_argument(f"--{name}", type=Path, metavar="VENV")
    arguments = parser.parse_args()
    peers = open_peers({name: getattr(arguments, name) for name in PEERS})
    engines = [*REFERENCES, "shm", "tcp", "gloo"]
    try:
        seconds = measure_throughput(engines, arguments.repeats, peers)
        block = measure_block([*engines, *BARE], arguments.repeats)
        block |= {name: measure_peer_block(peers[name], arguments.repeats) for name in peers}
    finally:
        for peer in peers.values():
            peer.close()
    size = LAYOUT.num_layers * NUM_BLOCKS * LAYOUT.block_bytes
    rows = [
        Row(
            engine=engine,
            gb_per_s=size / statistics.median(taken) / 1e9,
            ratio=statistics.median(
                base / own for base, own in zip(seconds["memcpy"], taken, strict=True)
            ),
            block_us=block[engine] * 1e6,
        )
        for engine, taken in seconds.items()
    ]
    print(f"{'engine':10} {'GB/s':>7} {'× memcpy':>9} {'1 block µs':>11}", file=sys.stderr)
    for row in rows:
        line = f"{row.engine:10} {row.gb_per_s:7.2f} {row.ratio:9.2f} {row.block_us:11.0f}"
        print(line, file=sys.stderr)
    for engine in BARE:
        print(f"{engine:10} {'':7} {'':9} {block[engine] * 1e6:11.0f}", file=sys.stderr)
    if arguments.json:
        report = {
            "job_bytes": size,
            "load": os.getloadavg()[0],
            "bare_block_us": {engine: block[engine] * 1e6 for engine in BARE},
            "rows": [
                {name: getattr(row, name) for name in ("engine", "gb_per_s", "ratio", "block_us")}
                for row in rows
            ],
        }
        text = json.dumps(report, indent=1)
        if arguments.json == "-":
            print(text)
        else:
            Path(arguments.json).write_text(text + "\n")


if __name__ == "__main__":
    main()
