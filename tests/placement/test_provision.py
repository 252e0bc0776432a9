"""Whole workers over mixed machines: against brute force, with the bottleneck named."""

from __future__ import annotations

from itertools import product

import pytest
from phasewise.configs.plan_schema import ObjectiveConfig
from phasewise.placement.search.provision import Option, provision

GPUS = {"fast": 8, "slow": 16}


def option(role: str, machine: str, rate_rps: float, gpus: int = 1, **more: float) -> Option:
    price, power = (4.0, 700.0) if machine == "fast" else (1.0, 300.0)
    return Option(
        role=role,
        machine=machine,
        name=f"{machine} {role}",
        rate_rps=rate_rps,
        gpus=gpus,
        cost_per_hour=price * gpus,
        power_w=power * gpus,
        **more,
    )


OPTIONS = [
    option("prefill", "fast", 10.0, 2),
    option("prefill", "slow", 2.0),
    option("decode", "fast", 5.0),
    option("decode", "slow", 3.0, 2),
]


def brute_force(rate_rps: float, budget: float) -> float:
    """The least cost for the rate."""
    least = float("inf")
    for a, b, c, d in product(range(5), range(17), range(9), range(9)):
        fits = 2 * a + c <= 8 and b + 2 * d <= 16
        carries = min(10 * a + 2 * b, 5 * c + 3 * d) >= rate_rps
        cost = 8 * a + b + 4 * c + 2 * d
        if fits and carries and cost <= budget:
            least = min(least, cost)
    return least


@pytest.mark.parametrize("rate_rps", [3.0, 11.0, 17.5, 24.0])
def test_the_least_cost_is_what_trying_everything_finds(rate_rps: float) -> None:
    found = provision(OPTIONS, GPUS, ObjectiveConfig(goal="cost"), rate_rps)
    assert found is not None
    assert found.cost_per_hour == pytest.approx(brute_force(rate_rps, 1e9))
    assert found.gap <= 1e-3 and found.relaxed <= found.objective + 1e-9


def test_the_bound_is_never_below_the_goodput_that_was_found() -> None:
    found = provision(OPTIONS, GPUS, ObjectiveConfig(goal="goodput"), None)
    assert found is not None
    assert found.rate_rps <= found.bound * (1 + 1e-6) <= found.relaxed * (1 + 1e-3)


def test_a_budget_that_binds_is_named_by_its_price() -> None:
    objective = ObjectiveConfig(goal="goodput", max_cost_per_hour=6.0)
    found = provision(OPTIONS, GPUS, objective, None)
    assert found is not None and found.cost_per_hour <= 6.0
    assert "objective.max_cost_per_hour" in dict(found.prices)
    assert "GPUs of slow" not in dict(found.prices)


def test_a_narrow_network_is_the_bottleneck_and_adds_workers_for_their_ports() -> None:
    narrow = [option("prefill", "fast", 10.0, network_rps=1.0), option("decode", "fast", 10.0)]
    found = provision(narrow, {"fast": 8}, ObjectiveConfig(goal="goodput"), None)
    assert found is not None and found.rate_rps == pytest.approx(7.0)
    assert "req/s of prefill workers' network ports" in dict(found.prices)
    assert "req/s of prefill workers" not in dict(found.prices)


def test_what_no_counts_can_carry_is_none() -> None:
    assert provision(OPTIONS, GPUS, ObjectiveConfig(goal="cost"), 1e4) is None


def test_colocated_workers_win_where_they_serve_more() -> None:
    both = [*OPTIONS, option("colocated", "slow", 2.5)]
    found = provision(both, GPUS, ObjectiveConfig(goal="cost"), 20.0)
    assert found is not None and {o.role for o, _ in found.counts} == {"colocated"}
