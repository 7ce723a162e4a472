"""The choice among endpoints, with dice that the test throws; nothing here waits or connects."""

from __future__ import annotations

from collections import Counter
from typing import Any

import pytest

from gmprpc.backoff import Backoff
from gmprpc.endpoints import MAX_TIMEOUTS, Endpoint, Endpoints


def make(address: Any) -> Endpoint:
    return Endpoint(address, None, Backoff(0.1, 5.0))


def usable(*pending: int, throws: list[float] | None = None) -> Endpoints:
    """Usable endpoints "0", "1" ... with so many calls pending; each look at the dice takes one of ``throws``."""
    left = iter(throws or [])
    endpoints = Endpoints(make, random=lambda: next(left))
    new, _ = endpoints.update(str(number) for number in range(len(pending)))
    for endpoint, number in zip(new, pending, strict=True):
        endpoint.pending = number
        endpoints.put_in(endpoint)
    return endpoints


def chosen(endpoints: Endpoints) -> Any:
    endpoint = endpoints.choose()
    return endpoint and endpoint.address


def test_of_none_none_is_chosen() -> None:
    assert usable().choose() is None


def test_the_only_one_is_chosen_without_dice() -> None:
    assert chosen(usable(7)) == "0"


@pytest.mark.parametrize(
    "throws, pair",
    [
        ([0.0, 0.0], (0, 1)),
        ([0.0, 0.99], (0, 3)),
        ([0.3, 0.0], (1, 0)),
        ([0.3, 0.4], (1, 2)),
        ([0.99, 0.99], (3, 2)),
        ([0.5, 0.34], (2, 1)),
    ],
)
def test_the_less_busy_of_two_different_ones_is_chosen(throws: list[float], pair: tuple[int, int]) -> None:
    first, second = pair
    for busy in (first, second):
        pending = [5 if number in pair else 0 for number in range(4)]  # Nobody else is taken, however idle.
        pending[busy] = 6
        other = second if busy == first else first
        assert chosen(usable(*pending, throws=list(throws))) == str(other)


def test_of_two_equals_the_first_thrown_is_chosen() -> None:
    assert chosen(usable(1, 1, 1, throws=[0.7, 0.0])) == "2"


def test_everybody_has_the_same_chance() -> None:
    endpoints = Endpoints(make)
    for endpoint in endpoints.update("abcde")[0]:
        endpoints.put_in(endpoint)
    counts = Counter(chosen(endpoints) for _ in range(5000))
    assert set(counts) == set("abcde")
    assert min(counts.values()) > 800


def test_one_that_is_taken_out_is_not_chosen_until_it_is_put_in() -> None:
    endpoints = usable(0, 0)
    one, other = endpoints.usable
    endpoints.take_out(one)
    endpoints.take_out(one)
    assert endpoints.choose() is other
    endpoints.take_out(other)
    assert endpoints.choose() is None
    endpoints.put_in(one)
    assert endpoints.choose() is one
    assert (one.returns, other.returns) == (2, 1)
    assert len(endpoints) == 2


def test_an_update_tells_who_came_and_who_went() -> None:
    endpoints = usable(0, 0, 0)
    zero, one, two = endpoints
    new, gone = endpoints.update(["2", "3", "0", "3"])
    assert [endpoint.address for endpoint in new] == ["3"]
    assert gone == [one]
    assert one.is_gone
    assert not one.is_usable
    assert {*endpoints} == {zero, two, *new}
    assert endpoints.usable == [zero, two]  # A new one isn't, yet.
    assert endpoints.update(["3", "2", "0"]) == ([], [])


def test_an_update_to_nothing_leaves_nothing() -> None:
    endpoints = usable(0, 0)
    both = [*endpoints]
    assert endpoints.update([]) == ([], both)
    assert endpoints.choose() is None
    assert len(endpoints) == 0


def test_an_update_that_fails_changes_nothing() -> None:
    def fail(address: Any) -> Endpoint:
        raise ValueError(address)

    endpoints = usable(0, 0)
    before = [*endpoints]
    endpoints._make = fail
    with pytest.raises(ValueError, match="2"):
        endpoints.update(["0", "2"])
    assert [*endpoints] == endpoints.usable == before
    assert not before[1].is_gone


def test_so_many_timeouts_in_a_row_are_fatal() -> None:
    endpoint = next(iter(usable(0)))
    said = []
    for _ in range(MAX_TIMEOUTS - 1):
        said.append(endpoint.timed_out(0))
    endpoint.answered()
    for _ in range(MAX_TIMEOUTS):
        said.append(endpoint.timed_out(0))
    assert said == [False, False, False, False, True]


def test_a_late_answer_is_an_answer() -> None:
    endpoint = next(iter(usable(0)))
    assert [endpoint.timed_out(late_answers) for late_answers in (0, 0, 1, 1, 2, 2, 2)] == [False] * 6 + [True]


def test_only_an_answer_makes_good() -> None:
    endpoints = usable(0)
    (endpoint,) = endpoints
    endpoints.take_out(endpoint)
    endpoint.backoff.next()
    endpoint.is_suspect = True
    endpoint.answered()  # To a call from before.
    assert (endpoint.backoff.failures, endpoint.is_suspect) == (1, True)
    endpoints.put_in(endpoint)
    assert (endpoint.backoff.failures, endpoint.is_suspect) == (1, True)
    endpoint.answered()
    assert (endpoint.backoff.failures, endpoint.is_suspect) == (0, False)
