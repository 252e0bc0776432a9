"""Every kernel against its reference in float64."""

from __future__ import annotations

from .bench import Bench
from .case import CHECKED, TINY, Device
from .kernel_cases import checked_cases
from .measure import checked


def run(bench: Bench) -> None:
    on = Device.of(bench.device, bench.dtype)
    for case, error, right in checked(checked_cases(on, TINY if bench.dry else CHECKED)):
        bench.check(case.name, right, error=error, allowed=case.tolerance)
