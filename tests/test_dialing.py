"""Connecting to an address: over whichever way answers first, and without a trace of the others."""

from __future__ import annotations

import errno
import socket as stdlib_socket
from collections.abc import Callable, Iterator
from pathlib import Path
from time import perf_counter
from typing import Any

import gevent
import pytest
from gevent import socket
from gevent.event import Event

from gmprpc import dialing
from gmprpc.dialing import connect
from gmprpc.exceptions import ConnectFailed
from gmprpc.transport import format_address

from .helpers import listening, needs_ipv6, wait_until


@pytest.fixture
def listener() -> Iterator[Any]:
    """A TCP socket that listens."""
    with listening(("127.0.0.1", 0)) as sock:
        yield sock


@pytest.fixture
def closed_port() -> int:
    """A port of 127.0.0.1 on which nobody listens."""
    with listening(("127.0.0.1", 0)) as sock:
        port: int = sock.getsockname()[1]
        return port


@pytest.mark.parametrize(
    "form", [tuple, list, lambda address: f"{address[0]}:{address[1]}"], ids=["tuple", "list", "str"]
)
def test_connecting_reaches_who_listens(listener: Any, form: Callable[[Any], Any]) -> None:
    with connect(form(listener.getsockname())) as sock:
        accepted, _ = listener.accept()
        with accepted:
            sock.sendall(b"hello")
            assert accepted.recv(5) == b"hello"


@needs_ipv6
def test_connecting_speaks_ipv6() -> None:
    with (
        listening(("::1", 0), socket.AF_INET6) as listener,
        connect(listener.getsockname()) as first,
        connect(format_address(listener.getsockname())) as second,
    ):
        assert first.family == second.family == socket.AF_INET6


def test_connecting_to_a_unix_socket(tmp_path: Path) -> None:
    with listening(f"{tmp_path}/s", socket.AF_UNIX), connect(f"unix:{tmp_path}/s") as sock:
        assert sock.family == socket.AF_UNIX


def test_nobody_there_is_connect_failed_with_the_systems_error(closed_port: int, tmp_path: Path) -> None:
    for address, cause, text in (
        (("127.0.0.1", closed_port), ConnectionRefusedError, f"can't connect to 127.0.0.1:{closed_port}: "),
        (f"unix:{tmp_path}/nothing", FileNotFoundError, f"can't connect to unix:{tmp_path}/nothing: "),
        (f"unix:{tmp_path}/{'x' * 200}", OSError, "can't connect to unix:"),
    ):
        with pytest.raises(ConnectFailed) as caught:
            connect(address)
        assert isinstance(caught.value.__cause__, cause)
        assert str(caught.value).startswith(text)
        assert caught.value.sent is False
    with pytest.raises(ConnectFailed, match=r"can't connect to 127.0.0.1:\d+: Connection refused$"):
        connect(("127.0.0.1", closed_port))


def resolving_to(monkeypatch: pytest.MonkeyPatch, *addresses: Any) -> list[Any]:
    """Let every name have these addresses; what is asked for is told."""
    asked: list[Any] = []

    def getaddrinfo(*args: Any, **options: Any) -> Any:
        asked.append((*args, options))
        return [(family, socket.SOCK_STREAM, socket.IPPROTO_TCP, "", address) for family, address in addresses]

    monkeypatch.setattr(socket, "getaddrinfo", getaddrinfo)
    return asked


def test_a_name_that_can_not_be_resolved_is_connect_failed(monkeypatch: pytest.MonkeyPatch) -> None:
    def getaddrinfo(*args: Any, **options: Any) -> Any:
        raise socket.gaierror(socket.EAI_NONAME, "Name or service not known")

    monkeypatch.setattr(socket, "getaddrinfo", getaddrinfo)
    with pytest.raises(ConnectFailed, match=r"^can't resolve nowhere.test:4423: Name or service not known$") as caught:
        connect("nowhere.test:4423")
    assert isinstance(caught.value.__cause__, socket.gaierror)


def test_of_several_addresses_the_first_that_answers_is_taken(
    monkeypatch: pytest.MonkeyPatch, listener: Any, closed_port: int
) -> None:
    unsupported = 12345  # As an address of IPv6 where the kernel has none.
    asked = resolving_to(
        monkeypatch,
        (unsupported, ("nowhere", 1)),
        (socket.AF_INET, ("127.0.0.1", closed_port)),
        (socket.AF_INET, listener.getsockname()),
        (socket.AF_INET, ("127.0.0.1", closed_port)),
    )
    with connect("several.test:4423") as sock:
        assert sock.getpeername() == listener.getsockname()
    assert asked == [("several.test", 4423, {"type": socket.SOCK_STREAM})]


