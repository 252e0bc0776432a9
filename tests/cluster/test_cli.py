"""The command line: pages, exit codes, and what a bad file costs."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import time
from pathlib import Path

import pytest
from phasewise.cluster import processes
from phasewise.cluster.bundles import check_room, groups_of
from phasewise.cluster.cli import COMMANDS, main
from phasewise.cluster.resources import worker_specs
from phasewise.cluster.run_folder import RunFolder, sweep
from phasewise.configs.errors import InvalidConfig
from phasewise.configs.load import load_cluster

ROOT = Path(__file__).parents[2]
LOCAL = str(ROOT / "configs" / "local.yaml")


@pytest.fixture
def checkpoint(tmp_path: Path) -> Path:
    folder = tmp_path / "checkpoint"
    folder.mkdir()
    (folder / "model.safetensors").touch()
    write_config(folder)
    return folder


def write_config(folder: Path, **changed: object) -> None:
    values = {
        "architectures": ["LlamaForCausalLM"],
        "hidden_size": 64,
        "intermediate_size": 128,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "vocab_size": 99,
        "max_position_embeddings": 512,
    }
    (folder / "config.json").write_text(json.dumps(values | changed))


def validate(capsys: pytest.CaptureFixture[str], *overrides: str) -> tuple[int, dict]:
    words = [word for override in overrides for word in ("--set", override)]
    code = main(["validate", LOCAL, "--json", *words])
    return code, json.loads(capsys.readouterr().out)


def test_the_front_page_names_every_command(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as caught:
        main(["--help"])
    assert caught.value.code == 0
    page = capsys.readouterr().out
    assert all(name in page for name in COMMANDS)


@pytest.mark.parametrize("name", COMMANDS)
def test_every_command_has_a_page_with_examples(
    name: str, capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(SystemExit) as caught:
        main([name, "--help"])
    assert caught.value.code == 0
    page = capsys.readouterr().out
    assert f"phasewise {name}" in page.split("examples:")[1]


@pytest.mark.parametrize("words", [["serv"], ["serve"], ["status"], ["generate", "--addres", "x"]])
def test_a_wrong_word_is_exit_code_2(words: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as caught:
        main(words)
    assert caught.value.code == 2
    assert "phasewise" in capsys.readouterr().err


def test_the_front_page_and_validate_import_nothing_heavy() -> None:
    code = (
        "import sys; from phasewise.cluster.cli import main\n"
        f"code = main(['validate', {LOCAL!r}, '--json'])\n"
        "print([n for n in ('torch', 'ray', 'grpc', 'transformers') if n in sys.modules])"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=60)
    assert done.stdout.splitlines()[-1] == "[]", done.stderr


def test_validate_takes_a_good_file(checkpoint: Path, capsys: pytest.CaptureFixture[str]) -> None:
    code, verdict = validate(capsys, f"model.path={checkpoint}")
    assert code == 0
    assert verdict["valid"]
    assert verdict["summary"]["max_model_len"] == 512


@pytest.mark.parametrize(
    ("overrides", "key"),
    [
        (["decode.max_batch_siz=3"], "decode.max_batch_siz"),
        (["model.max_model_len=513"], "model.max_model_len"),
        (["kv.memory=100KB"], "kv.memory"),
        (["kv.memory=1KiB", "model.max_model_len=0"], "kv.memory"),
        (["prefill.memory=100KB"], "prefill.memory"),
        (["prefill.memory=1GiB", "decode.memory=100KB"], "decode.memory"),
        (["model.path=/nowhere/at/all"], "model.path"),
    ],
)
def test_validate_names_the_key(
    checkpoint: Path, capsys: pytest.CaptureFixture[str], overrides: list[str], key: str
) -> None:
    limits = ["model.max_model_len=512"]
    code, verdict = validate(capsys, f"model.path={checkpoint}", *limits, *overrides)
    assert code == 2
    assert verdict["error"]["key"] == key
    assert verdict["error"]["remedy"]


def test_validate_refuses_what_the_engine_does_not_compute(
    checkpoint: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    write_config(checkpoint, architectures=["MambaForCausalLM"])
    code, verdict = validate(capsys, f"model.path={checkpoint}")
    assert code == 2
    assert "MambaForCausalLM" in verdict["error"]["reason"]
    assert "LlamaForCausalLM" in verdict["error"]["remedy"]
    (checkpoint / "model.safetensors").unlink()
    assert "model.safetensors" in validate(capsys, f"model.path={checkpoint}")[1]["error"]["reason"]


def test_a_scaled_rope_reaches_as_far_as_its_factor(
    checkpoint: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    scaled = {"rope_type": "linear", "factor": 4.0}
    write_config(checkpoint, rope_scaling=scaled, rope_theta=1e4)
    path = f"model.path={checkpoint}"
    assert validate(capsys, path)[1]["summary"]["max_model_len"] == 2048
    write_config(checkpoint, rope_scaling=scaled | {"rope_type": "dynamic"})
    assert validate(capsys, path, "model.max_model_len=5000")[0] == 0


def test_an_address_where_nobody_listens_is_exit_code_1(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["status", "--address", "127.0.0.1:1"]) == 1
    assert "no connection" in capsys.readouterr().err


@pytest.mark.parametrize("command", ["status", "generate"])
def test_what_is_no_address_is_exit_code_2(
    command: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main([command, "--address", "nohost:port"]) == 2
    assert "--address" in capsys.readouterr().err


def test_output_that_cannot_be_written_is_said_in_one_line() -> None:
    code = f"from phasewise.cluster.cli import main; exit(main(['validate', {str(LOCAL)!r}]))"
    with open("/dev/full", "w") as full:
        done = subprocess.run(
            [sys.executable, "-c", code], stdout=full, stderr=subprocess.PIPE, text=True, timeout=60
        )
    assert done.returncode == 1
    assert done.stderr.count("\n") == 1 and "No space left" in done.stderr


def test_workers_share_cores_but_not_without_limit() -> None:
    config = load_cluster(LOCAL, ["prefill.replicas=2", "decode.replicas=2"])
    nodes = {"this machine": {"CPU": 2.0, "GPU": 0.0}}
    check_room(groups_of(config), nodes)
    assert {spec.pool.threads for spec in worker_specs(config, cores=8)} == {2}
    for overrides in (["decode.replicas=9"], ["decode.threads=2"], ["decode.device=cuda"]):
        config = load_cluster(LOCAL, overrides)
        with pytest.raises(InvalidConfig, match="decode.replicas"):
            check_room(groups_of(config), nodes)


def test_a_dead_owners_folder_is_swept_and_a_living_ones_stays(tmp_path: Path) -> None:
    living = RunFolder(tmp_path)
    dead = tmp_path / "phasewise-dead"
    dead.mkdir()
    (dead / "lock").touch()
    assert sweep(tmp_path) == [dead]
    assert living.path.is_dir()
    living.remove()
    assert not list(tmp_path.iterdir())


def test_processes_are_found_with_their_children_and_ended() -> None:
    script = "import subprocess, sys; subprocess.run([sys.executable, '-c', 'input()'])"
    parent = subprocess.Popen([sys.executable, "-c", script], stdin=subprocess.PIPE)
    try:
        deadline_s = time.monotonic() + 60
        while len(processes.descendants(parent.pid)) < 1 and time.monotonic() < deadline_s:
            time.sleep(0.02)
        (child,) = processes.descendants(parent.pid)
        assert child in processes.descendants(os.getpid())
        assert processes.end([child], within_s=0.05) == [child]
        assert parent.wait(60) == 0
        assert processes.end([child], within_s=30.0) == []
    finally:
        parent.kill()
        parent.wait()
