"""A plan in words: why this one won, what binds, what came second, and what would change it."""

from __future__ import annotations

from collections.abc import Sequence

from ..search.candidates import Judged, Pool
from ..search.plan import Plan
from ..search.provision import Provision
from ..search.sensitivity import Sensitivity
from ..search.units import ray_node
from ..search.verify import Verified
from .plan_file import promise_words

BINDS = {
    "ttft": "time to first token, so the prefill side",
    "tpot": "time per output token, so the decode side",
    "network": "the network that KV crosses",
    "": "nothing that was tried",
}


def summary(plan: Plan) -> str:
    """A few lines for the terminal."""
    best, placement = plan.best, plan.best.judged.placement
    lines = [
        f"{plan.problem.model.name}: {placement}  [{placement.kind}]",
        f"  goodput    {_interval(best.judged)} req/s, {best.judged.per_gpu:.3f} a GPU "
        f"({_attainment(plan)})",
        f"  promise    {promise_words(plan)}",
        f"  TTFT, TPOT p50 {best.ttft_ms[0]:.0f}, {best.tpot_ms[0]:.1f} ms · "
        f"p90 {best.ttft_ms[1]:.0f}, {best.tpot_ms[1]:.1f} ms · "
        f"p99 {best.ttft_ms[2]:.0f}, {best.tpot_ms[2]:.1f} ms",
        f"  takes      {placement.gpus} GPUs, {placement.cost_per_hour:.2f} $/h, "
        f"{placement.power_w / 1e3:.2f} kW",
        f"  verdict    {plan.verdict}",
    ]
    if left_out := plan.problem.workload.left_out_share:
        lines.append(
            f"  left out   {left_out:.1%} of requests: longer than "
            f"{plan.problem.workload.max_total_tokens} tokens, prompt and answer together"
        )
    if placement.spare:
        lines.append(f"  spare      {_spare(plan)}")
    if plan.compared is not None:
        lines.append(f"  compared   {_compared(plan, plan.compared)}")
    return "\n".join(lines)


def explain(plan: Plan, flow: Provision | None, changes: Sequence[Sensitivity]) -> str:
    """Several paragraphs, each a heading and lines."""
    parts = [
        ("why this one", _why(plan)),
        ("what binds", _binds(plan)),
        ("phases alone, req/s a GPU", _phases(plan)),
        ("runner-up", _runner_up(plan)),
        ("if something changed", _changes(plan, changes)),
        ("mixed program", _flow(flow)),
        ("where it lies", _places(plan)),
        ("left out", list(plan.problem.left_out) or ["nothing"]),
        ("step times", sorted({_origin(pool) for pool in plan.best.judged.placement.pools})),
    ]
    return "\n\n".join(
        f"{title}\n" + "\n".join(f"  {line}" for line in lines) for title, lines in parts
    )


def _attainment(plan: Plan) -> str:
    best = plan.best
    share = f"{best.attainment:.1%} ± {best.attainment_half:.1%}"
    if plan.problem.slowdown is None:
        return f"{share} met both targets in simulation"
    return f"all slowdowns hold in simulation, nearest {best.tightest}, kept by {share}"


def _interval(judged: Judged) -> str:
    return f"{judged.rate_rps:.2f} ({judged.low_rps:.2f} to {judged.high_rps:.2f})"


def _spare(plan: Plan) -> str:
    placement = plan.best.judged.placement
    bare = [(pool.count, pool.shape) for pool in placement.pools]
    cost = placement.cost_per_hour - placement.copies * sum(c * s.cost_per_hour for c, s in bare)
    gpus = placement.gpus - placement.copies * sum(c * s.gpus for c, s in bare)
    return (
        f"{placement.spare} worker of each pool may be lost; that costs {gpus} GPUs and "
        f"{cost:.2f} $/h more, {cost / placement.cost_per_hour:.0%} of the whole"
    )


def _compared(plan: Plan, found: Verified) -> str:
    judged = found.judged
    if judged.rate_rps <= 0:
        return f"{judged.placement}: meets the targets at no rate"
    words = "ties with it within the intervals" if plan.tie(found) else "is apart from it"
    return f"{judged.placement}: {_interval(judged)} req/s, {judged.per_gpu:.3f} a GPU; {words}"


