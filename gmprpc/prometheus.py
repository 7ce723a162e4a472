"""Metrics for Prometheus, in the registries of prometheus_client: what servers carry out, and how their clients do.

It needs the extra ``metrics``: ``pip install 'gmprpc[metrics]'``.
"""

from __future__ import annotations

import weakref
from bisect import bisect_left
from collections import Counter as Sums
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from itertools import accumulate
from operator import add
from typing import Any, Final, NamedTuple, Protocol

import gevent

from .admin import AdminServer, Page, Response
from .connection import Call
from .methods import CANCEL, DESCRIBE, HEALTH, LIST
from .metrics import Counters
from .observing import Observer
from .outcome import Outcome
from .server import Server
from .transport import format_address

try:
    from prometheus_client import REGISTRY, CollectorRegistry, make_wsgi_app
    from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily, HistogramMetricFamily, Metric
    from prometheus_client.registry import Collector

    from .sharedmetrics import Relay, SharedCollector, shared_directory, sum_of_live
except ImportError as exc:
    raise ImportError(f"{exc}: pip install 'gmprpc[metrics]'", name=exc.name) from exc

#: The upper bounds of the histogram's buckets, in seconds: those of prometheus_client, and some below, since a call
#: that only computes something takes less than a millisecond.
BUCKETS: Final = (0.0005, 0.001, 0.0025, 0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1.0, 2.5, 5.0, 10.0)

_BOUNDS = [*map(str, BUCKETS), "+Inf"]

# The methods whose names are labels without being registered.
_BUILTINS = frozenset((CANCEL, DESCRIBE, HEALTH, LIST))

# How often a process writes for others what it tells of the moment. They are asked every few seconds. Picked
# arbitrarily.
_RELAY_INTERVAL = 1.0


class Family(NamedTuple):
    """A metric that shows one of the numbers of ``statistics()``."""

    #: Its name; behind that of a counter comes ``_total``.
    name: str
    help: str
    is_gauge: bool = False


_SERVING: Final = "gmprpc_serving"

# What servers count, and what the outcome of calls tells already or only clients do.
_NOT_OF_SERVERS = frozenset(
    ("handler_errors", "unknown_methods", "expired_requests", "cancelled_requests", "resent_requests")
)
_HELP = {
    "connections": "Connections accepted.",
    "refused_connections": "Connections closed as soon as they were accepted.",
    "failed_connections": "Connections lost, reset or not MessagePack-RPC.",
    "failed_handshakes": "Connections that got no further than their PROXY header or their TLS handshake.",
    "denied_connections": "Connections that weren't let in by authentication.",
    "protocol_errors": "Connections whose peer broke the protocol.",
    "invalid_messages": "Calls that hold what can't be decoded, or wrong params.",
    "refused_messages": "Calls refused: too many were in flight.",
    "late_answers": "Answers to calls of clients for which nobody waited any more.",
    "dropped_answers": "Answers that came too late to be sent.",
    "received_bytes": "Bytes that clients have sent, without those of TLS.",
    "sent_bytes": "Bytes sent to clients, without those of TLS.",
}

