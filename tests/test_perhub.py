"""One thing for each hub: told when its thread or its process ends, and only then."""

from __future__ import annotations

import sys
import weakref
from collections.abc import Callable, Iterator
from typing import Any

import gevent
import pytest
from gevent import monkey

from gmprpc.perhub import PerHub
from gmprpc.reply import get_thread_ident

from .helpers import collected, wait_until
from .programs import FORKING_PYTHON, Program

start_new_thread: Callable[..., int] = monkey.get_original("_thread", "start_new_thread")


class Resident:
    """Knows its hub, as what belongs to one does, and writes down what happens to it."""

    def __init__(self) -> None:
        self.hub = gevent.get_hub()
        self.left_in: list[int] = []

    def leave(self) -> None:
        self.left_in.append(get_thread_ident())

    def abandon(self) -> None:
        raise AssertionError("this process was not forked off")


def in_thread(function: Callable[[], Any]) -> Any:
    """What ``function()`` returns in a native thread of its own, once that has ended; this hub goes on meanwhile."""
    results = []

    def run() -> None:
        threads_end.value = End()
        results.append(function())

    class End:
        def __del__(self) -> None:
            ended.append(True)

    threads_end = monkey.get_original("_thread", "_local")()
    ended: list[bool] = []
    start_new_thread(run, ())
    wait_until(lambda: ended)
    return results[0]


@pytest.fixture
def per_hub() -> Iterator[PerHub[Resident]]:
    per_hub = PerHub(Resident)
    yield per_hub
    per_hub.clear()


def test_each_hub_has_its_own(per_hub: PerHub[Resident]) -> None:
    assert per_hub.peek() is None
    here = per_hub.get()
    assert here.hub is gevent.get_hub()
    assert per_hub.get() is per_hub.peek() is here
    assert gevent.spawn(per_hub.get).get() is here

    def twice() -> tuple[Resident, Resident, list[Resident]]:
        return per_hub.get(), per_hub.get(), per_hub.all()

    first, second, all_then = in_thread(twice)
    assert first is second is not here
    assert all_then == [here, first]


def test_it_is_told_in_its_thread_when_that_ends(per_hub: PerHub[Resident]) -> None:
    here = per_hub.get()
    there, ident = in_thread(lambda: (per_hub.get(), get_thread_ident()))
    wait_until(lambda: there.left_in)
    assert there.left_in == [ident]
    assert per_hub.all() == [here]
    assert here.left_in == []


@pytest.mark.parametrize("destroyed", [False, True])
def test_no_dead_hub_is_kept(per_hub: PerHub[Resident], destroyed: bool) -> None:
    def use() -> weakref.ref[Any]:
        hub = per_hub.get().hub  # Not one that has run: gevent itself keeps those.
        if destroyed:
            hub.destroy()
        return weakref.ref(hub)

    hub = in_thread(use)
    wait_until(lambda: per_hub.all() == [])
    collected()
    assert hub() is None


def test_a_worker_of_gevents_thread_pool_is_a_thread_like_others(per_hub: PerHub[Resident]) -> None:
    pool = gevent.get_hub().threadpool_class(1)
    there = pool.apply(per_hub.get)
    assert pool.apply(per_hub.get) is there
    assert there.left_in == []
    pool.kill()  # Its workers destroy their hubs when they end.
    wait_until(lambda: there.left_in)
    assert per_hub.all() == []


def test_a_thread_whose_hub_was_destroyed_may_have_another(per_hub: PerHub[Resident]) -> None:
    def use() -> tuple[Resident, list[int], Resident, list[Resident], int]:
        first = per_hub.get()
        gevent.get_hub().destroy()
        before = list(first.left_in)
        second = per_hub.get()
        return first, before, second, per_hub.all(), get_thread_ident()

    first, before, second, all_then, ident = in_thread(use)
    assert before == []
    assert first is not second
    assert all_then == [second]
    wait_until(lambda: second.left_in)
    assert first.left_in == second.left_in == [ident]


def test_threads_one_after_the_other_are_told_once_each(per_hub: PerHub[Resident]) -> None:
    used = [in_thread(lambda: (per_hub.get(), get_thread_ident())) for _ in range(30)]
    wait_until(lambda: per_hub.all() == [])
    assert len({ident for _, ident in used}) < 30  # The system gives their numbers again.
    assert [resident.left_in for resident, _ in used] == [[ident] for _, ident in used]


def test_who_is_not_used_any_more_is_not_told(per_hub: PerHub[Resident]) -> None:
    def use() -> tuple[Resident, Resident, Resident]:
        another, cleared = PerHub(Resident), PerHub(Resident)
        dropped, forgotten = another.get(), cleared.get()
        cleared.clear()
        del another
        return dropped, forgotten, per_hub.get()

    dropped, forgotten, told = in_thread(use)
    wait_until(lambda: told.left_in)
    assert dropped.left_in == forgotten.left_in == []


def test_many_that_are_used_and_dropped_leave_nothing(per_hub: PerHub[Resident]) -> None:
    residents = []
    for _ in range(100):
        another = PerHub(Resident)
        residents.append(weakref.ref(another.get()))
    del another
    collected()
    assert {resident() for resident in residents} == {None}


