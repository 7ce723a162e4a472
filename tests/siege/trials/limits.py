"""Trials of what can run out or be guessed: CPU time, descriptors, patience with handshakes, names."""

from __future__ import annotations

import builtins
import time
from collections.abc import Iterator
from contextlib import ExitStack
from types import ModuleType

import gevent

import gmprpc
from tests.helpers import Peer
from tests.siege.attacks import pack
from tests.siege.field import Field, SiegeError, Target, is_closed_by_server, wait_for
from tests.siege.programs import server as server_program
from tests.siege.report import Row, at_most, below, exactly

#: The bystander of a trial that measures CPU time: what it takes itself must not tell.
_SELDOM = 0.1


def zeros(field: Field) -> Iterator[Row]:
    """64 KiB of zero bytes: closed with one log line, less than 50 ms of CPU."""
    times = 20
    with field.besieged(pause=_SELDOM) as (target, bystander):
        target.remember_log()
        costs = []
        for number in range(times):
            before = target.cpu_seconds()
            with target.connect() as peer:
                peer.send_bytes(bytes(64 * 1024))
                if not is_closed_by_server(peer):
                    raise SiegeError("not closed after 64 KiB of zero bytes")
            wait_for(lambda: len(target.new_log()) > number, "it is logged")  # noqa: B023 - called at once
            costs.append(target.cpu_seconds() - before)
        yield below(f"CPU for 64 KiB of zero bytes, worst of {times}", max(costs), 0.05, "ms", of_each=costs)
        target.wait_alone()
        yield exactly(f"log lines for {times} times", len(target.new_log()), times)
        yield bystander.row()
        yield from target.complaints()


def files(field: Field) -> Iterator[Row]:
    """Out of file descriptors: little CPU, one log line, live connections go on, serving again within 1 s."""
    hold = field.choose(10, 3)
    with field.besieged("--files", 64, pause=_SELDOM) as (target, bystander), ExitStack() as stack:
        target.ask("take_files", 4)
        target.remember_log()
        live, waiting = _fill(target, stack)
        before, begin = target.cpu_seconds(), time.monotonic()
        gevent.sleep(hold)
        rate = (target.cpu_seconds() - before) / (time.monotonic() - begin)
        what = (
            f"CPU per second, for {hold} s without a descriptor ({len(live)} connections live, {len(waiting)} waiting)"
        )
        yield below(what, rate, 0.05, "s")
        log = target.new_log()
        yield exactly("log lines", len(log), 1, first=log[:3])
        right = sum(peer.call("echo", "live", msgid=5) == [1, 5, None, "live"] for peer in live)
        yield exactly("live connections that go on", right, len(live))

        live.pop().close()
        yield below("served again after a connection is closed", _time_to_answer(waiting), 1.0, "s")
        begin_log = len(target.new_log())
        target.ask("give_files")
        yield below("served again after another descriptor is freed", _time_to_answer(waiting), 1.0, "s")
        gevent.sleep(1)
        yield at_most("further log lines for two more shortages", len(target.new_log()) - begin_log, 2)
        while live:
            live.pop().close()
        begin = time.monotonic()
        right = sum(peer.receive() == [1, 1, None, "hello"] for peer in waiting)
        yield exactly("of those that waited served at last", right, len(waiting), seconds=time.monotonic() - begin)
        yield bystander.row()
        yield from target.complaints()


def _fill(target: Target, stack: ExitStack) -> tuple[list[Peer], list[Peer]]:
    """Connect until nobody is accepted any more; who is, and ten who wait."""
    live: list[Peer] = []
    waiting: list[Peer] = []
    while len(waiting) < 10:
        peer = stack.enter_context(target.connect())
        peer.send([0, 1, "echo", ["hello"]])
        if not waiting and _is_answered(peer, 1.0):
            live.append(peer)
        else:
            waiting.append(peer)
        if len(live) > 1000:
            raise SiegeError("descriptors don't run out")
    return live, waiting


def _is_answered(peer: Peer, seconds: float) -> bool:
    with gevent.Timeout(seconds, False):  # type: ignore[arg-type]  # The stubs don't know of False.
        return bool(peer.receive() == [1, 1, None, "hello"])
    return False


def _time_to_answer(waiting: list[Peer]) -> float:
    """Seconds until the first of those who wait is answered; it waits no more then."""
    begin = time.monotonic()
    first = waiting.pop(0)
    if not _is_answered(first, 10.0):
        raise SiegeError("nobody is served 10 s after a descriptor has become free")
    return time.monotonic() - begin


