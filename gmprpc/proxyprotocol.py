"""The header of the PROXY protocol, in which a balancer tells for whom it has connected; no I/O.

Versions 1 (a line of text) and 2 (binary) of https://www.haproxy.org/download/3.3/doc/proxy-protocol.txt, quoted below
as the specification.
"""

from __future__ import annotations

from collections.abc import Iterable
from ipaddress import IPv4Address, IPv4Network, IPv6Address, IPv6Network, ip_address, ip_network
from typing import Final, Literal, get_args

from .exceptions import ProtocolError

#: What a server may be told to expect: nothing, one of the versions, or "auto": either of them, or nothing.
ProxyProtocol = Literal["off", "v1", "v2", "auto"]
PROXY_PROTOCOLS: Final[tuple[ProxyProtocol, ...]] = get_args(ProxyProtocol)

#: What stands in a list of networks for all peers at unix sockets.
UNIX: Final = "unix"
#: Whose headers are believed where nothing else is said: those of this machine.
LOCAL_PROXIES: Final = ("127.0.0.0/8", "::1/128", UNIX)

# "PROXY", and for TCP over IPv6 at most so many bytes with the CRLF (section 2.1).
_V1_MARK: Final = b"PROXY "
_V1_SIZE: Final = 107
# The signature; then version and command, family and protocol, and two bytes of how many more there are (section 2.2).
_V2_MARK: Final = b"\r\n\r\n\0\r\nQUIT\n"
_V2_FIXED_SIZE: Final = 16
_V2_VERSION: Final = 2
_LOCAL, _PROXY = 0, 1
# How many bytes of addresses the families have, and the protocols within them: none, streams and datagrams.
_UNSPECIFIED, _INET, _INET6, _UNIX = range(4)
_ADDRESSES_SIZE: Final = {_UNSPECIFIED: 0, _INET: 12, _INET6: 36, _UNIX: 216}
_STREAM: Final = 1
# So much of what is no header is shown. Picked arbitrarily.
_SHOWN_SIZE: Final = 20
_PROTOCOLS: Final = (0, _STREAM, 2)

#: An address as the system gives it.
Source = tuple[str, int] | tuple[str, int, int, int]


