"""What the workers of a cluster file ask of machines, and what this machine has."""

from __future__ import annotations

import os
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path

from ..configs.schema import ClusterConfig, DecodeConfig, PrefillConfig
from ..engine.request import WorkerId
from .spec import WorkerSpec, num_ranks

SHARE = 0.25  # of a CPU, asked by a worker that shares cores or computes elsewhere
PACED_SHARE = 0.05  # by a worker that sleeps through its steps
TRACE = 0.001  # of a node's one accelerator_type, which says of what kind its GPUs are

Resources = Mapping[str, float]  # by Ray's names: CPU, GPU, accelerator_type:KIND


def worker_specs(config: ClusterConfig, cores: int) -> list[WorkerSpec]:
    """Every worker of a cluster file, in its first incarnation. A worker whose threads the file
    leaves open gets an equal share of a machine's `cores`."""
    share = max(1, cores // (config.prefill.replicas + config.decode.replicas))
    prefill = replace(config.prefill, threads=config.prefill.threads or share)
    decode = replace(config.decode, threads=config.decode.threads or share)
    kv = [
        replace(config.kv, block_size=size, memory=memory)
        for size, memory in zip(config.block_sizes, config.memories, strict=True)
    ]
    heartbeat_s = config.gateway.heartbeat_timeout_s
    spec = WorkerSpec(
        worker=WorkerId(name="", incarnation=1),
        model=config.model,
        kv=config.kv,
        transfer=config.transfer,
        slo=config.slo,
        paced=config.paced,
        heartbeat_s=heartbeat_s / 4,
        heartbeat_timeout_s=heartbeat_s,
    )
    prefills = [
        replace(spec, worker=WorkerId(name=name, incarnation=1), prefill=prefill, kv=kv[0])
        for name in _names("prefill", config.prefill)
    ]
    decodes = [
        replace(spec, worker=WorkerId(name=name, incarnation=1), decode=decode, kv=kv[1])
        for name in _names("decode", config.decode)
    ]
    return prefills + decodes


def resources_here() -> Resources:
    """CPUs and GPUs that this process may use. Starts nothing and imports no driver."""
    gpus = sum(path.name.removeprefix("nvidia").isdigit() for path in Path("/dev").glob("nvidia*"))
    visible = os.environ.get("CUDA_VISIBLE_DEVICES")
    if visible is not None:
        names = [name.strip() for name in visible.split(",")]
        gpus = min(gpus, sum(name not in ("", "-1") for name in names))
    return {"CPU": float(len(os.sched_getaffinity(0))), "GPU": float(gpus)}


def _names(role: str, pool: PrefillConfig | DecodeConfig) -> list[str]:
    return [f"{role}-{index}" for index in range(pool.replicas)]


def asks_of(pool: PrefillConfig | DecodeConfig) -> Resources:
    """What each rank of a pool's workers takes. Threads that the file asks for are cores of the
    worker's own; one that names none shares cores, but not without limit."""
    if pool.device == "cuda":
        kind = {f"accelerator_type:{pool.accelerator}": TRACE} if pool.accelerator else {}
        return {"GPU": 1.0, "CPU": SHARE, **kind}
    if pool.device == "paced":
        return {"CPU": PACED_SHARE}
    return {"CPU": pool.threads / num_ranks(pool) if pool.threads else SHARE}
