"""What a process has allocated before it serves, kept out of the garbage collector's way."""

from __future__ import annotations

import gc


def settle_heap() -> None:
    """Call once, when all is loaded and before the first request.

    A full collection looks through every object that lives, and the process stands still. Most of
    them are modules and classes, which never become garbage. Measured on a gateway that streams
    4,000 tokens/s: every 10 to 20 s its loop stood for 110 to 150 ms, and so did whoever arrived,
    was handed over or waited for a token. Settled objects are still freed by reference counts;
    garbage in cycles is looked for among what came later.
    """
    gc.collect()
    gc.freeze()
