"""What a search is asked, with everything looked up: shapes, step times, machines, targets."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, replace
from functools import cached_property
from pathlib import Path

from ...configs.plan_schema import LatencyConfig, PlanConfig
from ...engine.errors import InvalidConfig
from ..goodput.judging import PercentileJudge, unloaded_by
from ..goodput.slowdown import SlowdownSection, parse_slowdown, policy_of
from ..latency.aiconfigurator_source import AiconfiguratorLatency
from ..latency.distserve_profile import DistServeLatency, read_distserve_profile
from ..latency.model_shape import ModelShape, read_shape
from ..latency.phase_latency import LatencySource, NoLatency, PhaseLatency
from ..latency.roofline import RooflineLatency
from ..latency.step_profile import read_profile
from ..latency.tables import read_splitwise
from ..simulation.calibration import read_calibration
from ..simulation.deployment import Overheads
from ..workload.slo import SloPolicy, check_classes, parse_slo
from ..workload.workload import WorkloadSpec, parse_workload
from .inventory import MachineType, read_inventory

ShapeKey = tuple[str, int, int]  # machine, tensor parallel, pipeline parallel
RATE_GOALS = ("gpus", "cost", "power")
HEAVY = "the weights do not fit"


@dataclass(frozen=True, kw_only=True)
class WorkerShape:
    """A worker of either pool: GPUs of one machine type, and how they split the model."""

    machine: MachineType
    source: LatencySource
    tensor_parallel: int
    pipeline_parallel: int
    kv_tokens: int  # positions it holds

    @property
    def gpus(self) -> int:
        return self.tensor_parallel * self.pipeline_parallel

    @property
    def key(self) -> ShapeKey:
        return self.machine.name, self.tensor_parallel, self.pipeline_parallel

    @property
    def cost_per_hour(self) -> float:
        return self.gpus * self.machine.hardware.price_per_hour

    @property
    def power_w(self) -> float:
        return self.gpus * self.machine.hardware.power_w

    @property
    def decode_power_w(self) -> float:
        """As a worker that only decodes."""
        return self.gpus * self.machine.decode_power_w

    @cached_property
    def prefill(self) -> PhaseLatency:
        return self.source.phase("prefill", self.tensor_parallel, self.pipeline_parallel)

    @cached_property
    def decode(self) -> PhaseLatency:
        return self.source.phase("decode", self.tensor_parallel, self.pipeline_parallel)

    @cached_property
    def mixed(self) -> PhaseLatency:
        return self.source.phase("mixed", self.tensor_parallel, self.pipeline_parallel)

    def __str__(self) -> str:
        return f"{self.machine.name} TP{self.tensor_parallel} PP{self.pipeline_parallel}"


@dataclass(frozen=True, kw_only=True)
class Problem:
    """A plan file, understood."""

    config: PlanConfig
    model: ModelShape
    machines: Mapping[str, MachineType]
    workload: WorkloadSpec
    slo: SloPolicy  # with slowdowns: what schedulers are told
    slowdown: PercentileJudge | None  # what is judged instead of `slo`
    shapes: tuple[WorkerShape, ...]
    left_out: tuple[str, ...]  # shapes that cannot be, with the reason
    roomiest: int  # positions of the one among them that has most room for KV, if too little
    max_model_len: int
    overheads: Overheads  # of a launched cluster, outside steps

    @property
    def rate_rps(self) -> float | None:
        """What the placement must carry; None: as much as the machines can."""
        return self.workload.rate_rps if "rate_rps" in self.config.workload else None

    def scaled(self, ttft: float, tpot: float) -> Problem:
        """The default class's targets, or all slowdowns, multiplied."""
        slo = self.slo.default
        default = replace(slo, ttft_s=slo.ttft_s * ttft, tpot_s=slo.tpot_s * tpot)
        judge = self.slowdown
        if judge is not None:
            targets = judge.targets.scaled(ttft, tpot)
            judge = PercentileJudge(unloaded=judge.unloaded, targets=targets)
        return replace(self, slo=replace(self.slo, default=default), slowdown=judge)

    @property
    def needed_rps(self) -> float | None:
        """The goodput that leaves the headroom at that rate."""
        rate_rps = self.rate_rps
        return None if rate_rps is None else rate_rps / (1 - self.config.objective.headroom)

    @property
    def kv_bytes_per_token(self) -> float:
        return self.model.kv_bytes_per_token if self.config.search.kv_transfer else 0.0


