"""Metrics tell Prometheus what servers have carried out, and no more series than there are methods."""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Iterator
from typing import Any

import gevent
import pytest
from gevent import socket
from prometheus_client import CollectorRegistry, Counter
from prometheus_client.openmetrics.parser import text_string_to_metric_families as parse_openmetrics
from prometheus_client.parser import text_string_to_metric_families as parse_text

import gmprpc
from gmprpc import prometheus
from gmprpc.admin import AdminServer
from gmprpc.pool import GAUGES, Pool

from .helpers import Peer, Scripted, wait_until
from .http import get


@pytest.fixture
def registry() -> CollectorRegistry:
    """One that has nothing yet."""
    return CollectorRegistry()


@pytest.fixture
def observed(service: gmprpc.Service, registry: CollectorRegistry) -> Iterator[gmprpc.Server]:
    """A server of ``service`` that ``registry`` tells of."""
    server = gmprpc.Server(("127.0.0.1", 0), service, reply_timeout=10)
    prometheus.observe(server, registry=registry)
    with server:
        yield server


def calls(registry: CollectorRegistry) -> dict[tuple[str, str, str], float]:
    """How often each (method, outcome, kind) has been called."""
    return {
        (sample.labels["method"], sample.labels["outcome"], sample.labels["kind"]): sample.value
        for metric in registry.collect()
        for sample in metric.samples
        if sample.name == "gmprpc_calls_total"
    }


# Calls.


@pytest.mark.parametrize(
    "method, params, outcome",
    [
        ("add", [1, 2], "ok"),
        ("fail", ["on purpose"], "failed"),
        ("add", [1], "invalid_params"),
        ("refuse", [], "error"),
        ("$/health", [], "ok"),
    ],
)
def test_calls_are_counted_by_method_and_outcome(
    observed: gmprpc.Server, registry: CollectorRegistry, method: str, params: list[Any], outcome: str
) -> None:
    @observed.method
    def refuse() -> None:
        raise gmprpc.ErrorResponse("no")

    with Peer.connect(observed.address) as peer:
        for _ in range(3):
            peer.call(method, *params)
        peer.send([2, method, params])
        wait_until(lambda: len(calls(registry)) == 2)
    assert calls(registry) == {(method, outcome, "request"): 3, (method, outcome, "notification"): 1}


def test_durations_are_measured_by_method(observed: gmprpc.Server, registry: CollectorRegistry) -> None:
    @observed.method
    def sleep() -> None:
        gevent.sleep(0.003)

    with Peer.connect(observed.address) as peer:
        peer.call("sleep")
        peer.call("sleep")
        peer.call("add", 1, 2)
        wait_until(lambda: len(calls(registry)) == 2)

    def value(suffix: str, **labels: str) -> float | None:
        return registry.get_sample_value(f"gmprpc_call_duration_seconds_{suffix}", labels)

    assert value("count", method="sleep") == 2
    assert (value("sum", method="sleep") or 0) >= 0.006
    assert value("bucket", method="sleep", le="0.0025") == 0
    assert value("bucket", method="sleep", le="+Inf") == 2
    assert value("count", method="add") == 1


def test_a_deferred_call_has_ended_when_it_is_answered(observed: gmprpc.Server, registry: CollectorRegistry) -> None:
    replies: list[Any] = []
    observed.reg_cb(later=lambda reply: replies.append(reply))
    with Peer.connect(observed.address) as peer:
        peer.send([0, 0, "later", []])
        wait_until(lambda: replies)
        assert calls(registry) == {}
        assert registry.get_sample_value("gmprpc_calls_in_flight") == 1
        replies[0].result(None)
        peer.receive()
        wait_until(lambda: calls(registry))
    assert calls(registry) == {("later", "ok", "request"): 1}


def test_names_that_nobody_registered_are_all_the_same(observed: gmprpc.Server, registry: CollectorRegistry) -> None:
    with Peer.connect(observed.address) as peer:
        for number in range(50):
            peer.call(f"method_{number}")
            peer.call(f"$/method_{number}")
        wait_until(lambda: calls(registry).get(("", "unknown_method", "request")) == 100)
    assert len(calls(registry)) == 1


def test_a_method_whose_name_is_no_text_is_an_invalid_message(
    observed: gmprpc.Server, registry: CollectorRegistry
) -> None:
    with Peer.connect(observed.address) as peer:
        peer.send_bytes(b"\x94\x00\x01\xc4\x02\xff\xfe\x90")
        peer.receive()
        assert registry.get_sample_value("gmprpc_invalid_messages_total") == 1


def test_names_that_nobody_registered_are_the_same_also_where_a_hook_refuses_them(
    service: gmprpc.Service, registry: CollectorRegistry
) -> None:
    def refuse(*_: Any) -> None:
        raise gmprpc.ErrorResponse("go away")

    server = gmprpc.Server(("127.0.0.1", 0), service, on_dispatch=refuse)
    prometheus.observe(server, registry=registry)
    with server, Peer.connect(server.address) as peer:
        for number in range(50):
            peer.call(f"method_{number}")
        wait_until(lambda: calls(registry).get(("", "error", "request")) == 50)
    assert len(calls(registry)) == 1