def test_of_several_addresses_none_that_answers_is_one_error(monkeypatch: pytest.MonkeyPatch, closed_port: int) -> None:
    resolving_to(monkeypatch, *[(socket.AF_INET, ("127.0.0.1", closed_port))] * 2)
    with pytest.raises(ConnectFailed, match=r"^can't connect to several.test:4423: Connection refused$"):
        connect("several.test:4423")


def test_a_family_that_the_system_does_not_know_is_connect_failed(monkeypatch: pytest.MonkeyPatch) -> None:
    resolving_to(monkeypatch, (12345, ("nowhere", 1)))
    with pytest.raises(ConnectFailed, match=r"^can't connect to odd.test:4423: Address family not supported") as caught:
        connect("odd.test:4423")
    assert isinstance(caught.value.__cause__, OSError)


def test_a_name_without_addresses_is_connect_failed(monkeypatch: pytest.MonkeyPatch) -> None:
    resolving_to(monkeypatch)
    with pytest.raises(ConnectFailed, match=r"^can't connect to none.test:4423: no address$") as caught:
        connect("none.test:4423")
    assert caught.value.__cause__ is None


def test_each_socket_is_shown_before_it_connects(
    monkeypatch: pytest.MonkeyPatch, listener: Any, closed_port: int
) -> None:
    resolving_to(monkeypatch, (socket.AF_INET, ("127.0.0.1", closed_port)), (socket.AF_INET, listener.getsockname()))
    seen: list[Any] = []

    def before_connect(sock: Any) -> None:
        with pytest.raises(OSError):
            sock.getpeername()
        sock.bind(("127.0.0.1", 0))
        seen.append(sock)

    with connect("several.test:4423", before_connect) as sock:
        assert len(seen) == 2
        assert seen[1] is sock
        assert seen[0].fileno() == -1


@pytest.mark.parametrize("exc", [ValueError("no"), gevent.Timeout()], ids=repr)
def test_what_before_connect_raises_closes_the_socket_and_goes_through(listener: Any, exc: BaseException) -> None:
    seen: list[Any] = []

    def before_connect(sock: Any) -> None:
        seen.append(sock)
        raise exc

    with pytest.raises(type(exc)):
        connect(listener.getsockname(), before_connect)
    assert [sock.fileno() for sock in seen] == [-1]


def test_connecting_may_be_ended_from_outside(listener: Any) -> None:
    seen: list[Any] = []
    started, never = Event(), Event()

    def before_connect(sock: Any) -> None:
        seen.append(sock)
        started.set()
        never.wait()

    connecting = gevent.spawn(connect, listener.getsockname(), before_connect)
    started.wait()
    connecting.kill()
    assert [sock.fileno() for sock in seen] == [-1]


# Several addresses at once.

NETWORK_UNREACHABLE = (socket.AF_INET, ("224.0.0.1", 1))  # TCP knows no multicast: it says so at once.


@pytest.fixture
def black_hole() -> Iterator[Any]:
    """The address of one who doesn't answer: its queue is full."""
    with stdlib_socket.socket() as listener, stdlib_socket.socket() as first:
        listener.bind(("127.0.0.1", 0))
        listener.listen(0)
        first.connect(listener.getsockname())
        yield listener.getsockname()


@pytest.fixture
def no_delay(monkeypatch: pytest.MonkeyPatch) -> None:
    """Let each address have its turn at once."""
    monkeypatch.setattr(dialing, "_NEXT_ATTEMPT_DELAY", 0.0)


@pytest.fixture
def no_next_attempt(monkeypatch: pytest.MonkeyPatch) -> None:
    """Let an address have its turn only when the one before has failed."""
    monkeypatch.setattr(dialing, "_NEXT_ATTEMPT_DELAY", 1000.0)


