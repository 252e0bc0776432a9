"""Compiles a kernel for sm_90 where no GPU is, and reads what the assembler made of it."""

from __future__ import annotations

import inspect
import re
import subprocess
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

_BINARIES = Path(triton.__file__).parent / "backends" / "nvidia" / "bin"


@dataclass(frozen=True, kw_only=True, slots=True)
class Compiled:
    registers: int  # a thread
    stack_bytes: int  # a thread: where spilled registers go
    shared_bytes: int
    sass: str

    @property
    def spills(self) -> bool:
        return self.stack_bytes > 0 or bool(re.search(r"\b(LDL|STL)\b", self.sass))

    def count(self, instruction: str) -> int:
        return len(re.findall(rf"\b{re.escape(instruction)}(?![\w])", self.sass))


def compile_for_hopper(
    kernel: Any, arguments: dict[str, str], constants: dict[str, Any], **options: Any
) -> Compiled:
    """`arguments`: types by name ("*bf16", "i32", ...; "i32:16" is divisible by 16).

    Every pointer is taken to be aligned to 16 bytes, as torch's allocations are.
    """
    names = list(inspect.signature(kernel.fn).parameters)
    assert set(names) == set(arguments) | set(constants), "an argument each, and no other"
    signature = {n: arguments[n].split(":")[0] if n in arguments else "constexpr" for n in names}
    attributes = {
        (place,): [["tt.divisibility", 16]]
        for place, name in enumerate(names)
        if signature[name].startswith("*") or arguments.get(name, "").endswith(":16")
    }
    by_place = {(names.index(name),): value for name, value in constants.items()}
    source = ASTSource(kernel, signature, by_place, attributes)
    built = triton.compile(source, target=GPUTarget("cuda", 90, 32), options=options)
    return _read(built)


def _read(built: Any) -> Compiled:
    import tempfile

    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(built.asm["cubin"])
        file.flush()
        usage = _run("cuobjdump", "--dump-resource-usage", file.name)
        sass = _run("cuobjdump", "--dump-sass", file.name)
    found = re.search(r"REG:(\d+) STACK:(\d+)", usage)
    assert found, usage
    return Compiled(
        registers=int(found[1]),
        stack_bytes=int(found[2]),
        shared_bytes=built.metadata.shared,
        sass=sass,
    )


def _run(tool: str, *arguments: str) -> str:
    command = [str(_BINARIES / tool), *arguments]
    return subprocess.run(command, check=True, capture_output=True, text=True, timeout=60).stdout
