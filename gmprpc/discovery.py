"""Where the addresses of a Balancer's endpoints come from: a list, a DNS name, or somebody who is asked."""

from __future__ import annotations

import ipaddress
from collections.abc import Callable, Iterable
from typing import Any, Protocol

from gevent import socket

from .exceptions import ConnectFailed
from .transport import format_address, parse_address


class Discovery(Protocol):
    """Knows addresses, or whom to ask for them."""

    #: False where the answer is always the same, and costs nothing.
    changes: bool
    #: The one name of all endpoints, for their certificates; None if each has its own.
    hostname: str | None
    #: The one address that says where they all are; None if there is none.
    address: Any

    def look_up(self) -> list[Any]:
        """The addresses that there are now; may wait.

        Raises:
            Exception: they can't be had, for whatever reason.
        """


class Listed:
    """Addresses that are known and stay what they are."""

    changes = False
    hostname: str | None = None

    def __init__(self, addresses: Iterable[Any]) -> None:
        self._addresses = [parse_address(address) for address in addresses]
        if not self._addresses:
            raise ValueError("there has to be at least one address")
        self.address = self._addresses[0] if len(self._addresses) == 1 else None

    def look_up(self) -> list[Any]:
        return self._addresses


class Resolved:
    """Every address that a name has."""

    changes = True

    def __init__(self, host: str, port: int) -> None:
        self.hostname: str | None = host
        self.address = (host, port)

    def look_up(self) -> list[Any]:
        try:
            found = socket.getaddrinfo(*self.address, type=socket.SOCK_STREAM)
        except OSError as exc:
            raise ConnectFailed(f"can't resolve {format_address(self.address)}: {exc.strerror or exc}") from exc
        return [parse_address(address) for *_, address in found]


class Asked:
    """What ``ask()`` yields, each time anew."""

    changes = True
    hostname: str | None = None
    address = None

    def __init__(self, ask: Callable[[], Iterable[Any]]) -> None:
        self._ask = ask

    def look_up(self) -> list[Any]:
        addresses = [parse_address(address) for address in self._ask()]
        if not addresses:
            raise NoAddresses
        return addresses


class NoAddresses(ConnectFailed):
    """There was an answer, and it is that there is no endpoint."""

    def __init__(self) -> None:
        super().__init__("there is no endpoint: the list of addresses is empty")


def discovery_of(addresses: Any) -> Discovery:
    """Whom to ask for the addresses that ``addresses`` stands for: see :class:`gmprpc.Balancer`.

    Raises:
        ValueError: it is no address, and holds none.
    """
    if callable(addresses):
        return Asked(addresses)
    is_pair = isinstance(addresses, tuple) and len(addresses) >= 2 and isinstance(addresses[1], int)
    if not (is_pair or isinstance(addresses, str)):
        try:
            return Listed(addresses)
        except TypeError:
            raise ValueError(f"{addresses!r} is neither an address nor addresses nor callable") from None
    address = parse_address(addresses)
    if isinstance(address, str) or _is_numeric(address[0]):
        return Listed([address])
    return Resolved(*address)


def _is_numeric(host: str) -> bool:
    try:
        ipaddress.ip_address(host)
    except ValueError:
        return False
    return True
