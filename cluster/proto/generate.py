"""Writes the Python modules of the `.proto` files beside this one.

    python -m phasewise.cluster.proto.generate

protoc stamps its own version into what it writes, and refuses older runtimes at import. The
modules use nothing beyond `google.protobuf.internal.builder` (protobuf 3.20 and later) and
registered methods (grpcio 1.64), so the stamps are taken out and pyproject.toml states the
versions.
"""

from __future__ import annotations

import re
import sys
from pathlib import Path

PROTO_DIR = Path(__file__).parent
PACKAGE_DIR = "phasewise/cluster/proto"
NAMES = ("phasewise", "worker")
SUFFIXES = ("_pb2.py", "_pb2.pyi", "_pb2_grpc.py")

_RUNTIME_CHECK = re.compile(
    r"from google\.protobuf import runtime_version as _runtime_version\n"
    r"|_runtime_version\.ValidateProtobufRuntimeVersion\(.*?\n\)\n"
    r"|# Protobuf Python Version: [^\n]*\n",
    re.DOTALL,
)
_GRPC_CHECK = re.compile(r"import warnings\n|GRPC_GENERATED_VERSION = .*?\n    \)\n", re.DOTALL)


def generate(out: Path) -> list[Path]:
    """Write all modules into `out`; returns their paths. Raises RuntimeError with protoc's code."""
    from grpc_tools import protoc  # a development dependency, needed here only

    staging = out / "protoc"
    staging.mkdir(parents=True)
    code = protoc.main(
        [
            "protoc",
            f"-I{PACKAGE_DIR}={PROTO_DIR}",
            *(f"--{kind}_out={staging}" for kind in ("python", "pyi", "grpc_python")),
            *(f"{PACKAGE_DIR}/{name}.proto" for name in NAMES),
        ]
    )
    if code != 0:
        raise RuntimeError(f"protoc ended with code {code}; its messages stand above")
    return [_finish(staging, out, name + suffix) for name in NAMES for suffix in SUFFIXES]


def _finish(staging: Path, out: Path, file_name: str) -> Path:
    text = (staging / PACKAGE_DIR / file_name).read_text()
    for check in (_RUNTIME_CHECK, _GRPC_CHECK):
        text = check.sub("", text)
    path = out / file_name
    path.write_text(text)
    return path


def main() -> int:
    import tempfile

    with tempfile.TemporaryDirectory() as directory:
        for path in generate(Path(directory)):
            (PROTO_DIR / path.name).write_text(path.read_text())
            print(f"wrote {PROTO_DIR / path.name}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
