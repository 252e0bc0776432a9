"""Who uses this machine's cores: to tell a disturbed measurement from an honest one."""

from __future__ import annotations

import contextlib
import os
from dataclasses import dataclass
from pathlib import Path

TICKS_A_SECOND = os.sysconf("SC_CLK_TCK")


@dataclass(frozen=True, kw_only=True, slots=True)
class CpuTime:
    """Seconds of all cores until now."""

    busy_s: float  # of anybody, the host's theft too
    own_s: float  # of this process and all that it has started
    serving_s: float  # of this process and those it has started itself: `serve`, not its workers

    def others_since(self, before: CpuTime) -> float:
        """Core-seconds that others took."""
        return max(0.0, self.busy_s - before.busy_s - (self.own_s - before.own_s))


def cpu_time() -> CpuTime:
    fields = [int(word) for word in Path("/proc/stat").read_text().splitlines()[0].split()[1:9]]
    user, nice, system, _, _, irq, softirq, steal = fields
    busy = user + nice + system + irq + softirq + steal
    own = sum(_ticks(pid) for pid in {os.getpid(), *processes_below(os.getpid())})
    serving = sum(_ticks(pid) for pid in {os.getpid(), *processes_below(os.getpid(), depth=1)})
    return CpuTime(
        busy_s=busy / TICKS_A_SECOND,
        own_s=own / TICKS_A_SECOND,
        serving_s=serving / TICKS_A_SECOND,
    )


def processes_below(leader: int, *, depth: int = 1 << 20) -> set[int]:
    """Every process that `leader` has started, and those they have, `depth` times."""
    parents = {}
    for folder in Path("/proc").iterdir():
        if folder.name.isdigit():
            with contextlib.suppress(OSError):  # it has ended meanwhile
                parents[int(folder.name)] = int(_stat(int(folder.name))[1])
    found: set[int] = set()
    for _ in range(depth):
        more = {pid for pid, parent in parents.items() if parent in found | {leader}} - found
        if not more:
            break
        found |= more
    return found


def pin_workers(leader: int, name: str) -> None:
    """Give each process called `name` below `leader` a core of its own, in turn; whatever else
    there is goes where there is room."""
    cores = sorted(os.sched_getaffinity(0))
    workers = sorted(
        pid
        for pid in processes_below(leader)
        if (Path("/proc") / str(pid) / "comm").read_text().startswith(name)
    )
    for i, pid in enumerate(workers):
        for thread in (Path("/proc") / str(pid) / "task").iterdir():
            os.sched_setaffinity(int(thread.name), {cores[i % len(cores)]})


def _ticks(pid: int) -> int:
    """Of its own and of children that have ended."""
    with contextlib.suppress(OSError):
        return sum(int(word) for word in _stat(pid)[11:15])
    return 0


def _stat(pid: int) -> list[str]:
    """What /proc tells, from the process's state on."""
    return (Path("/proc") / str(pid) / "stat").read_text().rpartition(")")[2].split()
