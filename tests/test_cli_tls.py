"""TLS on the command line: a server's certificate and its renewal, whom commands trust, and as whom they come."""

from __future__ import annotations

import signal
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

import gmprpc

from .certificates import Certificates, serial_number_at
from .commands import Served, assert_fails, assert_misused, run, serving


@pytest.fixture(scope="module")
def certificates(tmp_path_factory: pytest.TempPathFactory) -> Certificates:
    return Certificates(tmp_path_factory.mktemp("certificates"))


@pytest.fixture(scope="module")
def served(certificates: Certificates) -> Iterator[Served]:
    """The demo, over TLS."""
    with serving("--certfile", certificates.server) as served:
        yield served


@pytest.fixture(scope="module")
def mutual(certificates: Certificates) -> Iterator[Served]:
    """The demo, for clients with a certificate; its own has an encrypted key, and all is in the environment."""
    password = certificates.directory / "password"
    password.write_bytes(b"secret\nand more\n")
    env = {
        "GMPRPC_CERTFILE": str(certificates.server),
        "GMPRPC_KEYFILE": str(certificates.encrypted(b"secret")),
        "GMPRPC_KEYFILE_PASSWORD_FILE": str(password),
        "GMPRPC_CLIENT_CAFILE": str(certificates.authority),
    }
    with serving(env=env) as served:
        yield served


def port_of(served: Served) -> str:
    return served.addresses[0].rpartition(":")[2]


COMMANDS = {
    "call": (["sum", "1", "2"], "3\n"),
    "notify": (["sum", "1", "2"], ""),
    "list": ([], "echo\nlater\nsleep\nsum\ntime\n"),
    "describe": (["sum"], "sum(*numbers)\n    The sum of the numbers.\n"),
    "health": ([], "SERVING\n"),
}


@pytest.mark.parametrize("command", COMMANDS)
def test_each_command_speaks_tls(served: Served, certificates: Certificates, command: str) -> None:
    words, output = COMMANDS[command]
    process = run(command, "--cafile", certificates.authority, f"localhost:{port_of(served)}", *words)
    assert (process.returncode, process.stdout, process.stderr) == (0, output, "")


def test_the_name_in_the_certificate_may_be_another(served: Served, certificates: Certificates, tmp_path: Path) -> None:
    options: list[str | Path] = ["--cafile", certificates.authority]
    process = run("health", *options, served.addresses[0])
    assert_fails(process, 3, "certificate is not valid for '127.0.0.1'")
    process = run("health", *options, "--server-hostname=localhost", served.addresses[0])
    assert process.stdout == "SERVING\n"
    path = f"unix:{tmp_path}/socket"
    assert_misused(run("health", *options, path), "--server-hostname has to say what name is in the server's")
    with serving("--certfile", certificates.server, binds=(path,)):
        assert run("health", *options, "--server-hostname=localhost", path).stdout == "SERVING\n"


def test_a_server_that_the_system_does_not_know_is_not_trusted(served: Served) -> None:
    process = run("health", "--tls", f"localhost:{port_of(served)}")
    assert_fails(process, 3, "certificate verify failed")


def test_a_server_without_tls_is_no_server_to_trust(certificates: Certificates) -> None:
    with serving() as plain:
        process = run("health", "--cafile", certificates.authority, f"localhost:{port_of(plain)}")
        assert_fails(process, 3, "can't connect to localhost")


def test_clients_show_certificates_if_they_have_to(mutual: Served, certificates: Certificates, tmp_path: Path) -> None:
    password = tmp_path / "password"
    password.write_text("secret")
    options: list[str | Path] = ["--cafile", certificates.authority, f"--certfile={certificates.server}"]
    address = f"localhost:{port_of(mutual)}"
    assert run("health", *options, address).stdout == "SERVING\n"
    key: list[str | Path] = ["--keyfile", certificates.encrypted(b"secret")]
    assert_fails(run("health", *options, *key, address), 3, "the key is encrypted: give its password, with --keyfile-")
    assert run("health", *options, *key, f"--keyfile-password-file={password}", address).stdout == "SERVING\n"
    assert run("health", *options[:-1], address).returncode in (3, 5)
    mutual.expect("peer did not return a certificate")


