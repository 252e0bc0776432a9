"""Rows of figures with their targets, written as they come: what a section reports to."""

from __future__ import annotations

import json
import time
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch

from .measure import Ceilings


@dataclass(frozen=True, kw_only=True, slots=True)
class Target:
    """What a figure must reach, and what is good. From the engines that reach the most on the
    same chip, and from its floor."""

    must: float
    good: float
    smaller: bool = True  # is better

    def verdict(self, value: float) -> str:
        for name, bound in (("good", self.good), ("must", self.must)):
            if value <= bound if self.smaller else value >= bound:
                return name
        return "misses"


@dataclass(frozen=True, kw_only=True, slots=True)
class Row:
    """One line of the table. `verdict` is empty where nothing was asked."""

    section: str
    name: str
    verdict: str = ""
    value: float | None = None
    unit: str = ""
    must: float | None = None
    good: float | None = None
    figures: dict[str, Any] = field(default_factory=dict)

    @property
    def failed(self) -> bool:
        return self.verdict in ("WRONG", "failed")

    def as_json(self) -> str:
        names = [name for name in self.__slots__ if getattr(self, name) not in (None, "", {})]
        return json.dumps({name: getattr(self, name) for name in names})


class Bench:
    """What a section runs with: where, against which ceilings, how long, and where rows go."""

    def __init__(
        self, section: str, rows: Path, *, dry: bool, limits: Ceilings, budget_s: float
    ) -> None:
        self.section, self.dry, self.limits = section, dry, limits
        self._rows = rows
        self._deadline_s = time.monotonic() + budget_s
        self.device = torch.device("cpu" if dry else "cuda")
        self.dtype = torch.float32 if dry else torch.bfloat16

    @property
    def left_s(self) -> float:
        """Until this section is ended from outside."""
        return self._deadline_s - time.monotonic()

    def add(
        self,
        name: str,
        value: float | None = None,
        unit: str = "",
        target: Target | None = None,
        **figures: Any,
    ) -> None:
        """A figure. Targets are for the GPU: a dry run holds nothing against them."""
        if self.dry:
            target = None
        self._write(
            Row(
                section=self.section,
                name=name,
                value=value,
                unit=unit,
                must=target.must if target else None,
                good=target.good if target else None,
                verdict=target.verdict(value) if target and value is not None else "",
                figures=figures,
            )
        )

    def check(self, name: str, right: bool, **figures: Any) -> None:
        """Whether something is as it must be."""
        verdict = "right" if right else "WRONG"
        self._write(Row(section=self.section, name=name, verdict=verdict, figures=figures))

    def skip(self, name: str, reason: str) -> None:
        self._write(
            Row(section=self.section, name=name, verdict="skipped", figures={"reason": reason})
        )

    def fail(self, reason: str) -> None:
        """The section broke off; the rows before it stand."""
        self._write(
            Row(section=self.section, name="section", verdict="failed", figures={"reason": reason})
        )

    def _write(self, row: Row) -> None:
        with self._rows.open("a") as file:
            file.write(row.as_json() + "\n")
        print(line_of(row), flush=True)


def rows_in(path: Path) -> list[Row]:
    """Every row that was written whole; a killed section may leave half a line."""
    if not path.exists():
        return []
    lines = path.read_text().split("\n")[:-1]
    return [Row(**json.loads(line)) for line in lines]


def line_of(row: Row) -> str:
    shown = [f"{row.section:13}", f"{row.name:46}"]
    shown.append("" if row.value is None else f"{row.value:9.4g} {row.unit}")
    if row.must is not None:
        shown.append(f"must {row.must:g}, good {row.good:g}")
    shown.append(row.verdict)
    for name, value in row.figures.items():
        shown.append(f"{name} {value:.4g}" if isinstance(value, float) else f"{name} {value}")
    return "  ".join(part for part in shown if part)
