"""A whole cluster in one process: real workers on threads, real gateway, no Ray.

What differs from `phasewise serve` is only who starts the workers, so a checkpoint costs a
second here where a launched cluster costs ten.
"""

from __future__ import annotations

import asyncio
import contextlib
import functools
import itertools
import threading
from collections.abc import AsyncIterator, Sequence
from contextlib import asynccontextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any
from unittest import mock

from phasewise.cluster import assembly
from phasewise.cluster.client import AsyncClient
from phasewise.cluster.endpoint import WorkerServer
from phasewise.cluster.follower import follow
from phasewise.cluster.gateway import Gateway, GatewaySettings
from phasewise.cluster.router import RouterLimits
from phasewise.cluster.served_model import load_served_model
from phasewise.cluster.spec import WorkerSpec
from phasewise.cluster.worker_link import LinkTimes
from phasewise.configs.schema import (
    DecodeConfig,
    KVConfig,
    ModelConfig,
    PacedConfig,
    PrefillConfig,
    SloConfig,
    TransferConfig,
)
from phasewise.engine.errors import RankLost
from phasewise.engine.ranks import RankHost
from phasewise.engine.request import WorkerId

MAX_MODEL_LEN = 1024
PATIENCE_S = 20.0  # with workers that share this process, and the machine, and may be slow
FOLLOWER = "follower-of-"
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

    async def leftovers(self, timeout_s: float = 30.0) -> dict[str, dict[str, int]]:
        """What each worker still holds that no request needs, once nothing does or time is up."""
        deadline_s = asyncio.get_running_loop().time() + timeout_s
        while True:
            left = {w.name: _held(w) for w in (await self.client.status()).workers}
            left = {name: held for name, held in left.items() if held}
            if not left or asyncio.get_running_loop().time() > deadline_s:
                return left
            await asyncio.sleep(0.05)


def _held(worker: Any) -> dict[str, int]:
    names = ("blocks_active", "blocks_leased", "open_slots", "running", "waiting", "leases")
    return {name: getattr(worker, name) for name in names if getattr(worker, name)}


@dataclass(frozen=True, kw_only=True)
class _Pools:
    """What all workers have in common, and each one's specification."""

    path: Path
    dtype: str
    max_model_len: int
    transfer: TransferConfig
    max_batch_tokens: int
    paced: PacedConfig | None

    def prefill(self, number: int, kv: KVConfig, split: tuple[int, int]) -> WorkerSpec:
        pool = PrefillConfig(**self._pool(split), max_batch_tokens=self.max_batch_tokens)
        return WorkerSpec(**self._shared(f"prefill-{number}"), prefill=pool, kv=kv)

    def decode(self, number: int, kv: KVConfig, split: tuple[int, int]) -> WorkerSpec:
        most = max(65, self.max_batch_tokens)
        pool = DecodeConfig(**self._pool(split), max_batch_tokens=most)
        return WorkerSpec(**self._shared(f"decode-{number}"), decode=pool, kv=kv)

    def _pool(self, split: tuple[int, int]) -> dict[str, Any]:
        device = {} if self.paced is None else {"device": "paced"}
        return {
            "threads": 1,
            "tensor_parallel": split[0],
            "pipeline_parallel": split[1],
            **device,
        }

    def _shared(self, name: str) -> dict[str, Any]:
        model = ModelConfig(path=self.path, dtype=self.dtype, max_model_len=self.max_model_len)  # pyright: ignore
        paced = {} if self.paced is None else {"paced": self.paced}
        worker = WorkerId(name=name, incarnation=next(_incarnations))
        return {
            "worker": worker,
            "model": model,
            "transfer": self.transfer,
            "slo": SloConfig(),
            "heartbeat_timeout_s": PATIENCE_S,
            **paced,
        }


def _server(spec: WorkerSpec) -> WorkerServer:
    """A worker; the followers of one of several ranks are threads too."""
    if spec.num_ranks == 1:
        return WorkerServer(spec)
    host = RankHost()
    for rank in range(1, spec.num_ranks):
        name = f"{FOLLOWER}{spec.worker}.{rank}"
        work = (spec, rank, host.address)
        threading.Thread(target=_follow, args=work, name=name, daemon=True).start()
    return WorkerServer(spec, host)


def _follow(spec: WorkerSpec, rank: int, address: str) -> None:
    with contextlib.suppress(RankLost):  # the test's own leader went first
        follow(spec, rank, address)


@asynccontextmanager
async def cluster(
    path: Path,
    *,
    prefill: int = 1,
    decode: int = 1,
    dtype: str = "float32",
    kv_dtype: str = "auto",
    mode: str = "auto",
    transport: str = "auto",
    local_prefill: str = "never",
    num_bytes: int = 64 << 20,
    block_size: int = 16,
    max_batch_tokens: int = 2048,
    max_model_len: int = MAX_MODEL_LEN,
    max_failovers: int = 3,
    prefix_cache: bool = True,
    paced: PacedConfig | None = None,
    prefill_split: tuple[int, int] = (1, 1),
    decode_split: tuple[int, int] = (1, 1),
    decode_block_size: int | None = None,
) -> AsyncIterator[Cluster]:
    """Everything started and attached; everything gone on exit. A split is (tensor, pipeline);
    `block_size` is of both pools where `decode_block_size` says no other."""
    pools = _Pools(
        path=path,
        dtype=dtype,
        max_model_len=max_model_len,
        transfer=TransferConfig(transport=transport, mode=mode),  # pyright: ignore
        max_batch_tokens=max_batch_tokens,
        paced=paced,
    )
    kv = KVConfig(
        memory=num_bytes,
        block_size=block_size,
        prefix_cache=prefix_cache,
        dtype=kv_dtype,  # pyright: ignore
    )
    decode_kv = replace(kv, block_size=decode_block_size or block_size)
    specs = [pools.prefill(i, kv, prefill_split) for i in range(prefill)]
    specs += [pools.decode(i, decode_kv, decode_split) for i in range(decode)]
    gateway = Gateway(
        load_served_model(path, name="test", max_model_len=max_model_len),
        GatewaySettings(
            grpc_address="127.0.0.1:0",
            times=LinkTimes(heartbeat_s=PATIENCE_S),
            router=RouterLimits(
                local_prefill="always" if prefill == 0 else local_prefill,  # pyright: ignore
                max_failovers=max_failovers,
            ),
        ),
    )
    async with _running(gateway, specs) as running:
        yield running


@asynccontextmanager
async def _running(gateway: Gateway, specs: list[WorkerSpec]) -> AsyncIterator[Cluster]:
    workers = {spec.worker.name: _server(spec) for spec in specs}
    running = Cluster(gateway, workers)
    patient = functools.partial(assembly.TransferConfig, answer_s=PATIENCE_S)
    try:
        await gateway.start()
        with mock.patch.object(assembly, "TransferConfig", patient):
            starts = [asyncio.to_thread(worker.start) for worker in workers.values()]
            addresses = await asyncio.gather(*starts)
        for spec, address in zip(specs, addresses, strict=True):
            gateway.add_worker(address, spec.role, name=spec.worker.name)
        await gateway.wait_ready(60)
        async with AsyncClient(gateway.grpc_address) as client:
            running.client = client
            yield running
    finally:
        await gateway.stop()
        await asyncio.gather(*(asyncio.to_thread(w.stop) for w in workers.values()))
        for thread in [t for t in threading.enumerate() if t.name.startswith(FOLLOWER)]:
            await asyncio.to_thread(thread.join, 30.0)
            assert not thread.is_alive(), "a follower ends with its leader"