def _why(plan: Plan) -> list[str]:
    goal = plan.problem.config.objective.goal
    rate = plan.problem.rate_rps
    asked = f" for {rate:g} req/s" if rate is not None else ""
    lines = [
        f"promised {promise_words(plan)}",
        f"objective {goal}{asked}; {plan.search.considered} placements considered, "
        f"{plan.search.phases.simulations} phase runs, "
        f"{len(plan.ranked)} run jointly, {plan.best.runs} simulations of the winner",
        plan.verdict,
    ]
    if plan.best.simulated.gpus < plan.best.judged.placement.gpus:
        lines.append(f"simulated: {plan.best.simulated}, at the same rate a worker")
    if plan.other is not None:
        lines.append(f"best of the other kind: {plan.other.judged.placement}")
    return lines


def _binds(plan: Plan) -> list[str]:
    best = plan.best
    lines = [f"just above this rate most misses are of {BINDS[best.judged.binds]}"]
    if best.judged.placement.prefill is not None:
        lines.append(
            f"prefill workers are busy {best.use_prefill:.0%} of the time, decode workers "
            f"{best.use_decode:.0%}; a prompt's KV takes {best.transfer_ms:.2f} ms on the mean"
        )
    else:
        lines.append(f"workers are busy {best.use_decode:.0%} of the time")
    lines.append(f"{best.preemptions} preemptions in simulation")
    return lines


def _phases(plan: Plan) -> list[str]:
    phases = plan.search.phases
    lines = []
    for shape in plan.problem.shapes:
        prefill = phases.prefill_rps(shape, 1) / shape.gpus
        decode = phases.decode_rps(shape, 1) / shape.gpus
        lines.append(
            f"{shape!s:<22} prefill {prefill:8.2f}   decode {decode:8.2f}   "
            f"KV {shape.kv_tokens:>9,} tokens"
        )
    return lines


def _runner_up(plan: Plan) -> list[str]:
    judged = plan.runner_up
    if judged is None:
        return ["none"]
    return [
        f"{judged.placement}: {judged.rate_rps:.2f} req/s, {judged.per_gpu:.3f} a GPU, "
        f"{judged.placement.gpus} GPUs (by recurrences)"
    ]


def _changes(plan: Plan, changes: Sequence[Sensitivity]) -> list[str]:
    """The same placement's goodput, relative to what recurrences gave it."""
    here = plan.search.judge(plan.best.judged.placement).rate_rps
    kinds: dict[str, list[str]] = {}
    for change in changes:
        ratio = change.judged.rate_rps / here
        kinds.setdefault(change.what, []).append(f"{change.change}: {ratio:.2f}")
    lines = [f"{what:<15} {'   '.join(words)}" for what, words in kinds.items()]
    if not lines:
        return []
    return ["goodput of the same placement, relative to now", *lines]


def _flow(flow: Provision | None) -> list[str]:
    if flow is None:
        return ["no mix of workers, each judged alone, meets the constraints"]
    workers = ", ".join(f"{count} × {o.role} {o.name}" for o, count in flow.counts)
    lines = [
        f"workers taken alone, mixed freely: {workers}",
        f"objective {flow.objective:.3f}, proven bound {flow.bound:.3f} (gap {flow.gap:.2%}); "
        f"without whole numbers {flow.relaxed:.3f}",
    ]
    if flow.prices:
        name, price = flow.prices[0]
        lines.append(f"the bottleneck is {name}: one unit more is worth {price:.3f}")
    return lines


def _places(plan: Plan) -> list[str]:
    nodes: dict[str, list[str]] = {}
    for bundle in plan.bundles:
        node = ray_node(bundle, plan.problem)
        nodes.setdefault(node, []).append(f"{bundle.worker} ({bundle.gpus})")
    return [f"{node}: {', '.join(workers)}" for node, workers in nodes.items()]


def _origin(pool: Pool) -> str:
    return f"{pool.shape.machine.name}: {pool.shape.prefill.origin}"
