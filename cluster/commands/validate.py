"""Check a cluster file strictly, and the checkpoint it names. Starts nothing.

Checked are keys, types and ranges, contradictions between keys, that the checkpoint is there and
of a supported architecture, and that the KV cache holds one sequence of full length. Whether ports
are free and devices are there is known only where and when the cluster is launched.
"""

from __future__ import annotations

import argparse
import json
from typing import Any

from ...configs.errors import InvalidConfig
from ...configs.load import load_cluster
from ...configs.schema import ClusterConfig
from ..checkpoint import resolve
from ..cli import EXIT_INPUT, EXIT_OK, add_config_arguments

EXAMPLES = """\
  phasewise validate configs/local.yaml
  phasewise validate configs/local.yaml --set kv.memory=64MiB --json
  phasewise validate plan.yaml --without-weights
"""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    add_config_arguments(parser)
    parser.add_argument(
        "--without-weights",
        action="store_true",
        help="for a file that another machine will launch: check it against the config.json in "
        "model.path, and let the weights be elsewhere",
    )
    parser.add_argument("--json", action="store_true", help="print the verdict as one JSON object")


def run(args: argparse.Namespace) -> int:
    try:
        config = resolve(
            load_cluster(args.config, args.overrides), with_weights=not args.without_weights
        )
    except InvalidConfig as error:
        if not args.json:
            raise
        print(json.dumps({"valid": False, "error": _error(error)}, indent=2))
        return EXIT_INPUT
    if args.json:
        print(json.dumps({"valid": True, "summary": _summary(config)}, indent=2))
    else:
        words = ", ".join(f"{key} {value}" for key, value in _summary(config).items())
        print(f"{args.config} is valid: {words}")
    return EXIT_OK


def _error(error: InvalidConfig) -> dict[str, str]:
    return {
        "key": error.where,
        "reason": error.reason,
        "remedy": error.remedy,
        "at": error.at,
        "nearest_key": error.nearest,
    }


def _summary(config: ClusterConfig) -> dict[str, Any]:
    return {
        "model": str(config.model.path),
        "max_model_len": config.model.max_model_len,
        "prefill_workers": config.prefill.replicas,
        "decode_workers": config.decode.replicas,
        "local_prefill": config.decode.local_prefill,
    }
