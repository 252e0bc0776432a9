"""The digital twin of a cluster file: its workers, with step times from a profile or a sheet.

Nothing is launched. What a paced cluster pretends to be, its twin is.
"""

from __future__ import annotations

from dataclasses import replace
from typing import Literal

from ...configs.schema import ClusterConfig, DecodeConfig
from ...engine.errors import InvalidConfig
from ..latency.model_shape import ModelShape, read_shape
from ..latency.paced import paced_bytes_per_s, paced_shape, paced_source
from ..latency.phase_latency import LatencySource, Phase
from ..latency.transfer import Link
from ..workload.slo import SloPolicy
from .deployment import Deployment, Overheads, WorkerModel, replicas
from .network import Network

PROMPTS_A_STEP = 64  # at most, of a prefill worker: `PrefillLimits` has it, no key of the file


def shape_of_cluster(config: ClusterConfig) -> ModelShape:
    """Of the model that is served, or pretended, in the dtypes it is served in."""
    if _paced(config):
        return paced_shape(config.model, config.kv, config.paced)
    return read_shape(config.model.path).served_as(config.model.dtype, config.kv.dtype)


def twin_of(
    config: ClusterConfig,
    source: LatencySource | None,
    *,
    network: Network | None = None,
    overheads: Overheads | None = None,
) -> Deployment:
    """What `phasewise serve` would launch, on the nodes that `ray.nodes` names, or as one.

    `source` may be None for a paced cluster, which names its own. Without `network` KV travels
    for free, or as fast as a paced cluster says. Raises NoLatency where the step times of a
    parallelism are not known, and InvalidConfig where none are given.
    """
    config = _one_block_size(config)
    paced = _paced(config)
    if paced:
        source = paced_source(config.model, config.kv, config.paced)
    if source is None:
        raise InvalidConfig(
            "--profile",
            "no step times are given",
            "give --profile FILE, which phasewise profile writes, or --hardware SHEET",
        )
    shape = shape_of_cluster(config)
    if network is None:
        bytes_per_s = paced_bytes_per_s(config.paced, 1) if paced else 0.0
        network = Network(local=Link(bytes_per_s=bytes_per_s)) if bytes_per_s else Network()
    token_bytes = shape.kv_bytes_per_token
    block_bytes = token_bytes * config.kv.block_size
    prefill_blocks, decode_blocks = [int(memory // block_bytes) for memory in config.memories]
    colocated = config.prefill.replicas == 0
    # A paced worker's steps are those of both phases at once; a real one's are its own.
    both = paced or config.decode.local_prefill != "never" or colocated
    return Deployment(
        prefill=_pool(config, "prefill", source, prefill_blocks, "prefill"),
        decode=_pool(config, "decode", source, decode_blocks, "mixed" if both else "decode"),
        kv_bytes_per_token=token_bytes,
        num_layers=shape.num_layers,
        block_size=config.kv.block_size,
        max_model_len=_max_model_len(config, shape, (prefill_blocks, decode_blocks)),
        network=network,
        transfer_mode=config.transfer.mode,
        local_prefill="always" if colocated else config.decode.local_prefill,
        local_prefill_tokens=config.decode.local_prefill_tokens,
        prefix_cache=config.kv.prefix_cache,
        policy=config.gateway.policy,
        ttft_ms=config.slo.ttft_ms,
        tpot_ms=config.slo.tpot_ms,
        max_in_flight=config.gateway.max_in_flight,
        max_failovers=config.gateway.max_failovers,
        overheads=overheads or Overheads(),
    )


def with_targets(deployment: Deployment, policy: SloPolicy) -> Deployment:
    """For requests that bring the policy's targets, as `phasewise bench` sends them: schedulers
    order and cut by these. One target for all classes, the default one."""
    targets = policy.default
    return replace(deployment, ttft_ms=targets.ttft_s * 1e3, tpot_ms=targets.tpot_s * 1e3)


def _pool(
    config: ClusterConfig,
    role: Literal["prefill", "decode"],
    source: LatencySource,
    num_blocks: int,
    phase: Phase,
) -> tuple[WorkerModel, ...]:
    pool = config.prefill if role == "prefill" else config.decode
    if not pool.replicas:
        return ()
    return replicas(
        role,
        pool.replicas,
        source.phase(phase, pool.tensor_parallel, pool.pipeline_parallel),
        num_blocks=num_blocks,
        max_batch_tokens=pool.max_batch_tokens,
        max_batch_size=pool.max_batch_size if isinstance(pool, DecodeConfig) else PROMPTS_A_STEP,
        nodes=[_node(config, f"{role}-{i}") for i in range(pool.replicas)],
    )


def _node(config: ClusterConfig, worker: str) -> str:
    """Of the worker's first stage: workers that share it share those of the later ones too. A
    rehearsal only pretends its nodes, and every way is as fast as `paced.link` says."""
    if _paced(config):
        return ""
    return next((node for node, workers in config.ray.nodes.items() if worker in workers), "")


def _max_model_len(config: ClusterConfig, shape: ModelShape, num_blocks: tuple[int, int]) -> int:
    """As `serve` resolves 0: the model's own, as far as both KV pools hold one such sequence."""
    room = min(num_blocks) * config.kv.block_size
    asked = config.model.max_model_len
    if not room or asked > room:
        raise InvalidConfig(
            config.memory_keys[num_blocks.index(min(num_blocks))],
            f"holds {room} tokens, less than one sequence of {asked or config.kv.block_size}",
            "give more memory or lower model.max_model_len",
        )
    return asked or min(room, shape.max_positions)


def _one_block_size(config: ClusterConfig) -> ClusterConfig:
    """With it as `kv.block_size`."""
    prefill, decode = config.block_sizes
    if prefill != decode:
        raise InvalidConfig(
            "decode.block_size",
            f"{decode}, while prefill's blocks are of {prefill}: only pools with blocks of one "
            "size are simulated",
            "set decode.block_size=0 and prefill.block_size=0 for the simulation",
        )
    return replace(config, kv=replace(config.kv, block_size=decode))


def _paced(config: ClusterConfig) -> bool:
    return config.decode.device == "paced"
