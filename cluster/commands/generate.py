"""Stream one completion from a running cluster to standard output.

Whatever is left out takes the server's value. With n above 1 the first stream is printed as it
comes and the others when all have ended. Interrupting cancels the request, which frees its blocks.
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import sys
from collections.abc import Iterator
from typing import Any

from ..cli import EXIT_OK, check_address
from ..client import Client
from ..output import Output

EXAMPLES = """\
  phasewise generate "def main(" --address 127.0.0.1:50051
  phasewise generate "import " --address 127.0.0.1:50051 --max-tokens 64 --temperature 0
  phasewise generate --token-ids 5,6,7 --address 127.0.0.1:50051 --json
"""

CONNECT_S = 3.0
NUMBERS = {  # field of GenerateRequest: type and what its page says
    "max_tokens": (int, "tokens to generate at most"),
    "min_tokens": (int, "tokens before the stream may stop"),
    "temperature": (float, "0 is greedy"),
    "top_p": (float, "smallest set of tokens with this probability"),
    "top_k": (int, "the most likely tokens only; 0: all"),
    "min_p": (float, "tokens at least this likely, relative to the most likely"),
    "repetition_penalty": (float, "over prompt and output; 1: none"),
    "presence_penalty": (float, "over output"),
    "frequency_penalty": (float, "over output"),
    "seed": (int, "the same seed gives the same tokens"),
    "logprobs": (int, "how many likely tokens to tell beside the sampled one; with --json"),
    "n": (int, "streams"),
    "priority": (int, "smaller is served first"),
    "ttft_ms": (float, "target for the first token"),
    "tpot_ms": (float, "target per token"),
    "timeout_s": (float, "deadline"),
}


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("prompt", metavar="PROMPT", nargs="?", help="text to go on from")
    parser.add_argument("--token-ids", metavar="ID,ID", type=_ids, help="a prompt of token ids")
    parser.add_argument("--address", metavar="HOST:PORT", required=True, help="the gateway's gRPC")
    for name, (kind, text) in NUMBERS.items():
        flag = "--" + name.replace("_", "-")
        parser.add_argument(flag, type=kind, metavar=kind.__name__.upper(), help=text)
    parser.add_argument("--stop", action="append", metavar="TEXT", help="ends the stream; again")
    parser.add_argument("--stop-token-ids", type=_ids, metavar="ID,ID", help="end the stream")
    parser.add_argument("--ignore-eos", action="store_true", help="go on past the end of text")
    parser.add_argument("--json", action="store_true", help="print one JSON object a piece")


def run(args: argparse.Namespace) -> int:
    sampling: dict[str, Any] = {name: getattr(args, name) for name in NUMBERS}
    sampling |= {"stop": args.stop, "stop_token_ids": args.stop_token_ids}
    given = {name: value for name, value in sampling.items() if value is not None}
    if args.ignore_eos:
        given["ignore_eos"] = True
    check_address(args.address)
    with Client(args.address) as client:
        client.wait_ready(CONNECT_S)
        pieces = client.generate(args.prompt, token_ids=args.token_ids, **given)
        try:
            _print(pieces, as_json=args.json)
        except KeyboardInterrupt:
            print(file=sys.stderr)  # below the text so far
            raise
    return EXIT_OK


def _print(pieces: Iterator[Output], *, as_json: bool) -> None:
    texts: dict[int, str] = {}
    for piece in pieces:
        if as_json:
            print(json.dumps(dataclasses.asdict(piece)), flush=True)
        elif piece.index == 0:
            print(piece.text, end="", flush=True)
        else:
            texts[piece.index] = texts.get(piece.index, "") + piece.text
    if not as_json:
        print("".join(f"\n--- {index}\n{text}" for index, text in sorted(texts.items())))


def _ids(text: str) -> list[int]:
    return [int(word) for word in text.split(",") if word.strip()]
