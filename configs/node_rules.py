"""What `ray.nodes` and the workers of a cluster file ask of each other."""

from __future__ import annotations

from .errors import InvalidConfig
from .schema import ClusterConfig, DecodeConfig, PrefillConfig


def check_nodes(config: ClusterConfig) -> None:
    """Every device of every worker has its node, and no tensor-parallel group two of them.

    Raises InvalidConfig for the first contradiction.
    """
    ray = config.ray
    if not ray.nodes:
        if ray.tensor_parallel_across_nodes:
            raise InvalidConfig(
                "ray.tensor_parallel_across_nodes",
                "is given, while ray.nodes says of no worker that it lies on several",
                "name each node's devices in ray.nodes, or take it out",
            )
        return
    # A rehearsal on one machine only pretends its nodes.
    if ray.address is None and len(ray.nodes) > 1 and config.decode.device != "paced":
        raise InvalidConfig(
            "ray.nodes",
            f"names {len(ray.nodes)} nodes, while ray.address is null: this machine alone",
            "set ray.address to auto or host:port, or take ray.nodes out to serve on one machine",
        )
    _check_names(config)
    for worker, pool in config.workers.items():
        _check_shares(config, worker, pool)


def _check_names(config: ClusterConfig) -> None:
    for node, devices in config.ray.nodes.items():
        for worker in devices:
            if worker not in config.workers:
                raise InvalidConfig(
                    f"ray.nodes.{node}.{worker}",
                    "is no worker of this file",
                    f"name {', '.join(config.workers)}, or raise replicas",
                )


def _check_shares(config: ClusterConfig, worker: str, pool: PrefillConfig | DecodeConfig) -> None:
    group, stages = pool.tensor_parallel, pool.pipeline_parallel
    placed = 0
    for node, devices in config.ray.nodes.items():
        count = devices.get(worker, 0)
        placed += count
        # A group that ends on this node is whole; what is left over is cut.
        if placed % group and not config.ray.tensor_parallel_across_nodes:
            raise InvalidConfig(
                f"ray.nodes.{node}.{worker}",
                f"{count} devices cut a tensor-parallel group of {group}",
                f"give a multiple of {group}, or set ray.tensor_parallel_across_nodes: true where "
                "the network is fast enough for its sums",
            )
    if placed != group * stages:
        raise InvalidConfig(
            "ray.nodes",
            f"gives {worker} {placed} devices of the {group * stages} that its tensor_parallel "
            f"{group} and pipeline_parallel {stages} take",
            f"name {group * stages} in all for it, over as many nodes as they shall lie on",
        )
