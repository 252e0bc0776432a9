"""Why nothing can meet what is asked: what binds, and the nearest that can be met."""

from __future__ import annotations

from dataclasses import replace
from math import ceil, floor

import numpy as np

from ...engine.errors import InvalidConfig, PhasewiseError
from ...engine.step_time import StepFeatures
from ..goodput.judging import unloaded_by
from ..workload.slo import SloTargets
from .algorithms import Search
from .candidates import Placement, within_budget
from .phase_search import PhaseSearch
from .problem import HEAVY, Problem

LOOSER = (1.1, 1.25, 1.5, 2.0, 3.0, 5.0, 10.0)  # times the targets, in search of the nearest
LIGHT = 0.05  # of the rate at which prefill is always busy


class Infeasible(PhasewiseError):
    """No placement meets what is asked (exit code 3)."""

    def __init__(self, binding: str, reason: str, nearest: str) -> None:
        super().__init__(f"infeasible, {binding} binds: {reason}; nearest feasible: {nearest}")
        self.binding = binding
        self.reason = reason
        self.nearest = nearest


def fits_nowhere(problem: Problem) -> Infeasible:
    """No shape is left: which limit is in the way of those that there could be."""
    reasons, search = "; ".join(problem.left_out), problem.config.search
    heavy = any(HEAVY in reason for reason in problem.left_out)
    asked = problem.config.kv.memory is not None and problem.left_out and not heavy
    if problem.roomiest or asked:
        return _no_room(problem, reasons)
    if not heavy:
        return Infeasible(
            "search.min_tensor_parallel" if search.min_tensor_parallel > 1 else "search",
            f"no split within the limits is possible ({reasons or 'none fits into a domain'})",
            "other limits of search: min_tensor_parallel, max_tensor_parallel, "
            "max_pipeline_parallel, or more GPUs",
        )
    weights = problem.model.num_bytes
    room = max(m.hardware.memory_bytes for m in problem.machines.values())
    need = int(weights / (0.9 * room)) + 1
    return Infeasible(
        "memory",
        f"{problem.model.name} has {weights / 1e9:.0f} GB of weights, a GPU {room / 1e9:.0f} GB, "
        f"and no split within the limits holds it ({reasons})",
        f"{need} or more GPUs a worker: raise search.max_tensor_parallel or "
        "max_pipeline_parallel, or give more GPUs",
    )


def _no_room(problem: Problem, reasons: str) -> Infeasible:
    """For the KV of one sequence, or for all that kv.memory says."""
    config, roomiest = problem.config, problem.roomiest
    token_bytes = problem.model.kv_bytes_per_token
    asked = config.model.max_model_len or config.kv.block_size
    if config.kv.memory is None:
        words = f"{asked} tokens, while the roomiest worker holds {roomiest} ({reasons})"
        return Infeasible("model.max_model_len", words, f"max_model_len {roomiest}")
    words = f"{config.kv.memory / 2**20:g} MiB do for no worker ({reasons})"
    if roomiest >= asked:
        near = f"kv.memory {floor(roomiest * token_bytes / 2**20)}MiB"
    else:
        near = f"kv.memory {ceil(asked * token_bytes / 2**20)}MiB"
        near = f"max_model_len {roomiest}, or {near}" if roomiest else near
    return Infeasible("kv.memory", words, near)


def why_not(problem: Problem, search: Search) -> Infeasible:
    """The first of TTFT, TPOT, the budgets and the rate that cannot be met."""
    phases = search.phases
    if not any(phases.prefill_rps(shape, 1) for shape in problem.shapes):
        return _too_late(problem, phases)
    if not any(phases.decode_rps(shape, 1) for shape in problem.shapes):
        return _too_slow(problem, phases)
    return _too_small(problem)


def _too_late(problem: Problem, phases: PhaseSearch) -> Infeasible:
    """The first token, of prompts that nobody stands beside."""
    shapes = problem.shapes
    if problem.slowdown is not None:
        return _no_slowdown(problem, phases, "ttft")
    name, slo = _tightest(problem, phases, "ttft_s")
    share = 100 * slo.attainment
    rows = phases.rows_of(name)
    late_s = [float(np.percentile(phases.alone_s(s)[rows], share)) for s in shapes]
    best_s, shape = min(zip(late_s, shapes, strict=True), key=lambda pair: pair[0])
    key = f"slo.classes.{name}.ttft_ms" if name in problem.slo.classes else "slo.ttft_ms"
    light_rps = LIGHT * phases.prompt_costs(shape).capacity_rps()
    waited_s = phases.waited_s(shape, 1, phases.unit_arrival_s / light_rps) + phases.told_s
    near_s = max(best_s, float(np.percentile(waited_s[rows], share)))
    return Infeasible(
        key,
        f"{slo.ttft_s * 1e3:g} ms, while {share:g}% of prompts take up to "
        f"{best_s * 1e3:.0f} ms on the fastest shape ({shape}) with nobody else there",
        f"ttft_ms {near_s * 1.05e3:.0f}, with a light load",
    )


