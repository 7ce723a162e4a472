"""Trials of memory: however much is sent, and however little is read."""

from __future__ import annotations

import time
from collections.abc import Iterator, Sequence
from contextlib import ExitStack

import gevent
import msgpack

from tests.benchmarks.memory import connections_allowed, measure_running
from tests.helpers import Peer
from tests.siege import attacks
from tests.siege.attacks import HEAD, MAX_MESSAGE_SIZE, pack
from tests.siege.field import QUIET, SERVER, Field, SiegeError, Target, is_closed_by_server
from tests.siege.report import KIB, MIB, Row, at_most, below, exactly, reported

_UNFINISHED_SIZE = 64 * KIB
_UNFINISHED_BAR = 256 * KIB
_SHORT_CONTENTS = ("nested fixarrays", "an array of empty maps", "a str announced", "random values")

_FLOOD_BAR = 16 * MIB


def unfinished(field: Field) -> Iterator[Row]:
    """Unfinished input of 64 KiB, of any content: less than 256 KiB of extra memory for each connection."""
    connections = field.choose(50, 20)
    contents = attacks.unfinished(_UNFINISHED_SIZE)
    if field.is_short:
        contents = {name: contents[name] for name in _SHORT_CONTENTS}
    for way, part_size in (("at once", _UNFINISHED_SIZE), ("in parts of 500 bytes", 500)):
        found: dict[str, float] = {}
        rows = []
        for name, content in contents.items():
            # A server for each, since memory that another content has needed would hide what this one does.
            with field.besieged() as (target, bystander), ExitStack() as stack:
                peers = [stack.enter_context(target.connect()) for _ in range(connections)]
                target.census()
                before = target.resident_size()
                target.reset_peak()
                for start in range(0, len(content), part_size):
                    for peer in peers:
                        peer.send_bytes(content[start : start + part_size])
                target.wait_read()
                found[name] = (target.peak_size() - before) / connections
                if (held := target.statistics()["open_connections"]) != connections + 2:
                    raise SiegeError(f"{name}: {connections} connections were to be held, and {held - 2} are")
                # No bar for its p99: so many clients with something to do at once want their turn as it does.
                rows.append(bystander.row(p99_bar=None))
                rows += target.complaints()
        worst = max(found, key=found.__getitem__)
        what = f"for each of {connections} connections, {way}; worst of {len(found)}: {worst}"
        yield below(what, found[worst], _UNFINISHED_BAR, "KiB", of_each=found)
        yield _worst(rows)
    with field.besieged() as (target, bystander), target.connect() as peer:
        peer.send_bytes(attacks.unfinished(MAX_MESSAGE_SIZE - 64 * KIB)["nested fixarrays"])
        target.wait_read()
        longest = bystander.end()["max_ms"] / 1000
        yield reported(
            "longest wait of the bystander, one connection sending 960 KiB of nested fixarrays", longest, "ms"
        )
        yield from target.complaints()


def parts(field: Field) -> Iterator[Row]:
    """One message in 500 small parts, 8 MB in all: refused at 1 MiB plus one read, memory back afterwards."""
    part = b"\xda\x3e\x80" + b"x" * 16_000
    with field.besieged() as (target, bystander):
        before = target.resident_size()
        target.reset_peak()
        refused_at = 0
        # Each part is sent when the one before has been read, so that what was sent is what was taken.
        with target.connect() as peer:
            peer.send_bytes(HEAD + b"\xdc\x01\xf4")
            for number in range(500):
                try:
                    peer.send_bytes(part)
                    target.wait_read()
                except OSError:
                    break
                refused_at = (number + 1) * len(part)
                if target.statistics()["protocol_errors"]:
                    break
            is_closed = is_closed_by_server(peer)
        yield exactly("500 parts of 16 kB, sent one by one: closed", is_closed, True)
        yield at_most("refused at", refused_at, MAX_MESSAGE_SIZE + len(part), "KiB")
        peak = target.peak_size() - before
        yield below("memory while it came", peak, 4 * MIB, "KiB")

        for number in range(21):
            if number == 1:  # The first one has taught the allocator, and the buffer for reading, what they keep.
                target.wait_alone()
                gevent.sleep(QUIET)
                before = target.resident_size()
            with target.connect() as peer:
                try:
                    peer.send_bytes(HEAD + b"\xdc\x01\xf4" + part * 500)
                except OSError:
                    pass
                if not is_closed_by_server(peer):
                    raise SiegeError("8 MB at full speed weren't refused")
        target.wait_alone()
        gevent.sleep(QUIET)
        # What an allocator keeps differs by a message and more from run to run, but not with the number of them.
        kept = target.resident_size() - before
        yield below("memory that isn't back after 20 more, at full speed", kept, 2 * MIB, "KiB")
        yield exactly("protocol errors counted", target.statistics()["protocol_errors"], 22)
        yield bystander.row()
        yield from target.complaints()


def gone(field: Field) -> Iterator[Row]:
    """Who leaves amid a message of almost 1 MiB takes its memory along; nobody has to collect it."""
    times = field.choose(1000, 100)
    with field.besieged() as (target, bystander):
        _leave_amid_message(target)
        # The first large message has taught the allocator what it keeps.
        target.wait_alone()
        gevent.sleep(QUIET)
        before = target.resident_size()
        target.reset_peak()
        for _ in range(times):
            _leave_amid_message(target)
        peak = target.peak_size() - before
        yield below(f"{times:,} messages of 1 MB, unfinished, one after the other", peak, 16 * MIB, "MiB")
        target.wait_alone()
        gevent.sleep(QUIET)
        yield below("memory that isn't back afterwards", target.resident_size() - before, MIB, "KiB")
        yield bystander.row()
        yield from target.complaints()


