"""Transfer times against the layers sent one by one."""

from __future__ import annotations

import numpy as np
import pytest
from phasewise.placement.latency.transfer import Link, layerwise_s, visible_s


def sent_layer_by_layer(layers: int, layer_s: float, prefill_s: float) -> float:
    """When the last layer is there, after the end of prefill."""
    free = 0.0
    for layer in range(1, layers + 1):
        free = max(free, layer * prefill_s / layers) + layer_s
    return free - prefill_s


@pytest.mark.parametrize("prefill_s", [0.01, 0.1, 1.0])
@pytest.mark.parametrize("bytes_per_s", [1e9, 25e9, 400e9])
def test_layerwise_time_is_what_sending_each_layer_takes(
    prefill_s: float, bytes_per_s: float
) -> None:
    link = Link(bytes_per_s=bytes_per_s, latency_s=2e-5)
    found_s = layerwise_s(1500 * 1.3e5, 32, prefill_s, link)
    layer_s = link.seconds(1500 * 1.3e5 / 32)
    assert found_s == pytest.approx(sent_layer_by_layer(32, layer_s, prefill_s))


def test_bloom_of_1500_tokens_takes_thirty_milliseconds_serialized() -> None:
    assert Link(bytes_per_s=200e9).seconds(1500 * 4.01e6) == pytest.approx(0.030, rel=0.01)


def test_only_the_last_layer_is_seen_when_compute_is_slower() -> None:
    found_s = layerwise_s(1500 * 4.01e6, 70, 0.5, Link(bytes_per_s=200e9))
    assert found_s == pytest.approx(0.43e-3, rel=0.01)


def test_a_small_prompt_goes_at_once_where_every_message_waits() -> None:
    link = Link(bytes_per_s=50e9, latency_s=1e-3)
    num_bytes, prefill_s = np.array([16, 8000]) * 1.3e5, np.array([0.01, 1.0])
    small_s, large_s = visible_s(num_bytes, 32, prefill_s, link).tolist()
    assert small_s == link.seconds(float(num_bytes[0]))
    assert large_s == layerwise_s(float(num_bytes[1]), 32, 1.0, link)
