"""Puts one worker together from its specification: runner, scheduler, KV endpoint, loop."""

from __future__ import annotations

import time
from collections.abc import AsyncIterator
from contextlib import AsyncExitStack, asynccontextmanager
from dataclasses import dataclass, replace
from typing import Any

from ..decode_worker.scheduler import DecodeLimits, DecodeScheduler
from ..decode_worker.worker import DecodeWorker
from ..engine.blocks import BlockAllocator
from ..engine.compute import ComputeThread, StepRunner
from ..engine.layout import KVLayout
from ..engine.ranks import RankHost
from ..engine.request import TransferAddress
from ..engine.shard_plan import plan_shards
from ..engine.spec import load_spec
from ..engine.step_time_online import OnlineStepTime
from ..kv_transfer.events import TransferConfig
from ..kv_transfer.fit import Held, held_by, whole
from ..kv_transfer.memory import KVMemory, memory_on
from ..kv_transfer.rank_endpoint import RankEndpoint
from ..kv_transfer.ranked import Endpoint, RankDoor, RankedEndpoint
from ..prefill_worker.scheduler import PrefillLimits, PrefillScheduler
from ..prefill_worker.worker import PrefillWorker
from .paced import build_paced_runner, pool_bytes_per_s
from .proto import worker_pb2 as pb
from .spec import WorkerSpec
from .wire import address_to_pb


@dataclass(frozen=True, kw_only=True, slots=True)
class AssembledWorker:
    """A worker that is ready to run, and what it says about itself."""

    spec: WorkerSpec
    worker: PrefillWorker | DecodeWorker
    runner: StepRunner
    compute: ComputeThread
    kv: Endpoint
    address: TransferAddress

    @property
    def prefill(self) -> PrefillWorker | None:
        return self.worker if isinstance(self.worker, PrefillWorker) else None

    @property
    def decode(self) -> DecodeWorker | None:
        return self.worker if isinstance(self.worker, DecodeWorker) else None

    def check_ranks(self) -> None:
        """Raises RankLost when the worker cannot go on for want of a rank."""
        self.compute.runner.check_ranks()

    def load(self) -> pb.Load:
        load = self.worker.load()
        blocks = load.blocks
        return pb.Load(
            blocks=pb.Blocks(
                total=blocks.total,
                free=blocks.free,
                active=blocks.active,
                cached=blocks.cached,
                leased=blocks.leased,
            ),
            running=load.running,
            waiting=load.waiting,
            queued_tokens=load.queued_tokens,
            context_tokens=load.context_tokens,
            leases=self.worker.num_transfers,
            steps=self.compute.steps,
            preemptions=load.preemptions,
            hit_tokens=load.hit_tokens,
            asked_tokens=load.asked_tokens,
            step_age_s=self.compute.step_age_s(),
        )

    def description(self) -> pb.Description:
        layout = self.runner.layout
        worker = self.spec.worker
        return pb.Description(
            worker=pb.WorkerRef(name=worker.name, incarnation=worker.incarnation),
            role=self.spec.role,
            transfer=address_to_pb(self.address),
            model_fingerprint=layout.fingerprint,
            block_size=layout.block_size,
            num_blocks=layout.num_blocks,
            max_model_len=self.runner.max_model_len,
            max_batch_size=self.spec.decode.max_batch_size if self.spec.decode else 0,
            device=self.spec.pool.device,
            prefix_cache=self.worker.scheduler.prefix.is_on,
            pairs=[
                pb.Pair(
                    peer=pb.WorkerRef(name=pair.peer.name, incarnation=pair.peer.incarnation),
                    transport=pair.transport,
                    ready=pair.ready,
                    bytes=pair.num_bytes,
                    transfers=pair.transfers,
                    failures=pair.failures,
                )
                for pair in self.kv.pairs()
            ],
        )


@asynccontextmanager
async def assemble(
    spec: WorkerSpec, ranks: RankHost | None = None
) -> AsyncIterator[AssembledWorker]:
    """A worker with its model loaded and its KV endpoint listening, until the block is left.

    `ranks` is where the followers of a worker of several ranks come. Raises InvalidConfig and
    UnsupportedModel for a checkpoint or sizes that do not work, RankLost without a follower.
    """
    door = None
    if ranks is not None:
        door = RankDoor(ranks.host)
        ranks.note |= {"kv": door.address, "secret": door.secret}
    async with AsyncExitStack() as stack:
        memories: list[KVMemory] = []
        runner = _build_runner(spec, memories, ranks)
        (memory,) = memories
        stack.callback(memory.close)
        compute = ComputeThread(runner)
        stack.callback(compute.close)
        stack.callback(runner.close)
        config, held = transfer_config(spec, runner.layout), held_of(spec, runner.layout)
        own = RankEndpoint(spec.worker, runner.layout, memory, config, held)
        kv = own if door is None else RankedEndpoint(own, door, spec.num_ranks)
        stack.push_async_callback(kv.close)
        address = await kv.start()
        worker = _build_worker(spec, compute, kv, address)
        yield AssembledWorker(
            spec=spec, worker=worker, runner=runner, compute=compute, kv=kv, address=address
        )


