"""The machines that may be used, and where workers lie on them.

A worker's tensor-parallel group never leaves an NVLink domain unless asked; its pipeline stages
may lie on different ones, and then become a bundle each.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

from ...configs.plan_schema import MachineConfig
from ...engine.errors import InvalidConfig
from ..latency.hardware import Hardware, read_hardware
from ..latency.transfer import Link
from ..simulation.network import Network

NETWORK_LATENCY_S = 20e-6  # before the first byte on RDMA; assumed
LOCAL_LATENCY_S = 10e-6
Domain = tuple[str, int, int]  # machine type, node of it, NVLink domain of that


@dataclass(frozen=True, kw_only=True, slots=True)
class MachineType:
    """Equal nodes. The hardware carries the prices and bandwidths that hold here."""

    name: str
    hardware: Hardware
    nodes: int
    gpus_per_node: int
    nvlink_domain: int
    decode_power_w: float  # of a device that only decodes

    @property
    def gpus(self) -> int:
        return self.nodes * self.gpus_per_node

    @property
    def domains_a_node(self) -> int:
        """What is left over is one too."""
        return -(-self.gpus_per_node // self.nvlink_domain)

    @property
    def network(self) -> Network:
        """Between workers on these nodes."""
        hardware = self.hardware
        inside = hardware.link_bandwidth
        return Network(
            local=Link(bytes_per_s=inside, latency_s=LOCAL_LATENCY_S),
            remote=Link(bytes_per_s=hardware.network_bandwidth, latency_s=NETWORK_LATENCY_S),
        )


@dataclass(frozen=True, kw_only=True, slots=True)
class Footprint:
    """What one worker occupies: `stages` groups of `group` GPUs on machines of one type."""

    worker: str
    machine: str
    group: int  # tensor parallel
    stages: int  # pipeline parallel


@dataclass(frozen=True, kw_only=True, slots=True)
class Bundle:
    """GPUs of one NVLink domain for one worker."""

    worker: str
    node: str
    domain: int  # of the node
    gpus: int

    @property
    def order(self) -> tuple[str, int, int, str]:
        """Nodes of a type by their number, then domains, then workers."""
        machine, _, number = self.node.rpartition("-")
        return machine, int(number), self.domain, self.worker


def read_inventory(
    machines: Mapping[str, MachineConfig], folder: Path = Path()
) -> dict[str, MachineType]:
    """By name. Raises InvalidConfig with the key path; own sheets are found from `folder`."""
    if not any(machine.nodes for machine in machines.values()):
        raise InvalidConfig("inventory", "has no nodes", "give nodes: 1 or more somewhere")
    return {name: _machine(name, machine, folder) for name, machine in machines.items()}


def _machine(name: str, machine: MachineConfig, folder: Path) -> MachineType:
    sheet = machine.hardware
    path = str(folder / sheet) if sheet.endswith(".json") else sheet
    hardware = read_hardware(path, where=f"inventory.{name}.hardware")
    gbps = machine.network_gbps
    domain = machine.nvlink_domain or machine.gpus_per_node
    if domain > machine.gpus_per_node:
        raise InvalidConfig(
            f"inventory.{name}.nvlink_domain",
            f"{domain} GPUs, while a node has {machine.gpus_per_node}",
            "give nodes as large as the domain",
        )
    power_w = machine.power_w or hardware.power_w
    if machine.decode_power_w is not None and machine.decode_power_w > power_w:
        raise InvalidConfig(
            f"inventory.{name}.decode_power_w",
            f"{machine.decode_power_w:g} is no cap of {power_w:g}",
            "give at most power_w",
        )
    return MachineType(
        name=name,
        hardware=replace(
            hardware,
            network_bandwidth=hardware.network_bandwidth if gbps is None else gbps * 1e9 / 8,
            price_per_hour=machine.price_per_hour or hardware.price_per_hour,
            power_w=power_w,
        ),
        nodes=machine.nodes,
        gpus_per_node=machine.gpus_per_node,
        nvlink_domain=domain,
        decode_power_w=machine.decode_power_w or power_w,
    )


def place(
    footprints: Sequence[Footprint], machines: Mapping[str, MachineType], *, across: bool = False
) -> tuple[Bundle, ...] | None:
    """Bundles for all workers, or None where they do not fit: first fit, large groups first.

    A worker's stages share a node as long as it has room. `across`: a group that is larger than
    a domain may span whole nodes.
    """
    free = {
        (machine.name, node, domain): min(
            machine.nvlink_domain, machine.gpus_per_node - domain * machine.nvlink_domain
        )
        for machine in machines.values()
        for node in range(machine.nodes)
        for domain in range(machine.domains_a_node)
    }
    bundles: list[Bundle] = []
    for footprint in sorted(footprints, key=lambda f: (-f.group, -f.stages)):
        taken: dict[Domain, int] = {}
        for _ in range(footprint.stages):
            group = _take(free, footprint, taken, across=across)
            if group is None:
                return None
            for domain, gpus in group:
                taken[domain] = taken.get(domain, 0) + gpus
        bundles += [
            Bundle(worker=footprint.worker, node=node_name(key), domain=key[2], gpus=gpus)
            for key, gpus in taken.items()
        ]
    return tuple(sorted(bundles, key=lambda bundle: bundle.order))


def _take(
    free: dict[Domain, int],
    footprint: Footprint,
    taken: Mapping[Domain, int],
    *,
    across: bool,
) -> list[tuple[Domain, int]] | None:
    """One group's GPUs: the fullest domain that holds it, a node of the same worker first."""
    nodes = {node_name(key) for key in taken}
    own = {key: left for key, left in free.items() if key[0] == footprint.machine}
    fitting = [key for key, left in own.items() if left >= footprint.group]
    if fitting:
        key = min(fitting, key=lambda k: (node_name(k) not in nodes, own[k], k))
        free[key] -= footprint.group
        return [(key, footprint.group)]
    if not across or sum(own.values()) < footprint.group:
        return None
    group, left = [], footprint.group
    for key in sorted(own, key=lambda k: (-own[k], k)):
        gpus = min(left, own[key])
        if gpus:
            free[key] -= gpus
            left -= gpus
            group.append((key, gpus))
    return group


def node_name(key: Domain) -> str:
    return f"{key[0]}-{key[1]}"
