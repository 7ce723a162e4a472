"""What `gmprpc serve` logs, and how."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from .commands import assert_misused, result_of, run, serving

APP = """
import logging
import gmprpc

service = gmprpc.Service()

@service.method
def fail(text):
    raise ValueError(text)

@service.method
def say(level, text):
    logging.getLogger("app").log(getattr(logging, level), text)
"""


@pytest.fixture
def app(tmp_path: Path) -> tuple[str, ...]:
    (tmp_path / "app.py").write_text(APP)
    return ("--app-dir", str(tmp_path), "app:service")


def test_calls_are_logged_where_that_is_asked_for() -> None:
    with serving("--access-log") as served:
        assert result_of(served.addresses[0], "sum", "1", "2") == 3
        assert served.expect(" INFO gmprpc.access: 127.0.0.1:.* sum 0 ok .* ms")


def test_calls_are_logged_however_grave_the_rest_has_to_be(app: tuple[str, ...]) -> None:
    with serving(*app, "--access-log", "--log-level", "ERROR") as served:
        result_of(served.addresses[0], "say", "WARNING", "hello")
        assert " INFO gmprpc.access: " in served.line()
        served.terminate()
        assert not served.lines()


def test_a_log_of_json_has_an_object_on_each_line(app: tuple[str, ...]) -> None:
    with serving(*app, "--log-format", "json", "--max-blocking-time=0", env={"GMPRPC_ACCESS_LOG": "1"}) as served:
        assert run("call", served.addresses[0], "fail", "a\nb").returncode == 1
        told = [json.loads(served.line()) for _ in range(2)]
        served.terminate()
        (rest,) = map(json.loads, served.lines())
    failure, access = told
    fields: dict[str, Any] = {"method": "fail", "msgid": 0, "peer": access["peer"], "outcome": "failed"}
    assert failure.items() > fields.items()
    assert access.items() > fields.items()
    assert (failure["level"], failure["logger"]) == ("ERROR", "gmprpc.connection")
    assert failure["exception"].endswith("ValueError: a\nb")
    assert (access["level"], access["logger"]) == ("INFO", "gmprpc.access")
    assert access["duration"] == failure["duration"]
    assert (rest["level"], rest["message"][:11]) == ("INFO", "stopping on")


def test_what_is_not_grave_enough_is_left_out(app: tuple[str, ...]) -> None:
    with serving(*app, env={"GMPRPC_LOG_LEVEL": "debug"}) as served:
        result_of(served.addresses[0], "say", "DEBUG", "hello")
        assert served.line().endswith(" DEBUG app: hello")
    with serving(*app, "--log-level", "warning") as served:
        result_of(served.addresses[0], "say", "INFO", "hello")
        result_of(served.addresses[0], "say", "WARNING", "hello again")
        assert served.line().endswith(" WARNING app: hello again")


def test_an_application_may_have_its_own_log(tmp_path: Path) -> None:
    own = "import logging\nlogging.basicConfig(level=logging.WARNING, format='own: %(name)s %(message)s')\n"
    (tmp_path / "app.py").write_text(own + APP)
    with serving("--app-dir", tmp_path, "app:service", "--access-log", "--log-format", "json") as served:
        result_of(served.addresses[0], "say", "INFO", "hello")
        assert served.line().startswith("own: gmprpc.access 127.0.0.1:")


def test_what_is_no_level_or_format_is_misused() -> None:
    assert_misused(run("serve", "--log-level", "loud"), "'loud' is not one of")
    assert_misused(run("serve", "--log-format", "xml"), "'xml' is not one of")