# By the names of the statistics.
_OF_SERVERS: Final[Mapping[str, Family]] = {
    "is_serving": Family(_SERVING, "Servers that answer SERVING to $/health.", is_gauge=True),
    "in_flight": Family("gmprpc_calls_in_flight", "Calls at work, or not sent their answer yet.", is_gauge=True),
    "open_connections": Family("gmprpc_open_connections", "Connections that are open.", is_gauge=True),
    "unsent_size": Family("gmprpc_unsent_bytes", "Bytes that wait to be sent.", is_gauge=True),
    **{
        name: Family(f"gmprpc_{name}", _HELP.get(name) or f"{name.replace('_', ' ').capitalize()}.")
        for name in Counters().snapshot()
        if name not in _NOT_OF_SERVERS
    },
}
_OF_CLIENTS: Final[Mapping[str, Family]] = {
    "pending": Family("gmprpc_client_pending_calls", "Calls that wait for their answers.", is_gauge=True),
    "open_connections": Family("gmprpc_client_open_connections", "Connections that are open.", is_gauge=True),
    "unsent_size": Family("gmprpc_client_unsent_bytes", "Bytes that wait to be sent.", is_gauge=True),
    "connections": Family("gmprpc_client_connections", "Connections made."),
    "failed_connections": Family("gmprpc_client_failed_connections", "Connections lost, reset or not MessagePack-RPC."),
    "protocol_errors": Family("gmprpc_client_protocol_errors", "Connections whose server broke the protocol."),
    "late_answers": Family("gmprpc_client_late_answers", "Answers for which nobody waited any more."),
    "resent_requests": Family("gmprpc_client_resent_requests", "Idempotent requests sent again on another connection."),
    # Of balancers only.
    "endpoints": Family("gmprpc_client_endpoints", "Endpoints of a balancer.", is_gauge=True),
    "usable_endpoints": Family("gmprpc_client_usable_endpoints", "Endpoints that get calls.", is_gauge=True),
    "ejections": Family("gmprpc_client_ejections", "Endpoints that get no more calls, until a probe succeeds."),
    "probes": Family("gmprpc_client_probes", "Probes of endpoints."),
    "failed_probes": Family("gmprpc_client_failed_probes", "Probes of endpoints that have failed."),
    "moved_calls": Family("gmprpc_client_moved_calls", "Calls sent to another endpoint after the first had failed."),
    "look_ups": Family("gmprpc_client_look_ups", "Times that the addresses of endpoints were asked for."),
    "failed_look_ups": Family("gmprpc_client_failed_look_ups", "Times that this has failed."),
}


class Observable(Protocol):
    """A client or a balancer."""

    @property
    def address(self) -> Any:
        """Where the server is; None if there are several, and no one name for them."""

    def statistics(self) -> Mapping[str, int]:
        """What happened since it was made, and how much is going on now."""


def observe(target: Server | Observable, *, name: str = "", registry: CollectorRegistry = REGISTRY) -> None:
    """Have ``registry`` tell of a :class:`~gmprpc.Server`, a :class:`~gmprpc.Client` or a :class:`~gmprpc.Balancer`.

    What several servers do is told together. Clients are told apart by the label ``client``, which is ``name``, or the
    address where none is given. Of a server that has connections already their bytes aren't counted, and the calls on
    them aren't. To do it again does nothing. What is observed is kept alive for as long as the registry.
    """
    if isinstance(target, Server):
        if (servers := _servers.get(registry)) is None:
            servers = _servers[registry] = _Servers(registry)
        servers.add(target)
    else:
        if (clients := _clients.get(registry)) is None:
            clients = _clients[registry] = _Clients(registry)
        clients.add(target, name or format_address(target.address or ""))


def metrics_page(registry: CollectorRegistry = REGISTRY) -> Page:
    """A page for :class:`~gmprpc.admin.AdminServer` with all that ``registry`` tells, in the format that is asked for.

    Where several processes share a directory it has what all of them tell, whatever the registry.
    """
    if (directory := shared_directory()) is not None:
        registry = CollectorRegistry()
        registry.register(SharedCollector(directory))
    application = make_wsgi_app(registry)

    def page(environ: Mapping[str, Any]) -> Response:
        _refresh()
        started: list[Any] = []

        def start_response(*args: Any) -> None:
            started[:] = args

        body = b"".join(application({**environ, "REQUEST_METHOD": "GET"}, start_response))
        return Response(started[0], body, started[1])

    return page


