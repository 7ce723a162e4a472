"""A certificate that is renewed while several processes serve."""

from __future__ import annotations

import signal
from pathlib import Path
from typing import Any

import gmprpc
from tests.certificates import Certificates, serial_number_at
from tests.commands import assert_fails, assert_misused, run
from tests.helpers import wait_until

from .gunicorn import Fleet, make_app, serve

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
