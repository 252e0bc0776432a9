"""Links between workers, and how transfers under way share them.

Every device has a port to the devices of its node and one to other nodes; a node's ports to
others may share a narrower way out. Transfers that meet at a port share it max-min fairly.
A transfer is a fluid: while a prompt's layers are computed it flows no faster than they come.
"""

from __future__ import annotations

from dataclasses import dataclass
from heapq import heapify, heappop, heappush
from math import inf
from typing import Any, NamedTuple

from ..latency.transfer import Link
from .agenda import Action, Agenda

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
        "width",
    )

    def __init__(self, route: Route, done: Action, argument: Any) -> None:
        self.ports = route.ports
        self.width = route.bytes_per_s
        self.latency_s = route.latency_s
        self.done = done
        self.argument = argument
        self.active = False  # bytes are on their way
        self.left = 0.0
        self.cap = inf
        self.rate = 0.0
        self.closing = False  # no more bytes will be added
        self.turn = 0  # its arrival of an earlier turn is stale


class Route(NamedTuple):
    """Between two workers."""

    ports: tuple[Port, ...]
    bytes_per_s: float  # of the narrowest
    latency_s: float


class Flows:
    """All transfers under way in a network."""

    def __init__(self, network: Network, agenda: Agenda) -> None:
        self.network = network
        self._agenda = agenda
        self._active: list[Flow] = []  # with bytes left
        self._later: list[tuple[float, int, Flow, float, float]] = []  # heap of bytes to come
        self._serial = 0
        self._since_s = 0.0  # rates hold since
        self._turn = 0  # of these rates: who runs out first at earlier ones is stale
        self._ports: dict[tuple[str, str], Port] = {}
        self._routes: dict[tuple[str, str], Route] = {}

    def open(
        self,
        source: tuple[str, str, int],
        target: tuple[str, str, int],
        done: Action,
        argument: Any,
    ) -> Flow:
        """A transfer without bytes yet between (name, node, devices); `done(now, argument)`
        is called once it is closed and all its bytes have arrived."""
        key = source[0], target[0]
        route = self._routes.get(key)
        if route is None:
            route = self._routes[key] = self._route(source, target)
        return Flow(route, done, argument)

    def add(self, flow: Flow, num_bytes: float, now_s: float) -> None:
        """More bytes are there to send, as fast as the links carry them."""
        if flow.ports:
            self._pass(now_s)
            self._add(flow, num_bytes, 0.0, now_s)

    def add_later(self, flow: Flow, num_bytes: float, pace_s: float, when_s: float) -> None:
        """From `when_s` on more bytes come, so slowly that with those that wait they take `pace_s`,
        or until it is uncapped or closed, which must not be before `when_s`."""
        self._serial += 1
        heappush(self._later, (when_s, self._serial, flow, num_bytes, pace_s))
        self._agenda.at(when_s, self._come)  # not later: it changes when others run out of bytes

    def _come(self, now_s: float, _: Any) -> None:
        self._pass(now_s)

    def uncap(self, flow: Flow, now_s: float) -> None:
        """All that was added is there: the links alone limit it now."""
        self._pass(now_s)
        flow.cap = inf
        if flow.active:
            self._share(now_s)

    def close(self, flow: Flow, now_s: float) -> None:
        """All that was added is there, and nothing more will be."""
        if flow.ports:
            self._pass(now_s)
        flow.cap = inf
        flow.closing = True
        if flow.active:
            self._share(now_s)
        else:
            flow.turn += 1
            self._agenda.at(now_s + flow.latency_s, self._arrived, (flow, flow.turn))

    def cancel(self, flow: Flow, now_s: float) -> None:
        """Give the transfer up; `done` is not called."""
        self._pass(now_s)
        self._later = [item for item in self._later if item[2] is not flow]
        heapify(self._later)
        flow.turn += 1
        flow.closing = False
        if flow.active:
            self._stop(flow)
            self._share(now_s)

    def _route(self, source: tuple[str, str, int], target: tuple[str, str, int]) -> Route:
        local = source[1] == target[1]
        link = self.network.local if local else self.network.remote
        ports: list[Port] = []
        for (name, node, devices), way in ((source, "out"), (target, "in")):
            capacity = link.bytes_per_s * devices
            self._add_port(ports, (name, f"{way} {'local' if local else 'remote'}"), capacity)
            if not local:
                self._add_port(ports, (node, f"node {way}"), self.network.node_bytes_per_s)
        width = min([port.bytes_per_s for port in ports], default=inf)
        return Route(tuple(ports), width, link.latency_s)

    def _add_port(self, ports: list[Port], key: tuple[str, str], capacity: float) -> None:
        if capacity == inf:
            return
        port = self._ports.get(key)
        if port is None:
            port = self._ports[key] = Port(capacity)
        ports.append(port)

    def _add(self, flow: Flow, num_bytes: float, pace_s: float, now_s: float) -> None:
        if not flow.active:
            flow.active = True
            self._active.append(flow)
        flow.left += num_bytes
        flow.cap = flow.left / pace_s if pace_s else inf
        self._share(now_s)

    def _pass(self, now_s: float) -> None:
        """Time goes by, and what was to come by now has come."""
        later = self._later
        while later and later[0][0] <= now_s:
            when_s, _, flow, num_bytes, pace_s = heappop(later)
            self._send(when_s)
            self._add(flow, num_bytes, pace_s, when_s)
        self._send(now_s)

    def _send(self, now_s: float) -> None:
        """Time goes by at the present rates."""
        elapsed_s = now_s - self._since_s
        if not elapsed_s:
            return
        self._since_s = now_s
        for flow in self._active:
            left = flow.left - flow.rate * elapsed_s
            flow.left = left if left > 0.0 else 0.0

    def _share(self, now_s: float) -> None:
        """New rates, and which transfer runs out of bytes first at them: then there are others.
        One that is alone makes room for nobody by that, so it matters only once it is closed."""
        active = self._active
        self._turn += 1
        if not active:
            return
        if len(active) == 1:
            first = active[0]
            first.rate = first.cap if first.cap < first.width else first.width
            if not first.closing:
                return
            first_s = now_s + first.left / first.rate
        else:
            first, first_s = active[0], inf
            rates = fair_rates([(flow.ports, flow.cap) for flow in active])
            for flow, rate in zip(active, rates, strict=True):
                flow.rate = rate
                end_s = now_s + flow.left / rate
                if end_s < first_s:
                    first, first_s = flow, end_s
        self._agenda.at(first_s, self._drained, (first, self._turn))

    def _drained(self, now_s: float, drained: tuple[Flow, int]) -> None:
        flow, turn = drained
        if self._turn != turn:
            return
        self._pass(now_s)
        if self._turn != turn:  # others began meanwhile
            return
        assert flow.left <= flow.rate * (ROUNDING + 1e-12 * now_s), flow.left
        self._stop(flow)
        self._share(now_s)
        if not flow.closing:
            return
        flow.turn += 1
        if flow.latency_s:
            self._agenda.at(now_s + flow.latency_s, self._arrived, (flow, flow.turn))
        else:
            flow.done(now_s, flow.argument)

    def _stop(self, flow: Flow) -> None:
        flow.left = 0.0
        flow.active = False
        self._active.remove(flow)

    def _arrived(self, now_s: float, ended: tuple[Flow, int]) -> None:
        flow, turn = ended
        if flow.turn == turn:
            flow.done(now_s, flow.argument)


