"""From a plan file's problem to the placement that wins, or to the reason why none can."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from itertools import islice

import numpy as np

from ..engine.errors import InvalidConfig, PhasewiseError
from ..engine.step_time import StepFeatures
from .candidates import Judged, parse_compare, score, within_budget
from .inventory import Bundle
from .judging import unloaded_by
from .phase_search import PhaseSearch
from .problem import Problem
from .search import Report, Search
from .units import bundles_of
from .verify import Verified, nothing, verify

SEARCHES = 3  # each with more asked than the one before


class Infeasible(PhasewiseError):
    """No placement meets what is asked (exit code 3)."""

    def __init__(self, binding: str, reason: str, nearest: str) -> None:
        super().__init__(f"infeasible, {binding} binds: {reason}; nearest feasible: {nearest}")
        self.binding = binding
        self.reason = reason
        self.nearest = nearest


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

    def tie(self, other: Verified) -> bool:
        """Whether both serve as much a GPU within their intervals."""
        a, b = self.best.judged, other.judged
        gpus = (a.placement.gpus, b.placement.gpus)
        return a.low_rps / gpus[0] <= b.high_rps / gpus[1] and b.low_rps / gpus[1] <= (
            a.high_rps / gpus[0]
        )


def make_plan(problem: Problem, report: Report) -> Plan:
    """Search, verify, choose. Raises Infeasible."""
    if not problem.shapes:
        raise _fits_nowhere(problem)
    parse_compare(problem)  # a wrong word is said before the search, not after it
    search, ranked, kinds = _searched(problem, report)
    compared = _compared(problem, search, report)
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
    problem: Problem, report: Report
) -> tuple[Search, Sequence[Judged], dict[bool, Verified]]:
    """The search, what it ranked, and the best of each kind, colocated or not. Where recurrences
    promise a rate that no finalist carries in simulation, more is asked of them."""
    asked, search, seen = problem, Search(problem, report), []
    for _ in range(SEARCHES):
        ranked = search.run()
        kinds: dict[bool, Verified] = {}
        for colocated in (False, True):
            mine = [j for j in ranked if (j.placement.prefill is None) == colocated]
            found = _verified(problem, mine, report)
            seen += found
            best = max(found, key=lambda v: _merit(problem, v), default=None)
            if best is not None and _merit(problem, best)[0] > float("-inf"):
                kinds[colocated] = best
        if kinds:
            return search, ranked, kinds
        if not ranked or problem.rate_rps is None or asked.rate_rps is None:
            break
        most_rps = max(found.judged.rate_rps for found in seen)
        more = max(1.05, 1.02 * problem.rate_rps / most_rps)
        spec = replace(asked.workload, rate_rps=asked.rate_rps * more)
        asked = replace(asked, workload=spec)
        search = Search(asked, report)
    raise _unconfirmed(problem, seen) if seen else _why_not(problem, search)


def _verified(problem: Problem, ranked: Sequence[Judged], report: Report) -> list[Verified]:
    """The finalists in simulation; for a given rate up to the first that carries it."""
    different: dict[str, Judged] = {}  # inside a node both affinities find the same
    for judged in ranked:
        different.setdefault(str(judged.placement), judged)
    tried: list[Verified] = []
    for judged in islice(different.values(), problem.config.search.finalists):
        tried.append(verify(problem, judged, report))
        if problem.rate_rps is not None and _merit(problem, tried[-1])[0] > float("-inf"):
            break
    return tried


def _unconfirmed(problem: Problem, seen: Sequence[Verified]) -> Infeasible:
    """Recurrences found placements for the rate, and simulation does not bear them out."""
    best = max(seen, key=lambda found: found.judged.rate_rps).judged
    return Infeasible(
        "workload.rate_rps",
        f"of {problem.rate_rps:g} req/s the simulation confirms {best.rate_rps:.2f} with "
        f"{best.placement}, the best of {len(seen)} placements",
        f"rate_rps {best.rate_rps:.2f}",
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


def _compared(problem: Problem, search: Search, report: Report) -> Verified | None:
    placement = parse_compare(problem)
    if placement is None:
        return None
    if bundles_of(placement, problem) is None:
        raise InvalidConfig(
            "search.compare", f"{placement} does not fit the machines", "compare a smaller one"
        )
    judged = search.judge(placement)
    return verify(problem, judged, report) if judged.rate_rps > 0 else nothing(judged)


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
    a, b = best.judged, other.judged
    ratio = a.per_gpu / b.per_gpu
    words = f"{a.per_gpu:.2f} against {b.per_gpu:.2f} req/s a GPU ({ratio:.2f} ×)"
    gpus = f"{a.placement.gpus} GPUs against {b.placement.gpus}"
    advice = "do not disaggregate" if colocated else "disaggregate"
    return f"{advice}: {words}, {gpus}"


def _fits_nowhere(problem: Problem) -> Infeasible:
    weights = problem.model.num_bytes
    room = max(m.hardware.memory_bytes for m in problem.machines.values())
    reasons = "; ".join(problem.left_out)
    need = int(weights / (0.9 * room)) + 1
    return Infeasible(
        "memory",
        f"{problem.model.name} has {weights / 1e9:.0f} GB of weights, a GPU {room / 1e9:.0f} GB, "
        f"and no split within the limits holds it ({reasons})",
        f"{need} or more GPUs a worker: raise search.max_tensor_parallel or "
        "max_pipeline_parallel, or give more GPUs",
    )


def _why_not(problem: Problem, search: Search) -> Infeasible:
    """The first of TTFT, TPOT, the budgets and the rate that cannot be met."""
    phases = search.phases
    if not any(phases.prefill_rps(shape, 1) for shape in problem.shapes):
        return _too_late(problem, phases)
    if not any(phases.decode_rps(shape, 1) for shape in problem.shapes):
        return _too_slow(problem, phases)
    return _too_small(problem)


def _too_late(problem: Problem, phases: PhaseSearch) -> Infeasible:
    """The first token, of prompts that nobody stands beside."""
    slo, shapes = problem.slo.default, problem.shapes
    if problem.slowdown is not None:
        return _no_slowdown(problem, phases, "ttft")
    share = 100 * slo.attainment
    late_s = [float(np.percentile(phases.prompt_costs(s).alone_s(), share)) for s in shapes]
    best_s, shape = min(zip(late_s, shapes, strict=True), key=lambda pair: pair[0])
    return Infeasible(
        "slo.ttft_ms",
        f"{slo.ttft_s * 1e3:g} ms, while {share:g}% of prompts take up to "
        f"{best_s * 1e3:.0f} ms on the fastest shape ({shape}) with nobody else there",
        f"ttft_ms {best_s * 1.05e3:.0f}, with a light load",
    )


def _too_slow(problem: Problem, phases: PhaseSearch) -> Infeasible:
    """A later token, of a row that nobody stands beside."""
    if problem.slowdown is not None:
        return _no_slowdown(problem, phases, "tpot")
    context = round(float(phases.workload.prompt_tokens.mean()))
    features = StepFeatures(decode_rows=1, decode_context=context)
    alone_s = ((s.decode.total_s(features), s) for s in problem.shapes)
    best_s, shape = min(alone_s, key=lambda pair: pair[0])
    return Infeasible(
        "slo.tpot_ms",
        f"{problem.slo.default.tpot_s * 1e3:g} ms, while one row alone takes {best_s * 1e3:.1f} ms "
        f"a token on the fastest shape ({shape})",
        f"tpot_ms {best_s * 1.1e3:.1f}, with a light load",
    )


def _no_slowdown(problem: Problem, phases: PhaseSearch, metric: str) -> Infeasible:
    """The limit that the fastest shape breaks most with nobody else there."""
    judge = problem.slowdown
    assert judge is not None
    found = []
    for shape in problem.shapes:
        alone = unloaded_by(shape.prefill, shape.decode)(phases.workload)
        times = (alone[0], None) if metric == "ttft" else (None, alone[1])
        broken = judge.broken(phases.workload, *times)
        found.append((broken[1] / broken[2], broken, shape))
    _, (name, value, limit), shape = min(found, key=lambda item: item[0])
    key = f"slo.slowdown.{name.replace(' ', '.')}"
    if value > limit:
        reason = f"{limit:g}×, while {shape} takes {value:.2f}× with nobody else there"
        return Infeasible(key, reason, f"{name} {value * 1.05:.2f}, with a light load")
    reason = f"{limit:g}×, which no rate keeps; alone {shape} takes {value:.2f}×"
    return Infeasible(key, reason, f"{name} {limit * 1.1:.2f}, with a light load")


def _too_small(problem: Problem) -> Infeasible:
    """What the machines can carry within the budgets, and which budget stands in the way."""
    objective = problem.config.objective
    config = problem.config
    free = replace(config, workload={k: v for k, v in config.workload.items() if k != "rate_rps"})
    goal = replace(objective, goal="goodput")
    most = Search(
        replace(problem, config=replace(free, objective=goal)), lambda what, share: None
    ).run()
    asked = f"{problem.rate_rps:g} req/s" if problem.rate_rps is not None else "any rate"
    budgets = (objective.max_gpus, objective.max_cost_per_hour, objective.max_power_w)
    if not most:
        return Infeasible(
            "the budget" if any(budgets) else "the inventory",
            f"no placement for {asked} fits the machines and budgets together",
            "give more GPUs, or raise objective.max_gpus, max_cost_per_hour, max_power_w",
        )
    best = most[0]
    bigger = replace(
        best.placement, decode=replace(best.placement.decode, count=best.placement.decode.count + 1)
    )
    binding = within_budget(bigger, objective) or "the inventory"
    return Infeasible(
        binding,
        f"{asked} is more than its {best.rate_rps:.2f} req/s with {best.placement}",
        f"rate_rps {best.rate_rps * 0.95:.2f}",
    )


def check_config(problem: Problem) -> None:
    """Budgets that contradict each other or the machines. Raises InvalidConfig."""
    objective = problem.config.objective
    total = sum(machine.gpus for machine in problem.machines.values())
    if objective.max_gpus is not None and objective.max_gpus > total:
        raise InvalidConfig(
            "objective.max_gpus",
            f"{objective.max_gpus}, while the inventory has {total}",
            "lower it, or add machines",
        )
    if not problem.shapes:
        return
    least = min(problem.shapes, key=lambda shape: shape.cost_per_hour)
    for key, limit, own, unit in (
        ("max_gpus", objective.max_gpus, min(s.gpus for s in problem.shapes), "GPUs"),
        ("max_cost_per_hour", objective.max_cost_per_hour, least.cost_per_hour, "$ an hour"),
        ("max_power_w", objective.max_power_w, min(s.power_w for s in problem.shapes), "W"),
    ):
        if limit is not None and limit < own * (1 + objective.spare):
            raise Infeasible(
                f"objective.{key}",
                f"{limit:g}, while the smallest worker that holds the model takes "
                f"{own * (1 + objective.spare):g} {unit}",
                f"{key} {own * (1 + objective.spare):g}",
            )
