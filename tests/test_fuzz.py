"""The fuzzing targets on their corpus and on some seeded inputs, and that they do find what is wrong."""

from __future__ import annotations

import logging
import os
import re
import signal
from collections.abc import Callable, Iterator

import gevent
import pytest

from gmprpc.connection import Connection
from gmprpc.exceptions import ProtocolError
from gmprpc.protocol import REQUEST, Decoder, Message, Run
from gmprpc.requests import Requests

from .fuzz import connection, decoder
from .fuzz.__main__ import main
from .fuzz.case import Case, Finding, Tally, corpus, minimised
from .fuzz.engines import cases, in_time
from .fuzz.oracle import NO_PROTOCOL, TOO_LARGE, expectation

CORPUS = corpus()
SEEDED = 300

# Two requests and what is no MessagePack-RPC.
STREAM = b"\x94\x00\x01\xa4echo\x91\x05" + b"\x94\x00\x02\xa4echo\x91\x06" + b"\xc1"

# The corpus and the generator.


def test_the_corpus_is_of_many_small_files() -> None:
    assert len(CORPUS) >= 36
    # msgpack gives up on 1,024 levels, and each takes a byte.
    assert max(map(len, CORPUS.values())) <= 1024 + 32


@pytest.mark.parametrize("name", CORPUS)
def test_the_decoder_does_right_by_the_corpus_with_all_options_and_limits(name: str) -> None:
    tally = Tally()
    for number, options in enumerate(decoder.OPTIONS):
        for limits in {0, number % len(decoder.SIZES), len(decoder.SIZES) - 2}:
            decoder.check(Case(decoder.OPTIONS.index(options), limits, number, CORPUS[name]), tally)
    decoder.check(Case(0, 255, 0, CORPUS[name]), tally)  # And its memory.
    assert tally.splits >= 3 * len(decoder.OPTIONS) - 3


@pytest.mark.parametrize("name", CORPUS)
def test_a_connection_does_right_by_the_corpus_with_all_options(name: str) -> None:
    for options in range(len(connection.OPTIONS)):
        connection.check(Case(options, 0, options, CORPUS[name]), Tally())
    for cuts in range(4):  # And something comes between.
        connection.check(Case(0, 255 - cuts, cuts, CORPUS[name]), Tally())


@pytest.mark.parametrize("check", [decoder.check, connection.check], ids=["decoder", "connection"])
def test_some_hundred_seeded_inputs_are_no_finding(check: Callable[[Case, Tally], None]) -> None:
    tally = Tally()
    for _, case in zip(range(SEEDED), cases(0), strict=False):
        check(case, tally)
    # Both what is right and what is wrong is among them.
    assert tally.messages > SEEDED
    assert SEEDED // 10 < tally.protocol_errors < SEEDED


def test_the_same_seed_makes_the_same_inputs() -> None:
    def first(seed: int) -> list[Case]:
        return [case for _, case in zip(range(50), cases(seed), strict=False)]

    assert first(7) == first(7)
    assert first(7) != first(8)
    for case in first(7):
        assert Case.of(bytes(case)) == case


# What is wrong is found.


class _Faulty(Decoder):
    """A decoder that is changed by what becomes of its messages."""

    def messages(self, data: bytes) -> Iterator[Message]:
        """Those that ``data`` completes."""
        run, runs = super().feed(data)
        yield from run
        for run in runs or ():
            yield from run

    def feed(self, data: bytes) -> tuple[Run, Iterator[Run]]:
        return [], ([message] for message in self.messages(data))


class _Losing(_Faulty):
    """Loses the message that comes last before a fault."""

    def messages(self, data: bytes) -> Iterator[Message]:
        messages = []
        try:
            messages += super().messages(data)
        except ProtocolError:
            yield from messages[:-1]
            raise
        yield from messages


class _Late(_Faulty):
    """Hands over what is complete when more has come."""

    held: tuple[Message, ...] = ()

    def messages(self, data: bytes) -> Iterator[Message]:
        yield from self.held
        self.held = ()
        self.held = tuple(super().messages(data))


