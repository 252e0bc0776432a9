"""How firmly DistServe's published placements come out: other lengths, several seeds.

For every lengths variant and seed all pairs of one prefill and one decode worker, of no more GPUs,
are judged by recurrences, as its planner judges them by simulation; printed is the published pair's
goodput a GPU against the best pair's, the mean over seeds with a 95% interval, and its rank. With
`--splitwise` Splitwise's designs instead, with its step times as they are and under its
simulator's assumption that a decode step takes as long as one of a single row. With `--baseline`
the published pairs against vLLM, both by the mirrors of DistServe's simulator.

    python benchmarks/published_cases.py [--seeds 5] [--json] [--splitwise [code] | --baseline]
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Iterator, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from phasewise.configs.load import load_plan
from phasewise.placement.goodput.goodput import goodput, mean_interval
from phasewise.placement.goodput.judging import JointJudge
from phasewise.placement.latency.distserve_profile import (
    read_distserve_profile,
    read_max_num_tokens,
)
from phasewise.placement.recurrences.distserve_mirror import MirrorPhase, mirror
from phasewise.placement.recurrences.vllm_mirror import mirror_vllm
from phasewise.placement.search.algorithms import Search
from phasewise.placement.search.candidates import Placement, Pool, parse_compare, parse_placement
from phasewise.placement.search.problem import Problem, WorkerShape, read_problem
from phasewise.placement.search.splitwise_mirror import DESIGNS, with_free_batching
from phasewise.placement.search.units import bundles_of

CONFIGS = Path(__file__).parent.parent / "configs"
DATA = CONFIGS.parent / "tests" / "placement" / "data"
PUBLISHED = {"opt-13b-sharegpt": 2.30, "opt-66b-sharegpt": 0.957}  # req/s a GPU
# Published pair and vLLM as (tensor, pipeline parallel), and how much more the pair served.
OVER_VLLM = {
    "opt-13b-sharegpt": (((2, 1), (1, 1)), (1, 1), 4.60),
    "opt-66b-sharegpt": (((4, 1), (2, 2)), (4, 1), 2.75),
}
MIRRORED_REQUESTS = 300  # what its planner judges by
WORKLOADS = ("conversation", "code")  # of Azure, November 2023
CODE_DESIGNS = {
    "HH": "35P8x1@h100 5D8x1@h100",
    "HA": "35P8x1@h100 8D8x1@a100",
    "AA": "55P8x1@a100 15D8x1@a100",
}
ONE = "{{mean: {mean}, sigma: {sigma}, max: 2047}}"
LENGTHS: dict[str, tuple[str, ...]] = {
    "its preparation of ShareGPT": (),
    "single-turn ShareGPT": ("workload.trace=../tests/placement/data/nanoflow_sharegpt.csv.gz",),
} | {
    f"lognormal, sigma {sigma}": (
        "workload.trace=null",
        f"workload.lengths.prompt={ONE.format(mean=755.5, sigma=sigma)}",
        f"workload.lengths.output={ONE.format(mean=200.3, sigma=sigma)}",
    )
    for sigma in (0.4, 0.8, 1.2)
}


def silent(what: str, share: float) -> None:
    """Reports nothing."""


def distserve_rows(seeds: int) -> Iterator[dict[str, Any]]:
    for name, published in PUBLISHED.items():
        for words, overrides in LENGTHS.items():
            problem = read_problem(load_plan(CONFIGS / f"plan-{name}.yaml", overrides), CONFIGS)
            ratios, ranks, best = [], [], []
            for seed in range(seeds):
                own, others = pair_goodputs(problem, seed)
                ratios.append(own / max(others))
                ranks.append(1 + sum(other > own * 1.0001 for other in others))
                best.append(own)
            mean, half = mean_interval(ratios)
            yield {
                "case": name,
                "lengths": words,
                "per_gpu": sum(best) / seeds,
                "published_per_gpu": published,
                "of_the_best": mean,
                "interval": [mean - half, mean + half],
                "ranks": ranks,
            }


def pair_goodputs(problem: Problem, seed: int) -> tuple[float, list[float]]:
    """Requests a second a GPU of the published pair, and of every pair that takes no more GPUs."""
    search = Search(problem, silent, seed)
    published = parse_compare(problem)
    assert published is not None
    found = []
    for prefill in useful(search.phases.prefill_rps, problem.shapes):
        for decode in useful(search.phases.decode_rps, problem.shapes):
            if prefill.gpus + decode.gpus <= published.gpus:
                pair = Placement(
                    prefill=Pool(shape=prefill, count=1), decode=Pool(shape=decode, count=1)
                )
                found.append(search.judge(pair).per_gpu)
    return search.judge(published).per_gpu, found


def useful(served_rps: Any, shapes: Sequence[WorkerShape]) -> list[WorkerShape]:
    """Without shapes that serve less than half the best's a GPU in their phase."""
    each = {shape.key: served_rps(shape, 1) / shape.gpus for shape in shapes}
    return [shape for shape in shapes if each[shape.key] >= max(each.values()) / 2]


