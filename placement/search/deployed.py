"""A placement as it is simulated: its workers with their step times, memory and nodes, and what
joins them."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

from ..simulation.deployment import Deployment, WorkerModel
from ..simulation.network import Network
from .candidates import Placement, Pool
from .inventory import Bundle
from .problem import Problem
from .units import bundles_of


def deployment_of(problem: Problem, placement: Placement) -> Deployment:
    """One unit of the placement, on the nodes it gets, spares left out."""
    one = replace(placement, copies=1, spare=0)
    bundles = bundles_of(one, problem)
    assert bundles is not None, "only what fits is simulated"
    colocated = placement.prefill is None
    targets = problem.slo.default
    search = problem.config.search
    return Deployment(
        prefill=() if one.prefill is None else _workers(problem, "prefill", one.prefill, bundles),
        decode=_workers(problem, "decode", one.decode, bundles, mixed=colocated),
        kv_bytes_per_token=problem.kv_bytes_per_token,
        num_layers=problem.model.num_layers,
        block_size=problem.config.kv.block_size,
        max_model_len=problem.max_model_len,
        network=_network(placement) if search.kv_transfer else Network(),
        local_prefill="always" if colocated else "never",
        ttft_ms=targets.ttft_s * 1e3,
        tpot_ms=targets.tpot_s * 1e3,
        overheads=problem.overheads,
    )


def _network(placement: Placement) -> Network:
    """The narrower of both machine types, where they differ."""
    networks = [pool.shape.machine.network for pool in placement.pools]
    return Network(
        local=min((n.local for n in networks), key=lambda link: link.bytes_per_s),
        remote=min((n.remote for n in networks), key=lambda link: link.bytes_per_s),
    )


def _workers(
    problem: Problem, role: str, pool: Pool, bundles: Sequence[Bundle], *, mixed: bool = False
) -> tuple[WorkerModel, ...]:
    shape, search = pool.shape, problem.config.search
    latency = shape.prefill if role == "prefill" else shape.mixed if mixed else shape.decode
    tokens = search.max_batch_tokens if role == "prefill" else search.mixed_batch_tokens
    nodes = {bundle.worker: bundle.node for bundle in reversed(bundles)}
    return tuple(
        WorkerModel(
            name=f"{role}-{i}",
            latency=latency,
            num_blocks=shape.kv_tokens // problem.config.kv.block_size,
            max_batch_size=search.max_batch_size,
            max_batch_tokens=tokens,
            node=nodes[f"{role}-{i}"],
            num_devices=shape.gpus,
        )
        for i in range(pool.count)
    )
