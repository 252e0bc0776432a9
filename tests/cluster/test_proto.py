"""The committed protobuf modules are what the `.proto` files say."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import pytest
from phasewise.cluster import wire
from phasewise.cluster.proto import generate as proto
from phasewise.cluster.proto import phasewise_pb2, worker_pb2
from phasewise.engine.request import Request, SamplingParams, TransferAddress, WorkerId

METHOD = re.compile(r"'(/phasewise\.[\w.]+/\w+)'")


@pytest.fixture(scope="module")
def regenerated(tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("proto")
    proto.generate(out)
    return out


@pytest.mark.parametrize("module", [phasewise_pb2, worker_pb2])
def test_committed_messages_equal_those_generated_now(regenerated: Path, module: Any) -> None:
    """Descriptors are compared, so that another version of protoc may lay its code out anew."""
    name = module.DESCRIPTOR.name.rpartition("/")[2].removesuffix(".proto")
    text = (regenerated / f"{name}_pb2.py").read_text()
    literal = re.search(r"AddSerializedFile\((b'.*?')\)\n", text, re.DOTALL)
    assert literal is not None
    assert eval(literal[1]) == module.DESCRIPTOR.serialized_pb


@pytest.mark.parametrize("name", proto.NAMES)
def test_committed_services_equal_those_generated_now(regenerated: Path, name: str) -> None:
    committed, now = (
        (folder / f"{name}_pb2_grpc.py").read_text() for folder in (proto.PROTO_DIR, regenerated)
    )
    assert METHOD.findall(committed) == METHOD.findall(now) != []


@pytest.mark.parametrize("name", proto.NAMES)
def test_committed_modules_ask_for_no_particular_runtime(name: str) -> None:
    for suffix in proto.SUFFIXES:
        text = (proto.PROTO_DIR / (name + suffix)).read_text()
        assert "runtime_version" not in text and "GRPC_GENERATED_VERSION" not in text


def test_requests_survive_the_wire() -> None:
    request = Request(
        id="a",
        token_ids=(1, 2, 3),
        num_prompt_tokens=2,
        sampling=SamplingParams(
            max_tokens=9, temperature=0.5, logit_bias={7: -1.5}, stop_token_ids=(4,), logprobs=0
        ),
        arrival_s=10.0,
        ttft_ms=5.0,
        slo_class="batch",
        priority=-2,
    )
    message = wire.request_to_pb(request, now_s=12.0, deadline_s=20.0)
    assert message.age_s == 2.0 and message.deadline_s == 8.0
    assert wire.request_from_pb(message, now_s=12.0) == request


def test_addresses_survive_the_wire() -> None:
    address = TransferAddress(
        worker=WorkerId(name="decode-0", incarnation=3), host_id="h", shm="s", tcp="t:1"
    )
    assert wire.address_from_pb(wire.address_to_pb(address)) == address
