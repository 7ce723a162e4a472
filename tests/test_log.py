"""Whatever happens to the log, nothing else happens because of it."""

from __future__ import annotations

import io
import json
import logging
import re
import sys
from typing import Any

import gevent
import pytest

import gmprpc
from gmprpc.log import JSONFormatter, log, log_soon, shown

from .helpers import Peer, Scripted, wait_until

logger = logging.getLogger("gmprpc.test_log")


def test_what_a_peer_has_sent_takes_a_part_of_one_line() -> None:
    assert shown("méthode") == "méthode"
    assert shown("a\nWARNING forged\x1b[2J\u2028\ud800") == r"a\nWARNING forged\x1b[2J\u2028\ud800"
    assert shown("x" * 200) == "x" * 200
    assert shown("x" * 201) == "x" * 200 + "..."
    assert len(shown("\n" * 2**20)) < 1000


class Broken(logging.Handler):
    """Has no room left."""

    def emit(self, record: logging.LogRecord) -> None:
        raise OSError(28, "No space left on device")


@pytest.fixture
def broken_log() -> Any:
    handler = Broken()
    logger.addHandler(handler)
    yield
    logger.removeHandler(handler)


def test_a_line_names_the_place_that_wrote_it(caplog: pytest.LogCaptureFixture) -> None:
    log(logger, logging.WARNING, "%s and %d", "text", 5, exc_info=ValueError("no"))
    (record,) = caplog.records
    assert (record.getMessage(), record.levelname, record.filename) == ("text and 5", "WARNING", "test_log.py")
    assert "ValueError: no" in caplog.text


def test_a_line_may_be_written_by_a_callback_of_the_loop(caplog: pytest.LogCaptureFixture) -> None:
    gevent.get_hub().loop.run_callback(log_soon, logger, logging.WARNING, "%s", "soon")
    gevent.sleep(0)
    gevent.idle()
    assert [record.getMessage() for record in caplog.records] == ["soon"]


@pytest.mark.usefixtures("broken_log")
def test_a_log_that_fails_is_shown_where_gevent_shows_what_it_cant_raise(capfd: pytest.CaptureFixture[str]) -> None:
    log(logger, logging.WARNING, "lost")
    assert "No space left on device" in capfd.readouterr().err


@pytest.mark.usefixtures("broken_log")
def test_a_log_that_fails_is_no_reason_for_the_program_to_end(capfd: pytest.CaptureFixture[str]) -> None:
    gevent.spawn(log, logger, logging.WARNING, "lost").join()  # The main greenlet, which waits, isn't struck.
    log_soon(logger, logging.WARNING, "lost, too")
    gevent.sleep(0)
    gevent.idle()
    assert capfd.readouterr().err.count("No space left on device") >= 2


class Full(io.TextIOBase):
    """Is on the same disk."""

    def write(self, text: str) -> int:
        raise OSError(28, "No space left on device")


@pytest.mark.usefixtures("broken_log")
def test_standard_error_may_fail_too(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys, "stderr", Full())
    monkeypatch.setitem(vars(gevent.get_hub()), "exception_stream", Full())
    log(logger, logging.WARNING, "lost")


# What a line is about


def fields(record: logging.LogRecord) -> dict[str, Any]:
    """What the record tells beside its text, but for the time that something took."""
    names = ("method", "msgid", "peer", "outcome", "duration")
    told = {name: value for name, value in vars(record).items() if name in names}
    assert told.pop("duration", 0.0) >= 0
    return told


def peer_name(peer: Peer) -> str:
    """As the log of the server calls it."""
    host, port = peer.socket.getsockname()[:2]
    return f"{host}:{port}"


@pytest.mark.parametrize("observers", [(), (gmprpc.Observer,)])
def test_a_line_about_a_call_has_fields_that_say_which(
    service: gmprpc.Service, caplog: pytest.LogCaptureFixture, observers: tuple[Any, ...]
) -> None:
    class Seen(gmprpc.Observer):
        pass

    def late(reply: gmprpc.Reply) -> None:
        reply.result(5)
        raise ValueError("x")

    service.reg_cb(late=late)
    with (
        gmprpc.Server(("127.0.0.1", 0), service, observers=[Seen() for _ in observers]) as server,
        Peer.connect(server.address) as peer,
    ):
        name = peer_name(peer)
        peer.call("fail", "x", msgid=7)
        peer.send([2, "fail", ["x"]])
        peer.send([2, "no\nsuch", []])
        peer.call("late", msgid=8)
        wait_until(lambda: len(caplog.records) == 4)
    assert [fields(record) for record in caplog.records] == [
        {"method": "fail", "msgid": 7, "peer": name, "outcome": "failed"},
        {"method": "fail", "msgid": None, "peer": name, "outcome": "failed"},
        {"method": r"no\nsuch", "msgid": None, "peer": name, "outcome": "unknown_method"},
        {"method": "late", "msgid": 8, "peer": name},
    ]
    assert [hasattr(record, "duration") for record in caplog.records] == [*[bool(observers)] * 3, False]


