"""From a plan file's problem to the placement that wins, or to the reason why none can."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from itertools import islice

from ...engine.errors import InvalidConfig
from .algorithms import Report, Search
from .candidates import (
    Judged,
    carried_rps,
    parse_compare,
    promised_rps,
    score,
    within_budget,
)
from .infeasible import Infeasible, fits_nowhere, why_not
from .inventory import Bundle
from .problem import Problem
from .units import bundles_of
from .verify import STEP, Verified, Verifier, nothing

SEARCHES = 3  # each with more asked than the one before


@dataclass(frozen=True, kw_only=True)
class Plan:
    """The answer, and what it stands on."""

    problem: Problem
    search: Search
    best: Verified
    other: Verified | None  # the best of the other kind: colocated, or disaggregated
    runner_up: Judged | None  # the next pair of shapes, by recurrences
    compared: Verified | None  # what the plan file asked to be judged beside the winner
    ranked: tuple[Judged, ...]
    bundles: tuple[Bundle, ...]
    verdict: str

    def promised_rps(self, found: Verified) -> float:
        """What may be offered to it: less than its goodput by chance and by the headroom."""
        return promised_rps(found.judged, self.problem.config.objective)

    def lead(self, other: Verified) -> tuple[float, float]:
        """How much more than the other the winner serves, requests a second a GPU, and half the
        width of that difference's 95% interval.

        Both met the same streams of requests, so what is chance in a stream cancels: the spread is
        that of paired differences (common random numbers; Law, "Simulation Modeling and Analysis",
        10.2.1 and 11.2), far less than that of either.
        """
        mine, its = self.best.judged.per_gpu, other.judged.per_gpu
        pairs = zip(self.best.streams, other.streams, strict=True)
        return mine - its, self.best.half_of([mine * ours - its * theirs for ours, theirs in pairs])

    def tie(self, other: Verified) -> bool:
        """Whether both may serve as much a GPU: within that interval, and the step between two
        rates that were tried."""
        if other.judged.rate_rps <= 0:
            return False
        difference, half = self.lead(other)
        step = (1 / STEP - 1) * min(self.best.judged.per_gpu, other.judged.per_gpu)
        return abs(difference) <= half + step


def make_plan(problem: Problem, report: Report) -> Plan:
    """Search, verify, choose. Raises Infeasible."""
    if not problem.shapes:
        raise fits_nowhere(problem)
    parse_compare(problem)  # a wrong word is said before the search, not after it
    verifier = Verifier(problem, report)
    search, ranked, kinds = _searched(problem, verifier, report)
    compared = _compared(problem, search, verifier)
    if compared is not None and _better(problem, compared, kinds):
        kinds[compared.judged.placement.prefill is None] = compared
    order = sorted(kinds.values(), key=lambda v: _merit(problem, v))
    best = order.pop()
    other = order.pop() if order else None
    shapes = [pool.shape.key for pool in best.judged.placement.pools]
    runner_up = next(
        (j for j in ranked if [pool.shape.key for pool in j.placement.pools] != shapes), None
    )
    bundles = bundles_of(best.judged.placement, problem)
    assert bundles is not None, "only what fits is ranked"
    return Plan(
        problem=problem,
        search=search,
        best=best,
        other=other,
        runner_up=runner_up,
        compared=compared,
        ranked=tuple(ranked),
        bundles=bundles,
        verdict=_verdict(problem, best, other),
    )


def _searched(
    problem: Problem, verifier: Verifier, report: Report
) -> tuple[Search, Sequence[Judged], dict[bool, Verified]]:
    """The search, what it ranked, and the best of each kind, colocated or not. Where recurrences
    promise a rate that no finalist carries in simulation, more is asked of them."""
    asked, search, seen = problem, Search(problem, report), []
    for _ in range(SEARCHES):
        ranked = search.run()
        kinds: dict[bool, Verified] = {}
        for colocated in (False, True):
            mine = [j for j in ranked if (j.placement.prefill is None) == colocated]
            found = _verified(problem, mine, verifier)
            seen += found
            best = max(found, key=lambda v: _merit(problem, v), default=None)
            if best is not None and _merit(problem, best)[0] > float("-inf"):
                kinds[colocated] = best
        if kinds:
            return search, ranked, kinds
        if not ranked or problem.rate_rps is None or asked.rate_rps is None:
            break
        objective = problem.config.objective
        most_rps = max(carried_rps(found.judged, objective) for found in seen)
        if most_rps <= 0:
            break
        more = max(1.05, 1.02 * problem.rate_rps / most_rps)
        spec = replace(asked.workload, rate_rps=asked.rate_rps * more)
        asked = replace(asked, workload=spec)
        search = Search(asked, report)
    raise _unconfirmed(problem, seen) if seen else why_not(problem, search)


def _verified(problem: Problem, ranked: Sequence[Judged], verifier: Verifier) -> list[Verified]:
    """The finalists in simulation: for a given rate up to the first that carries it, else each
    that beats those before it."""
    different: dict[str, Judged] = {}  # inside a node both affinities find the same
    for judged in ranked:
        different.setdefault(str(judged.placement), judged)
    tried: list[Verified] = []
    for judged in islice(different.values(), problem.config.search.finalists):
        best = max((_merit(problem, v)[0] for v in tried), default=float("-inf"))
        if best > float("-inf"):
            if problem.rate_rps is not None:
                break
            # Without a given rate scores are so much for each request a second.
            one = score(replace(judged, rate_rps=1.0), problem.config.objective, None)
            found = verifier.verify_above(judged, best / one)
            tried += [found] if found is not None else []
        else:
            tried.append(verifier.verify(judged))
    return tried


def _unconfirmed(problem: Problem, seen: Sequence[Verified]) -> Infeasible:
    """Recurrences found placements, and simulation does not bear them out."""
    objective = problem.config.objective
    best = max(seen, key=lambda found: carried_rps(found.judged, objective))
    carried = min(carried_rps(best.judged, objective), best.judged.rate_rps)
    if problem.rate_rps is None or carried <= 0:
        return _held_at_no_rate(problem, max(seen, key=lambda found: found.attainment))
    promised = f", and {carried:.2f} as a promise" if carried < best.judged.rate_rps else ""
    return Infeasible(
        "workload.rate_rps",
        f"of {problem.rate_rps:g} req/s the simulation confirms {best.judged.rate_rps:.2f} with "
        f"{best.judged.placement}, the best of {len(seen)} placements{promised}",
        f"rate_rps {carried:.2f}",
    )


def _held_at_no_rate(problem: Problem, found: Verified) -> Infeasible:
    """By recurrences there is a rate; in simulation not even a hundredth of it holds."""
    metric = found.judged.binds
    words = (
        f"the simulation confirms no rate; with {found.judged.placement}, the best of those tried, "
        f"and hardly any load,"
    )
    if problem.slowdown is not None:
        key = f"slo.slowdown.{found.tightest.replace(' ', '.')}"
        share = f"{found.attainment:.0%} keep {found.tightest}"
        return Infeasible(key, f"{words} {share}", f"a looser {found.tightest}")
    share = problem.slo.default.attainment
    column = found.ttft_ms if metric == "ttft" else found.tpot_ms
    reached = [(rank, ms) for rank, ms in zip((50, 90, 99), column, strict=True)]
    rank, ms = next((pair for pair in reached if pair[0] >= 100 * share), reached[-1])
    return Infeasible(
        f"slo.{metric}_ms",
        f"{words} {found.attainment:.0%} of requests meet both targets (p{rank} of "
        f"{metric.upper()} {ms:.0f} ms)",
        f"{metric}_ms {ms * 1.05:.0f}",
    )


def _merit(problem: Problem, found: Verified) -> tuple[float, float]:
    judged = found.judged
    return score(judged, problem.config.objective, problem.rate_rps), judged.rate_rps


def _better(problem: Problem, found: Verified, kinds: Mapping[bool, Verified]) -> bool:
    """Whether a placement that a person named beats what the search found, within the budgets."""
    placement = found.judged.placement
    if within_budget(placement, problem.config.objective):
        return False
    if placement.prefill is None and not problem.config.search.colocated:
        return False
    mine, rival = _merit(problem, found), kinds.get(placement.prefill is None)
    return mine[0] > float("-inf") and (rival is None or mine > _merit(problem, rival))


def _compared(problem: Problem, search: Search, verifier: Verifier) -> Verified | None:
    placement = parse_compare(problem)
    if placement is None:
        return None
    if bundles_of(placement, problem) is None:
        raise InvalidConfig(
            "search.compare", f"{placement} does not fit the machines", "compare a smaller one"
        )
    judged = search.judge(placement)
    return verifier.verify(judged) if judged.rate_rps > 0 else nothing(judged)


def _verdict(problem: Problem, best: Verified, other: Verified | None) -> str:
    colocated = best.judged.placement.prefill is None
    if other is None and not problem.config.search.colocated:
        return "disaggregated, as asked: colocation was not searched"
    if other is None:
        return (
            "do not disaggregate: no split meets the targets"
            if colocated
            else "disaggregate: no colocated placement meets the targets"
        )
    advice = "do not disaggregate" if colocated else "disaggregate"
    return f"{advice}: {_against(problem, best.judged, other.judged)}"


def _against(problem: Problem, a: Judged, b: Judged) -> str:
    """What the objective weighs: what a given rate takes, or what a GPU serves."""
    goal, rate_rps = problem.config.objective.goal, problem.rate_rps
    gpus = f"{a.placement.gpus} GPUs against {b.placement.gpus}"
    if goal == "goodput":
        ratio = a.rate_rps / b.rate_rps
        return f"{a.rate_rps:.2f} against {b.rate_rps:.2f} req/s ({ratio:.2f} ×), {gpus}"
    if rate_rps is None:
        ratio = a.per_gpu / b.per_gpu
        words = f"{a.per_gpu:.2f} against {b.per_gpu:.2f} req/s a GPU ({ratio:.2f} ×)"
        return f"{words}, {gpus}"
    if goal in ("cost", "goodput_per_dollar"):
        gpus += f", {a.placement.cost_per_hour:.2f} $/h against {b.placement.cost_per_hour:.2f}"
    if goal in ("power", "goodput_per_watt"):
        watts = a.placement.power_w, b.placement.power_w
        gpus += f", {watts[0] / 1e3:.2f} kW against {watts[1] / 1e3:.2f}"
    return f"{gpus} for {rate_rps:g} req/s; they hold {a.rate_rps:.2f} and {b.rate_rps:.2f}"
