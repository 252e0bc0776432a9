"""What the workers of a cluster file ask of machines, and what this machine has."""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path

from ..configs.errors import InvalidConfig
from ..configs.schema import ClusterConfig, DecodeConfig, PrefillConfig
from ..engine.request import WorkerId
from .spec import WorkerSpec, num_ranks

SHARE = 0.25  # of a CPU, asked by a worker that shares cores or computes elsewhere
PACED_SHARE = 0.05  # by a worker that sleeps through its steps

Resources = Mapping[str, float]  # by Ray's names: CPU, GPU


def worker_specs(config: ClusterConfig, cores: int) -> list[WorkerSpec]:
    """Every worker of a cluster file, in its first incarnation. A worker whose threads the file
    leaves open gets an equal share of a machine's `cores`."""
    share = max(1, cores // (config.prefill.replicas + config.decode.replicas))
    prefill = replace(config.prefill, threads=config.prefill.threads or share)
    decode = replace(config.decode, threads=config.decode.threads or share)
    kv = [replace(config.kv, block_size=size) for size in config.block_sizes]
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


def worker_resources(config: ClusterConfig) -> dict[str, list[Resources]]:
    """What each worker asks, by its name: an entry for each of its ranks."""
    return {
        name: [_asks(pool)] * num_ranks(pool)
        for role, pool in (("prefill", config.prefill), ("decode", config.decode))
        for name in _names(role, pool)
    }


def resources_here() -> Resources:
    """CPUs and GPUs that this process may use. Starts nothing and imports no driver."""
    gpus = sum(path.name.removeprefix("nvidia").isdigit() for path in Path("/dev").glob("nvidia*"))
    visible = os.environ.get("CUDA_VISIBLE_DEVICES")
    if visible is not None:
        names = [name.strip() for name in visible.split(",")]
        gpus = min(gpus, sum(name not in ("", "-1") for name in names))
    return {"CPU": float(len(os.sched_getaffinity(0))), "GPU": float(gpus)}


def check_room(asked: Mapping[str, Sequence[Resources]], has: Resources) -> None:
    """Raises InvalidConfig when the workers together ask for more than there is."""
    for kind in ("GPU", "CPU"):
        count = sum(rank.get(kind, 0.0) for ranks in asked.values() for rank in ranks)
        if count > has.get(kind, 0.0) + 1e-6:
            roles = {name.rpartition("-")[0] for name in asked if kind in asked[name][0]}
            raise InvalidConfig(
                " and ".join(f"{role}.replicas" for role in sorted(roles, reverse=True)),
                f"{len(asked)} workers ask for {count:g} {kind}, Ray has {has.get(kind, 0.0):g}",
                _remedy(kind),
            )


def _names(role: str, pool: PrefillConfig | DecodeConfig) -> list[str]:
    return [f"{role}-{index}" for index in range(pool.replicas)]


def _asks(pool: PrefillConfig | DecodeConfig) -> Resources:
    """Threads that the file asks for are cores of the worker's own; one that names none shares
    cores, but not without limit."""
    if pool.device == "cuda":
        return {"GPU": 1.0, "CPU": SHARE}
    if pool.device == "paced":
        return {"CPU": PACED_SHARE}
    return {"CPU": pool.threads / num_ranks(pool) if pool.threads else SHARE}


def _remedy(kind: str) -> str:
    if kind == "GPU":
        return "lower replicas, set device to cpu, or join a larger Ray with ray.address"
    return f"lower replicas or threads; with threads 0 a worker asks for {SHARE:g} CPU"
