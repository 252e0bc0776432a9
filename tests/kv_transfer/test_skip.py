"""Leases whose receiver holds the first blocks already: only the rest is granted and written."""

from __future__ import annotations

import pytest
from phasewise.engine.request import WorkerId
from phasewise.kv_transfer.events import Asked, Ended, Outcome
from phasewise.kv_transfer.lease import Answered, Send, Start
from phasewise.kv_transfer.lease_receiver import ReceiverTable
from phasewise.kv_transfer.lease_sender import SenderTable
from phasewise.kv_transfer.messages import Abort, Ask, Grant, Refuse, pack_blocks

PREFILL, DECODE = (WorkerId(name=name, incarnation=1) for name in ("prefill-0", "decode-0"))


def tables() -> tuple[SenderTable, ReceiverTable]:
    return (
        SenderTable(num_layers=2, lease_s=10.0, park_s=60.0),
        ReceiverTable(num_layers=2, block_bytes=8, lease_s=10.0),
    )


def sent(actions: object) -> object:
    """The message of the only action, which sends one."""
    assert isinstance(actions, list) and len(actions) == 1 and isinstance(actions[0], Send)
    return actions[0].message


def test_a_push_carries_names_and_writes_behind_what_is_there() -> None:
    sender, receiver = tables()
    ask = sent(sender.ask(0, DECODE, 5, 4, 0.0, b"names"))
    assert isinstance(ask, Ask)
    asked = receiver.on_ask(0, PREFILL, ask)
    assert isinstance(asked, Asked) and (asked.num_blocks, asked.names) == (4, b"names")
    grant = sent(receiver.answer(asked, (8, 9), False, 0.0, skip=2))
    assert isinstance(grant, Grant)
    assert sender.on_grant(0, DECODE, grant, 0.0) == [Answered(5, True)]
    entry = sender.get(5)
    assert entry is not None and (entry.skip, entry.num_blocks, entry.target) == (2, 2, (8, 9))
    assert sender.push(5, [1, 2], 0, 0.0) is entry
    message = sender.sent(5, None, 0.0)
    assert message is not None and message.num_units == 2
    *_, ended = receiver.on_sent(0, message, 0.0)
    assert isinstance(ended, Ended)
    assert (ended.outcome, ended.blocks) == (Outcome.COMMITTED, (8, 9))


def test_parked_kv_is_sent_without_its_first_blocks() -> None:
    sender, receiver = tables()
    sender.park(5, [30, 31, 32], 40, 77, 0.0)
    grant = sent(receiver.fetch(0, PREFILL, 5, (8,), 77, False, 0.0, skip=2))
    assert isinstance(grant, Grant)
    assert sender.on_grant(0, DECODE, grant, 0.0) == [Start(5)]
    entry = sender.get(5)
    assert entry is not None and (entry.source, entry.target) == ([32], (8,))


@pytest.mark.parametrize(("skip", "num_blocks"), [(0, 3), (2, 3), (5, 0), (4, 1)])
def test_a_grant_that_does_not_cover_what_was_asked_is_disowned(skip: int, num_blocks: int) -> None:
    sender, _ = tables()
    ask = sent(sender.ask(0, DECODE, 5, 4, 0.0))
    assert isinstance(ask, Ask) and not isinstance(ask, Refuse)
    grant = Grant(5, 1, ask.attempt, pack_blocks(tuple(range(num_blocks))), skip)
    refusal = sent(sender.on_grant(0, DECODE, grant, 0.0))
    assert isinstance(refusal, Abort) and refusal.drained
