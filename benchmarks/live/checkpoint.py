"""Random checkpoints for the cluster files of cases, made where they are needed."""

from __future__ import annotations

import tempfile
from functools import cache
from pathlib import Path

from peers.random_checkpoint import Shape, write_checkpoint

SHAPES = {
    "20M": Shape(hidden=512, layers=6, intermediate=1408, heads=8, kv_heads=4),
}
_made = tempfile.TemporaryDirectory(prefix="phasewise-checkpoints-")  # ends with the process


@cache
def checkpoint(name: str) -> Path:
    """The same weights in every process."""
    return write_checkpoint(Path(_made.name) / name, SHAPES[name])
