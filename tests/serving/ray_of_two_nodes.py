"""A Ray of two nodes with two CPUs each, on loopback addresses of their own; its own process, so
that the test's has no Ray in it. Prints its address and the process of each node, whose children
its actors are; ends when its input does."""

from __future__ import annotations

import sys
from typing import Any

from ray.cluster_utils import Cluster

NODE: dict[str, Any] = {"num_cpus": 2, "object_store_memory": 80 << 20}
HEAD = {"node_ip_address": "127.0.0.1", "include_dashboard": False}


def main() -> None:
    nodes = Cluster(initialize_head=True, head_node_args=NODE | HEAD)
    try:
        nodes.add_node(**NODE, node_ip_address="127.0.0.2")
        raylets = [n.all_processes["raylet"][0].process.pid for n in nodes.list_all_nodes()]
        print(nodes.address, *raylets, flush=True)
        sys.stdin.read()
    finally:
        nodes.shutdown()


if __name__ == "__main__":
    main()
