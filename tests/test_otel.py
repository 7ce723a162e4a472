"""OpenTelemetry: what a call is told of as, at either end."""

from __future__ import annotations

import logging
import subprocess
import sys
from collections.abc import Iterator
from typing import Any

import gevent
import pytest
from gevent.event import Event
from opentelemetry import trace
from opentelemetry.sdk.metrics import MeterProvider
from opentelemetry.sdk.metrics.export import HistogramDataPoint, InMemoryMetricReader
from opentelemetry.sdk.trace import ReadableSpan, SpanProcessor, TracerProvider
from opentelemetry.sdk.trace.export import SimpleSpanProcessor
from opentelemetry.sdk.trace.export.in_memory_span_exporter import InMemorySpanExporter
from opentelemetry.trace import SpanKind, StatusCode

import gmprpc
from gmprpc.otel import instrument

from .helpers import Peer, Scripted, wait_until


class Collector:
    """Providers that keep everything in memory, and what they have got."""

    def __init__(self) -> None:
        self._exporter = InMemorySpanExporter()
        self._reader = InMemoryMetricReader()
        self.tracer_provider = TracerProvider(shutdown_on_exit=False)
        self.tracer_provider.add_span_processor(SimpleSpanProcessor(self._exporter))
        self.meter_provider = MeterProvider([self._reader], shutdown_on_exit=False)

    def instrument(self, target: Any) -> Any:
        """``target``, measured by these providers."""
        return instrument(target, tracer_provider=self.tracer_provider, meter_provider=self.meter_provider)

    def spans(self, kind: SpanKind) -> list[ReadableSpan]:
        """Those of one side, in the order in which they ended."""
        return [span for span in self._exporter.get_finished_spans() if span.kind is kind]

    def only_span(self, kind: SpanKind) -> ReadableSpan:
        """The one span of one side, when it has ended."""
        wait_until(lambda: self.spans(kind))
        (span,) = self.spans(kind)
        return span

    def durations(self, side: str) -> list[HistogramDataPoint]:
        """Those of the histogram of one side, by attributes."""
        data = self._reader.get_metrics_data()
        scopes = [scope for resource in data.resource_metrics for scope in resource.scope_metrics] if data else []
        metrics = [metric for scope in scopes for metric in scope.metrics]
        return [
            point
            for metric in metrics
            if metric.name == f"rpc.{side}.call.duration" and metric.unit == "s"
            for point in metric.data.data_points
            if isinstance(point, HistogramDataPoint)
        ]

    def shutdown(self) -> None:
        """End what the providers have at work."""
        self.tracer_provider.shutdown()
        self.meter_provider.shutdown()


@pytest.fixture
def collector() -> Iterator[Collector]:
    """What collects what a test has measured."""
    collector = Collector()
    yield collector
    collector.shutdown()


@pytest.fixture
def measured(server: gmprpc.Server, collector: Collector) -> Iterator[gmprpc.Client]:
    """A client of ``server`` that is measured."""
    with collector.instrument(gmprpc.Client(server.address)) as client:
        yield client


def error_of(span: ReadableSpan) -> tuple[Any, str | None]:
    """``error.type`` of a span that tells of an error, and what it says of that."""
    assert span.status.status_code is StatusCode.ERROR
    assert span.attributes is not None
    return span.attributes["error.type"], span.status.description


# The calling side.


def assert_measured(collector: Collector, side: str, span: ReadableSpan, attributes: Any) -> None:
    """The one call of a ``side`` has these attributes, the duration of ``span``, and leads to it."""
    (point,) = collector.durations(side)
    assert point.attributes == attributes
    assert point.count == 1
    assert span.start_time is not None
    assert span.end_time is not None
    assert span.end_time - span.start_time == int(point.sum * 1e9) > 0
    assert point.explicit_bounds == (0.005, 0.01, 0.025, 0.05, 0.075, 0.1, 0.25, 0.5, 0.75, 1, 2.5, 5, 7.5, 10)
    (exemplar,) = point.exemplars
    assert exemplar.span_id == span.get_span_context().span_id


