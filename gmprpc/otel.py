"""OpenTelemetry: a span and a duration for each call of a client or a balancer; the extra is ``gmprpc[otel]``.

Names and attributes are those of the semantic conventions for RPC, version 1.44.0, as far as MessagePack-RPC has what
they speak of. It has no status codes, and no metadata in which a trace could go along with a call.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Mapping
from functools import wraps
from time import perf_counter, time_ns
from typing import Any, Final, Protocol, TypeVar, cast
from weakref import WeakSet

import gevent

from .exceptions import MethodNotFound
from .log import log, shown
from .reply import PendingCall
from .transport import UNIX_PREFIX

try:
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
    """Have ``target``, a Client or a Balancer, make a span for each call and measure its duration; returns ``target``.

    The span is a child of the caller's current one. It has the name of the method and ends with the call, to however
    many servers that was sent; the histogram ``rpc.client.call.duration`` takes the same time. ``error.type`` is the
    name of what the call raised, ``gmprpc.CallTimeout`` say. A method that the server doesn't have is called
    ``_OTHER``, so that there can't be any number of names, and its own is in the span's ``rpc.method_original`` only.

    Without providers it is the global ones, also if they are set later. What fails in them is logged, and disturbs no
    call. To do it again does nothing.

    Raises:
        TypeError: it is none of them.
    """
    if not all(hasattr(target, name) for name in ("address", "call", "call_async", "notify")):
        raise TypeError(f"neither a Client nor a Balancer: {target!r}")
    if target not in _instrumented:
        _instrumented.add(target)
        _instrument_caller(cast(_Caller, target), _Instruments(SpanKind.CLIENT, tracer_provider, meter_provider))
    return target


# The calling side.


def _instrument_caller(caller: _Caller, instruments: _Instruments) -> None:
    """Put what measures in the place of the methods of this one object, so that others don't pay for it."""
    call, call_async, notify = caller.call, caller.call_async, caller.notify
    server = _server_attributes(caller.address)

    def measured(function: Callable[..., Any]) -> Callable[..., Any]:
        @wraps(function)
        def ask(method: str, *params: Any, **options: Any) -> Any:
            if (measurement := instruments.begin(method, server)) is None:
                return function(method, *params, **options)
            try:
                result = function(method, *params, **options)
            except BaseException as exc:
                measurement.end(exc)
                raise
            measurement.end(None)
            return result

        return ask

    @wraps(call_async)
    def measured_async(method: str, *params: Any, **options: Any) -> PendingCall:
        if (measurement := instruments.begin(method, server)) is None:
            return call_async(method, *params, **options)
        try:
            pending = call_async(method, *params, **options)
        except BaseException as exc:
            measurement.end(exc)
            raise
        pending.rawlink(lambda ended: measurement.end(ended.exception))
        return pending

    caller.call, caller.call_async, caller.notify = measured(call), measured_async, measured(notify)


def _server_attributes(address: Any) -> dict[str, Any]:
    """What the conventions say about the server at ``address``, as it is known to those who call it."""
    if isinstance(address, tuple):
        return {"server.address": address[0], "server.port": address[1]}
    if isinstance(address, str):
        return {"server.address": address.removeprefix(UNIX_PREFIX)}
    return {}  # There are several, or it is a child process.


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

    def begin(self, method: str, attributes: Mapping[str, Any]) -> _Measurement | None:
        """Begin to measure a call that is made now and here; None if that fails."""
        try:
            return _Measurement(self, method, attributes)
        except Exception as exc:  # Samplers and processors may be anybody's.
            log(logger, logging.ERROR, "a span could not be started", exc_info=exc)
            return None


class _Measurement:
    """One call, from its beginning on."""

    __slots__ = ("_attributes", "_begun", "_begun_at", "_duration", "_method", "_span", "context")

    def __init__(self, instruments: _Instruments, method: str, attributes: Mapping[str, Any]) -> None:
        self._method = method
        self._attributes = {"rpc.system.name": SYSTEM_NAME, "rpc.method": method, **attributes}
        self._duration = instruments.duration
        self._begun_at, self._begun = time_ns(), perf_counter()
        self._span = instruments.tracer.start_span(
            method, kind=instruments.kind, attributes=self._attributes, start_time=self._begun_at
        )
        #: That in which the span is the current one.
        self.context = set_span_in_context(self._span)

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
            if exc is not None:
                self._fail(exc)
            self._duration.record(duration, self._attributes, context=self.context)
            self._span.end(self._begun_at + int(duration * 1e9))
        except Exception as failure:
            log(logger, logging.ERROR, "a call could not be recorded", exc_info=failure)

    def _fail(self, exc: BaseException) -> None:
        self._attributes["error.type"] = _name_of(type(exc))
        if isinstance(exc, MethodNotFound):
            self._attributes["rpc.method"] = _OTHER
            self._span.update_name(SYSTEM_NAME)
            self._span.set_attribute("rpc.method_original", shown(self._method))
        self._span.set_attributes(self._attributes)
        self._span.set_status(Status(StatusCode.ERROR, _message_of(exc)))


def _message_of(exc: BaseException) -> str | None:
    """What ``exc`` says, which may be what a peer has said, and any length of it."""
    try:
        return shown(str(exc)) or None
    except Exception:
        return None


def _name_of(kind: type[BaseException]) -> str:
    """The full name of a class of exceptions, as its users know it."""
    package, _, _ = kind.__module__.partition(".")
    if kind.__module__ == "builtins":
        return kind.__qualname__
    module = package if package == "gmprpc" else kind.__module__
    return f"{module}.{kind.__qualname__}"
