"""The PROXY protocol's header: read exactly, in whatever pieces it comes; what is none is told from what is."""

from __future__ import annotations

import ipaddress
import struct
from typing import Any

import msgpack
import pytest
from hypothesis import example, given
from hypothesis import strategies as st

from gmprpc.exceptions import ProtocolError
from gmprpc.proxyprotocol import AllowedProxies, HeaderReader, ProxyProtocol

V2 = b"\r\n\r\n\0\r\nQUIT\n"
REST = msgpack.packb([0, 1, "echo", ["PROXY TCP4 \r\n\r\n\0"]])

INET = bytes([10, 1, 2, 3, 127, 0, 0, 1]) + struct.pack(">HH", 5000, 4423)
INET6 = ipaddress.ip_address("2001:db8::7").packed + ipaddress.ip_address("::1").packed + INET[8:]
UNIX = b"/run/client.sock".ljust(108, b"\0") + b"/run/server.sock".ljust(108, b"\0")
FROM_INET = ("10.1.2.3", 5000)
FROM_INET6 = ("2001:db8::7", 5000, 0, 0)
TLVS = b"\x03\x00\x04abcd" + b"\xe0\x01\x00" + bytes(256)


def v2(command: int, family: int, addresses: bytes) -> bytes:
    return V2 + bytes([command, family]) + len(addresses).to_bytes(2, "big") + addresses


VALID: dict[bytes, Any] = {
    b"PROXY TCP4 10.1.2.3 127.0.0.1 5000 4423\r\n": FROM_INET,
    b"PROXY TCP4 255.255.255.255 255.255.255.255 65535 65535\r\n": ("255.255.255.255", 65535),
    b"PROXY TCP4 0.0.0.0 0.0.0.0 0 0\r\n": ("0.0.0.0", 0),
    b"PROXY TCP6 2001:db8::7 ::1 5000 4423\r\n": FROM_INET6,
    b"PROXY TCP6 2001:0DB8:0:0::7 ::1 5000 4423\r\n": FROM_INET6,
    b"PROXY TCP6 ::ffff:10.1.2.3 ::1 5000 4423\r\n": ("::ffff:10.1.2.3", 5000, 0, 0),
    b"PROXY TCP6 " + b" ".join([b"ffff:" * 7 + b"ffff"] * 2) + b" 65535 65535\r\n": (
        "ffff:ffff:ffff:ffff:ffff:ffff:ffff:ffff",
        65535,
        0,
        0,
    ),
    b"PROXY UNKNOWN\r\n": None,
    b"PROXY UNKNOWN " + b" ".join([b"ffff:" * 7 + b"ffff"] * 2) + b" 65535 65535\r\n": None,
    b"PROXY UNKNOWN \xff\0 whatever\r\r\n": None,
    v2(0x21, 0x11, INET): FROM_INET,
    v2(0x21, 0x21, INET6): FROM_INET6,
    v2(0x21, 0x11, INET + TLVS): FROM_INET,
    v2(0x21, 0x21, INET6 + bytes(65535 - 36)): FROM_INET6,
    # What is no TCP tells nothing that could be of use here.
    v2(0x21, 0x31, UNIX): None,
    v2(0x21, 0x32, UNIX): None,
    v2(0x21, 0x12, INET): None,
    v2(0x21, 0x22, INET6): None,
    v2(0x21, 0x00, b""): None,
    v2(0x21, 0x00, TLVS): None,
    v2(0x21, 0x01, b""): None,
    v2(0x21, 0x10, b""): None,
    # LOCAL: the balancer speaks for itself, whatever addresses it gives.
    v2(0x20, 0x00, b""): None,
    v2(0x20, 0x11, INET): None,
    v2(0x20, 0x11, b"short"): None,
    v2(0x20, 0xFF, TLVS): None,
}

