"""The requests of one connection that are at work: the greenlets they run in, and how each gets its answer.

It knows no socket: answers go into a list, and the connection is told when there is something to settle.
"""

from __future__ import annotations

import dis
import logging
import signal
import weakref
from collections.abc import Callable, Mapping, Sequence
from contextvars import ContextVar
from functools import partial
from itertools import count
from secrets import token_hex
from time import perf_counter
from typing import TYPE_CHECKING, Any, Final, Protocol

import gevent
from gevent import Greenlet, GreenletExit, getcurrent
from gevent.event import AsyncResult

from .calls import switch
from .exceptions import CallCancelled, ErrorResponse, text_of
from .log import log, show_failure, shown
from .methods import UnknownMethod, params_mismatch
from .metrics import Counters
from .options import ConnectionOptions
from .outcome import Outcome
from .protocol import RESPONSE, Encoder, Message
from .reply import Reply, ReplyExpired, failure_of, get_thread_ident
from .transport import format_address

# The logger of the connection: where a request is carried out is nothing that a reader of logs should have to know.
logger = logging.getLogger("gmprpc.connection")

DROPPED_REPLY: Final = "the reply was dropped unanswered"

_CANCELLED_BY_CALLER: Final = "the caller has cancelled it"
#: Nothing of what the exception says that came out of the handler: it may be that of a call which the handler had made.
CANCELLED: Final = text_of(CallCancelled(_CANCELLED_BY_CALLER))

# So much of answers doesn't wait for others to be sent together with them, of which those up to the second size aren't
# counted: there are no more of them than a batch has messages. Picked arbitrarily.
_LARGE_ANSWERS = 16 * 1024
_SMALL_ANSWER = 1024

_RAISE: Final = dis.opmap["RAISE_VARARGS"]

# A packer keeps the largest buffer that it ever needed; past this size it isn't kept itself. Picked arbitrarily.
_KEPT_SIZE = 256 * 1024

#: What a handler may return to have it answered later.
DEFERRED: Final = (AsyncResult, Greenlet)

#: In a thread that carries out a request for its greenlet: the connection that it came on, and its message.
call_in_thread: ContextVar[tuple[Owner, Message]] = ContextVar("call_in_thread")

if TYPE_CHECKING:
    _Greenlet = Greenlet[Any, Any]
else:
    _Greenlet = Greenlet  # It is generic in its stubs only.


class AnsweredAlready(BaseException):
    """Raised in place of what a handler has returned or raised (the cause, then) after it was answered for."""


class ReplyDropped(ErrorResponse):
    """What is answered for a Reply that was dropped unanswered."""

    def __init__(self) -> None:
        super().__init__(DROPPED_REPLY)


# Of what a handler hasn't chosen, although it looks so.
_OUTCOMES: Final = {ReplyExpired: Outcome.EXPIRED, ReplyDropped: Outcome.DROPPED}


class Ending(Protocol):
    """What is to be told how a call has ended; see :class:`gmprpc.observing.Observation`."""

    #: Set when the caller has given the call up.
    is_cancelled: bool

    def end(self, outcome: Outcome, error: BaseException | None = None) -> tuple[Outcome, float]:
        """The answer has been given, or can't be; returns what is told: the outcome and the duration."""


class Owner(Protocol):
    """What requests need of the connection that they came on."""

    peer: Any
    #: True while somebody will call `settle` anyway, so that nobody else has to ask for it.
    is_settling: bool

    @property
    def is_closed(self) -> bool:
        """True once answers can't be sent any more."""

    def flush(self) -> None:
        """Write the answers that have gathered."""

    def settle_soon(self) -> None:
        """Write them soon, and look whether a place that has become free changes anything."""


