"""Published cases from plan files: what comes out, and on which assumption it stands."""

from __future__ import annotations

from functools import cache
from pathlib import Path

import pytest
from phasewise.engine.errors import InvalidConfig
from phasewise.placement.search.algorithms import Search
from phasewise.placement.search.candidates import Placement, parse_compare, parse_placement
from phasewise.placement.search.infeasible import Infeasible, check_config
from phasewise.placement.search.plan import Plan, make_plan
from phasewise.placement.search.problem import Problem
from phasewise.placement.search.splitwise_mirror import DESIGNS, with_free_batching

from .plan_problems import plan, problem, silent

SPLITWISE = "splitwise-conversation"
CODE = Path(__file__).parent / "data" / "azure2023_code.csv.gz"


@cache
def verified() -> Plan:
    return plan(SPLITWISE, "search.seeds=2")


def designs(asked: Problem) -> dict[str, float]:
    search = Search(asked, silent)
    found = {}
    for name, words in DESIGNS.items():
        found[name] = search.judge(parse_placement(words, asked)).rate_rps
    return found


def test_splitwises_designs_rank_otherwise_when_decode_batches_cost_what_was_measured() -> None:
    rates = designs(problem(SPLITWISE))
    assert rates["HH"] > 1.5 * rates["AA"] and rates["AA"] == pytest.approx(51.1, rel=0.1)
    assert rates["baseline H100"] > rates["HH"] == pytest.approx(95.1, rel=0.1)


def test_on_the_code_trace_splitwises_split_of_equal_machines_comes_out() -> None:
    """Published: 35 prompt and 5 token machines of the 40. Long prompts, answers of 13 tokens."""
    asked = problem(SPLITWISE, f"workload.trace={CODE}")
    search = Search(asked, silent)
    best = search.run()[0]
    assert best.placement.prefill is not None
    assert 32 <= best.placement.prefill.count <= 37
    assert best.placement.prefill.count + best.placement.decode.count == 40
    published = parse_placement("35P8x1@h100 5D8x1@h100", asked)
    assert search.judge(published).rate_rps == pytest.approx(best.rate_rps, rel=0.05)


def test_under_its_simulators_free_batching_its_ranking_comes_out() -> None:
    rates = designs(with_free_batching(problem(SPLITWISE)))
    assert rates["AA"] == pytest.approx(2.15 * rates["baseline A100"], rel=0.1)
    assert rates["HA"] == pytest.approx(rates["HH"], rel=0.02)  # at less power and cost
    assert rates["HH"] > 1.1 * rates["AA"]


@pytest.mark.slow
def test_the_most_goodput_within_the_power_takes_more_token_machines_than_published() -> None:
    best = next(judged for judged in verified().ranked if judged.placement.prefill is not None)
    assert best.placement.prefill is not None
    assert best.placement.power_w <= 176e3 * (1 + 1e-9)
    assert best.placement.decode.count > best.placement.prefill.count
    assert {p.shape.machine.name for p in best.placement.pools} == {"h100"}


def test_capped_token_machines_let_the_power_carry_more() -> None:
    capped = problem(SPLITWISE, "inventory.h100.decode_power_w=385", "inventory.h100.nodes=57")
    best = Search(capped, silent).run()[0].placement
    assert best.prefill is not None and best.gpus > 40 * 8
    expected = best.prefill.gpus * 550 + best.decode.gpus * 385
    assert best.power_w == pytest.approx(expected) and expected <= 176e3 + 1e-3


@pytest.mark.slow
def test_the_splitwise_plan_is_verified_in_a_part_at_the_same_rate_a_worker() -> None:
    best = verified().best
    assert best.simulated.gpus < best.judged.placement.gpus == 320
    assert best.judged.rate_rps == pytest.approx(177, rel=0.12)
    assert best.tightest.split()[0] in ("ttft", "tpot", "e2e")


@pytest.mark.parametrize("name", ["opt-66b-humaneval", "opt-66b-longbench"])
def test_published_placements_of_other_workloads_are_near_the_best(name: str) -> None:
    """Of 4 + 4 GPUs within a node; pairs with three-way tensor parallelism are not compared."""
    asked = problem(name)
    search = Search(asked, silent)
    published = parse_compare(asked)
    assert published is not None
    own = search.judge(published).per_gpu
    four = [s for s in asked.shapes if s.gpus == 4 and s.tensor_parallel in (2, 4)]
    pool = type(published.decode)
    best = max(
        search.judge(
            Placement(prefill=pool(shape=a, count=1), decode=pool(shape=b, count=1))
        ).per_gpu
        for a in four
        for b in four
    )
    assert own >= (0.999 if name.endswith("humaneval") else 0.92) * best


@pytest.mark.parametrize(
    ("override", "where"),
    [
        ("slo.slowdown.reference=v100", "slo.slowdown.reference"),
        ("machine_latency.v100.source=sheet", "machine_latency.v100"),
        ("latency.model=llama3", "latency.model"),
        ("inventory.h100.hardware=h200", "inventory.h100.hardware"),
        ("inventory.h100.decode_power_w=900", "inventory.h100.decode_power_w"),
        ("slo.slowdown.tensor_parallel=5", "profile of llama2-70b"),
        ('search.compare="5P8x1@v100 5D8x1"', "search.compare"),
    ],
)
def test_bad_words_are_refused_by_key(override: str, where: str) -> None:
    with pytest.raises(InvalidConfig, match=where):
        make_plan(problem(SPLITWISE, override), silent)


def test_an_inventory_without_nodes_is_refused() -> None:
    with pytest.raises(InvalidConfig, match="inventory.*no nodes"):
        problem(SPLITWISE, "inventory.a100.nodes=0", "inventory.h100.nodes=0")


@pytest.mark.parametrize(
    ("override", "binding"),
    [
        ("slo.slowdown.tpot.p50=0.5", r"slo\.slowdown\.tpot\.p50"),
        ("slo.slowdown.ttft.p50=0.1", r"slo\.slowdown\.ttft\.p50"),
        ("objective.max_power_w=2000", "max_power_w"),
    ],
)
def test_what_no_machine_meets_names_the_limit_and_the_nearest(override: str, binding: str) -> None:
    asked = problem(SPLITWISE, override, "search.colocated=false")
    with pytest.raises(Infeasible, match=binding) as raised:
        check_config(asked)
        make_plan(asked, silent)
    assert raised.value.nearest
