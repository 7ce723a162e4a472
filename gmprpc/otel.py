"""OpenTelemetry: a span and a duration for each call, at either end; the extra is ``gmprpc[otel]``.

Names and attributes are those of the semantic conventions for RPC, version 1.44.0, as far as MessagePack-RPC has what
they speak of. It has no status codes, and no metadata in which a trace could go along with a call: the spans of a
server begin traces of their own.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Container, Mapping
from functools import wraps
from time import perf_counter, time_ns
from types import MappingProxyType
from typing import Any, Final, Protocol, TypeVar, cast
from weakref import WeakSet

import gevent

from .connection import Call
from .exceptions import MethodNotFound
from .log import log, shown
from .methods import CANCEL, DESCRIBE, HEALTH, LIST
from .observing import Observer
from .outcome import Outcome
from .reply import PendingCall
from .server import Server
from .transport import UNIX_PREFIX, UnixPeer

try:
    from opentelemetry.context import attach
    from opentelemetry.metrics import MeterProvider, get_meter
    from opentelemetry.trace import SpanKind, Status, StatusCode, TracerProvider, get_tracer, set_span_in_context
except ImportError as exc:
    raise ImportError(f"{exc}: pip install 'gmprpc[otel]'", name=exc.name) from exc

logger = logging.getLogger("gmprpc.otel")

#: What ``rpc.system.name`` is, in the manner of the names that the conventions have: ``connectrpc``, ``jsonrpc``.
SYSTEM_NAME: Final = "msgpackrpc"

_SCHEMA_URL: Final = "https://opentelemetry.io/schemas/1.44.0"
# Those that the conventions advise, in seconds.
_BUCKETS: Final = (0.005, 0.01, 0.025, 0.05, 0.075, 0.1, 0.25, 0.5, 0.75, 1, 2.5, 5, 7.5, 10)
# What the conventions call a method that isn't known. Its name may be anything, and there may be any number of them.
_OTHER: Final = "_OTHER"
_BUILTINS: Final = frozenset((CANCEL, DESCRIBE, HEALTH, LIST))


class _Caller(Protocol):
    """What a :class:`~gmprpc.Client` and a :class:`~gmprpc.Balancer` have in common."""

    @property
    def address(self) -> Any:
        """Where the server is; None if there are several, and no one name for them."""

    call: Callable[..., Any]
    call_async: Callable[..., PendingCall]
    notify: Callable[..., None]


T = TypeVar("T")

# Weakly: to be measured keeps nothing alive.
_instrumented: WeakSet[Any] = WeakSet()


def instrument(
    target: T, *, tracer_provider: TracerProvider | None = None, meter_provider: MeterProvider | None = None
) -> T:
    """Have ``target``, a Server, Client or Balancer, make a span for each call and measure it; returns ``target``.

    A span has the name of the method. A client's is a child of the caller's current one and ends with the call, to
    however many servers that was sent. A server's is the current one in the handler and ends with the answer, also
    where that is deferred; a server is best instrumented before it is started, since the connections that are there
    already aren't measured. The same durations go to the histograms ``rpc.client.call.duration`` and
    ``rpc.server.call.duration``.

    ``error.type`` is the name of what the call has raised, ``gmprpc.CallTimeout`` say. On a server it is that of what
    the handler has raised where nobody expected that, and otherwise the :class:`~gmprpc.Outcome`. A method that there
    isn't is called ``_OTHER``, since anybody may call anything; its own name is only in the span, as
    ``rpc.method_original``.

    Without providers it is the global ones, also if they are set later. What fails in them is logged, and disturbs no
    call. To do it again does nothing.

    Raises:
        TypeError: it is none of them.
    """
    is_server = isinstance(target, Server)
    if not is_server and not all(hasattr(target, name) for name in ("address", "call", "call_async", "notify")):
        raise TypeError(f"neither a Server nor a Client nor a Balancer: {target!r}")
    if target not in _instrumented:
        _instrumented.add(target)
        kind = SpanKind.SERVER if is_server else SpanKind.CLIENT
        instruments = _Instruments(kind, tracer_provider, meter_provider)
        if isinstance(target, Server):
            target.add_observer(_ServerObserver(target.methods, instruments))
        else:
            _instrument_caller(cast(_Caller, target), instruments)
    return target


# The calling side.


def _instrument_caller(caller: _Caller, instruments: _Instruments) -> None:
    """Put what measures in the place of the methods of this one object, so that others don't pay for it."""
    call, call_async, notify = caller.call, caller.call_async, caller.notify
    server = _server_attributes(caller.address)

    def measured(function: Callable[..., Any]) -> Callable[..., Any]:
        @wraps(function)
        def ask(method: str, *params: Any, **options: Any) -> Any:
            if (outgoing := _Outgoing.begin(instruments, method, server)) is None:
                return function(method, *params, **options)
            try:
                result = function(method, *params, **options)
            except BaseException as exc:
                outgoing.end(exc)
                raise
            outgoing.end(None)
            return result

        return ask

    @wraps(call_async)
    def measured_async(method: str, *params: Any, **options: Any) -> PendingCall:
        if (outgoing := _Outgoing.begin(instruments, method, server)) is None:
            return call_async(method, *params, **options)
        try:
            pending = call_async(method, *params, **options)
        except BaseException as exc:
            outgoing.end(exc)
            raise
        pending.rawlink(lambda ended: outgoing.end(ended.exception))
        return pending

    caller.call, caller.call_async, caller.notify = measured(call), measured_async, measured(notify)


