"""What is compared: cluster files, how they are launched here, and what is offered to them."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path

from live.checkpoint import checkpoint
from phasewise.cluster.checkpoint import resolve
from phasewise.configs.load import load_cluster
from phasewise.configs.schema import ClusterConfig
from phasewise.placement.latency.phase_latency import LatencySource
from phasewise.placement.simulation.deployment import Deployment, Overheads
from phasewise.placement.simulation.twin import twin_of, with_targets
from phasewise.placement.workload.slo import SloPolicy
from phasewise.placement.workload.workload import Workload, WorkloadSpec
from phasewise.placement.workload.workload_file import read_workload

CONFIGS = Path(__file__).parents[2] / "configs"
FEWEST = 60  # requests


@dataclass(frozen=True, kw_only=True, slots=True)
class Case:
    """One cluster and its sweep of rates."""

    name: str
    config: str
    changes: tuple[str, ...]  # to the file
    workload: str
    rates: tuple[float, ...]
    seconds: float  # of arrivals, at each rate
    tolerance: float  # of mean and p90 of TTFT and TPOT
    cores: int  # that its workers share with everything else; 0: they compute nothing
    lengths: tuple[int, ...]  # of prompts that are calibrated with
    answer: int  # tokens
    idle_s: float  # what a calibration request takes at most, roughly
    model: str = ""  # a random checkpoint of this shape instead of the file's

    @property
    def path(self) -> Path:
        return CONFIGS / self.config

    @property
    def measured(self) -> str:
        """Cases of equal workers share a profile."""
        return "-".join([self.config.removesuffix(".yaml"), *([self.model] if self.model else [])])

    @property
    def overrides(self) -> tuple[str, ...]:
        return (*self.changes, *([f"model.path={checkpoint(self.model)}"] if self.model else []))

    def cluster(self) -> ClusterConfig:
        return resolve(load_cluster(self.path, self.overrides))

    def spec(self) -> tuple[WorkloadSpec, SloPolicy]:
        spec, policy = read_workload(CONFIGS / self.workload, rate_rps=1.0)
        assert policy is not None, "a benchmark's workload names its targets"
        longest = self.cluster().model.max_model_len
        return replace(spec, max_total_tokens=longest), policy

    def load(self, rate_rps: float, seed: int) -> Workload:
        spec, _ = self.spec()
        count = max(FEWEST, round(rate_rps * self.seconds))
        return replace(spec, num_requests=count).build(seed, rate_rps=rate_rps)

    def twin(self, source: LatencySource | None, overheads: Overheads) -> Deployment:
        """With the targets that the load generator's requests carry."""
        _, policy = self.spec()
        return with_targets(twin_of(self.cluster(), source, overheads=overheads), policy)


CPU_LENGTHS = (16, 48, 96, 160, 256, 512, 1024)
ONE_THREAD = ("decode.threads=1",)


def cpu_case(name: str, workload: str, rates: Sequence[float], seconds: float) -> Case:
    pair = "1p1d" in name
    return Case(
        name=name,
        config="local.yaml" if pair else "colocated.yaml",
        changes=("prefill.threads=1", *ONE_THREAD) if pair else ONE_THREAD,
        workload=workload,
        rates=tuple(rates),
        seconds=seconds,
        tolerance=0.15,
        cores=2,
        lengths=CPU_LENGTHS,
        answer=100,
        idle_s=0.3,
    )


def larger_case(name: str, rates: Sequence[float]) -> Case:
    """A model of 20 million parameters, beside whose steps host work is small, as in real use."""
    return replace(
        cpu_case(name, "workload-chat.yaml", rates, 20.0),
        model="20M",
        lengths=CPU_LENGTHS[:-1],
        answer=60,
        idle_s=0.6,
    )


def paced_case(name: str, replicas: tuple[int, int], rates: Sequence[float]) -> Case:
    return Case(
        name=name,
        config="paced-4p4d.yaml",
        changes=(f"prefill.replicas={replicas[0]}", f"decode.replicas={replicas[1]}"),
        workload="workload-rehearsal.yaml",
        rates=tuple(rates),
        seconds=30.0,
        tolerance=0.05,
        cores=0,
        lengths=(64, 256, 1024, 4096),
        answer=40,
        idle_s=0.35,
    )


CASES = {
    case.name: case
    for case in (
        cpu_case("cpu-1p1d", "workload-chat.yaml", (4, 8, 12, 16, 22), 20.0),
        cpu_case("cpu-colocated", "workload-chat.yaml", (4, 8, 12, 16, 22), 20.0),
        larger_case("cpu-1p1d-20M", (2, 3, 4, 5)),
        larger_case("cpu-colocated-20M", (2, 3, 4, 5)),
        paced_case("paced-2p1d", (2, 1), (6, 12, 18, 24)),
        paced_case("paced-4p4d", (4, 4), (8, 16, 24, 32)),
    )
}
