"""A placement: two pools of equal workers (or one of both roles): what it costs and carries."""

from __future__ import annotations

import re
from collections.abc import Callable
from dataclasses import dataclass, replace
from math import inf, log

from ...configs.plan_schema import ObjectiveConfig
from ...engine.errors import InvalidConfig
from .inventory import Footprint
from .problem import RATE_GOALS, Problem, WorkerShape

NEARLY = 1 + 1e-9  # a budget that is met exactly is met


@dataclass(frozen=True, kw_only=True)
class Pool:
    """Equal workers."""

    shape: WorkerShape
    count: int

    @property
    def gpus(self) -> int:
        return self.count * self.shape.gpus

    def __str__(self) -> str:
        return f"{self.count} × {self.shape}"


@dataclass(frozen=True, kw_only=True)
class Placement:
    """`copies` equal units; a unit's pools serve each other only. `prefill` None: colocated.

    Low affinity has units whose KV never crosses the network (`units.py`).
    """

    prefill: Pool | None
    decode: Pool
    copies: int = 1
    local: bool = False  # KV stays inside a domain of fast links
    spare: int = 0  # workers of each pool beyond those that carry the rate

    @property
    def pools(self) -> tuple[Pool, ...]:
        return (self.decode,) if self.prefill is None else (self.prefill, self.decode)

    @property
    def kind(self) -> str:
        if self.prefill is None:
            return "colocated"
        return "disaggregated, KV inside nodes" if self.local else "disaggregated"

    @property
    def gpus(self) -> int:
        return sum(pool.gpus + self.spare * pool.shape.gpus for pool in self.pools) * self.copies

    @property
    def cost_per_hour(self) -> float:
        return self._sum(lambda shape: shape.cost_per_hour)

    @property
    def power_w(self) -> float:
        if self.prefill is None:
            return self._sum(lambda shape: shape.power_w)
        return self.copies * (
            (self.prefill.count + self.spare) * self.prefill.shape.power_w
            + (self.decode.count + self.spare) * self.decode.shape.decode_power_w
        )

    def _sum(self, of: Callable[[WorkerShape], float]) -> float:
        each = [(pool.count + self.spare) * of(pool.shape) for pool in self.pools]
        return self.copies * sum(each)

    def replicas(self, pool: Pool) -> int:
        """Workers of a pool in one unit, spares included."""
        return pool.count + self.spare

    @property
    def key(self) -> tuple[object, ...]:
        ours = tuple((pool.shape.key, pool.count) for pool in self.pools)
        return ours, self.copies, self.local, self.spare

    def part(self, most: int) -> tuple[Placement, float]:
        """Of one unit, without spares: pools of at most so many workers together in nearly the
        same proportion, and the share of the unit's requests that loads neither of them less."""
        one = replace(self, copies=1, spare=0)
        if self.prefill is None:
            m = min(most // 3, self.decode.count)
            return replace(one, decode=replace(self.decode, count=m)), m / self.decode.count
        n, m = self.prefill.count, self.decode.count
        if n + m <= most:
            return one, 1.0
        pairs = [
            (i, j) for i in range(1, most) for j in range(1, most + 1 - i) if i <= n and j <= m
        ]
        # Beside the ratio it counts that prompts wait longer in a small pool.
        i, j = min(pairs, key=lambda pair: abs(log(pair[0] * m / pair[1] / n)) + 0.1 / pair[0])
        small = replace(
            one, prefill=replace(self.prefill, count=i), decode=replace(self.decode, count=j)
        )
        return small, max(i / n, j / m)

    def __str__(self) -> str:
        pools = " + ".join(
            f"{'colocated' if self.prefill is None else role} {pool}"
            for role, pool in zip(
                ("prefill", "decode")[-len(self.pools) :], self.pools, strict=True
            )
        )
        return f"{self.copies} units of ({pools})" if self.copies > 1 else pools

    def footprints(self) -> list[Footprint]:
        roles = ("decode",) if self.prefill is None else ("prefill", "decode")
        return [
            Footprint(
                worker=f"{role}-{unit * self.replicas(pool) + i}",
                machine=pool.shape.machine.name,
                group=pool.shape.tensor_parallel,
                stages=pool.shape.pipeline_parallel,
            )
            for unit in range(self.copies)
            for role, pool in zip(roles, self.pools, strict=True)
            for i in range(self.replicas(pool))
        ]


@dataclass(frozen=True, kw_only=True)
class Judged:
    """A placement and its goodput, by recurrences or by the simulator."""

    placement: Placement
    rate_rps: float
    low_rps: float
    high_rps: float
    binds: str  # "ttft" | "tpot" | "network" | ""
    by: str  # "recurrence" | "simulation"

    @property
    def workers(self) -> int:
        return self.placement.copies * sum(pool.count for pool in self.placement.pools)

    @property
    def per_gpu(self) -> float:
        return self.rate_rps / self.placement.gpus

    @property
    def per_dollar(self) -> float:
        """Requests a dollar."""
        return self.rate_rps * 3600 / self.placement.cost_per_hour

    @property
    def per_kwh(self) -> float:
        """Requests a kilowatt-hour of rated power."""
        return self.rate_rps * 3.6e6 / self.placement.power_w


def by_recurrence(placement: Placement, rate_rps: float, binds: str = "") -> Judged:
    """A goodput without an interval: that of one stream of requests."""
    return Judged(
        placement=placement,
        rate_rps=rate_rps,
        low_rps=rate_rps,
        high_rps=rate_rps,
        binds=binds,
        by="recurrence",
    )


def score(judged: Judged, objective: ObjectiveConfig, rate_rps: float | None) -> float:
    """Higher is better; −inf for one that does not carry the rate."""
    if judged.rate_rps <= 0:
        return -inf
    if rate_rps is not None and carried_rps(judged, objective) < rate_rps:
        return -inf
    placement = judged.placement
    useful_rps = judged.rate_rps if rate_rps is None else rate_rps  # more than asked is no merit
    return {
        "goodput": judged.rate_rps,
        "goodput_per_gpu": useful_rps / placement.gpus,
        "goodput_per_dollar": useful_rps / placement.cost_per_hour,
        "goodput_per_watt": useful_rps / placement.power_w,
        "gpus": -float(placement.gpus),
        "cost": -placement.cost_per_hour,
        "power": -placement.power_w,
    }[objective.goal]


def promised_rps(judged: Judged, objective: ObjectiveConfig) -> float:
    """What may be offered: the low end of the goodput's interval, less the headroom."""
    return judged.low_rps * (1 - objective.headroom)


def carried_rps(judged: Judged, objective: ObjectiveConfig) -> float:
    """The highest rate that it is taken to carry: what it promises, where the goal is the least for
    a rate or a headroom is asked for; else its goodput, a fiftieth more or less."""
    if objective.goal in RATE_GOALS or objective.headroom:
        return promised_rps(judged, objective) * NEARLY
    return judged.rate_rps / 0.98


def within_budget(placement: Placement, objective: ObjectiveConfig) -> str:
    """The first budget that is exceeded, as words; "" where all hold."""
    if objective.max_gpus is not None and placement.gpus > objective.max_gpus:
        return f"objective.max_gpus {objective.max_gpus}"
    if (
        objective.max_cost_per_hour is not None
        and placement.cost_per_hour > objective.max_cost_per_hour * NEARLY
    ):
        return f"objective.max_cost_per_hour {objective.max_cost_per_hour:g}"
    if objective.max_power_w is not None and placement.power_w > objective.max_power_w * NEARLY:
        return f"objective.max_power_w {objective.max_power_w:g}"
    return ""


WORDS = re.compile(r"([1-9]\d*)?([PD])(\d+)x(\d+)(?:@(.+))?")


def parse_compare(problem: Problem) -> Placement | None:
    """The placement that `search.compare` names."""
    text = problem.config.search.compare
    return parse_placement(text, problem) if text else None


def parse_placement(text: str, problem: Problem) -> Placement:
    """Of the problem's shapes: "P4x1 D2x2", "25P8x1@h100 26D8x1@a100"."""
    pools: dict[str, Pool] = {}
    for word in text.split():
        match = WORDS.fullmatch(word)
        if match is None or match[2] in pools:
            raise InvalidConfig(
                "search.compare", f"{word!r} is no pool", 'write it as in "P4x1 D2x2"'
            )
        wanted = int(match[3]), int(match[4])
        found = [
            shape
            for shape in problem.shapes
            if (shape.tensor_parallel, shape.pipeline_parallel) == wanted
            and match[5] in (None, shape.machine.name)
        ]
        if not found:
            known = ", ".join(map(str, problem.shapes))
            raise InvalidConfig("search.compare", f"{word} is not possible", f"possible: {known}")
        pools[match[2]] = Pool(shape=found[0], count=int(match[1] or 1))
    if "D" not in pools:
        raise InvalidConfig("search.compare", "names no decode pool", 'as in "P4x1 D2x2"')
    low = problem.config.search.affinity == "low"
    return Placement(prefill=pools.get("P"), decode=pools["D"], local=low and "P" in pools)
