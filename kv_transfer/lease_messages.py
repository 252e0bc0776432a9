"""A peer's message to the lease table that it is for."""

from __future__ import annotations

from collections.abc import Sequence

from .events import Asked
from .lease import Action
from .lease_receiver import ReceiverTable
from .lease_sender import SenderTable
from .messages import (
    Abort,
    Ask,
    Beat,
    Committed,
    Grant,
    Message,
    Refuse,
    Sent,
    check_blocks,
)
from .pair import Pair


def heard(
    pair: Pair, message: Message, senders: SenderTable, receivers: ReceiverTable, now_s: float
) -> Sequence[Action | Asked]:
    """What a message on an open pair leads to. Raises MalformedFrame for what cannot be."""
    number = pair.number
    match message:
        case Ask():
            event = receivers.on_ask(number, pair.peer, message)
            return [] if event is None else [event]
        case Refuse():
            return senders.on_refuse(number, message)
        case Grant():
            check_blocks(message, pair.hello.layout.num_blocks)
            return senders.on_grant(number, pair.peer, message, now_s, pair.fit.out.extent)
        case Sent():
            return receivers.on_sent(number, message, now_s)
        case Committed():
            return senders.on_committed(number, message, now_s)
        case Abort() if message.from_sender:
            return receivers.on_abort(number, message)
        case Abort():
            return senders.on_abort(number, message)
        case Beat():
            ended = receivers.on_beat(number, message, now_s)
            return [*ended, *senders.on_beat(number, message)]
        case _:
            raise AssertionError(f"{message} is not a lease table's")
