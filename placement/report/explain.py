"""A plan in words: why this one won, what binds, what came second, and what would change it."""

from __future__ import annotations

from collections.abc import Sequence

from ..search.candidates import Pool
from ..search.plan import Plan
from ..search.provision import Provision
from ..search.sensitivity import Sensitivity
from ..search.units import ray_node
from ..search.verify import STEP, Verified
from .plan_file import caveats, extrapolated, interval_words, promise_words, spare_words

BINDS = {
    "ttft": "time to first token, so the prefill side",
    "tpot": "time per output token, so the decode side",
    "network": "the network that KV crosses",
    "": "nothing that was tried",
}
LOWERED = {  # by a goal at a given rate
    "gpus": "GPUs",
    "goodput_per_gpu": "GPUs",
    "cost": "$/h",
    "goodput_per_dollar": "$/h",
    "power": "W",
    "goodput_per_watt": "W",
}
FLOW = "req/s of"  # of the program's rows: workers carry what flows, nobody can give more of it


def summary(plan: Plan) -> str:
    """A few lines for the terminal."""
    best, placement = plan.best, plan.best.judged.placement
    lines = [
        f"{plan.problem.model.name}: {placement}  [{placement.kind}]",
        f"  goodput    {interval_words(best.judged)} req/s, {best.judged.per_gpu:.3f} a GPU "
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
        lines.append(f"  spare      {spare_words(plan)}; {_spare_price(plan)}")
    if plan.compared is not None:
        lines.append(f"  compared   {_compared(plan, plan.compared)}")
    lines += [f"  note       {words}" for words in caveats(plan)]
    return "\n".join(lines)


def explain(plan: Plan, flow: Provision | None, changes: Sequence[Sensitivity]) -> str:
    """Several paragraphs, each a heading and lines."""
    parts = [
        ("why this one", _why(plan)),
        ("what binds", _binds(plan)),
        ("phases alone, req/s a GPU", _phases(plan)),
        ("runner-up", _runner_up(plan)),
        ("if something changed", _changes(plan, changes)),
        ("mixed program", _flow(plan, flow)),
        ("where it lies", _places(plan)),
        ("left out", list(plan.problem.left_out) or ["nothing"]),
        (
            "step times",
            sorted({_origin(pool) for pool in plan.best.judged.placement.pools})
            + extrapolated(plan),
        ),
    ]
    return "\n\n".join(
        f"{title}\n" + "\n".join(f"  {line}" for line in lines) for title, lines in parts
    )


def _attainment(plan: Plan) -> str:
    best = plan.best
    share = f"{best.attainment:.1%} ± {best.attainment_half:.1%}"
    if plan.problem.slowdown is None:
        of = f" of class {best.tightest}" if plan.problem.slo.classes else ""
        return f"{share}{of} met both targets in simulation"
    return f"all slowdowns hold in simulation, nearest {best.tightest}, kept by {share}"


def _spare_price(plan: Plan) -> str:
    placement = plan.best.judged.placement
    bare = [(pool.count, pool.shape) for pool in placement.pools]
    cost = placement.cost_per_hour - placement.copies * sum(c * s.cost_per_hour for c, s in bare)
    gpus = placement.gpus - placement.copies * sum(c * s.gpus for c, s in bare)
    return (
        f"{gpus} GPU{'s' * (gpus > 1)} and {cost:.2f} $/h more, "
        f"{cost / placement.cost_per_hour:.0%} of the whole"
    )


def _compared(plan: Plan, found: Verified) -> str:
    judged = found.judged
    if judged.rate_rps <= 0:
        return f"{judged.placement}: meets the targets at no rate"
    difference, half = plan.lead(found)
    words = "ties with it" if plan.tie(found) else "is apart from it"
    return (
        f"{judged.placement}: {interval_words(judged)} req/s, {judged.per_gpu:.3f} a GPU; {words}: "
        f"{-difference:+.3f} ± {half:.3f} a GPU on the same requests, at rates {1 - STEP:.0%} apart"
    )


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
    if str(plan.best.simulated) != str(plan.best.judged.placement):
        lines.append(f"simulated: {plan.best.simulated}, at the same rate a worker")
    if plan.other is not None:
        lines.append(f"best of the other kind: {_compared(plan, plan.other)}")
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
    by = "by recurrences"
    for found in (plan.other, plan.compared):
        if found is not None and found.judged.placement.key == judged.placement.key:
            judged, by = found.judged, "in simulation"
    return [
        f"{judged.placement}: {judged.rate_rps:.2f} req/s, {judged.per_gpu:.3f} a GPU, "
        f"{judged.placement.gpus} GPUs ({by})"
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


def _flow(plan: Plan, flow: Provision | None) -> list[str]:
    if flow is None:
        return ["no mix of workers, each judged alone, meets the constraints"]
    objective, rate_rps = plan.problem.config.objective, plan.problem.needed_rps
    lowered = rate_rps is not None and objective.goal != "goodput"
    unit = LOWERED[objective.goal] if lowered else "req/s"
    workers = ", ".join(f"{count} × {o.role} {o.name}" for o, count in flow.counts)
    lines = [
        f"workers taken alone, mixed freely{', no spares' * bool(objective.spare)}: {workers}",
        f"{flow.objective:.3f} {unit}{f' for {rate_rps:.4g} req/s' if lowered else ''}, "
        f"proven bound {flow.bound:.3f} (gap {flow.gap:.2%}); without whole numbers "
        f"{flow.relaxed:.3f}",
    ]
    prices = dict(flow.prices)
    if lowered and (price := prices.get("rate")):
        lines.append(f"one req/s more takes {price:.3f} {unit} more")
    scarce = [(name, p) for name, p in flow.prices if name != "rate" and not name.startswith(FLOW)]
    if scarce:
        name, price = scarce[0]
        lines.append(f"the bottleneck is {name}: one unit more is worth {price:.3f} {unit}")
    return lines


def _places(plan: Plan) -> list[str]:
    nodes: dict[str, list[str]] = {}
    for bundle in plan.bundles:
        node = ray_node(bundle, plan.problem)
        nodes.setdefault(node, []).append(f"{bundle.worker} ({bundle.gpus})")
    return [f"{node}: {', '.join(workers)}" for node, workers in nodes.items()]


def _origin(pool: Pool) -> str:
    return f"{pool.shape.machine.name}: {pool.shape.prefill.origin}"