class Requests:
    """The requests, and notifications, of one connection."""

    __slots__ = (
        "_counters",
        "_deferred_keys",
        "_hide_errors",
        "_is_observed",
        "_reuse_greenlets",
        "deferred",
        "encoder",
        "gathered",
        "greenlets",
        "hub",
        "idle",
        "lead_end",
        "limit",
        "methods",
        "observations",
        "out",
        "owner",
        "todo",
    )

    def __init__(
        self,
        owner: Owner,
        methods: Mapping[str, Callable[..., Any]],
        options: ConnectionOptions,
        counters: Counters,
        out: list[bytes],
    ) -> None:
        self.owner = owner
        self.methods = methods
        #: Where answers gather; the connection's own messages do too.
        self.out = out
        self.encoder = encoder_of(options)
        self.hub = gevent.get_hub()
        #: Every greenlet there is, and those of them that wait for a request.
        self.greenlets: set[RequestGreenlet] = set()
        self.idle: list[RequestGreenlet] = []
        #: What is to be carried out next, the next one last; and until when a greenlet whose handler hasn't blocked may
        #: go on with that by itself. 0 is not at all: out of a batch only the hub says what comes next.
        self.todo: list[Message] = []
        self.lead_end = 0.0
        #: The size of the answers, but for the small ones, that have gathered since they were sent for it.
        self.gathered = 0
        #: What will complete later, Replies weakly, so that it can be noticed when nobody is left to answer; by the
        #: msgid and a number, since a msgid may come twice.
        self.deferred: dict[tuple[int | None, int], Any] = {}
        self._deferred_keys = count()
        #: Of these, by the same keys, what is to be told of the end.
        self.observations: dict[tuple[int | None, int], Ending] = {}
        self._is_observed = options.is_observed
        #: How many may be at work at once.
        self.limit = options.max_concurrency
        self._reuse_greenlets = options.reuse_greenlets
        self._hide_errors = options.hide_errors
        self._counters = counters

    def __len__(self) -> int:
        """How many are at work and not answered yet."""
        return len(self.greenlets) - len(self.idle) + len(self.deferred)

    def is_full(self) -> bool:
        """True when as many are at work as may be."""
        return self.limit is not None and len(self) >= self.limit

    def new_greenlet(self) -> RequestGreenlet:
        """A greenlet for a request; the hub switches into it when its ``message`` is set."""
        request = RequestGreenlet(self)
        request.is_retired = not self._reuse_greenlets
        self.greenlets.add(request)
        return request

    def new_pack(self) -> Callable[[list[Any]], bytes]:
        """What packs the answers of one greenlet, as :meth:`Encoder.new_pack` has it."""
        pack = self.encoder.new_pack()
        return _ending(pack) if self._is_observed else pack

    def dismiss_idle(self) -> None:
        """End the greenlets that wait for a request; in the hub."""
        while self.idle:
            request = self.idle.pop()
            request.is_retired = True
            request.switch()

    def cancel_replies(self) -> None:
        """Tell every Reply that is still to be set that nobody waits for it any more."""
        for reference in [*self.deferred.values(), *(request.reply for request in self.greenlets)]:
            _cancel_reply(reference)
        observations, self.observations = self.observations, {}
        for key, observation in observations.items():
            if key[0] is None:  # A notification: nobody waits for the end, but it's still to come.
                self.observations[key] = observation
            else:
                observation.end(Outcome.DROPPED)

    def cancel(self, msgid: Any) -> None:
        """Tell the requests with ``msgid`` that are at work now that their caller has given them up.

        Called by the handler of another one. :exc:`CallCancelled` is raised in their handlers, soon, by the hub; where
        one has returned a Reply that is told. Either still takes a place of ``max_concurrency`` until it has ended:
        otherwise a peer that cancels whatever it has called could have any number at work.
        """
        if type(msgid) is not int:  # To Python True and 1.0 are 1.
            return
        for request in self.greenlets:
            message = request.message
            if request.cancelled is not message:
                request.cancelled = None  # An earlier request: its params needn't be kept any longer.
            if message is not None and message[1] == msgid and not (request.cancelled or request.is_answered):
                request.cancelled = message
                self._counters.cancelled_requests += 1
                if request.observation is not None:
                    request.observation.is_cancelled = True
                self.hub.loop.run_callback(self._cancel_handler, request, message)
        for key, reference in self.deferred.items():
            if key[0] == msgid:
                if key in self.observations:
                    self.observations[key].is_cancelled = True
                self._counters.cancelled_requests += _cancel_reply(reference)

    def _cancel_handler(self, request: RequestGreenlet, message: Message) -> None:
        """Raise CallCancelled in the handler of ``message``, if it is still at work; in the hub."""
        # The greenlet may be at work on another message by now, or kept waiting by the log of what the handler raised.
        if request.message is message and not request.is_answered:
            _cancel_reply(request.reply)
            request.throw(CallCancelled(_CANCELLED_BY_CALLER))

    # Answers other than a handler's plain result.

    def answer_instead(self, request: RequestGreenlet, error: Any) -> None:
        """Answer ``error`` for the handler of ``request``, which is still at work; it has to end in AnsweredAlready."""
        assert request.message is not None
        self.count_expired()
        self.out.append(self.error_response(request.message[1], error))
        if request.observation is not None:
            observation, request.observation = request.observation, None
            observation.end(Outcome.EXPIRED, ErrorResponse(error))
        request.cancelled, request.is_answered = request.message, True
        _cancel_reply(request.reply)
        self.owner.settle_soon()

    def count_expired(self) -> None:
        """Count a request that was answered because of the time it took."""
        self._counters.expired_requests += 1

    def drop_late(self) -> None:
        """Count an answer that came too late to be one."""
        self._counters.dropped_answers += 1

    def fail(
        self,
        msgid: int | None,
        method: str,
        exc: BaseException,
        function: Callable[..., Any] | None = None,
        params: Sequence[Any] = (),
        observation: Ending | None = None,
    ) -> None:
        """Answer that ``function``, called with ``params``, raised ``exc``, then tell ``observation`` and log it.

        ``function`` is None where a wrong number of params can't be the reason. Not in the hub, where nobody may wait
        for a log.
        """
        is_answered = False
        if issubclass(type(exc), AnsweredAlready):
            if isinstance(exc.__cause__, CallCancelled):
                return  # As it was told to; there was no other answer.
            self.drop_late()
            if exc.__cause__ is None:
                return
            exc, is_answered = exc.__cause__, True
        try:
            error, outcome = self._verdict(method, exc, function, params)
        except BaseException as obstacle:
            # Of what can't be asked there is still a name to tell. It may also be a kill that has struck meanwhile.
            self.pass_on(obstacle)
            error, outcome = type(exc).__name__, Outcome.FAILED
        mark = ""
        if outcome is Outcome.FAILED:
            self._counters.handler_errors += 1
            if self._hide_errors:
                mark = f" ({token_hex(4)})"
                error = f"internal error{mark}"
        if msgid is not None and not is_answered:
            self.out.append(self.error_response(msgid, error))
            if not self.owner.is_settling:
                self.owner.settle_soon()  # Not only when this ends: the log may keep it waiting.
        told: Outcome = outcome
        about: dict[str, Any] = {}
        if observation is not None:
            told, about["duration"] = observation.end(outcome, exc)
        if outcome is not Outcome.FAILED and msgid is not None:
            return  # The caller has been told, and it's no business of this side.
        about |= fields_of(method, msgid, self.owner.peer) | {"outcome": str(told)}
        if outcome is Outcome.FAILED:
            what = "notification" if msgid is None else f"request {msgid}"
            message = "%s of %s from %s failed%s"
            log(logger, logging.ERROR, message, what, about["method"], about["peer"], mark, exc_info=exc, **about)
        else:
            message = "notification of %s from %s failed: %s"
            log(logger, logging.WARNING, message, about["method"], about["peer"], shown(str(error)), **about)

    def _verdict(
        self, method: str, exc: BaseException, function: Callable[..., Any] | None, params: Sequence[Any]
    ) -> tuple[Any, Outcome]:
        """The error to answer, and the outcome: FAILED is the handler's fault, not the caller's nor what it chose."""
        if isinstance(exc, UnknownMethod):
            self._counters.unknown_methods += 1
            return exc.error, Outcome.UNKNOWN_METHOD
        if isinstance(exc, ErrorResponse) and (error := _error_of(exc)) is not None:
            return error, _OUTCOMES.get(type(exc), Outcome.ERROR)
        if (
            isinstance(exc, TypeError)
            and function is not None
            and (mismatch := params_mismatch(method, function, params, exc)) is not None
        ):
            self._counters.invalid_messages += 1
            return mismatch, Outcome.INVALID_PARAMS
        return text_of(exc), Outcome.FAILED

    def pass_on(self, exc: BaseException) -> None:
        """Pass ``exc`` on to the main greenlet if it is a Ctrl-C, which just happened to strike here."""
        if issubclass(type(exc), KeyboardInterrupt) and _has_struck(exc):
            self.hub.loop.run_callback(self.hub.handle_system_error, type(exc), exc)

    def defer(self, msgid: int | None, method: str, result: Any) -> None:
        """Answer when ``result`` completes, a Reply, an AsyncResult or a Greenlet; called where it was returned."""
        self.lead_end = 0.0  # What is at work counts for `max_concurrency`: the hub has to look.
        key = msgid, next(self._deferred_keys)
        completed = partial(self._answer_deferred, key, method)
        if isinstance(result, Reply):
            self.deferred[key] = weakref.ref(result)
            result._on_drop = _both(result._on_drop, partial(completed, None))
        else:
            self.deferred[key] = result
        request = current_request()
        if request.observation is not None:
            self.observations[key], request.observation = request.observation, None
        if request.cancelled is request.message:  # Before the hub came to tell the handler, or it went on nevertheless.
            _cancel_reply(self.deferred[key])
        request.reply = request.cancelled = None
        result.rawlink(completed)

    def _answer_deferred(self, key: tuple[int | None, int], method: str, result: Any) -> None:
        """Called when ``result`` has completed; it is None for a Reply that was dropped unanswered."""
        if get_thread_ident() != self.hub.thread_ident:
            self.hub.loop.run_callback_threadsafe(self._answer_deferred, key, method, result)
            return
        msgid, _ = key
        exc: BaseException | None = None
        if self.owner.is_closed:
            self._counters.dropped_answers += msgid is not None
        elif result is None:
            exc = ReplyDropped()
        elif (exc := failure_of(result)) is None and msgid is not None:
            try:
                self.out.append(self.encoder.response(msgid, None, result.value))
            except BaseException as packing:  # Whatever a hook of the packer raises: nothing may escape into the hub.
                exc = packing
        if exc is not None:
            # Not from here, the hub: it is asked for what it has to say, and perhaps logged.
            gevent.spawn(self._fail_deferred, key, method, exc)
            return
        if self.observations:
            self._end_deferred(key, result)
        del self.deferred[key]
        self.owner.settle_soon()

    def _end_deferred(self, key: tuple[int | None, int], result: Any) -> None:
        """Tell the observation that there is, perhaps, of what has completed with ``result``, and can't be answered."""
        if (observation := self.observations.pop(key, None)) is None:
            return
        if result is None:
            observation.end(Outcome.DROPPED, ReplyDropped())
        elif (exc := failure_of(result)) is None:
            observation.end(Outcome.OK)
        else:
            observation.end(Outcome.ERROR if isinstance(exc, ErrorResponse) else Outcome.FAILED, exc)

    def _fail_deferred(self, key: tuple[int | None, int], method: str, exc: BaseException) -> None:
        self.pass_on(exc)
        try:
            self.fail(key[0], method, exc, observation=self.observations.pop(key, None))
        except BaseException:  # The answer stands by now; the log has failed.
            show_failure(self)
        finally:
            del self.deferred[key]
            self.owner.settle_soon()

    def error_response(self, msgid: int, error: Any) -> bytes:
        """The answer ``error``, or what can be said of one that can't be packed."""
        try:
            return self.encoder.response(msgid, error, None)
        except BaseException as exc:
            # An object that can't be packed, whatever its hook raises, or a text that isn't valid Unicode.
            self.pass_on(exc)
            text = error if isinstance(error, str) else f"an error that can't be sent: {text_of(exc)}"
            return self.encoder.response(msgid, text.encode(errors="backslashreplace").decode(), None)


