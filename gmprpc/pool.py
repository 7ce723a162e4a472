"""What one hub has of a Balancer: its endpoints, what is known of them, and the greenlets that look after them.

Each endpoint has a Client of its own; what happens to those is decided here, and no more: how to connect and call is
theirs.
"""

from __future__ import annotations

import logging
from collections import Counter
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from functools import partial
from time import perf_counter
from typing import Any

import gevent
from gevent import Greenlet, GreenletExit
from gevent.event import Event
from gevent.pool import Group

from .backoff import Backoff
from .builtin import NOT_SERVING
from .client import Client
from .connection import Connection
from .discovery import Discovery, NoAddresses
from .endpoints import Endpoint, Endpoints
from .errand import Errand
from .exceptions import CallTimeout, ConnectFailed, ConnectionClosed, ProtocolError, RemoteError, text_of
from .log import log_soon
from .methods import HEALTH
from .reply import get_thread_ident
from .streams import Stream
from .transport import format_address

logger = logging.getLogger("gmprpc.balancer")

# Bytes where strings are taken raw.
_NOT_SERVING = (NOT_SERVING, NOT_SERVING.encode())

# How long a probe, or the search for addresses, may take where `connect_timeout` is None: its default.
_PROBE_TIMEOUT = 10.0
# Addresses are not asked for more often, however many endpoints fail. Picked arbitrarily.
_MIN_LOOK_UP_INTERVAL = 1.0
# They are asked for again and again, while that fails, for so long after the last call. Picked arbitrarily.
_LOOK_UP_TIME = 30.0
# Those of the statistics that tell of the moment; what the others have counted remains when a client is closed.
GAUGES = ("open_connections", "in_flight", "pending", "unsent_size", "endpoints", "usable_endpoints")


@dataclass(frozen=True, slots=True)
class EndpointStatus:
    """How an endpoint of a :class:`Balancer` does, in one thread."""

    #: Where it is.
    address: Any
    #: Whether calls go there.
    is_usable: bool
    #: How many calls wait for its answer.
    pending: int
    #: Why it isn't usable, or wasn't last.
    error: Exception | None


class _Refusal(ConnectFailed):
    """An endpoint's client isn't to connect at the moment."""


class EndpointClient(Client):
    """Connects only when its pool wants that: what waits for a connection had better go to another endpoint."""

    may_connect = False
    #: Called when it wants to connect and may not.
    on_refusal: Callable[[], None] | None = None
    #: Called when the server will let go of the connection.
    on_draining: Callable[[], None] | None = None

    @property
    def late_answers(self) -> int:
        """How many answers have come for which nobody waited any more."""
        return self._counters.late_answers

    def open_stream(self, opened: Callable[[Callable[[], Any]], Any]) -> Stream:
        """See :meth:`Client.open_stream`."""
        if self.may_connect:
            return super().open_stream(opened)
        if self.on_refusal is not None:
            self.on_refusal()
        last = self.connection
        raise _Refusal("the connection was closed before the request was sent") from (
            None if last is None else last.error
        )

    def move_from(self, connection: Connection) -> None:
        """See :meth:`Client.move_from`."""
        super().move_from(connection)  # First, so that what waits there is refused before the next probe.
        if not self.is_connected and self.on_draining is not None:
            self.on_draining()

    @property
    def is_connected_anywhere(self) -> bool:
        """Whether calls can be sent in its pool's thread; may be asked in any."""
        return any(link.is_connected for link in self._links.all())

    def hang_up(self) -> None:
        """Begin to close all connections of this thread."""
        for connection in self._links.get().connections:
            connection.close()

    def report(self, exc: Exception) -> None:
        """See :meth:`Client.report`."""
        if not isinstance(exc, _Refusal):  # That was no attempt.
            super().report(exc)


@dataclass(frozen=True, slots=True)
class Settings:
    """What a balancer was made with."""

    discovery: Discovery
    asks_for_health: bool
    resolve_interval: float | None
    retry_interval: float
    max_retry_interval: float
    connect_timeout: float | None
    client_options: Mapping[str, Any]

    def make_client(self, address: Any) -> EndpointClient:
        """The client of the endpoint at ``address``; it does nothing yet."""
        options = dict(self.client_options)
        if self.discovery.hostname is not None:  # The certificate is that of the name, and not of its addresses.
            options.setdefault("server_hostname", self.discovery.hostname)
        return EndpointClient(address, connect_timeout=self.connect_timeout, retry_interval=None, **options)

    def make_backoff(self) -> Backoff:
        return Backoff(self.retry_interval, self.max_retry_interval)

    def check(self) -> None:
        """Raise now what would be wrong with each client."""
        for address in [("127.0.0.1", 1)] if self.discovery.changes else self.discovery.look_up():
            self.make_client(address)

    @property
    def probe_timeout(self) -> float:
        return _PROBE_TIMEOUT if self.connect_timeout is None else self.connect_timeout


