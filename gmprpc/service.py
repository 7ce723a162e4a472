"""A table of methods that can serve a socket, without a listener of its own."""

from __future__ import annotations

import inspect
import logging
from collections.abc import Callable, Mapping
from functools import wraps
from inspect import Parameter
from types import MappingProxyType
from typing import Any, TypeVar, overload

from gevent.threadpool import ThreadPool

from .builtin import builtins_of
from .connection import Connection, current_call, current_reply
from .log import log
from .methods import Handler, Methods, MethodTable, Wrapper
from .metrics import Counters
from .options import ConnectionOptions
from .requests import current_request, fields_of
from .streams import PlainStream
from .threads import threaded
from .transport import peer_of

logger = logging.getLogger("gmprpc.service")

F = TypeVar("F", bound=Callable[..., Any])


class Registry:
    """The ways to register a method, the same on a :class:`Service` and on a :class:`~gmprpc.Server`."""

    def __init__(self, methods: Methods) -> None:
        self._methods = methods

    @overload
    def method(self, function: F, /) -> F: ...

    @overload
    def method(
        self, /, *, name: str | None = None, deferred: bool = False, threadpool: bool | ThreadPool = False
    ) -> Callable[[F], F]: ...

    def method(
        self,
        function: F | None = None,
        /,
        *,
        name: str | None = None,
        deferred: bool = False,
        threadpool: bool | ThreadPool = False,
    ) -> Any:
        """Register the decorated function, which stays what it is.

        Bare (``@service.method``) or with keywords: ``name`` is the method's name, by default the function's; with
        ``deferred`` the function is called like one of :meth:`reg_cb`'s; ``threadpool`` is as for :meth:`register`.
        """

        def register(function: F) -> F:
            self.register(function, name, deferred=deferred, threadpool=threadpool)
            return function

        return register if function is None else register(function)

    def register(
        self,
        function: Handler,
        name: str | None = None,
        *,
        deferred: bool = False,
        threadpool: bool | ThreadPool = False,
    ) -> None:
        """Register ``function`` as the method ``name``, by default under its own name.

        It is called with the params, in a greenlet of its own, and may block. What it returns is the result; a Reply,
        an AsyncResult or a Greenlet that it returns is waited for, without keeping the greenlet. What it raises is the
        error. A name that is registered already is registered anew, at once on live connections too.

        With ``threadpool`` it is called in a native thread, and may block that in any way: in one of the hub's own,
        which also look up names and read files, if that is True, or of a ``ThreadPool`` of yours, made in the thread
        that serves. When all are busy it waits for one. It can't be interrupted: if the call is cancelled meanwhile,
        what it returns is dropped.

        Raises:
            TypeError: ``function`` isn't callable, or has no name and none is given.
            ValueError: the name is empty, not Unicode, or begins with ``$/``; or it is ``deferred``, and so never
                blocks, and to be called in a thread.
        """
        if not isinstance(threadpool, (bool, ThreadPool)):
            raise TypeError(f"threadpool has to be True or a gevent.threadpool.ThreadPool, not {threadpool!r}")
        is_threaded = threadpool is not False  # A pool that isn't at work is false.
        if deferred and is_threaded:
            raise ValueError("deferred and threadpool: a callback that answers later has no need of a thread")
        if (deferred or is_threaded) and callable(function):
            if name is None and not hasattr(function, "__name__"):
                raise TypeError(f"{function!r} has no name of its own: give one")
            name = name or function.__name__
            function = _deferred(function) if deferred else threaded(function, threadpool)
        self._methods.add(function, name)

    def register_object(self, obj: object, prefix: str = "") -> None:
        """Register the public methods of ``obj``'s own class, each as ``prefix`` + its name.

        They are listed once, now: no inherited ones, none that begin with an underscore, no attributes or properties.
        """
        self._methods.add_object(obj, prefix)

    def reg_cb(self, **callbacks: Handler) -> None:
        """Register callbacks in the style of AnyEvent::MPRPC: ``callback(reply, *params)`` under each keyword's name.

        ``reply`` is a :class:`Reply`, to be answered now or later, from anywhere; None for a notification. What the
        callback returns doesn't matter; what it raises is the error, unless the reply has been answered.
        """
        for name, callback in callbacks.items():
            self.register(callback, name, deferred=True)

    def unregister(self, name: str) -> None:
        """Forget the method ``name``, at once on live connections too; raises KeyError if there is none."""
        self._methods.remove(name)

    @property
    def methods(self) -> Mapping[str, Handler]:
        """The registered functions by name; a live view that can't be written to."""
        return MappingProxyType(self._methods)