@pytest.mark.parametrize("failures", [1, 2])
def test_one_that_fails_keeps_none_from_being_told(
    per_hub: PerHub[Resident], monkeypatch: pytest.MonkeyPatch, failures: int
) -> None:
    class Failing(Resident):
        def leave(self) -> None:
            raise ValueError("no")

    shown: list[Any] = []
    monkeypatch.setattr(sys, "unraisablehook", lambda args: shown.append(args.exc_value))
    failing = [PerHub(Failing) for _ in range(failures)]

    def use() -> Resident:
        for user in failing:
            user.get()
        return per_hub.get()

    there = in_thread(use)
    wait_until(lambda: shown)
    assert len(there.left_in) == 1
    (error,) = shown
    assert [str(exc) for exc in getattr(error, "exceptions", [error])] == ["no"] * failures


def test_one_that_cannot_be_made_is_not_there(per_hub: PerHub[Resident]) -> None:
    def fail() -> Resident:
        raise ValueError("no")

    failing = PerHub(fail)

    def use() -> tuple[Resident, pytest.ExceptionInfo[ValueError]]:
        with pytest.raises(ValueError) as raised:
            failing.get()
        return per_hub.get(), raised

    there, raised = in_thread(use)
    wait_until(lambda: there.left_in)  # Though the traceback is still there.
    assert str(raised.value) == "no"
    assert failing.all() == []


# Two native threads have used it when the process forks; the child uses it, too, and so does a thread of the child's.
FORKING = """
import os, sys
import gevent
from gevent import monkey
if "patched" in sys.argv:
    monkey.patch_all()
from gmprpc.perhub import PerHub

start_new_thread = monkey.get_original("_thread", "start_new_thread")
allocate_lock = monkey.get_original("_thread", "allocate_lock")
os.fork  # The one that is gevent's, where it has been patched.

class Resident:
    names = []
    def __init__(self):
        self.pid = os.getpid()
    def leave(self):
        print("left", os.getpid() == self.pid, os.getpid() == parent, flush=True)
        left.release()
    def abandon(self):
        print("abandoned", os.getpid() != self.pid, flush=True)

class Failing(Resident):
    def abandon(self):
        super().abandon()
        raise ValueError("fails")

parent = os.getpid()
per_hub, failing = PerHub(Resident), PerHub(Failing)
used, go, left = allocate_lock(), allocate_lock(), allocate_lock()
for lock in used, go, left:
    lock.acquire()

def use():
    per_hub.get()
    used.release()
    go.acquire()

here = per_hub.get()
failing.get()
start_new_thread(use, ())
used.acquire()
if os.fork() == 0:
    print("forgotten", per_hub.all() == failing.all() == [], flush=True)
    go = allocate_lock()
    there = per_hub.get()
    print("new", there is not here, per_hub.all() == [there], flush=True)
    start_new_thread(use, ())
    left.acquire()
    print("rest", per_hub.all() == [there], flush=True)
    os._exit(0)
os.wait()
print("parent", per_hub.get() is here, len(per_hub.all()), flush=True)
go.release()
left.acquire()
print("end", per_hub.all() == [here], flush=True)
"""


@pytest.mark.parametrize("way", ["plain", "patched"])
def test_in_a_child_all_are_abandoned_and_forgotten(way: str) -> None:
    with Program(*FORKING_PYTHON, "-c", FORKING, way) as program:
        lines = program.lines()
        assert program.wait() == 0, lines
    assert lines.count("ValueError: fails") == 1  # It is shown, and keeps none from being abandoned.
    assert [line for line in lines if line.endswith(("True", "False", "2"))] == [
        *["abandoned True"] * 3,
        "forgotten True",
        "new True True",
        "left True False",
        "rest True",
        "parent True 2",
        "left True True",
        "end True",
    ]


# The thread is still there at exit, where the interpreter drops what is the threads' in the main one.
ENDING = """
import sys, threading
import gevent
from gevent import monkey
if "patched" in sys.argv:
    monkey.patch_all()
from gmprpc.perhub import PerHub

class Resident:
    def __init__(self):
        self.me = self
        self.hub = gevent.get_hub()
    def leave(self):
        print("left")

per_hub = PerHub(Resident)
other = PerHub(Resident)
used, go = (monkey.get_original("_thread", "allocate_lock")() for _ in range(2))
used.acquire(), go.acquire()
def use():
    per_hub.get(), used.release(), go.acquire()
monkey.get_original("_thread", "start_new_thread")(use, ())
used.acquire()
per_hub.get(), other.get()
if "patched" in sys.argv:  # Threads are greenlets of one hub.
    found = []
    threads = [threading.Thread(target=lambda: found.append(per_hub.get())) for _ in range(3)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    print(found == [per_hub.get()] * 3)
"""


@pytest.mark.parametrize("way, said", [("plain", []), ("patched", ["True"])])
def test_at_exit_nothing_is_done(way: str, said: list[str]) -> None:
    with Program(sys.executable, "-c", ENDING, way) as program:
        assert program.lines() == said
        assert program.wait() == 0