INVALID = [
    b"PROXY \r\n",
    b"PROXY TCP4\r\n",
    b"PROXY TCP5 10.1.2.3 127.0.0.1 5000 4423\r\n",
    b"PROXY tcp4 10.1.2.3 127.0.0.1 5000 4423\r\n",
    b"PROXY  TCP4 10.1.2.3 127.0.0.1 5000 4423\r\n",
    b"PROXY TCP4 10.1.2.3 127.0.0.1 5000 4423 \r\n",
    b"PROXY TCP4 10.1.2.3 127.0.0.1 5000\r\n",
    b"PROXY TCP4 10.1.2.3 127.0.0.1 5000 4423\n",
    b"PROXY TCP4 10.1.2.3 127.0.0.1 5000\n4423\r\n",
    b"PROXY TCP4 10.1.2.3 127.0.0.1 5000 4423\r\r\n",
    b"PROXY TCP4 10.1.2.03 127.0.0.1 5000 4423\r\n",
    b"PROXY TCP4 10.1.2 127.0.0.1 5000 4423\r\n",
    b"PROXY TCP4 10.1.2.256 127.0.0.1 5000 4423\r\n",
    b"PROXY TCP4 10.1.2.3 nowhere 5000 4423\r\n",
    b"PROXY TCP4 2001:db8::7 ::1 5000 4423\r\n",
    b"PROXY TCP6 10.1.2.3 127.0.0.1 5000 4423\r\n",
    b"PROXY TCP6 fe80::1%eth0 ::1 5000 4423\r\n",
    b"PROXY TCP4 10.1.2.3 127.0.0.1 65536 4423\r\n",
    b"PROXY TCP4 10.1.2.3 127.0.0.1 5000 65536\r\n",
    b"PROXY TCP4 10.1.2.3 127.0.0.1 05000 4423\r\n",
    b"PROXY TCP4 10.1.2.3 127.0.0.1 -1 4423\r\n",
    b"PROXY TCP4 10.1.2.3 127.0.0.1 5000 \xb2\r\n",
    b"PROXY TCP4 10.1.2.3 127.0.0.1 5000 +44\r\n",
    b"PROXY UNKNOWN " + b"x" * 200 + b"\r\n",
    b"PROXY UNKNOWN " + b"x" * 93,
    b"PROXY UNKNOWN\n",
    b"PROXIES",
    b"Please",
    V2[:-1] + b"\r",
    b"\r\n\r\n" + bytes(12),
    v2(0x11, 0x11, INET),
    v2(0x31, 0x11, INET),
    v2(0x22, 0x11, INET),
    v2(0x2F, 0x11, INET),
    v2(0x21, 0x41, INET),
    v2(0x21, 0x13, INET),
    v2(0x21, 0x11, INET[:-1]),
    v2(0x21, 0x21, INET),
    v2(0x21, 0x12, b""),
    v2(0x21, 0x31, INET6),
]


def read(data: bytes, expected: ProxyProtocol = "auto", sizes: Any = ()) -> tuple[HeaderReader, bytes]:
    """What reads ``data``, given in pieces of ``sizes`` at most and then a byte at a time, and what it leaves."""
    reader = HeaderReader(expected)
    sizes = iter(sizes)
    while data and not reader.is_over:
        assert reader.wanted > 0
        piece = data[: min(next(sizes, 1), reader.wanted)]
        taken = reader.take(piece)
        assert 0 <= taken <= len(piece)
        assert taken or reader.is_over
        data = data[taken:]
    return reader, data


def version_of(header: bytes) -> ProxyProtocol:
    return "v1" if header.startswith(b"P") else "v2"