class RequestGreenlet(_Greenlet):
    """Runs the handlers of one connection's requests, one after the other; only the hub switches into it."""

    __slots__ = ("cancelled", "is_answered", "is_retired", "message", "observation", "reply", "requests")

    # Where it was made says nothing, and costs time to find out.
    spawning_stack_limit = 0

    def __init__(self, requests: Requests) -> None:
        super().__init__()
        self.requests = requests
        #: The message to carry out; None between two requests.
        self.message: Message | None = None
        #: Of a handler that takes one, as long as that is at work.
        self.reply: weakref.ref[Reply] | None = None
        #: The message of which the handler was, or is about to be, told to end. It is `message`, or an earlier one.
        self.cancelled: Message | None = None
        #: What is to be told how the call ends; only where calls are observed, and until it is told.
        self.observation: Ending | None = None
        #: True while the answer is given, an error, and the handler or the log of its failure still at work.
        self.is_answered = False
        #: Set when it is to end after its request.
        self.is_retired = False

    def _run(self) -> None:
        requests = self.requests
        methods, out, idle = requests.methods, requests.out, requests.idle
        owner, hub, todo = requests.owner, requests.hub, requests.todo
        pack = requests.new_pack()
        answer: bytes | None
        function: Callable[..., Any] | None = None
        while True:
            # Another round for a switch or a throw that was meant for an earlier request.
            while self.message is None:
                if self.is_retired:
                    requests.greenlets.discard(self)
                    return
                try:
                    switch(hub)
                except GreenletExit:
                    self.is_retired = True
                    if self in idle:
                        idle.remove(self)
                except BaseException:
                    continue
            _, msgid, method, params = self.message
            try:
                result = (function := methods[method])(*params)
            except BaseException as exc:
                self._fail(exc, function)
            else:
                try:
                    if msgid is not None:
                        answer = pack([RESPONSE, msgid, None, result])
                        out.append(answer)
                        if len(answer) > _SMALL_ANSWER:
                            requests.gathered += len(answer)
                            if requests.gathered > _LARGE_ANSWERS:
                                requests.gathered = 0
                                owner.flush()
                            if len(answer) > _KEPT_SIZE:
                                pack = requests.new_pack()
                    elif is_deferred(result):
                        requests.defer(None, method, result)
                except BaseException as exc:
                    # msgpack can't pack what completes later: so nobody has to ask of every result whether it does.
                    if is_deferred(result) and not isinstance(exc, GreenletExit):
                        requests.defer(msgid, method, result)
                    else:
                        self._fail(exc)
            # They may be large, and this greenlet may rest, or block, for long.
            params = result = answer = function = None
            if todo and perf_counter() < requests.lead_end and not self.is_retired:
                # The hub waits for this greenlet, since nothing has blocked: to go on with the next message saves two
                # switches, 0.6 of 2 µs. But it is a request of its own, in a context of its own.
                self.message = todo.pop()
                self.gr_context = None
                continue
            self.message = None
            if not self.is_retired:
                idle.append(self)
            if not owner.is_settling:
                owner.settle_soon()

    def _fail(self, exc: BaseException, function: Callable[..., Any] | None = None) -> None:
        """Answer that the handler of the message raised ``exc``; ``function`` as for :meth:`Requests.fail`."""
        assert self.message is not None
        _, msgid, method, params = self.message
        is_told = self.ends_as_told(exc)
        _cancel_reply(self.reply)  # Whoever else has it: this is the answer.
        self.reply = self.cancelled = None
        observation, self.observation = self.observation, None
        if is_told:
            self.requests.out.append(self.requests.error_response(msgid, CANCELLED))
            if observation is not None:
                observation.end(Outcome.CANCELLED, exc)
            return
        self.is_answered = True
        # Who is killed shall die, when it has answered.
        self.is_retired |= issubclass(type(exc), GreenletExit)
        self.requests.pass_on(exc)
        try:
            self.requests.fail(msgid, method, exc, function, params, observation)
        except BaseException as log_exc:  # The answer stands by now; the log has failed, or this was killed in it.
            self.is_retired |= isinstance(log_exc, GreenletExit)
            if not self.is_retired:
                show_failure(self.requests)
        self.is_answered = False

    def ends_as_told(self, exc: BaseException) -> bool:
        """Whether ``exc`` ends the handler because it was told to end, and is no fault of its own."""
        return self.cancelled is self.message and issubclass(type(exc), CallCancelled)

    def kill(self, exception: Any = GreenletExit, block: bool = True, timeout: float | None = None) -> None:
        """Raise ``exception`` in it, soon; see :meth:`gevent.Greenlet.kill`."""
        # By the time that it is struck its request may have ended: it must not be at work on another one.
        self.is_retired = True
        if self in self.requests.idle:
            self.requests.idle.remove(self)
            self.requests.greenlets.discard(self)
        super().kill(exception, block, timeout)


