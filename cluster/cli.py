"""The `phasewise` command: one page that names the commands, one page for each."""

from __future__ import annotations

import argparse
import contextlib
import importlib
import math
import os
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any, Protocol, cast

from .. import __version__
from ..configs.values import parse_host_port
from ..engine.errors import InvalidConfig, InvalidRequest, PhasewiseError

EXIT_OK, EXIT_RUNTIME, EXIT_INPUT = 0, 1, 2
EXIT_INTERRUPTED = 130  # as shells have it: 128 + SIGINT


COMMANDS = {  # a module of `commands/` each
    "demo": "launch a small cluster here, stream some prompts, show their timelines",
    "serve": "launch a cluster file and stay until told to stop",
    "validate": "check a cluster file and its checkpoint, start nothing",
    "plan": "find the placement that meets latency targets, write its cluster file",
    "generate": "stream one completion from a running cluster",
    "status": "show a running cluster: its workers, blocks and requests",
    "bench": "offer load to a running cluster: latency, attainment, goodput",
    "profile": "measure step times on the hardware at hand",
    "calibrate": "measure what a running cluster spends outside steps, for simulate and plan",
    "simulate": "the digital twin of a cluster file: latencies and attainment",
}


class Command(Protocol):
    """What a command's module has. Its docstring is the text of its page."""

    EXAMPLES: str

    def add_arguments(self, parser: argparse.ArgumentParser) -> None: ...
    def run(self, args: argparse.Namespace) -> int: ...


def main(argv: Sequence[str] | None = None) -> int:
    """Returns the exit code: 0, 1 for what failed at run time, 2 for bad input, 130 interrupted."""
    words = list(sys.argv[1:] if argv is None else argv)
    if not words or words[0] not in COMMANDS:
        parser = _front_page()
        parser.parse_args(words or ["--help"])  # exits: help, version, or an unknown command
    name = words[0]
    os.environ.setdefault("GRPC_ENABLE_FORK_SUPPORT", "0")  # it would complain of Ray's forks
    try:
        command = cast(Command, importlib.import_module(f".commands.{name}", __package__))
        code = command.run(_page(name, command).parse_args(words[1:]))
        if sys.stdout is not None:  # None: closed by who called us
            sys.stdout.flush()
        return code
    except PhasewiseError as error:
        print(f"phasewise {name}: {error}", file=sys.stderr)
        return EXIT_INPUT if isinstance(error, InvalidConfig | InvalidRequest) else EXIT_RUNTIME
    except KeyboardInterrupt:
        print(f"phasewise {name}: interrupted", file=sys.stderr)
        return EXIT_INTERRUPTED
    except BrokenPipeError:  # who read our output has gone, as `head` does
        sys.stderr.close()
        return EXIT_RUNTIME
    except OSError as error:  # the system refused, as a full disk does what we write
        print(f"phasewise {name}: {error}", file=sys.stderr)
        _drop_output()
        return EXIT_RUNTIME


def _drop_output() -> None:
    """What could not be written is not tried again when the process ends."""
    with contextlib.suppress(OSError, ValueError):  # no file behind it
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())


def add_config_arguments(parser: argparse.ArgumentParser) -> None:
    """The cluster file and the values set over it."""
    parser.add_argument("config", metavar="CONFIG", help="cluster file (YAML)")
    add_overrides(parser, example="decode.replicas=2")


def check_writable(flag: str, path: Path | str | None) -> None:
    """Before the work whose result is to be written there. Raises InvalidConfig with the flag."""
    if path is None:
        return
    path = Path(path)
    there = path if path.exists() else path.parent
    if path.is_dir() or not there.exists() or not os.access(there, os.W_OK):
        reason = "is a folder" if path.is_dir() else "cannot be written"
        raise InvalidConfig(flag, f"{path} {reason}", "name a file in a folder that is there")


def check_address(address: str) -> None:
    """Raises InvalidConfig for what gRPC would take for some other address, or wait for in vain."""
    try:
        parse_host_port(address)
    except ValueError as error:
        raise InvalidConfig("--address", str(error), "as in 127.0.0.1:50051") from None


def without_nan(value: Any) -> Any:
    """A JSON document in which what has no value is null: JSON knows no NaN."""
    if isinstance(value, dict):
        return {key: without_nan(below) for key, below in value.items()}
    if isinstance(value, list | tuple):
        return [without_nan(below) for below in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value


def add_overrides(parser: argparse.ArgumentParser, example: str) -> None:
    """Values set over a file's."""
    parser.add_argument(
        "--set",
        metavar="KEY.PATH=VALUE",
        action="append",
        default=[],
        dest="overrides",
        help=f"set a key over the file, as in --set {example}; may be repeated",
    )


def _front_page() -> argparse.ArgumentParser:
    width = max(map(len, COMMANDS))
    listing = "\n".join(f"  {name:<{width}}  {summary}" for name, summary in COMMANDS.items())
    parser = argparse.ArgumentParser(
        prog="phasewise",
        usage="phasewise COMMAND [arguments]",
        description="Serve large language models with prefill and decode on separate pools.",
        epilog=f"commands:\n{listing}\n\n"
        "examples:\n"
        "  phasewise demo\n"
        "  phasewise serve configs/local.yaml\n"
        '  phasewise generate "def main(" --address 127.0.0.1:50051\n\n'
        "phasewise COMMAND --help tells all about one of them.\n"
        "exit codes: 0 done, 1 failed while running, 2 input to be mended, 3 no plan is feasible,\n"
        "130 interrupted",
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--version", action="version", version=f"phasewise {__version__}")
    parser.add_argument("command", metavar="COMMAND", choices=COMMANDS, help="one of those below")
    return parser


def _page(name: str, command: Command) -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog=f"phasewise {name}",
        description=command.__doc__,
        epilog=f"examples:\n{command.EXAMPLES}",
        formatter_class=argparse.RawDescriptionHelpFormatter,
        allow_abbrev=False,
    )
    command.add_arguments(parser)
    return parser
