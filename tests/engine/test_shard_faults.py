"""A worker of several ranks dies as one: whichever rank dies or hangs, the others know in time."""

from __future__ import annotations

import os
import signal
import threading
import time
from collections.abc import Iterator
from multiprocessing.context import ForkServerProcess

import pytest
from phasewise.engine import ranks as ranks_module
from phasewise.engine.batch import Batch
from phasewise.engine.errors import InvalidConfig, RankLost
from phasewise.engine.ranks import RankHost
from phasewise.engine.runner import Runner, build_runner
from phasewise.tests.engine.ranks_in_threads import follow
from phasewise.tests.engine.test_exactness import Case, _sequence
from phasewise.tests.forked import forked

LIMIT_S = 30.0


@pytest.fixture(scope="module")
def case(tmp_path_factory: pytest.TempPathFactory) -> Case:
    return Case("llama", tmp_path_factory.mktemp("llama"), num_attention_heads=8)


@pytest.fixture(params=[(2, 1), (1, 2)], ids=["tensor", "pipeline"])
def pair(request: pytest.FixtureRequest, case: Case) -> Iterator[tuple[Runner, ForkServerProcess]]:
    host = RankHost()
    process = forked(follow, host.address)
    runner = build_runner(
        case.directory,
        ranks=host,
        threads=1,
        tensor_parallel=request.param[0],
        pipeline_parallel=request.param[1],
        num_blocks=64,
        max_model_len=300,
    )
    try:
        yield runner, process
    finally:
        runner.close()
        process.kill()
        process.join(LIMIT_S)


def _lost_within(runner: Runner, limit_s: float) -> bool:
    deadline_s = time.monotonic() + limit_s
    while time.monotonic() < deadline_s:
        try:
            runner.check_ranks()
        except RankLost:
            return True
        time.sleep(0.05)
    return False


def _step(runner: Runner, ends: list[BaseException | None]) -> None:
    sequence = _sequence([1, 2, 3], [0])
    try:
        runner.run(Batch(sequences=[sequence], starts=[0], counts=[3]))
        ends.append(None)
    except RankLost as error:
        ends.append(error)


def test_a_follower_ends_when_its_leader_does(pair: tuple[Runner, ForkServerProcess]) -> None:
    runner, process = pair
    ends: list[BaseException | None] = []
    _step(runner, ends)
    assert ends == [None]
    runner.close()
    process.join(LIMIT_S)
    assert process.exitcode == 0


def test_a_killed_follower_is_known_between_steps(
    pair: tuple[Runner, ForkServerProcess],
) -> None:
    runner, process = pair
    process.kill()
    assert _lost_within(runner, LIMIT_S)
    ends: list[BaseException | None] = []
    _step(runner, ends)
    assert isinstance(ends[0], RankLost)


@pytest.mark.parametrize("then_kill", [True, False])
def test_a_step_that_waits_for_a_stopped_follower_ends(
    then_kill: bool, pair: tuple[Runner, ForkServerProcess], monkeypatch: pytest.MonkeyPatch
) -> None:
    runner, process = pair
    if not then_kill:
        monkeypatch.setattr(ranks_module, "SILENCE_S", 1.0)
    assert process.pid is not None
    os.kill(process.pid, signal.SIGSTOP)
    ends: list[BaseException | None] = []
    thread = threading.Thread(target=_step, args=(runner, ends), daemon=True)
    thread.start()
    if then_kill:
        process.kill()
    assert _lost_within(runner, LIMIT_S)
    runner.close()
    thread.join(LIMIT_S)
    assert not thread.is_alive()
    assert isinstance(ends[0], RankLost)


def test_a_split_that_the_model_does_not_allow_is_refused_by_key(case: Case) -> None:
    for options, key in (
        ({"tensor_parallel": 3}, "decode.tensor_parallel"),
        ({"pipeline_parallel": 4}, "decode.pipeline_parallel"),
    ):
        with pytest.raises(InvalidConfig) as caught:
            build_runner(case.directory, threads=1, section="decode", **options)
        assert caught.value.where == key
