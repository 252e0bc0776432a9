"""A Ray of two nodes with one CPU each, on the loopback address; its own process, so that the
test's has no Ray in it. Prints its address, and ends when its input does."""

from __future__ import annotations

import sys

from ray.cluster_utils import Cluster

NODE = {"num_cpus": 1, "node_ip_address": "127.0.0.1", "object_store_memory": 80 << 20}


def main() -> None:
    nodes = Cluster(initialize_head=True, head_node_args=NODE | {"include_dashboard": False})
    try:
        nodes.add_node(**NODE)
        print(nodes.address, flush=True)
        sys.stdin.read()
    finally:
        nodes.shutdown()


if __name__ == "__main__":
    main()
