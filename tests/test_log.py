"""Whatever happens to the log, nothing else happens because of it."""

from __future__ import annotations

import io
import logging
import sys
from typing import Any

import gevent
import pytest

from gmprpc.log import log, log_soon, shown

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


class Full(io.TextIOBase):
    """Is on the same disk."""

    def write(self, text: str) -> int:
        raise OSError(28, "No space left on device")


@pytest.mark.usefixtures("broken_log")
def test_standard_error_may_fail_too(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys, "stderr", Full())
    monkeypatch.setitem(vars(gevent.get_hub()), "exception_stream", Full())
    log(logger, logging.WARNING, "lost")