def test_a_line_about_a_request_that_took_too_long_says_how_long(
    service: gmprpc.Service, caplog: pytest.LogCaptureFixture
) -> None:
    @service.method
    def stubborn() -> None:
        try:
            gevent.sleep(1000)
        except gmprpc.CallCancelled:
            raise ValueError("while it cleaned up") from None

    with (
        gmprpc.Server(("127.0.0.1", 0), service, reply_timeout=0.01) as server,
        Peer.connect(server.address) as peer,
    ):
        name = peer_name(peer)
        peer.call("stubborn", msgid=1)
        wait_until(lambda: len(caplog.records) == 2)
    expired, failed = sorted(caplog.records, key=lambda record: record.levelno)
    assert expired.getMessage() == f"request 1 of stubborn from {name}: no answer within 0.01 s"
    assert fields(expired) == {"method": "stubborn", "msgid": 1, "peer": name, "outcome": "expired"}
    assert vars(expired)["duration"] == 0.01
    assert failed.getMessage() == f"request 1 of stubborn from {name} failed"
    assert fields(failed) == {"method": "stubborn", "msgid": 1, "peer": name, "outcome": "failed"}


def test_a_line_about_a_connection_has_the_peer_as_a_field(
    service: gmprpc.Service, caplog: pytest.LogCaptureFixture
) -> None:
    def fail(*_: Any) -> None:
        raise ValueError("x")

    with (
        gmprpc.Server(("127.0.0.1", 0), service, on_error=fail) as server,
        Peer.connect(server.address) as peer,
    ):
        name = peer_name(peer)
        peer.send([2, "echo", 5])
        wait_until(lambda: len(caplog.records) == 1)
        peer.send_bytes(b"\xc1")
        wait_until(lambda: len(caplog.records) == 3)
    assert [fields(record) for record in caplog.records] == [{"peer": name}] * 3


# JSON


def as_json(*args: Any, level: int = logging.INFO, **options: Any) -> dict[str, Any]:
    """What :class:`JSONFormatter` makes of a record, read back."""
    stream = io.StringIO()
    handler = logging.StreamHandler(stream)
    handler.setFormatter(JSONFormatter())
    handler.handle(logger.makeRecord(logger.name, level, "file", 1, *args, **options))
    assert stream.getvalue().isascii()
    (line,) = stream.getvalue().splitlines()
    told: dict[str, Any] = json.loads(line)
    return told


def test_a_record_becomes_a_json_object() -> None:
    extra = {"method": "add", "msgid": None, "peer": "127.0.0.1:5", "outcome": "ok", "duration": 0.25}
    told = as_json("%s is %d", ("it", 5), None, extra=extra)
    assert re.fullmatch(r"\d{4}-\d\d-\d\dT\d\d:\d\d:\d\d\.\d{3}Z", told.pop("time"))
    assert told == {"level": "INFO", "logger": "gmprpc.test_log", "message": "it is 5", **extra}
    assert list(told) == ["level", "logger", "message", *extra]


def test_the_time_is_that_of_the_record() -> None:
    record = logging.makeLogRecord({"created": 86400.5, "msg": "x"})
    assert json.loads(JSONFormatter().format(record))["time"] == "1970-01-02T00:00:00.500Z"
    record = logging.makeLogRecord({"created": 0.0, "msg": "x"})
    assert json.loads(JSONFormatter().format(record))["time"] == "1970-01-01T00:00:00.000Z"


def test_an_exception_is_told_as_text_on_the_same_line() -> None:
    try:
        raise ValueError("a\nb\u2028c\ud800")
    except ValueError as exc:
        told = as_json("failed", (), (ValueError, exc, exc.__traceback__), sinfo="the\nstack")
    assert told["exception"].startswith("Traceback (most recent call last):\n")
    assert told["exception"].endswith("ValueError: a\nb\u2028c\ud800")
    assert told["stack"] == "the\nstack"


class Unspeakable:
    """What has no text."""

    def __repr__(self) -> str:
        raise ValueError("never")


def test_any_field_can_be_told() -> None:
    told = as_json("x", (), None, extra={"peer": b"\xff", "thing": Unspeakable(), "number": 5})
    assert (told["peer"], told["thing"], told["number"]) == ("b'\\xff'", "Unspeakable", 5)
    for odd, text in ((float("inf"), "inf"), ({(1, 2): 3}, "{(1, 2): 3}")):
        told = as_json("x", (), None, extra={"odd": odd, "msgid": None})
        assert (told["odd"], told["msgid"], told["message"]) == (text, "None", "x")


def test_what_other_formatters_leave_in_a_record_is_not_told() -> None:
    record = logging.makeLogRecord({"msg": "x"})
    logging.Formatter("%(asctime)s %(message)s").format(record)
    assert set(json.loads(JSONFormatter().format(record))) == {"time", "level", "logger", "message"}


def test_a_line_about_a_server_has_the_peer_as_a_field(
    server: gmprpc.Server, scripted: Scripted, caplog: pytest.LogCaptureFixture
) -> None:
    def fail(*_: Any) -> None:
        raise ValueError("x")

    caplog.set_level(logging.INFO)
    scripted.go()
    client = gmprpc.Client(scripted.address, on_error=fail, retry_interval=None)
    with pytest.raises(gmprpc.ConnectFailed):
        client.connect()
    with gmprpc.Balancer([scripted.address, server.address]) as balancer:
        assert balancer.call("echo", 1) == 1
        wait_until(lambda: "gets no" in caplog.text)
    told = [record for record in caplog.records if record.name in ("gmprpc.client", "gmprpc.balancer")]
    host, port = scripted.address
    assert [fields(record) for record in told] == [{"peer": f"{host}:{port}"}] * 2
