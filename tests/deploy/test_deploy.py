"""The container and the manifest agree with the cluster files, the commands and the packages."""

from __future__ import annotations

import re
import shlex
from pathlib import Path
from typing import Any

import pytest
import yaml
from phasewise.cluster.cli import COMMANDS
from phasewise.configs.load import load_cluster
from phasewise.configs.schema import ClusterConfig
from phasewise.configs.values import parse_host_port

ROOT = Path(__file__).parents[2]
DEPLOY = ROOT / "deploy"
DOCKERFILE = (DEPLOY / "Dockerfile").read_text()


@pytest.fixture(scope="module")
def manifest() -> dict[str, Any]:
    documents = yaml.safe_load_all((DEPLOY / "kuberay.yaml").read_text())
    return {document["kind"]: document for document in documents}


@pytest.fixture
def cluster(manifest: dict[str, Any], tmp_path: Path) -> ClusterConfig:
    path = tmp_path / "cluster.yaml"
    path.write_text(manifest["ConfigMap"]["data"]["cluster.yaml"])
    return load_cluster(path)


def gateway_container(manifest: dict[str, Any]) -> dict[str, Any]:
    pod = manifest["RayCluster"]["spec"]["headGroupSpec"]["template"]["spec"]
    return next(c for c in pod["containers"] if c["name"] == "gateway")


def instruction(name: str) -> list[str]:
    joined = DOCKERFILE.replace("\\\n", " ")
    return re.findall(rf"^{name}\s+(.*)$", joined, flags=re.MULTILINE)


def test_every_example_of_a_cluster_file_loads() -> None:
    every = sorted((ROOT / "configs").glob("*.yaml"))
    paths = [path for path in every if not path.name.startswith(("plan-", "workload-"))]
    assert len(paths) >= 4
    for path in paths:
        assert isinstance(load_cluster(path), ClusterConfig)


def test_manifest_holds_the_example_of_several_machines(cluster: ClusterConfig) -> None:
    assert cluster == load_cluster(ROOT / "configs" / "cluster.yaml")


def test_manifest_has_a_gpu_for_every_worker(
    manifest: dict[str, Any], cluster: ClusterConfig
) -> None:
    (group,) = manifest["RayCluster"]["spec"]["workerGroupSpecs"]
    (container,) = group["template"]["spec"]["containers"]
    gpus = container["resources"]["limits"]["nvidia.com/gpu"] * group["replicas"]
    assert gpus == cluster.prefill.replicas + cluster.decode.replicas
    assert group["minReplicas"] <= group["replicas"] <= group["maxReplicas"]


def test_manifest_starts_an_existing_command_on_the_mounted_file(manifest: dict[str, Any]) -> None:
    container = gateway_container(manifest)
    words = shlex.split(" ".join(container["args"]))
    command = words[words.index("phasewise") + 1]
    assert command in COMMANDS
    mounted = Path(words[words.index(command) + 1])
    mounts = {m["mountPath"]: m["name"] for m in container["volumeMounts"]}
    assert mounts[str(mounted.parent)] == "cluster"
    assert mounted.name in manifest["ConfigMap"]["data"]


def test_manifest_ports_are_those_of_the_cluster_file(
    manifest: dict[str, Any], cluster: ClusterConfig
) -> None:
    assert cluster.gateway.http is not None
    expected = {
        "grpc": parse_host_port(cluster.gateway.grpc)[1],
        "http": parse_host_port(cluster.gateway.http)[1],
    }
    container = gateway_container(manifest)
    assert {p["name"]: p["containerPort"] for p in container["ports"]} == expected
    assert {p["targetPort"]: p["port"] for p in manifest["Service"]["spec"]["ports"]} == expected


def test_manifest_selects_its_gateway_and_gives_it_time_to_drain(
    manifest: dict[str, Any], cluster: ClusterConfig
) -> None:
    template = manifest["RayCluster"]["spec"]["headGroupSpec"]["template"]
    selector = manifest["Service"]["spec"]["selector"]
    assert selector.items() <= template["metadata"]["labels"].items()
    assert template["spec"]["terminationGracePeriodSeconds"] > cluster.gateway.drain_s


def test_every_mounted_volume_is_declared(manifest: dict[str, Any]) -> None:
    spec = manifest["RayCluster"]["spec"]
    for group in (spec["headGroupSpec"], *spec["workerGroupSpecs"]):
        pod = group["template"]["spec"]
        declared = {volume["name"] for volume in pod["volumes"]}
        for container in pod["containers"]:
            assert {mount["name"] for mount in container["volumeMounts"]} <= declared


def test_container_copies_what_exists_and_runs_without_privileges() -> None:
    for line in instruction("COPY"):
        words = line.split()
        if not words[0].startswith("--from"):
            assert all((ROOT / source).exists() for source in words[:-1])
    assert instruction("USER") == ["phasewise"]
    assert yaml.safe_load(instruction("ENTRYPOINT")[0])[0] == "tini"


def test_container_serves_a_file_that_exists_on_the_ports_it_exposes() -> None:
    command = yaml.safe_load(instruction("CMD")[-1])
    assert command[0] == "phasewise"
    assert command[1] in COMMANDS
    (link,) = re.findall(r"echo (\S+) \|\| echo (\S+)\)\.yaml\" /app/(\S+)", DOCKERFILE)
    assert command[2] == link[2]
    overrides = [word for word in command[3:] if word != "--set"]
    exposed = {int(port) for port in instruction("EXPOSE")[0].split()}
    for name in link[:2]:
        config = load_cluster(ROOT / "configs" / f"{name}.yaml", overrides)
        assert config.gateway.http is not None
        ports = {parse_host_port(a)[1] for a in (config.gateway.grpc, config.gateway.http)}
        assert ports == exposed


def test_container_and_makefile_install_the_same_torch() -> None:
    pins = re.findall(r"torch==[\d.]+", DOCKERFILE + (ROOT / "Makefile").read_text())
    assert len(pins) == 2
    assert len(set(pins)) == 1
