"""The tree of errors: what can be caught by what, what each says, and what it carries."""

from __future__ import annotations

import copy
import inspect
import pickle
from typing import Any

import pytest
from greenlet import GreenletExit

import gmprpc
from gmprpc import exceptions
from gmprpc.exceptions import (
    AlreadyAnswered,
    CallCancelled,
    CallTimeout,
    ConnectFailed,
    ConnectionClosed,
    ErrorResponse,
    MessageTooLarge,
    MethodNotFound,
    ProtocolError,
    RemoteError,
    RPCError,
    no_such_method,
    remote_error,
    text_of,
)

#: One of each.
ERRORS = [
    RPCError("text"),
    ProtocolError("text"),
    MessageTooLarge(30, 20),
    ConnectionClosed(),
    ConnectionClosed("text", sent=True),
    ConnectFailed("text"),
    CallTimeout("m", 1.5),
    RemoteError("text", "m"),
    RemoteError({"code": 5}, "m"),
    MethodNotFound(no_such_method("m"), "m"),
    AlreadyAnswered("text"),
    ErrorResponse("text"),
    ErrorResponse({"code": 5}),
    CallCancelled("text"),
]


def tree_of(cls: type, depth: int = 0) -> list[str]:
    """The names of the classes of this module below ``cls``, indented."""
    tree = ["    " * depth + cls.__name__]
    for inner in cls.__subclasses__():
        if inner.__module__ == exceptions.__name__:
            tree += tree_of(inner, depth + 1)
    return tree


def test_the_tree_is_the_one_that_is_drawn() -> None:
    assert tree_of(RPCError) == [
        "RPCError",
        "    ProtocolError",
        "        MessageTooLarge",
        "    ConnectionClosed",
        "        ConnectFailed",
        "    CallTimeout",
        "    RemoteError",
        "        MethodNotFound",
        "    AlreadyAnswered",
    ]
    drawn = [
        line.partition("`")[2].partition("`")[0] for line in inspect.getdoc(exceptions).splitlines() if "* :" in line
    ]
    assert [name.strip() for name in tree_of(RPCError)] == drawn[:9]
    assert sorted(drawn) == sorted(exceptions.__all__)


def test_every_error_is_public() -> None:
    for name in exceptions.__all__:
        assert getattr(gmprpc, name) is getattr(exceptions, name)
        assert name in gmprpc.__all__


def test_errors_are_also_what_python_calls_them() -> None:
    assert issubclass(ConnectionClosed, ConnectionError)
    assert issubclass(CallTimeout, TimeoutError)
    assert issubclass(CallCancelled, GreenletExit)
    assert not issubclass(CallCancelled, Exception)
    assert not issubclass(ErrorResponse, RPCError)


def test_errors_say_what_happened_and_carry_the_facts() -> None:
    too_large = MessageTooLarge(30, 20)
    assert str(too_large) == "message of at least 30 bytes exceeds max_message_size (20 bytes)"
    assert (too_large.size, too_large.max_message_size) == (30, 20)

    late = CallTimeout("m", 1.5)
    assert str(late) == "no answer to 'm' within 1.5 s (the call's timeout)"
    assert (late.method, late.timeout) == ("m", 1.5)
    assert str(CallTimeout("m", 10)) == "no answer to 'm' within 10 s (the call's timeout)"
    # As an OSError it could have taken the two for an errno and its text.
    assert (late.errno, late.strerror) == (None, None)

    assert str(ConnectionClosed()) == "connection closed"
    assert ConnectionClosed().sent is False
    assert ConnectionClosed("x", sent=True).sent is True
    assert ConnectFailed("x").sent is False


@pytest.mark.parametrize(
    "error, text", [("no", "no"), ("", ""), (0, "0"), (False, "False"), ({"a": 1}, "{'a': 1}"), (b"no", "b'no'")]
)
def test_a_remote_error_has_the_object_as_it_was_sent(error: Any, text: str) -> None:
    exc = remote_error(error, "m")
    assert type(exc) is RemoteError
    assert exc.error is error
    assert exc.method == "m"
    assert str(exc) == text


def test_only_the_exact_text_for_that_method_is_method_not_found() -> None:
    assert no_such_method("m") == 'No such method "m" found'
    assert type(remote_error('No such method "m" found', "m")) is MethodNotFound
    assert type(remote_error(b'No such method "m" found', "m")) is MethodNotFound  # With unpacker_options raw.
    for error in ('No such method "other" found', 'No such method "m" found.', "m", ['No such method "m" found']):
        assert type(remote_error(error, "m")) is RemoteError


def test_an_error_response_carries_anything_but_nil() -> None:
    for error in ("no", 0, False, "", [], {"code": 5}):
        assert ErrorResponse(error).error is error
    with pytest.raises(ValueError, match="nil"):
        ErrorResponse(None)


def test_the_text_of_an_exception_is_its_type_and_its_message() -> None:
    assert text_of(ValueError("no")) == "ValueError: no"
    assert text_of(ValueError()) == "ValueError"
    assert text_of(KeyError("x")) == "KeyError: 'x'"
    assert text_of(SystemExit(3)) == "SystemExit: 3"
    assert text_of(OSError(2, "No such file", "x")) == "FileNotFoundError: [Errno 2] No such file: 'x'"

    class Unspeakable(Exception):
        def __str__(self) -> str:
            raise RuntimeError

    assert text_of(Unspeakable()) == "Unspeakable"


@pytest.mark.parametrize("exc", ERRORS, ids=lambda exc: type(exc).__name__)
def test_an_error_can_be_copied_and_sent_to_another_process(exc: BaseException) -> None:
    for again in (copy.copy(exc), pickle.loads(pickle.dumps(exc))):
        assert type(again) is type(exc)
        assert str(again) == str(exc)
        assert vars(again) == vars(exc)