def test_call_makes_a_client_span_and_takes_its_time(measured: gmprpc.Client, collector: Collector) -> None:
    assert measured.call("add", 1, 2) == 3
    span = collector.only_span(SpanKind.CLIENT)
    host, port = measured.address  # type: ignore[misc, str-unpack]  # It is that of a TCP server.
    attributes = {
        "rpc.system.name": "msgpackrpc",
        "rpc.method": "add",
        "server.address": host,
        "server.port": port,
    }
    assert span.name == "add"
    assert span.attributes == attributes
    assert span.status.status_code is StatusCode.UNSET
    assert span.instrumentation_scope is not None
    assert span.instrumentation_scope.name == "gmprpc"
    assert span.instrumentation_scope.schema_url == "https://opentelemetry.io/schemas/1.44.0"
    assert_measured(collector, "client", span, attributes)


@pytest.mark.parametrize("how", ["call", "call_async", "notify", "proxy"])
def test_each_way_to_call_is_measured_once(measured: gmprpc.Client, collector: Collector, how: str) -> None:
    if how == "call_async":
        assert measured.call_async("echo", 1).get() == 1
    elif how == "proxy":
        assert measured.proxy.echo(1) == 1
    else:
        getattr(measured, how)("echo", 1)
    assert collector.only_span(SpanKind.CLIENT).name == "echo"
    assert [point.count for point in collector.durations("client")] == [1]


def test_span_is_child_of_the_callers(measured: gmprpc.Client, collector: Collector) -> None:
    tracer = collector.tracer_provider.get_tracer("test")
    with tracer.start_as_current_span("own") as own:
        measured.call("echo", 1)
        measured.call_async("echo", 2).get()
    wait_until(lambda: len(collector.spans(SpanKind.CLIENT)) == 2)
    for span in collector.spans(SpanKind.CLIENT):
        assert span.parent is not None
        assert span.parent.span_id == own.get_span_context().span_id


def test_span_of_call_async_ends_with_the_answer(measured: gmprpc.Client, collector: Collector) -> None:
    pending = measured.call_async("hold", "value")
    measured.call("echo", 1)
    assert [span.name for span in collector.spans(SpanKind.CLIENT)] == ["echo"]
    measured.call("release")
    assert pending.get() == "value"
    wait_until(lambda: len(collector.spans(SpanKind.CLIENT)) == 3)
    hold = next(span for span in collector.spans(SpanKind.CLIENT) if span.name == "hold")
    echo = next(span for span in collector.spans(SpanKind.CLIENT) if span.name == "echo")
    assert hold.end_time is not None
    assert echo.end_time is not None
    assert hold.end_time > echo.end_time


def test_error_answer_is_told_of(measured: gmprpc.Client, collector: Collector) -> None:
    with pytest.raises(gmprpc.RemoteError):
        measured.call("fail", "no\n" + "x" * 1000)
    error_type, description = error_of(collector.only_span(SpanKind.CLIENT))
    assert error_type == "gmprpc.RemoteError"
    assert description is not None
    assert description.startswith("ValueError: no\\nx")
    assert len(description) < 300
    (point,) = collector.durations("client")
    assert point.attributes is not None
    assert point.attributes["error.type"] == "gmprpc.RemoteError"


def test_unknown_methods_share_one_name(measured: gmprpc.Client, collector: Collector) -> None:
    for number in range(3):
        with pytest.raises(gmprpc.MethodNotFound):
            measured.call(f"nonsense{number}")
    spans = collector.spans(SpanKind.CLIENT)
    assert {span.name for span in spans} == {"msgpackrpc"}
    assert [span.attributes and span.attributes["rpc.method_original"] for span in spans] == [
        "nonsense0",
        "nonsense1",
        "nonsense2",
    ]
    (point,) = collector.durations("client")
    assert point.count == 3
    assert point.attributes is not None
    assert point.attributes["rpc.method"] == "_OTHER"
    assert point.attributes["error.type"] == "gmprpc.MethodNotFound"
    assert "rpc.method_original" not in point.attributes


