"""A whole cluster in one process: real workers on threads, real gateway, no Ray.

What differs from `phasewise serve` is only who starts the workers, so a checkpoint costs a
second here where a launched cluster costs ten.
"""

from __future__ import annotations

import asyncio
import itertools
from collections.abc import AsyncIterator, Sequence
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any

from phasewise.cluster.client import AsyncClient
from phasewise.cluster.endpoint import WorkerServer
from phasewise.cluster.gateway import Gateway, GatewaySettings
from phasewise.cluster.router import RouterLimits
from phasewise.cluster.served_model import load_served_model
from phasewise.cluster.spec import WorkerSpec
from phasewise.configs.schema import (
    DecodeConfig,
    KVConfig,
    ModelConfig,
    PacedConfig,
    PrefillConfig,
    SloConfig,
    TransferConfig,
)
from phasewise.engine.request import WorkerId

MAX_MODEL_LEN = 1024
_incarnations = itertools.count(1)


class Cluster:
    """Workers by name, a gateway, and a client of it."""

    def __init__(self, gateway: Gateway, workers: dict[str, WorkerServer]) -> None:
        self.gateway = gateway
        self.workers = workers
        self.client: AsyncClient

    async def generate(self, prompt: Sequence[int], **sampling: Any) -> list[int]:
        """All tokens of one stream."""
        sampling = {"temperature": 0.0, "max_tokens": 8} | sampling
        tokens: list[int] = []
        async for output in self.client.generate(token_ids=prompt, **sampling):
            tokens += output.token_ids
        return tokens

    async def generate_all(
        self, prompts: Sequence[Sequence[int]], **sampling: Any
    ) -> list[list[int]]:
        """Streams of all prompts at once."""
        return list(await asyncio.gather(*(self.generate(p, **sampling) for p in prompts)))

    async def is_empty(self, timeout_s: float = 5.0) -> bool:
        """Whether every worker's blocks are free and no slot is open, within a time."""
        deadline_s = asyncio.get_running_loop().time() + timeout_s
        while asyncio.get_running_loop().time() < deadline_s:
            status = await self.client.status()
            if all(
                w.blocks_active == w.blocks_leased == w.open_slots == w.running == w.waiting == 0
                for w in status.workers
            ):
                return True
            await asyncio.sleep(0.05)
        return False


@asynccontextmanager
async def cluster(
    path: Path,
    *,
    prefill: int = 1,
    decode: int = 1,
    dtype: str = "float32",
    mode: str = "auto",
    transport: str = "auto",
    local_prefill: str = "never",
    num_bytes: int = 64 << 20,
    block_size: int = 16,
    max_batch_tokens: int = 2048,
    max_model_len: int = MAX_MODEL_LEN,
    max_failovers: int = 3,
    paced: PacedConfig | None = None,
) -> AsyncIterator[Cluster]:
    """Everything started and attached; everything gone on exit."""
    shared: dict[str, Any] = {
        "model": ModelConfig(path=path, dtype=dtype, max_model_len=max_model_len),  # pyright: ignore
        "kv": KVConfig(memory=num_bytes, block_size=block_size),
        "transfer": TransferConfig(transport=transport, mode=mode),  # pyright: ignore
        "slo": SloConfig(),
    }
    pool: dict[str, Any] = {"threads": 1}
    if paced is not None:
        shared["paced"] = paced
        pool["device"] = "paced"
    specs = [
        WorkerSpec(
            worker=WorkerId(name=f"prefill-{i}", incarnation=next(_incarnations)),
            prefill=PrefillConfig(**pool, max_batch_tokens=max_batch_tokens),
            **shared,
        )
        for i in range(prefill)
    ] + [
        WorkerSpec(
            worker=WorkerId(name=f"decode-{i}", incarnation=next(_incarnations)),
            decode=DecodeConfig(**pool, max_batch_tokens=max(65, max_batch_tokens)),
            **shared,
        )
        for i in range(decode)
    ]
    gateway = Gateway(
        load_served_model(path, name="test", max_model_len=max_model_len),
        GatewaySettings(
            grpc_address="127.0.0.1:0",
            router=RouterLimits(
                local_prefill="always" if prefill == 0 else local_prefill,  # pyright: ignore
                max_failovers=max_failovers,
            ),
        ),
    )
    workers = {spec.worker.name: WorkerServer(spec) for spec in specs}
    running = Cluster(gateway, workers)
    try:
        await gateway.start()
        addresses = await asyncio.gather(*(asyncio.to_thread(w.start) for w in workers.values()))
        for spec, address in zip(specs, addresses, strict=True):
            gateway.add_worker(address, spec.role, name=spec.worker.name)
        await gateway.wait_ready(20)
        async with AsyncClient(gateway.grpc_address) as client:
            running.client = client
            yield running
    finally:
        await gateway.stop()
        await asyncio.gather(*(asyncio.to_thread(w.stop) for w in workers.values()))
