"""Batch sizes that are captured: few, and never much larger than the batch."""

from __future__ import annotations

from bisect import bisect_left

import pytest
from phasewise.engine.decode_graph import buckets_up_to


@pytest.mark.parametrize("most", [1, 2, 3, 4, 7, 8, 9, 64, 65, 100, 256, 1000])
def test_every_batch_has_a_bucket_that_is_little_larger(most: int) -> None:
    buckets = buckets_up_to(most)
    assert list(buckets) == sorted(set(buckets))
    assert buckets[-1] == most and buckets[0] == 1
    for rows in range(1, most + 1):
        bucket = buckets[bisect_left(buckets, rows)]
        assert bucket >= rows
        assert bucket - rows < 8 or bucket - rows < bucket / 5


def test_buckets_are_few() -> None:
    assert len(buckets_up_to(64)) == 11
    assert len(buckets_up_to(256)) == 19
    assert len(buckets_up_to(1024)) < 32