def _server_attributes(address: Any) -> dict[str, Any]:
    """What the conventions say about the server at ``address``, as it is known to those who call it."""
    if isinstance(address, tuple):
        return {"server.address": address[0], "server.port": address[1]}
    if isinstance(address, str):
        return {"server.address": address.removeprefix(UNIX_PREFIX)}
    return {}  # There are several, or it is a child process.


class _Outgoing:
    """A call of a client, from its beginning on."""

    __slots__ = ("_begun", "_measurement", "_method")

    def __init__(self, instruments: _Instruments, method: str, server: Mapping[str, Any]) -> None:
        self._begun = perf_counter()
        self._method = method
        self._measurement = _Measurement(instruments, method, server)

    @classmethod
    def begin(cls, instruments: _Instruments, method: str, server: Mapping[str, Any]) -> _Outgoing | None:
        """A call that is made now and here; None if it can't be measured."""
        try:
            return cls(instruments, method, server)
        except Exception as exc:  # Samplers and processors may be anybody's.
            log(logger, logging.ERROR, "a span could not be started", exc_info=exc)
            return None

    def end(self, exc: BaseException | None) -> None:
        """The call has ended, with ``exc`` if it has failed; may be called in the hub."""
        duration = perf_counter() - self._begun
        if gevent.getcurrent() is gevent.get_hub():
            # There are locks in the providers, and in what exports to a file or a collector much else to wait for.
            gevent.spawn(self._record, duration, exc)
        else:
            self._record(duration, exc)

    def _record(self, duration: float, exc: BaseException | None) -> None:
        try:
            if exc is None:
                self._measurement.end(duration)
                return
            if isinstance(exc, MethodNotFound):
                self._measurement.disown(self._method)
            self._measurement.end(duration, _name_of(type(exc)), exc)
        except Exception as failure:
            log(logger, logging.ERROR, "a call could not be recorded", exc_info=failure)


# The called side.


class _ServerObserver(Observer):
    """Measures the calls of a server."""

    def __init__(self, methods: Container[str], instruments: _Instruments) -> None:
        self._methods = methods
        self._instruments = instruments

    def call_started(self, call: Call) -> _Measurement:
        """See :meth:`gmprpc.Observer.call_started`."""
        about = _peer_attributes(call.peer)
        if call.msgid is not None:
            about["msgpackrpc.request.id"] = str(call.msgid)  # As the conventions have it for JSON-RPC.
        method: str | None = call.method
        if method not in self._methods and method not in _BUILTINS:
            about["rpc.method_original"] = shown(call.method)
            method = None
        measurement = _Measurement(self._instruments, method, {}, about)
        # Until the request's greenlet is given a fresh context for the next one: so that what is logged of a failure
        # belongs to the span, too.
        attach(measurement.context)
        return measurement

    def call_ended(
        self, call: Call, outcome: Outcome, duration: float, token: Any, error: BaseException | None
    ) -> None:
        """See :meth:`gmprpc.Observer.call_ended`."""
        if outcome is Outcome.OK:
            token.end(duration)
        elif outcome is Outcome.FAILED and error is not None:
            token.end(duration, _name_of(type(error)), error)
        else:
            token.end(duration, outcome.value, error)


