"""Which ranks lie together, and what is said when nodes have no room for them."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import pytest
from phasewise.cluster.bundles import Group, check_room, groups_of
from phasewise.configs.errors import InvalidConfig
from phasewise.configs.load import load_cluster

LOCAL = Path(__file__).parents[2] / "configs" / "local.yaml"
JOINED = ("ray.address=auto", "prefill.device=cuda", "decode.device=cuda")
STAGES = ("prefill.pipeline_parallel=2", "decode.tensor_parallel=2", "decode.pipeline_parallel=2")
PAIRED = "ray.nodes={a: {prefill-0: 1, decode-0: 2}, b: {prefill-0: 1, decode-0: 2}}"


def groups(*overrides: str) -> Sequence[Group]:
    return groups_of(load_cluster(LOCAL, overrides))


def gpu_nodes(*gpus: float) -> dict[str, dict[str, float]]:
    return {f"10.0.0.{i}": {"GPU": count, "CPU": 16.0} for i, count in enumerate(gpus, 1)}


def test_a_worker_that_no_node_is_named_for_lies_on_one() -> None:
    found = groups(*JOINED, *STAGES)
    assert [group.name for group in found] == ["prefill-0", "decode-0"]
    assert [bundle.asks for group in found for bundle in group.bundles] == [
        {"GPU": 2.0, "CPU": 0.5},
        {"GPU": 4.0, "CPU": 1.0},
    ]


def test_stages_go_to_the_named_nodes_in_their_order_and_both_phases_share_them() -> None:
    (group,) = groups(*JOINED, *STAGES, PAIRED)
    assert [(b.name, sorted(b.ranks), b.asks["GPU"]) for b in group.bundles] == [
        ("a", [("decode-0", 0), ("decode-0", 1), ("prefill-0", 0)], 3.0),
        ("b", [("decode-0", 2), ("decode-0", 3), ("prefill-0", 1)], 3.0),
    ]


def test_a_bundle_holds_what_ray_rounds_up_for_each_rank() -> None:
    """Ray counts in ten-thousandths: three thirds of two threads are a little more than two."""
    threads = ("decode.threads=2", "decode.pipeline_parallel=3")
    (bundle,) = groups(*threads)[1].bundles
    assert bundle.asks["CPU"] == pytest.approx(3 * 0.6667)


def test_a_rehearsal_puts_each_process_on_its_workers_first_node() -> None:
    """On a Ray of its own it only pretends the nodes."""
    paced = ["prefill.device=paced", "decode.device=paced", "paced.hardware=h100", *STAGES[1:2]]
    named = [*paced, "ray.nodes={a: {prefill-0: 1, decode-0: 1}, b: {decode-0: 1}}"]
    across = [*named, "ray.tensor_parallel_across_nodes=true"]
    (group,) = groups("ray.address=auto", *across)
    assert [(b.name, len(b.ranks)) for b in group.bundles] == [("a", 2)]
    assert [group.name for group in groups(*across)] == ["prefill-0", "decode-0"]


@pytest.mark.parametrize(
    ("overrides", "gpus", "words"),
    [
        ((*STAGES, PAIRED), (8,), "ray.nodes: names 2 nodes, Ray has 1: 10.0.0.1 with 8 GPU"),
        ((*STAGES, PAIRED), (2, 8), "ray.nodes.b: asks for 3 GPU, 0.75 CPU .prefill-0 × 1, deco"),
        ((*STAGES, PAIRED), (2, 2, 2), "ray.nodes.a: .* none has so much"),
        ((*STAGES, PAIRED), (2, 2), "prefill.replicas and decode.replicas: 2 workers ask for 6 "),
        (STAGES, (3, 3), "decode.tensor_parallel and decode.pipeline_parallel: decode-0 asks for"),
        (("decode.replicas=4",), (2, 2), "5 workers ask for 5 GPU, Ray has 4 on 2 nodes"),
    ],
)
def test_what_does_not_fit_is_told_with_what_each_node_has(
    overrides: Sequence[str], gpus: Sequence[float], words: str
) -> None:
    with pytest.raises(InvalidConfig, match=words):
        check_room(groups(*JOINED, *overrides), gpu_nodes(*gpus))


def test_nodes_are_matched_to_bundles_of_different_size_whichever_comes_first() -> None:
    unequal = "ray.nodes={a: {prefill-0: 1}, b: {prefill-0: 1, decode-0: 4}, c: {prefill-1: 2}}"
    found = groups(*JOINED, *STAGES, "prefill.replicas=2", unequal)
    for gpus in ((5, 2, 1), (1, 5, 2), (2, 1, 5)):
        check_room(found, gpu_nodes(*gpus))


@pytest.mark.parametrize(
    ("overrides", "words"),
    [
        (("ray.nodes={a: {prefill-0: 1, decode-1: 1}}",), r"ray\.nodes\.a\.decode-1.*is no worker"),
        (("ray.nodes={a: {decode-0: 1}}",), r"ray\.nodes: gives prefill-0 0 devices of the 1"),
        (
            (
                "decode.tensor_parallel=2",
                "ray.nodes={a: {prefill-0: 1, decode-0: 1}, b: {decode-0: 1}}",
            ),
            r"ray\.nodes\.a\.decode-0.*cut a tensor-parallel group of 2.*across_nodes: true",
        ),
        (("ray.tensor_parallel_across_nodes=true",), "while ray.nodes says of no worker"),
        ((*STAGES, PAIRED, "ray.address=null"), r"ray\.nodes: names 2 nodes, while ray.address"),
        (("decode.accelerator=H100", "ray.address=null"), r"decode\.accelerator: H100, while ray"),
        (("decode.accelerator=H100", "decode.device=cpu"), r"decode\.accelerator: H100, while dec"),
    ],
)
def test_a_file_whose_nodes_contradict_its_workers_is_refused(
    overrides: Sequence[str], words: str
) -> None:
    with pytest.raises(InvalidConfig, match=words):
        groups(*JOINED, *overrides)


def test_a_tensor_parallel_group_is_cut_where_that_is_asked_for() -> None:
    nodes = "ray.nodes={a: {prefill-0: 1, decode-0: 1}, b: {decode-0: 1}}"
    asked = ("decode.tensor_parallel=2", "ray.tensor_parallel_across_nodes=true", nodes)
    (group,) = groups(*JOINED, *asked)
    assert [len(bundle.ranks) for bundle in group.bundles] == [2, 1]


def test_a_pool_that_names_its_gpus_is_told_where_there_are_none_of_them() -> None:
    found = groups(*JOINED, "prefill.accelerator=H100", "decode.accelerator=A100")
    nodes = gpu_nodes(8, 8)
    nodes["10.0.0.1"]["accelerator_type:H100"] = 1.0
    with pytest.raises(InvalidConfig, match="decode.accelerator: decode-0 asks .* CPU, A100 on"):
        check_room(found, nodes)
    nodes["10.0.0.2"]["accelerator_type:A100"] = 1.0
    check_room(found, nodes)