def test_call_that_is_given_up_is_told_of(measured: gmprpc.Client, collector: Collector) -> None:
    with pytest.raises(gmprpc.CallTimeout):
        measured.call("hold", 1, timeout=0.01)
    with pytest.raises(gevent.Timeout), gevent.Timeout(0.01):
        measured.call("hold", 2)
    caller = gevent.spawn(measured.call, "hold", 3)
    wait_until(lambda: measured.statistics()["pending"])
    caller.kill()
    measured.call_async("hold", 4).cancel()
    with pytest.raises(gmprpc.CallTimeout):
        measured.call_async("hold", 5, timeout=0.01).get()
    wait_until(lambda: len(collector.spans(SpanKind.CLIENT)) == 5)
    assert [error_of(span)[0] for span in collector.spans(SpanKind.CLIENT)] == [
        "gmprpc.CallTimeout",
        "gevent.timeout.Timeout",
        "greenlet.GreenletExit",
        "gmprpc.CallCancelled",
        "gmprpc.CallTimeout",
    ]
    measured.call("release")


def test_call_without_a_connection_is_told_of(collector: Collector, scripted: Scripted) -> None:
    scripted.go()
    client = collector.instrument(gmprpc.Client(scripted.address, retry_interval=None))
    with pytest.raises(gmprpc.ConnectFailed):
        client.call("echo", 1)
    with pytest.raises(gmprpc.ConnectFailed):
        client.notify("echo", 1)
    client.close()
    with pytest.raises(gmprpc.ConnectionClosed):
        client.call_async("echo", 1)
    assert [error_of(span)[0] for span in collector.spans(SpanKind.CLIENT)] == [
        "gmprpc.ConnectFailed",
        "gmprpc.ConnectFailed",
        "gmprpc.ConnectionClosed",
    ]


def test_call_in_a_callback_of_the_loop_is_measured(measured: gmprpc.Client, collector: Collector) -> None:
    measured.call("echo", 1)
    results: list[Any] = []

    def call() -> None:
        with pytest.raises(RuntimeError):
            measured.call("echo", 2)
        measured.call_async("echo", 3).rawlink(lambda pending: results.append(pending.value))

    gevent.get_hub().loop.run_callback(call)
    wait_until(lambda: len(collector.spans(SpanKind.CLIENT)) == 3)
    assert results == [3]


def test_server_address_is_that_of_the_client(collector: Collector, service: gmprpc.Service, tmp_path: Any) -> None:
    address = f"unix:{tmp_path}/socket"
    with gmprpc.Server(address, service), collector.instrument(gmprpc.Client(address)) as client:
        client.call("echo", 1)
    attributes = collector.only_span(SpanKind.CLIENT).attributes
    assert attributes is not None
    assert attributes["server.address"] == f"{tmp_path}/socket"
    assert "server.port" not in attributes


def test_balancers_call_is_one_span_over_all_endpoints(collector: Collector, service: gmprpc.Service) -> None:
    with gmprpc.Server(("127.0.0.1", 0), service) as one, gmprpc.Server(("127.0.0.1", 0), service) as other:
        balancer = collector.instrument(gmprpc.Balancer([one.address, other.address]))
        with balancer:
            wait_until(lambda: balancer.statistics()["usable_endpoints"] == 2)
            assert balancer.call("echo", 1) == 1
            assert balancer.call_async("echo", 2).get() == 2
            balancer.notify("echo", 3)
            wait_until(lambda: len(collector.spans(SpanKind.CLIENT)) == 3)  # No probe makes one.
    assert [span.attributes for span in collector.spans(SpanKind.CLIENT)] == [
        {"rpc.system.name": "msgpackrpc", "rpc.method": "echo"}
    ] * 3


def test_one_address_of_a_balancer_is_told(collector: Collector) -> None:
    assert gmprpc.Balancer("rpc.example:4423").address == ("rpc.example", 4423)
    assert gmprpc.Balancer(["127.0.0.1:4423"]).address == ("127.0.0.1", 4423)
    assert gmprpc.Balancer(lambda: ["127.0.0.1:4423"]).address is None
    balancer = collector.instrument(gmprpc.Balancer("rpc.example:4423"))
    balancer.close()
    with pytest.raises(gmprpc.ConnectionClosed):
        balancer.call("echo", 1)
    attributes = collector.only_span(SpanKind.CLIENT).attributes
    assert attributes is not None
    assert (attributes["server.address"], attributes["server.port"]) == ("rpc.example", 4423)


