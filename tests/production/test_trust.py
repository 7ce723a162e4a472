"""Who is let in where several processes serve, and a certificate that is renewed meanwhile."""

from __future__ import annotations

import signal
from pathlib import Path
from typing import Any

import pytest

import gmprpc
from tests.certificates import Certificates, serial_number_at
from tests.commands import assert_fails, assert_misused, run
from tests.helpers import wait_until

from .gunicorn import Fleet, gunicorn, make_app, serve

ANY_PORT = ("-b", "127.0.0.1:0")


def test_sighup_has_workers_take_a_renewed_certificate_into_use(directory: Path, tmp_path: Path) -> None:
    make_app(directory)
    certificates = Certificates(tmp_path)
    file = tmp_path / "certificate.pem"
    file.write_bytes(certificates.server.read_bytes())
    context = gmprpc.tls.client_context(certificates.authority)
    with Fleet(*serve(directory, "-w", "2", *ANY_PORT, "--certfile", file)) as fleet:
        before = serial_number_at(fleet.addresses[0], context)
        file.write_bytes(certificates.issue("renewed", "localhost").read_bytes())
        fleet.kill(signal.SIGHUP)
        wait_until(lambda: serial_number_at(fleet.addresses[0], context) != before)
        options: Any = {"ssl_context": context, "server_hostname": "localhost"}
        with gmprpc.Client(fleet.addresses[0], draining=True, timeout=10, **options) as client:
            assert client.call("version") == 1


def test_files_that_can_not_be_used_are_said_before_there_is_any_worker(tmp_path: Path) -> None:
    nothing = tmp_path / "nothing.pem"
    assert_fails(run("serve", "-w", "2", *ANY_PORT, "--certfile", nothing), 3, f"{nothing}: No such file or directory")
    assert_misused(run("serve", "-w", "2", *ANY_PORT, "--keyfile", nothing), "--keyfile needs a --certfile")


APP = """
import gmprpc

server = gmprpc.Server(None, authenticate=lambda connection, message: message[2] == "login")
server.register(lambda: "welcome", "login")
"""


@pytest.mark.parametrize("command", [serve, gunicorn], ids=["serve", "gunicorn"])
def test_workers_let_in_whom_their_server_lets_in(directory: Path, command: Any) -> None:
    (directory / "app.py").write_text(APP, encoding="utf-8")
    options = ["-w", "1"] if command is serve else []
    with Fleet(*command(directory, *options, *ANY_PORT, app="app:server")) as fleet:
        with gmprpc.Client(fleet.addresses[0], timeout=10) as client:
            assert client.call("login") == "welcome"
            assert client.call("$/list") == ["login"]
        stranger = gmprpc.Client(fleet.addresses[0], timeout=10)
        with stranger, pytest.raises(gmprpc.RemoteError, match="not authenticated"):
            stranger.call("$/list")
