"""A process that has settled its heap: quick collections, and garbage is still found."""

from __future__ import annotations

import subprocess
import sys

SCRIPT = """
import gc, weakref
from phasewise.cluster.heap import settle_heap

class Node:
    pass

old = [Node() for _ in range(10_000)]
gone = weakref.ref(old[0])
settle_heap()
assert gc.get_freeze_count() > 10_000
assert not any(isinstance(thing, Node) for thing in gc.get_objects()), "looked through again"
old.clear()
assert gone() is None, "reference counts free what was settled"
node = Node()
node.itself, gone = node, weakref.ref(node)
del node
gc.collect()
assert gone() is None, "a cycle that came later is garbage"
"""


def test_a_collection_looks_at_what_came_after_the_heap_was_settled_and_at_nothing_else() -> None:
    subprocess.run([sys.executable, "-c", SCRIPT], check=True, timeout=60)
