"""How soon leases end, and blocks come back, when a peer of a KV transfer dies or hangs.

    python benchmarks/kv_faults.py [--json FILE] [--rounds 5] [--transports shm tcp gloo]

A process with leases at every layer of their computation is killed (SIGKILL) or stopped (SIGSTOP),
as sender and as receiver, against an endpoint of this process with the configuration's defaults
(a peer is lost within 1 s of silence). `ended` is from the signal to each lease's terminal event,
`released` to the moment its blocks may be used again; a stopped writer over shared memory keeps
them until it wakes or dies, so there it is from the SIGKILL that follows. Every lease of every
round must end once, as lost, and give its blocks back; `limit` is what the design allows.
"""

from __future__ import annotations

import argparse
import asyncio
import contextlib
import json
import os
import signal
import sys
import time
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
from phasewise.engine.layout import KVLayout
from phasewise.engine.request import TransferAddress, WorkerId
from phasewise.kv_transfer.endpoint import KVEndpoint
from phasewise.kv_transfer.events import Asked, Ended, Outcome, Released, TransferConfig
from phasewise.kv_transfer.layer_clock import LayerClock
from phasewise.kv_transfer.memory import PoolMemory

LAYOUT = KVLayout(
    num_layers=8, num_blocks=128, num_kv_heads=4, block_size=16, head_dim=64, dtype="float16"
)
BLOCKS_A_LEASE = 8
LAYERS = range(LAYOUT.num_layers + 1)  # of a lease's KV that are computed when it happens
LIMIT_S = 1.0
BOUND_S = 20.0
SIGNALS = {"SIGKILL": signal.SIGKILL, "SIGSTOP": signal.SIGSTOP}


class Worker:
    """One end, with a pool of its own."""

    def __init__(self, name: str, transport: str) -> None:
        self.memory = PoolMemory(LAYOUT.num_bytes)
        config = TransferConfig(transport=transport, small_bytes=0)
        worker = WorkerId(name=name, incarnation=time.time_ns())
        self.kv = KVEndpoint(worker, LAYOUT, self.memory, config)
        self.ended: dict[int, tuple[Outcome, float]] = {}
        self.released: dict[int, float] = {}
        self.held: dict[int, list[int]] = {}
        self.num_asked = 0

    async def watch(self) -> None:
        async for event in self.kv.events():
            now_s = time.monotonic()
            match event:
                case Asked():
                    blocks = blocks_of(self.num_asked)
                    self.num_asked += 1
                    assert self.kv.answer(event, blocks)
                    self.held[event.lease] = blocks
                case Ended():
                    assert event.lease not in self.ended, "a lease ends once"
                    self.ended[event.lease] = event.outcome, now_s
                case Released():
                    assert list(event.blocks) == self.held.pop(event.lease), "all of them, once"
                    self.released[event.lease] = now_s

    async def push_all(self, peer: TransferAddress) -> list[int]:
        """A lease for each number of layers."""
        leases = []
        for index, layers in enumerate(LAYERS):
            leases.append(lease := self.kv.new_lease())
            assert await self.kv.ask(peer, lease, BLOCKS_A_LEASE)
            clock = LayerClock()
            self.kv.push(lease, blocks_of(index), 0, clock)
            for layer in range(layers):
                clock.finish(layer)
        return leases


def blocks_of(index: int) -> list[int]:
    first = index * BLOCKS_A_LEASE
    return list(range(first, first + BLOCKS_A_LEASE))


@dataclass(kw_only=True)
class Cell:
    """What was measured of one transport, victim and signal. Seconds."""

    transport: str
    victim: str
    signal: str
    ended_s: list[float] = field(default_factory=list)
    released_s: list[float] = field(default_factory=list)

    def row(self) -> dict[str, Any]:
        row: dict[str, Any] = {"transport": self.transport, "victim": self.victim}
        row |= {"signal": self.signal, "leases": len(self.ended_s), "limit_s": LIMIT_S}
        for name, values in (("ended", self.ended_s), ("released", self.released_s)):
            if values:
                p50, p99 = np.quantile(values, [0.5, 0.99])
                row |= {f"{name}_p50_s": p50, f"{name}_p99_s": p99, f"{name}_max_s": max(values)}
        return row


async def until(holds: Any) -> None:
    async with asyncio.timeout(BOUND_S):
        while not holds():
            await asyncio.sleep(0.001)