def test_an_address_that_does_not_answer_delays_the_next_one_only_so_long(
    monkeypatch: pytest.MonkeyPatch, listener: Any, black_hole: Any
) -> None:
    monkeypatch.setattr(dialing, "_NEXT_ATTEMPT_DELAY", 0.02)
    resolving_to(monkeypatch, (socket.AF_INET, black_hole), (socket.AF_INET, listener.getsockname()))
    seen: list[Any] = []
    begun: list[float] = []

    def before_connect(sock: Any) -> None:
        seen.append(sock)
        begun.append(perf_counter())

    with connect("several.test:4423", before_connect) as sock:
        assert sock is seen[1]
        assert sock.getpeername() == listener.getsockname()
        assert seen[0].fileno() == -1
    assert begun[1] - begun[0] >= 0.02


@pytest.mark.usefixtures("no_delay")
def test_an_earlier_address_may_still_win_and_the_later_ones_are_closed(
    monkeypatch: pytest.MonkeyPatch, listener: Any, black_hole: Any
) -> None:
    resolving_to(monkeypatch, (socket.AF_INET, listener.getsockname()), *[(socket.AF_INET, black_hole)] * 2)
    seen: list[Any] = []
    with connect("several.test:4423", seen.append) as sock:
        assert sock is seen[0]
        assert len(seen) == 3  # They had begun.
        assert [other.fileno() for other in seen[1:]] == [-1, -1]


@pytest.mark.usefixtures("no_next_attempt")
def test_what_fails_does_not_delay_the_next(monkeypatch: pytest.MonkeyPatch, listener: Any, closed_port: int) -> None:
    resolving_to(
        monkeypatch,
        (12345, ("nowhere", 1)),
        NETWORK_UNREACHABLE,
        (socket.AF_INET, ("127.0.0.1", closed_port)),
        (socket.AF_INET, listener.getsockname()),
    )
    with connect("several.test:4423") as sock:
        assert sock.getpeername() == listener.getsockname()


@pytest.mark.usefixtures("no_delay")
def test_when_one_fails_the_others_are_still_waited_for(
    monkeypatch: pytest.MonkeyPatch, black_hole: Any, closed_port: int
) -> None:
    resolving_to(monkeypatch, (socket.AF_INET, black_hole), (socket.AF_INET, ("127.0.0.1", closed_port)))
    seen: list[Any] = []
    connecting = gevent.spawn(connect, "several.test:4423", seen.append)
    wait_until(lambda: len(seen) == 2 and seen[1].fileno() == -1)
    assert seen[0].fileno() >= 0
    assert not connecting.ready()
    connecting.kill()
    assert seen[0].fileno() == -1


@pytest.mark.parametrize("refusing", [0, 1, 2, None])
def test_the_error_is_what_the_other_side_said_where_it_said_something(
    monkeypatch: pytest.MonkeyPatch, closed_port: int, refusing: int | None
) -> None:
    addresses: list[Any] = [NETWORK_UNREACHABLE, (12345, ("nowhere", 1)), NETWORK_UNREACHABLE]
    if refusing is not None:
        addresses[refusing] = (socket.AF_INET, ("127.0.0.1", closed_port))
    resolving_to(monkeypatch, *addresses)
    with pytest.raises(ConnectFailed) as caught:
        connect("several.test:4423")
    expected = errno.ENETUNREACH if refusing is None else errno.ECONNREFUSED
    assert isinstance(caught.value.__cause__, OSError)
    assert caught.value.__cause__.errno == expected


@needs_ipv6
def test_the_families_take_turns(monkeypatch: pytest.MonkeyPatch, closed_port: int) -> None:
    resolving_to(
        monkeypatch,
        *[(socket.AF_INET6, ("::1", closed_port, 0, 0))] * 3,
        *[(socket.AF_INET, ("127.0.0.1", closed_port))] * 2,
    )
    families: list[int] = []
    with pytest.raises(ConnectFailed):
        connect("several.test:4423", lambda sock: families.append(sock.family))
    six, four = socket.AF_INET6, socket.AF_INET
    assert families == [six, four, six, four, six]


@pytest.mark.usefixtures("no_delay")
@pytest.mark.parametrize("rounds", range(8))
def test_an_end_from_outside_closes_every_socket_whenever_it_comes(
    monkeypatch: pytest.MonkeyPatch, black_hole: Any, rounds: int
) -> None:
    resolving_to(monkeypatch, *[(socket.AF_INET, black_hole)] * 3)
    seen: list[Any] = []

    def before_connect(sock: Any) -> None:
        seen.append(sock)
        gevent.sleep(0)

    connecting = gevent.spawn(connect, "several.test:4423", before_connect)
    for _ in range(rounds):
        gevent.sleep(0)
    assert len(seen) == 3 or rounds < 7  # By then all are waited for.
    connecting.kill()
    assert [sock.fileno() for sock in seen] == [-1] * len(seen)


