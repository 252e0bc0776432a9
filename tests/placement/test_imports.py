"""Planning runs on a laptop: nothing here needs torch or ray."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).parents[2]


def test_placement_imports_neither_torch_nor_ray() -> None:
    files = [path.relative_to(ROOT) for path in sorted((ROOT / "placement").rglob("*.py"))]
    modules = [".".join(["phasewise", *path.with_suffix("").parts]) for path in files]
    assert modules
    code = f"""
import importlib, sys
for name in {modules!r}:
    importlib.import_module(name)
print(sorted(sys.modules.keys() & {{"torch", "ray", "grpc", "transformers"}}))
"""
    run = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, timeout=60, check=True
    )
    assert run.stdout.strip() == "[]"
