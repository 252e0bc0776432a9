"""Targets, and the share of requests that meet them."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
from phasewise.engine.errors import InvalidConfig
from phasewise.placement.workload import slo
from phasewise.placement.workload.slo import SloTargets

TARGETS = SloTargets(ttft_s=0.25, tpot_s=0.1)
TTFT = np.array([0.1, 0.2, 0.3, 0.1, np.nan])
TPOT = np.array([0.05, 0.2, 0.05, 0.1, 0.05])


def test_a_request_counts_only_when_both_targets_are_met() -> None:
    assert slo.met(TTFT, TPOT, TARGETS).tolist() == [True, False, False, True, False]
    assert slo.joint_attainment(TTFT, TPOT, TARGETS) == 0.4


def test_each_class_is_held_to_its_own_targets() -> None:
    policy = slo.parse_slo(
        {"ttft_ms": 250, "tpot_ms": 100, "classes": {"batch": {"ttft_ms": 1000, "attainment": 0.5}}}
    )
    assert policy.of("batch") == SloTargets(ttft_s=1.0, tpot_s=0.1, attainment=0.5)
    ids = np.array([0, 1, 1, 0, 0], dtype=np.int16)
    shares = slo.class_attainments(TTFT, TPOT, policy, ids, ("chat", "batch", "absent"))
    assert shares == {"chat": pytest.approx(2 / 3), "batch": 0.5}
    assert not slo.meets_policy(shares, policy)
    assert slo.meets_policy({"batch": 0.5, "chat": 0.9}, policy)
    assert slo.class_attainments(TTFT, TPOT, policy, None, ("default",)) == {"default": 0.4}


def test_percentiles_interpolate() -> None:
    assert slo.percentiles(np.arange(101.0), (50, 90.5)) == (50.0, 90.5)


@pytest.mark.parametrize(
    ("section", "where"),
    [
        ({"tpot_ms": 100}, "slo.ttft_ms"),
        ({"ttft_ms": 0, "tpot_ms": 100}, "slo.ttft_ms"),
        ({"ttft_ms": 1, "tpot_ms": 100, "attainment": 90}, "slo.attainment"),
        ({"ttft_ms": 1, "tpot_ms": 100, "attainment": "90%"}, "slo.attainment"),
        ({"ttft_ms": 1, "tpot_ms": 100, "attainment": 0}, "slo.attainment"),
        ({"ttft_ms": 1, "tpot_ms": 100, "attainment": float("nan")}, "slo.attainment"),
        ({"ttft": 1, "tpot_ms": 100}, "slo.ttft"),
        ({"ttft_ms": 1, "tpot_ms": 1, "classes": {"a": {"tpot": 1}}}, "slo.classes.a.tpot"),
        ({"ttft_ms": 1, "tpot_ms": 1, "classes": {"a": 3}}, "slo.classes.a"),
    ],
)
def test_a_wrong_section_is_refused_with_its_key(section: dict[str, Any], where: str) -> None:
    with pytest.raises(InvalidConfig) as caught:
        slo.parse_slo(section)
    assert caught.value.where == where


def test_targets_of_a_class_that_no_request_has_are_refused() -> None:
    policy = slo.parse_slo({"ttft_ms": 1, "tpot_ms": 1, "classes": {"chta": {"ttft_ms": 2}}})
    with pytest.raises(InvalidConfig, match=r"slo\.classes\.chta.*has chat, batch.*'chat'"):
        slo.check_classes(policy, ("chat", "batch"))
    slo.check_classes(policy, ("chta",))
