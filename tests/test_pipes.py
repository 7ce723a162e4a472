"""Streams over two descriptors: pipes, files, sockets, and one that is both."""

from __future__ import annotations

import os
import socket as stdlib_socket
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, NamedTuple

import gevent
import msgpack
import pytest
from gevent.socket import wait_write

import gmprpc
from gmprpc import streams
from gmprpc.connection import Connection
from gmprpc.metrics import Counters
from gmprpc.options import ConnectionOptions
from gmprpc.pipes import PipeStream, stream_over
from gmprpc.streams import PlainStream, Stream, send_all

from .helpers import fill, is_closed, receive, receive_all


@pytest.fixture
def pair() -> Iterator[tuple[PipeStream, PipeStream]]:
    """Both ends of two pipes."""
    from_first, to_second = os.pipe()
    from_second, to_first = os.pipe()
    first, second = PipeStream(from_second, to_second), PipeStream(from_first, to_first)
    yield first, second
    first.close()
    second.close()


def test_bytes_go_both_ways(pair: tuple[PipeStream, PipeStream]) -> None:
    for stream, other in (pair, pair[::-1]):
        with pytest.raises(BlockingIOError):
            other.recv()
        assert stream.send(b"hello") == 5
        assert receive(other) == b"hello"


def test_what_does_not_go_waits_for_the_descriptor_that_is_written_to(pair: tuple[PipeStream, PipeStream]) -> None:
    ours, peers = pair
    sent = fill(ours)
    sending = gevent.spawn(send_all, ours, memoryview(b"f" * 200_000))
    received = 0
    while received < sent + 200_000:
        received += len(receive(peers))
    sending.get()
    wait_write(ours.write_fileno())
    with pytest.raises(BlockingIOError):
        peers.recv()


def test_the_end_of_either_direction_is_told(pair: tuple[PipeStream, PipeStream]) -> None:
    ours, peers = pair
    ours.close()
    assert peers.recv() == b""
    with pytest.raises(BrokenPipeError):
        peers.send(b"x")


def test_closing_closes_both_descriptors_once(pair: tuple[PipeStream, PipeStream]) -> None:
    ours, _ = pair
    descriptors = ours.fileno(), ours.write_fileno()
    ours.close()
    assert [is_closed(fd) for fd in descriptors] == [True, True]
    assert (ours.fileno(), ours.write_fileno()) == (-1, -1)
    ours.close()
    ours.abandon()


def test_one_descriptor_may_be_both() -> None:
    near, far = stdlib_socket.socketpair()
    with far:
        fd = near.detach()
        stream = PipeStream(fd, fd)
        far.sendall(b"hello")
        assert receive(stream) == b"hello"
        stream.send(b"bye")
        stream.finish(b"!", linger=True)
        assert is_closed(fd)
        assert [far.recv(3), far.recv(3), far.recv(3)] == [b"bye", b"!", b""]


def test_files_are_read_to_their_end_and_written(tmp_path: Path) -> None:
    (tmp_path / "in").write_bytes(b"i" * 100_000)
    stream = PipeStream(
        os.open(tmp_path / "in", os.O_RDONLY), os.open(tmp_path / "out", os.O_WRONLY | os.O_CREAT | os.O_TRUNC)
    )
    assert receive_all(stream) == b"i" * 100_000
    assert stream.send(b"o" * 100_000) == 100_000
    stream.finish(b"!", linger=False)
    assert (tmp_path / "out").read_bytes() == b"o" * 100_000 + b"!"


# The end.


@pytest.mark.parametrize("linger", [True, False])
def test_finishing_gives_the_peer_all_and_waits_for_nothing_from_it(
    pair: tuple[PipeStream, PipeStream], linger: bool
) -> None:
    ours, peers = pair
    sent = fill(ours)
    peers.send(b"unread")
    descriptors = ours.fileno(), ours.write_fileno()
    finishing = gevent.spawn(ours.finish, b"!" * 100_000, linger=linger)
    assert receive_all(peers) == b"f" * sent + b"!" * 100_000
    finishing.get()
    assert [is_closed(fd) for fd in descriptors] == [True, True]