class HeaderReader:
    """Takes a header in whatever pieces it comes, and not a byte of what follows it.

    With "auto" there may be none: no MessagePack-RPC and no TLS begins with the first byte of either version.
    """

    def __init__(self, expected: ProxyProtocol) -> None:
        self._expected = expected
        self._version = "" if expected == "auto" else expected
        self._data = bytearray()
        self._size = _V1_SIZE if self._version == "v1" else _V2_FIXED_SIZE
        #: True when the next byte is none of the header's.
        self.is_over = False
        #: True when there was a header.
        self.is_present = False
        #: For whom the proxy has connected; None where it doesn't say, as for its own health checks.
        self.source: Source | None = None

    @property
    def is_optional(self) -> bool:
        """True while it is nothing out of the ordinary if no header comes."""
        return self._expected == "auto" and not self._data

    @property
    def wanted(self) -> int:
        """How many bytes :meth:`take` wants to see next, at most."""
        return self._size - len(self._data)

    def take(self, data: bytes) -> int:
        """Take what belongs to the header from the front of ``data``, the next bytes; returns how many that are.

        Raises:
            ProtocolError: this is no header, or not such a one as is expected.
        """
        if not self._version:
            if data[:1] not in (_V1_MARK[:1], _V2_MARK[:1]):
                self.is_over = True
                return 0
            self._version = "v1" if data[:1] == _V1_MARK[:1] else "v2"
            self._size = _V1_SIZE if self._version == "v1" else _V2_FIXED_SIZE
        begun = len(self._data)
        self._data += data[: self.wanted]
        mark = _V1_MARK if self._version == "v1" else _V2_MARK
        if self._data[: len(mark)] != mark[: len(self._data)]:
            raise ProtocolError(f"no PROXY header {self._version}, but {bytes(self._data[:_SHOWN_SIZE])!r}")
        if self._version == "v1":
            self._read_line()
        else:
            self._read_binary()
        return len(self._data) - begun

    # Version 1.

    def _read_line(self) -> None:
        end = self._data.find(b"\n") + 1
        if not end:
            if not self.wanted:
                raise ProtocolError(f"no PROXY header v1: its line doesn't end within {_V1_SIZE} bytes")
            return
        del self._data[end:]
        self.is_over = self.is_present = True
        words = bytes(self._data).split(b" ")
        try:
            # "the receiver must ignore anything presented before the CRLF" behind UNKNOWN.
            if words[-1][-2:] != b"\r\n":
                raise ValueError("CRLF")
            words[-1] = words[-1][:-2]
            if words[1] != b"UNKNOWN":
                _, family, source, destination, source_port, destination_port = words
                _host_of(family, destination)
                _port_of(destination_port)
                self.source = _source(_host_of(family, source), _port_of(source_port))
        except ValueError:
            raise ProtocolError(f"invalid PROXY header v1: {bytes(self._data)!r}") from None

    # Version 2.

    def _read_binary(self) -> None:
        if len(self._data) < _V2_FIXED_SIZE:
            return
        version, command = divmod(self._data[12], 16)
        family, protocol = divmod(self._data[13], 16)
        size = int.from_bytes(self._data[14:16], "big")
        if version != _V2_VERSION or command not in (_LOCAL, _PROXY):
            raise ProtocolError(f"invalid PROXY header v2: version and command {self._data[12]:#04x}")
        if command == _PROXY:
            # "other values ... must be rejected as invalid by receivers"
            if family not in _ADDRESSES_SIZE or protocol not in _PROTOCOLS:
                raise ProtocolError(f"invalid PROXY header v2: family and protocol {self._data[13]:#04x}")
            if protocol and size < _ADDRESSES_SIZE[family]:
                raise ProtocolError(f"invalid PROXY header v2: {size} bytes for addresses of family {family}")
        self._size = _V2_FIXED_SIZE + size  # Behind the addresses may be TLVs, which nobody here wants to know.
        if self.wanted:
            return
        self.is_over = self.is_present = True
        # What has come over something else than TCP has no address that would tell anything here.
        if command == _PROXY and protocol == _STREAM:
            addresses = bytes(self._data[_V2_FIXED_SIZE:])
            if family == _INET:
                self.source = _source(IPv4Address(addresses[:4]), int.from_bytes(addresses[8:10], "big"))
            elif family == _INET6:
                self.source = _source(IPv6Address(addresses[:16]), int.from_bytes(addresses[32:34], "big"))


def _host_of(family: bytes, word: bytes) -> IPv4Address | IPv6Address:
    text = word.decode("ascii")
    if family == b"TCP4":
        return IPv4Address(text)
    if family == b"TCP6" and "%" not in text:
        return IPv6Address(text)
    raise ValueError(family)


def _port_of(word: bytes) -> int:
    # "range 0 to 65535 inclusive", in decimal and without leading zeroes.
    if not word.isdigit() or len(word) > 5 or str(port := int(word)).encode() != word or port >= 2**16:
        raise ValueError(word)
    return port


def _source(host: IPv4Address | IPv6Address, port: int) -> Source:
    if isinstance(host, IPv4Address):
        return str(host), port
    mapped = host.ipv4_mapped
    return (f"::ffff:{mapped}" if mapped else host.compressed), port, 0, 0  # As the system shows them.


class AllowedProxies:
    """Those whose headers are believed: who is believed can pass for anybody."""

    def __init__(self, allowed: Iterable[str]) -> None:
        """``allowed`` has addresses and networks, ``"10.0.0.0/8"``, and :data:`UNIX` for peers at unix sockets.

        Raises:
            ValueError: one of them is none.
        """
        if isinstance(allowed, str):
            raise ValueError(f"{allowed!r}: give a list of networks")
        self._networks: list[IPv4Network | IPv6Network] = []
        self._has_unix = False
        for text in allowed:
            if text == UNIX:
                self._has_unix = True
            else:
                self._networks.append(ip_network(text, strict=False))  # Also what is written 127.0.0.1/8.

    def has(self, host: str | None) -> bool:
        """Whether the peer at the IP address ``host`` is one of them; None stands for one at a unix socket."""
        if host is None:
            return self._has_unix
        address = ip_address(host)
        # A socket for both families shows a peer over IPv4 so.
        address = getattr(address, "ipv4_mapped", None) or address
        return any(address in network for network in self._networks)
