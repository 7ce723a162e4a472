"""Many endpoints behind one face: a call goes to one that can answer it, and to another if that one can't."""

from __future__ import annotations

from collections import Counter
from functools import partial
from typing import Any, Literal, Self

from .client import Client, Proxy
from .discovery import discovery_of
from .endpoints import Endpoint
from .errand import Errand
from .exceptions import CallTimeout, ConnectionClosed
from .metrics import Counters, Statistics
from .options import DEFAULT, check_timeout
from .perhub import PerHub
from .pool import GAUGES, EndpointStatus, Pool, Settings
from .reply import PendingCall


class Balancer:
    """Calls whichever of several servers can answer, with the interface of a :class:`~gmprpc.Client`.

    ``addresses`` is a list, or any iterable, of addresses; or one address ``"host:port"`` or ``(host, port)``, for
    every address that the name has; or a function without params that returns addresses. The last two are asked again
    every ``resolve_interval`` seconds as long as there are calls, and when an endpoint fails. An endpoint that isn't
    among them any more gets no new calls, and is closed when it has answered.

    A call goes to the less busy one of two that are chosen at random. An endpoint gets no more calls when its
    connection fails, when three calls in a row had no answer, not even late, or when it answers ``"NOT_SERVING"`` to
    ``$/health``, which it is asked, too, every ``resolve_interval`` seconds. It is tried again, at first after
    ``retry_interval`` seconds and then later and later, up to ``max_retry_interval``, and gets calls again as soon as
    it gives any other answer to ``$/health``; with ``probe="connect"``, which never asks, as soon as it can be
    connected to.

    When the server of an endpoint says with ``$/draining`` that it will let go of the connection the endpoint is tried
    at once, and what was called there is still answered: no call is lost when servers are restarted one after the
    other. With ``probe="connect"`` they say so only if they are asked for their health nevertheless: see ``draining``
    of :class:`~gmprpc.Client`.

    ``timeout`` is a call's for everything: waiting for an endpoint, connecting, and the answer. A call without one
    waits ``connect_timeout`` seconds for an endpoint. The other keywords are those of :class:`~gmprpc.Client`; a hook
    is given the endpoint's client. May be used in any thread, and in a process that was forked off: each has its own
    connections.
    """

    def __init__(
        self,
        addresses: Any,
        *,
        # Endpoints
        probe: Literal["health", "connect"] = "health",
        resolve_interval: float | None = 30.0,
        retry_interval: float = 0.1,
        max_retry_interval: float = 5.0,
        # Timeouts
        timeout: float | None = None,
        connect_timeout: float | None = 10.0,
        **client_options: Any,
    ) -> None:
        if probe not in ("health", "connect"):
            raise ValueError(f'probe has to be "health" or "connect", not {probe!r}')
        intervals = {"retry_interval": retry_interval, "max_retry_interval": max_retry_interval}
        if resolve_interval is not None:
            intervals["resolve_interval"] = resolve_interval
        for name, interval in intervals.items():
            if not (isinstance(interval, (int, float)) and interval > 0):
                raise ValueError(f"{name} has to be a number of seconds above 0, not {interval!r}")
        check_timeout("timeout", timeout)
        check_timeout("connect_timeout", connect_timeout)
        #: Seconds to wait for an answer, where a call doesn't say.
        self.timeout = timeout
        self._settings = Settings(
            discovery=discovery_of(addresses),
            asks_for_health=probe == "health",
            resolve_interval=resolve_interval,
            retry_interval=retry_interval,
            max_retry_interval=max_retry_interval,
            connect_timeout=connect_timeout,
            client_options=client_options,
        )
        self._settings.check()
        #: Where the servers are, where one address says that; None where several do, or a function is asked.
        self.address = self._settings.discovery.address
        self._past: Counter[str] = Counter()
        self._pools = PerHub(partial(Pool, self._settings, self._past))
        self._closing: list[Pool] = []
        self._is_closed = False

    # Calling.

    def call(
        self,
        method: str,
        *params: Any,
        timeout: float | None = DEFAULT,
        idempotent: bool = False,
        cancel_on_timeout: bool | None = None,
    ) -> Any:
        """Call ``method`` and wait, in this greenlet only, for its result.

        ``timeout`` and ``cancel_on_timeout`` are the balancer's, unless they are given. A request that has not left
        when the connection is lost goes to another endpoint. One that has left may have been carried out, and the call
        fails, unless it is ``idempotent``: then another endpoint is called.

        Raises:
            RemoteError: the server answered an error; MethodNotFound if it has no such method.
            CallTimeout: no answer came in time. ``sent`` tells whether the request had left by then; if not,
                ``__cause__`` says why there was no endpoint.
            ConnectFailed: there is no usable endpoint; ``__cause__`` says why.
            ConnectionClosed: the connection ended before the answer came, or the balancer is closed.
            ProtocolError: the answer holds a value that can't be decoded. The connection goes on.
            TypeError, ValueError, OverflowError: the params can't be packed. Nothing was sent.
        """
        errand = self._errand(method, params, timeout, idempotent=idempotent, cancel_on_timeout=cancel_on_timeout)
        return self._pool().call(errand, _call)

    def call_async(
        self,
        method: str,
        *params: Any,
        timeout: float | None = DEFAULT,
        idempotent: bool = False,
        cancel_on_timeout: bool | None = None,
    ) -> PendingCall:
        """Call ``method`` and go on; what it returns has the result once it is there, or the error.

        The keywords are :meth:`call`'s. Where no endpoint is usable the call is sent as soon as one is.

        Raises:
            ConnectionClosed: the balancer is closed.
            TypeError, ValueError, OverflowError: the params can't be packed (``get`` raises it, where there is no
                endpoint yet). Nothing was sent.
        """
        errand = self._errand(method, params, timeout, idempotent=idempotent, cancel_on_timeout=cancel_on_timeout)
        return _AsyncCall(self._pool(), errand).begin()

    def notify(self, method: str, *params: Any, timeout: float | None = DEFAULT) -> None:
        """Call ``method`` of one endpoint without an answer: whether it arrives and succeeds can't be known.

        Waits for an endpoint, if none is usable; raises like :meth:`call`, but for what an answer would bring.
        """
        self._pool().call(self._errand(method, params, timeout), _notify)

    @property
    def proxy(self) -> Proxy:
        """Calls methods as attributes: ``balancer.proxy.math.pow(2, 10)`` calls ``math.pow``."""
        return Proxy(self)

    # Connecting.

    def connect(self) -> Self:
        """Wait until an endpoint is usable; a balancer that was closed is open again.

        Raises:
            ConnectFailed: none is within ``connect_timeout``. They are tried on.
        """
        self._is_closed = False
        self._pool().wait_for_endpoint(self._errand("connect", (), None))
        return self

    def close(self) -> None:
        """Close all connections: calls that wait end with ConnectionClosed.

        What was sent before, a notification perhaps, still arrives if the peer takes it within two seconds. Those of
        other threads are closed soon.

        May be called any number of times. Calls from now on raise ConnectionClosed, until :meth:`connect`.
        """
        self._is_closed = True
        pools = self._pools.all()
        self._closing = [pool for pool in self._closing if not pool.is_over] + pools
        self._pools.clear()
        for pool in pools:
            pool.close_from_any_thread()

    def statistics(self) -> Statistics:
        """What happened since the balancer was made, and how much is going on now, in all threads: one snapshot.

        What a :class:`~gmprpc.Client` counts, of all endpoints together; and ``endpoints``, ``usable_endpoints``,
        ``ejections``, ``probes``, ``failed_probes``, ``moved_calls`` (sent, or to be sent, to another endpoint after
        the first had failed), ``look_ups``, ``failed_look_ups``. ``pending`` is how many calls wait, for an endpoint
        too.
        """
        statistics = Counter(dict.fromkeys(Pool.COUNTS + GAUGES, 0) | Counters().snapshot())
        statistics.update(dict(self._past))  # A copy, made at once: another thread may add to it.
        for pool in [*self._closing, *self._pools.all()]:
            if not pool.is_over:
                statistics.update(pool.statistics())
        return Statistics(statistics)

    @property
    def endpoints(self) -> list[EndpointStatus]:
        """The endpoints and how they do, as this thread knows them; none until its first call, or :meth:`connect`."""
        pool = self._pools.peek()
        return [] if pool is None else pool.status()

    def __enter__(self) -> Self:
        try:
            return self.connect()
        except BaseException:
            self.close()
            raise

    def __exit__(self, *_: object) -> None:
        self.close()

    def _pool(self) -> Pool:
        if self._is_closed:
            raise ConnectionClosed("the balancer is closed")
        return self._pools.get()

    def _errand(self, method: str, params: tuple[Any, ...], timeout: float | None, **options: Any) -> Errand:
        which = "call"
        if timeout is DEFAULT:
            timeout, which = self.timeout, "balancer"
        else:
            check_timeout("timeout", timeout)
        connect_timeout = self._settings.connect_timeout
        return Errand(method, params, timeout=timeout, which=which, connect_timeout=connect_timeout, **options)


