"""Which ranks lie on one node together, and whether the nodes that there are have room for them.

Pure: the launcher turns a group into a placement group of Ray, and tells what nodes it has.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import chain, repeat
from math import ceil

from ..configs.errors import InvalidConfig
from ..configs.schema import ClusterConfig
from .resources import SHARE, Resources, asks_of
from .spec import num_ranks

GRAIN = 10_000  # Ray counts in ten-thousandths
KINDS = ("GPU", "CPU")
TYPE = "accelerator_type:"
Place = tuple[str, int]  # a worker's name, one of its ranks


@dataclass(frozen=True, kw_only=True, slots=True)
class Bundle:
    """Ranks on one node, and what each of them takes there."""

    name: str  # of the node in the file, or of the worker that lies there alone
    ranks: Mapping[Place, Resources]

    @property
    def asks(self) -> dict[str, float]:
        """Of all ranks; rounded up, so that what Ray rounds for each still fits."""
        total: dict[str, int] = {}
        for asks in self.ranks.values():
            for kind, count in asks.items():
                total[kind] = total.get(kind, 0) + ceil(count * GRAIN - 1e-6)
        return {kind: count / GRAIN for kind, count in total.items()}

    @property
    def words(self) -> str:
        """As in "prefill-0 × 2, decode-0 × 4"."""
        counts: dict[str, int] = {}
        for worker, _ in self.ranks:
            counts[worker] = counts.get(worker, 0) + 1
        return ", ".join(f"{worker} × {count}" for worker, count in counts.items())

    def fits(self, node: Resources) -> bool:
        return all(count <= node.get(kind, 0.0) + 1e-6 for kind, count in self.asks.items())


@dataclass(frozen=True, kw_only=True, slots=True)
class Group:
    """Bundles on different nodes, given together or not at all."""

    name: str
    bundles: tuple[Bundle, ...]


def groups_of(config: ClusterConfig) -> tuple[Group, ...]:
    """Where a cluster file puts its workers: as `ray.nodes` says, all in one group, or each worker
    on any one node. On a Ray of our own, nodes are only pretended (`configs.node_rules`)."""
    asks = {worker: [asks_of(pool)] * num_ranks(pool) for worker, pool in config.workers.items()}
    if not config.ray.nodes or config.ray.address is None:
        return tuple(
            Group(name=worker, bundles=(Bundle(name=worker, ranks=_places(worker, ranks)),))
            for worker, ranks in asks.items()
        )
    on_node: dict[str, dict[Place, Resources]] = {node: {} for node in config.ray.nodes}
    for worker, ranks in asks.items():
        nodes = chain.from_iterable(
            repeat(node, devices.get(worker, 0)) for node, devices in config.ray.nodes.items()
        )
        # One process pretends to be all of a paced worker's devices, on the first one's node.
        for node, (place, asked) in zip(nodes, _places(worker, ranks).items(), strict=False):
            on_node[node][place] = asked
    bundles = (Bundle(name=node, ranks=ranks) for node, ranks in on_node.items() if ranks)
    return (Group(name="ray.nodes", bundles=tuple(bundles)),)


def check_room(groups: Sequence[Group], nodes: Mapping[str, Resources]) -> None:
    """Raises InvalidConfig when the nodes, by address, could not hold the groups if nothing else
    ran there. That no other group stands in the way, Ray alone finds out."""
    for group in groups:
        if len(group.bundles) > len(nodes):
            raise InvalidConfig(
                "ray.nodes",
                f"names {len(group.bundles)} nodes, Ray has {len(nodes)}: {listed(nodes)}",
                "let more nodes join that Ray, or lay the workers on fewer",
            )
    _check_total(groups, nodes)
    for group in groups:
        _check_bundles(group, nodes)


def listed(nodes: Mapping[str, Resources]) -> str:
    """As in "10.0.0.1 with 8 GPU, 64 CPU; 10.0.0.2 with 16 CPU"."""
    return "; ".join(f"{address} with {_amount(has)}" for address, has in nodes.items())


def _places(worker: str, ranks: Sequence[Resources]) -> dict[Place, Resources]:
    return {(worker, rank): asks for rank, asks in enumerate(ranks)}


def _check_total(groups: Sequence[Group], nodes: Mapping[str, Resources]) -> None:
    bundles = [bundle for group in groups for bundle in group.bundles]
    for kind in KINDS:
        asked = [bundle for bundle in bundles if kind in bundle.asks]
        count = sum(bundle.asks[kind] for bundle in asked)
        has = sum(node.get(kind, 0.0) for node in nodes.values())
        if count > has + 1e-6:
            workers = {worker for bundle in asked for worker, _ in bundle.ranks}
            where = "" if len(nodes) == 1 else f" on {len(nodes)} nodes: {listed(nodes)}"
            raise InvalidConfig(
                " and ".join(f"{role}.replicas" for role in _roles(workers)),
                f"{len(workers)} workers ask for {count:g} {kind}, Ray has {has:g}{where}",
                _remedy(kind),
            )


def _check_bundles(group: Group, nodes: Mapping[str, Resources]) -> None:
    """Each bundle some node, and no two the same one."""
    for bundle in group.bundles:
        if not any(bundle.fits(node) for node in nodes.values()):
            raise _too_large(group, bundle, nodes)
    taken: dict[str, int] = {}
    for index, bundle in enumerate(group.bundles):
        if not _match(group.bundles, index, nodes, taken, set()):
            raise InvalidConfig(
                f"ray.nodes.{bundle.name}",
                f"asks for {_amount(bundle.asks)} ({bundle.words}), and all nodes that have so "
                f"much are others' of ray.nodes: {listed(nodes)}",
                "let another such node join that Ray, or lay the workers on other nodes",
            )


def _match(
    bundles: Sequence[Bundle],
    index: int,
    nodes: Mapping[str, Resources],
    taken: dict[str, int],
    tried: set[str],
) -> bool:
    """Give the bundle a node, others moving to another one where they can (Kuhn)."""
    for address, node in nodes.items():
        if address in tried or not bundles[index].fits(node):
            continue
        tried.add(address)
        if address not in taken or _match(bundles, taken[address], nodes, taken, tried):
            taken[address] = index
            return True
    return False


def _too_large(group: Group, bundle: Bundle, nodes: Mapping[str, Resources]) -> InvalidConfig:
    """For one node, whichever it is."""
    asks = f"asks for {_amount(bundle.asks)} on one node"
    if group.name == "ray.nodes":
        return InvalidConfig(
            f"ray.nodes.{bundle.name}",
            f"{asks} ({bundle.words}), and none has so much: {listed(nodes)}",
            "give it fewer devices, or let a larger node join that Ray",
        )
    role = bundle.name.rpartition("-")[0]
    key, remedy = f"{role}.threads", "lower it"
    if any(kind.startswith(TYPE) for kind in bundle.asks):
        key, remedy = f"{role}.accelerator", "name what is there, or let such a node join that Ray"
    elif len(bundle.ranks) > 1:
        key = f"{role}.tensor_parallel and {role}.pipeline_parallel"
        remedy = "say in ray.nodes which pipeline stages lie on which node, or lower them"
    return InvalidConfig(
        key, f"{bundle.name} {asks}, and none has so much: {listed(nodes)}", remedy
    )


def _amount(resources: Resources) -> str:
    """As in "8 GPU, 64 CPU, H100"."""
    counts = [f"{resources[kind]:g} {kind}" for kind in KINDS if resources.get(kind)]
    return ", ".join(counts + [kind[len(TYPE) :] for kind in resources if kind.startswith(TYPE)])


def _roles(workers: set[str]) -> list[str]:
    return sorted({worker.rpartition("-")[0] for worker in workers}, reverse=True)


def _remedy(kind: str) -> str:
    if kind == "GPU":
        return "lower replicas, set device to cpu, or join a larger Ray with ray.address"
    return f"lower replicas or threads; with threads 0 a worker asks for {SHARE:g} CPU"
