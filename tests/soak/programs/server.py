"""The server of the tests of faults: it enters each call that it carries out in a ledger, before all else.

Each call has a number of its own. The file of the ledger has a byte for each, which counts how often it was carried
out, also by a process that was killed since.
"""

from __future__ import annotations

import argparse
import logging
import mmap
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import gevent
from gevent.event import Event

import gmprpc

service = gmprpc.Service()
gates: dict[str, Event] = {}


@contextmanager
def opened_ledger(path: str) -> Iterator[mmap.mmap]:
    with open(path, "r+b") as file, mmap.mmap(file.fileno(), 0) as ledger:
        yield ledger


@service.method
def do(number: int) -> int:
    ledger[number] += 1
    return number


@service.method
def pause(number: int, seconds: float) -> int:
    ledger[number] += 1
    gevent.sleep(seconds)
    return number


@service.method(deferred=True)
def later(reply: gmprpc.Reply | None, number: int, seconds: float) -> None:
    ledger[number] += 1
    if reply is not None:
        gevent.spawn_later(seconds, reply.result, number)


@service.method
def hold(number: int, gate: str) -> int:
    ledger[number] += 1
    gates.setdefault(gate, Event()).wait()
    return number


@service.method
def release(gate: str) -> None:
    gates.pop(gate, Event()).set()


@service.method
def echo(number: int, data: bytes) -> bytes:
    ledger[number] += 1
    return data


@service.method
def fail(number: int) -> None:
    ledger[number] += 1
    raise gmprpc.ErrorResponse([number, "as told"])


@service.method
def ask_back(number: int, method: str, *params: Any) -> Any:
    """What the caller's own ``method`` answers."""
    ledger[number] += 1
    try:
        return gmprpc.current_call().connection.call(method, *params)
    except gmprpc.ConnectionClosed as exc:
        raise gmprpc.ErrorResponse(f"ConnectionClosed: {exc}") from exc  # Not logged: it is to be expected here.


@service.method
def statistics() -> dict[str, int]:
    return server.statistics()


if __name__ == "__main__":
    parser = argparse.ArgumentParser()
    parser.add_argument("--ledger", required=True)
    parser.add_argument("--port", type=int, default=0)
    parser.add_argument("--log", required=True, help="what is logged is appended to this file")
    parser.add_argument("--stop-timeout", type=float, default=10.0)
    arguments = parser.parse_args()

    logging.basicConfig(filename=arguments.log, level=logging.WARNING, format="%(levelname)s %(name)s %(message)s")
    with opened_ledger(arguments.ledger) as ledger:
        server = gmprpc.Server(("127.0.0.1", arguments.port), service, stop_timeout=arguments.stop_timeout)
        server.start()
        print(server.server_port, flush=True)
        server.serve_forever()