# The called side.


@pytest.fixture
def measuring(server: gmprpc.Server, collector: Collector) -> Iterator[Peer]:
    """A connection to ``server``, which is measured."""
    collector.instrument(server)
    with Peer.connect(server.address) as peer:
        yield peer


def test_request_makes_a_server_span_and_takes_its_time(measuring: Peer, collector: Collector) -> None:
    assert measuring.call("add", 1, 2, msgid=7) == [1, 7, None, 3]
    span = collector.only_span(SpanKind.SERVER)
    host, port = measuring.socket.getsockname()
    attributes = {"rpc.system.name": "msgpackrpc", "rpc.method": "add"}
    assert span.name == "add"
    assert span.parent is None
    assert span.attributes == {
        **attributes,
        "network.peer.address": host,
        "network.peer.port": port,
        "msgpackrpc.request.id": "7",
    }
    assert span.status.status_code is StatusCode.UNSET
    assert_measured(collector, "server", span, attributes)


def test_notification_is_measured_like_a_request(measuring: Peer, collector: Collector) -> None:
    measuring.send([2, "echo", [1]])
    span = collector.only_span(SpanKind.SERVER)
    assert span.name == "echo"
    assert span.attributes is not None
    assert "msgpackrpc.request.id" not in span.attributes
    assert [point.count for point in collector.durations("server")] == [1]


def test_spans_in_a_handler_are_children_of_the_calls_and_of_no_other(
    service: gmprpc.Service, measuring: Peer, collector: Collector
) -> None:
    tracer = collector.tracer_provider.get_tracer("test")

    @service.method
    def work(value: Any) -> Any:
        with tracer.start_as_current_span(f"inner {value}"):
            gevent.sleep(0.001)
        return value

    measuring.send(*([0, number, "work", [number]] for number in range(5)), [0, 5, "echo", [1]])
    for _ in range(6):
        measuring.receive()
    wait_until(lambda: len(collector.spans(SpanKind.SERVER)) == 6)
    outer = {span.get_span_context().span_id: span for span in collector.spans(SpanKind.SERVER)}
    assert all(span.parent is None for span in outer.values())
    inner = collector.spans(SpanKind.INTERNAL)
    assert sorted((span.name, parent_of(span, outer)["msgpackrpc.request.id"]) for span in inner) == [
        (f"inner {number}", str(number)) for number in range(5)
    ]


def parent_of(span: ReadableSpan, spans: dict[int, ReadableSpan]) -> Any:
    """The attributes of the span that is the parent of ``span``."""
    assert span.parent is not None
    return spans[span.parent.span_id].attributes


def test_span_is_the_current_one_in_a_native_thread(
    service: gmprpc.Service, measuring: Peer, collector: Collector
) -> None:
    @service.method(threadpool=True)
    def work() -> str:
        return f"{trace.get_current_span().get_span_context().span_id:x}"

    answer = measuring.call("work")
    assert answer[3] == f"{collector.only_span(SpanKind.SERVER).get_span_context().span_id:x}"


def test_span_of_a_deferred_reply_ends_with_the_answer(
    service: gmprpc.Service, measuring: Peer, collector: Collector
) -> None:
    replies: list[gmprpc.Reply] = []
    service.register(replies.append, "defer", deferred=True)
    measuring.send([0, 1, "defer", []])
    assert measuring.call("echo", 1) == [1, 0, None, 1]
    wait_until(lambda: collector.spans(SpanKind.SERVER))
    assert [span.name for span in collector.spans(SpanKind.SERVER)] == ["echo"]
    replies.pop().error("no")
    assert measuring.receive() == [1, 1, "no", None]
    wait_until(lambda: len(collector.spans(SpanKind.SERVER)) == 2)
    assert error_of(collector.spans(SpanKind.SERVER)[1]) == ("error", "no")


