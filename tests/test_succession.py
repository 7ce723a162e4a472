"""Who comes after whom among the workers of one master."""

from __future__ import annotations

import os

from gmprpc.succession import Succession


def test_heirs_are_younger_and_have_not_settled() -> None:
    succession = Succession()
    for age in (1, 2, 3, 4):
        succession.announce(age)
    succession.settle(2)
    assert succession.heirs(1, 10) == [3, 4]
    assert succession.heirs(3, 10) == [4]
    assert succession.heirs(4, 10) == []
    assert not succession.has_settled([3, 4])
    succession.settle(4)
    assert succession.has_settled([3, 4])
    assert succession.heirs(1, 10) == [3]


def test_one_that_never_settled_is_forgotten_when_enough_have_come_after_it() -> None:
    succession = Succession()
    for age in range(1, 10_000):
        succession.announce(age)
        if age != 9_990:
            succession.settle(age)
    assert succession.heirs(1, 10) == [9_990]
    assert succession.heirs(1, 9) == []


def test_a_number_that_comes_again_begins_anew() -> None:
    succession = Succession()
    succession.announce(1)
    succession.settle(1)
    succession.announce(1 + 4096)
    assert succession.heirs(1, 1) == [1 + 4096]


def test_what_one_process_tells_others_hear() -> None:
    succession = Succession()
    succession.announce(1)
    pid = os.fork()
    if pid == 0:
        succession.settle(1)
        os._exit(0)
    os.waitpid(pid, 0)
    assert succession.has_settled([1])
