"""Addresses, and the sockets that listen at them; who is at the other end of one that is connected.

What is read from these sockets and written to them is :mod:`.streams`'s business.
"""

from __future__ import annotations

import errno
import os
import shutil
import socket as stdlib_socket
import stat
import struct
from contextlib import suppress
from dataclasses import dataclass, field, replace
from typing import Any, Self

from gevent import socket
from gevent.baseserver import parse_address as parse_listener  # type: ignore[attr-defined]  # The stubs forgot it.

from .streams import Certificate, RawSocket

#: What `gmprpc.Client` and `gmprpc.Server` take to say where: ``("host", port)``, ``"host:port"``, ``"unix:/path"``.
Address = tuple[str, int] | tuple[str, int, int, int] | str | int

UNIX_PREFIX = "unix:"
FD_PREFIX = "fd://"
#: How AnyEvent says that a port is the path of a unix socket.
UNIX_HOST = "unix/"

# How many connections may wait to be accepted: gunicorn's number.
_BACKLOG = 2048


def parse_address(address: Any) -> tuple[str, int] | str:
    """``(host, port)`` or ``"unix:/path"`` for anything that names one place to connect to.

    Raises:
        ValueError: ``address`` names none; the message says what would.
    """
    if isinstance(address, str):
        if address.startswith(UNIX_PREFIX) and len(address) > len(UNIX_PREFIX):
            return address
        host, colon, port = address.rpartition(":")
        if host.startswith("[") and host.endswith("]"):
            host = host[1:-1]
        elif ":" in host:
            colon = ""  # An IPv6 address needs its brackets: its last group could be a port.
        if colon and port.isascii() and port.isdigit() and int(port) < 2**16 and _is_host(host):
            return host or "127.0.0.1", int(port)
    elif isinstance(address, (tuple, list)) and len(address) >= 2:
        host, port = address[:2]
        if type(port) is int and 0 <= port < 2**16 and isinstance(host, str) and _is_host(host):
            scope = f"%{address[3]}" if len(address) > 3 and address[3] else ""
            return f"{host}{scope}", port
    raise ValueError(f"{address!r} is no address: give HOST:PORT, (host, port) or unix:PATH")


def _is_host(name: str) -> bool:
    try:
        name.encode("idna")  # What the resolver would do, in a thread in which gevent prints that it failed.
    except UnicodeError:
        return False
    return True


def format_address(address: Any) -> str:
    """``address`` as a person would type it: ``127.0.0.1:4423``, ``[::1]:4423`` or ``unix:/path``."""
    if isinstance(address, tuple) and len(address) >= 2:
        host, port = address[:2]
        return f"[{host}]:{port}" if ":" in str(host) else f"{host}:{port}"
    return str(address)


class InetPeer(tuple[Any, ...]):
    """Who is at the other end of a TCP connection: ``(host, port)``, of IPv6 ``(host, port, flow, scope)``.

    It compares, and is pickled, as the tuple that it is.
    """

    #: The address of the balancer that has connected for this peer, and says so (PROXY protocol); None without one.
    proxy: InetPeer | UnixPeer | None
    #: What its TLS certificate says, as :meth:`ssl.SSLSocket.getpeercert` has it; None where none was asked for, or
    #: shown. It has been verified.
    certificate: Certificate | None

    def __new__(
        cls,
        address: tuple[Any, ...],
        *,
        proxy: InetPeer | UnixPeer | None = None,
        certificate: Certificate | None = None,
    ) -> Self:
        """The peer at ``address``."""
        self = super().__new__(cls, address)
        self.proxy = proxy
        self.certificate = certificate
        return self

    @property
    def host(self) -> str:
        """The IP address."""
        return self[0]  # type: ignore[no-any-return]

    @property
    def port(self) -> int:
        """The port that the peer calls from."""
        return self[1]  # type: ignore[no-any-return]


@dataclass(frozen=True, slots=True)
class UnixPeer:
    """Who is at the other end of a unix socket, as the kernel saw it when that process connected.

    On systems that don't tell all but ``path`` are None.
    """

    #: The address that it connected to.
    path: str
    #: The number of its process.
    pid: int | None = None
    #: The user and the group that it ran as.
    uid: int | None = None
    gid: int | None = None
    #: What its TLS certificate says, as for :class:`InetPeer`.
    certificate: Certificate | None = field(default=None, compare=False, repr=False)

    def __str__(self) -> str:
        return self.path if self.pid is None else f"{self.path} (pid {self.pid}, uid {self.uid}, gid {self.gid})"


def peer_of(sock: Any, address: Any) -> InetPeer | UnixPeer:
    """Who has connected ``sock``; ``address`` is what the system gave with it."""
    if sock.family != stdlib_socket.AF_UNIX:
        return InetPeer(address)
    name = sock.getsockname()
    path = UNIX_PREFIX + (name if isinstance(name, str) else name.decode(errors="replace").replace("\0", "@"))
    try:
        credentials = sock.getsockopt(stdlib_socket.SOL_SOCKET, stdlib_socket.SO_PEERCRED, _CREDENTIALS.size)
    except (AttributeError, OSError):
        return UnixPeer(path)
    return UnixPeer(path, *_CREDENTIALS.unpack(credentials))


