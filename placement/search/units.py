"""Units of low node affinity: KV stays within a domain of fast links (DistServe, Algorithm 2).

A unit's workers are cut into as few equal *segments* as a domain holds: runs of pipeline stages,
the same layers of prefill and decode. A segment's GPUs, of both phases, lie in one domain, so each
layer's KV moves inside it; segments of a unit lie in neighbouring domains and hand on activations.
With one segment the whole unit lies in a domain.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from math import gcd

from .candidates import Placement
from .inventory import Bundle, MachineType, place
from .problem import Problem


def bundles_of(placement: Placement, problem: Problem) -> tuple[Bundle, ...] | None:
    """Where every worker lies, or None where they do not fit."""
    if placement.local:
        return _place_units(placement)
    across = problem.config.search.tensor_parallel_across_nodes
    return place(placement.footprints(), problem.machines, across=across)


def nodes_of_unit(
    placement: Placement, bundles: Sequence[Bundle], problem: Problem
) -> dict[str, dict[str, int]]:
    """Of the first unit: by node of Ray, GPUs of each worker. Nodes are in the order of pipeline
    stages, so that prefill's and decode's of the same layers stand on the same one."""
    first = _workers(replace(placement, copies=1))
    nodes: dict[str, dict[str, int]] = {}
    for bundle in bundles:
        if bundle.worker in first:
            nodes.setdefault(ray_node(bundle, problem), {})[bundle.worker] = bundle.gpus
    return nodes


def ray_node(bundle: Bundle, problem: Problem) -> str:
    """Ray knows nothing of NVLink domains: where a machine has several, each has to be a node."""
    several = problem.machines[bundle.order[0]].domains_a_node > 1
    return f"{bundle.node}.{bundle.domain}" if several else bundle.node


def segments_of(placement: Placement) -> int | None:
    """The fewest equal segments of a unit that a domain holds each; None where none do."""
    machine = placement.decode.shape.machine
    if any(pool.shape.machine is not machine for pool in placement.pools):
        return None
    stages = gcd(*[pool.shape.pipeline_parallel for pool in placement.pools])
    for segments in range(1, stages + 1):
        if stages % segments == 0 and _segment_gpus(placement, segments) <= machine.nvlink_domain:
            # Within a domain a tensor-parallel group lies as a whole: it is never larger.
            return segments
    return None


def most_units(placement: Placement) -> int:
    """How many such units the machines of that type hold."""
    segments = segments_of(placement)
    if segments is None:
        return 0
    machine = placement.decode.shape.machine
    beside = machine.nvlink_domain // _segment_gpus(placement, segments)
    return _domains(machine) // segments * beside


def _segment_gpus(placement: Placement, segments: int) -> int:
    """Of both phases, spares included."""
    return sum(placement.replicas(pool) * pool.shape.gpus for pool in placement.pools) // segments


def _domains(machine: MachineType) -> int:
    """Whole ones."""
    return machine.nodes * (machine.gpus_per_node // machine.nvlink_domain)


def _place_units(placement: Placement) -> tuple[Bundle, ...] | None:
    """A row of `segments` domains holds as many units as fit beside each other."""
    segments = segments_of(placement)
    if segments is None or most_units(placement) < placement.copies:
        return None
    machine = placement.decode.shape.machine
    beside = machine.nvlink_domain // _segment_gpus(placement, segments)
    a_node = machine.gpus_per_node // machine.nvlink_domain
    bundles = []
    for worker, (unit, size) in _workers(placement).items():
        for segment in range(segments):
            node, domain = divmod(unit // beside * segments + segment, a_node)
            name, gpus = f"{machine.name}-{node}", size // segments
            bundles.append(Bundle(worker=worker, node=name, domain=domain, gpus=gpus))
    return tuple(sorted(bundles, key=lambda bundle: bundle.order))


def _workers(placement: Placement) -> Mapping[str, tuple[int, int]]:
    """By name, the unit and the GPUs."""
    found = {}
    for role, pool in zip(
        ("prefill", "decode")[-len(placement.pools) :], placement.pools, strict=True
    ):
        count = placement.replicas(pool)
        for i in range(placement.copies * count):
            found[f"{role}-{i}"] = i // count, pool.shape.gpus
    return found
