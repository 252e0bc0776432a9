"""Which placement is best: DistServe's Algorithms 1 and 2 (OSDI '24, section 4), and colocation.

Phases are searched apart on one stream of requests (`phase_search.py`); pairs are ranked by the
weaker phase, the best of them run in a row, and the caller has the finalists simulated.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import replace
from math import ceil

from .candidates import Judged, Placement, Pool, by_recurrence, score, within_budget
from .colocated import Colocated
from .inventory import MachineType
from .phase_search import PhaseSearch
from .problem import Problem, WorkerShape
from .room import room_of
from .units import bundles_of, most_units

ALIKE = 1e-6  # relative; scores nearer than this are one
ROUGH = 20  # placements that are ranked by their weaker phase and then run in a row
ALONE = 4  # colocated shapes that are worked out
MOST_WORKERS = 256  # of one pool
Report = Callable[[str, float], None]  # what is done, and the share of it


def silent(what: str, share: float) -> None:
    """Reports nothing."""


class Search:
    """All placements of one problem, ranked."""

    def __init__(
        self,
        problem: Problem,
        report: Report = silent,
        seed: int = 0,
        lengths: tuple[float, float] = (1.0, 1.0),
    ) -> None:
        self.problem = problem
        self.report = report
        self.room = room_of(problem)
        self.phases = PhaseSearch(problem, seed, lengths)
        self.colocated = Colocated(self.phases)
        self.considered = 0
        self.tried: list[Placement] = []  # of these, both phases in a row

    def run(self) -> list[Judged]:
        """Best first, by recurrences. Empty where nothing can carry the rate."""
        self._measure_phases()
        self.tried = self._rough()
        judged = []
        for i, placement in enumerate(self.tried):
            self.report("pairs", i / len(self.tried))
            judged.append(self.judge(placement))
        self.report("pairs", 1.0)
        return self.ranked(judged)

    def ranked(self, judged: Iterable[Judged]) -> list[Judged]:
        """Without those that do not carry the rate. Those that are level with the first, in score
        and within 3% in goodput, come by the share of requests that meet the targets."""
        objective, rate_rps = self.problem.config.objective, self.problem.rate_rps
        scored = [(score(j, objective, rate_rps), j) for j in judged]
        alive = [(s, j) for s, j in scored if s > float("-inf")]
        alive.sort(key=lambda pair: (-pair[0], -pair[1].rate_rps))
        if not alive:
            return []
        top, most = alive[0][0], alive[0][1].rate_rps
        level = [j for s, j in alive if s >= top - abs(top) * ALIKE and j.rate_rps >= most * 0.97]
        rate_rps = rate_rps or most * 0.9
        level.sort(key=lambda j: (-round(self.attainment(j.placement, rate_rps), 2), j.workers))
        return level + [j for _, j in alive if j not in level]

    def judge(self, placement: Placement) -> Judged:
        """By recurrences: both phases in a row, TTFT and TPOT jointly."""
        prefill, decode = placement.prefill, placement.decode
        if prefill is None:
            each_rps, binds = self.colocated.goodput(decode.shape, decode.count)
            each_rps *= decode.count
        else:
            each_rps, binds = self.phases.pair_rps(
                prefill.shape, prefill.count, decode.shape, decode.count, local=placement.local
            )
        return by_recurrence(placement, placement.copies * each_rps, binds)

    def rate_near(self, placement: Placement, near_rps: float) -> float:
        """What `judge` finds, where it is known what it is about."""
        prefill, decode = placement.prefill, placement.decode
        each_rps = near_rps / placement.copies
        if prefill is None:
            each_rps /= decode.count
            each_rps = self.colocated.goodput_near(decode.shape, decode.count, each_rps)
            return placement.copies * decode.count * each_rps
        each_rps, _ = self.phases.pair_rps(
            prefill.shape,
            prefill.count,
            decode.shape,
            decode.count,
            local=placement.local,
            near_rps=each_rps,
        )
        return placement.copies * each_rps

    def attainment(self, placement: Placement, rate_rps: float) -> float:
        """The share of requests that meet both targets at one rate, by recurrences."""
        prefill, decode = placement.prefill, placement.decode
        each_rps = rate_rps / placement.copies
        if prefill is None:
            times = self.colocated.outcome(decode.shape, each_rps / decode.count, decode.count)
            return self.phases.judge.share(*times)
        behind_s = self.phases.behind_s(prefill.shape, decode.shape, local=placement.local)
        times = self.phases.outcome(
            prefill.shape, prefill.count, decode.shape, decode.count, each_rps, behind_s
        )
        return self.phases.judge.share(*times)

    def _measure_phases(self) -> None:
        shapes = self.problem.shapes
        for i, shape in enumerate(shapes):
            self.report("phases", i / len(shapes))
            self.phases.prefill_rps(shape, 1)
            self.phases.decode_rps(shape, 1)
        self.report("phases", 1.0)

    def _rough(self) -> list[Placement]:
        """The most promising of each kind, so that kinds compete after better judgement."""
        affinity = self.problem.config.search.affinity
        kinds: list[list[tuple[float, Placement]]] = []
        if affinity != "low":
            kinds.append([*self._anywhere()])
        if affinity != "high" and self._has_domains():
            kinds.append([*self._in_domains()])
        chosen: list[Placement] = []
        for i, kind in enumerate(kinds):
            self.report("placements", i / len(kinds))
            self.considered += len(kind)
            kind.sort(key=lambda pair: -pair[0])
            chosen += self._distinct(kind, ROUGH // len(kinds))
        if self.problem.config.search.colocated:
            alone = sorted(self._alone(), key=lambda pair: -pair[0])
            self.considered += len(alone)
            chosen += self._distinct(alone, 3)
        self.report("placements", 1.0)
        return chosen

    def _distinct(self, kind: list[tuple[float, Placement]], most: int) -> list[Placement]:
        """The best that lie on the machines, at most three with one pair of shapes."""
        chosen: list[Placement] = []
        seen: dict[tuple[object, ...], int] = {}
        for value, placement in kind:
            if value == float("-inf") or len(chosen) == most:
                break
            shapes = tuple(pool.shape.key for pool in placement.pools)
            if seen.get(shapes, 0) < 3 and bundles_of(placement, self.problem) is not None:
                seen[shapes] = seen.get(shapes, 0) + 1
                chosen.append(placement)
        return chosen

    def _value(self, placement: Placement, rate_rps: float) -> float:
        """The score that a rough goodput would give; −inf beyond a budget."""
        if within_budget(placement, self.problem.config.objective):
            return float("-inf")
        rough = by_recurrence(placement, rate_rps)
        return score(rough, self.problem.config.objective, self.problem.rate_rps)

    # Algorithm 1: the pools lie anywhere

    def _anywhere(self) -> Iterable[tuple[float, Placement]]:
        spare = self.problem.config.objective.spare
        for prefill in self._useful(self.phases.prefill_rps):
            for decode in self._useful(self.phases.decode_rps):
                for n, m in self._counts(prefill, decode):
                    rate_rps = min(
                        self.phases.prefill_rps(prefill, n), self.phases.decode_rps(decode, m)
                    )
                    placement = Placement(
                        prefill=Pool(shape=prefill, count=n),
                        decode=Pool(shape=decode, count=m),
                        spare=spare,
                    )
                    yield self._value(placement, rate_rps), placement

    def _useful(self, goodput: Callable[[WorkerShape, int], float]) -> list[WorkerShape]:
        """Shapes with a goodput at least a third of the best's a GPU on their machines."""
        best: dict[str, float] = {}
        for shape in self.problem.shapes:
            each = goodput(shape, 1) / shape.gpus
            best[shape.machine.name] = max(best.get(shape.machine.name, 0.0), each)
        return [
            shape
            for shape in self.problem.shapes
            if (each := goodput(shape, 1) / shape.gpus) > 0 and each >= best[shape.machine.name] / 3
        ]

    def _counts(self, prefill: WorkerShape, decode: WorkerShape) -> Iterable[tuple[int, int]]:
        """Counts worth a look: the least that carry the rate, or all that fill the machines."""
        rate_rps = self.problem.needed_rps
        if rate_rps is not None:
            n = self._least(prefill, rate_rps, self.phases.prefill_rps)
            m = self._least(decode, rate_rps, self.phases.decode_rps)
            yield from ((n + more, m + other) for more in (0, 1) for other in (0, 1))
            return
        spare = self.problem.config.objective.spare
        for n in range(1, MOST_WORKERS + 1):
            left = self.room.without(prefill, n + spare, prefill.power_w)
            most = min(left.workers(decode, decode.decode_power_w) - spare, MOST_WORKERS)
            if most < 1:
                return
            enough = ceil(
                self.phases.prefill_rps(prefill, n) / (self.phases.decode_rps(decode, 1) + 1e-9)
            )
            yield from ((n, m) for m in {most, min(most, enough)})

    def _least(
        self, shape: WorkerShape, rate_rps: float, goodput: Callable[[WorkerShape, int], float]
    ) -> int:
        count = 1
        while goodput(shape, count) < rate_rps and count < MOST_WORKERS:
            count += 1
        return count

    # Algorithm 2: KV stays inside a domain of fast links

    def _has_domains(self) -> bool:
        """Otherwise both algorithms see the same."""
        if self.problem.config.search.affinity == "low":
            return True
        machines = self.problem.machines.values()
        return any(machine.gpus > machine.nvlink_domain for machine in machines)

    def _in_domains(self) -> Iterable[tuple[float, Placement]]:
        for machine in self.problem.machines.values():
            own = [shape for shape in self.problem.shapes if shape.machine is machine]
            for prefill in own:
                for decode in own:
                    yield from self._units(machine, prefill, decode)

    def _units(
        self, machine: MachineType, prefill: WorkerShape, decode: WorkerShape
    ) -> Iterable[tuple[float, Placement]]:
        """Pools whose stages of the same layers share a domain each, of any counts that fit."""
        spare = self.problem.config.objective.spare
        for n in range(1, machine.nvlink_domain + 1):
            rate = self.phases.prefill_rps(prefill, n)
            for m in range(1, machine.nvlink_domain + 1):
                unit = Placement(
                    prefill=Pool(shape=prefill, count=n),
                    decode=Pool(shape=decode, count=m),
                    local=True,
                    spare=spare,
                )
                copies = min(most_units(unit), self.room.copies(unit))
                if not copies:
                    break
                rate_rps = min(rate, self.phases.decode_rps(decode, m))
                wanted = self.problem.needed_rps
                if wanted is not None and rate_rps > 0:
                    copies = min(copies, ceil(wanted / rate_rps))
                placement = replace(unit, copies=copies)
                yield self._value(placement, copies * rate_rps), placement

    # both phases on every worker

    def _alone(self) -> Iterable[tuple[float, Placement]]:
        """The most promising by a bound, each worked out step by step."""
        spare = self.problem.config.objective.spare
        bounds = {
            shape.key: self.colocated.mean_rps(shape) / shape.gpus for shape in self._mixing()
        }
        promising = sorted(self._mixing(), key=lambda shape: -bounds[shape.key])
        for shape in promising[:ALONE]:
            most = self.room.workers(shape, shape.power_w) - spare
            for count in self._counts_alone(shape, most):
                if 1 <= count <= most:
                    pool = Pool(shape=shape, count=count)
                    placement = Placement(prefill=None, decode=pool, spare=spare)
                    each, _ = self.colocated.goodput(shape, count)
                    yield self._value(placement, count * each), placement

    def _counts_alone(self, shape: WorkerShape, most: int) -> list[int]:
        """All of them, or the least that carry the rate, as if alone or beside all others, and one
        more."""
        wanted = self.problem.needed_rps
        each = [self.colocated.goodput(shape, workers)[0] for workers in (1, most)]
        if wanted is None:
            return [most] if each[0] > 0 else []
        least = {ceil(wanted / one) for one in each if one > 0}
        return sorted(least | {count + 1 for count in least})

    def _mixing(self) -> list[WorkerShape]:
        """Pipelines gain nothing from chunks that wait for rows: one stage is tried, if it fits."""
        single = [shape for shape in self.problem.shapes if shape.pipeline_parallel == 1]
        return single or list(self.problem.shapes)
