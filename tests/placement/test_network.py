"""Rates of transfers that meet: max-min fair, whether ports are scarce or not."""

from __future__ import annotations

from math import inf

import numpy as np
import pytest
from phasewise.placement.network import Port, fair_rates

Asked = list[tuple[tuple[Port, ...], float]]


def filled(flows: Asked, step: float = 1e-4) -> list[float]:
    """All rise in small steps until a cap or a full port holds them."""
    rates = [0.0] * len(flows)
    rising = set(range(len(flows)))
    while rising:
        for i in sorted(rising):
            ports, cap = flows[i]
            used = [
                sum(r for r, (own, _) in zip(rates, flows, strict=True) if p in own) for p in ports
            ]
            full = any(u + step > p.bytes_per_s for u, p in zip(used, ports, strict=True))
            if full or rates[i] + step > cap:
                rising.discard(i)
            else:
                rates[i] += step
    return rates


@pytest.mark.parametrize("seed", range(6))
def test_rates_are_what_filling_in_small_steps_finds(seed: int) -> None:
    rng = np.random.default_rng(seed)
    ports = [Port(float(b)) for b in rng.uniform(0.05, 0.3, 5)]
    flows: Asked = []
    for _ in range(7):
        own = rng.choice(5, size=2, replace=False)
        cap = inf if rng.random() < 0.4 else float(rng.uniform(0.005, 0.1))
        flows.append(((ports[own[0]], ports[own[1]]), cap))
    assert fair_rates(flows) == pytest.approx(filled(flows), abs=2e-3)


def test_who_meets_no_scarce_port_takes_what_it_asks_for() -> None:
    narrow, wide = Port(1.0), Port(10.0)
    flows: Asked = [((narrow,), inf), ((narrow, wide), inf), ((wide,), 2.5)]
    assert fair_rates(flows) == [0.5, 0.5, 2.5]