def test_a_method_that_is_registered_later_has_its_name(observed: gmprpc.Server, registry: CollectorRegistry) -> None:
    with Peer.connect(observed.address) as peer:
        peer.call("late")
        observed.register(lambda: None, "late")
        peer.call("late")
        observed.unregister("late")
        peer.call("late")
        wait_until(lambda: sum(calls(registry).values()) == 3)
    assert calls(registry) == {("", "unknown_method", "request"): 2, ("late", "ok", "request"): 1}


# What servers count themselves.


def test_connections_and_bytes_are_told(observed: gmprpc.Server, registry: CollectorRegistry) -> None:
    with Peer.connect(observed.address) as peer:
        peer.call("echo", "hello")
        assert registry.get_sample_value("gmprpc_open_connections") == 1
    with Peer.connect(observed.address) as peer:
        peer.send_bytes(b"\xc1")
        peer.receive_rest()
    wait_until(lambda: registry.get_sample_value("gmprpc_open_connections") == 0)
    assert registry.get_sample_value("gmprpc_connections_total") == 2
    assert registry.get_sample_value("gmprpc_failed_connections_total") == 1
    assert registry.get_sample_value("gmprpc_protocol_errors_total") == 1
    assert registry.get_sample_value("gmprpc_received_bytes_total") == 15 + 1
    assert registry.get_sample_value("gmprpc_sent_bytes_total") == 10


def test_whether_it_is_serving_is_told(observed: gmprpc.Server, registry: CollectorRegistry) -> None:
    assert registry.get_sample_value("gmprpc_serving") == 1
    observed.is_healthy = False
    assert registry.get_sample_value("gmprpc_serving") == 0


def test_several_servers_are_told_of_together_and_each_once(
    observed: gmprpc.Server, registry: CollectorRegistry
) -> None:
    other = gmprpc.Server(("127.0.0.1", 0), observed.service)
    for server in (other, observed, other):
        prometheus.observe(server, registry=registry)
    with other:
        for server in (observed, other):
            with Peer.connect(server.address) as peer:
                peer.call("add", 1, 2)
        wait_until(lambda: calls(registry) == {("add", "ok", "request"): 2})
    assert registry.get_sample_value("gmprpc_connections_total") == 2


def test_a_server_may_be_observed_for_several_registries(observed: gmprpc.Server, registry: CollectorRegistry) -> None:
    other = CollectorRegistry()
    prometheus.observe(observed, registry=other)
    with Peer.connect(observed.address) as peer:
        peer.call("add", 1, 2)
        wait_until(lambda: calls(registry) and calls(other))
    assert calls(registry) == calls(other) == {("add", "ok", "request"): 1}


def test_a_name_that_is_taken_is_an_error(registry: CollectorRegistry) -> None:
    other = gmprpc.Server(None)
    prometheus.observe(other, registry=registry)
    with pytest.raises(ValueError, match="gmprpc_calls"):
        Counter("gmprpc_calls", "The application's own.", registry=registry)


# Clients.


def test_a_client_is_told_of_by_its_address(server: gmprpc.Server, registry: CollectorRegistry) -> None:
    client = gmprpc.Client(server.address)
    prometheus.observe(client, registry=registry)
    prometheus.observe(client, registry=registry)
    labels = {"client": f"127.0.0.1:{server.server_port}"}
    assert registry.get_sample_value("gmprpc_client_connections_total", labels) == 0
    with client:
        call = client.call_async("hold", 1)
        assert registry.get_sample_value("gmprpc_client_pending_calls", labels) == 1
        assert registry.get_sample_value("gmprpc_client_open_connections", labels) == 1
        client.call("release")
        assert call.get() == 1
    assert registry.get_sample_value("gmprpc_client_connections_total", labels) == 1
    assert registry.get_sample_value("gmprpc_client_pending_calls", labels) == 0
    assert registry.get_sample_value("gmprpc_client_endpoints", labels) is None
    assert registry.get_sample_value("gmprpc_serving") is None


def test_late_answers_are_told(scripted: Scripted, registry: CollectorRegistry) -> None:
    client = gmprpc.Client(scripted.address)
    prometheus.observe(client, name="slow", registry=registry)
    with client:
        call = client.call_async("slow")
        peer = scripted.accept()
        _, msgid, *_ = peer.receive()
        call.cancel(tell=False)
        peer.send([1, msgid, None, 1])
        wait_until(lambda: registry.get_sample_value("gmprpc_client_late_answers_total", {"client": "slow"}) == 1)


