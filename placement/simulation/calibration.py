"""What a live cluster was measured to spend outside steps, so that its twin spends it too.

```json
{"format": "phasewise-calibration/1", "origin": "measured 2026-11-21 on two shared cores",
 "admit_ms": 1.1, "report_ms": 0.6, "handoff_ms": 1.4, "step_ms": 0.2, "row_ms": 0.02,
 "prompt_ms": 1.5, "detect_ms": 0, "prompt_share": 0.1, "cores": 2, "serve_ms": 0.5,
 "serve_row_ms": 0.1, "crowd_share": 0.3, "warm_ms": 0.8, "transfer_bytes_per_s": 2.1e9,
 "transfer_latency_ms": 0.3}
```
All but `format` may be left out: 0, and transfers for free. `deployment.Overheads` says what each
is; `calibration_fit` finds them.
"""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ...engine.errors import InvalidConfig
from ..latency.transfer import Link
from .deployment import Overheads
from .network import Network

FORMAT = "phasewise-calibration/1"
TIMES = (
    *("admit", "report", "handoff", "step", "row", "prompt", "detect"),
    *("serve", "serve_row", "warm"),
)
OVERHEADS = tuple(f"{name}_ms" for name in TIMES)
PLAIN = ("prompt_share", "crowd_share", "cores")
TRANSFER = ("transfer_bytes_per_s", "transfer_latency_ms")


@dataclass(frozen=True, kw_only=True, slots=True)
class Calibration:
    overheads: Overheads
    network: Network | None  # None: the file says nothing about transfers
    origin: str


def read_calibration(path: str | Path) -> Calibration:
    """Raises InvalidConfig with the file and the key."""
    try:
        document = json.loads(Path(path).read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise InvalidConfig(str(path), f"cannot be read: {error}", "give a JSON file") from error
    if not isinstance(document, dict) or document.get("format") != FORMAT:
        raise InvalidConfig(
            str(path), f"not of format {FORMAT}", "write one with phasewise calibrate"
        )
    unknown = document.keys() - {"format", "origin", *OVERHEADS, *PLAIN, *TRANSFER}
    if unknown:
        known = ", ".join((*OVERHEADS, *PLAIN, *TRANSFER))
        raise InvalidConfig(f"{path}: {min(unknown)}", "unknown key", f"known are {known}")
    seconds = {
        key.removesuffix("_ms") + "_s": _number(path, document, key) / 1e3 for key in OVERHEADS
    }
    shares = {key: _number(path, document, key) for key in ("prompt_share", "crowd_share")}
    cores = int(_number(path, document, "cores"))
    bytes_per_s = _number(path, document, "transfer_bytes_per_s")
    latency_s = _number(path, document, "transfer_latency_ms") / 1e3
    link = Link(bytes_per_s=bytes_per_s or float("inf"), latency_s=latency_s)
    told = any(key in document for key in TRANSFER)
    return Calibration(
        overheads=Overheads(**seconds, **shares, cores=cores),
        network=Network(local=link, remote=link) if told else None,
        origin=str(document.get("origin", "origin not stated")),
    )


def write_calibration(overheads: Overheads, origin: str, path: str | Path) -> None:
    """Of a cluster whose transfers are priced elsewhere, or in its handoffs."""
    seconds = {key: getattr(overheads, key.removesuffix("_ms") + "_s") * 1e3 for key in OVERHEADS}
    plain = {key: getattr(overheads, key) for key in PLAIN}
    document = {"format": FORMAT, "origin": origin, **seconds, **plain}
    Path(path).write_text(json.dumps(document, indent=1) + "\n", encoding="utf-8")


def _number(path: str | Path, document: dict[str, Any], key: str) -> float:
    value = document.get(key, 0.0)
    if isinstance(value, bool) or not isinstance(value, int | float) or not 0 <= value < 1e15:
        raise InvalidConfig(f"{path}: {key}", f"{value!r} is not a number from 0 on", "give one")
    return float(value)
