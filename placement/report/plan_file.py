"""A plan as files: the cluster file that `serve` launches, and the same facts as JSON."""

from __future__ import annotations

from typing import Any

from ...configs.load import dump
from ..latency.extrapolation import beyond, longest_chunk, mean_decode_step
from ..search.candidates import Judged, Pool
from ..search.plan import Plan
from ..search.problem import Problem
from ..search.provision import Provision
from ..search.units import nodes_of_unit
from ..search.verify import Verified
from ..workload.slo import SloTargets

MIB = 1 << 20
RAY_NAMES = {  # of the GPUs of our sheets, as Ray finds them on a node by itself
    "a100-40g": "A100",
    "a100-80g": "A100",
    "b200": "B200",
    "h100": "H100",
    "h200": "H200",
    "l40s": "L40S",
    "mi300x": "AMD-Instinct-MI300X-OAM",
}


def cluster_yaml(plan: Plan) -> str:
    """The cluster file, with the reasons in its heading."""
    return dump(cluster_sections(plan), heading(plan))


def cluster_sections(plan: Plan) -> dict[str, dict[str, Any]]:
    """Of one unit: a placement of several units is that many clusters of this file."""
    config, placement = plan.problem.config, plan.best.judged.placement
    path = config.model.serve_path or str(config.model.path)
    decode = _pool(plan, placement.decode) | {
        "max_batch_size": config.search.max_batch_size,
        "max_batch_tokens": max(config.search.mixed_batch_tokens, config.search.max_batch_size),
    }
    if placement.prefill is None:
        prefill: dict[str, Any] = {"replicas": 0}
        decode["local_prefill"] = "always"
    else:
        prefill = _pool(plan, placement.prefill) | {
            "max_batch_tokens": config.search.max_batch_tokens
        }
        own = kv_memory(plan, placement.prefill)
        if own != kv_memory(plan, placement.decode):
            prefill["memory"] = own
        # As it was verified: decode workers compute prompts only while no prefill worker can.
        decode |= {"local_prefill": "auto", "local_prefill_tokens": 0}
    targets = plan.problem.slo.default
    return {
        "model": {
            "path": path,
            "dtype": config.model.dtype,
            "max_model_len": config.model.max_model_len,
        },
        "prefill": prefill,
        "decode": decode,
        "kv": {"block_size": config.kv.block_size, "memory": kv_memory(plan, placement.decode)},
        "transfer": {"transport": "auto", "mode": "auto", "lease_s": 10},
        "slo": {
            "ttft_ms": round(targets.ttft_s * 1e3, 3),
            "tpot_ms": round(targets.tpot_s * 1e3, 3),
            "attainment": targets.attainment,
        },
        "gateway": {"grpc": "127.0.0.1:50051", "http": "127.0.0.1:8000"},
        "ray": _ray(plan),
    }


def _ray(plan: Plan) -> dict[str, Any]:
    """A Ray of several nodes is one that runs already; it is told what lies where."""
    nodes = unit_nodes(plan)
    if len(nodes) == 1:
        return {"address": None}
    across = plan.problem.config.search.tensor_parallel_across_nodes
    return {"address": "auto", "nodes": nodes} | (
        {"tensor_parallel_across_nodes": True} if across else {}
    )


def unit_nodes(plan: Plan) -> dict[str, dict[str, int]]:
    """Of the first unit, as `ray.nodes` has them."""
    return nodes_of_unit(plan.best.judged.placement, plan.bundles, plan.problem)


def _pool(plan: Plan, pool: Pool) -> dict[str, Any]:
    shape = pool.shape
    cpu = shape.machine.hardware.name.startswith("cpu")
    return {
        "replicas": plan.best.judged.placement.replicas(pool),
        "tensor_parallel": shape.tensor_parallel,
        "pipeline_parallel": shape.pipeline_parallel,
        "device": "cpu" if cpu else "cuda",
    } | ({"threads": shape.gpus} if cpu else _accelerator(plan, pool))  # a core each


