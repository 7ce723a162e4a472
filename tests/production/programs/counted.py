"""A service that enters each call that it carries out in a ledger, before all else; see `tests.counting.Ledger`.

The file is what LEDGER says in the environment, and any number of processes may share it.
"""

from __future__ import annotations

import mmap
import os

import gevent

import gmprpc

service = gmprpc.Service()

with open(os.environ["LEDGER"], "r+b") as file:
    ledger = mmap.mmap(file.fileno(), 0)


@service.method
def do(number: int) -> int:
    """Answer at once."""
    ledger[number] += 1
    return number


@service.method
def pause(number: int, seconds: float = 0.05) -> int:
    """Answer after a while, in which the greenlet waits."""
    ledger[number] += 1
    gevent.sleep(seconds)
    return number


@service.method(deferred=True)
def later(reply: gmprpc.Reply | None, number: int, seconds: float = 0.05) -> None:
    """Answer after a while, in which no greenlet waits."""
    ledger[number] += 1
    if reply is not None:
        gevent.spawn_later(seconds, reply.result, number)