def test_finishing_does_not_wait_for_ever_for_a_peer_that_does_not_read(
    pair: tuple[PipeStream, PipeStream], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(streams, "_FAREWELL_TIMEOUT", 0.02)
    fill(pair[0])
    pair[0].finish(b"x", linger=True)
    assert pair[0].fileno() == -1


def test_finishing_raises_nothing_when_the_peer_has_gone(pair: tuple[PipeStream, PipeStream]) -> None:
    pair[1].close()
    pair[0].finish(b"x", linger=True)
    assert pair[0].fileno() == -1


def test_who_is_killed_while_finishing_closes(pair: tuple[PipeStream, PipeStream]) -> None:
    fill(pair[0])
    finishing = gevent.spawn(pair[0].finish, b"x", linger=True)
    gevent.sleep(0)
    assert not finishing.ready()
    finishing.kill()
    assert pair[0].fileno() == -1


# What others share.


@pytest.mark.parametrize("end", ["close", "finish"])
@pytest.mark.parametrize("was_blocking", [True, False])
def test_descriptors_that_others_have_too_are_left_as_they_were(end: str, was_blocking: bool) -> None:
    pipes = [*os.pipe(), *os.pipe()]
    for fd in pipes:
        os.set_blocking(fd, was_blocking)
    held = os.dup(pipes[0]), os.dup(pipes[3])
    stream = PipeStream(pipes[0], pipes[3])
    assert [os.get_blocking(fd) for fd in held] == [False, False]
    if end == "close":
        stream.close()
    else:
        stream.finish(b"", linger=True)
    assert [os.get_blocking(fd) for fd in held] == [was_blocking, was_blocking]
    for fd in (*held, pipes[1], pipes[2]):
        os.close(fd)


def test_two_numbers_for_one_thing_are_left_as_it_was() -> None:
    near, far = stdlib_socket.socketpair()
    with near, far:
        stream = PipeStream(os.dup(near.fileno()), os.dup(near.fileno()))
        assert not os.get_blocking(near.fileno())
        stream.close()
        assert os.get_blocking(near.fileno())


def test_abandoning_changes_nothing_for_the_other_process(pair: tuple[PipeStream, PipeStream]) -> None:
    ours, peers = pair
    with PipeStreamHolder(ours) as held:  # As the process has them that this one was forked off from.
        ours.abandon()
        assert not os.get_blocking(held.reading)
        assert not os.get_blocking(held.writing)
        os.write(held.writing, b"still here")
        assert receive(peers) == b"still here"


class PipeStreamHolder:
    """The descriptors of a stream once more."""

    def __init__(self, stream: PipeStream) -> None:
        self.reading, self.writing = os.dup(stream.fileno()), os.dup(stream.write_fileno())

    def __enter__(self) -> PipeStreamHolder:
        return self

    def __exit__(self, *_: object) -> None:
        os.close(self.reading)
        os.close(self.writing)


# Which kind of stream it is.


@pytest.mark.parametrize("is_one_number", [True, False])
def test_a_socket_that_is_both_is_a_plain_stream(is_one_number: bool) -> None:
    near, far = stdlib_socket.socketpair()
    with far:
        fd = near.detach()
        other = fd if is_one_number else os.dup(fd)
        with stdlib_socket.socket(fileno=os.dup(fd)):  # Of another process: closing alone wouldn't tell the peer.
            stream = stream_over(fd, other)
            assert isinstance(stream, PlainStream)
            stream.send(b"bye")
            stream.close()
            assert [far.recv(3), far.recv(3)] == [b"bye", b""]
        assert is_closed(fd)
        assert is_closed(other)


def test_two_sockets_are_two_descriptors() -> None:
    (first, first_peer), (second, second_peer) = stdlib_socket.socketpair(), stdlib_socket.socketpair()
    with first_peer, second_peer:
        stream = stream_over(first.detach(), second.detach())
        assert isinstance(stream, PipeStream)
        first_peer.sendall(b"in")
        assert receive(stream) == b"in"
        stream.finish(b"out", linger=True)
        assert [second_peer.recv(3), second_peer.recv(3)] == [b"out", b""]


# With a connection on it.


class Life(NamedTuple):
    """A connection, and the greenlet that is its life."""

    connection: Connection
    greenlet: Any

    def end(self) -> Any:
        """What ended it, when it has."""
        self.greenlet.join()
        return self.greenlet.value


@pytest.fixture
def begin(pair: tuple[PipeStream, PipeStream], service: gmprpc.Service) -> Iterator[Callable[[Stream], Life]]:
    """Has a connection begin over one of the pair."""
    lives: list[Life] = []

    def begin(stream: Stream) -> Life:
        connection = Connection(stream, service.table(), ConnectionOptions(), counters=Counters(), peer="the peer")
        lives.append(Life(connection, gevent.spawn(connection.run)))
        return lives[-1]

    yield begin
    for life in lives:
        life.connection.abort()
        life.end()


Begin = Callable[[Stream], Life]


def test_a_connection_calls_and_answers_over_pipes(pair: tuple[PipeStream, PipeStream], begin: Begin) -> None:
    ours, peers = map(begin, pair)
    large = "x" * 500_000  # Far more than a pipe holds: the rest waits for the watcher of the other descriptor.
    for connection, _ in (ours, peers):
        assert connection.call("echo", 1) == 1
        calls = [connection.call_async("echo", large) for _ in range(5)]
        assert all(call.get() == large for call in calls)
    ours.connection.finish()
    assert (ours.end(), peers.end()) == (None, None)


def test_a_connection_answers_what_it_has_received_at_the_end(
    pair: tuple[PipeStream, PipeStream], begin: Begin
) -> None:
    stream, peers = pair
    life = begin(stream)
    reading, writing = os.dup(peers.fileno()), os.dup(peers.write_fileno())
    peers.close()
    os.write(writing, b"".join(msgpack.packb([0, number, "echo", [number]]) for number in range(100)))
    os.close(writing)
    assert life.end() is None
    with open(reading, "rb") as answers:
        assert list(msgpack.Unpacker(answers)) == [[1, number, None, number] for number in range(100)]


def test_a_connection_notices_that_nobody_reads_its_answers(pair: tuple[PipeStream, PipeStream], begin: Begin) -> None:
    stream, peers = pair
    life = begin(stream)
    writing = os.dup(peers.write_fileno())
    peers.close()
    os.write(writing, msgpack.packb([0, 1, "echo", [1]]))
    assert isinstance(life.end().__cause__, BrokenPipeError)
    os.close(writing)