def _ending(pack: Callable[[list[Any]], bytes]) -> Callable[[list[Any]], bytes]:
    """``pack``, which tells the observation of the request whose result could be packed."""

    def pack_and_end(message: list[Any]) -> bytes:
        answer = pack(message)
        request = current_request()
        observation, request.observation = request.observation, None
        if observation is not None:
            observation.end(Outcome.OK)
        return answer

    return pack_and_end


def current_request() -> RequestGreenlet:
    """This greenlet, which carries out a request."""
    request = getcurrent()
    assert isinstance(request, RequestGreenlet)
    return request


def _cancel_reply(reference: Any) -> bool:
    """Tell the Reply, if that is what ``reference`` stands for, that nobody waits for it; whether it was news to it."""
    reply = reference() if isinstance(reference, weakref.ref) else None
    return reply is not None and reply._cancel()


def _both(first: Callable[[], Any] | None, second: Callable[[], Any]) -> Callable[[], Any]:
    """What calls both: one Reply may be returned by several handlers."""
    if first is None:
        return second

    def call() -> None:
        first()
        second()

    return call


def fields_of(method: str, msgid: int | None, peer: Any) -> dict[str, Any]:
    """What the records of the log have as fields that are about a call."""
    return {"method": shown(method), "msgid": msgid, "peer": format_address(peer)}