class Service(Registry):
    """Methods that can be called over a connection.

    Give it to a :class:`~gmprpc.Server`, to a :class:`~gmprpc.Client` whose server calls back, or, since it can be
    called with a socket, to a plain :class:`gevent.server.StreamServer`.
    """

    def __init__(self) -> None:
        super().__init__(Methods())
        self._own_table = self.table(introspection=True)
        self._counters = Counters()

    def table(
        self,
        *wrappers: Wrapper,
        introspection: bool = False,
        is_serving: Callable[[], bool] = lambda: True,
        on_health: Callable[[Connection], None] | None = None,
        on_draining: Callable[[Connection], None] | None = None,
    ) -> MethodTable:
        """A live table of the methods for connections; each wrapper gives what is called in place of each method.

        It has the built-in methods, too. With ``introspection`` they tell about the others; ``is_serving()`` is what
        ``$/health`` tells, and ``on_health(connection)`` is called before. ``on_draining(connection)`` is called when
        the peer says that it is about to end that connection.
        """
        builtins = builtins_of(
            self._methods,
            is_serving=is_serving,
            introspection=introspection,
            on_health=on_health,
            on_draining=on_draining,
        )
        return self._methods.table(*wrappers, builtins=builtins)

    def __call__(self, socket: Any, address: Any) -> None:
        """Serve ``socket`` until its peer is done and everything is answered; blocks this greenlet, takes the socket.

        Raises:
            TypeError: this is called as a WSGI application, or with a TLS socket.
        """
        refuse_http(address)
        peer = peer_of(socket, address)
        connection = Connection(
            PlainStream(socket), self._own_table, ConnectionOptions(), counters=self._counters, peer=peer
        )
        connection.run()


def refuse_http(address: Any) -> None:
    """Raise a TypeError that says what to do instead if this is ``start_response``: somebody expects WSGI."""
    if callable(address):
        raise TypeError(
            "a gmprpc service speaks MessagePack-RPC, not HTTP: run it with `gmprpc serve`, or with gunicorn's "
            "`-k gmprpc.gunicorn.Worker`"
        )


def _deferred(callback: Handler) -> Handler:
    """The plain function that does what ``callback(reply, *params)`` does."""

    @wraps(callback)
    def call_back(*params: Any) -> Any:
        reply = current_reply()
        try:
            callback(reply, *params)
        except BaseException as exc:
            if reply is None or not reply.answered():
                raise
            request = current_request()
            request.requests.pass_on(exc)
            if not request.ends_as_told(exc):
                call = current_call()
                about = fields_of(call.method, call.msgid, call.peer)
                log(logger, logging.ERROR, "%s raised after it had answered", about["method"], exc_info=exc, **about)
        if reply is None:
            return None
        # Answered on the spot: then there is nothing to wait for.
        return reply.value if reply.successful() else reply

    try:
        signature = inspect.signature(callback)
    except (TypeError, ValueError):
        return call_back
    parameters = list(signature.parameters.values())
    if parameters and parameters[0].kind in (Parameter.POSITIONAL_ONLY, Parameter.POSITIONAL_OR_KEYWORD):
        # The caller's view: the reply is none of the params.
        call_back.__signature__ = signature.replace(parameters=parameters[1:])  # type: ignore[attr-defined]
    return call_back
