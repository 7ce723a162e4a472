"""Shows what every greenlet and thread of the process is doing at this moment."""

from __future__ import annotations

import faulthandler
import gc
import os
import signal
import sys
import threading
from collections import Counter
from collections.abc import Iterator
from datetime import UTC, datetime
from traceback import FrameSummary, StackSummary
from types import CodeType, FrameType
from typing import IO, Any

from gevent import Greenlet
from greenlet import getcurrent, greenlet

from .reply import get_thread_ident
from .requests import RequestGreenlet, fields_of

# Of so many that stand at the same place the names are told. Picked arbitrarily.
_MAX_NAMES = 20

# Where somebody is: the innermost call last.
Stack = tuple[tuple[CodeType, int], ...]


def dump(file: IO[str] | None = None) -> None:
    """Write the stacks of all greenlets and threads to ``file``, by default the process's standard error.

    Those that carry out a request come first, with its msgid, method and peer; who stands at the same place, as all
    idle connections do, is told together. May be called by any greenlet or thread, and by a handler of signals.
    """
    if file is None:
        _write(report())
    else:
        file.write(report())
        file.flush()


def dump_on_signal(signum: int = signal.SIGUSR1) -> None:
    """Have the stacks written to standard error on each ``signum``; the process goes on. Call it in the main thread.

    Also while a handler blocks the hub. While it does so in C nothing but the stacks of the threads can be shown, as
    :mod:`faulthandler` does; the rest follows when that is over.
    """
    signal.signal(signum, lambda _signum, _frame: dump())
    if sys.__stderr__ is not None:
        faulthandler.register(signum, file=sys.__stderr__, all_threads=True, chain=True)


def report() -> str:
    """The stacks of all greenlets and threads, as text."""
    places: dict[Stack, list[str]] = {}
    resting = 0
    for found in _greenlets():
        frame = found.gr_frame
        if frame is None:  # It runs, has ended, or has not begun.
            continue
        if isinstance(found, RequestGreenlet) and found.message is None:
            resting += 1
        else:
            places.setdefault(stack_of(frame), []).append(name_of(found))
    threads = _threads()
    now = datetime.now(UTC).strftime("%Y-%m-%dT%H:%M:%SZ")
    waiting = sum(map(len, places.values()))
    lines = [f"process {os.getpid()} at {now}: {len(threads)} threads, {waiting} greenlets that wait"]
    # Requests first, then who is most numerous last.
    for stack, names in sorted(places.items(), key=lambda place: (not _is_request(place[1][0]), len(place[1]))):
        lines += [*_heading(names), *formatted(stack)]
    if resting:
        lines.append(f"greenlets at rest until another request comes: {resting}")
    for name, stack in threads:
        lines += [name, *formatted(stack)]
    return "\n".join([*lines, ""])


def name_of(found: greenlet) -> str:
    """What to call a greenlet; of a request, which one it is at work on."""
    if isinstance(found, RequestGreenlet) and (message := found.message) is not None:
        about = fields_of(message[2], message[1], found.requests.owner.peer)
        what = "notification" if message[1] is None else f"request {message[1]}"
        return f"{what} of {about['method']} from {about['peer']}"
    if found.parent is None:
        return "the main greenlet of its thread"
    kind = type(found).__name__
    return f"{kind} {found.name}" if isinstance(found, Greenlet) else kind


def stack_of(frame: FrameType | None) -> Stack:
    """Where ``frame``, the innermost one, and those that have called it stand."""
    stack = []
    while frame is not None:
        stack.append((frame.f_code, frame.f_lineno or 0))
        frame = frame.f_back
    return tuple(reversed(stack))


def formatted(stack: Stack) -> Iterator[str]:
    """The lines that show ``stack`` as a traceback does."""
    summary = StackSummary.from_list(
        [FrameSummary(code.co_filename, line, code.co_name, lookup_line=False) for code, line in stack]
    )
    for entry in summary.format():
        yield from entry.rstrip("\n").split("\n")


def _greenlets() -> Iterator[greenlet]:
    for thing in gc.get_objects():
        if issubclass(type(thing), greenlet):  # Proxies may do anything when they are asked by `isinstance`.
            yield thing


def _threads() -> list[tuple[str, Stack]]:
    """The threads, each with the stack of the greenlet that runs in it."""
    # Not `threading.enumerate`, which takes a lock: perhaps the very one that this was called amid.
    names = {ident: thread.name for ident, thread in dict(getattr(threading, "_active", {})).items()}
    threads = []
    for ident, frame in sys._current_frames().items():
        name = f"thread {names.get(ident, ident)}"
        stack = stack_of(frame)
        if ident == get_thread_ident():
            name += f", in {name_of(getcurrent())}"
            # Without what makes this report.
            stack = tuple(place for place in stack if place[0].co_filename != __file__)
        threads.append((name, stack))
    return threads


def _is_request(name: str) -> bool:
    return name.startswith(("request ", "notification "))


def _heading(names: list[str]) -> list[str]:
    """The lines above a stack that say whose it is."""
    if len(names) == 1:
        return names
    counted = Counter(names if _is_request(names[0]) else [name.split(" ")[0] for name in names]).most_common()
    lines = [f"  {name}" if number == 1 else f"  {number} x {name}" for name, number in counted[:_MAX_NAMES]]
    if rest := sum(number for _, number in counted[_MAX_NAMES:]):
        lines.append(f"  and {rest} more")
    return [f"{len(names)} greenlets at the same place:", *lines]


def _write(text: str) -> None:
    """Write to standard error, around what Python buffers: a signal may have struck amid a write to that."""
    data: Any = memoryview(text.encode(errors="backslashreplace"))
    try:
        while data:
            data = data[os.write(2, data) :]
    except OSError:  # Nobody reads it, or not now.
        return
