"""A client, and a server that does at random whatever servers do: every call ends once, and as a model says it may."""

from __future__ import annotations

import gc
import os
import ssl
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from random import Random
from typing import Any

import gevent
import gevent.ssl
import pytest
import trustme
from gevent import Greenlet, GreenletExit, socket

import gmprpc

from .helpers import Peer, collected, wait_until


class Server:
    """Answers, keeps silent, cuts connections, goes and comes back, at random; counts what it was told to carry out."""

    def __init__(self, random: Random, address: Any, context: ssl.SSLContext | None) -> None:
        self.random = random
        self.executions: Counter[int] = Counter()
        self.cancelled = 0
        #: Where the order was another than that of the calls.
        self.disorder: list[Any] = []
        self._context = context
        self._greenlets: set[Greenlet[..., None]] = set()
        self._open: set[socket.socket] = set()
        self.address = address
        self._come_back()
        if not isinstance(address, str):
            self.address = self._listener.getsockname()

    def _spawn(self, function: Callable[..., None], *args: Any) -> None:
        greenlet = gevent.spawn(function, *args)
        self._greenlets.add(greenlet)
        greenlet.rawlink(self._greenlets.discard)

    def _come_back(self) -> None:
        if isinstance(self.address, str):
            self._listener = socket.socket(socket.AF_UNIX)
            path = self.address.removeprefix("unix:")
            if os.path.exists(path):
                os.unlink(path)
            self._listener.bind(path)
        else:
            self._listener = socket.socket()
            self._listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
            self._listener.bind(self.address)
        self._listener.listen()
        self._spawn(self._accept, self._listener)

    def _accept(self, listener: Any) -> None:
        while True:
            try:
                sock, _ = listener.accept()
            except OSError:
                return
            self._open.add(sock)
            self._spawn(self._serve, sock)

    def live(self, until: Callable[[], bool]) -> None:
        """Do what servers do until ``until()``."""
        while not until():
            gevent.sleep(self.random.random() * 0.01)
            if self.random.random() < 0.1:
                self._listener.close()
                if self.random.random() < 0.5:
                    self._hang_up_on_everybody()
                gevent.sleep(self.random.random() * 0.01)
                self._come_back()

    def _hang_up_on_everybody(self) -> None:
        for sock in list(self._open):
            self._cut(sock)

    def _cut(self, sock: Any) -> None:
        if sock in self._open:
            self._open.discard(sock)
            (Peer.reset if self.random.random() < 0.5 else Peer.close)(Peer(sock))

    def _serve(self, sock: Any) -> None:
        random = self.random
        if random.random() < 0.1:
            self._cut(sock)
            return
        if self._context is not None:
            try:
                sock = self._wrapped(sock)
            except OSError:
                return
        patience = random.choice([3, 10, 30, 100])
        is_leaving = False
        last: dict[int, int] = {}
        peer = Peer(sock)
        try:
            while True:
                message = peer.receive()
                if message[0] == 2:
                    self.cancelled += message[1] == "$/cancel"
                    continue
                _, msgid, method, params = message
                if random.random() < (0.2 if method == "$/health" else 0.02):
                    peer.send([2, "$/draining", []])
                    is_leaving = True
                if method == "$/health":
                    if random.random() < 0.9:
                        peer.send([1, msgid, None, "SERVING"])
                    continue
                number, actor, place, _ = params
                self.executions[number] += 1
                if place is not None:
                    if last.get(actor, -1) >= place:
                        self.disorder.append((actor, last[actor], place))
                    last[actor] = place
                self._answer(peer, msgid, number)
                patience -= 1
                if not patience and not is_leaving:  # Who is told to go is heard out.
                    if random.random() < 0.3:
                        sock.shutdown(socket.SHUT_WR)
                    elif random.random() < 0.3:
                        peer.send_bytes(b"\xc1")
                    else:
                        self._cut(sock)
                        return
                if random.random() < 0.05:
                    gevent.sleep(random.random() * 0.02)
        except (OSError, EOFError, ValueError):
            pass
        finally:
            self._cut(sock)

    def _wrapped(self, sock: Any) -> Any:
        assert self._context is not None
        self._open.discard(sock)
        try:
            if self.random.random() < 0.1:
                gevent.sleep(0.02)
            wrapped: Any = self._context.wrap_socket(sock, server_side=True)
        except BaseException:
            sock.close()
            raise
        self._open.add(wrapped)
        return wrapped

    def _answer(self, peer: Peer, msgid: int, number: int) -> None:
        what = self.random.random()
        if what < 0.6:
            peer.send([1, msgid, None, number])
        elif what < 0.7:
            peer.send([1, msgid, f"error {number}", None])
        elif what < 0.75:
            peer.send([1, msgid, None, number], [1, msgid, None, number], [1, 10**6, None, None])
        elif what < 0.95:
            self._spawn(self._answer_later, peer, msgid, number, self.random.random() * 0.03)

    def _answer_later(self, peer: Peer, msgid: int, number: int, pause: float) -> None:
        gevent.sleep(pause)
        try:
            peer.send([1, msgid, None, number])
        except (OSError, ValueError):
            pass

    def close(self) -> None:
        self._listener.close()
        self._hang_up_on_everybody()
        gevent.killall(list(self._greenlets))


