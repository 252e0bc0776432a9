"""The plan file: what `phasewise plan` is asked. As strict as a cluster file.

`workload` and `slo` are checked where they are understood (`placement/workload/`). They have:

```yaml
workload:
  trace: FILE          # or lengths; a path beside this file
  format: auto         # azure, burstgpt, mooncake, splitwise, vidur, jsonl: lines of prompt_tokens,
                       # output_tokens, where known arrival_s, class and prefix_ids, each id a name
                       # of 512 tokens that prompts begin with
  arrivals: trace      # poisson, gamma or uniform; a trace with times is replayed if none is named
  rate_rps: 4          # requests a second; the trace's own where none is given
  cv: 1.5              # of gamma: standard deviation of the gaps over their mean
  lengths: {prompt: {mean: 300, sigma: 0.8, max: 4000}, output: 120}  # mean or median; or "fitted"
  num_requests: 3000   # of one seed
  max_total_tokens: 8192                  # longer requests are left out
  classes: {chat: 0.7, batch: 0.3}        # shares, where the trace names none
slo:
  ttft_ms: 250
  tpot_ms: 50
  attainment: 0.9      # share of requests that shall meet both
  classes: {batch: {ttft_ms: 2000, attainment: 0.8}}  # what is left out is as above
  # or slowdown: {reference: MACHINE, tensor_parallel: 8, ttft: {p50: 2, p90: 3}, tpot: …, e2e: …}
```
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Annotated, Any, Literal

from .schema import Above, Between, Count, CountOrZero, Size

Positive = Annotated[float, Above(0.0)]
Goal = Literal[
    "goodput_per_gpu", "goodput_per_dollar", "goodput_per_watt", "goodput", "gpus", "cost", "power"
]


@dataclass(frozen=True, kw_only=True, slots=True)
class PlannedModel:
    """What will be served. Only its config.json is read here."""

    path: Path
    """Folder with a config.json, or that file. A checkpoint folder will do."""
    serve_path: str = ""
    """What the cluster file shall name as model.path. "": the folder above."""
    dtype: Literal["auto", "float32", "bfloat16"] = "auto"
    """Written to the cluster file."""
    max_model_len: CountOrZero = 0
    """Longest sequence in tokens; 0: the model's own, as far as the KV cache holds one."""


@dataclass(frozen=True, kw_only=True, slots=True)
class LatencyConfig:
    """Where step times come from."""

    source: Literal["sheet", "profile", "distserve", "splitwise", "aiconfigurator"] = "sheet"
    """sheet: config.json and the hardware sheet. profile: a file of `phasewise profile`.
    distserve: its published coefficients. splitwise: its published table, or one of its form.
    aiconfigurator: NVIDIA's database, where that optional package is installed."""
    file: Path | None = None
    """The profile; not for sheet and aiconfigurator."""
    model: str = ""
    """The model's name in a DistServe or Splitwise file."""
    kv_tokens: CountOrZero = 0
    """Positions that one worker holds. 0: worked out from memory."""
    calibration: Path | None = None
    """What a launched cluster was measured to spend outside steps, as `simulate --calibration`
    takes it: plans are searched and verified with it. null: nothing."""


@dataclass(frozen=True, kw_only=True, slots=True)
class MachineConfig:
    """Equal machines. Bandwidths, price and power of the sheet hold where none is given."""

    hardware: str
    """Name of a hardware sheet, or the path of one's own ending in .json."""
    nodes: CountOrZero = 1
    """How many there are; 0: none, it is the reference of slowdowns."""
    gpus_per_node: Count = 8
    """GPUs in one; on CPUs, cores."""
    nvlink_domain: CountOrZero = 0
    """GPUs that reach each other at full speed; 0: all of a node."""
    network_gbps: Positive | None = None
    """Gbit/s of one GPU to other nodes."""
    price_per_hour: Positive | None = None
    """$ of one GPU."""
    power_w: Positive | None = None
    """Of one GPU."""
    decode_power_w: Positive | None = None
    """Of one GPU of a decode pool, where those are capped. Its step times are taken as they are."""


@dataclass(frozen=True, kw_only=True, slots=True)
class ObjectiveConfig:
    """What the best plan is, and what it may use. gpus, cost and power need workload.rate_rps."""

    goal: Goal = "goodput_per_gpu"
    """The first four are raised, the last three lowered for the given rate."""
    max_gpus: Count | None = None
    max_cost_per_hour: Positive | None = None
    """$"""
    max_power_w: Positive | None = None
    headroom: Annotated[float, Between(0.0, 0.9)] = 0.0
    """Share of the goodput kept in reserve, for what step times and arrivals may be off by. A plan
    promises the low end of the goodput's interval less this share. gpus, cost and power are lowered
    until just the promise covers workload.rate_rps; other goals hold a given rate to it where
    headroom is more than 0, and else to the goodput itself."""
    spare: CountOrZero = 0
    """Workers of each pool that may be lost while the targets still hold: N+1 is 1."""


@dataclass(frozen=True, kw_only=True, slots=True)
class SearchConfig:
    """What is tried."""

    affinity: Literal["auto", "high", "low"] = "auto"
    """high: the pools lie anywhere, KV crosses the network. low: KV stays inside a node.
    auto: both, the better one is taken."""
    colocated: bool = True
    """Whether workers that do both phases compete."""
    min_tensor_parallel: Count = 1
    max_tensor_parallel: Count = 8
    max_pipeline_parallel: Count = 4
    tensor_parallel_across_nodes: bool = False
    max_batch_tokens: Count = 8192
    """Prompt tokens of a prefill step."""
    mixed_batch_tokens: Count = 2048
    """Tokens of a colocated step: rows and chunks together."""
    max_batch_size: Count = 256
    """Rows of a decode step."""
    seeds: Annotated[int, Between(2, 50)] = 5
    """Streams of requests that the winner is verified with; the interval is that of their mean."""
    finalists: Annotated[int, Between(1, 20)] = 3
    """Placements that are verified by the simulator."""
    kv_transfer: bool = True
    """false: KV costs nothing to move, as DistServe's planner has it."""
    compare: str = ""
    """A placement to be judged beside the winner: "P4x1 D2x2" is prefill with tensor parallel 4
    and decode with tensor and pipeline parallel 2; counts in front and machines behind, as in
    "3P4x1@h100 2D2x2@a100". Without P: colocated."""


@dataclass(frozen=True, kw_only=True, slots=True)
class PlannedKV:
    """Written to the cluster file; memory is worked out from the GPUs."""

    block_size: Annotated[int, Between(1, 1024)] = 16
    memory: Size | None = None
    """Bytes of blocks on each worker; null: what weights and activations leave."""


@dataclass(frozen=True, kw_only=True, slots=True)
class PlanConfig:
    """A whole plan file."""

    model: PlannedModel
    workload: Mapping[str, Any]
    slo: Mapping[str, Any]
    inventory: Mapping[str, MachineConfig]
    latency: LatencyConfig = field(default_factory=LatencyConfig)
    machine_latency: Mapping[str, LatencyConfig] = field(default_factory=dict)
    """Of machines, by their names in the inventory, whose step times come from elsewhere."""
    objective: ObjectiveConfig = field(default_factory=ObjectiveConfig)
    search: SearchConfig = field(default_factory=SearchConfig)
    kv: PlannedKV = field(default_factory=PlannedKV)