def _tightest(problem: Problem, phases: PhaseSearch, metric: str) -> tuple[str, SloTargets]:
    """Of the classes that requests have, the one whose target is lowest."""
    names = phases.workload.class_names
    return min(
        ((name, problem.slo.of(name)) for name in names), key=lambda pair: getattr(pair[1], metric)
    )


def _too_slow(problem: Problem, phases: PhaseSearch) -> Infeasible:
    """A later token, of a row that nobody stands beside."""
    if problem.slowdown is not None:
        return _no_slowdown(problem, phases, "tpot")
    context = round(float(phases.workload.prompt_tokens.mean()))
    features = StepFeatures(decode_rows=1, decode_context=context)
    alone_s = ((phases.decode(s).total_s(features), s) for s in problem.shapes)
    best_s, shape = min(alone_s, key=lambda pair: pair[0])
    name, slo = _tightest(problem, phases, "tpot_s")
    return Infeasible(
        f"slo.classes.{name}.tpot_ms" if name in problem.slo.classes else "slo.tpot_ms",
        f"{slo.tpot_s * 1e3:g} ms, while one row alone takes {best_s * 1e3:.1f} ms "
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
    search = Search(replace(problem, config=replace(free, objective=goal)))
    most = search.run()
    asked = f"{problem.rate_rps:g} req/s" if problem.rate_rps is not None else "any rate"
    asked += f" with a headroom of {objective.headroom:.0%}" if objective.headroom else ""
    budgets = (objective.max_gpus, objective.max_cost_per_hour, objective.max_power_w)
    if not most and search.tried:
        return _not_in_a_row(problem, search.tried[0])
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
        f"rate_rps {best.rate_rps * 0.95 * (1 - objective.headroom):.2f}",
    )


def _not_in_a_row(problem: Problem, placement: Placement) -> Infeasible:
    """Each phase meets its target alone, while both in a row keep too few requests within all."""
    scale, looser = 1.0, problem
    for scale in LOOSER:
        looser = problem.scaled(scale, scale)
        if Search(looser).judge(placement).rate_rps > 0:
            break
    words = "each phase meets its target alone, but in a row too few requests meet all at once"
    if problem.slowdown is not None:
        return Infeasible("slo.slowdown", words, f"all limits × {scale:g}")
    slo = looser.slo.default
    nearest = f"ttft_ms {slo.ttft_s * 1e3:.0f}, tpot_ms {slo.tpot_s * 1e3:.1f}"
    return Infeasible("slo.ttft_ms and slo.tpot_ms", words, nearest)


def check_config(problem: Problem) -> None:
    """Budgets that contradict each other or the machines. Raises InvalidConfig, and Infeasible for
    those that the smallest placement breaks."""
    objective = problem.config.objective
    total = sum(machine.gpus for machine in problem.machines.values())
    if objective.max_gpus is not None and objective.max_gpus > total:
        raise InvalidConfig(
            "objective.max_gpus",
            f"{objective.max_gpus}, while the inventory has {total}",
            "lower it, or add machines",
        )
    search, shapes = problem.config.search, problem.shapes
    if search.min_tensor_parallel > search.max_tensor_parallel:
        raise InvalidConfig(
            "search.min_tensor_parallel",
            f"{search.min_tensor_parallel}, while max_tensor_parallel is "
            f"{search.max_tensor_parallel}",
            "lower the one or raise the other",
        )
    if not shapes:
        return
    pools = 1 if search.colocated else 2
    gpus, cost, power = (
        pools * (1 + objective.spare) * min(each)
        for each in (
            [shape.gpus for shape in shapes],
            [shape.cost_per_hour for shape in shapes],
            [min(shape.power_w, shape.decode_power_w) for shape in shapes],
        )
    )
    what = f"{pools * (1 + objective.spare)} of the smallest workers that hold the model"
    if gpus > total:
        binding = "objective.spare" if pools * gpus // (1 + objective.spare) <= total else ""
        raise Infeasible(
            binding or "the inventory", f"{total} GPUs, while {what} take {gpus}", f"{gpus} GPUs"
        )
    for key, limit, own, unit in (
        ("max_gpus", objective.max_gpus, gpus, "GPUs"),
        ("max_cost_per_hour", objective.max_cost_per_hour, cost, "$ an hour"),
        ("max_power_w", objective.max_power_w, power, "W"),
    ):
        if limit is not None and limit < own:
            words = f"{limit:g}, while {what} take {own:g} {unit}"
            raise Infeasible(f"objective.{key}", words, f"{key} {own:g}")