def test_each_kind_of_failure_is_told_of(
    service: gmprpc.Service, collector: Collector, measuring: Peer, caplog: pytest.LogCaptureFixture
) -> None:
    @service.method
    def refuse() -> None:
        raise gmprpc.ErrorResponse({"code": 5})

    @service.method
    def odd() -> object:
        return object()

    @service.method
    def wait() -> None:
        Event().wait()

    measuring.send([0, 1, "wait", []])
    measuring.send([2, "$/cancel", [1]])
    measuring.receive()
    for method in ("refuse", "odd", "fail", "add"):
        measuring.call(method, *["no\n" * 200][: method == "fail"])
    wait_until(lambda: len(collector.spans(SpanKind.SERVER)) == 6)
    errors = {span.name: error_of(span) for span in collector.spans(SpanKind.SERVER) if span.name != "$/cancel"}
    assert {name: error_type for name, (error_type, _) in errors.items()} == {
        "wait": "cancelled",
        "refuse": "error",
        "odd": "TypeError",
        "fail": "ValueError",
        "add": "invalid_params",
    }
    assert all(
        description and len(description) < 1000 and "\n" not in description for _, description in errors.values()
    )
    assert {
        (point.attributes["rpc.method"], point.attributes.get("error.type"))
        for point in collector.durations("server")
        if point.attributes
    } == {("$/cancel", None), *((name, error_type) for name, (error_type, _) in errors.items())}


def test_what_is_logged_of_a_call_belongs_to_the_span(
    server: gmprpc.Server, collector: Collector, caplog: pytest.LogCaptureFixture
) -> None:
    server.add_observer(gmprpc.AccessLog())
    caplog.set_level(logging.INFO, "gmprpc.access")
    logged: list[tuple[str, int]] = []

    class Handler(logging.Handler):
        def emit(self, record: logging.LogRecord) -> None:
            logged.append((record.name, trace.get_current_span().get_span_context().span_id))

    handler = Handler()
    logging.getLogger("gmprpc").addHandler(handler)
    try:
        with Peer.connect(collector.instrument(server).address) as peer:
            peer.call("fail", "no")
            wait_until(lambda: len(logged) == 2)
    finally:
        logging.getLogger("gmprpc").removeHandler(handler)
    span_id = collector.only_span(SpanKind.SERVER).get_span_context().span_id
    assert logged == [("gmprpc.connection", span_id), ("gmprpc.access", span_id)]


def test_unknown_methods_of_a_server_share_one_name(measuring: Peer, collector: Collector) -> None:
    for method in ("nonsense", "$/nonsense", "x" * 100_000, "line\nbreak"):
        measuring.call(method)
    wait_until(lambda: len(collector.spans(SpanKind.SERVER)) == 4)
    spans = collector.spans(SpanKind.SERVER)
    assert {span.name for span in spans} == {"msgpackrpc"}
    originals = [str(span.attributes["rpc.method_original"]) for span in spans if span.attributes]
    assert originals[:2] + originals[3:] == ["nonsense", "$/nonsense", "line\\nbreak"]
    assert len(originals[2]) < 300
    (point,) = collector.durations("server")
    assert point.attributes == {
        "rpc.system.name": "msgpackrpc",
        "rpc.method": "_OTHER",
        "error.type": "unknown_method",
    }


def test_built_in_methods_have_their_names(measuring: Peer, collector: Collector) -> None:
    for method in ("$/health", "$/list"):
        measuring.call(method)
    measuring.call("$/describe", "add")
    wait_until(lambda: len(collector.spans(SpanKind.SERVER)) == 3)
    assert [span.name for span in collector.spans(SpanKind.SERVER)] == ["$/health", "$/list", "$/describe"]


