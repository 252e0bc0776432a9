"""The two lease tables joined by a bad network: every move that may happen, and the laws."""

from __future__ import annotations

from collections import Counter

from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, invariant, precondition, rule
from phasewise.engine.request import WorkerId
from phasewise.kv_transfer.events import Asked, Ended, Outcome, Released, Side
from phasewise.kv_transfer.lease import Action, Answered, Send, Start, Stop, Verify
from phasewise.kv_transfer.lease_receiver import ReceiverTable
from phasewise.kv_transfer.lease_sender import SenderTable
from phasewise.kv_transfer.lease_sender import State as Sending
from phasewise.kv_transfer.messages import (
    Abort,
    Ask,
    Beat,
    Committed,
    Discard,
    Grant,
    Message,
    Refuse,
    Sent,
    encode,
    split,
)

NUM_LAYERS, NUM_BLOCKS = 2, 6
PREFILL, DECODE = WorkerId(name="p", incarnation=1), WorkerId(name="d", incarnation=1)
picks = st.integers(0, 1 << 16)


class Transfers(RuleBasedStateMachine):
    """One sender, one receiver. `memory` is what stands in the receiver's blocks; the copier is
    a list of writes not done yet. Over shared memory the copier writes by itself, whatever the
    receiver thinks; over TCP a write is one more message."""

    writes_here = False

    def __init__(self) -> None:
        super().__init__()
        self.now_s, self.pair = 0.0, 1
        self.new_sender()
        self.receiver = ReceiverTable(num_layers=NUM_LAYERS, block_bytes=8, lease_s=10)
        self.free = set(range(NUM_BLOCKS))
        self.leased: dict[int, tuple[int, ...]] = {}  # by lease, as the worker sees it
        self.memory: dict[tuple[int, int], tuple[int, int]] = {}
        self.asked: list[Asked] = []
        self.wire: list[tuple[Side, int, object]] = []  # to whom, by which pair, what
        self.next_lease = 0
        self.ends: Counter[tuple[Side, int, int]] = Counter()  # the last: which life of the lease
        self.outcomes: Counter[tuple[Side, Outcome]] = Counter()
        self.lives: Counter[tuple[Side, int]] = Counter()

    def new_sender(self) -> None:
        self.sender = SenderTable(num_layers=NUM_LAYERS, lease_s=10, park_s=30)
        self.copies: list[tuple[int, int, int]] = []  # lease, layer, index
        self.stopping: set[int] = set()
        self.committing: set[int] = set()

    # The owner of the tables

    def perform(self, side: Side, actions: list[Action] | list[Asked]) -> None:
        for action in actions:
            match action:
                case Send(pair, message):
                    other = Side.RECEIVER if side is Side.SENDER else Side.SENDER
                    self.wire.append((other, pair, split(bytearray(encode(message)))[0]))
                case Stop(_, lease):
                    self.stopping.add(lease)
                case Start(lease):
                    self.begin(Side.SENDER, lease)
                    self.plan(lease)
                    self.committing.add(lease)
                case Answered(lease, True):
                    self.begin(Side.SENDER, lease)
                case Ended():
                    self.end(action)
                case Released(lease=lease, blocks=blocks):
                    assert self.leased.pop(lease) == blocks
                    self.free |= set(blocks)
                case Asked():
                    self.asked.append(action)
                case Answered() | Verify():
                    pass

    def begin(self, side: Side, lease: int) -> None:
        self.lives[side, lease] += 1

    def end(self, ended: Ended) -> None:
        if ended.side is Side.SENDER and ended.peer is None:
            return  # parked, never granted
        self.outcomes[ended.side, ended.outcome] += 1
        life = self.lives[ended.side, ended.lease]
        self.ends[ended.side, ended.lease, life] += 1
        if ended.side is Side.RECEIVER and ended.outcome is Outcome.COMMITTED:
            blocks = self.leased.pop(ended.lease)
            written = {self.memory.get((layer, b)) for layer in range(NUM_LAYERS) for b in blocks}
            assert len(written) == 1, "a block of a commit was written under another grant"
            assert next(iter(written))[0] == ended.lease
            self.free |= set(blocks)  # used, and given back

    def plan(self, lease: int) -> None:
        entry = self.sender.get(lease)
        assert entry is not None
        for layer in range(NUM_LAYERS):
            self.copies += [(lease, layer, index) for index in range(entry.num_blocks)]

    # What may happen

    @rule(size=st.integers(1, 3), parked=st.booleans(), again=st.integers(0, 3))
    def offer(self, size: int, parked: bool, again: int) -> None:
        """A new lease, or one that ended before."""
        lease = max(1, self.next_lease - again + 1)
        if self.sender.get(lease) is not None:
            return
        self.next_lease = max(lease, self.next_lease)
        if parked:
            self.sender.park(lease, list(range(size)), 7, 77, self.now_s)
            return
        actions = self.sender.ask(self.pair, DECODE, lease, size, self.now_s)
        self.perform(Side.SENDER, actions)

    @precondition(lambda self: self.asked)
    @rule(pick=picks, willing=st.integers(0, 3))
    def answer(self, pick: int, willing: int) -> None:
        asked = self.asked.pop(pick % len(self.asked))
        blocks = self.take(asked.num_blocks) if willing else None
        actions = self.receiver.answer(asked, blocks, self.writes_here, self.now_s)
        if actions is None:
            self.free |= set(blocks or ())
            return
        if blocks:
            self.leased[asked.lease] = blocks
            self.begin(Side.RECEIVER, asked.lease)
        self.perform(Side.RECEIVER, actions)

    @precondition(lambda self: self.next_lease)
    @rule(pick=picks, size=st.integers(1, 3))
    def fetch(self, pick: int, size: int) -> None:
        lease = pick % self.next_lease + 1
        if self.receiver.get(lease) is not None or (blocks := self.take(size)) is None:
            return
        self.leased[lease] = blocks
        self.begin(Side.RECEIVER, lease)
        self.perform(
            Side.RECEIVER,
            self.receiver.fetch(
                self.pair, PREFILL, lease, blocks, 77, self.writes_here, self.now_s
            ),
        )

    @precondition(lambda self: self.next_lease)
    @rule(pick=picks)
    def discard(self, pick: int) -> None:
        """The receiver's word that nobody fetches a lease, however far it has come."""
        lease = pick % self.next_lease + 1
        self.perform(Side.RECEIVER, [Send(self.pair, Discard(lease))])

    def take(self, count: int) -> tuple[int, ...] | None:
        if len(self.free) < count:
            return None
        return tuple(self.free.pop() for _ in range(count))

    @rule(pick=picks)
    def push_whole(self, pick: int) -> None:
        granted = [
            lease
            for lease in self.sender.leases()
            if (e := self.sender.get(lease)) and e.state is Sending.GRANTED and not e.source
        ]
        if granted:
            lease = granted[pick % len(granted)]
            entry = self.sender.get(lease)
            assert entry is not None
            self.sender.push(lease, list(range(entry.num_blocks)), 0, self.now_s)
            entry.num_tokens, entry.digest = 7, 77
            self.plan(lease)
            self.committing.add(lease)

    @precondition(lambda self: self.copies)
    @rule(count=st.integers(1, 4))
    def copy(self, count: int) -> None:
        """The copier goes on, wherever the loop's tables stand by now."""
        for _ in range(min(count, len(self.copies))):
            lease, layer, index = self.copies.pop(0)
            entry = self.sender.get(lease)
            assert entry is not None, "the lease ended while its copier was in it"
            if self.writes_here:
                write = (lease, entry.generation, layer, index)
                self.wire.append((Side.RECEIVER, entry.pair or 0, write))
                continue
            block = entry.target[index]
            assert block not in self.free, "law 4: a block is free while its writer writes"
            holders = [held for held, blocks in self.leased.items() if block in blocks]
            assert holders == [lease], "law 4: another lease holds a block being written"
            self.memory[layer, block] = (lease, entry.generation)

    @rule()
    def finish(self) -> None:
        for lease in sorted(self.committing):
            if not any(copy[0] == lease for copy in self.copies):
                self.committing.discard(lease)
                message = self.sender.sent(lease, None, self.now_s)
                entry = self.sender.get(lease)
                if message is not None and entry is not None and entry.pair is not None:
                    self.perform(Side.SENDER, [Send(entry.pair, message)])

    @precondition(lambda self: self.stopping)
    @rule(pick=picks)
    def copier_obeys(self, pick: int) -> None:
        lease = sorted(self.stopping)[pick % len(self.stopping)]
        self.stopping.discard(lease)
        self.copies = [copy for copy in self.copies if copy[0] != lease]
        self.committing.discard(lease)
        self.perform(Side.SENDER, self.sender.drained(lease))

    @precondition(lambda self: self.wire)
    @rule(count=st.integers(1, 6))
    def network_in_order(self, count: int) -> None:
        for _ in range(min(count, len(self.wire))):
            self.deliver(*self.wire.pop(0))

    @precondition(lambda self: self.wire)
    @rule(pick=picks, fate=st.sampled_from(["deliver", "twice", "lose"]))
    def network_in_disorder(self, pick: int, fate: str) -> None:
        index = pick % len(self.wire)
        side, pair, message = self.wire[index]
        if fate != "twice":
            del self.wire[index]
        if fate != "lose":
            self.deliver(side, pair, message)

    def deliver(self, side: Side, pair: int, message: object) -> None:
        if isinstance(message, tuple):
            self.write_here(pair, *message)
        elif side is Side.SENDER:
            self.perform(side, self.to_sender(pair, message))  # type: ignore[arg-type]
        else:
            self.perform(side, self.to_receiver(pair, message))  # type: ignore[arg-type]

    def write_here(self, pair: int, lease: int, generation: int, layer: int, index: int) -> None:
        blocks = self.receiver.begin_write(pair, lease, generation, layer, index, 1)
        if blocks is None:
            return
        assert not set(blocks) & self.free, "law 4: a free block is written"
        self.memory[layer, blocks[0]] = (lease, generation)
        wrote = self.receiver.wrote(pair, lease, generation, layer, index, 1, self.now_s)
        self.perform(Side.RECEIVER, wrote)

    def to_sender(self, pair: int, message: Message) -> list[Action]:
        match message:
            case Refuse():
                return self.sender.on_refuse(pair, message)
            case Grant():
                return self.sender.on_grant(pair, DECODE, message, self.now_s)
            case Committed():
                return self.sender.on_committed(pair, message, self.now_s)
            case Abort():
                return self.sender.on_abort(pair, message)
            case Discard():
                return self.sender.on_discard(message)
            case Beat():
                return self.sender.on_beat(pair, message)
        raise AssertionError(message)

    def to_receiver(self, pair: int, message: Message) -> list[Action]:
        match message:
            case Ask():
                if pair != self.pair:
                    return []  # a closed pair takes no asks
                event = self.receiver.on_ask(pair, PREFILL, message)
                if isinstance(event, Asked):
                    self.asked.append(event)
                    return []
                return [event] if event else []
            case Sent():
                return self.receiver.on_sent(pair, message, self.now_s)
            case Abort():
                return self.receiver.on_abort(pair, message)
            case Beat():
                return self.receiver.on_beat(pair, message, self.now_s)
        raise AssertionError(message)

    @precondition(lambda self: self.next_lease)
    @rule(pick=picks, side=st.sampled_from(list(Side)))
    def abort(self, pick: int, side: Side) -> None:
        table = self.sender if side is Side.SENDER else self.receiver
        lease = pick % self.next_lease + 1
        self.perform(side, table.abort(lease, Outcome.ABORTED, "given up"))

    @precondition(lambda self: self.next_lease)
    @rule(pick=picks)
    def withdraw(self, pick: int) -> None:
        self.perform(Side.SENDER, self.sender.withdraw(pick % self.next_lease + 1))

    @rule(step_s=st.sampled_from([0.5, 4.0, 11.0, -3.0]))
    def time_passes(self, step_s: float) -> None:
        self.now_s += step_s
        self.perform(Side.SENDER, self.sender.expire(self.now_s))
        self.perform(Side.RECEIVER, self.receiver.expire(self.now_s))

    @rule(side=st.sampled_from(list(Side)))
    def beat(self, side: Side) -> None:
        for pair in range(1, self.pair + 1):
            if side is Side.SENDER:
                beat = Beat(self.sender.live(pair), b"", self.sender.seen(pair))
            else:
                beat = Beat(b"", self.receiver.live(pair), 0)
            if pair == self.pair:
                self.perform(side, [Send(pair, beat)])

    @precondition(lambda self: self.receiver.leases())
    @rule(sure=st.integers(0, 4))
    def receiver_gives_up_the_pair(self, sure: int) -> None:
        """A hung sender: its copier may go on for a while."""
        if sure:
            return
        self.perform(Side.RECEIVER, self.receiver.lost(self.pair, "silent", drained=False))
        self.perform(Side.SENDER, self.sender.lost(self.pair, "closed"))
        self.wire = [w for w in self.wire if w[0] is Side.RECEIVER and isinstance(w[2], Abort)]
        self.pair += 1

    @precondition(lambda self: self.receiver.leases())
    @rule(sure=st.integers(0, 4))
    def sender_dies(self, sure: int) -> None:
        if not sure:
            self.kill_sender()

    def kill_sender(self) -> None:
        self.new_sender()
        self.wire = []
        for pair in range(1, self.pair + 1):
            self.perform(Side.RECEIVER, self.receiver.lost(pair, "killed", drained=True))
        self.pair += 1

    # The laws

    @invariant()
    def one_terminal_event_a_lease(self) -> None:
        assert all(count == 1 for count in self.ends.values())

    @invariant()
    def blocks_are_conserved(self) -> None:
        held = [block for blocks in self.leased.values() for block in blocks]
        assert sorted([*held, *self.free]) == list(range(NUM_BLOCKS))

    @invariant()
    def nobody_may_write_a_free_block(self) -> None:
        if self.writes_here:
            return
        for lease in self.sender.leases():
            entry = self.sender.get(lease)
            if entry and entry.state is Sending.GRANTED:
                assert not set(entry.target) & self.free, "law 4"

    def teardown(self) -> None:
        """Whatever happened, everything comes back once the sender is dead."""
        self.kill_sender()
        assert self.free == set(range(NUM_BLOCKS))
        assert not self.receiver.leases()


class TransfersOverTcp(Transfers):
    writes_here = True
