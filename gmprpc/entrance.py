"""What a connection has to pass before its first message: the PROXY header, a limit for each peer, the TLS handshake.

Each has its deadline, and whoever doesn't get through costs one line in the log and nobody else anything.
"""

from __future__ import annotations

import logging
import socket as stdlib_socket
import ssl
from collections.abc import Callable, Iterable
from typing import Any

import gevent

from .acceptor import REFUSED_INTERVAL, Notice
from .exceptions import ConnectionClosed, RPCError
from .log import log
from .metrics import Counters
from .proxyprotocol import LOCAL_PROXIES, PROXY_PROTOCOLS, AllowedProxies, HeaderReader, ProxyProtocol
from .streams import PlainStream, Stream, TLSStream
from .transport import InetPeer, UnixPeer, format_address, peer_of, with_certificate

logger = logging.getLogger("gmprpc.server")

# So much of a PROXY header is read at once: a page. Those with a client's certificate in them have some 100 bytes.
_PIECE_SIZE = 4096

# How the address of a peer over IPv4 begins at a socket for both families.
_MAPPED = "::ffff:"


class Entrance:
    """Takes in what a server has accepted; knows no MessagePack-RPC."""

    def __init__(
        self,
        *,
        proxy_protocol: ProxyProtocol,
        proxy_allow_from: Iterable[str] | None,
        max_connections_per_peer: int | None,
        handshake_timeout: float | None,
        write_timeout: float | None,
        arrivals: dict[Any, Callable[[], Any]],
        counters: Counters,
    ) -> None:
        """``arrivals`` are as for :class:`~gmprpc.acceptor.Acceptor`, the others as for :class:`gmprpc.Server`.

        Raises:
            ValueError: there is no such ``proxy_protocol``, or network.
        """
        if proxy_protocol not in PROXY_PROTOCOLS:
            raise ValueError(f"proxy_protocol has to be one of {', '.join(PROXY_PROTOCOLS)}, not {proxy_protocol!r}")
        self._proxy_protocol = proxy_protocol
        self._proxies = AllowedProxies(LOCAL_PROXIES if proxy_allow_from is None else proxy_allow_from)
        self._timeout = handshake_timeout
        self._write_timeout = write_timeout
        self._arrivals = arrivals
        self._counters = counters
        self._max_connections_per_peer = max_connections_per_peer
        # How many connections each peer has, where that is limited.
        self._crowd: dict[str | int, int] = {}
        self._refusals: dict[type[_Refused], Notice] = {
            reason: Notice(REFUSED_INTERVAL) for reason in (_Stranger, _Crowded)
        }
        #: The greenlets of those that are still at it.
        self.under_way: set[Any] = set()

    def take_in(
        self, sock: Any, address: Any, ssl_context: ssl.SSLContext | None
    ) -> tuple[Stream, InetPeer | UnixPeer] | None:
        """The stream on which messages come, and who sends them; None if it doesn't come to that: then all is closed.

        Blocks this greenlet. In ``arrivals`` the stream is left to the caller, who says with :meth:`let_out` when it
        is closed.
        """
        peer = peer_of(sock, address)
        greenlet = gevent.getcurrent()
        self.under_way.add(greenlet)
        inside: InetPeer | UnixPeer | None = None
        try:
            # Who may speak for others isn't one of them; anybody else takes a place from the very beginning.
            is_proxy = self._proxy_protocol != "off" and self._is_allowed(peer)
            if not is_proxy:
                inside = self._let_in(peer)
            if self._proxy_protocol != "off":
                peer = self._peer_told(sock, peer, is_allowed=is_proxy)
            if is_proxy:
                inside = self._let_in(peer)
            plain = PlainStream(sock, write_timeout=self._write_timeout)
            self._arrivals[sock] = plain.abandon
            try:
                stream: Stream = plain
                if ssl_context is not None:
                    stream = tls = self._secured(plain, ssl_context)
                    if (certificate := tls.peer_certificate()) is not None:
                        peer = with_certificate(peer, certificate)
            except BaseException:  # It may be a kill, by who stops the server.
                plain.close()
                self._arrivals.pop(sock, None)  # In a process that was forked off it isn't there any more.
                raise
            inside = None  # It is the caller's.
            return stream, peer
        except _Refused as exc:
            self._counters.refused_connections += 1
            shown_peer = format_address(peer)
            self._refusals[type(exc)].log("connection with %s refused: %s", shown_peer, exc, peer=shown_peer)
            return None
        except (RPCError, OSError) as exc:
            self._counters.failed_handshakes += 1
            # Who looks whether somebody is there says nothing, and may look often.
            level = logging.INFO if isinstance(exc, _Silent) else logging.WARNING
            log(logger, level, "connection with %s: %s", format_address(peer), exc, peer=format_address(peer))
            return None
        finally:
            self.under_way.discard(greenlet)
            if inside is not None:
                self.let_out(inside)

    def let_out(self, peer: InetPeer | UnixPeer) -> None:
        """A connection with ``peer``, who was taken in, has ended."""
        key = _key_of(peer)
        if key in self._crowd:
            self._crowd[key] -= 1
            if not self._crowd[key]:
                del self._crowd[key]

    def _let_in(self, peer: InetPeer | UnixPeer) -> InetPeer | UnixPeer:
        """Give ``peer`` one of its places."""
        limit = self._max_connections_per_peer
        if limit is not None and (key := _key_of(peer)) is not None:
            count = self._crowd.get(key, 0)
            if count >= limit:
                raise _Crowded(f"it has max_connections_per_peer ({limit})")
            self._crowd[key] = count + 1
        return peer

    def _secured(self, plain: PlainStream, context: ssl.SSLContext) -> TLSStream:
        tls = TLSStream(plain, context, server_side=True)
        with self._deadline("TLS handshake"):
            tls.handshake()
        return tls

    def _is_allowed(self, peer: InetPeer | UnixPeer) -> bool:
        """Whether ``peer`` may tell of others."""
        return self._proxies.has(peer.host if isinstance(peer, InetPeer) else None)

    def _peer_told(self, sock: Any, proxy: InetPeer | UnixPeer, *, is_allowed: bool) -> InetPeer | UnixPeer:
        """Who has connected, if ``proxy`` has done so for somebody else."""
        reader = HeaderReader(self._proxy_protocol)
        if not is_allowed and not reader.is_optional:
            raise _Stranger("proxy_allow_from doesn't have it")
        try:
            with self._deadline("PROXY header"):
                _read_header(sock, reader)
        except (_Late, _Silent):
            if not reader.is_optional:
                raise
            return proxy  # It has connected itself, and may wait for the first word.
        if reader.is_present and not is_allowed:
            raise _Stranger("proxy_allow_from doesn't have it")
        return proxy if reader.source is None else InetPeer(reader.source, proxy=proxy)

    def _deadline(self, what: str) -> gevent.Timeout:
        return gevent.Timeout(self._timeout, _Late(f"no {what} within {self._timeout} s"))


