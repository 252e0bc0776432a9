"""What a config.json says about rotary positions, in its old and its new keys. Knows no torch."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

from .errors import InvalidConfig
from .families import ROPE_TYPES, unsupported

_ROPE_NEEDS = {
    "default": (),
    "linear": ("factor",),
    "dynamic": ("factor",),
    "llama3": ("factor", "low_freq_factor", "high_freq_factor"),
    "yarn": ("factor",),
}


@dataclass(frozen=True, kw_only=True, slots=True)
class RopeSpec:
    """Rotary positions. Fields that a type does not use keep their neutral values."""

    type: str = "default"
    theta: float = 10000.0
    factor: float = 1.0
    original_max_positions: int = 0
    low_freq_factor: float = 1.0
    high_freq_factor: float = 4.0
    beta_fast: float = 32.0
    beta_slow: float = 1.0
    attention_factor: float | None = None
    mscale: float | None = None
    mscale_all_dim: float | None = None
    truncate: bool = True


def rope_of(config: dict[str, Any], values: dict[str, Any], path: Path) -> RopeSpec:
    """From a config and its values with defaults. Raises InvalidConfig and UnsupportedModel."""
    given = dict(config.get("rope_scaling") or config.get("rope_parameters") or {})
    kind = given.get("rope_type", given.get("type", "default"))
    if kind not in ROPE_TYPES or any(isinstance(value, dict) for value in given.values()):
        raise unsupported(path, f"rope_type {kind!r}")
    partial = given.get("partial_rotary_factor", config.get("partial_rotary_factor", 1.0))
    if partial not in (None, 1.0):
        raise unsupported(path, f"partial_rotary_factor {partial}")
    missing = [key for key in _ROPE_NEEDS[kind] if not isinstance(given.get(key), int | float)]
    if missing:
        raise InvalidConfig(
            str(path), f"rope_type {kind!r} lacks a number for {missing[0]}", "add it"
        )
    theta = given.get("rope_theta") or values["rope_theta"]
    if not isinstance(theta, int | float):
        raise InvalidConfig(str(path), f"rope_theta is {theta!r}", "give a number")
    original = config.get(
        "original_max_position_embeddings", given.get("original_max_position_embeddings")
    )
    return RopeSpec(
        type=kind,
        theta=float(theta),
        factor=given.get("factor") or 1.0,
        original_max_positions=original or values["max_position_embeddings"],
        low_freq_factor=given.get("low_freq_factor", 1.0),
        high_freq_factor=given.get("high_freq_factor", 4.0),
        beta_fast=given.get("beta_fast") or 32,
        beta_slow=given.get("beta_slow") or 1,
        attention_factor=given.get("attention_factor"),
        mscale=given.get("mscale"),
        mscale_all_dim=given.get("mscale_all_dim"),
        truncate=given.get("truncate", True),
    )
