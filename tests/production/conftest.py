"""What stands beside gmprpc in production, each a real program; where it isn't installed the test is skipped by name.

A program listens at an address that ``reserve`` gives, ends with its test, and leaves nothing behind.
"""

from __future__ import annotations

import shutil
import sys
from collections.abc import Callable, Iterator, Mapping
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import gevent
import pytest
from gevent import socket

from tests.programs import Program

from .haproxy import HAProxy

#: ``("127.0.0.1", port)``.
Address = tuple[str, int]


@pytest.fixture(autouse=True)
def _deadline() -> Iterator[None]:
    """As for the other tests, with more time: programs are started and ended here, and loads go on for a while."""
    with gevent.Timeout(120):
        yield


@pytest.fixture
def reserve() -> Iterator[Callable[[], Address]]:
    """``reserve()`` gives an address that nobody else is given, also while no program listens there.

    It is bound, but nobody listens: programs that set SO_REUSEADDR, as servers do, may bind it again.
    """
    with ExitStack() as reservations:

        def reserve() -> Address:
            reservation = reservations.enter_context(socket.socket())
            reservation.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
            reservation.bind(("127.0.0.1", 0))
            host, port = reservation.getsockname()
            return host, port

        yield reserve


@pytest.fixture
def directory(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A directory with a short name: the path of a unix socket may have about 100 bytes."""
    return tmp_path_factory.mktemp("it")


@pytest.fixture
def start_serve() -> Iterator[Callable[..., Program]]:
    """``start_serve(*arguments, env=None)`` is a ``gmprpc serve`` with those arguments that listens by now."""
    with ExitStack() as programs:

        def start(*arguments: str | Path, env: Mapping[str, str] | None = None) -> Program:
            program = programs.enter_context(Program(sys.executable, "-m", "gmprpc", "serve", *arguments, env=env))
            program.line_with("listening on ")
            return program

        yield start


@pytest.fixture
def start_haproxy(require_peer: Callable[[str, Any], None], directory: Path) -> Iterator[Callable[[str], HAProxy]]:
    """``start_haproxy(configuration)`` is an HAProxy that listens by now."""
    haproxy = shutil.which("haproxy", path="/usr/sbin:/usr/local/sbin") or shutil.which("haproxy")
    require_peer("HAProxy (haproxy)", haproxy)
    with ExitStack() as programs:

        def start(configuration: str) -> HAProxy:
            program = programs.enter_context(HAProxy(str(haproxy), configuration, directory))
            program.wait_ready()
            return program

        yield start


@pytest.fixture
def redis_url(require_peer: Callable[[str, Any], None], directory: Path) -> Iterator[str]:
    """Where a Redis of this test's own is, at a unix socket, with nothing in it: ``redis+socket:///path``."""
    redis = shutil.which("redis-server")
    require_peer("Redis (redis-server)", redis)
    path = directory / "redis"
    options = ("--port", "0", "--unixsocket", path, "--save", "", "--appendonly", "no", "--dir", directory)
    with Program(str(redis), *options) as program:
        program.line_with("eady to accept connections")
        yield f"redis+socket://{path}"
