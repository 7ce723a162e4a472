"""Metrics for Prometheus, in the registries of prometheus_client: what servers carry out, and how their clients do.

It needs the extra ``metrics``: ``pip install 'gmprpc[metrics]'``.
"""

from __future__ import annotations

import weakref
from collections import Counter as Sums
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
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
    from prometheus_client import REGISTRY, CollectorRegistry, Counter, Gauge, Histogram, make_wsgi_app
    from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily, Metric

    from .sharedmetrics import SharedCollector, shared_directory, sum_of_live
except ImportError as exc:
    raise ImportError(f"{exc}: pip install 'gmprpc[metrics]'", name=exc.name) from exc

#: The upper bounds of the histogram's buckets, in seconds: those of prometheus_client, and some below, since a call
#: that only computes something takes less than a millisecond.
BUCKETS: Final = (0.0005, 0.001, 0.0025, 0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1.0, 2.5, 5.0, 10.0)

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
    "failed_handshakes": "TLS handshakes that failed.",
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
    if shared_directory() is None:
        yield
        return

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
        self.families = families
        self.labels = labels
        self._observed: list[tuple[tuple[str, ...], Callable[[], Mapping[str, int]]]] = []

    def add(self, statistics: Callable[[], Mapping[str, int]], *labels: str) -> None:
        """Ask ``statistics()``, too."""
        self._observed.append((labels, statistics))

    def read(self) -> dict[tuple[str, ...], Mapping[str, int]]:
        """The sums as they are now, by the values of the labels."""
        sums: dict[tuple[str, ...], Sums[str]] = {}
        for labels, statistics in list(self._observed):
            sums.setdefault(labels, Sums()).update(statistics())
        return {**sums}

    def describe(self) -> Iterable[Metric]:
        """The metrics without their values."""
        return [self._empty(family) for family in self.families.values()]

    def collect(self) -> Iterator[Metric]:
        """The metrics; called by the registry."""
        sums = self.read()
        for key, family in self.families.items():
            metric = self._empty(family)
            for labels, statistics in sums.items():
                if key in statistics:
                    metric.add_metric(labels, statistics[key])
            yield metric

    def _empty(self, family: Family) -> CounterMetricFamily | GaugeMetricFamily:
        kind = GaugeMetricFamily if family.is_gauge else CounterMetricFamily
        return kind(family.name, family.help, labels=self.labels)


class _Relay:
    """Copies what a source tells into metrics that other processes can read.

    What is counted as it happens needs no copy; but to write each of these numbers as it changes would cost the others
    what only several processes need.
    """

    def __init__(self, source: Source, registry: CollectorRegistry) -> None:
        self._source = source
        self._gauges: dict[str, Gauge] = {}
        self._counters: dict[str, Counter] = {}
        self._counted: dict[tuple[str, tuple[str, ...]], int] = {}
        for key, (name, text, is_gauge) in source.families.items():
            if is_gauge:
                self._gauges[key] = Gauge(name, text, source.labels, registry=registry, multiprocess_mode="livesum")
            else:
                self._counters[key] = Counter(name, text, source.labels, registry=registry)

    def refresh(self) -> None:
        """Bring the copies up to date."""
        for labels, statistics in self._source.read().items():
            for key, gauge in self._gauges.items():
                if key in statistics:
                    (gauge.labels(*labels) if labels else gauge).set(statistics[key])
            for key, counter in self._counters.items():
                # Never less than nothing: threads may lose a count between them, and a counter would raise.
                if (more := statistics.get(key, 0) - self._counted.get((key, labels), 0)) > 0:
                    (counter.labels(*labels) if labels else counter).inc(more)
                    self._counted[key, labels] = statistics[key]


_relays: weakref.WeakSet[_Relay] = weakref.WeakSet()


def _register(source: Source, registry: CollectorRegistry) -> _Relay | None:
    """Have ``registry`` tell what ``source`` does; where others are asked, too, by way of what this returns."""
    if shared_directory() is None:
        registry.register(source)
        return None
    relay = _Relay(source, registry)
    _relays.add(relay)
    return relay


class _Servers:
    """The servers that one registry tells of."""

    def __init__(self, registry: CollectorRegistry) -> None:
        self._calls = Counter(
            "gmprpc_calls",
            "Calls that have ended, by how: see gmprpc.Outcome.",
            ["method", "outcome", "kind"],
            registry=registry,
        )
        self._durations = Histogram(
            "gmprpc_call_duration_seconds",
            "Time from the start of a call until it has ended.",
            ["method"],
            buckets=BUCKETS,
            registry=registry,
        )
        self._statistics = Source(_OF_SERVERS)
        self._relay = _register(self._statistics, registry)
        self._observed: list[Server] = []

    def add(self, server: Server) -> None:
        if server in self._observed:
            return
        self._observed.append(server)

        def statistics() -> Mapping[str, int]:
            return {**server.statistics(), "is_serving": server.is_serving}

        self._statistics.add(statistics)
        server.counts_bytes = True
        server.add_observer(_CallObserver(server.service.methods, self._calls, self._durations))


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


class _CallObserver(Observer):
    """Counts the calls of one server."""

    def __init__(self, methods: Mapping[str, Any], calls: Counter, durations: Histogram) -> None:
        self._methods = methods
        self._calls = calls
        self._durations = durations
        # What to count with: prometheus_client takes longer to find it than to count.
        self._found: dict[tuple[str, Outcome, bool], tuple[Counter, Histogram]] = {}

    def call_started(self, call: Call) -> None:
        """See :class:`~gmprpc.Observer`."""

    def call_ended(
        self, call: Call, outcome: Outcome, duration: float, token: Any, error: BaseException | None
    ) -> None:
        """See :class:`~gmprpc.Observer`."""
        key = call.method, outcome, call.msgid is None
        calls, durations = self._found.get(key) or self._find(*key)
        calls.inc()
        durations.observe(duration)

    def _find(self, method: str, outcome: Outcome, is_notification: bool) -> tuple[Counter, Histogram]:
        # Anybody can send any name: those of no method all have the same label.
        is_known = method in self._methods or method in _BUILTINS
        label = method if is_known else ""
        kind = "notification" if is_notification else "request"
        found = self._calls.labels(label, outcome, kind), self._durations.labels(label)
        if is_known:
            self._found[method, outcome, is_notification] = found
        return found