def _accelerator(plan: Plan, pool: Pool) -> dict[str, str]:
    """Ray's name of the pool's GPUs, where a machine has others."""
    kinds = {machine.hardware.name for machine in plan.problem.machines.values() if machine.nodes}
    name = RAY_NAMES.get(pool.shape.machine.hardware.name)
    several = len(kinds) > 1 and len(unit_nodes(plan)) > 1
    return {"accelerator": name} if name is not None and several else {}


def kv_memory(plan: Plan, pool: Pool) -> str:
    """Of each worker of a pool, its GPUs together."""
    config = plan.problem.config
    if config.kv.memory is not None:
        return f"{config.kv.memory // MIB}MiB"
    return f"{int(pool.shape.kv_tokens * plan.problem.model.kv_bytes_per_token) // MIB}MiB"


def _domain_words(plan: Plan) -> list[str]:
    names = {bundle.node for bundle in plan.bundles}
    if len(unit_nodes(plan)) == 1 or names >= unit_nodes(plan).keys():
        return []
    return ["A node of ray.nodes is an NVLink domain: start a node of Ray on each."]


def heading(plan: Plan) -> str:
    best, problem = plan.best, plan.problem
    placement = best.judged.placement
    lines = [
        f"Planned by phasewise for {problem.model.name}: {placement}.",
        f"Goodput {interval_words(best.judged)} req/s {targets_words(problem)}; "
        f"{placement.gpus} GPUs, {placement.cost_per_hour:.2f} $/h, "
        f"{placement.power_w / 1e3:.2f} kW.",
        f"Promised {promise_words(plan)}.",
        f"Verdict: {plan.verdict}.",
    ]
    if placement.spare:
        lines.append(f"Replicas count {spare_words(plan)}.")
    lines += [f"{words[0].upper()}{words[1:]}." for words in caveats(plan)]
    if placement.copies > 1:
        lines.append(
            f"This is one unit of {placement.copies}: launch it once on each, "
            "so that KV stays inside a node."
        )
    if placement.local and len(unit_nodes(plan)) > 1:
        lines.append(
            f"Its stages lie on {len(unit_nodes(plan))} nodes, prefill's and decode's of the same "
            "layers on the same."
        )
    lines += _domain_words(plan)
    return "\n".join(lines)


def targets_words(problem: Problem) -> str:
    """What the goodput holds within."""
    slo = problem.slo.default
    if problem.slowdown is None:
        return (
            f"at {slo.attainment:.0%} of requests within TTFT {slo.ttft_s * 1e3:g} ms and TPOT "
            f"{slo.tpot_s * 1e3:g} ms" + "".join(map(_class_words, problem.slo.classes.items()))
        )
    limits = problem.slowdown.targets
    words = (
        f"{metric.upper()} " + ", ".join(f"p{rank:g} {limit:g}×" for rank, limit in ranks.items())
        for metric, ranks in (("ttft", limits.ttft), ("tpot", limits.tpot), ("e2e", limits.e2e))
        if ranks
    )
    return f"within all of {'; '.join(words)} of the unloaded reference"


def _class_words(item: tuple[str, SloTargets]) -> str:
    name, slo = item
    return (
        f", of class {name} {slo.attainment:.0%} within {slo.ttft_s * 1e3:g} and "
        f"{slo.tpot_s * 1e3:g} ms"
    )


def spare_words(plan: Plan) -> str:
    """Workers that the goodput does without."""
    spare = plan.best.judged.placement.spare
    return f"{spare} spare worker{'s' * (spare > 1)} in each pool, which the goodput does without"


def caveats(plan: Plan) -> list[str]:
    """What a reader of goodput and promise must know beside them."""
    found = []
    if plan.problem.config.latency.calibration is None:
        found.append(
            "steps and transfers alone are counted; what serving takes beside them is measured by "
            "`phasewise calibrate` and given as latency.calibration"
        )
    if plan.problem.workload.is_replayed_whole:
        found.append(
            "every seed replays the whole trace alike, so the interval knows nothing of chance"
        )
    return found