def _peer_attributes(peer: Any) -> dict[str, Any]:
    """What the conventions say about who calls; "client" is who has connected to a proxy."""
    about = {}
    if (proxy := getattr(peer, "proxy", None)) is not None:
        about["client.address"], about["client.port"] = peer[:2]
        peer = proxy
    if isinstance(peer, tuple):
        about["network.peer.address"], about["network.peer.port"] = peer[:2]
    elif isinstance(peer, UnixPeer):
        about["network.peer.address"] = peer.path.removeprefix(UNIX_PREFIX)
    return about


# Both.


class _Instruments:
    """What measures the calls of one side."""

    def __init__(
        self, kind: SpanKind, tracer_provider: TracerProvider | None, meter_provider: MeterProvider | None
    ) -> None:
        self.kind = kind
        self.tracer = get_tracer("gmprpc", tracer_provider=tracer_provider, schema_url=_SCHEMA_URL)
        side, direction = ("client", "outgoing") if kind is SpanKind.CLIENT else ("server", "incoming")
        self.duration = get_meter("gmprpc", meter_provider=meter_provider, schema_url=_SCHEMA_URL).create_histogram(
            f"rpc.{side}.call.duration",
            unit="s",
            description=f"Measures the duration of an {direction} Remote Procedure Call (RPC).",
            explicit_bucket_boundaries_advisory=_BUCKETS,
        )


class _Measurement:
    """The span of one call, and what its duration is told with."""

    __slots__ = ("_attributes", "_begun_at", "_duration", "_span", "context")

    def __init__(
        self,
        instruments: _Instruments,
        method: str | None,
        attributes: Mapping[str, Any],
        about: Mapping[str, Any] = MappingProxyType({}),
    ) -> None:
        """A call that begins now; ``method`` is None if there is no such one, ``about`` is for the span only."""
        self._attributes = {"rpc.system.name": SYSTEM_NAME, "rpc.method": method or _OTHER, **attributes}
        self._duration = instruments.duration
        self._begun_at = time_ns()
        self._span = instruments.tracer.start_span(
            method or SYSTEM_NAME,
            kind=instruments.kind,
            attributes={**self._attributes, **about},
            start_time=self._begun_at,
        )
        #: That in which the span is the current one.
        self.context = set_span_in_context(self._span)

    def disown(self, method: str) -> None:
        """It turns out that there is no such ``method``."""
        self._attributes["rpc.method"] = _OTHER
        self._span.update_name(SYSTEM_NAME)
        self._span.set_attributes({"rpc.method": _OTHER, "rpc.method_original": shown(method)})

    def end(self, duration: float, error_type: str | None = None, error: BaseException | None = None) -> None:
        """The call has ended after ``duration`` seconds, and failed if there is an ``error_type``."""
        if error_type is not None:
            self._attributes["error.type"] = error_type
            self._span.set_attribute("error.type", error_type)
            self._span.set_status(Status(StatusCode.ERROR, None if error is None else _message_of(error)))
        self._duration.record(duration, self._attributes, context=self.context)
        self._span.end(self._begun_at + int(duration * 1e9))


def _message_of(exc: BaseException) -> str | None:
    """What ``exc`` says, which may be what a peer has said, and any length of it."""
    try:
        return shown(str(exc)) or None
    except Exception:
        return None


def _name_of(kind: type[BaseException]) -> str:
    """The full name of a class of exceptions, as its users know it."""
    if kind.__module__ == "builtins":
        return kind.__qualname__
    package, _, _ = kind.__module__.partition(".")
    return f"{package if package == 'gmprpc' else kind.__module__}.{kind.__qualname__}"