class Model:
    """What is known of each call: what it was, how it has ended, and how often it was carried out."""

    def __init__(self, client: gmprpc.Client, server: Server, random: Random) -> None:
        self.client = client
        self.server = server
        self.random = random
        self.ends: dict[int, list[Any]] = {}
        self.is_idempotent: dict[int, bool] = {}
        self.connecting: set[Greenlet[..., Any]] = set()

    def new(self) -> tuple[int, bool]:
        number = len(self.ends)
        self.ends[number] = []
        self.is_idempotent[number] = self.random.random() < 0.3
        return number, self.is_idempotent[number]

    def ended(self, number: int, value: Any) -> None:
        self.ends[number].append(value)

    def actor(self, me: int) -> None:
        """Calls, in all ways, and gives some of it up."""
        random, client = self.random, self.client
        place = 0
        waiting: list[Any] = []
        for _ in range(40):
            number, idempotent = self.new()
            settings: dict[str, Any] = {
                "timeout": random.choice([None, None, 0, 0.001, 0.01, 0.05, 0.5]),
                "idempotent": idempotent,
                "cancel_on_timeout": random.random() < 0.3,
            }
            size = random.choice([1, 1, 1, 100, 5000, 50_000, 1_000_000])
            way = random.random()
            patience = random.choice([None, None, 0.001, 0.01])
            try:
                with gevent.Timeout(patience):
                    if way < 0.4:
                        self.ended(number, client.call("run", number, me, None, b"x" * size, **settings))
                    elif way < 0.9:
                        place += 1
                        call = client.call_async("run", number, me, place, b"x" * size, **settings)
                        self._watch(number, call)
                        waiting.append(call)
                    else:
                        self.ended(number, None)
                        client.notify("news", number, timeout=settings["timeout"])
            except BaseException as exc:
                if way < 0.9:
                    self.ended(number, exc)
                if isinstance(exc, GreenletExit):
                    break
            if waiting and random.random() < 0.2:
                random.choice(waiting).cancel(random.random() < 0.5)
            if random.random() < 0.2:
                gevent.sleep(random.random() * 0.005)
        for call in waiting:
            if random.random() < 0.5:
                call.wait()

    def _watch(self, number: int, call: gmprpc.PendingCall) -> None:
        def over(call: gmprpc.PendingCall) -> None:
            self.ended(number, call.exception if call.exception is not None else call.value)
            if self.random.random() < 0.02:  # In the hub nobody may wait.
                number_2, idempotent = self.new()
                try:
                    self._watch(number_2, self.client.call_async("run", number_2, -1, None, b"", idempotent=idempotent))
                except gmprpc.RPCError as exc:
                    self.ended(number_2, exc)

        call.rawlink(over)

    def disturb(self, actors: list[Greenlet[..., None]]) -> None:
        """Kill, close, connect; whatever a program may do."""
        random = self.random
        while not all(actor.ready() for actor in actors):
            gevent.sleep(random.random() * 0.02)
            what = random.random()
            if what < 0.1:
                random.choice(actors).kill(block=False)
            elif what < 0.2:
                closing = gevent.spawn(self.client.close)
                self.connecting.add(closing)
                if random.random() < 0.5:
                    gevent.sleep(random.random() * 0.003)
                self.connecting.add(gevent.spawn(self._connect))
                if random.random() < 0.5:
                    closing.join()
            elif what < 0.3:
                self.connecting.add(gevent.spawn(self._connect))

    def _connect(self) -> None:
        try:
            self.client.connect()
        except gmprpc.ConnectionClosed:
            pass

    def check(self) -> None:
        """Everything has ended; see whether all is as it may be."""
        executions = self.server.executions
        for number, ends in self.ends.items():
            assert len(ends) == 1, (number, ends)
            end, count = ends[0], executions[number]
            what = (number, end, count, self.is_idempotent[number])
            if not self.is_idempotent[number]:
                assert count <= 1, what
            if end == number or (isinstance(end, gmprpc.RemoteError) and end.error == f"error {number}"):
                assert type(end) is not int or count >= 1, what
            elif isinstance(end, (gmprpc.ConnectionClosed, gmprpc.CallTimeout)):
                assert count == 0 or end.sent, what
            else:
                assert end is None or isinstance(end, (gmprpc.CallCancelled, GreenletExit, gevent.Timeout)), what
        assert not self.server.disorder


