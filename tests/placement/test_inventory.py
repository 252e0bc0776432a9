"""Workers onto nodes: domains are respected, and what does not fit is refused."""

from __future__ import annotations

import pytest
from phasewise.configs.plan_schema import MachineConfig
from phasewise.engine.errors import InvalidConfig
from phasewise.placement.search.inventory import Footprint, MachineType, place, read_inventory


def machines(**keys: int) -> dict[str, MachineType]:
    return read_inventory({"h100": MachineConfig(hardware="h100", **keys)})


def worker(name: str, group: int, stages: int = 1) -> Footprint:
    return Footprint(worker=name, machine="h100", group=group, stages=stages)


def test_a_group_never_leaves_its_nvlink_domain_unless_asked() -> None:
    split = machines(nodes=1, gpus_per_node=8, nvlink_domain=4)
    assert place([worker("decode-0", 8)], split) is None
    spread = place([worker("decode-0", 8)], split, across=True)
    assert spread is not None and sum(bundle.gpus for bundle in spread) == 8


def test_no_node_is_given_out_twice() -> None:
    found = place([worker(f"w-{i}", 2, stages=2) for i in range(4)], machines(nodes=2))
    assert found is not None
    used: dict[str, int] = {}
    for bundle in found:
        used[bundle.node] = used.get(bundle.node, 0) + bundle.gpus
    assert used == {"h100-0": 8, "h100-1": 8}
    assert place([worker(f"w-{i}", 2, stages=2) for i in range(5)], machines(nodes=2)) is None


def test_stages_share_a_node_while_it_has_room_and_become_bundles_where_not() -> None:
    together = place([worker("decode-0", 4, stages=2)], machines(nodes=2))
    assert together is not None and len(together) == 1
    apart = place([worker("decode-0", 8, stages=2)], machines(nodes=2))
    assert apart is not None and {bundle.node for bundle in apart} == {"h100-0", "h100-1"}


def test_the_tenth_node_comes_behind_the_ninth() -> None:
    found = place([worker(f"w-{i}", 8) for i in range(12)], machines(nodes=12))
    assert found is not None
    assert [bundle.node for bundle in found] == [f"h100-{node}" for node in range(12)]


def test_a_domain_larger_than_its_node_is_refused_by_key() -> None:
    with pytest.raises(InvalidConfig, match=r"inventory\.h100\.nvlink_domain"):
        machines(gpus_per_node=4, nvlink_domain=8)


def test_prices_and_bandwidths_of_the_plan_file_replace_the_sheet() -> None:
    own = read_inventory(
        {"mine": MachineConfig(hardware="h100", price_per_hour=1.5, network_gbps=100.0)}
    )["mine"]
    assert own.hardware.price_per_hour == 1.5
    assert own.network.remote.bytes_per_s == pytest.approx(12.5e9)