@contextmanager
def admin_server(listener: Any, *servers: Server) -> Iterator[AdminServer]:
    """Meanwhile answer over HTTP at ``listener`` how ``servers`` do: ``/metrics``, ``/livez`` and ``/readyz``.

    ``/metrics`` has all that prometheus_client's ``REGISTRY`` tells, the ``servers`` among it: so this comes before
    they start. ``/readyz`` is 200 while all of them answer SERVING to ``$/health``. ``listener`` is what
    :class:`~gmprpc.Server` takes. Where several processes share a directory (see :mod:`gmprpc.sharedmetrics`) each
    answers for all of them, and they are ready as long as one is.

    Raises:
        OSError: the address is in use, say, or not ours to use.
    """
    for server in servers:
        observe(server)
    directory = shared_directory()

    def is_ready() -> bool:
        if directory is None:
            return all(server.is_serving for server in servers)
        _refresh()
        return sum_of_live(directory, _SERVING) > 0

    admin = AdminServer(listener, is_ready=is_ready, pages={"/metrics": metrics_page()})
    with relaying(), admin:
        yield admin


@contextmanager
def relaying() -> Iterator[None]:
    """Meanwhile write for the other processes what ``statistics()`` of what is observed here tells: once a second.

    It is for each process that serves, from its fork to its end, and does nothing where there is only one.
    """
    if (directory := shared_directory()) is None:
        yield
        return
    directory.mkdir(parents=True, exist_ok=True)

    def relay() -> None:
        while True:
            _refresh()
            gevent.sleep(_RELAY_INTERVAL, ref=False)

    _refresh()
    greenlet = gevent.spawn(relay)
    try:
        yield
    finally:
        greenlet.kill()
        _refresh()


def _refresh() -> None:
    for relay in list(_relays):
        relay.refresh()


class Source:
    """The statistics of some servers or clients, summed up where their labels are the same.

    It is a collector, as prometheus_client calls it: it is asked when the metrics are.
    """

    def __init__(self, families: Mapping[str, Family], labels: Sequence[str] = ()) -> None:
        self._families = families
        self._labels = labels
        self._observed: list[tuple[tuple[str, ...], Callable[[], Mapping[str, int]]]] = []

    def add(self, statistics: Callable[[], Mapping[str, int]], *labels: str) -> None:
        """Ask ``statistics()``, too."""
        self._observed.append((labels, statistics))

    def describe(self) -> Iterable[Metric]:
        """The metrics without their values."""
        return [self._empty(family) for family in self._families.values()]

    def collect(self) -> Iterator[Metric]:
        """The metrics; called by the registry."""
        sums: dict[tuple[str, ...], Sums[str]] = {}
        for values, statistics in list(self._observed):
            sums.setdefault(values, Sums()).update(statistics())
        for key, family in self._families.items():
            metric = self._empty(family)
            for values, summed in sums.items():
                if key in summed:
                    metric.add_metric(values, summed[key])
            yield metric

    def _empty(self, family: Family) -> CounterMetricFamily | GaugeMetricFamily:
        kind = GaugeMetricFamily if family.is_gauge else CounterMetricFamily
        return kind(family.name, family.help, labels=self._labels)


_relays: weakref.WeakSet[Relay] = weakref.WeakSet()


def _register(collector: Collector, registry: CollectorRegistry) -> Relay | None:
    """Have ``registry`` ask ``collector``; where others are asked, too, they are told by what this returns."""
    registry.register(collector)
    if shared_directory() is None:
        return None
    relay = Relay(collector)
    _relays.add(relay)
    return relay


class _Servers:
    """The servers that one registry tells of."""

    def __init__(self, registry: CollectorRegistry) -> None:
        self._calls = _Calls()
        self._statistics = Source(_OF_SERVERS)
        self._relays = [_register(self._calls, registry), _register(self._statistics, registry)]
        self._observed: list[Server] = []

    def add(self, server: Server) -> None:
        if server in self._observed:
            return
        self._observed.append(server)

        def statistics() -> Mapping[str, int]:
            return {**server.statistics(), "is_serving": server.is_serving}

        self._statistics.add(statistics)
        server.counts_bytes = True
        server.add_observer(self._calls.observer_of(server))


