"""What a connection has to pass before its first message: the PROXY protocol's header, the TLS handshake.

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


class Entrance:
    """Takes in what a server has accepted; knows no MessagePack-RPC."""

    def __init__(
        self,
        *,
        proxy_protocol: ProxyProtocol,
        proxy_allow_from: Iterable[str] | None,
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
        self._strange_proxies = Notice(REFUSED_INTERVAL)
        #: The greenlets of those that are still at it.
        self.under_way: set[Any] = set()

    def take_in(
        self, sock: Any, address: Any, ssl_context: ssl.SSLContext | None
    ) -> tuple[Stream, InetPeer | UnixPeer] | None:
        """The stream on which messages come, and who sends them; None if it doesn't come to that: then all is closed.

        Blocks this greenlet. In ``arrivals`` the stream is left to the caller.
        """
        peer = peer_of(sock, address)
        greenlet = gevent.getcurrent()
        self.under_way.add(greenlet)
        try:
            if self._proxy_protocol != "off":
                told = self._peer_told(sock, peer)
                if told is None:
                    return None
                peer = told
            plain = PlainStream(sock, write_timeout=self._write_timeout)
            self._arrivals[sock] = plain.abandon
            try:
                if ssl_context is None:
                    return plain, peer
                tls = self._secured(plain, ssl_context)
                certificate = tls.peer_certificate()
                return tls, peer if certificate is None else with_certificate(peer, certificate)
            except BaseException:  # It may be a kill, by who stops the server.
                plain.close()
                raise
        except (RPCError, OSError) as exc:
            self._counters.failed_handshakes += 1
            # Who looks whether somebody is there says nothing, and may look often.
            level = logging.INFO if isinstance(exc, _Silent) else logging.WARNING
            log(logger, level, "connection with %s: %s", format_address(peer), exc, peer=format_address(peer))
            return None
        finally:
            self.under_way.discard(greenlet)

    def _secured(self, plain: PlainStream, context: ssl.SSLContext) -> TLSStream:
        tls = TLSStream(plain, context, server_side=True)
        with self._deadline("TLS handshake"):
            tls.handshake()
        return tls

    def _peer_told(self, sock: Any, proxy: InetPeer | UnixPeer) -> InetPeer | UnixPeer | None:
        """Who has connected, if ``proxy`` has done so for somebody else; None if it has no business to say so."""
        is_allowed = self._proxies.has(proxy.host if isinstance(proxy, InetPeer) else None)
        reader = HeaderReader(self._proxy_protocol)
        if not is_allowed and not reader.is_optional:
            self._refuse(proxy)
            return None
        try:
            with self._deadline("PROXY header"):
                _read_header(sock, reader)
        except (_Late, _Silent):
            if not reader.is_optional:
                raise
            return proxy  # It has connected itself, and may wait for the first word.
        if reader.is_present and not is_allowed:
            self._refuse(proxy)
            return None
        return proxy if reader.source is None else InetPeer(reader.source, proxy=proxy)

    def _refuse(self, proxy: InetPeer | UnixPeer) -> None:
        self._counters.refused_connections += 1
        peer = format_address(proxy)
        self._strange_proxies.log("connection with %s refused: proxy_allow_from doesn't have it", peer, peer=peer)

    def _deadline(self, what: str) -> gevent.Timeout:
        return gevent.Timeout(self._timeout, _Late(f"no {what} within {self._timeout} s"))


class _Late(RPCError):
    """Something took longer than ``handshake_timeout``."""


class _Silent(ConnectionClosed):
    """The peer has closed the connection without a word."""


def _read_header(sock: Any, reader: HeaderReader) -> None:
    """Have ``reader`` read the header from ``sock``: what comes behind it stays there."""
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
