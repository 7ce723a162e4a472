"""Where addresses come from: lists, names, and functions that are asked."""

from __future__ import annotations

from typing import Any

import gevent
import pytest
from gevent import socket

from gmprpc.discovery import discovery_of
from gmprpc.exceptions import ConnectFailed


def look_up(addresses: Any) -> tuple[bool, list[Any]]:
    discovery = discovery_of(addresses)
    return discovery.changes, discovery.look_up()


@pytest.mark.parametrize(
    "addresses, known",
    [
        (["127.0.0.1:1", ("::1", 2), "unix:/a"], [("127.0.0.1", 1), ("::1", 2), "unix:/a"]),
        (("10.0.0.1:1", "10.0.0.2:2"), [("10.0.0.1", 1), ("10.0.0.2", 2)]),
        ((f"10.0.0.{number}:1" for number in (1, 2)), [("10.0.0.1", 1), ("10.0.0.2", 1)]),
        (["a.example:1"], [("a.example", 1)]),  # Its client resolves it, and tries all its addresses.
        ("unix:/a", ["unix:/a"]),
        ("127.0.0.1:1", [("127.0.0.1", 1)]),
        (("::1", 1), [("::1", 1)]),
        ("[fe80::1%eth0]:1", [("fe80::1%eth0", 1)]),
    ],
)
def test_what_is_known_stays(addresses: Any, known: list[Any]) -> None:
    assert look_up(addresses) == (False, known)


def test_a_list_can_be_asked_again_and_again() -> None:
    discovery = discovery_of(iter(["127.0.0.1:1"]))
    assert discovery.look_up() == discovery.look_up() == [("127.0.0.1", 1)]


@pytest.mark.parametrize("name", ["a.example:7", ("a.example", 7)])
def test_a_name_is_every_address_that_it_has(name: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    found = [
        (socket.AF_INET6, socket.SOCK_STREAM, 6, "", ("fe80::1", 7, 0, 3)),
        (socket.AF_INET, socket.SOCK_STREAM, 6, "", ("10.0.0.1", 7)),
        (socket.AF_INET, socket.SOCK_STREAM, 6, "", ("10.0.0.2", 7)),
    ]
    asked = []

    def getaddrinfo(*args: Any, **kwargs: Any) -> Any:
        asked.append(args)
        return found

    monkeypatch.setattr(socket, "getaddrinfo", getaddrinfo)
    discovery = discovery_of(name)
    assert discovery.changes
    assert discovery.hostname == "a.example"
    assert asked == []
    assert discovery.look_up() == [("fe80::1%3", 7), ("10.0.0.1", 7), ("10.0.0.2", 7)]
    del found[0]
    assert discovery.look_up() == [("10.0.0.1", 7), ("10.0.0.2", 7)]
    assert asked == [("a.example", 7)] * 2


def test_a_name_that_is_unknown_says_so(monkeypatch: pytest.MonkeyPatch) -> None:
    def getaddrinfo(*_: Any, **__: Any) -> Any:
        raise socket.gaierror(socket.EAI_NONAME, "Name or service not known")

    monkeypatch.setattr(socket, "getaddrinfo", getaddrinfo)
    with pytest.raises(ConnectFailed, match=r"^can't resolve a\.example:7: Name or service not known$") as raised:
        discovery_of("a.example:7").look_up()
    assert isinstance(raised.value.__cause__, socket.gaierror)


def test_a_function_is_asked_each_time_and_may_wait() -> None:
    answers = iter([["127.0.0.1:1"], (("127.0.0.1", port) for port in (2, 3))])

    def ask() -> Any:
        gevent.sleep(0)
        return next(answers)

    discovery = discovery_of(ask)
    assert discovery.changes
    assert discovery.hostname is None
    assert discovery.look_up() == [("127.0.0.1", 1)]
    assert discovery.look_up() == [("127.0.0.1", 2), ("127.0.0.1", 3)]


@pytest.mark.parametrize(
    "answer, error, message",
    [
        (list, ConnectFailed, "there is no endpoint: the list of addresses is empty"),
        (lambda: ["nonsense"], ValueError, "'nonsense' is no address"),
        (lambda: 1 / 0, ZeroDivisionError, "division"),
        (lambda: None, TypeError, "not iterable"),
    ],
)
def test_what_is_wrong_with_a_function_comes_out(answer: Any, error: type[Exception], message: str) -> None:
    with pytest.raises(error, match=message):
        discovery_of(answer).look_up()


@pytest.mark.parametrize("addresses", [[], "", "127.0.0.1", ["127.0.0.1"], [1], ("a", -1), None, 4423, {}])
def test_what_names_no_place_is_refused(addresses: Any) -> None:
    with pytest.raises(ValueError, match="address"):
        discovery_of(addresses)