def test_peer_of_a_unix_socket_and_behind_a_proxy_is_told(
    collector: Collector, service: gmprpc.Service, tmp_path: Any
) -> None:
    address = f"unix:{tmp_path}/socket"
    server = collector.instrument(gmprpc.Server(address, service, proxy_protocol="auto"))
    with server:
        with Peer.connect(server.address) as peer:
            peer.call("echo", 1)
        with Peer.connect(server.address) as peer:
            peer.send_bytes(b"PROXY TCP4 192.0.2.1 192.0.2.2 1234 4423\r\n")
            peer.call("echo", 1)
        wait_until(lambda: len(collector.spans(SpanKind.SERVER)) == 2)
    direct, proxied = (dict(span.attributes or {}) for span in collector.spans(SpanKind.SERVER))
    assert direct["network.peer.address"] == f"{tmp_path}/socket"
    assert "client.address" not in direct
    assert proxied["network.peer.address"] == f"{tmp_path}/socket"
    assert (proxied["client.address"], proxied["client.port"]) == ("192.0.2.1", 1234)


def test_call_from_a_handler_is_a_child_of_the_call_that_it_serves(
    service: gmprpc.Service, measuring: Peer, measured: gmprpc.Client, collector: Collector
) -> None:
    service.register(lambda: measured.call("echo", 1), "ask")
    assert measuring.call("ask") == [1, 0, None, 1]
    wait_until(lambda: len(collector.spans(SpanKind.SERVER)) == 2)
    ask = next(span for span in collector.spans(SpanKind.SERVER) if span.name == "ask")
    echo = next(span for span in collector.spans(SpanKind.SERVER) if span.name == "echo")
    call = collector.only_span(SpanKind.CLIENT)
    assert call.parent is not None
    assert call.parent.span_id == ask.get_span_context().span_id
    assert echo.parent is None  # The protocol has no place for it.


def test_server_that_is_instrumented_twice_is_measured_once(
    server: gmprpc.Server, measuring: Peer, collector: Collector
) -> None:
    assert collector.instrument(server) is server
    measuring.call("echo", 1)
    collector.only_span(SpanKind.SERVER)


# Both.


def test_instrumented_twice_is_measured_once(measured: gmprpc.Client, collector: Collector) -> None:
    assert collector.instrument(measured) is measured
    measured.call("echo", 1)
    assert len(collector.spans(SpanKind.CLIENT)) == 1


def test_others_are_not_measured(measured: gmprpc.Client, client: gmprpc.Client, collector: Collector) -> None:
    client.call("echo", 1)
    assert not collector.spans(SpanKind.CLIENT)
    assert not {"call", "call_async", "notify"} & vars(client).keys()


def test_what_fails_in_a_provider_disturbs_no_call(
    server: gmprpc.Server, collector: Collector, caplog: pytest.LogCaptureFixture
) -> None:
    class Broken(SpanProcessor):
        def on_start(self, span: Any, parent_context: Any = None) -> None:
            if span.attributes["rpc.method"] == "add":
                raise RuntimeError("broken at the start")

        def on_end(self, span: Any) -> None:
            raise RuntimeError("broken at the end")

    collector.tracer_provider.add_span_processor(Broken())
    with collector.instrument(gmprpc.Client(server.address)) as client:
        assert client.call("add", 1, 2) == 3
        assert client.call_async("add", 1, 2).get() == 3
        assert client.call("echo", 1) == 1
    assert [record.message for record in caplog.records if record.name == "gmprpc.otel"] == [
        "a span could not be started",
        "a span could not be started",
        "a call could not be recorded",
    ]


def test_without_a_provider_calls_go_their_way(server: gmprpc.Server) -> None:
    with instrument(gmprpc.Client(server.address)) as client:
        assert client.call("echo", 1) == 1
        assert client.call_async("echo", 2).get() == 2


def test_only_what_calls_or_is_called_can_be_instrumented() -> None:
    with pytest.raises(TypeError, match="neither a Server nor"):
        instrument(object())


def test_package_does_without_opentelemetry() -> None:
    program = """
import sys
import gmprpc, gmprpc.cli
assert not any(name.partition(".")[0] == "opentelemetry" for name in sys.modules)
sys.modules["opentelemetry"] = None
try:
    import gmprpc.otel
except ImportError as exc:
    print(exc)
"""
    run = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True)
    assert "pip install 'gmprpc[otel]'" in run.stdout