def _call(client: Client, errand: Errand) -> Any:
    return client.call(
        errand.method, *errand.params, timeout=errand.time_left(), cancel_on_timeout=errand.cancel_on_timeout
    )


def _call_async(client: Client, errand: Errand) -> PendingCall:
    return client.call_async(
        errand.method, *errand.params, timeout=errand.time_left(), cancel_on_timeout=errand.cancel_on_timeout
    )


def _notify(client: Client, errand: Errand) -> None:
    client.notify(errand.method, *errand.params, timeout=errand.time_left())


class _AsyncCall:
    """A call that goes on without its caller: a callback as long as all goes well, and a greenlet if not."""

    def __init__(self, pool: Pool, errand: Errand) -> None:
        self._pool = pool
        self._errand = errand
        self._call = PendingCall(errand.method)
        self._tell = True  # The endpoint, when the call is cancelled.

    def begin(self) -> PendingCall:
        """Call an endpoint, or the first that comes to be usable; raises like :meth:`Balancer.call_async`."""
        endpoint = self._pool.choose(self._errand)
        if endpoint is None:
            self._go_on()
            return self._call
        returns = endpoint.returns
        errand = self._errand
        endpoint.pending += 1
        try:
            attempt = _call_async(endpoint.client, errand)
        except BaseException as exc:
            self._pool.count_down(endpoint)
            self._pool.judge(endpoint, returns, exc)
            if not isinstance(exc, ConnectionClosed) or not self._pool.may_go_on(errand, exc):
                raise
            self._go_on()
            return self._call
        self._call._forget = attempt.cancel
        attempt.rawlink(partial(self._finish, endpoint, returns))
        return self._call

    def _finish(self, endpoint: Endpoint, returns: int, attempt: PendingCall) -> None:
        """The attempt has ended; in the hub."""
        self._pool.count_down(endpoint)
        exc = attempt.exception
        if isinstance(exc, CallTimeout):
            exc = self._errand.timed_out(exc)
        if exc is None:
            if endpoint.is_suspect:
                endpoint.answered()
        else:
            self._pool.judge(endpoint, returns, exc)
        if self._call.ready():  # It was cancelled.
            return
        if exc is None:
            self._call.set(attempt.value)
        elif isinstance(exc, ConnectionClosed) and self._pool.may_go_on(self._errand, exc):
            self._go_on()
        else:
            self._call.set_exception(exc)

    def _go_on(self) -> None:
        greenlet = self._pool.spawn_call(self._run)

        def give_up(tell: bool) -> bool:
            self._tell = tell
            greenlet.kill(block=False)
            return True

        self._call._forget = give_up

    def _run(self) -> None:
        try:
            result = self._pool.call(self._errand, self._ask)
        except BaseException as exc:  # Also when this greenlet is killed.
            if not self._call.ready():
                self._call.set_exception(exc)
        else:
            if not self._call.ready():
                self._call.set(result)

    def _ask(self, client: Client, errand: Errand) -> Any:
        attempt = _call_async(client, errand)
        try:
            return attempt.get()
        finally:
            attempt.cancel(self._tell)  # If this greenlet is killed; or else it is over.
