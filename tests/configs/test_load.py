"""The strict loader: what it takes, and how it refuses."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st
from phasewise.configs.errors import InvalidConfig
from phasewise.configs.load import key_paths, load_cluster
from phasewise.configs.schema import ClusterConfig
from phasewise.configs.values import parse_host_port, parse_size

Write = Callable[[str], Path]
MINIMAL = "model: {path: checkpoint}\n"


@pytest.fixture
def write(tmp_path: Path) -> Write:
    def write(text: str) -> Path:
        path = tmp_path / "c.yaml"
        path.write_text(text)
        return path

    return write


def refusal(path: Path, *overrides: str) -> InvalidConfig:
    with pytest.raises(InvalidConfig) as caught:
        load_cluster(path, overrides)
    return caught.value


def test_everything_but_the_model_has_a_default(write: Write) -> None:
    config = load_cluster(write(MINIMAL))
    assert config.prefill.replicas == 1
    assert config.kv.memory == 1 << 30


def test_paths_are_relative_to_the_file_and_in_overrides_to_the_working_directory(
    write: Write,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    path = write(MINIMAL)
    assert load_cluster(path).model.path == tmp_path / "checkpoint"
    elsewhere = tmp_path / "elsewhere"
    elsewhere.mkdir()
    monkeypatch.chdir(elsewhere)
    assert load_cluster(path, ["model.path=other"]).model.path == elsewhere / "other"


@pytest.mark.parametrize(
    ("text", "key", "line", "words"),
    [
        ("decode: {max_batch_siz: 3}", "decode.max_batch_siz", 2, "decode.max_batch_size"),
        ("decod: {replicas: 3}", "decod", 2, "decode"),
        ("ttft_ms: 3", "ttft_ms", 2, "slo.ttft_ms"),
        ("decode:\n  replicas: 0", "decode.replicas", 3, ">= 1"),
        ("decode:\n  replicas: -1", "decode.replicas", 3, ">= 1"),
        ("decode: {replicas: two}", "decode.replicas", 2, "whole number"),
        ("decode: {replicas: true}", "decode.replicas", 2, "whole number"),
        ("decode: {replicas: 2.5}", "decode.replicas", 2, "whole number"),
        ("decode: {replicas: null}", "decode.replicas", 2, "null"),
        ("decode: {replicas: [1]}", "decode.replicas", 2, "a list"),
        ("decode: {device: gpu}", "decode.device", 2, "cpu, cuda"),
        ("decode: 3", "decode", 2, "section"),
        ("kv: {memory: 1XB}", "kv.memory", 2, "size"),
        ("kv: {dtype: fp8}", "kv.dtype", 2, "auto, fp8_e4m3"),
        ("kv_cache_dtype: fp8_e4m3", "kv_cache_dtype", 2, "kv.dtype"),
        ("kv: {memory: 0}", "kv.memory", 2, "size"),
        ("kv: {memory: {a: 1}}", "kv.memory", 2, "one value"),
        ("slo: {attainment: 1.5}", "slo.attainment", 2, "<= 1"),
        ("slo: {ttft_ms: .nan}", "slo.ttft_ms", 2, "number"),
        ("transfer: {lease_s: 0}", "transfer.lease_s", 2, "> 0"),
        ("transfer: {transport: rdma}", "transfer.transport", 2, "auto, shm, tcp"),
        ("gateway: {grpc: here}", "gateway.grpc", 2, "host:port"),
        ('gateway: {grpc: "127.0.0.1:70000"}', "gateway.grpc", 2, "host:port"),
        ("ray: {address: somewhere}", "ray.address", 2, "auto or host:port"),
        ("kv: {block_size: 8}\nkv: {block_size: 16}", "kv", 3, "twice"),
        ("kv: {block_size: 8, block_size: 16}", "kv.block_size", 2, "twice"),
        ("1: {a: b}", "1", 2, "word"),
        ("kv: &a {memory: *a}", "kv", None, ""),
        ("kv: {memory: !!python/object:os.system 1}", "kv.memory", 2, ""),
    ],
)
def test_a_mistake_is_named_with_key_line_and_remedy(
    write: Write,
    text: str,
    key: str,
    line: int | None,
    words: str,
) -> None:
    error = refusal(write(MINIMAL + text))
    assert error.where.startswith(key)
    assert words in str(error)
    assert error.remedy
    if line is not None:
        assert error.where == key
        assert error.at == f"c.yaml line {line}"


@pytest.mark.parametrize("text", ["", "- a", "a: b: c", "model: [", "model: {path: \x00}"])
def test_what_is_no_mapping_is_refused(write: Write, text: str) -> None:
    assert "c.yaml" in refusal(write(text)).where


def test_a_missing_file_and_a_missing_key_are_named(write: Write, tmp_path: Path) -> None:
    assert "no such file" in str(refusal(tmp_path / "nowhere.yaml"))
    assert refusal(write("kv: {block_size: 16}\n")).where == "model.path"


@pytest.mark.parametrize(
    ("overrides", "key"),
    [
        (["prefill.replicas=0", "decode.local_prefill=never"], "decode.local_prefill"),
        (["decode.max_batch_size=64", "decode.max_batch_tokens=8"], "decode.max_batch_tokens"),
        (["prefill.block_size=24"], "prefill.block_size"),
        (["decode.block_size=32", "kv.block_size=12"], "decode.block_size"),
        (["decode.device=cuda", "decode.threads=2"], "decode.threads"),
        (["gateway.grpc=127.0.0.1:9", "gateway.http=127.0.0.1:9"], "gateway.http"),
    ],
)
def test_a_contradiction_is_refused(write: Write, overrides: list[str], key: str) -> None:
    assert refusal(write(MINIMAL), *overrides).where == key


@pytest.mark.parametrize(
    "overrides",
    [
        ["decode.tensor_parallel=2"],
        ["prefill.tensor_parallel=4", "prefill.pipeline_parallel=2", "decode.block_size=32"],
        ["prefill.block_size=8", "decode.block_size=24"],
        ["prefill.replicas=0", "prefill.block_size=5"],
    ],
)
def test_any_two_splits_and_block_sizes_that_divide_are_taken(
    write: Write, overrides: list[str]
) -> None:
    load_cluster(write(MINIMAL), overrides)


def test_overrides_are_checked_like_the_file_and_win_over_it(write: Write) -> None:
    path = write(MINIMAL + "kv: {memory: 1GiB}\n")
    assert load_cluster(path, ["kv.memory=64MiB"]).kv.memory == 64 << 20
    assert load_cluster(path, ["gateway.http=null"]).gateway.http is None
    assert load_cluster(path, ["decode={replicas: 3}"]).decode.replicas == 3
    assert refusal(path, "kv.memor=1").nearest == "kv.memory"
    assert refusal(path, "kv.memor=1").at == "--set"
    assert "key.path=value" in str(refusal(path, "kv.memory"))
    assert refusal(path, "kv.memory.x=1").where.startswith("kv.memory")


@given(st.integers(1, 1 << 50), st.sampled_from(["KiB", "MiB", "GiB", "TiB"]))
def test_sizes_in_powers_of_two_are_exact(count: int, unit: str) -> None:
    power = ["", "KiB", "MiB", "GiB", "TiB"].index(unit)
    assert parse_size(f"{count}{unit}") == count << (10 * power)
    assert parse_size(f" {count} ") == count


def test_addresses_split_into_host_and_port() -> None:
    assert parse_host_port("127.0.0.1:50051") == ("127.0.0.1", 50051)
    assert parse_host_port("[::1]:0") == ("::1", 0)
    for text in ("localhost", ":1", "::1:5", "a:b", "a:-1", "a:65536"):
        with pytest.raises(ValueError):
            parse_host_port(text)


def test_every_key_of_the_schema_is_documented() -> None:
    source = (Path(__file__).parents[2] / "configs" / "schema.py").read_text()
    for key in key_paths(ClusterConfig):
        if "." in key:
            word = key.rpartition(".")[2]
            assert f"    {word}: " in source
            after = source.split(f"    {word}: ", 1)[1].split("\n", 1)[1].lstrip()
            assert after.startswith('"""'), key
