"""What tests ask over HTTP."""

from __future__ import annotations

from collections.abc import Mapping
from http.client import parse_headers
from io import BytesIO
from typing import Any, NamedTuple

from gevent import socket


class Answer(NamedTuple):
    """What came back."""

    status: int
    headers: Mapping[str, str]
    body: bytes


def connect(address: Any) -> Any:
    """A socket connected to ``address``, as a server's ``address`` gives it."""
    if isinstance(address, str):
        sock = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
        sock.connect(address.removeprefix("unix:"))
        return sock
    return socket.create_connection(address[:2])


def ask(address: Any, request: bytes) -> Answer:
    """The answer to ``request``, behind which the connection has to be closed."""
    with connect(address) as sock:
        sock.sendall(request)
        return answer_on(sock)


def answer_on(sock: Any) -> Answer:
    """The answer that comes on ``sock``, up to the end of the stream."""
    data = b""
    while piece := sock.recv(65536):
        data += piece
    status, _, rest = data.partition(b"\r\n")
    head, _, body = rest.partition(b"\r\n\r\n")
    headers = parse_headers(BytesIO(head + b"\r\n\r\n"))
    return Answer(int(status.split()[1]), {name.lower(): value for name, value in headers.items()}, body)


def get(address: Any, path: str, method: str = "GET", headers: str = "") -> Answer:
    """The answer to a plain request; each of ``headers`` has its line."""
    return ask(address, f"{method} {path} HTTP/1.1\r\nHost: test\r\n{headers}\r\n".encode())
