"""The errors that gmprpc raises, as one tree; this module knows nothing of sockets or greenlets.

* :class:`RPCError`
    * :class:`ProtocolError`: the stream is not MessagePack-RPC, that connection is closed
        * :class:`MessageTooLarge`
    * :class:`ConnectionClosed` (a :exc:`ConnectionError`)
        * :class:`ConnectFailed`
    * :class:`CallTimeout` (a :exc:`TimeoutError`)
    * :class:`RemoteError`
        * :class:`MethodNotFound`
    * :class:`AlreadyAnswered`
* :class:`ErrorResponse`: raised *by* a handler, to answer with an error of its own choice
* :class:`CallCancelled` (a :exc:`greenlet.GreenletExit`): the call that runs here was cancelled
"""

from __future__ import annotations

from typing import Any

from greenlet import GreenletExit

__all__ = [
    "AlreadyAnswered",
    "CallCancelled",
    "CallTimeout",
    "ConnectFailed",
    "ConnectionClosed",
    "ErrorResponse",
    "MessageTooLarge",
    "MethodNotFound",
    "ProtocolError",
    "RPCError",
    "RemoteError",
]


class _Portable(Exception):
    """Can be copied and pickled, whatever its constructor takes."""

    def __reduce__(self) -> tuple[Any, ...]:
        return _remade, (type(self), self.args, vars(self))


class RPCError(_Portable):
    """The root of every error that gmprpc raises to a caller."""


class ProtocolError(RPCError):
    """The peer sent something that is not MessagePack-RPC.

    A stream has no marks to find its way back by, so the connection on which it happened is closed.
    """


class MessageTooLarge(ProtocolError):
    """A message is larger than ``max_message_size``."""

    def __init__(self, size: int, max_message_size: int) -> None:
        super().__init__(f"message of at least {size} bytes exceeds max_message_size ({max_message_size} bytes)")
        #: How many bytes the message has at least: what was announced or has arrived when it was refused.
        self.size = size
        #: The limit in force.
        self.max_message_size = max_message_size


class ConnectionClosed(RPCError, ConnectionError):
    """The connection ended before the answer came; ``__cause__`` says why, where there was a reason."""

    # The rest of the request, where it had not left: it may go another way.
    _body: bytes | None = None

    def __init__(self, message: str = "connection closed", *, sent: bool = False) -> None:
        super().__init__(message)
        #: False when no byte of the request can have reached the peer, so that it is safe to call again.
        self.sent = sent


class ConnectFailed(ConnectionClosed):
    """No connection could be made; the request has not left, unless ``sent``: on an earlier connection, that is."""


class CallTimeout(RPCError, TimeoutError):
    """No answer came in time; a late one is dropped and counted.

    ``__cause__`` is the last :exc:`ConnectFailed`, where there was no connection to send the request on.
    """

    def __init__(
        self,
        method: str,
        timeout: float,
        *,
        which: str = "call",
        sent: bool = True,
        cause: BaseException | None = None,
    ) -> None:
        what = f"no answer to {method!r}" if sent else f"{method!r} could not be sent"
        why = "" if cause is None else f": {cause}"
        super().__init__(f"{what} within {timeout:g} s (the {which}'s timeout){why}")
        self.__cause__ = cause
        #: The method that was called.
        self.method = method
        #: Seconds that the caller was ready to wait.
        self.timeout = timeout
        #: Whose timeout that was: ``"call"``, given with the call, or ``"client"`` or ``"balancer"``, their default.
        self.which = which
        #: False when no byte of the request can have reached the peer, so that it is safe to call again.
        self.sent = sent


class RemoteError(RPCError):
    """The peer answered the call with an error."""

    def __init__(self, error: Any, method: str) -> None:
        super().__init__(error if isinstance(error, str) else repr(error))
        #: The error object as the peer sent it: any MessagePack value but nil.
        self.error = error
        #: The method that was called.
        self.method = method


class MethodNotFound(RemoteError):
    """The peer has no such method: its error is exactly the text of :func:`no_such_method`."""


class AlreadyAnswered(RPCError):
    """A :class:`~gmprpc.Reply` was set a second time; the first answer stands."""


class ErrorResponse(_Portable):
    """Raise it in a handler to answer with exactly ``error``, which may be any MessagePack value but nil."""

    def __init__(self, error: Any) -> None:
        if error is None:
            raise ValueError("nil is MessagePack-RPC's word for success: an error has to be something else")
        super().__init__(error)
        #: The error object of the answer.
        self.error = error


class CallCancelled(GreenletExit):
    """The caller no longer wants the answer.

    Like every :exc:`greenlet.GreenletExit` it is not an :exc:`Exception`: ``except Exception`` doesn't swallow it.
    """


def _remade(kind: type[Exception], args: tuple[Any, ...], facts: dict[str, Any]) -> Exception:
    exc = kind.__new__(kind, *args)
    exc.args = args
    vars(exc).update(facts)
    return exc


def text_of(exc: BaseException) -> str:
    """What a peer is told of ``exc``: the name of its type and its message, never a traceback."""
    try:
        message = str(exc)
    except Exception:
        message = ""
    return f"{type(exc).__name__}: {message}" if message else type(exc).__name__


def no_such_method(method: str) -> str:
    """The error text for an unknown method, word for word that of AnyEvent::MPRPC::Server."""
    return f'No such method "{method}" found'


def remote_error(error: Any, method: str) -> RemoteError:
    """The exception for an error answer to a call of ``method``."""
    text = no_such_method(method)
    if error == text or error == text.encode(errors="surrogatepass"):  # Bytes where strings are taken raw.
        return MethodNotFound(error, method)
    return RemoteError(error, method)
