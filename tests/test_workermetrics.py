"""What is prepared before workers are forked off, so that each can tell of all."""

from __future__ import annotations

import os
import socket
import textwrap
from pathlib import Path

import pytest

from gmprpc import workermetrics
from gmprpc.sharedmetrics import VARIABLE
from gmprpc.workermetrics import BIND, listener, prepare_as_told

from .programs import FORKING_PYTHON, Program


@pytest.fixture(autouse=True)
def _nothing_is_prepared(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr(workermetrics, "_listener", None)
    monkeypatch.setenv(VARIABLE, str(tmp_path))
    monkeypatch.delenv(BIND, raising=False)


def test_nothing_is_prepared_where_the_environment_names_no_place(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv(VARIABLE)
    prepare_as_told()
    monkeypatch.setenv(BIND, "")
    prepare_as_told()
    assert listener() is None
    assert VARIABLE not in os.environ


@pytest.mark.parametrize("bind", ["127.0.0.1:0", "localhost:0", ":0"])
def test_a_port_is_opened_once(monkeypatch: pytest.MonkeyPatch, bind: str) -> None:
    monkeypatch.setenv(BIND, bind)
    prepare_as_told()
    with listener() as opened:
        socket.create_connection(opened.getsockname()).close()
        prepare_as_told()  # As gunicorn does when it reloads.
        assert listener() is opened


def test_a_unix_socket_is_opened_and_replaces_one_that_nobody_listens_at(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    path = str(tmp_path / "admin")
    with socket.socket(socket.AF_UNIX) as stale:
        stale.bind(path)
    monkeypatch.setenv(BIND, f"unix:{path}")
    prepare_as_told()
    with listener() as opened, socket.socket(socket.AF_UNIX) as client:
        client.connect(opened.getsockname())


def test_a_descriptor_that_listens_is_taken(monkeypatch: pytest.MonkeyPatch) -> None:
    with socket.create_server(("127.0.0.1", 0)) as given:
        monkeypatch.setenv(BIND, f"fd://{os.dup(given.fileno())}")
        prepare_as_told()
        with listener() as opened:
            assert opened.getsockname() == given.getsockname()


@pytest.mark.parametrize("is_port", [True, False])
def test_a_master_that_replaces_another_takes_the_place_over(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, is_port: bool
) -> None:
    monkeypatch.setenv(BIND, "127.0.0.1:0" if is_port else f"unix:{tmp_path}/admin")
    prepare_as_told()
    with listener() as old:
        if is_port:
            monkeypatch.setenv(BIND, f"127.0.0.1:{old.getsockname()[1]}")
        monkeypatch.setattr(workermetrics, "_listener", None)
        monkeypatch.setenv("GUNICORN_PID", str(os.getpid()))
        prepare_as_told()
        with listener() as new:
            assert new.getsockname() == old.getsockname()
            old.close()
            with socket.socket(new.family) as client:
                client.connect(new.getsockname())


def test_a_directory_is_made(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv(BIND, "127.0.0.1:0")
    monkeypatch.setenv(VARIABLE, str(tmp_path / "of" / "mine"))
    prepare_as_told()
    listener().close()
    assert (tmp_path / "of" / "mine").is_dir()


@pytest.mark.parametrize(
    "bind, reason",
    [
        ("9000", "'9000' is no address: give HOST:PORT, (host, port) or unix:PATH"),
        ("192.0.2.1:9000", "Cannot assign requested address"),
        ("unix:/nowhere/admin", "No such file or directory"),
        ("unix:/dev/null", "a file that is no socket is in the way"),
    ],
)
def test_a_place_that_cannot_be_had_is_said_in_one_line(
    monkeypatch: pytest.MonkeyPatch, bind: str, reason: str
) -> None:
    monkeypatch.setenv(BIND, bind)
    with pytest.raises(RuntimeError) as caught:
        prepare_as_told()
    assert str(caught.value).startswith(f"can't listen on {bind}: {reason}")
    assert str(caught.value).endswith("(GMPRPC_METRICS_BIND)")


def test_a_place_that_is_taken_is_said(monkeypatch: pytest.MonkeyPatch) -> None:
    with socket.create_server(("127.0.0.1", 0)) as taken:
        monkeypatch.setenv(BIND, f"127.0.0.1:{taken.getsockname()[1]}")
        with pytest.raises(RuntimeError, match="in use"):
            prepare_as_told()


def test_without_the_extra_one_line_says_what_to_install(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(workermetrics, "find_spec", lambda _: None)
    monkeypatch.setenv(BIND, "127.0.0.1:0")
    with pytest.raises(RuntimeError, match=r"pip install 'gmprpc\[metrics\]'"):
        prepare_as_told()


PROGRAM = """
    import os
    import sys

    from gmprpc.workermetrics import prepare_as_told

    prepare_as_told()
    directory = os.environ["PROMETHEUS_MULTIPROC_DIR"]
    if (pid := os.fork()) == 0:
        sys.exit()
    os.waitpid(pid, 0)
    assert os.path.isdir(directory) and os.path.exists(sys.argv[1])
    print(directory)
"""


def test_what_was_made_goes_with_the_process_that_made_it(tmp_path: Path) -> None:
    path = tmp_path / "admin"
    env = {BIND: f"unix:{path}", VARIABLE: "", "TMPDIR": str(tmp_path)}
    with Program(*FORKING_PYTHON, "-c", textwrap.dedent(PROGRAM), path, env=env) as program:
        assert program.line().startswith(f"{tmp_path}/gmprpc-metrics-")
        assert program.wait() == 0
    assert list(tmp_path.iterdir()) == []


SUCCESSOR = """
    import os

    from gmprpc.workermetrics import hand_over, prepare

    prepare("127.0.0.1:0")
    if (pid := os.fork()) == 0:
        hand_over(12345, 12346)
        os.setgid(12346)
        os.setuid(12345)
        open(os.environ["PROMETHEUS_MULTIPROC_DIR"] + "/counter_1.db", "w").close()
        os._exit(0)
    print(os.waitpid(pid, 0)[1])
"""


@pytest.mark.skipif(os.geteuid() != 0, reason="only root can become somebody else")
def test_a_worker_that_becomes_another_user_can_write_its_metrics() -> None:
    with Program(*FORKING_PYTHON, "-c", textwrap.dedent(SUCCESSOR), env={VARIABLE: ""}) as program:
        assert program.lines() == ["0"]
        assert program.wait() == 0


IMPOSTOR = """
    import os

    from gmprpc.workermetrics import hand_over, prepare

    prepare("127.0.0.1:0")
    directory = os.environ["PROMETHEUS_MULTIPROC_DIR"]
    os.mkdir(directory + ".other")
    os.rename(directory, directory + ".own")
    os.symlink(directory + ".other", directory)
    try:
        hand_over(12345, 12346)
    except OSError as exc:
        print(type(exc).__name__)
    print(os.stat(directory + ".other").st_uid)
"""


@pytest.mark.skipif(os.geteuid() != 0, reason="only root can give something away")
def test_what_a_worker_has_put_in_the_place_of_its_directory_is_not_given_to_the_next_one(tmp_path: Path) -> None:
    env = {VARIABLE: "", "TMPDIR": str(tmp_path)}
    with Program(*FORKING_PYTHON, "-c", textwrap.dedent(IMPOSTOR), env=env) as program:
        assert program.lines() == ["NotADirectoryError", "0"]
        assert program.wait() == 0