class _Refused(RPCError):
    """The connection is closed at once, and not by accident."""


class _Stranger(_Refused):
    """Somebody speaks for others who mustn't."""


class _Crowded(_Refused):
    """There are enough connections with this peer."""


class _Late(RPCError):
    """Something took longer than ``handshake_timeout``."""


class _Silent(ConnectionClosed):
    """The peer has closed the connection without a word."""


def _read_header(sock: Any, reader: HeaderReader) -> None:
    """Have ``reader`` read the header from ``sock``: what comes behind it stays there."""
    sock.settimeout(None)  # Whatever the program has for a default: the deadline is the caller's.
    is_first = True
    while not reader.is_over:
        data = sock.recv(min(reader.wanted, _PIECE_SIZE), stdlib_socket.MSG_PEEK)
        if not data and is_first:
            raise _Silent("closed before its PROXY header")
        if not data:
            raise ConnectionClosed("closed amid its PROXY header")
        is_first = False
        taken = reader.take(data)
        while taken:
            taken -= len(sock.recv(taken))


def _key_of(peer: InetPeer | UnixPeer) -> str | int | None:
    """What the connections of one peer have in common: the IP address, or the user; None where that can't be told."""
    if isinstance(peer, UnixPeer):
        return peer.uid
    return peer.host.removeprefix(_MAPPED) if "." in peer.host else peer.host