def fair_rates(flows: list[tuple[tuple[Port, ...], float]]) -> list[float]:
    """Max-min fair rates of (ports, cap): all rise together until a port or a cap holds some.

    Whoever meets no port that is asked for more than it has takes what it asks for; the others
    share, and no other port can hold them.
    """
    asked: dict[Port, float] = {}
    rates = []
    for ports, most in flows:
        for port in ports:
            if port.bytes_per_s < most:
                most = port.bytes_per_s
        rates.append(most)
        for port in ports:
            asked[port] = asked.get(port, 0.0) + most
    scarce = {port for port, most in asked.items() if most > port.bytes_per_s}
    if scarce:
        rising = [i for i, (ports, _) in enumerate(flows) if not scarce.isdisjoint(ports)]
        for i, rate in zip(rising, _shared([flows[i] for i in rising]), strict=True):
            rates[i] = rate
    return rates


def _shared(flows: list[tuple[tuple[Port, ...], float]]) -> list[float]:
    rates = [0.0] * len(flows)
    room = {port: port.bytes_per_s for ports, _ in flows for port in ports}
    users = dict.fromkeys(room, 0)  # that rise still
    for ports, _ in flows:
        for port in ports:
            users[port] += 1
    rising = list(range(len(flows)))
    while rising:
        shares = {port: room[port] / count for port, count in users.items() if count}
        level = min(min(shares.values()), min([flows[i][1] for i in rising]))
        full = {port for port, share in shares.items() if share <= level * (1 + 1e-12)}
        left = []
        for i in rising:
            ports, cap = flows[i]
            if cap > level and full.isdisjoint(ports):
                left.append(i)
                continue
            rates[i] = level
            for port in ports:
                users[port] -= 1
                spare = room[port] - level
                room[port] = spare if spare > 0.0 else 0.0
        rising = left
    return rates