class _Leaking(_Faulty):
    """Raises what isn't a ProtocolError."""

    def messages(self, data: bytes) -> Iterator[Message]:
        try:
            yield from super().messages(data)
        except ProtocolError as exc:
            raise ValueError(str(exc)) from exc


class _Doubling(_Faulty):
    """Hands over each request twice."""

    def messages(self, data: bytes) -> Iterator[Message]:
        for message in super().messages(data):
            yield from (message, message) if message[0] == REQUEST else (message,)


class _Odd(_Faulty):
    """Doesn't know its own kinds."""

    def messages(self, data: bytes) -> Iterator[Message]:
        for message in super().messages(data):
            yield [4, *message[1:]]


class _ByPiece(_Faulty):
    """Says something else when a stream comes in pieces."""

    pieces = 0

    def messages(self, data: bytes) -> Iterator[Message]:
        self.pieces += 1
        try:
            yield from super().messages(data)
        except ProtocolError as exc:
            raise ProtocolError(f"{exc} in piece {self.pieces}") from exc


class _Untrue(_Faulty):
    """Says that there is a rest where there is none."""

    def messages(self, data: bytes) -> Iterator[Message]:
        yield from super().messages(data)
        self.unfinished = bytearray(b"x")


class _Greedy(_Faulty):
    """Takes as much as is announced."""

    def messages(self, data: bytes) -> Iterator[Message]:
        self.hoard = bytearray(300_000)
        yield from super().messages(data)


class _Blind(_Faulty):
    """Takes requests of any msgid for others."""

    def messages(self, data: bytes) -> Iterator[Message]:
        for message in super().messages(data):
            yield [message[0], 9, *message[2:]]


@pytest.mark.parametrize(
    "broken, stream, finding",
    [
        (_Losing, STREAM, "a message is missing: 2 well-formed ones are there"),
        (_Late, STREAM[:-1], "after 20 bytes only 0 messages"),
        (_Leaking, STREAM, "ValueError: not MessagePack"),
        (_Doubling, STREAM, "message 1 should be"),
        (_Odd, STREAM, "no such kind"),
        (_ByPiece, STREAM, "in 21 pieces"),
        (_Untrue, STREAM[:-1], "is_unfinished is True"),
        (_Greedy, STREAM, "bytes are held"),
        (_Blind, STREAM, "message 0 should be"),
    ],
)
def test_a_decoder_at_fault_is_a_finding(
    monkeypatch: pytest.MonkeyPatch, broken: type[Decoder], stream: bytes, finding: str
) -> None:
    case = Case(0, 240, 0, stream)
    decoder.check(case, Tally())
    monkeypatch.setattr(decoder, "Decoder", broken)
    with pytest.raises(Finding) as caught:
        decoder.check(case, Tally())
    assert finding in str(caught.value)