# How to have a client do an errand.
Ask = Callable[[Client, Errand], Any]


class Pool:
    """The endpoints of a balancer in one hub: what is known of them, and what is done about it."""

    #: What is counted here, besides what clients count.
    COUNTS = ("ejections", "probes", "failed_probes", "moved_calls", "look_ups", "failed_look_ups")

    def __init__(self, settings: Settings, past: Counter[str]) -> None:
        self._settings = settings
        self._past = past
        self._hub = gevent.get_hub()
        self._endpoints = Endpoints(self._make_endpoint)
        self._is_any_usable = Event()
        # Why calls can't go on, once that is so.
        self._end: str | None = None
        #: True once all that it has counted is among what is past.
        self.is_over = False
        # How many calls wait for an endpoint.
        self._waiting = 0
        self._counts: Counter[str] = Counter()
        # Of endpoints that are gone and have still something to answer, and what isn't closed yet.
        self._leaving: set[Endpoint] = set()
        self._closing: set[EndpointClient] = set()
        # Greenlets: what is killed at the end, and calls, which end by themselves then.
        self._tasks = Group()
        self._calls = Group()
        self._revivals: dict[Endpoint, Greenlet[..., None]] = {}
        self._checked: set[Endpoint] = set()  # While it lasts.
        # Looking for endpoints.
        self._look_up_backoff = settings.make_backoff()
        self._look_up_error: Exception | None = None
        self._looking_up: Greenlet[..., None] | None = None
        self._used_at = self._looked_up_at = perf_counter()
        self._next_round = self._used_at + (settings.resolve_interval or 0)
        if settings.discovery.changes:
            self._looked_up_at -= _MIN_LOOK_UP_INTERVAL
            self._look_up_soon()
        else:
            self._update(settings.discovery.look_up())

    # Calling.

    def call(self, errand: Errand, ask: Ask) -> Any:
        """What ``ask`` gets out of the first endpoint that can do it; raises like :meth:`Balancer.call`."""
        self._keep_up(errand.begun)
        while True:
            if (endpoint := self._choose()) is None:
                endpoint = self.wait_for_endpoint(errand)
            returns = endpoint.returns
            endpoint.pending += 1
            try:
                result = ask(endpoint.client, errand)
            except ConnectionClosed as exc:
                self.judge(endpoint, returns, exc)
                if not self.may_go_on(errand, exc):
                    raise
            except CallTimeout as exc:
                late = errand.timed_out(exc)
                self.judge(endpoint, returns, late)
                raise late from exc.__cause__
            except Exception as exc:
                self.judge(endpoint, returns, exc)
                raise
            else:
                if endpoint.is_suspect:
                    endpoint.answered()
                return result
            finally:
                self.count_down(endpoint)

    def choose(self, errand: Errand) -> Endpoint | None:
        """An endpoint for ``errand``; None if none is usable."""
        self._keep_up(errand.begun)
        return self._choose()

    def wait_for_endpoint(self, errand: Errand) -> Endpoint:
        """One that is usable, as soon as there is one.

        Raises:
            CallTimeout, ConnectFailed: there was none as long as the errand could wait.
            ConnectionClosed: the pool is at its end.
        """
        if gevent.getcurrent() is self._hub:
            raise RuntimeError("this would block the hub: use call_async() in callbacks of the loop")
        self._waiting += 1
        try:
            while True:
                if (endpoint := self._choose()) is not None:
                    return endpoint
                if self._end is not None:
                    raise ConnectionClosed(self._end, sent=errand.has_left)
                if not self._endpoints:
                    self._look_up_soon()
                patience = errand.patience()
                if patience == 0:
                    raise errand.found_none(self._why_none())
                self._is_any_usable.wait(patience)
        finally:
            self._waiting -= 1

    def spawn_call(self, function: Callable[[], None]) -> Greenlet[..., None]:
        """A greenlet in which a call waits that nobody waits for."""
        return self._calls.spawn(function)

    def judge(self, endpoint: Endpoint, returns: int, outcome: BaseException) -> None:
        """Draw conclusions about ``endpoint`` from how a call has ended that began after so many ``returns`` of it."""
        if isinstance(outcome, (RemoteError, ProtocolError)):
            if endpoint.is_suspect:
                endpoint.answered()
            return
        if not endpoint.is_usable or returns != endpoint.returns:
            return
        if isinstance(outcome, ConnectionClosed) or (
            isinstance(outcome, CallTimeout) and endpoint.timed_out(endpoint.client.late_answers)
        ):
            self._eject(endpoint, outcome)

    def may_go_on(self, errand: Errand, closed: ConnectionClosed) -> bool:
        """Whether ``errand`` may be sent to another endpoint, now that a connection has failed."""
        if not errand.may_go_on_after(closed) or self._end is not None:
            return False
        self._counts["moved_calls"] += 1
        return True

    def count_down(self, endpoint: Endpoint) -> None:
        """A call to ``endpoint`` has ended."""
        endpoint.pending -= 1
        if endpoint.is_gone and not endpoint.pending:
            self._let_go(endpoint)

    def _choose(self) -> Endpoint | None:
        while self._end is None and (endpoint := self._endpoints.choose()) is not None:
            if endpoint.client.is_connected:
                return endpoint
            # It was idle when it closed the connection, as one may that was idle. Connecting must not cost a call's
            # time where others are connected.
            self._take_out(endpoint, None)
        return None

    def _why_none(self) -> Exception | None:
        """The best reason there is why no endpoint is usable."""
        errors = [endpoint.error for endpoint in self._endpoints if endpoint.error is not None]
        return errors[-1] if errors else self._look_up_error

    # Endpoints that come and go.

    def _keep_up(self, now: float) -> None:
        """Look from time to time, as long as there are calls, whether everything still is as it was."""
        self._used_at = now
        if now >= self._next_round and self._settings.resolve_interval is not None:
            self._next_round = now + self._settings.resolve_interval
            self._look_up_soon()
            if self._settings.asks_for_health:
                for endpoint in self._endpoints.usable:
                    if endpoint.client.is_connected and endpoint not in self._checked:
                        self._checked.add(endpoint)
                        self._tasks.spawn(self._check, endpoint)

    def _look_up_soon(self) -> None:
        if self._looking_up is not None or self._end is not None or not self._settings.discovery.changes:
            return
        interval = min(_MIN_LOOK_UP_INTERVAL, self._settings.resolve_interval or _MIN_LOOK_UP_INTERVAL)
        if not self._endpoints or perf_counter() - self._looked_up_at >= interval:
            self._looking_up = self._tasks.spawn(self._look_up)

    def _look_up(self) -> None:
        """Find out which endpoints there are; until that succeeds, or nobody wants to know any more."""
        try:
            while not self._look_up_once():
                gevent.sleep(self._look_up_backoff.next())
                if self._end is not None:  # In a process that was forked off.
                    return
                if not self._waiting and perf_counter() - self._used_at > _LOOK_UP_TIME:
                    return
        finally:
            self._looking_up = None

    def _look_up_once(self) -> bool:
        self._looked_up_at = perf_counter()
        self._counts["look_ups"] += 1
        try:
            with self._limited() as limit:
                self._update(self._settings.discovery.look_up())
                self._look_up_error = None
                self._look_up_backoff.reset()
                return True
            self._look_up_failed(ConnectFailed(f"the addresses were not known within {limit.seconds:g} s"))
        except NoAddresses as exc:
            self._look_up_failed(exc)
            self._update([])
        except GreenletExit:
            raise
        except BaseException as exc:  # Also SystemExit, out of a function of the user's.
            if not isinstance(exc, Exception):
                exc = ConnectFailed(f"the addresses are not known: {text_of(exc)}")
            self._look_up_failed(exc)
        return False

    def _look_up_failed(self, exc: Exception) -> None:
        self._counts["failed_look_ups"] += 1
        if self._look_up_error is None:  # Once is enough.
            log_soon(logger, logging.WARNING, "the addresses are not known: %s", text_of(exc))
        self._look_up_error = exc

    def _update(self, addresses: Iterable[Any]) -> None:
        new, gone = self._endpoints.update(addresses)
        for endpoint in gone:
            if (revival := self._revivals.pop(endpoint, None)) is not None:
                revival.kill(block=False)
            if endpoint.pending:
                self._leaving.add(endpoint)
            else:
                self._let_go(endpoint)
        for endpoint in new:
            self._revive(endpoint, 0)
        self._note_usable()

    def _make_endpoint(self, address: Any) -> Endpoint:
        endpoint = Endpoint(address, None, self._settings.make_backoff())
        self._give_client(endpoint)
        return endpoint

    def _give_client(self, endpoint: Endpoint) -> None:
        endpoint.client = self._settings.make_client(endpoint.address)
        endpoint.client.on_draining = partial(self._reconnect, endpoint, endpoint.client)
        if self._settings.client_options.get("keep_connected"):
            endpoint.client.on_refusal = partial(self._reconnect, endpoint, endpoint.client)

    def _reconnect(self, endpoint: Endpoint, client: EndpointClient) -> None:
        """Connect again without waiting for a call to find out that the connection is lost, or about to end."""
        if endpoint.is_usable and endpoint.client is client and not client.is_connected:
            self._take_out(endpoint, None)

    def _let_go(self, endpoint: Endpoint) -> None:
        self._leaving.discard(endpoint)
        self._close_soon(endpoint.client)

    def _close_soon(self, client: EndpointClient) -> None:
        if self._end is None:
            self._closing.add(client)
            self._tasks.spawn(self._close, client)

    def _close(self, client: EndpointClient) -> None:
        client.close()
        if client in self._closing:  # Or else it has been closed by somebody else, too.
            # Another thread may do this at the same moment, and a count be lost: no more than that.
            self._past.update({name: count for name, count in client.statistics().items() if name not in GAUGES})
            self._closing.discard(client)

    # Endpoints that fail and return.

    def _eject(self, endpoint: Endpoint, error: Exception) -> None:
        if endpoint.is_usable and self._end is None:
            self._counts["ejections"] += 1
            where = format_address(endpoint.address)
            log_soon(logger, logging.INFO, "%s gets no more calls: %s", where, text_of(error), peer=where)
            self._take_out(endpoint, error)
            self._look_up_soon()

    def _take_out(self, endpoint: Endpoint, error: Exception | None) -> None:
        """Let ``endpoint`` get no calls until a probe succeeds; the first is at once if there was no ``error``."""
        self._endpoints.take_out(endpoint)
        self._note_usable()
        endpoint.error = error
        is_first = not endpoint.backoff.failures
        wait = endpoint.backoff.next()
        endpoint.is_suspect = True
        self._revive(endpoint, 0 if is_first and error is None else wait)

    def _note_usable(self) -> None:
        """Wake those who wait, or let them wait."""
        if self._endpoints.usable:
            self._is_any_usable.set()
        else:
            self._is_any_usable.clear()

    def _revive(self, endpoint: Endpoint, wait: float) -> None:
        self._revivals[endpoint] = self._tasks.spawn(self._probe_until_usable, endpoint, wait)

    def _probe_until_usable(self, endpoint: Endpoint, wait: float) -> None:
        try:
            while not self._probe_after(endpoint, wait):
                wait = endpoint.backoff.next()
            if self._end is None and not endpoint.is_gone:  # It may be about to be killed for that.
                if endpoint.error is not None:
                    where = format_address(endpoint.address)
                    log_soon(logger, logging.INFO, "%s gets calls again", where, peer=where)
                self._endpoints.put_in(endpoint)
                self._note_usable()
        finally:
            self._revivals.pop(endpoint, None)

    def _probe_after(self, endpoint: Endpoint, wait: float) -> bool:
        gevent.sleep(wait)
        if self._end is not None:  # In a process that was forked off.
            return True
        if endpoint.timeouts and not endpoint.pending:
            # The connection may be a dead one without anybody knowing. A new one tells.
            self._close_soon(endpoint.client)
            self._give_client(endpoint)
        try:
            self._probe(endpoint)
        except Exception as exc:
            if endpoint.error is None:
                where = format_address(endpoint.address)
                log_soon(logger, logging.INFO, "%s gets no calls: %s", where, text_of(exc), peer=where)
            endpoint.error = exc
            endpoint.is_suspect = True
            self._look_up_soon()
            return False
        return True

    def _check(self, endpoint: Endpoint) -> None:
        """Ask an endpoint that is usable whether it still is."""
        returns = endpoint.returns
        try:
            if endpoint.client.is_connected:  # Or else the next call finds out: its probe comes before all calls.
                self._probe(endpoint)
        except Exception as exc:
            if returns == endpoint.returns:
                self._eject(endpoint, exc)
        finally:
            self._checked.discard(endpoint)

    def _probe(self, endpoint: Endpoint) -> None:
        """Raise an error of ours unless ``endpoint`` can be called."""
        self._counts["probes"] += 1
        where = format_address(endpoint.address)
        try:
            with self._limited() as limit:
                self._connect(endpoint.client)
                if self._settings.asks_for_health and self._ask_for_health(endpoint.client) in _NOT_SERVING:
                    raise ConnectFailed(f"{where} answers NOT_SERVING")
                return
        except Exception:
            self._counts["failed_probes"] += 1
            raise
        self._counts["failed_probes"] += 1
        endpoint.timeouts += 1
        raise ConnectFailed(f"{where} gave no sign of life within {limit.seconds:g} s")

    def _limited(self) -> gevent.Timeout:
        """A ``with`` that is left, silently, when what is asked there takes too long."""
        # Not by an error of ours: whom that strikes could take it for one that it has to deal with.
        return gevent.Timeout(self._settings.probe_timeout, False)  # type: ignore[arg-type]  # The stubs forgot it.

    @staticmethod
    def _connect(client: EndpointClient) -> None:
        client.may_connect = True
        try:
            client.connect()
        finally:
            client.may_connect = False

    @staticmethod
    def _ask_for_health(client: EndpointClient) -> Any:
        try:
            return client.call(HEALTH, timeout=None)
        except (RemoteError, ProtocolError):  # It answers, even if it has no such method.
            return None

    # What is said of it.

    def status(self) -> list[EndpointStatus]:
        """See :attr:`Balancer.endpoints`."""
        return [
            EndpointStatus(endpoint.address, _is_usable(endpoint), endpoint.pending, endpoint.error)
            for endpoint in self._endpoints
        ]

    def statistics(self) -> Counter[str]:
        """See :meth:`Balancer.statistics`; may be called in any thread."""
        statistics = Counter(self._counts)
        endpoints = list(self._endpoints)
        everybody = endpoints + list(self._leaving)
        for client in [endpoint.client for endpoint in everybody] + list(self._closing):
            statistics.update(client.statistics())
        statistics["pending"] = self._waiting + sum(endpoint.pending for endpoint in everybody)
        statistics["endpoints"] = len(endpoints)
        statistics["usable_endpoints"] = sum(map(_is_usable, endpoints))
        return statistics

    # The end.

    def close_from_any_thread(self) -> None:
        """Close, before this returns if it is called in the pool's own thread."""
        if self._hub.thread_ident == get_thread_ident():
            self.close()
        elif (loop := self._hub.loop) is not None:  # It goes when its thread ends.
            loop.run_callback_threadsafe(gevent.spawn, self.close)

    def close(self) -> None:
        """End everything, and wait for that; in the pool's own thread."""
        self._end = "the balancer was closed"
        clients = [*(endpoint.client for endpoint in [*self._endpoints, *self._leaving]), *self._closing]
        self._endpoints.update([])
        self._leaving.clear()
        self._closing.update(clients)
        self._is_any_usable.set()
        me = gevent.getcurrent()  # Perhaps one of those that end, in a hook.
        tasks = [task for task in self._tasks if task is not me]
        gevent.killall(tasks, block=False)
        for client in clients:
            client.is_closed = True
            client.hang_up()  # All at once, since to part from one may take two seconds.
        for client in clients:
            self._close(client)
        gevent.joinall([*tasks, *(call for call in self._calls if call is not me)])
        self._past.update(self._counts)
        self.is_over = True

    def leave(self) -> None:
        """This thread ends. Its greenlets won't go on, and its connections are closed by the clients."""
        self._end = "the thread has ended"
        self._past.update({name: count for name, count in self.statistics().items() if name not in GAUGES})

    def abandon(self) -> None:
        """In a process that was forked off: what is called here is called in the parent, too, and must end here."""
        self._end = "the call is that of the process which this one was forked off from"
        if self._hub.thread_ident == get_thread_ident():
            self._is_any_usable.set()


def _is_usable(endpoint: Endpoint) -> bool:
    """Whether calls can go there; may be asked in any thread, where `Client.is_connected` would speak of that one."""
    return endpoint.is_usable and endpoint.client.is_connected_anywhere