async def strike(cell: Cell, worker: Worker, victim: asyncio.subprocess.Process) -> None:
    """The victim is ready: the fault, and what comes of it."""
    assert victim.stdin is not None and victim.stdout is not None
    if cell.victim == "receiver":
        line = await asyncio.wait_for(victim.stdout.readline(), BOUND_S)
        leases = await worker.push_all(address_of(json.loads(line)))
    else:
        await asyncio.wait_for(victim.stdout.readline(), BOUND_S)
        leases = list(worker.held)
    assert len(leases) == len(LAYERS)
    await asyncio.sleep(0.1 + 0.25 * np.random.default_rng().random())  # anywhere between beats
    struck_s = time.monotonic()
    os.kill(victim.pid, SIGNALS[cell.signal])
    await until(lambda: worker.ended.keys() >= set(leases))
    assert {worker.ended[lease][0] for lease in leases} == {Outcome.LOST}
    cell.ended_s += [worker.ended[lease][1] - struck_s for lease in leases]
    if cell.victim == "receiver":
        return
    if cell.signal == "SIGSTOP" and cell.transport == "shm":
        assert not worker.released, "a stopped writer may write when it wakes"
        struck_s = time.monotonic()
        os.kill(victim.pid, signal.SIGKILL)
    await until(lambda: not worker.held)
    cell.released_s += [worker.released[lease] - struck_s for lease in leases]


async def round_of(cell: Cell) -> None:
    worker = Worker("survivor", cell.transport)
    address = await worker.kv.start()
    watching = asyncio.create_task(worker.watch())
    command = [sys.executable, __file__, "--victim", cell.victim, "--transports", cell.transport]
    victim = await asyncio.create_subprocess_exec(
        *command, stdin=asyncio.subprocess.PIPE, stdout=asyncio.subprocess.PIPE
    )
    assert victim.stdin is not None
    try:
        victim.stdin.write(json.dumps(asdict(address)).encode() + b"\n")
        await strike(cell, worker, victim)
        assert not watching.done(), watching.result()
    finally:
        with contextlib.suppress(ProcessLookupError):
            os.kill(victim.pid, signal.SIGKILL)
        await victim.wait()
        await worker.kv.close()
        watching.cancel()
        worker.memory.close()


def address_of(fields: dict[str, Any]) -> TransferAddress:
    given = {"worker": WorkerId(**fields["worker"]), "holds": tuple(fields["holds"]), "ranks": ()}
    return TransferAddress(**{**fields, **given})


async def be_victim(side: str, transport: str) -> None:
    """Be ready, and wait for the end."""
    worker = Worker("victim", transport)
    address = await worker.kv.start()
    watching = asyncio.create_task(worker.watch())
    peer = address_of(json.loads(await asyncio.to_thread(sys.stdin.readline)))
    if side == "sender":
        await worker.push_all(peer)
    print(json.dumps(asdict(address)), flush=True)
    await asyncio.to_thread(sys.stdin.readline)
    watching.cancel()


async def measure(transports: list[str], rounds: int) -> list[dict[str, Any]]:
    rows = []
    for transport in transports:
        for victim in ("sender", "receiver"):
            for name in SIGNALS:
                cell = Cell(transport=transport, victim=victim, signal=name)
                for _ in range(rounds):
                    await round_of(cell)
                rows.append(row := cell.row())
                print(told(row), flush=True)
    return rows


def told(row: dict[str, Any]) -> str:
    text = f"{row['transport']:6} {row['victim']:9} {row['signal']:8} {row['leases']:4} leases"
    for name in ("ended", "released"):
        if f"{name}_p50_s" in row:
            values = [1e3 * row[f"{name}_{kind}_s"] for kind in ("p50", "p99", "max")]
            text += f"   {name} p50 {values[0]:6.1f}  p99 {values[1]:6.1f}  max {values[2]:6.1f} ms"
    return text


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--json", type=Path)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--transports", nargs="+", default=["shm", "tcp", "gloo"])
    parser.add_argument("--victim", choices=["sender", "receiver"], help=argparse.SUPPRESS)
    given = parser.parse_args()
    if given.victim:
        asyncio.run(be_victim(given.victim, given.transports[0]))
        return
    rows = asyncio.run(measure(given.transports, given.rounds))
    worst_s = max(row["ended_max_s"] for row in rows)
    print(f"slowest terminal event {worst_s:.3f} s, allowed {LIMIT_S:g} s")
    if given.json:
        result = {"cores": os.cpu_count(), "rounds": given.rounds, "rows": rows}
        given.json.write_text(json.dumps(result, indent=1) + "\n")


if __name__ == "__main__":
    main()