class _Clients:
    """The clients that one registry tells of."""

    def __init__(self, registry: CollectorRegistry) -> None:
        self._statistics = Source(_OF_CLIENTS, ["client"])
        self._relay = _register(self._statistics, registry)
        self._observed: list[Observable] = []

    def add(self, client: Observable, name: str) -> None:
        if client in self._observed:
            return
        self._observed.append(client)
        self._statistics.add(client.statistics, name)


_servers: weakref.WeakKeyDictionary[CollectorRegistry, _Servers] = weakref.WeakKeyDictionary()
_clients: weakref.WeakKeyDictionary[CollectorRegistry, _Clients] = weakref.WeakKeyDictionary()


class _Tally:
    """How many calls of one kind have ended, and when; a number is added to, and all else is left to who asks."""

    __slots__ = ("buckets", "seconds")

    def __init__(self) -> None:
        #: How many have taken no longer than each of `BUCKETS`, and longer than the one before; the last one: longer.
        self.buckets = [0] * (len(BUCKETS) + 1)
        #: How long they have taken together.
        self.seconds = 0.0


# A method, or "" for all that aren't known, how its calls ended, and whether they were notifications.
_Kind = tuple[str, Outcome, bool]


class _CallObserver(Observer):
    """Counts the calls of one server.

    Not with what prometheus_client has for it, which takes 5 µs for each, and 11 where several processes share their
    metrics: this takes 0.8.
    """

    def __init__(self, methods: Mapping[str, Any]) -> None:
        self._methods = methods
        self.tallies: dict[_Kind, _Tally] = {}

    def call_started(self, call: Call) -> None:
        """See :class:`~gmprpc.Observer`."""

    def call_ended(
        self, call: Call, outcome: Outcome, duration: float, token: Any, error: BaseException | None
    ) -> None:
        """See :class:`~gmprpc.Observer`."""
        _, msgid, method, _ = call.message
        kind = method, outcome, msgid is None
        tally = self.tallies.get(kind) or self._tally_of(kind)
        tally.buckets[bisect_left(BUCKETS, duration)] += 1
        tally.seconds += duration

    def _tally_of(self, kind: _Kind) -> _Tally:
        method, outcome, is_notification = kind
        if method not in self._methods and method not in _BUILTINS:
            method = ""  # Anybody can send any name.
        return self.tallies.setdefault((method, outcome, is_notification), _Tally())


class _Calls:
    """The calls of some servers: a collector, as prometheus_client calls it."""

    def __init__(self) -> None:
        self._observers: list[_CallObserver] = []

    def observer_of(self, server: Server) -> Observer:
        """What counts the calls of ``server``."""
        self._observers.append(_CallObserver(server.service.methods))
        return self._observers[-1]

    def describe(self) -> Iterable[Metric]:
        """The metrics without their values."""
        return self._empty()

    def collect(self) -> Iterable[Metric]:
        """The metrics; called by the registry."""
        calls, durations = self._empty()
        counts: Sums[_Kind] = Sums()
        by_method: dict[str, _Tally] = {}
        for observer in list(self._observers):
            for kind, tally in list(observer.tallies.items()):
                counts[kind] += sum(tally.buckets)
                sums = by_method.setdefault(kind[0], _Tally())
                sums.buckets = [*map(add, sums.buckets, tally.buckets)]
                sums.seconds += tally.seconds
        for (method, outcome, is_notification), count in counts.items():
            calls.add_metric([method, outcome, "notification" if is_notification else "request"], count)
        for method, tally in by_method.items():
            buckets = zip(_BOUNDS, map(float, accumulate(tally.buckets)), strict=True)
            durations.add_metric([method], [*buckets], tally.seconds)
        return calls, durations

    def _empty(self) -> tuple[CounterMetricFamily, HistogramMetricFamily]:
        return (
            CounterMetricFamily(
                "gmprpc_calls",
                "Calls that have ended, by how: see gmprpc.Outcome.",
                labels=["method", "outcome", "kind"],
            ),
            HistogramMetricFamily(
                "gmprpc_call_duration_seconds",
                "Time from the start of a call until it has ended.",
                labels=["method"],
            ),
        )