def promise_words(plan: Plan) -> str:
    """The rate that may be offered, and how it comes from the goodput."""
    headroom = plan.problem.config.objective.headroom
    less = f" less {headroom:.0%} headroom" if headroom else ", without headroom"
    return f"{plan.promised_rps(plan.best):.2f} req/s: the low end of the interval{less}"


def interval_words(judged: Judged) -> str:
    return f"{judged.rate_rps:.2f} ({judged.low_rps:.2f} to {judged.high_rps:.2f})"


def extrapolated(plan: Plan) -> list[str]:
    """In words, where the winner's steps lie beyond what step times were measured at."""
    best, search = plan.best, plan.problem.config.search
    placement, workload = best.judged.placement, plan.search.phases.workload
    alone = placement.prefill is None
    step = mean_decode_step(
        workload,
        rate_rps=best.judged.rate_rps,
        tpot_s=best.tpot_ms[0] / 1e3,
        workers=placement.decode.count * placement.copies,
    )
    budget = search.mixed_batch_tokens if alone else search.max_batch_tokens
    chunk = longest_chunk(workload, budget)
    decode = placement.decode.shape
    found = beyond(decode.mixed if alone else decode.decode, chunk, step)
    if placement.prefill is not None:
        found += beyond(placement.prefill.shape.prefill, chunk, step)
    return found


def plan_json(plan: Plan, provision: Provision | None = None) -> dict[str, Any]:
    """Everything that a program wants to know."""
    return {
        "model": plan.problem.model.name,
        "verdict": plan.verdict,
        "headroom": plan.problem.config.objective.headroom,
        "caveats": caveats(plan),
        "best": _verified(plan, plan.best),
        "best_of_the_other_kind": None if plan.other is None else _verified(plan, plan.other),
        "compared": None
        if plan.compared is None
        else _verified(plan, plan.compared) | {"tie": plan.tie(plan.compared)},
        "ranked": [_judged(judged) for judged in plan.ranked[:20]],
        "bundles": [
            {
                "worker": bundle.worker,
                "node": bundle.node,
                "domain": bundle.domain,
                "gpus": bundle.gpus,
            }
            for bundle in plan.bundles
        ],
        "cluster": cluster_sections(plan),
        "flow": None if provision is None else provision.to_json(),
        "extrapolated": extrapolated(plan),
        "left_out": list(plan.problem.left_out),
        "left_out_requests_share": plan.problem.workload.left_out_share,
        "placements_considered": plan.search.considered,
    }


def _judged(judged: Judged) -> dict[str, Any]:
    placement = judged.placement
    return {
        "placement": str(placement),
        "kind": placement.kind,
        "pools": [
            {
                "role": "prefill" if pool is placement.prefill else "decode",
                "machine": pool.shape.machine.name,
                "replicas": placement.replicas(pool) * placement.copies,
                "tensor_parallel": pool.shape.tensor_parallel,
                "pipeline_parallel": pool.shape.pipeline_parallel,
            }
            for pool in placement.pools
        ],
        "goodput_rps": judged.rate_rps,
        "goodput_per_gpu": judged.per_gpu,
        "requests_per_dollar": judged.per_dollar,
        "requests_per_kwh": judged.per_kwh,
        "gpus": placement.gpus,
        "cost_per_hour": placement.cost_per_hour,
        "power_w": placement.power_w,
        "binds": judged.binds,
        "by": judged.by,
    }


def _verified(plan: Plan, found: Verified) -> dict[str, Any]:
    return _judged(found.judged) | {
        "interval_rps": [found.judged.low_rps, found.judged.high_rps],
        "promised_rps": plan.promised_rps(found),
        "attainment": found.attainment,
        "attainment_half_width": found.attainment_half,
        "attainment_of": found.tightest,
        "simulated": str(found.simulated),
        "ttft_ms": dict(zip(("p50", "p90", "p99"), found.ttft_ms, strict=True)),
        "tpot_ms": dict(zip(("p50", "p90", "p99"), found.tpot_ms, strict=True)),
        "transfer_ms_mean": found.transfer_ms,
        "prefill_busy": found.use_prefill,
        "decode_busy": found.use_decode,
        "preemptions": found.preemptions,
    }