@pytest.mark.parametrize("header, source", VALID.items(), ids=map(str, range(len(VALID))))
def test_a_header_is_taken_to_its_last_byte_and_no_further(header: bytes, source: Any) -> None:
    expectations: list[ProxyProtocol] = ["auto", version_of(header)]
    for expected in expectations:
        for sizes in ([], [5, 8, 100], [10**6] * 3):
            reader, rest = read(header + REST, expected, sizes)
            assert (reader.source, rest) == (source, REST)
            assert reader.is_present
            assert not reader.is_optional
        for end in (1, 6, len(header) // 2, len(header) - 1):
            reader, rest = read(header[:end], expected, [10**6])
            assert (reader.is_over, reader.is_present, reader.source, rest) == (False, False, None, b"")


@pytest.mark.parametrize("header", INVALID, ids=map(str, range(len(INVALID))))
def test_what_is_no_valid_header_is_refused(header: bytes) -> None:
    for sizes in ([], [10**6] * 3):
        for expected in ("auto", version_of(header)):
            with pytest.raises(ProtocolError, match=r"PROXY header v[12]"):
                read(header + REST, expected, sizes)


def test_the_other_version_is_refused_and_so_is_none() -> None:
    for header in VALID:
        with pytest.raises(ProtocolError, match="no PROXY header v"):
            read(header, "v2" if header.startswith(b"P") else "v1")
    versions: list[ProxyProtocol] = ["v1", "v2"]
    for expected in versions:
        with pytest.raises(ProtocolError, match="no PROXY header v"):
            read(REST, expected)


@pytest.mark.parametrize(
    "first",
    [REST, msgpack.packb([2, "echo", []]), b"\xdc\0\4", b"\xdd\0\0\0\4", b"\x16\x03\x01", b"\x15\x03"],
    ids=["request", "notification", "array 16", "array 32", "TLS handshake", "TLS alert"],
)
def test_where_a_header_may_be_missing_nothing_else_is_taken(first: bytes) -> None:
    assert HeaderReader("auto").is_optional
    reader, rest = read(first)
    assert rest == first
    assert reader.is_over
    assert not reader.is_present


def test_what_was_sent_is_shown_in_part_only() -> None:
    with pytest.raises(ProtocolError) as raised:
        read(REST + bytes(1000), "v1", [10**6])
    assert str(raised.value) == f"no PROXY header v1, but {REST[:20]!r}"


def outcome_of(data: bytes, expected: ProxyProtocol, sizes: Any) -> Any:
    try:
        reader, rest = read(data, expected, sizes)
    except ProtocolError:
        return "refused"
    return reader.is_over, reader.is_present, reader.source, rest


HEADERS = st.sampled_from([*VALID, *INVALID])
MUTATED = st.builds(
    lambda header, at, byte, end: (header[: at % len(header)] + byte + header[at % len(header) + 1 :])[:end],
    HEADERS.filter(lambda header: len(header) < 1000),
    st.integers(0, 500),
    st.binary(max_size=2),
    st.integers(1, 600),
)


@given(
    st.one_of(
        st.binary(max_size=300),
        st.binary(max_size=300).map(lambda data: b"PROXY " + data),
        st.binary(max_size=300).map(lambda data: V2 + data),
        MUTATED,
    ),
    st.sampled_from(["auto", "v1", "v2"]),
    st.lists(st.integers(1, 120), max_size=30),
)
@example(b"", "auto", [])
def test_whatever_comes_has_one_outcome_in_any_pieces(data: bytes, expected: ProxyProtocol, sizes: list[int]) -> None:
    outcome = outcome_of(data, expected, sizes)
    assert outcome == outcome_of(data, expected, [10**6] * 3)
    if outcome != "refused":
        is_over, is_present, source, rest = outcome
        assert data.endswith(rest)
        assert is_over or not rest
        assert is_over or not is_present
        assert is_present or source is None


@given(st.ip_addresses(v=4), st.ip_addresses(v=6), st.integers(0, 65535))
def test_both_versions_tell_of_any_address(
    host: ipaddress.IPv4Address, host6: ipaddress.IPv6Address, port: int
) -> None:
    ports = struct.pack(">HH", port, 4423)
    for header in (
        f"PROXY TCP4 {host} 127.0.0.1 {port} 4423\r\n".encode(),
        v2(0x21, 0x11, host.packed + bytes(4) + ports),
    ):
        reader, _ = read(header)
        assert reader.source == (str(host), port)
    for header in (
        f"PROXY TCP6 {host6} ::1 {port} 4423\r\n".encode(),
        v2(0x21, 0x21, host6.packed + bytes(16) + ports),
    ):
        reader, _ = read(header)
        assert reader.source is not None
        assert ipaddress.ip_address(reader.source[0]) == host6
        assert reader.source[1:] == (port, 0, 0)


# Whose headers are believed.


def test_networks_and_addresses_may_be_believed() -> None:
    proxies = AllowedProxies(["127.0.0.1/8", "10.0.0.7", "2001:db8::/32"])
    for host in ("127.0.0.1", "127.1.2.3", "10.0.0.7", "2001:db8:1::", "::ffff:10.0.0.7", "2001:db8::1%eth0"):
        assert proxies.has(host), host
    for stranger in ("10.0.0.8", "::1", "2001:db9::", "::ffff:10.0.0.8", None):
        assert not proxies.has(stranger), stranger


def test_unix_sockets_may_be_believed() -> None:
    assert AllowedProxies(["unix"]).has(None)
    assert not AllowedProxies(["unix"]).has("127.0.0.1")


@pytest.mark.parametrize("allowed", [["nowhere"], ["10.0.0.0/33"], "127.0.0.1", ["unix:/run/socket"], [""]])
def test_what_is_no_network_is_refused(allowed: Any) -> None:
    with pytest.raises(ValueError):
        AllowedProxies(allowed)
