"""Low node affinity: stages of the same layers share a domain of fast links, and KV stays there."""

from __future__ import annotations

from dataclasses import replace
from functools import cache
from pathlib import Path

import pytest
from phasewise.cluster import cli
from phasewise.placement.search.algorithms import Search
from phasewise.placement.search.candidates import Judged, Placement, Pool, parse_compare
from phasewise.placement.search.deployed import deployment_of
from phasewise.placement.search.problem import Problem
from phasewise.placement.search.units import bundles_of, most_units, nodes_of_unit, segments_of

from .plan_problems import CONFIGS, QUICK, config, problem, silent

SLOW = ("inventory.h100.network_gbps=0.5", "search.colocated=false")
FAST = ("inventory.h100.network_gbps=4000", "search.colocated=false")


def opt175b(*overrides: str) -> Problem:
    return problem("opt-175b-sharegpt", *overrides)


def unit(
    asked: Problem, p: tuple[int, int], d: tuple[int, int], n: int = 1, m: int = 1
) -> Placement:
    shapes = {shape.key[1:]: shape for shape in asked.shapes}
    return Placement(
        prefill=Pool(shape=shapes[p], count=n), decode=Pool(shape=shapes[d], count=m), local=True
    )


def test_the_published_opt_175b_lies_on_three_nodes_a_stage_of_each_phase_on_each() -> None:
    asked = opt175b()
    placement = parse_compare(asked)
    assert placement is not None and placement.local and segments_of(placement) == 3
    bundles = bundles_of(placement, asked)
    assert bundles is not None
    found = {(b.node, b.worker): b.gpus for b in bundles}
    assert found == {
        (f"a100-{node}", worker): gpus
        for node in range(3)
        for worker, gpus in (("prefill-0", 3), ("decode-0", 4))
    }


def test_a_unit_is_named_node_by_node_in_the_order_of_its_stages() -> None:
    """What `ray.nodes` of the cluster file says."""
    asked = opt175b()
    placement = unit(asked, (4, 4), (4, 4))
    bundles = bundles_of(placement, asked)
    assert bundles is not None
    nodes = nodes_of_unit(placement, bundles, asked)
    assert list(nodes) == [f"a100-{node}" for node in range(4)]
    assert all(gpus == {"prefill-0": 4, "decode-0": 4} for gpus in nodes.values())


def test_of_several_units_one_is_named() -> None:
    asked = opt175b()
    placement = replace(unit(asked, (2, 4), (2, 4)), copies=2)
    bundles = bundles_of(placement, asked)
    assert bundles is not None and {bundle.worker for bundle in bundles} > {"prefill-1"}
    gpus = {"prefill-0": 4, "decode-0": 4}
    assert nodes_of_unit(placement, bundles, asked) == {"a100-0": gpus, "a100-1": gpus}


def test_where_a_machine_has_several_domains_each_is_a_node_of_ray() -> None:
    asked = problem("opt-13b-sharegpt", "inventory.a100.nvlink_domain=4")
    for local in (True, False):
        placement = replace(unit(asked, (2, 2), (2, 2)), local=local)
        bundles = bundles_of(placement, asked)
        assert bundles is not None
        nodes = nodes_of_unit(placement, bundles, asked)
        assert list(nodes) == ["a100-0.0", "a100-0.1"]
        assert [sum(gpus.values()) for gpus in nodes.values()] == [4, 4]


def test_a_unit_is_cut_into_as_few_segments_as_a_node_holds() -> None:
    asked = opt175b()
    assert segments_of(unit(asked, (4, 4), (4, 4))) == 4
    assert segments_of(unit(asked, (2, 4), (2, 4))) == 2  # two stages of each phase a node
    assert segments_of(unit(asked, (4, 2), (8, 2))) is None  # twelve GPUs a stage
    assert segments_of(unit(asked, (4, 3), (4, 4))) is None  # 28 GPUs, and no common cut
    assert segments_of(unit(asked, (3, 3), (4, 3), n=2)) is None


def test_units_lie_beside_each_other_where_a_domain_holds_several() -> None:
    asked = problem("opt-13b-sharegpt")
    small = unit(asked, (2, 1), (1, 1))
    assert most_units(small) == 4 * 2
    assert most_units(unit(opt175b(), (2, 4), (2, 4))) == 2
    halves = problem("opt-13b-sharegpt", "inventory.a100.nvlink_domain=4")
    assert most_units(unit(halves, (2, 1), (1, 1))) == 4 * 2  # one in each half of a node
    assert segments_of(unit(halves, (4, 1), (1, 1))) is None


@cache
def found(*network: str) -> tuple[Problem, Judged]:
    """A problem on that network, and the best for it."""
    asked = problem("llama-3.1-8b-h100", *network)
    return asked, Search(asked, silent).run()[0]


def test_kv_never_leaves_a_node_where_the_network_is_slow() -> None:
    asked, best = found(*SLOW)
    assert best.placement.local
    deployment = deployment_of(asked, best.placement)
    assert {w.node for w in deployment.prefill} == {w.node for w in deployment.decode}
    bundles = bundles_of(best.placement, asked)
    assert bundles is not None
    role_nodes = {
        role: [b.node for b in bundles if b.worker.startswith(role)]
        for role in ("prefill", "decode")
    }
    assert set(role_nodes["prefill"]) == set(role_nodes["decode"])


def test_a_fast_network_gives_what_a_slow_one_cannot() -> None:
    """The placements that low affinity allows are fewer: they cannot win where KV moves freely."""
    asked, best = found(*SLOW)
    assert found(*FAST)[1].per_gpu >= best.per_gpu * 0.97
    local = best.placement
    anywhere = Placement(prefill=local.prefill, decode=local.decode)
    search = Search(asked, silent)
    assert search.judge(anywhere).rate_rps < 0.7 * search.judge(local).rate_rps / local.copies


@pytest.mark.slow
def test_the_opt_175b_plan_passes_validate_and_names_its_nodes(tmp_path: Path) -> None:
    out = tmp_path / "cluster.yaml"
    name = str(CONFIGS / "plan-opt-175b-sharegpt.yaml")
    few = ("search.min_tensor_parallel=3", "search.max_tensor_parallel=4")
    quick = [w for key in (*QUICK, *few) for w in ("--set", key)]
    assert cli.main(["plan", name, "-o", str(out), *quick]) == 0
    assert "of the same layers on the same" in out.read_text()
    assert cli.main(["validate", "--without-weights", str(out)]) == 0


def test_units_that_the_machines_do_not_hold_are_refused() -> None:
    asked = opt175b("inventory.a100.nodes=2")
    placement = parse_compare(asked)
    assert placement is not None and bundles_of(placement, asked) is None
    assert config("opt-175b-sharegpt").search.affinity == "low"
