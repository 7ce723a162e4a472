"""Each call makes one line in the access log, when it has ended."""

from __future__ import annotations

import logging
import re
from collections.abc import Iterator
from pathlib import Path

import pytest

import gmprpc
from gmprpc import accesslog

from .helpers import Peer, wait_until

LOGGER = "gmprpc.access"


@pytest.fixture
def server(service: gmprpc.Service) -> Iterator[gmprpc.Server]:
    with gmprpc.Server(("127.0.0.1", 0), service, observers=[gmprpc.AccessLog()]) as server:
        yield server


@pytest.fixture
def lines(caplog: pytest.LogCaptureFixture) -> Iterator[list[logging.LogRecord]]:
    """What was logged of calls."""
    caplog.set_level(logging.INFO, LOGGER)
    lines: list[logging.LogRecord] = []

    class Handler(logging.Handler):
        def emit(self, record: logging.LogRecord) -> None:
            lines.append(record)

    handler = Handler()
    logging.getLogger(LOGGER).addHandler(handler)
    yield lines
    logging.getLogger(LOGGER).removeHandler(handler)


def test_a_line_says_who_called_what_and_how_it_ended(peer: Peer, lines: list[logging.LogRecord]) -> None:
    peer.call("add", 1, 2, msgid=7)
    peer.send([2, "echo", [1]])
    peer.call("fail", "x", msgid=0)
    peer.call("no such\nmethod", msgid=2**32 - 1)
    peer.call('say "hi"', msgid=1)
    wait_until(lambda: len(lines) == 5)
    host, port = peer.socket.getsockname()
    texts = [record.getMessage().removeprefix(f"{host}:{port} ") for record in lines]
    assert [re.sub(r"\d+\.\d{3} ms$", "TIME", text) for text in texts] == [
        "add 7 ok TIME",
        "echo - ok TIME",
        "fail 0 failed TIME",
        r'"no such\\nmethod" 4294967295 unknown_method TIME',
        r'"say \"hi\"" 1 unknown_method TIME',
    ]
    assert {(record.name, record.levelno) for record in lines} == {(LOGGER, logging.INFO)}


def test_a_record_has_the_same_as_fields(peer: Peer, lines: list[logging.LogRecord]) -> None:
    peer.call("add", 1, 2, msgid=7)
    wait_until(lambda: lines)
    told = vars(lines[0])
    host, port = peer.socket.getsockname()
    names = ("method", "msgid", "peer", "outcome")
    assert [told[name] for name in names] == ["add", 7, f"{host}:{port}", "ok"]
    assert lines[0].getMessage().endswith(f" {told['duration'] * 1000:.3f} ms")


def test_the_peer_at_a_unix_socket_is_one_word(
    service: gmprpc.Service, tmp_path: Path, lines: list[logging.LogRecord]
) -> None:
    path = tmp_path / "s"
    with (
        gmprpc.Server(f"unix:{path}", service, observers=[gmprpc.AccessLog()]) as server,
        Peer.connect(server.address) as peer,
    ):
        peer.call("echo", 1)
        wait_until(lambda: lines)
    assert re.match(rf'"unix:{path} \(pid \d+, uid \d+, gid \d+\)" echo 0 ok ', lines[0].getMessage())


def test_nothing_is_made_where_nobody_reads(
    peer: Peer, caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    caplog.set_level(logging.WARNING, LOGGER)
    made: list[object] = []
    monkeypatch.setattr(accesslog.logger, "makeRecord", lambda *args, **_: made.append(args))
    peer.call("echo", 1)
    peer.call("echo", 2)  # By now the end of the first call has been told.
    assert not made


def test_a_log_that_fails_costs_no_answer(
    peer: Peer, lines: list[logging.LogRecord], monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    def fail(record: logging.LogRecord) -> None:
        raise OSError("no space left")

    monkeypatch.setattr(accesslog.logger, "handle", fail)
    assert peer.call("echo", 1) == [1, 0, None, 1]
    assert peer.call("echo", 2) == [1, 0, None, 2]
    assert "no space left" in capfd.readouterr().err
    monkeypatch.undo()
    peer.call("echo", 3)
    wait_until(lambda: lines)
