"""Transfers that meet: rates are max-min fair, and each ends when its last byte has gone."""

from __future__ import annotations

from math import inf

import numpy as np
import pytest
from phasewise.placement.latency.transfer import Link
from phasewise.placement.simulation.agenda import Agenda
from phasewise.placement.simulation.network import Flow, Flows, Network, Port, fair_rates

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


class SharedPort:
    """Transfers out of one port of 100 bytes a second, and when each ended."""

    def __init__(self) -> None:
        self.agenda = Agenda()
        self.flows = Flows(Network(local=Link(bytes_per_s=100.0)), self.agenda)
        self.ended_s: dict[str, float] = {}

    def open(self, name: str) -> Flow:
        return self.flows.open(("source", "node", 1), (name, "node", 1), self._done, name)

    def _done(self, now_s: float, name: str) -> None:
        self.ended_s[name] = now_s


def test_bytes_that_come_in_a_while_free_the_link_for_others_at_once() -> None:
    """The first slows to a trickle at 0.9 s. The other has 5.4 bytes left then and the link
    nearly to itself, so it ends before the first would have run out of bytes."""
    port = SharedPort()
    first, other = port.open("first"), port.open("other")
    port.flows.add(first, 50.0, 0.0)
    port.flows.add(other, 50.4, 0.0)
    port.flows.close(other, 0.0)
    port.flows.add_later(first, 995.0, 1000.0, 0.9)
    port.agenda.at(1.5, lambda now_s, _: port.flows.close(first, now_s))
    port.agenda.run_before(inf)
    assert port.ended_s["other"] == pytest.approx(0.9 + 5.4 / 99)
    assert port.ended_s["first"] == pytest.approx(1.5 + (1000 - 0.6) / 100)
