"""Limits and settings are checked once, where they are given."""

from __future__ import annotations

import dataclasses
import math
from typing import Any

import pytest

from gmprpc.options import (
    CLIENT_MAX_MESSAGE_SIZE,
    MAX_CONCURRENCY,
    MAX_UNSENT_SIZE,
    SERVER_MAX_MESSAGE_SIZE,
    ConnectionOptions,
    check_timeout,
)


def test_the_defaults_are_those_of_a_server() -> None:
    options = ConnectionOptions()
    assert options.max_message_size == SERVER_MAX_MESSAGE_SIZE == 1024 * 1024
    assert options.max_concurrency == MAX_CONCURRENCY == 256
    assert options.max_unsent_size == MAX_UNSENT_SIZE == 256 * 1024
    assert options.reuse_greenlets is True
    assert options.hide_errors is False
    assert options.packer_options == options.unpacker_options == {}
    assert CLIENT_MAX_MESSAGE_SIZE == 16 * 1024 * 1024


def test_options_can_not_be_changed() -> None:
    options = ConnectionOptions()
    with pytest.raises(dataclasses.FrozenInstanceError):
        options.max_message_size = 5  # type: ignore[misc]


@pytest.mark.parametrize("name", ["max_message_size", "max_concurrency", "max_unsent_size"])
@pytest.mark.parametrize("value", [0, -1, 1.0, "5", math.inf])
def test_a_limit_is_a_whole_number_from_1_on(name: str, value: Any) -> None:
    options: dict[str, Any] = {name: value}
    with pytest.raises(ValueError, match=f"{name} has to be a whole number from 1 on, not "):
        ConnectionOptions(**options)
    options[name] = 1
    assert getattr(ConnectionOptions(**options), name) == 1


def test_only_the_size_of_a_message_has_to_have_a_limit() -> None:
    options = ConnectionOptions(max_concurrency=None, max_unsent_size=None)
    assert options.max_concurrency is options.max_unsent_size is None
    with pytest.raises(ValueError):
        ConnectionOptions(max_message_size=None)  # type: ignore[arg-type]


def test_a_message_may_have_4_gib_and_no_more() -> None:
    assert ConnectionOptions(max_message_size=2**32 - 1).max_message_size == 2**32 - 1
    with pytest.raises(ValueError, match="of 4294967295 at most"):
        ConnectionOptions(max_message_size=2**32)


@pytest.mark.parametrize("name", ["max_message_size", "max_concurrency", "max_unsent_size"])
def test_a_limit_is_not_true(name: str) -> None:
    options: dict[str, Any] = {name: True}
    with pytest.raises(ValueError):
        ConnectionOptions(**options)


def test_what_the_framing_depends_on_can_not_be_set() -> None:
    with pytest.raises(ValueError, match="packer_options can't set autoreset: gmprpc frames the stream itself"):
        ConnectionOptions(packer_options={"autoreset": False, "default": str})
    for name in ("max_buffer_size", "max_str_len", "read_size", "list_hook", "file_like"):
        with pytest.raises(ValueError, match=f"unpacker_options can't set {name}: "):
            ConnectionOptions(unpacker_options={name: 5, "raw": True})
    with pytest.raises(ValueError, match="can't set max_map_len, read_size: "):
        ConnectionOptions(unpacker_options={"read_size": 5, "max_map_len": 5})


def test_everything_else_of_msgpacks_may_be_set() -> None:
    packer = {"default": str, "use_bin_type": False, "use_single_float": True, "unicode_errors": "replace"}
    unpacker = {"raw": True, "use_list": False, "object_hook": dict, "ext_hook": print, "strict_map_key": True}
    options = ConnectionOptions(packer_options=packer, unpacker_options=unpacker)
    assert options.packer_options == packer
    assert options.unpacker_options == unpacker


@pytest.mark.parametrize(
    "options",
    [
        {"packer_options": {"defualt": str}},
        {"packer_options": {"default": 5}},
        {"unpacker_options": {"ext_hok": print}},
        {"unpacker_options": {"ext_hook": 5}},
        {"unpacker_options": {"timestamp": 9}},
        {"unpacker_options": {"object_hook": dict, "object_pairs_hook": dict}},
    ],
    ids=str,
)
def test_what_msgpack_does_not_take_is_an_error_at_once(options: dict[str, Any]) -> None:
    with pytest.raises((TypeError, ValueError)):
        ConnectionOptions(**options)


@pytest.mark.parametrize("seconds", [None, 0, 0.0, 5, 0.25, math.inf])
def test_a_timeout_is_none_or_a_time_that_can_pass(seconds: float | None) -> None:
    check_timeout("timeout", seconds)


@pytest.mark.parametrize("seconds", [-1, -0.001, math.nan, -math.inf])
def test_a_timeout_that_can_not_pass_is_an_error(seconds: float) -> None:
    with pytest.raises(ValueError, match="stop_timeout has to be None or a number of seconds from 0 on, not "):
        check_timeout("stop_timeout", seconds)


@pytest.mark.parametrize("name", ["read_timeout", "write_timeout", "idle_timeout"])
def test_each_timeout_of_a_connection_is_checked(name: str) -> None:
    for seconds in (None, 0, 5.0):
        options: dict[str, Any] = {name: seconds}
        assert getattr(ConnectionOptions(**options), name) == seconds
    for wrong in (-1, "5", math.nan):
        options = {name: wrong}
        with pytest.raises(ValueError, match=f"{name} has to be None or a number of seconds from 0 on, not "):
            ConnectionOptions(**options)
