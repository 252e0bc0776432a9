"""Hardware sheets: what a GPU can do on paper, and the few coefficients of what it reaches.

One JSON file a device in `hardware/`, versioned; every field states where its value comes from.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any

from ...engine.errors import InvalidConfig

SHEETS = Path(__file__).parents[1] / "hardware"


@dataclass(frozen=True, kw_only=True, slots=True)
class Coefficients:
    """What of the paper figures a step reaches (`roofline.py` says how each enters)."""

    matmul: float  # share of flops in large matrix products
    weight_read: float  # share of memory bandwidth when weights are read
    attention: float  # share of flops in prompt attention
    kv_read: float  # share of memory bandwidth in decode attention
    layer_s: float  # fixed time a layer: launches, small kernels
    step_s: float  # fixed time a step: scheduling, sampling, host
    all_reduce: float  # share of the link's bandwidth
    all_reduce_s: float  # fixed time an all-reduce


@dataclass(frozen=True, kw_only=True, slots=True)
class Hardware:
    """One device. Bandwidths are one direction, bytes a second, and a device's own share."""

    name: str
    version: int
    flops: float  # dense bf16; float32 on a CPU
    memory_bandwidth: float
    memory_bytes: float
    link_bandwidth: float  # between devices of one node: NVLink, Infinity Fabric; else PCIe
    pcie_bandwidth: float
    network_bandwidth: float  # to other nodes
    power_w: float
    price_per_hour: float  # $
    coefficients: Coefficients
    origin: Mapping[str, str]  # field -> where its value comes from

    @property
    def measured_by_us(self) -> bool:
        return self.origin["coefficients"].startswith("measured by us")


PAPER = tuple(
    f.name for f in fields(Hardware) if f.name not in ("name", "version", "coefficients", "origin")
)


def hardware_names() -> list[str]:
    """Names of the sheets that come with the package."""
    return sorted(path.stem for path in SHEETS.glob("*.json"))


def read_hardware(name_or_path: str, *, where: str = "hardware") -> Hardware:
    """A sheet that comes with the package by name, or one's own by path; `where` it is named."""
    own = name_or_path.endswith(".json")
    path = Path(name_or_path) if own else SHEETS / f"{name_or_path}.json"
    if not own and name_or_path not in hardware_names():
        raise InvalidConfig(
            where,
            f"there is no sheet of {name_or_path!r}",
            f"use one of {', '.join(hardware_names())}, or the path of a .json of one's own",
        )
    try:
        sheet = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise InvalidConfig(
            str(path), f"cannot read the sheet: {error}", "give a JSON sheet"
        ) from error
    return _hardware(sheet, str(path))


def _hardware(sheet: Mapping[str, Any], where: str) -> Hardware:
    if not isinstance(sheet, Mapping):
        raise InvalidConfig(where, "is no JSON object", "see a sheet of ours")
    version = sheet.get("version", 1)
    if not isinstance(version, int):
        raise InvalidConfig(f"{where}: version", f"{version!r} is no whole number", "give 1")
    origin = {key: _origin(sheet, where, key) for key in (*PAPER, "coefficients")}
    shares = sheet["coefficients"]["value"]
    if not isinstance(shares, Mapping):
        raise InvalidConfig(f"{where}: coefficients", "not a mapping", "see a sheet of ours")
    known = {f.name for f in fields(Coefficients)}
    if shares.keys() != known:
        raise InvalidConfig(
            f"{where}: coefficients",
            f"has {sorted(shares)}",
            f"give exactly {sorted(known)}",
        )
    return Hardware(
        name=str(sheet.get("name", Path(where).stem)),
        version=version,
        coefficients=Coefficients(
            **{key: _positive(f"{where}: {key}", value) for key, value in shares.items()}
        ),
        origin=origin,
        **{key: _positive(f"{where}: {key}", sheet[key]["value"]) for key in PAPER},
    )


def _origin(sheet: Mapping[str, Any], where: str, key: str) -> str:
    entry = sheet.get(key)
    if not isinstance(entry, Mapping) or "value" not in entry or not entry.get("origin"):
        raise InvalidConfig(
            f"{where}: {key}", "needs a value and its origin", 'give {"value": …, "origin": "…"}'
        )
    return str(entry["origin"])


def _positive(where: str, value: Any) -> float:
    if isinstance(value, bool) or not isinstance(value, int | float) or not 0 < value < 1e18:
        raise InvalidConfig(where, f"{value!r} is not a positive number", "give one")
    return float(value)