def _leave_amid_message(target: Target) -> None:
    with target.connect() as peer:
        peer.send_bytes(HEAD + b"\xdb\x00\x0f\xf0\x00" + b"x" * 1_000_000)
        target.wait_read()


def unread(field: Field) -> Iterator[Row]:
    """200 answers of 1 MiB unread: less than 16 MiB."""
    shapes = [(False, False), (True, False)] if field.is_short else [(False, False), (False, True), (True, False)]
    for is_blocking, is_secret in shapes:
        how = "200 answers of 1 MiB unread" + (" over TLS" if is_secret else "")
        with field.besieged(is_secret=is_secret) as (target, bystander), target.connect() as peer:
            before = target.resident_size()
            target.reset_peak()
            method, params = ("large_after", [0.01, MIB]) if is_blocking else ("large", [MIB])
            peer.send(*([0, number, method, params] for number in range(200)))
            target.wait_idle()
            grown = target.peak_size() - before
            if is_blocking:
                # Here it is max_concurrency that bounds what is at work at once, and so what is answered.
                yield reported(f"{how}, after handlers that block for 10 ms", grown, "MiB")
            else:
                yield below(how, grown, 16 * MIB, "MiB")
            expected = b"x" * MIB
            right = sum(_is_answer(peer.receive(), expected) for _ in range(200))
            yield exactly("answers that are right when they are read at last", right, 200)
            if not field.is_short:
                peer.close()
                target.wait_alone()
                gevent.sleep(QUIET)
                yield reported("memory that isn't back afterwards", target.resident_size() - before, "MiB")
            yield bystander.row()
            yield from target.complaints()


def _is_answer(answer: list[object], result: object) -> bool:
    return answer[0] == 1 and answer[2] is None and answer[3] == result


def flood(field: Field) -> Iterator[Row]:
    """200,000 notifications, or requests whose answers aren't read, on one connection."""
    number = field.choose(200_000, 50_000)
    params: Sequence[object]
    for name, method, params, is_secret in (
        ("at once", "count", ["flood"], False),
        ("at once, over TLS", "count", ["flood"], True),
        ("after 1 ms", "count_after", [0.001, "flood"], False),
    ):
        with field.besieged(is_secret=is_secret) as (target, bystander), target.connect() as peer:
            before = target.resident_size()
            target.reset_peak()
            begin = time.monotonic()
            peer.send_bytes(pack([2, method, params]) * number)
            # Its own call comes behind them; those that block are still at work then.
            if peer.call("echo", "behind") != [1, 0, None, "behind"]:
                raise SiegeError("the call behind the flood was answered wrongly")
            took = time.monotonic() - begin
            target.wait_idle()
            what = f"{number:,} notifications, handled {name}"
            grown = target.peak_size() - before
            yield below(what, grown, _FLOOD_BAR, "MiB", per_second=number / took)
            yield exactly("of them carried out", target.counted("flood"), number)
            yield bystander.row()
            yield from target.complaints()
    # So much, and so small a buffer at the reader's end, that the kernel doesn't take all answers.
    text = "x" * 500
    for name, method, params in (("at once", "echo", [text]), ("after 1 ms", "pause", [0.001, text])):
        with field.besieged() as (target, bystander), target.connect(receive_size=4 * KIB) as peer:
            before = target.resident_size()
            target.reset_peak()
            sending = gevent.spawn(peer.send_bytes, b"".join(pack([0, n, method, params]) for n in range(number)))
            gevent.sleep(1)
            target.wait_idle()
            grown = target.peak_size() - before
            what = f"{number:,} requests, handled {name}, answers unread"
            if sending.ready():
                raise SiegeError("the kernel took all answers: nobody can tell whether the server holds itself back")
            yield below(what, grown, _FLOOD_BAR, "MiB")
            answered = _count_answers(peer, number, params[-1])
            sending.get()
            yield below("the same up to the last answer", target.peak_size() - before, _FLOOD_BAR, "MiB")
            yield exactly("answers that are right when they are read at last", answered, number)
            yield bystander.row()
            yield from target.complaints()


def _count_answers(peer: Peer, number: int, result: object) -> int:
    """How many of the msgids below ``number`` are answered by ``result``."""
    unpacker = msgpack.Unpacker(max_buffer_size=0)
    missing = set(range(number))
    while missing:
        data = peer.socket.recv(256 * KIB)
        if not data:
            break
        unpacker.feed(data)
        for answer in unpacker:
            if answer == [1, answer[1], None, result]:
                missing.discard(answer[1])
        gevent.sleep(0)
    return number - len(missing)


def idle(field: Field) -> Iterator[Row]:
    """10,000 idle connections that have each made a call: at most 16 KiB each."""
    wanted = field.choose(10_000, 1000)
    connections = connections_allowed(wanted)
    with field.besieged(pause=0.01) as (target, bystander):
        sizes = measure_running(field.workshop, target.process, SERVER, connections, QUIET)
        for state in ("in_use", "quiet"):
            each = (sizes[state] - sizes["before"]) / connections
            if state == "quiet":
                yield at_most(f"for each of {connections:,} idle connections", each, 16 * KIB, "KiB", **sizes)
            else:
                yield reported("the same at the end of their calls", each, "KiB")
        if connections < wanted:
            yield Row("connections", f"{connections}: no more files may be open", f"{wanted}", is_passed=False)
        target.wait_alone(seconds=60)
        yield bystander.row()
        yield from target.complaints()


def _worst(rows: list[Row]) -> Row:
    """The row of the bystander who fared worst; a complaint is worse than any."""
    return min(rows, key=lambda row: (row.is_passed, -row.details.get("p99_ms", 0)))