def read_problem(config: PlanConfig, folder: Path) -> Problem:
    """Look up everything a plan file names. Relative paths in sections start from `folder`."""
    model = read_shape(config.model.path).served_as(config.model.dtype, "auto")
    max_model_len = config.model.max_model_len or model.max_positions
    # Without a rate it is 1, which the search stretches.
    section = {"max_total_tokens": max_model_len, "rate_rps": 1.0, **config.workload}
    if config.objective.goal in RATE_GOALS and "rate_rps" not in config.workload:
        raise InvalidConfig(
            "objective.goal",
            f"the least {config.objective.goal} for what rate?",
            "give workload.rate_rps, or choose a goodput goal",
        )
    machines = read_inventory(config.inventory, folder)
    sources = _sources(config, model, machines)
    workload = parse_workload(section, base=folder)
    slo, slowdown = _targets(config, machines, sources, workload)
    check_classes(slo, workload.class_names)
    shapes, left_out, roomiest = _shapes(config, model, machines, sources)
    return Problem(
        config=config,
        model=model,
        machines=machines,
        workload=workload,
        slo=slo,
        slowdown=slowdown,
        shapes=shapes,
        left_out=left_out,
        roomiest=roomiest,
        max_model_len=max_model_len,
        overheads=_overheads(config),
    )


def _targets(
    config: PlanConfig,
    machines: Mapping[str, MachineType],
    sources: Mapping[str, LatencySource],
    workload: WorkloadSpec,
) -> tuple[SloPolicy, PercentileJudge | None]:
    if "slowdown" not in config.slo:
        return parse_slo(config.slo), None
    section = parse_slowdown(config.slo)
    if section.reference not in machines:
        raise InvalidConfig(
            "slo.slowdown.reference",
            f"{section.reference!r} is no machine of the inventory",
            f"name one of {sorted(machines)}; nodes: 0 for one that is the reference only",
        )
    judge = _reference(section, sources[section.reference])
    return policy_of(judge, workload), judge


def _reference(section: SlowdownSection, source: LatencySource) -> PercentileJudge:
    split = section.tensor_parallel, section.pipeline_parallel
    unloaded = unloaded_by(source.phase("prefill", *split), source.phase("decode", *split))
    return PercentileJudge(unloaded=unloaded, targets=section.targets)


def _sources(
    config: PlanConfig, model: ModelShape, machines: Mapping[str, MachineType]
) -> dict[str, LatencySource]:
    unknown = sorted(config.machine_latency.keys() - machines.keys())
    if unknown:
        raise InvalidConfig(
            f"machine_latency.{unknown[0]}",
            "is no machine of the inventory",
            f"name one of {sorted(machines)}",
        )
    found = {}
    for name, machine in machines.items():
        own = config.machine_latency.get(name)
        where = "latency" if own is None else f"machine_latency.{name}"
        found[name] = _source(own or config.latency, model, config.model.path, machine, where)
    return found


def _overheads(config: PlanConfig) -> Overheads:
    latency = config.latency
    for name, own in config.machine_latency.items():
        if own.calibration is not None:
            raise InvalidConfig(
                f"machine_latency.{name}.calibration",
                "is of one machine, while a calibration is of a whole cluster",
                "give it as latency.calibration",
            )
    return read_calibration(latency.calibration).overheads if latency.calibration else Overheads()


def _source(
    latency: LatencyConfig, model: ModelShape, folder: Path, machine: MachineType, where: str
) -> LatencySource:
    """`folder` holds the model's config.json; `where` is the section's name."""
    if latency.source in ("sheet", "aiconfigurator") and latency.file is not None:
        raise InvalidConfig(
            f"{where}.file", f"a {latency.source} has none", f"set {where}.source: profile"
        )
    if latency.source == "aiconfigurator":
        return AiconfiguratorLatency(model=folder, name=model.name, hardware=machine.hardware.name)
    if latency.source == "sheet":
        domain = machine.nvlink_domain
        return RooflineLatency(shape=model, hardware=machine.hardware, domain=domain)
    if latency.file is None:
        raise InvalidConfig(f"{where}.file", "is missing", f"name the {latency.source} file")
    if latency.source == "profile":
        profile = read_profile(latency.file)
        # A CPU sheet names no processor: the profile says which one there is.
        named = None if machine.hardware.name.startswith("cpu") else machine.hardware.name
        profile.require(hardware=named, model=model.name)
        return profile
    if latency.source == "splitwise":
        return _from_splitwise(latency, latency.file, model, machine, where)
    return _from_distserve(latency, latency.file, model, machine, where)


