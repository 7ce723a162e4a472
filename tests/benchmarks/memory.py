"""Resident memory for each idle connection: every one has made a call, then nothing happens for a while.

What the process grows by from its first connection, which is gone by then, to the last is divided by their number. What
the kernel holds for a socket doesn't count.
"""

from __future__ import annotations

import resource
import time
from collections.abc import Callable, Iterator, Sequence
from typing import Any

from .participants import Participant
from .processes import BenchmarkError, RunningServer, Workshop

# For what is open besides the connections, here and in a server.
_OTHER_FILES = 100


def measure(
    workshop: Workshop,
    participants: Sequence[Participant],
    counts: Sequence[int],
    quiet: float,
    say: Callable[[str], None],
) -> Iterator[dict[str, Any]]:
    """A run for each participant and number of connections, fewer of them if no more files may be open."""
    for wanted in counts:
        connections = connections_allowed(wanted)
        for participant in participants:
            say(f"{connections:,} idle connections: {participant.name}")
            run = {
                "kind": "idle",
                "subject": participant.name,
                "connections": connections,
                "connections_wanted": wanted,
                "quiet_seconds": quiet,
            }
            try:
                with workshop.start(participant) as running:
                    sizes = measure_running(workshop, running, participant, connections, quiet)
            except BenchmarkError as exc:
                yield run | {"failure": str(exc)}
            else:
                yield run | {f"resident_{state}": size for state, size in sizes.items()}


def measure_running(
    workshop: Workshop, running: RunningServer, participant: Participant, connections: int, quiet: float
) -> dict[str, int]:
    """Resident sizes without connections, when all have made their call, and after ``quiet`` seconds."""
    # What is imported and set up once, with the first call, isn't a connection's.
    with workshop.hold(running, participant, 1):
        pass
    before = running.resident_size()
    with workshop.hold(running, participant, connections):
        in_use = running.resident_size()
        time.sleep(quiet)
        running.check()
        return {"before": before, "in_use": in_use, "quiet": running.resident_size()}


def connections_allowed(wanted: int) -> int:
    """How many of ``wanted`` the limit on open files allows, which is raised for this process and its servers."""
    needed = wanted + _OTHER_FILES
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    if soft == resource.RLIM_INFINITY or soft >= needed:
        return wanted
    allowed = needed if hard == resource.RLIM_INFINITY else min(needed, hard)
    resource.setrlimit(resource.RLIMIT_NOFILE, (allowed, hard))
    return allowed - _OTHER_FILES
