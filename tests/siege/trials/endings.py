"""Trials of endings: half-closed, by a signal, killed, reset, over before they have begun."""

from __future__ import annotations

import signal
import ssl
import time
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, suppress

import gevent

from tests.helpers import Peer
from tests.siege.attacks import pack
from tests.siege.field import Client, Field, SiegeError, Target, reset, wait_for
from tests.siege.report import KIB, MIB, Row, at_most, below, exactly

#: A method, its params, and the result that it has to have.
Call = tuple[str, Sequence[object], object]

#: What `Server.stop` gives by default to what is in flight.
_STOP_TIMEOUT = 10.0


def half_close(field: Field) -> Iterator[Row]:
    """What was received before the peer's last word is answered: at once, in flight, and large."""
    shapes: dict[str, list[Call]] = {
        "at once": [("echo", [number], number) for number in range(100)],
        "in flight": [
            *(("pause", [0.3, number], number) for number in range(10)),
            *(("later", [0.3, number], number) for number in range(10)),
        ],
        "of 1.5 MiB": [("large", [3 * MIB // 2], b"x" * (3 * MIB // 2))] * 10,
        "of 1.5 MiB in flight": [("large_after", [0.1, 3 * MIB // 2], b"x" * (3 * MIB // 2))] * 10,
    }
    with field.besieged() as (target, bystander):
        for name, calls in shapes.items():
            with target.connect() as peer:
                peer.send(*([0, msgid, method, params] for msgid, (method, params, _) in enumerate(calls)))
                peer.shutdown()
                gevent.sleep(0.2)  # The large ones have to wait for a reader who takes time.
                answers = {answer[1]: answer for answer in _rest_of(peer)}
            right = sum(answers.get(msgid) == [1, msgid, None, result] for msgid, (_, _, result) in enumerate(calls))
            yield exactly(
                f"answers {name} after a half-close", f"{right} of {len(calls)}", f"{len(calls)} of {len(calls)}"
            )
        target.wait_alone()
        yield bystander.row()
        yield from target.complaints()


def _rest_of(peer: Peer) -> list[list[object]]:
    """The answers up to the end, be it a proper one or not."""
    answers = []
    try:
        while True:
            answers.append(peer.receive())
    except (EOFError, OSError):
        return answers


def signals(field: Field) -> Iterator[Row]:
    """SIGTERM and SIGINT with 100 calls in flight: none lost, exit status 0 within the deadline."""
    for signum in (signal.SIGTERM, signal.SIGINT):
        with Target(field.workshop) as target, ExitStack() as stack:
            peers = [stack.enter_context(target.connect()) for _ in range(5)]
            large = b"x" * MIB
            calls: list[Call] = [
                *(("pause", [0.7, number], number) for number in range(10)),
                *(("later", [0.7, number], number) for number in range(8)),
                *(("large_after", [0.7, MIB], large) for _ in range(2)),
            ]
            for peer in peers:
                peer.send(*([0, msgid, method, params] for msgid, (method, params, _) in enumerate(calls)))
            # The census is in flight itself.
            wait_for(lambda: target.statistics()["in_flight"] == 100 + 1, "100 calls are in flight")
            begin = time.monotonic()
            target.send_signal(signum)
            right = 0
            for peer in peers:
                answers = {answer[1]: answer for answer in _rest_of(peer)}
                right += sum(
                    answers.get(msgid) == [1, msgid, None, result] for msgid, (_, _, result) in enumerate(calls)
                )
            status = target.wait_ended(_STOP_TIMEOUT + 5)
            took = time.monotonic() - begin
            yield exactly(f"{signum.name} with 100 calls in flight: lost", 100 - right, 0)
            yield exactly(f"{signum.name}: exit status", status, 0, log=target.process.log()[-1000:])
            yield below(f"{signum.name}: ended within", took, _STOP_TIMEOUT, "s")
            if "Traceback" in target.process.log():
                yield from target.complaints()


def churn(field: Field) -> Iterator[Row]:
    """1,000 resets and 10,000 connect/close: descriptors, greenlets and threads as before within 3 s."""
    with field.besieged() as (target, bystander):
        before = target.peak_census()
        resets, closes = field.choose(1000, 1000), field.choose(10_000, 2000)
        for number in range(resets):
            peer = target.connect()
            if number % 2:
                peer.send([0, 1, "pause", [0.01, 1]], [0, 2, "echo", [2]])
            reset(peer)
        yield target.recovery_row(f"{resets:,} resets: as before after", before)
        for number in range(closes):
            peer = target.connect()
            if number % 4 == 0 and peer.call("echo", number) != [1, 0, None, number]:
                raise SiegeError("a call was answered wrongly")
            peer.close()
        yield target.recovery_row(f"{closes:,} connect/close: as before after", before)
        with ExitStack() as stack:
            for _ in range(300):
                stack.enter_context(target.connect())
        yield target.recovery_row("300 at once: as before after", before)
        yield bystander.row()
        yield from target.complaints()


def killed(field: Field) -> Iterator[Row]:
    """A client killed with SIGKILL in mid-call."""
    times = field.choose(20, 5)
    with field.besieged() as (target, bystander):
        before = target.peak_census()
        target.remember_log()
        for seed in range(times):
            with Client(target, "--round", 50, "--seed", seed) as client:
                ask = target.statistics
                wait_for(lambda: ask()["in_flight"] > 5, "calls are in flight")  # noqa: B023 - called at once
                client.kill()
        yield target.recovery_row(f"{times} clients killed in mid-call: as before after", before)
        yield at_most("log lines", len(target.new_log()), times, first=target.new_log()[:5])
        yield bystander.row()
        yield from target.complaints()


def resets(field: Field) -> Iterator[Row]:
    """A connection reset at every byte position of a request, and of an answer."""
    request = pack([0, 1, "echo", ["twelve bytes", {"key": [1, 2.5, None]}]]) + pack([0, 2, "pause", [0.001, 2]])
    answer_size = len(pack([1, 1, None, "twelve bytes"])) + len(pack([1, 2, None, "twelve bytes"]))
    questions = pack([0, 1, "echo", ["twelve bytes"]]) + pack([0, 2, "pause", [0.001, "twelve bytes"]])
    large_size = 1_000_000
    large_step = large_size // field.choose(200, 40)
    for is_secret in (False, True):
        how = " over TLS" if is_secret else ""
        with field.besieged(is_secret=is_secret) as (target, bystander):
            before = target.peak_census()
            target.remember_log()
            for position in range(len(request) + 1):
                peer = target.connect()
                peer.send_bytes(request[:position])
                if position % 2:
                    target.wait_read()  # Otherwise the reset may overtake what was sent.
                reset(peer)
            for position in range(answer_size + 1):
                _reset_in_answer(target, questions, position)
            yield target.recovery_row(
                f"reset{how} at all {len(request) + 1} positions of a request, {answer_size + 1} of an answer", before
            )
            for position in range(0, large_size, large_step):
                _reset_in_answer(target, pack([0, 1, "large", [large_size]]), position)
            yield target.recovery_row(f"reset{how} at {large_size // large_step} positions of 1 MB: as before", before)
            connections = len(request) + answer_size + 2 + large_size // large_step
            if is_secret:
                hello = _client_hello()
                positions = range(0, len(hello), field.choose(1, 8))
                for position in positions:
                    peer = target.connect_plainly()
                    peer.send_bytes(hello[:position])
                    if position % 2:
                        target.wait_read()
                    reset(peer)
                connections += len(positions)
                yield target.recovery_row(f"reset at {len(positions)} positions of a ClientHello: as before", before)
            yield at_most("log lines", len(target.new_log()), connections, first=target.new_log()[:5])
            yield bystander.row()
            yield from target.complaints()


def _client_hello() -> bytes:
    """What a client says first over TLS."""
    said = ssl.MemoryBIO()
    tls = ssl.create_default_context().wrap_bio(ssl.MemoryBIO(), said, server_hostname="localhost")
    with suppress(ssl.SSLWantReadError):
        tls.do_handshake()
    return said.read()


def _reset_in_answer(target: Target, questions: bytes, position: int) -> None:
    """Ask, take ``position`` bytes of the answer, and reset the connection."""
    peer = target.connect(receive_size=4 * KIB)
    peer.send_bytes(questions)
    while position > 0:
        if not (data := peer.socket.recv(min(position, 64 * KIB))):
            raise SiegeError("the server closed a connection amid its answer")
        position -= len(data)
    reset(peer)
