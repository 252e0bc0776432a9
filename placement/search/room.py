"""What inventory and budgets leave for more workers."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from math import inf

from .candidates import NEARLY, Placement
from .problem import Problem, WorkerShape


@dataclass(frozen=True, kw_only=True, slots=True)
class Room:
    """GPUs by machine, and of all of them together GPUs, $ an hour and W; inf: no such budget."""

    gpus: Mapping[str, int]
    all_gpus: float
    cost_per_hour: float
    power_w: float

    def workers(self, shape: WorkerShape, power_w: float) -> int:
        """The most of them, each of that power."""
        budgets = self._budgets(shape.gpus, shape.cost_per_hour, power_w)
        return max(0, min(self.gpus[shape.machine.name] // shape.gpus, budgets))

    def copies(self, unit: Placement) -> int:
        """The most units that the budgets allow; whether machines hold them is not asked."""
        return max(0, self._budgets(unit.gpus, unit.cost_per_hour, unit.power_w))

    def without(self, shape: WorkerShape, count: int, power_w: float) -> Room:
        name = shape.machine.name
        return replace(
            self,
            gpus={**self.gpus, name: self.gpus[name] - count * shape.gpus},
            all_gpus=self.all_gpus - count * shape.gpus,
            cost_per_hour=self.cost_per_hour - count * shape.cost_per_hour,
            power_w=self.power_w - count * power_w,
        )

    def _budgets(self, gpus: int, cost_per_hour: float, power_w: float) -> int:
        each = (
            (self.all_gpus, gpus),
            (self.cost_per_hour, cost_per_hour),
            (self.power_w, power_w),
        )
        return int(min(min(left / own for left, own in each) * NEARLY, 1e9))


def room_of(problem: Problem) -> Room:
    objective = problem.config.objective
    gpus = {name: machine.gpus for name, machine in problem.machines.items()}
    return Room(
        gpus=gpus,
        all_gpus=float(objective.max_gpus or sum(gpus.values())),
        cost_per_hour=objective.max_cost_per_hour or inf,
        power_w=objective.max_power_w or inf,
    )