def tls(field: Field) -> Iterator[Row]:
    """200 silent clients in their handshakes: a new one is answered within 1 s."""
    patience = field.choose(10, 3)
    with field.besieged("--handshake-timeout", patience, is_secret=True) as (target, bystander), ExitStack() as stack:
        target.remember_log()
        begin = time.monotonic()
        silent = [stack.enter_context(target.connect_plainly()) for _ in range(200)]
        for peer in silent[::2]:
            peer.send_bytes(b"\x16\x03\x01\x02\x00\x01\x00")  # The beginning of a handshake.
        waits = []
        for _ in range(10):
            start = time.monotonic()
            with target.connect() as peer:
                if peer.call("echo", "new") != [1, 0, None, "new"]:
                    raise SiegeError("the new client was answered wrongly")
            waits.append(time.monotonic() - start)
        if time.monotonic() > begin + patience:
            raise SiegeError("the silent clients were given up before the new ones were measured")
        yield below("a new client beside 200 silent ones, worst of 10", max(waits), 1.0, "s", of_each=waits)
        closed = sum(is_closed_by_server(peer, patience + 5.0) for peer in silent)
        yield exactly(f"silent clients closed after {patience} s", closed, 200)
        yield exactly("log lines about them", sum("handshake" in line for line in target.new_log()), 200)
        yield bystander.row()
        yield from target.complaints()


def names(field: Field) -> Iterator[Row]:
    """Every name that isn't registered answers exactly as an unknown one does."""
    registered = set(server_program.service.methods)
    tried = [name for name in _names(field.choose(20_000, 5_000)) if name not in registered]
    with field.besieged() as (target, bystander), target.connect() as peer:
        different = []
        for start in range(0, len(tried), 100):
            batch = dict(enumerate(tried[start : start + 100]))
            peer.send(*([0, msgid, name, []] for msgid, name in batch.items()))
            expected = b"".join(
                pack([1, msgid, f'No such method "{name}" found', None]) for msgid, name in batch.items()
            )
            # Unknown ones are answered in order; bytes that differ are looked at one by one.
            if (answers := _receive_exactly(peer, len(expected))) != expected:
                different += [name for name in batch.values() if name.encode() not in answers] or [batch[0]]
        what = f"of {len(tried):,} names that aren't registered, those answered otherwise than an unknown one"
        yield exactly(what, len(different), 0, first=different[:10])
        yield bystander.row()
        yield from target.complaints()


def _receive_exactly(peer: Peer, size: int) -> bytes:
    """``size`` bytes; fewer if no more come."""
    data = b""
    with gevent.Timeout(5.0, False):  # type: ignore[arg-type]  # The stubs don't know of False.
        while len(data) < size and (part := peer.socket.recv(size - len(data))):
            data += part
    return data


def _names(number: int) -> list[str]:
    """Names that lead somewhere in the server's process, were they looked up: up to three dots deep."""
    server = gmprpc.Server(("127.0.0.1", 0), server_program.service)
    roots: dict[str, object] = {
        "": server,
        "service.": server_program.service,
        "methods.": server_program.service.methods,
        "program.": server_program,
        "gmprpc.": gmprpc,
        "builtins.": builtins,
        "echo.": server_program.echo,
        "public.": server_program.Exposed().public,
        "object.": server_program.Exposed(),
        "table.": {},
        "text.": "",
    }
    found: dict[str, None] = dict.fromkeys(["", ".", "..", "echo.", ".echo", "echo\0", " echo", "Echo", "$/echo", "$/"])
    level = list(roots.items())
    for _ in range(3):
        below_it: list[tuple[str, object]] = []
        # As many from each, so that no object's many names leave no room for the others'.
        share = max(1, number // 3 // len(level))
        for prefix, value in level:
            attributes = dir(value)
            for attribute in attributes[:: max(1, len(attributes) // share)] if share < len(attributes) else attributes:
                # As an attribute of this object, and of whatever is nearest.
                found[f"{prefix}{attribute}"] = found[attribute] = None
                if not isinstance(value, ModuleType) or prefix in roots:
                    below_it.append((f"{prefix}{attribute}.", _attribute(value, attribute)))
        level = below_it
    return list(found)


def _attribute(value: object, name: str) -> object:
    try:
        return getattr(value, name)
    except Exception:  # Some are only to be asked in certain states.
        return None
