"""The server that is laid siege to: gmprpc with its default limits, and the methods that the trials need."""

from __future__ import annotations

import argparse
import ctypes
import gc
import inspect
import logging
import os
import resource
import ssl
import sys
import threading
from collections import Counter
from typing import Any

import gevent
import greenlet
from gevent.event import Event

import gmprpc

service = gmprpc.Service()
spare_files: list[int] = []
gates: dict[str, Event] = {}
counts: Counter[str] = Counter()


@service.method
def echo(value: Any) -> Any:
    return value


@service.method
def large(size: int) -> bytes:
    """At once, so that the peer's unread answers are all that holds it up."""
    return b"x" * size


@service.method
def large_after(seconds: float, size: int) -> bytes:
    gevent.sleep(seconds)
    return b"x" * size


@service.method
def pause(seconds: float, value: Any) -> Any:
    gevent.sleep(seconds)
    return value


@service.method(deferred=True)
def later(reply: gmprpc.Reply | None, seconds: float, value: Any) -> None:
    if reply is not None:
        gevent.spawn_later(seconds, reply.result, value)


@service.method
def hold(gate: str, value: Any) -> Any:
    gates.setdefault(gate, Event()).wait()
    return value


@service.method
def release(gate: str) -> None:
    gates.pop(gate, Event()).set()


@service.method
def fail(message: str) -> None:
    # Not logged, as a fault would be: the log is watched for what the connections do.
    raise gmprpc.ErrorResponse(message)


@service.method
def count(what: str) -> None:
    counts[what] += 1


@service.method
def count_after(seconds: float, what: str) -> None:
    gevent.sleep(seconds)
    counts[what] += 1


@service.method
def counted(what: str) -> int:
    return counts[what]


@service.method
def take_files(number: int) -> None:
    """Take descriptors that are no connection's."""
    spare_files.extend(os.open(os.devnull, os.O_RDONLY) for _ in range(number))


@service.method
def give_files() -> None:
    while spare_files:
        os.close(spare_files.pop())


@service.method
def statistics() -> dict[str, int]:
    return server.statistics()


@service.method
def census() -> dict[str, int]:
    """How much there is of what might leak; what is only held by cycles is collected first, which takes a moment."""
    gc.collect()
    return {
        "descriptors": len(os.listdir("/proc/self/fd")) - 1,  # That of the directory itself.
        "greenlets": sum(isinstance(thing, greenlet.greenlet) for thing in gc.get_objects()),
        "threads": threading.active_count(),
    }


@service.method
def blocks() -> int:
    """How many pieces of memory Python's objects take, whatever the allocators make of that."""
    gc.collect()
    return sys.getallocatedblocks()


@service.method
def trim() -> None:
    """Give back what the C library's allocator only keeps, as far as it is one that can be told to."""
    if (malloc_trim := getattr(ctypes.CDLL(None), "malloc_trim", None)) is not None:
        malloc_trim(0)


class Base:
    def inherited(self) -> str:
        return "not to be reached"


class Exposed(Base):
    """What is registered as an object, of which most can't be reached."""

    attribute = "not to be reached"

    def public(self) -> str:
        return "to be reached"

    def _private(self) -> str:
        return "not to be reached"

    def __call__(self) -> str:
        return "not to be reached"


service.register_object(Exposed())
service.register_object(Exposed(), prefix="object.")


def options_for_many_connections() -> dict[str, Any]:
    """Without a limit on their number, where there is one: some trials are about what else runs out."""
    has_limit = "max_connections" in inspect.signature(gmprpc.Server).parameters
    return {"max_connections": None} if has_limit else {}


if __name__ == "__main__":
    parser = argparse.ArgumentParser()
    parser.add_argument("--files", type=int, help="how many descriptors the process may have")
    parser.add_argument("--certificate", help="a PEM file: speak TLS")
    parser.add_argument("--handshake-timeout", type=float, default=10.0)
    arguments = parser.parse_args()

    if arguments.files is not None:
        resource.setrlimit(resource.RLIMIT_NOFILE, (arguments.files, arguments.files))
    context = None
    if arguments.certificate is not None:
        context = ssl.create_default_context(ssl.Purpose.CLIENT_AUTH)
        context.load_cert_chain(arguments.certificate)
    logging.basicConfig(level=logging.INFO, format="%(levelname)s %(name)s %(message)s")
    server = gmprpc.Server(
        ("127.0.0.1", 0),
        service,
        ssl_context=context,
        handshake_timeout=arguments.handshake_timeout,
        **options_for_many_connections(),
    )
    server.start()
    print(server.server_port, flush=True)
    server.serve_forever()
