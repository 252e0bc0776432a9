"""How many of which worker, over mixed machines: a flow with integer choices.

Requests flow from prefill workers over links to decode workers (Helix, ASPLOS '25, section 4);
Splitwise's provisioning (ISCA '24, section IV-D) is the same program with another objective.
Left continuous it is a linear program: a bound, whose dual prices name the bottleneck. Whole
workers are chosen by branch and bound (HiGHS), with the gap that is left.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from math import inf
from typing import Any, cast

import numpy as np
from scipy.optimize import Bounds, LinearConstraint, linprog, milp

from ...configs.plan_schema import ObjectiveConfig
from ...engine.errors import InvalidConfig
from .algorithms import Search
from .problem import ShapeKey, WorkerShape

TIME_LIMIT_S = 3.0
GAP = 1e-3


@dataclass(frozen=True, kw_only=True)
class Option:
    """One kind of worker in one role: what it serves, and what it takes."""

    role: str  # "prefill" | "decode" | "colocated"
    machine: str
    name: str
    rate_rps: float
    gpus: int
    cost_per_hour: float
    power_w: float
    network_rps: float = inf  # requests a second whose KV its ports carry


@dataclass(frozen=True, kw_only=True)
class Provision:
    """Workers by option, and how near to the best possible that is known to be."""

    counts: tuple[tuple[Option, int], ...]
    rate_rps: float
    cost_per_hour: float
    power_w: float
    gpus: int
    objective: float
    bound: float  # of the program with whole workers, proven
    gap: float  # relative, between the two; 0: proven best
    relaxed: float  # of the linear program: no whole numbers
    prices: tuple[tuple[str, float], ...]  # constraint, objective gained by one unit more of it

    def to_json(self) -> dict[str, Any]:
        return {
            "workers": [
                {"role": o.role, "worker": o.name, "count": count} for o, count in self.counts
            ],
            "rate_rps": self.rate_rps,
            "gpus": self.gpus,
            "cost_per_hour": self.cost_per_hour,
            "power_w": self.power_w,
            "objective": self.objective,
            "bound": self.bound,
            "gap": self.gap,
            "relaxed": self.relaxed,
            "prices": dict(self.prices),
        }


def options_of(search: Search) -> list[Option]:
    """Every shape in both roles, with its goodput alone. Links are charged where nodes are many."""
    problem, phases = search.problem, search.phases
    kv = problem.kv_bytes_per_token * float(phases.workload.prompt_tokens.mean())
    colocated: dict[ShapeKey, float] = {}  # where cores are shared it hangs on how many
    for (key, _), (rate_rps, _) in search.colocated.found.items():
        colocated[key] = min(rate_rps, colocated.get(key, inf))
    options = []
    for shape in problem.shapes:
        rates = {
            "prefill": phases.prefill_rps(shape, 1),
            "decode": phases.decode_rps(shape, 1),
            "colocated": colocated.get(shape.key, 0.0),
        }
        options += [
            _option(role, shape, rate_rps, 0.0 if role == "colocated" else kv)
            for role, rate_rps in rates.items()
            if rate_rps > 0
        ]
    return options


def _option(role: str, shape: WorkerShape, rate_rps: float, kv_bytes: float) -> Option:
    width = shape.gpus * shape.machine.hardware.network_bandwidth
    return Option(
        role=role,
        machine=shape.machine.name,
        name=str(shape),
        rate_rps=rate_rps,
        gpus=shape.gpus,
        cost_per_hour=shape.cost_per_hour,
        power_w=shape.decode_power_w if role == "decode" else shape.power_w,
        network_rps=width / kv_bytes if kv_bytes and shape.machine.nodes > 1 else inf,
    )


def provision(
    options: Sequence[Option],
    gpus: dict[str, int],
    objective: ObjectiveConfig,
    rate_rps: float | None,
) -> Provision | None:
    """The best counts, or None where nothing meets the constraints.

    Variables: workers of each option, then the flows (disaggregated, colocated). A goodput goal
    raises the flow; gpus, cost and power are lowered for `rate_rps`.
    """
    rows, limits, names = _constraints(options, gpus, objective, rate_rps)
    cost = _cost(options, objective, rate_rps)
    n = len(options)
    upper = np.array([gpus[o.machine] // o.gpus for o in options] + [np.inf, np.inf], dtype=float)
    relaxed = linprog(cost, A_ub=rows, b_ub=limits, bounds=[(0.0, most) for most in upper.tolist()])
    if relaxed.status != 0:
        return None

    whole = milp(
        cost,
        constraints=LinearConstraint(rows, ub=cast(Any, limits)),
        bounds=Bounds(0.0, cast(Any, upper)),
        integrality=np.array([1] * n + [0, 0]),
        options={"time_limit": TIME_LIMIT_S, "mip_rel_gap": GAP},
    )
    if whole.x is None:
        return None
    counts = np.rint(whole.x[:n]).astype(int)
    sign = -1.0 if cost[n:].any() else 1.0  # a goodput is raised by lowering its negative
    bound = float(whole.mip_dual_bound)
    prices = -np.array(relaxed.ineqlin.marginals)
    chosen = [(option, int(count)) for option, count in zip(options, counts, strict=True) if count]
    return Provision(
        counts=tuple(chosen),
        rate_rps=float(whole.x[n:].sum()),
        cost_per_hour=sum(o.cost_per_hour * c for o, c in chosen),
        power_w=sum(o.power_w * c for o, c in chosen),
        gpus=sum(o.gpus * c for o, c in chosen),
        objective=sign * float(whole.fun),
        bound=sign * bound,
        gap=abs(float(whole.fun) - bound) / max(1e-9, abs(float(whole.fun))),
        relaxed=sign * float(relaxed.fun),
        prices=tuple(
            sorted(
                ((name, float(p)) for name, p in zip(names, prices, strict=True) if p > 1e-9),
                key=lambda pair: -pair[1],
            )
        ),
    )


def _cost(
    options: Sequence[Option], objective: ObjectiveConfig, rate_rps: float | None
) -> np.ndarray:
    """To be minimised. A ratio (goodput a GPU, $, W) at a given rate: the least divisor."""
    per = {
        "gpus": [float(o.gpus) for o in options],
        "cost": [o.cost_per_hour for o in options],
        "power": [o.power_w for o in options],
    }
    divisor = {"goodput_per_gpu": "gpus", "goodput_per_dollar": "cost", "goodput_per_watt": "power"}
    goal = objective.goal
    if rate_rps is not None and goal != "goodput":
        return np.array([*per[divisor.get(goal, goal)], 0.0, 0.0])
    if goal in per:
        raise InvalidConfig("objective.goal", f"the least {goal} for what rate?", "give rate_rps")
    return np.array([0.0] * len(options) + [-1.0, -1.0])


def _constraints(
    options: Sequence[Option],
    gpus: dict[str, int],
    objective: ObjectiveConfig,
    rate_rps: float | None,
) -> tuple[np.ndarray, np.ndarray, list[str]]:
    """Rows of A·x ≤ b over (workers…, disaggregated flow, colocated flow), and their names."""
    n = len(options)
    rows: list[list[float]] = []
    limits: list[float] = []
    names: list[str] = []

    def add(name: str, workers: list[float], flows: tuple[float, float], limit: float) -> None:
        rows.append([*workers, *flows])
        limits.append(limit)
        names.append(name)

    for role, flows in (
        ("prefill", (1.0, 0.0)),
        ("decode", (1.0, 0.0)),
        ("colocated", (0.0, 1.0)),
    ):
        add(
            f"req/s of {role} workers",
            [-o.rate_rps if o.role == role else 0.0 for o in options],
            flows,
            0.0,
        )
    for role in ("prefill", "decode"):
        ports = [o.network_rps if o.role == role else 0.0 for o in options]
        if any(port not in (0.0, inf) for port in ports):
            finite = [-min(port, 1e6) for port in ports]
            add(f"req/s of {role} workers' network ports", finite, (1.0, 0.0), 0.0)
    for machine, count in gpus.items():
        own = [float(o.gpus) if o.machine == machine else 0.0 for o in options]
        add(f"GPUs of {machine}", own, (0.0, 0.0), float(count))
    for key, limit, each in (
        ("max_gpus", objective.max_gpus, [float(o.gpus) for o in options]),
        ("max_cost_per_hour", objective.max_cost_per_hour, [o.cost_per_hour for o in options]),
        ("max_power_w", objective.max_power_w, [o.power_w for o in options]),
    ):
        if limit is not None:
            add(f"objective.{key}", each, (0.0, 0.0), float(limit))
    if rate_rps is not None:
        add("rate", [0.0] * n, (-1.0, -1.0), -rate_rps)
    return np.array(rows), np.array(limits), names