@pytest.mark.usefixtures("no_delay")
def test_what_before_connect_raises_closes_those_that_are_under_way(
    monkeypatch: pytest.MonkeyPatch, black_hole: Any
) -> None:
    resolving_to(monkeypatch, *[(socket.AF_INET, black_hole)] * 2)
    seen: list[Any] = []

    def before_connect(sock: Any) -> None:
        seen.append(sock)
        if len(seen) == 2:
            raise LookupError("no")

    with pytest.raises(LookupError):
        connect("several.test:4423", before_connect)
    assert [sock.fileno() for sock in seen] == [-1, -1]


def test_an_oserror_of_before_connect_is_that_of_its_address(monkeypatch: pytest.MonkeyPatch, listener: Any) -> None:
    resolving_to(monkeypatch, *[(socket.AF_INET, listener.getsockname())] * 2)
    seen: list[Any] = []

    def before_connect(sock: Any) -> None:
        seen.append(sock)
        if len(seen) == 1:
            raise PermissionError(errno.EPERM, "not this one")

    with connect("several.test:4423", before_connect) as sock:
        assert sock is seen[1]


def test_an_oserror_of_before_connect_is_that_of_a_unix_socket(tmp_path: Path) -> None:
    def before_connect(sock: Any) -> None:
        raise PermissionError(errno.EPERM, "not this one")

    with pytest.raises(ConnectFailed, match="not this one") as caught:
        connect(f"unix:{tmp_path}/s", before_connect)
    assert isinstance(caught.value.__cause__, PermissionError)


def test_the_socket_is_given_back_with_the_timeout_that_it_had(listener: Any, tmp_path: Path) -> None:
    with listening(f"{tmp_path}/s", socket.AF_UNIX):
        for address in (listener.getsockname(), f"unix:{tmp_path}/s"):
            with connect(address) as first, connect(address, lambda sock: sock.settimeout(7)) as second:
                assert (first.gettimeout(), second.gettimeout()) == (None, 7)


def test_before_connect_may_connect_by_itself(listener: Any) -> None:
    with connect(("127.0.0.1", 1), lambda sock: sock.connect(listener.getsockname())) as sock:
        assert sock.getpeername() == listener.getsockname()


def test_a_socket_that_reaches_itself_has_reached_nobody(closed_port: int) -> None:
    address = ("127.0.0.1", closed_port)
    with pytest.raises(ConnectFailed, match="Connection refused"):
        connect(address, lambda sock: sock.bind(address))  # As the system may do by chance.


def test_the_same_port_at_both_ends_is_a_connection(listener: Any) -> None:
    host, port = listener.getsockname()
    with connect((host, port), lambda sock: sock.bind(("127.0.0.2", port))) as sock:
        assert sock.getsockname() == ("127.0.0.2", port)


def test_a_unix_socket_whose_queue_is_full_is_waited_for_with_pauses(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = f"{tmp_path}/s"
    tries = 0
    real = dialing._Attempt.is_connected

    def is_connected(self: Any) -> bool:
        nonlocal tries
        tries += 1
        return real(self)

    monkeypatch.setattr(dialing._Attempt, "is_connected", is_connected)
    with stdlib_socket.socket(stdlib_socket.AF_UNIX) as swamped, stdlib_socket.socket(stdlib_socket.AF_UNIX) as first:
        swamped.bind(path)
        swamped.listen(0)
        first.connect(path)
        begun = perf_counter()
        connecting = gevent.spawn(connect, f"unix:{path}")
        wait_until(lambda: tries >= 5)
        assert perf_counter() - begun >= 0.001 + 0.002 + 0.004 + 0.008
        accepted, _ = swamped.accept()
        accepted.close()
        connecting.get().close()


def test_waiting_for_a_unix_socket_may_be_ended_from_outside(tmp_path: Path) -> None:
    path = f"{tmp_path}/s"
    seen: list[Any] = []
    with stdlib_socket.socket(stdlib_socket.AF_UNIX) as swamped, stdlib_socket.socket(stdlib_socket.AF_UNIX) as first:
        swamped.bind(path)
        swamped.listen(0)
        first.connect(path)
        connecting = gevent.spawn(connect, f"unix:{path}", seen.append)
        wait_until(lambda: seen)
        connecting.kill()
        assert seen[0].fileno() == -1