def with_certificate(peer: InetPeer | UnixPeer, certificate: Certificate) -> InetPeer | UnixPeer:
    """``peer``, who has shown ``certificate``."""
    if isinstance(peer, InetPeer):
        return InetPeer(peer, proxy=peer.proxy, certificate=certificate)
    return replace(peer, certificate=certificate)


# Linux's struct ucred.
_CREDENTIALS = struct.Struct("3i")


@dataclass(frozen=True, slots=True)
class SocketFile:
    """Whose the file of a unix socket is to be, and what others may do; None leaves it to the system.

    The names and meanings are those of systemd's SocketMode, SocketUser and SocketGroup: writing is connecting.
    """

    mode: int | None = None
    user: str | int | None = None
    group: str | int | None = None

    def apply(self, path: str) -> None:
        """Change the file at ``path``; raises OSError where that isn't allowed, LookupError for an unknown name."""
        if self.user is not None or self.group is not None:
            shutil.chown(path, _number_or_name(self.user), _number_or_name(self.group))  # type: ignore[arg-type]
        if self.mode is not None:
            os.chmod(path, self.mode)


def _number_or_name(owner: str | int | None) -> str | int | None:
    return int(owner) if isinstance(owner, str) and owner.isdecimal() else owner


def open_listener(listener: Any, socket_file: SocketFile | None = None) -> Any:
    """The listening socket that ``listener`` stands for.

    That is every form which :class:`gevent.server.StreamServer` takes, ``"unix:/path"``, and ``"fd://3"``, which takes
    over a listening descriptor, as from systemd. A socket is handed through. ``socket_file`` is for ``"unix:/path"``.

    Raises:
        OSError: it can't be bound, or its file not be changed.
        LookupError: ``socket_file`` names a user or a group that there isn't.
        ValueError: it is no address.
    """
    if hasattr(listener, "accept"):
        listener.setblocking(False)  # StreamServer accepts until there is nothing to accept.
        return listener
    if makes_file(listener):
        path = listener.removeprefix(UNIX_PREFIX)
        if not path:
            raise ValueError(f"{listener!r}: give the path of the socket, as in unix:/run/app.sock")
        remove_stale(path)
        return _listen(socket.AF_UNIX, path, socket_file)
    if isinstance(listener, str) and listener.startswith(FD_PREFIX):
        number = listener.removeprefix(FD_PREFIX)
        if not number.isdigit():
            raise ValueError(f"{listener!r}: give the number of a listening descriptor, as in fd://3")
        sock = socket.socket(fileno=int(number))
        if not sock.getsockopt(socket.SOL_SOCKET, socket.SO_ACCEPTCONN):
            sock.detach()  # It isn't ours to close.
            raise OSError(errno.EINVAL, "that socket doesn't listen")
        return sock
    family, address = parse_listener(listener)
    return _listen(family, address)


def makes_file(listener: Any) -> bool:
    """Whether :func:`open_listener` makes a file for ``listener``."""
    return isinstance(listener, str) and listener.startswith(UNIX_PREFIX)


def _listen(family: int, address: Any, socket_file: SocketFile | None = None) -> socket.socket:
    sock = socket.socket(family, socket.SOCK_STREAM)
    try:
        if family != socket.AF_UNIX:
            # After a restart the port is ours again at once, as with gevent's StreamServer.
            sock.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        sock.bind(address)
        if socket_file is not None:
            try:
                socket_file.apply(address)  # Before anybody can connect.
            except BaseException:
                os.unlink(address)
                raise
        sock.listen(_BACKLOG)
    except BaseException:
        sock.close()
        raise
    return sock


def remove_stale(path: str) -> None:
    """Remove the file of a unix socket that nobody listens on any more.

    Raises:
        OSError: (EADDRINUSE) somebody does, or the file is no socket; or it can't be told.
    """
    try:
        if not stat.S_ISSOCK(os.stat(path).st_mode):
            raise FileExistsError(errno.EADDRINUSE, "a file that is no socket is in the way", path)
    except FileNotFoundError:
        return
    # Not gevent's: that would try again and again while the other's queue is full.
    with RawSocket(socket.AF_UNIX, socket.SOCK_STREAM) as probe:
        probe.setblocking(False)
        answer = probe.connect_ex(path)
    if answer in (0, errno.EAGAIN):
        raise OSError(errno.EADDRINUSE, "another server listens there", path)
    if answer not in (errno.ECONNREFUSED, errno.ENOENT):
        raise OSError(answer, os.strerror(answer), path)
    with suppress(FileNotFoundError):
        os.unlink(path)


def file_identity(path: str) -> tuple[int, int] | None:
    """Tells the file at ``path`` from one that may stand there later; None if there is none."""
    try:
        status = os.stat(path)
    except OSError:
        return None
    return status.st_dev, status.st_ino
