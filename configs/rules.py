"""What keys of a cluster file ask of each other."""

from __future__ import annotations

from .errors import InvalidConfig
from .node_rules import check_nodes
from .schema import ClusterConfig, DecodeConfig, PacedConfig, PrefillConfig, RayConfig
from .values import parse_host_port


def check_rules(config: ClusterConfig) -> None:
    """Raises InvalidConfig for the first contradiction."""
    _check_phases(config)
    _check_splits(config)
    _check_devices(config)
    _check_paced(config)
    _check_addresses(config)
    check_nodes(config)


def _check_phases(config: ClusterConfig) -> None:
    """Somebody must compute prompts, and a step must hold every row."""
    if config.prefill.replicas == 0 and config.decode.local_prefill == "never":
        raise InvalidConfig(
            "decode.local_prefill",
            "never, while prefill.replicas is 0: nobody would compute prompts",
            "set prefill.replicas to 1 or more, or decode.local_prefill to always",
        )
    if config.decode.max_batch_tokens < config.decode.max_batch_size:
        raise InvalidConfig(
            "decode.max_batch_tokens",
            f"{config.decode.max_batch_tokens} is less than "
            f"decode.max_batch_size {config.decode.max_batch_size}: each row is a token a step",
            "raise decode.max_batch_tokens or lower decode.max_batch_size",
        )


def _check_splits(config: ClusterConfig) -> None:
    """KV moves between any two splits, in blocks of which the smaller divide the larger. A paced
    worker pretends to be a tensor-parallel group, but has one step at a time like all others."""
    for name, pool in (("prefill", config.prefill), ("decode", config.decode)):
        if pool.device == "paced" and pool.pipeline_parallel > 1:
            raise InvalidConfig(
                f"{name}.pipeline_parallel",
                f"{pool.pipeline_parallel}: a paced worker has one stage",
                "set it to 1",
            )
    prefill, decode = config.block_sizes
    small, large = sorted((prefill, decode))
    if large % small:
        name = "prefill" if config.prefill.block_size else "decode"
        raise InvalidConfig(
            f"{name}.block_size",
            f"blocks of {prefill} tokens in the prefill pool and of {decode} in the decode pool: "
            "the smaller do not divide the larger",
            f"use {large // small * small} instead of {large}, or the same in both",
        )


def _check_devices(config: ClusterConfig) -> None:
    pools = (("prefill", config.prefill), ("decode", config.decode))
    for name, pool in pools:
        _check_accelerator(name, pool, config.ray)
        if pool.device != "cpu" and pool.threads:
            raise InvalidConfig(
                f"{name}.threads",
                f"{pool.threads}, while {name}.device is {pool.device}: the CPU does not compute",
                f"leave {name}.threads out",
            )


def _check_accelerator(name: str, pool: PrefillConfig | DecodeConfig, ray: RayConfig) -> None:
    """Ray's name of a GPU chooses among the nodes of a Ray that has several kinds."""
    if not pool.accelerator or (pool.device == "cuda" and ray.address is not None):
        return
    where = "ray.address is null: this machine has what it has"
    if pool.device != "cuda":
        where = f"{name}.device is {pool.device}: no GPU computes"
    raise InvalidConfig(
        f"{name}.accelerator", f"{pool.accelerator}, while {where}", f"leave {name}.accelerator out"
    )


def _check_paced(config: ClusterConfig) -> None:
    """A rehearsal is of the whole cluster: the KV of paced workers means nothing to others."""
    paced = config.paced
    devices = {config.decode.device}
    if config.prefill.replicas:
        devices.add(config.prefill.device)
    if "paced" not in devices:
        if paced != PacedConfig():
            raise InvalidConfig(
                "paced",
                "is given, while no pool has device: paced",
                "set prefill.device and decode.device to paced, or take the section out",
            )
        return
    if devices != {"paced"}:
        other = "prefill" if config.decode.device == "paced" else "decode"
        raise InvalidConfig(
            f"{other}.device", "is not paced, while the other pool's is", "set both to paced"
        )
    if not paced.hardware and (paced.profile is None or paced.link != "free"):
        raise InvalidConfig(
            "paced.hardware",
            "is missing: step times and links have to come from somewhere",
            "name a sheet, as in h100, or give paced.profile and paced.link: free",
        )


def _check_addresses(config: ClusterConfig) -> None:
    grpc, http = config.gateway.grpc, config.gateway.http
    if http is not None and grpc == http and parse_host_port(grpc)[1]:
        raise InvalidConfig(
            "gateway.http", f"{http} is gateway.grpc's address too", "choose another port"
        )
