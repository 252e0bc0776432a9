"""One half of a 1P1D pair in a process of its own: the real worker classes, without RPC and Ray.

What the parent sends by pipe are calls, what comes back are the worker's reports.
"""

from __future__ import annotations

import asyncio
import os
import tempfile
import time
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from dataclasses import dataclass
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

from phasewise.decode_worker.worker import DecodeWorker
from phasewise.engine.blocks import BlockAllocator
from phasewise.engine.compute import ComputeThread
from phasewise.engine.layout import KVLayout
from phasewise.engine.request import TransferAddress, WorkerId
from phasewise.kv_transfer.endpoint import KVEndpoint
from phasewise.kv_transfer.events import TransferConfig
from phasewise.kv_transfer.memory import KVMemory, memory_on
from phasewise.prefill_worker.scheduler import PrefillLimits, PrefillScheduler
from phasewise.prefill_worker.worker import PrefillWorker

_HEARTBEAT_S = 0.25
_ORPHAN_S = 20.0


@dataclass(frozen=True, kw_only=True, slots=True)
class Half:
    """What a process is told."""

    role: str  # "prefill" | "decode"
    incarnation: int
    device: str
    config: dict[str, Any]
    num_blocks: int
    max_model_len: int
    max_batch_size: int
    max_batch_tokens: int


def main(half: Half, pipe: Connection) -> None:
    """Serve until the pipe ends."""
    asyncio.run(_serve(half, pipe))


async def _serve(half: Half, pipe: Connection) -> None:
    async with _worker(half) as (worker, endpoint, address):
        pipe.send(("ready", address))
        pumps = [
            asyncio.create_task(_report(worker, pipe)),
            asyncio.create_task(worker.follow_transfers()),
            asyncio.create_task(_sweep(worker)),
        ]
        calls = asyncio.create_task(_obey(worker, endpoint, pipe))
        done, _ = await asyncio.wait([*pumps, calls], return_when=asyncio.FIRST_COMPLETED)
        for task in pumps:
            task.cancel()
        await asyncio.gather(*pumps, return_exceptions=True)
        for task in done:
            if not task.cancelled() and task.exception() is not None:
                pipe.send(("broken", repr(task.exception())))
    os._exit(0)  # a thread may still wait in recv


async def _obey(
    worker: PrefillWorker | DecodeWorker, endpoint: KVEndpoint, pipe: Connection
) -> None:
    while True:
        name, arguments, options = await asyncio.to_thread(pipe.recv)
        if name == "stop":
            return
        if name == "connect":
            pipe.send(("connected", await endpoint.connect(*arguments)))
        elif name == "pairs":
            pipe.send(("pairs", endpoint.pairs()))
        else:
            getattr(worker, name)(*arguments, **options)


async def _report(worker: PrefillWorker | DecodeWorker, pipe: Connection) -> None:
    async for report in worker.run():
        pipe.send(("report", report))


async def _sweep(worker: PrefillWorker | DecodeWorker) -> None:
    while True:
        await asyncio.sleep(_HEARTBEAT_S)
        worker.sweep()


@asynccontextmanager
async def _worker(
    half: Half,
) -> AsyncIterator[tuple[PrefillWorker | DecodeWorker, KVEndpoint, TransferAddress]]:
    import torch  # after the parent chose interpreter or device

    from .models import random_runner, spec_of

    torch.set_num_threads(1)
    memories: list[KVMemory] = []

    def allocate(num_bytes: int) -> Any:
        memories.append(memory_on(half.device, num_bytes))
        return memories[0].buffer

    with tempfile.TemporaryDirectory() as folder:
        spec = spec_of(half.config, Path(folder))
    runner = random_runner(
        spec,
        torch.device(half.device),
        num_blocks=half.num_blocks,
        max_model_len=half.max_model_len,
        allocate=allocate,
    )
    if half.role == "decode" and half.device == "cpu":
        runner.keep_decode_on_device(half.max_batch_size)
    else:
        runner.warm_up(half.max_batch_size if half.role == "decode" else 0)
    compute = ComputeThread(runner)
    endpoint = _endpoint(half, runner.layout, memories[0])
    address = await endpoint.start()
    try:
        yield _of_role(half, compute, endpoint, address), endpoint, address
    finally:
        await endpoint.close()
        compute.close()


def _endpoint(half: Half, layout: KVLayout, memory: KVMemory) -> KVEndpoint:
    worker = WorkerId(name=half.role, incarnation=half.incarnation)
    # A first launch compiles for seconds, and two processes take turns on one GPU.
    config = TransferConfig(silence_s=5.0, answer_s=20.0, lease_s=20.0, small_bytes=0)
    return KVEndpoint(worker, layout, memory, config)


def _of_role(
    half: Half, compute: ComputeThread, endpoint: KVEndpoint, address: TransferAddress
) -> PrefillWorker | DecodeWorker:
    from .serving import scheduler_of

    runner = compute.runner
    if half.role == "decode":
        scheduler = scheduler_of(
            runner, max_batch_size=half.max_batch_size, max_batch_tokens=half.max_batch_tokens
        )
        return DecodeWorker(
            scheduler=scheduler,
            compute=compute,
            kv=endpoint,
            orphan_s=_ORPHAN_S,
            clock=time.monotonic,
        )
    limits = PrefillLimits(max_batch_tokens=half.max_batch_tokens, max_model_len=half.max_model_len)
    allocator = BlockAllocator(half.num_blocks, runner.layout.block_size)
    return PrefillWorker(
        scheduler=PrefillScheduler(allocator, limits),
        compute=compute,
        kv=endpoint,
        address=address,
        transfer_mode="auto",
        clock=time.monotonic,
    )