def is_deferred(result: Any) -> bool:
    """Whether a handler that returned ``result`` is to be answered later."""
    return issubclass(type(result), DEFERRED)  # Proxies may refuse to be asked by `isinstance`.


def _error_of(exc: ErrorResponse) -> Any:
    """What ``exc`` is to answer; None if a subclass has forgotten to say."""
    return getattr(exc, "error", None)


def _has_struck(exc: BaseException) -> bool:
    """Whether ``exc`` comes from Ctrl-C, which struck whatever ran just then, and wasn't raised by a statement.

    Python's own handler of SIGINT raises between two instructions. (`serve_forever` has a handler of its own.)
    """
    traceback = exc.__traceback__
    while traceback is not None and traceback.tb_next is not None:
        traceback = traceback.tb_next
    if traceback is None or signal.getsignal(signal.SIGINT) is not signal.default_int_handler:
        return False
    return traceback.tb_frame.f_code.co_code[traceback.tb_lasti] != _RAISE


def encoder_of(options: ConnectionOptions) -> Encoder:
    """What packs messages for a connection with ``options``."""
    return Encoder(_packer_options(options.packer_options))


def _packer_options(options: Mapping[str, Any]) -> Mapping[str, Any]:
    """``options`` with a ``default`` hook that never gets to see what completes later."""
    if (default := options.get("default")) is None:
        return options

    def default_of_others(obj: Any) -> Any:
        if is_deferred(obj):
            raise TypeError(f"can not serialize {type(obj).__name__!r} object")
        return default(obj)

    return {**options, "default": default_of_others}