def _build_runner(spec: WorkerSpec, memories: list[KVMemory], ranks: RankHost | None) -> StepRunner:
    def allocate(num_bytes: int) -> Any:
        memories.append(memory_on(spec.pool.device, num_bytes))
        return memories[-1].buffer

    if spec.pool.device == "paced":
        return build_paced_runner(spec, allocate)
    from ..engine.runner import build_runner  # torch, which a paced worker never waits for
    from ..engine.sampler import Sampler

    model = load_spec(spec.model.path)
    runner = build_runner(
        spec.model.path,
        sampler=Sampler(model.vocab_size, model.eos_token_ids),
        dtype=spec.model.dtype,
        kv_dtype=spec.kv.dtype,
        device=spec.pool.device,
        threads=spec.threads_a_rank or None,
        block_size=spec.kv.block_size,
        max_model_len=spec.model.max_model_len,
        memory_bytes=spec.kv.memory,
        tensor_parallel=spec.pool.tensor_parallel,
        pipeline_parallel=spec.pool.pipeline_parallel,
        section=spec.role,
        allocate=allocate,
        ranks=ranks,
    )
    try:
        runner.warm_up(spec.decode.max_batch_size if spec.decode is not None else 0)
    except BaseException:
        runner.close()
        raise
    return runner


def _build_worker(
    spec: WorkerSpec, compute: ComputeThread, kv: Endpoint, address: TransferAddress
) -> PrefillWorker | DecodeWorker:
    runner = compute.runner
    allocator = BlockAllocator(
        runner.layout.num_blocks,
        runner.layout.block_size,
        prefix_cache=spec.kv.prefix_cache and _prefixes_are_equal(runner),
    )
    if spec.prefill is not None:
        limits = PrefillLimits(
            max_batch_tokens=spec.prefill.max_batch_tokens,
            max_model_len=runner.max_model_len,
            eos_token_ids=runner.spec.eos_token_ids,
            ttft_ms=spec.slo.ttft_ms,
        )
        return PrefillWorker(
            scheduler=PrefillScheduler(allocator, limits, OnlineStepTime()),
            compute=compute,
            kv=kv,
            address=address,
            transfer_mode=spec.transfer.mode,
            clock=time.monotonic,
        )
    assert spec.decode is not None, "a worker has a role"
    limits = DecodeLimits(
        max_batch_size=spec.decode.max_batch_size,
        max_batch_tokens=spec.decode.max_batch_tokens,
        max_model_len=runner.max_model_len,
        eos_token_ids=runner.spec.eos_token_ids,
        ttft_ms=spec.slo.ttft_ms,
        tpot_ms=spec.slo.tpot_ms,
    )
    return DecodeWorker(
        scheduler=DecodeScheduler(allocator, limits, OnlineStepTime()),
        compute=compute,
        kv=kv,
        orphan_s=spec.transfer.lease_s,
        clock=time.monotonic,
    )


def transfer_config(spec: WorkerSpec, layout: KVLayout) -> TransferConfig:
    """The KV endpoint's slice of a worker's specification, of any of its ranks."""
    config = TransferConfig(
        transport=spec.transfer.transport,
        lease_s=spec.transfer.lease_s,
        silence_s=spec.heartbeat_timeout_s,
        host=spec.host,
    )
    if spec.pool.device == "paced":  # whose KV is small only in this machine's memory
        pace = pool_bytes_per_s(spec, layout)
        config = replace(config, small_bytes=0, pace_bytes_per_s=pace)
    return config


def held_of(spec: WorkerSpec, layout: KVLayout, rank: int = 0) -> Held:
    """What the worker's ranks hold, and what this one does: `layout`."""
    if spec.num_ranks == 1:
        return whole(layout)
    shards = plan_shards(
        load_spec(spec.model.path),
        tensor_parallel=spec.pool.tensor_parallel,
        pipeline_parallel=spec.pool.pipeline_parallel,
        section=spec.role,
    )
    return held_by(shards, rank, layout)


def _prefixes_are_equal(runner: StepRunner) -> bool:
    """Whether the KV of equal tokens is equal in every prompt. Dynamic rotary angles depend on
    the prompt's length as soon as it passes the model's own limit (`engine.rope`)."""
    model = runner.spec
    is_dynamic = model.rope is not None and model.rope.type == "dynamic"
    return not is_dynamic or runner.max_model_len <= model.max_positions
