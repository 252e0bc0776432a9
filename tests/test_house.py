"""The house holds: floors, doors, packages, sizes."""

from __future__ import annotations

import ast
import subprocess
import sys
import tomllib
from collections.abc import Iterator
from functools import cache
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
FLOORS = {
    "configs": 0,
    "kernels": 1,
    "engine": 2,
    "kv_transfer": 3,
    "prefill_worker": 4,
    "decode_worker": 4,
    "placement": 5,
    "cluster": 6,
}
PLANNER = (  # placement's own floors, from the ground up
    "workload",
    "latency",
    "simulation",
    "goodput",
    "recurrences",
    "search",
    "report",
)
DOORS = {  # import: files or folders that may have it
    "ray": ("cluster/launch.py",),
    "grpc": ("cluster/",),
    "grpc_health": ("cluster/",),
    "grpc_reflection": ("cluster/",),
    "triton": ("kernels/",),
    "numba": ("kernels/",),
    "llvmlite": ("kernels/",),
    "torch.distributed": ("kv_transfer/", "engine/shard.py"),
    "yaml": ("configs/load.py",),
}
PURE = (  # what a laptop plans with
    "phasewise.configs.load",
    "phasewise.engine.errors",
    "phasewise.engine.request",
    "phasewise.engine.sequence",
    "phasewise.engine.batch",
    "phasewise.engine.blocks",
    "phasewise.engine.layout",
    "phasewise.engine.spec",
    "phasewise.engine.step_time",
    "phasewise.prefill_worker.scheduler",
    "phasewise.decode_worker.scheduler",
)
MAX_FILE_LINES = 400
MAX_FUNCTION_LINES = 60
GENERATED = ("_pb2.py", "_pb2_grpc.py")


def sources() -> list[Path]:
    return [
        path.relative_to(ROOT)
        for room in FLOORS
        for path in sorted((ROOT / room).rglob("*.py"))
        if not path.name.endswith(GENERATED)
    ]


@cache
def tree(path: Path) -> ast.Module:
    return ast.parse((ROOT / path).read_text(), filename=str(path))


def imports(path: Path) -> Iterator[str]:
    """Absolute names of all that a file imports, at any depth; our own start with phasewise."""
    package = ["phasewise", *path.parent.parts]
    for node in ast.walk(tree(path)):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            base = package[: len(package) - node.level + 1] if node.level else []
            module = ".".join([*base, *([node.module] if node.module else [])])
            yield from (f"{module}.{alias.name}" for alias in node.names)


@pytest.mark.parametrize("path", sources(), ids=str)
def test_imports_go_down_the_floors(path: Path) -> None:
    here = path.parts[0]
    for name in imports(path):
        parts = name.split(".")
        if parts[0] == "phasewise" and len(parts) > 1 and parts[1] in FLOORS:
            below = FLOORS[parts[1]] < FLOORS[here]
            assert below or parts[1] == here, f"{path} imports {name}"


@pytest.mark.parametrize("path", [p for p in sources() if p.parts[0] == "placement"], ids=str)
def test_imports_go_down_the_floors_of_the_planner(path: Path) -> None:
    for name in imports(path):
        parts = name.split(".")
        if parts[:2] == ["phasewise", "placement"]:
            assert PLANNER.index(parts[2]) <= PLANNER.index(path.parts[1]), f"{path} imports {name}"


@pytest.mark.parametrize("path", sources(), ids=str)
def test_dependencies_enter_by_their_doors(path: Path) -> None:
    for name in imports(path):
        for door, allowed in DOORS.items():
            if name == door or name.startswith(f"{door}."):
                assert str(path).startswith(allowed), f"{path} imports {name}"


@pytest.mark.parametrize("path", sources(), ids=str)
def test_files_and_functions_can_be_read_in_one_sitting(path: Path) -> None:
    assert len((ROOT / path).read_text().splitlines()) <= MAX_FILE_LINES
    for node in ast.walk(tree(path)):
        if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef):
            length = (node.end_lineno or node.lineno) - node.lineno + 1
            assert length <= MAX_FUNCTION_LINES, f"{path}: {node.name} has {length} lines"


def test_packages_listed_are_packages_on_disk() -> None:
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())
    listed = set(project["tool"]["setuptools"]["packages"])
    folders = {path.parent for path in ROOT.glob("*/**/*.py")}
    on_disk = {
        "phasewise." + ".".join(folder.relative_to(ROOT).parts)
        for folder in folders
        if folder.relative_to(ROOT).parts[0] in FLOORS
    }
    assert listed == on_disk | {"phasewise"} | {f"phasewise.{room}" for room in FLOORS}


def test_the_root_holds_one_python_file_and_rooms_have_no_init() -> None:
    assert [path.name for path in ROOT.glob("*.py")] == ["__init__.py"]
    assert not [path for room in FLOORS for path in (ROOT / room).rglob("__init__.py")]


def planning_modules() -> tuple[str, ...]:
    placement = (f"phasewise.placement.{p.stem}" for p in sorted((ROOT / "placement").glob("*.py")))
    return (*PURE, *placement)


def test_planning_needs_neither_torch_nor_ray() -> None:
    names = planning_modules()
    code = f"import importlib, sys\nfor name in {names!r}:\n    importlib.import_module(name)\n" + (
        "    for heavy in ('torch', 'ray', 'grpc', 'numba'):\n"
        "        assert heavy not in sys.modules, f'{name} brings {heavy}'"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=110)
    assert done.returncode == 0, done.stderr


def test_no_file_speaks_of_the_place_where_it_was_written() -> None:
    here = f"{ROOT}/"
    for path in (*sources(), *(p.relative_to(ROOT) for p in (ROOT / "tests").rglob("*.py"))):
        assert here not in (ROOT / path).read_text(), path
