"""Request times from DistServe-like recurrences over any step times: a search's pre-filter.

No KV transfer, chunks, preemption or deadlines; see `distserve_mirror` for the assumptions.
"""

from __future__ import annotations

from .deployment import Deployment
from .distserve_mirror import MirrorTimes
from .simulated_run import StopRule
from .workload import Workload


def quick_times(
    deployment: Deployment, workload: Workload, stop: StopRule | None = None
) -> MirrorTimes:
    """Of a disaggregated deployment with equal workers in each pool. Ignores `stop`."""
    ...