@pytest.fixture(scope="module")
def contexts() -> tuple[ssl.SSLContext, ssl.SSLContext]:
    """A client's and a server's."""
    authority = trustme.CA()
    server = gevent.ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    authority.issue_cert("127.0.0.1").configure_cert(server)
    client = ssl.create_default_context()
    authority.configure_trust(client)
    return client, server


def run(
    seed: int,
    address: Any,
    client_context: ssl.SSLContext | None = None,
    server_context: ssl.SSLContext | None = None,
) -> None:
    random = Random(seed)
    before = resources()
    server = Server(random, address, server_context)
    errors: list[Exception] = []
    client = gmprpc.Client(
        server.address,
        ssl_context=client_context,
        max_pending=random.choice([1, 2, 5, 1000]),
        max_unsent_size=random.choice([1, 1000, 100_000, None]),
        retry_interval=random.choice([0.001, 0.001, 0.001, None]),
        max_retry_interval=0.01,
        connect_timeout=random.choice([0.05, 2]),
        keep_connected=random.random() < 0.3,
        draining=random.random() < 0.5,
        ping_interval=random.choice([None, None, 0.005, 0.5]),
        idle_timeout=random.choice([None, None, 0.005]),
        on_error=lambda client, exc: errors.append(exc),
    )
    model = Model(client, server, random)
    actors = [gevent.spawn(model.actor, number) for number in range(8)]
    disturbing = gevent.spawn(model.disturb, actors)
    server_life = gevent.spawn(server.live, lambda: all(actor.ready() for actor in actors))
    # What has no time-out of its own may wait for an answer that never comes.
    gevent.joinall(actors, timeout=0.5)
    disturbing.kill()
    gevent.joinall(list(model.connecting))
    client.close()
    gevent.joinall(actors)
    server_life.join()
    server.close()
    wait_until(lambda: all(model.ends.values()))
    link = client._links.get()
    assert client.statistics()["pending"] == client.statistics()["open_connections"] == 0
    assert not link._queue
    assert not link._returned
    assert not link._lives
    assert not link._on_probation
    assert link._connecting is None
    model.check()
    assert all(isinstance(exc, (gmprpc.ConnectionClosed, gmprpc.ProtocolError)) for exc in errors)
    wait_until(lambda: resources() == before)


def resources() -> tuple[int, int, int]:
    """How many descriptors, greenlets that have not ended, and watchers of the loop there are."""
    collected()
    greenlets = [thing for thing in gc.get_objects() if isinstance(thing, Greenlet) and not thing.dead]
    return len(os.listdir("/proc/self/fd")), len(greenlets), gevent.get_hub().loop.activecnt


# More of them find more: `GMPRPC_SEEDS=1000:2000`.
FIRST, LAST = map(int, os.environ.get("GMPRPC_SEEDS", "0:3").split(":"))
SEEDS = range(FIRST, LAST)


@pytest.mark.parametrize("seed", SEEDS)
def test_over_tcp_every_call_ends_once(seed: int) -> None:
    run(seed, ("127.0.0.1", 0))


@pytest.mark.parametrize("seed", SEEDS)
def test_over_a_unix_socket_every_call_ends_once(seed: int, tmp_path: Path) -> None:
    run(seed, f"unix:{tmp_path}/socket")


@pytest.mark.parametrize("seed", SEEDS)
def test_over_tls_every_call_ends_once(seed: int, contexts: tuple[ssl.SSLContext, ssl.SSLContext]) -> None:
    run(seed, ("127.0.0.1", 0), *contexts)