def splitwise_rows(workload: str) -> Iterator[dict[str, Any]]:
    path = CONFIGS / "plan-splitwise-conversation.yaml"
    overrides, designs = (), DESIGNS
    if workload == "code":
        overrides, designs = (
            (f"workload.trace={DATA / 'azure2023_code.csv.gz'}",),
            DESIGNS | CODE_DESIGNS,
        )
    for words, free in (("its table", False), ("its simulator's decode", True)):
        problem = read_problem(load_plan(path, overrides), CONFIGS)
        if free:
            problem = with_free_batching(problem)
        search = Search(problem, silent)
        for placement in {str(j.placement): j for j in search.run()[:3]}.values():
            yield _design(words, "found", placement.placement, placement.rate_rps)
        for name, text in designs.items():
            placement = parse_placement(text, problem)
            assert bundles_of(placement, problem) is not None
            yield _design(words, name, placement, search.judge(placement).rate_rps)


def baseline_rows(seeds: int) -> Iterator[dict[str, Any]]:
    """Goodput a GPU of the published pair and of vLLM, with the memory of 80 GB GPUs."""
    own, vllm = (
        read_distserve_profile(DATA / f"distserve_{engine}.json")
        for engine in ("distserve", "vllm")
    )
    room = read_max_num_tokens(DATA / "distserve_max_num_tokens.csv")
    for name, (pair, alone, published) in OVER_VLLM.items():
        problem = read_problem(load_plan(CONFIGS / f"plan-{name}.yaml"), CONFIGS)
        model = problem.config.latency.model
        prefill, decode, both = (
            MirrorPhase(
                coefficients=profile[model, tp],
                pipeline_parallel=pp,
                max_tokens=room[model, tp, pp],
            )
            for profile, (tp, pp) in ((own, pair[0]), (own, pair[1]), (vllm, alone))
        )
        spec = replace(problem.workload, num_requests=MIRRORED_REQUESTS, rate_rps=1.0)
        judge = JointJudge(policy=problem.slo)
        found = [
            goodput(simulation, spec, judge, seeds=range(seeds), start_rps=start_rps).rate_rps
            for simulation, start_rps in (
                (lambda w, _, p=prefill, d=decode: mirror(w, p, d), 5.0),
                (lambda w, _, b=both: mirror_vllm(w, b), 1.0),
            )
        ]
        each = found[0] / sum(tp * pp for tp, pp in pair), found[1] / (alone[0] * alone[1])
        yield {
            "case": name,
            "per_gpu": each[0],
            "vllm_per_gpu": each[1],
            "times": each[0] / each[1] if each[1] else None,
            "published_times": published,
        }


def _design(words: str, name: str, placement: Placement, rate_rps: float) -> dict[str, Any]:
    return {
        "decode": words,
        "design": name,
        "placement": str(placement),
        "goodput_rps": rate_rps,
        "power_kw": placement.power_w / 1e3,
        "cost_per_hour": placement.cost_per_hour,
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("--seeds", type=int, default=5)
    parser.add_argument("--splitwise", nargs="?", const="conversation", choices=WORKLOADS)
    parser.add_argument("--baseline", action="store_true")
    parser.add_argument("--json", action="store_true")
    arguments = parser.parse_args()
    rows = distserve_rows(arguments.seeds)
    if arguments.splitwise:
        rows = splitwise_rows(arguments.splitwise)
    if arguments.baseline:
        rows = baseline_rows(arguments.seeds)
    if arguments.json:
        print(json.dumps(list(rows), indent=1))
        return
    for row in rows:
        words = (f"{v:.3f}" if isinstance(v, float) else str(v) for v in row.values())
        print("  ".join(words), flush=True)


if __name__ == "__main__":
    main()
