"""What `--workload W` names: a trace, or a YAML file of a workload section, as a plan file is.

```yaml
workload: {arrivals: gamma, cv: 2, lengths: {prompt: {mean: 300, sigma: 0.8}, output: 120}}
slo:      {ttft_ms: 250, tpot_ms: 50}     # optional: targets, of classes too
```
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from ...configs.load import load_file, load_plan, section_names
from ...configs.plan_schema import PlanConfig
from ...engine.errors import InvalidConfig
from .slo import SloPolicy, check_classes, parse_slo
from .workload import WorkloadSpec, parse_workload

YAML = (".yaml", ".yml")


@dataclass(frozen=True, kw_only=True, slots=True)
class WorkloadFile:
    """The sections that such a file may have; each is checked by who understands it."""

    workload: Mapping[str, Any]
    slo: Mapping[str, Any] = field(default_factory=dict)


def read_workload(
    path: Path, *, rate_rps: float | None = None
) -> tuple[WorkloadSpec, SloPolicy | None]:
    """The workload, at `rate_rps` where that is given, and the file's own targets if it has any.

    Of a plan file its workload and its targets. Raises InvalidConfig with the key, or with the
    line of a trace.
    """
    file = _sections(path)
    section = dict(file.workload)
    if rate_rps is not None:
        section["rate_rps"] = rate_rps
    spec = parse_workload(section, base=path.parent)
    if not file.slo:
        return spec, None
    if "slowdown" in file.slo:
        raise InvalidConfig(
            "slo.slowdown",
            "slowdowns are targets of plans alone: their reference is a simulated worker",
            "give a file with the workload and slo: {ttft_ms: …, tpot_ms: …}",
        )
    policy = parse_slo(file.slo)
    check_classes(policy, spec.class_names)
    return spec, policy


def _sections(path: Path) -> WorkloadFile | PlanConfig:
    if path.suffix not in YAML:
        return WorkloadFile(workload={"trace": path.name})
    if "inventory" in section_names(path):
        return load_plan(path)
    return load_file(WorkloadFile, path)