def test_clients_of_one_name_are_told_of_together(server: gmprpc.Server, registry: CollectorRegistry) -> None:
    with gmprpc.Client(server.address) as first, gmprpc.Client(server.address) as second:
        for client in (first, second):
            prometheus.observe(client, name="both", registry=registry)
        assert registry.get_sample_value("gmprpc_client_connections_total", {"client": "both"}) == 2


def test_a_balancer_is_told_of(server: gmprpc.Server, registry: CollectorRegistry) -> None:
    with gmprpc.Balancer([server.address]) as balancer:
        prometheus.observe(balancer, name="fleet", registry=registry)
        balancer.call("echo", 1)
        assert registry.get_sample_value("gmprpc_client_usable_endpoints", {"client": "fleet"}) == 1
        assert registry.get_sample_value("gmprpc_client_connections_total", {"client": "fleet"}) == 1
        assert registry.get_sample_value("gmprpc_client_ejections_total", {"client": "fleet"}) == 0


def test_every_number_that_is_told_is_one_of_the_statistics(server: gmprpc.Server, client: gmprpc.Client) -> None:
    assert set(prometheus._OF_SERVERS) <= {*server.statistics(), "is_serving"}
    of_balancers = {*Pool.COUNTS, *GAUGES}
    assert set(prometheus._OF_CLIENTS) <= {*client.statistics(), *of_balancers}
    assert of_balancers <= {*prometheus._OF_CLIENTS, "in_flight"}


# Over HTTP.


@pytest.fixture
def admin(registry: CollectorRegistry, observed: gmprpc.Server) -> Iterator[Any]:
    """Where ``/metrics`` tells what ``registry`` does."""
    pages = {"/metrics": prometheus.metrics_page(registry)}
    with AdminServer(("127.0.0.1", 0), is_ready=lambda: True, pages=pages) as admin:
        yield admin.address


def test_metrics_are_shown_as_text(admin: Any, observed: gmprpc.Server, registry: CollectorRegistry) -> None:
    with Peer.connect(observed.address) as peer:
        peer.call("add", 1, 2)
        wait_until(lambda: calls(registry))
    answer = get(admin, "/metrics")
    assert answer.status == 200
    assert answer.headers["content-type"].startswith("text/plain; version=")
    families = {family.name: family for family in parse_text(answer.body.decode())}
    assert {sample.labels["method"] for sample in families["gmprpc_calls"].samples} == {"add"}
    assert families["gmprpc_call_duration_seconds"].type == "histogram"
    assert families["gmprpc_open_connections"].type == "gauge"
    head = get(admin, "/metrics", "HEAD")
    assert (head.status, head.body) == (200, b"")


def test_metrics_are_shown_as_openmetrics_to_who_asks_for_it(admin: Any) -> None:
    answer = get(admin, "/metrics", headers="Accept: application/openmetrics-text; version=1.0.0\r\n")
    assert answer.headers["content-type"].startswith("application/openmetrics-text")
    families = {family.name: family for family in parse_openmetrics(answer.body.decode())}
    assert families["gmprpc_received_bytes"].type == "counter"


def test_some_metrics_can_be_asked_for(admin: Any) -> None:
    answer = get(admin, "/metrics?name[]=gmprpc_serving")
    assert [family.name for family in parse_text(answer.body.decode())] == ["gmprpc_serving"]


def test_a_process_is_ready_while_its_servers_are_serving_and_alive_until_the_end(service: gmprpc.Service) -> None:
    server = gmprpc.Server(("127.0.0.1", 0), service)
    with prometheus.admin_server(("127.0.0.1", 0), server) as admin, server:
        assert get(admin.address, "/readyz").status == 200
        server.is_healthy = False
        assert get(admin.address, "/readyz").status == 503
        server.is_healthy = True
        with Peer.connect(server.address) as peer:
            peer.send([0, 0, "hold", [1]])
            wait_until(lambda: server.statistics()["in_flight"] == 1)
            stopping = gevent.spawn(server.stop)
            wait_until(lambda: get(admin.address, "/readyz").status == 503)
            assert get(admin.address, "/livez").status == 200
            assert b"gmprpc_calls_in_flight 1.0\n" in get(admin.address, "/metrics").body
            server.service.methods["release"]()
            assert peer.receive() == [1, 0, None, 1]
        stopping.join()
        assert get(admin.address, "/livez").status == 200
        address = admin.address
    with pytest.raises(ConnectionRefusedError):
        socket.create_connection(address)


# The extra.


def test_gmprpc_does_without_it() -> None:
    program = "import sys, gmprpc, gmprpc.cli; assert not {'prometheus_client', 'gevent.pywsgi'} & {*sys.modules}"
    subprocess.run([sys.executable, "-c", program], check=True)


def test_without_it_one_line_says_what_to_install() -> None:
    program = "import sys; sys.modules['prometheus_client'] = None; import gmprpc.prometheus"
    ended = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True)
    assert ended.stderr.splitlines()[-1].endswith(": pip install 'gmprpc[metrics]'")