def _from_splitwise(
    latency: LatencyConfig, file: Path, model: ModelShape, machine: MachineType, where: str
) -> LatencySource:
    profiles = read_splitwise(file)
    name = _named(latency, model, profiles, where)
    kind = machine.hardware.name.partition("-")[0]
    for (own, hardware), profile in profiles.items():
        if own == name and hardware.partition("-")[0] == kind:
            return profile
    raise InvalidConfig(
        f"inventory.{machine.name}.hardware",
        f"{file.name} holds no times of {name} on {machine.hardware.name}",
        f"it has {sorted(hardware for own, hardware in profiles if own == name)}",
    )


def _from_distserve(
    latency: LatencyConfig, file: Path, model: ModelShape, machine: MachineType, where: str
) -> LatencySource:
    profile = read_distserve_profile(file)
    name = _named(latency, model, profile, where)
    if not machine.hardware.name.startswith("a100"):
        raise InvalidConfig(
            f"inventory.{machine.name}.hardware",
            f"the coefficients were measured on a100-80g, not {machine.hardware.name}",
            f"use {where}.source: sheet, or a100-80g",
        )
    return DistServeLatency(model=name, profile=profile)


def _named(
    latency: LatencyConfig, model: ModelShape, held: Iterable[tuple[str, object]], where: str
) -> str:
    """The model's name in a file that holds times by (model, what they were taken on)."""
    name = latency.model or model.name
    known = sorted({one for one, _ in held})
    if name not in known:
        raise InvalidConfig(f"{where}.model", f"{name!r} is not in the file", f"use one of {known}")
    return name


def _shapes(
    config: PlanConfig,
    model: ModelShape,
    machines: Mapping[str, MachineType],
    sources: Mapping[str, LatencySource],
) -> tuple[tuple[WorkerShape, ...], tuple[str, ...], int]:
    """Every (machine, TP, PP) that holds the model, why the others do not, and the most positions
    of one that has too few."""
    shapes, left_out, roomiest = [], [], 0
    for machine in machines.values():
        for tp, pp in _parallelisms(config, machine):
            words = f"{machine.name} TP{tp} PP{pp}"
            if not model.divides(tp, pp):
                left_out.append(f"{words}: heads or layers do not divide")
                continue
            tokens, too_few = _kv_tokens(config, model, machine, tp, pp)
            if too_few:
                roomiest = max(roomiest, tokens)
                left_out.append(f"{words}: {too_few} in {machine.hardware.memory_bytes / 1e9:g} GB")
                continue
            shape = WorkerShape(
                machine=machine,
                source=sources[machine.name],
                tensor_parallel=tp,
                pipeline_parallel=pp,
                kv_tokens=tokens,
            )
            try:
                assert shape.prefill and shape.decode
            except NoLatency as error:
                left_out.append(f"{words}: {error.reason}")
                continue
            shapes.append(shape)
    return tuple(shapes), tuple(left_out), roomiest


def _kv_tokens(
    config: PlanConfig, model: ModelShape, machine: MachineType, tp: int, pp: int
) -> tuple[int, str]:
    """Positions that a worker of this shape has room for, and what is wrong with that, or ""."""
    room = config.machine_latency.get(machine.name, config.latency).kv_tokens
    room = room or model.kv_capacity_tokens(
        machine.hardware.memory_bytes, tp, pp, max_batch_tokens=config.search.max_batch_tokens
    )
    if not room:
        return 0, HEAVY
    asked = room
    if config.kv.memory is not None:
        asked = int(config.kv.memory // model.kv_bytes_per_token)
    if asked > room:
        return room, f"room for {room} tokens of KV, not for the {asked} of kv.memory,"
    if asked < (config.model.max_model_len or config.kv.block_size):
        return asked, f"room for {asked} tokens of KV"
    return asked, ""


def _parallelisms(config: PlanConfig, machine: MachineType) -> list[tuple[int, int]]:
    """Tensor and pipeline parallel, within the limits of search."""
    search = config.search
    widest = machine.gpus if search.tensor_parallel_across_nodes else machine.nvlink_domain
    return [
        (tp, pp)
        for tp in (1, 2, 3, 4, 6, 8, 16, 32)
        for pp in (1, 2, 3, 4, 6, 8, 16)
        if search.min_tensor_parallel <= tp <= min(widest, search.max_tensor_parallel)
        and pp <= search.max_pipeline_parallel
        and tp * pp <= machine.gpus
    ]