def test_a_greenlet_that_stays_is_a_finding(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(Requests, "dismiss_idle", lambda _: None)
    with pytest.raises(Finding, match="1 greenlets and 0 watchers are left"):
        connection.check(Case(0, 0, 0, STREAM), Tally())


def test_an_answer_that_is_lost_is_a_finding(monkeypatch: pytest.MonkeyPatch) -> None:
    flush = Connection.flush

    def lose_one(self: Connection) -> None:
        del self._out[:1]
        flush(self)

    monkeypatch.setattr(Connection, "flush", lose_one)
    with pytest.raises(Finding, match="0 answers to 1 requests"):
        connection.check(Case(0, 0, 0, STREAM), Tally())


def test_what_reaches_the_hubs_error_handler_is_a_finding(monkeypatch: pytest.MonkeyPatch) -> None:
    finish = Connection._hear_end

    def finish_with_a_fault(self: Connection) -> None:
        finish(self)
        gevent.spawn(lambda: 1 // 0)

    monkeypatch.setattr(Connection, "_hear_end", finish_with_a_fault)
    with pytest.raises(Finding, match="the hub's error handler got ZeroDivisionError"):
        connection.check(Case(0, 0, 0, STREAM[:-1]), Tally())


def test_a_descriptor_that_stays_is_a_finding(monkeypatch: pytest.MonkeyPatch) -> None:
    kept: list[int] = []
    end = Connection._end

    def keep_one(self: Connection, error: Exception | None) -> None:
        kept.append(os.dup(self._stream.fileno()))
        end(self, error)

    monkeypatch.setattr(Connection, "_end", keep_one)
    try:
        with pytest.raises(Finding, match="1 descriptors are left"):
            connection.check(Case(0, 0, 0, STREAM), Tally())
    finally:
        for descriptor in kept:
            os.close(descriptor)


def test_the_targets_leave_the_log_and_the_hub_as_they_were() -> None:
    logger, hub = logging.getLogger("gmprpc"), gevent.get_hub()
    before = [*logger.handlers], logger.level, logger.propagate, hub.handle_error
    connection.check(Case(0, 0, 0, STREAM), Tally())
    assert ([*logger.handlers], logger.level, logger.propagate, hub.handle_error) == before


# The oracle, the minimiser, the command.


def test_the_oracle_knows_what_comes_and_what_ends_it() -> None:
    expected = expectation(STREAM, 1000, {})
    assert expected.messages == [(0, 1, "echo", [5]), (0, 2, "echo", [6])]
    assert expected.message_ends == [10, 20]
    assert expected.ends == {NO_PROTOCOL, TOO_LARGE}
    assert expectation(STREAM, 9, {}).ends == {TOO_LARGE}
    undecodable = expectation(b"\x94\x00\x07\xa4echo\x91\xa1\xff", 1000, {})
    assert undecodable.messages == [(-1, 7, 0)]


def test_a_finding_is_made_as_short_as_it_goes() -> None:
    case = Case(1, 2, 3, bytes(100) + b"x" + bytes(57) + b"yz" + bytes(1))
    shortest = minimised(case, lambda shorter: b"x" in shorter.stream and b"y" in shorter.stream)
    assert shortest == Case(1, 2, 3, b"xy")


def test_an_input_that_is_never_done_with_is_a_finding() -> None:
    def spin(_: Case, __: Tally) -> None:
        while True:
            pass

    with pytest.raises(Finding, match=re.escape("it isn't done after 0.05 s")):
        in_time(spin, 0.05)(Case(0, 0, 0, STREAM), Tally())
    assert signal.getitimer(signal.ITIMER_REAL) == (0, 0)


def test_a_finding_is_shown_with_its_bytes_and_fails_the_command(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(decoder, "Decoder", _Leaking)
    assert main(["decoder", "--inputs", "400", "--seed", "3"]) == 1
    output = capsys.readouterr().out
    assert "of seed 3: after " in output
    assert re.search(r"decoder, random, seed 3: \d+ inputs, .* 10 findings", output)
    replay = re.search(r"--replay ([0-9a-f]+)", output)
    assert replay is not None
    assert main(["decoder", "--replay", replay[1]]) == 1
    monkeypatch.undo()
    assert main(["decoder", "--replay", replay[1]]) == 0


@pytest.mark.parametrize("target", ["decoder", "connection"])
def test_the_command_counts_what_it_did(target: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert main([target, "--inputs", "20"]) == 0
    closing = (
        rf"{target}, random, seed 1: 20 inputs, [\d,]+ splits, [\d,]+ messages, [\d,]+ protocol errors, 0 findings\n"
    )
    assert re.fullmatch(closing, capsys.readouterr().out)


def test_an_engine_that_is_not_installed_is_named(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr("tests.fuzz.__main__.is_atheris_installed", lambda: False)
    assert main(["decoder", "--engine", "atheris", "--inputs", "1"]) == 2
    assert main(["decoder", "--engine", "all", "--inputs", "1"]) == 0
    output = capsys.readouterr().out
    assert output.count("decoder: atheris isn't installed here, so its engine doesn't run\n") == 2
    assert "decoder, random, seed 1: 1 inputs" in output
