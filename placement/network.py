"""Links between workers, and how transfers under way share them.

Every device has a port to the devices of its node and one to other nodes; a node's ports to
others may share a narrower way out. Transfers that meet at a port share it max-min fairly.
A transfer is a fluid: while a prompt's layers are computed it flows no faster than they come.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from math import inf
from typing import Any

from .agenda import Agenda
from .transfer import Link

FREE = Link(bytes_per_s=inf)
ROUNDING = 1e-9  # of a second at full rate: what is left below that is nothing


@dataclass(frozen=True, kw_only=True, slots=True)
class Network:
    """Bandwidth of one device and direction; a worker has that many times its devices."""

    local: Link = FREE  # to devices of the same node
    remote: Link = FREE  # to other nodes
    node_bytes_per_s: float = inf  # what all workers of one node share towards others


class Port:
    """One direction of one place where transfers meet."""

    __slots__ = ("bytes_per_s",)

    def __init__(self, bytes_per_s: float) -> None:
        self.bytes_per_s = bytes_per_s


class Flow:
    """One transfer. `left` bytes may be sent now, at `cap` bytes a second at most."""

    __slots__ = (
        "active",
        "argument",
        "cap",
        "closing",
        "done",
        "latency_s",
        "left",
        "ports",
        "rate",
        "turn",
    )

    def __init__(
        self, ports: tuple[Port, ...], latency_s: float, done: Callable[[float, Any], None]
    ) -> None:
        self.ports = ports
        self.latency_s = latency_s
        self.done = done
        self.argument: Any = None
        self.active = False  # bytes are on their way
        self.left = 0.0
        self.cap = inf
        self.rate = 0.0
        self.closing = False  # no more bytes will be added
        self.turn = 0  # events of an earlier turn are stale


class Flows:
    """All transfers under way in a network."""

    def __init__(self, network: Network, agenda: Agenda) -> None:
        self.network = network
        self._agenda = agenda
        self._active: list[Flow] = []  # with bytes left
        self._since_s = 0.0  # rates hold since
        self._ports: dict[tuple[str, str], Port] = {}

    def open(
        self,
        source: tuple[str, str, int],
        target: tuple[str, str, int],
        done: Callable[[float, Any], None],
        argument: Any,
    ) -> Flow:
        """A transfer without bytes yet between (name, node, devices); `done(now, argument)`
        is called once it is closed and all its bytes have arrived."""
        local = source[1] == target[1]
        link = self.network.local if local else self.network.remote
        ports = []
        for (name, node, devices), way in ((source, "out"), (target, "in")):
            capacity = link.bytes_per_s * devices
            self._add_port(ports, (name, f"{way} {'local' if local else 'remote'}"), capacity)
            if not local:
                self._add_port(ports, (node, f"node {way}"), self.network.node_bytes_per_s)
        flow = Flow(tuple(ports), link.latency_s, done)
        flow.argument = argument
        return flow

    def add(self, flow: Flow, num_bytes: float, cap: float, now_s: float) -> None:
        """More bytes are there to send; until the cap is changed, at this rate at most."""
        if not flow.ports:
            return
        self._pass(now_s)
        if not flow.active:
            flow.active = True
            self._active.append(flow)
        flow.left += num_bytes
        flow.cap = cap
        self._share(now_s)

    def uncap(self, flow: Flow, now_s: float) -> None:
        """All that was added is there: the links alone limit it now."""
        flow.cap = inf
        if flow.active:
            self._pass(now_s)
            self._share(now_s)

    def close(self, flow: Flow, now_s: float) -> None:
        """Nothing more will be added."""
        flow.closing = True
        if not flow.active:
            self._end(flow, now_s)

    def cancel(self, flow: Flow, now_s: float) -> None:
        """Give the transfer up; `done` is not called."""
        flow.turn += 1
        flow.closing = False
        if flow.active:
            self._pass(now_s)
            self._stop(flow)
            self._share(now_s)

    def _add_port(self, ports: list[Port], key: tuple[str, str], capacity: float) -> None:
        if capacity == inf:
            return
        port = self._ports.get(key)
        if port is None:
            port = self._ports[key] = Port(capacity)
        ports.append(port)

    def _pass(self, now_s: float) -> None:
        """Time goes by at the present rates."""
        elapsed_s = now_s - self._since_s
        self._since_s = now_s
        for flow in self._active:
            flow.left = max(0.0, flow.left - flow.rate * elapsed_s)

    def _share(self, now_s: float) -> None:
        """New rates, and when each transfer runs out of bytes at them."""
        active = self._active
        if not active:
            return
        if len(active) == 1:
            flow = active[0]
            rates = [min(flow.cap, *[port.bytes_per_s for port in flow.ports])]
        else:
            rates = fair_rates([(flow.ports, flow.cap) for flow in active])
        for flow, rate in zip(active, rates, strict=True):
            flow.rate = rate
            flow.turn += 1
            self._agenda.at(now_s + flow.left / rate, self._drained, (flow, flow.turn))

    def _drained(self, now_s: float, drained: tuple[Flow, int]) -> None:
        flow, turn = drained
        if flow.turn != turn:
            return
        self._pass(now_s)
        assert flow.left <= flow.rate * (ROUNDING + 1e-12 * now_s), flow.left
        self._stop(flow)
        if flow.closing:
            self._end(flow, now_s)
        self._share(now_s)

    def _stop(self, flow: Flow) -> None:
        flow.left = 0.0
        flow.active = False
        self._active.remove(flow)

    def _end(self, flow: Flow, now_s: float) -> None:
        flow.turn += 1
        self._agenda.at(now_s + flow.latency_s, self._arrived, (flow, flow.turn))

    def _arrived(self, now_s: float, ended: tuple[Flow, int]) -> None:
        flow, turn = ended
        if flow.turn == turn:
            flow.done(now_s, flow.argument)


def fair_rates(flows: list[tuple[tuple[Port, ...], float]]) -> list[float]:
    """Max-min fair rates of (ports, cap): all rise together until a port or a cap holds some."""
    rates = [0.0] * len(flows)
    rising = set(range(len(flows)))
    room = {port: port.bytes_per_s for ports, _ in flows for port in ports}
    while rising:
        users: dict[Port, int] = {}
        for i in rising:
            for port in flows[i][0]:
                users[port] = users.get(port, 0) + 1
        level = min([room[port] / count for port, count in users.items()])
        level = min(level, min(flows[i][1] for i in rising))
        full = {port for port, count in users.items() if room[port] / count <= level * (1 + 1e-12)}
        held = [
            i for i in sorted(rising) if flows[i][1] <= level or not full.isdisjoint(flows[i][0])
        ]
        for i in held:
            rates[i] = level
            for port in flows[i][0]:
                room[port] = max(0.0, room[port] - level)
        rising.difference_update(held)
    return rates
