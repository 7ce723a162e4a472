"""A table of methods: the ways to register one, and what callers are told of it."""

from __future__ import annotations

from typing import Any

import pytest

import gmprpc

from .helpers import Peer


class Secretive:
    """A callback that doesn't tell what it takes."""

    __signature__ = "secret"
    __name__ = "secretive"

    def __call__(self, reply: gmprpc.Reply, *params: Any) -> None:
        reply.result(len(params))


def test_a_callback_may_keep_what_it_takes_to_itself(service: gmprpc.Service, peer: Peer) -> None:
    service.register(Secretive(), deferred=True)
    assert peer.call("secretive", 1, 2) == [1, 0, None, 2]


def test_a_callback_may_take_whatever_comes(service: gmprpc.Service, peer: Peer) -> None:
    service.reg_cb(anything=lambda *params: params[0].result(params[1:]), nothing=lambda: None)
    assert peer.call("anything", 1, 2) == [1, 0, None, [1, 2]]
    assert peer.call("nothing")[2].startswith("TypeError: ")


def test_a_callback_has_no_reply_in_what_callers_are_told(service: gmprpc.Service, peer: Peer) -> None:
    service.reg_cb(add=lambda reply, a, b=2: reply.result(a + b))
    assert peer.call("add", 1) == [1, 0, None, 3]
    assert peer.call("add")[2] == "wrong params for add(a, b=...): missing a required argument: 'a'"


def test_a_function_that_is_registered_stays_what_it_is(service: gmprpc.Service) -> None:
    def function() -> str:
        return "itself"

    assert service.method(function) is function
    assert service.method(name="other")(function) is function
    assert service.methods["function"] is service.methods["other"] is function
    with pytest.raises(TypeError):
        service.methods["third"] = function  # type: ignore[index]
    service.unregister("other")
    with pytest.raises(KeyError):
        service.unregister("other")