@pytest.mark.parametrize(
    "options, reason",
    [
        ("--certfile=nothing.pem", "can't speak TLS: nothing.pem: No such file or directory"),
        ("--certfile=empty.pem", "can't speak TLS: empty.pem: "),
        ("--certfile=authority.pem", "authority.pem: "),
        ("--certfile=server.pem --keyfile=key.pem", "the key is encrypted: give its password, with --keyfile-password"),
        ("--certfile=server.pem --keyfile=key.pem --keyfile-password-file=wrong", "key.pem: "),
        ("--certfile=server.pem --keyfile-password-file=nothing.pem", "nothing.pem: No such file"),
        ("--certfile=server.pem --client-cafile=empty.pem", "empty.pem: "),
        ("--cafile=empty.pem", "empty.pem: "),
    ],
)
def test_files_that_can_not_be_used_are_said_in_one_line(tmp_path: Path, options: str, reason: str) -> None:
    certificates = Certificates(tmp_path)
    certificates.encrypted(b"secret").rename(tmp_path / "key.pem")
    (tmp_path / "empty.pem").touch()
    (tmp_path / "wrong").write_text("wrong", encoding="utf-8")
    if "--cafile" not in options:
        assert_fails(run("serve", "-b", "127.0.0.1:0", *options.split(), cwd=tmp_path), 3, reason)
    if "--client-cafile" not in options:
        assert_fails(run("health", *options.split(), "127.0.0.1:1", cwd=tmp_path), 3, reason)


@pytest.mark.parametrize("option", ["--keyfile", "--keyfile-password-file", "--client-cafile"])
def test_options_that_mean_nothing_alone_are_misuse(certificates: Certificates, option: str) -> None:
    assert_misused(run("serve", option, certificates.server), f"{option} needs a --certfile")
    if option != "--client-cafile":
        assert_misused(run("health", option, certificates.server, "127.0.0.1:1"), f"{option} needs a --certfile")


def test_there_is_no_tls_over_standard_input(certificates: Certificates) -> None:
    assert_misused(run("serve", "--stdio", "--certfile", certificates.server), "there can be no --certfile")


# Renewal.


def test_sighup_takes_a_renewed_certificate_into_use_and_cuts_nobody(
    certificates: Certificates, tmp_path: Path
) -> None:
    file = tmp_path / "server.pem"
    first, second = (certificates.issue(name, "localhost").read_bytes() for name in ("first", "second"))
    file.write_bytes(first)
    context = gmprpc.tls.client_context(certificates.authority)
    with serving("--certfile", file, binds=("127.0.0.1:0", f"unix:{tmp_path}/socket")) as served:
        options: Any = {"ssl_context": context, "server_hostname": "localhost", "timeout": 10}
        client, other = (gmprpc.Client(address, **options) for address in served.addresses)
        with client, other:
            waiting = client.call_async("sleep", 0.3)
            number = serial_number_at(served.addresses[0], context)
            file.write_bytes(second)
            assert serial_number_at(served.addresses[0], context) == number
            served.kill(signal.SIGHUP)
            served.expect(f"SIGHUP: new connections get the certificate that is in {file} now")
            renewed = serial_number_at(served.addresses[0], context)
            assert renewed != number
            assert waiting.get() == 0.3
            assert client.statistics()["connections"] == 1
            other.close()
            other.connect()
            assert other.call("sum", 1, 2) == 3

            file.write_bytes(second[:100])  # What renews it is still at it.
            served.kill(signal.SIGHUP)
            line = served.expect("SIGHUP: the certificates stay as they were")
            assert str(file) in line
            file.unlink()
            served.kill(signal.SIGHUP)
            assert "No such file or directory" in served.expect("SIGHUP: the certificates stay as they were")
            assert serial_number_at(served.addresses[0], context) == renewed
        served.terminate()
        assert served.wait() == 0


APP = """
import os, signal, gmprpc
os.kill(os.getpid(), signal.SIGHUP)
service = gmprpc.Service()
"""


def test_sighup_while_the_application_is_loaded_is_no_end(certificates: Certificates, tmp_path: Path) -> None:
    (tmp_path / "app.py").write_text(APP, encoding="utf-8")
    with serving("--certfile", certificates.server, "--app-dir", tmp_path, "app:service") as served:
        address = f"localhost:{port_of(served)}"
        assert run("health", "--cafile", certificates.authority, address).stdout == "SERVING\n"


def test_without_a_certificate_sighup_is_what_it_was() -> None:
    with serving() as served:
        served.kill(signal.SIGHUP)
        assert served.wait() == -signal.SIGHUP
