"""How the same work grows dearer: with connections, with methods, with the payload, and with handlers that block.

Most have a server of their own here, which is told how many methods there are, how large a message may be, and for how
long a handler blocks; floor, which can't be told anything, is the one of the other measurements.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

from .memory import connections_allowed
from .participants import FLOOR, GMPRPC, PARTICIPANTS
from .processes import BenchmarkError, Shape, Workshop
from .rounds import Plan

AIO, MPRPC = "aio-msgpack-rpc", "mprpc"

#: No server, but as many greenlets as there are calls in flight, which sleep for as long as the handlers block.
BARE_SLEEP = "bare-sleep"

SUBJECTS = (GMPRPC.name, AIO, MPRPC, FLOOR.name, BARE_SLEEP)

KIB, MIB = 1024, 1024 * 1024

# gmprpc's own limit is 1 MiB. For payloads of 10 MiB it has to be raised, and then it is the same for all payloads.
_MAX_MESSAGE_SIZE = MIB
_RAISED_MESSAGE_SIZE = 16 * MIB

# What floor.py reads at once.
_FLOOR_SIZE = 256 * KIB

_GROWTH_SERVERS = {
    GMPRPC.name: "gmprpc_growth_server.py",
    AIO: "aio_msgpack_rpc_growth_server.py",
    MPRPC: "mprpc_growth_server.py",
}


@dataclass(frozen=True)
class Axis:
    """What grows, through which values, and under which load."""

    name: str
    shapes: Mapping[int, Shape]
    subjects: Sequence[str]
    #: Those who are left out, with the reason.
    left_out: Mapping[str, str] = field(default_factory=dict)
    max_message_size: int = _MAX_MESSAGE_SIZE
    #: For how many milliseconds a handler blocks.
    milliseconds: int = 0

    def shape(self, subject: str, value: int) -> Shape:
        """The load on ``subject``: mprpc gets as many calls in flight, but each on a connection of its own."""
        shape = self.shapes[value]
        if subject == MPRPC and subject in self.subjects:
            return replace(shape, connections=shape.connections * shape.in_flight, in_flight=1)
        return shape

    def why_not(self, subject: str, value: int) -> str | None:
        """Why ``subject`` can't be measured at ``value``; None if it can."""
        if subject == FLOOR.name and self.shapes[value].payload_size > _FLOOR_SIZE:
            return "it copies what it can't read and send at once over and over, and so is no floor there"
        return self.left_out.get(subject)


AXES = {
    axis.name: axis
    for axis in (
        Axis(
            "connections",
            {connections: Shape(connections, 1) for connections in (1, 10, 100, 1000)},
            (GMPRPC.name, AIO, MPRPC, FLOOR.name),
        ),
        Axis(
            "methods",
            {methods: Shape(1, 64) for methods in (1, 10, 100, 1000)},
            (GMPRPC.name, AIO),
            {MPRPC: "it answers one message per read, and so loses calls at 1x64"},
        ),
        Axis(
            "payload",
            {size: Shape(1, 1, size) for size in (10, 100, KIB, 10 * KIB, 100 * KIB, MIB, 10 * MIB)},
            (GMPRPC.name, AIO, MPRPC, FLOOR.name),
            max_message_size=_RAISED_MESSAGE_SIZE,
        ),
        Axis(
            "blocking",
            {1: Shape(1, 1), 10: Shape(10, 1), 100: Shape(100, 1), 800: Shape(50, 16)},
            (GMPRPC.name, AIO, MPRPC, BARE_SLEEP),
            milliseconds=1,
        ),
    )
}


def measure(
    workshop: Workshop,
    subjects: Sequence[str],
    axes: Sequence[Axis],
    plan: Plan,
    say: Callable[[str], None],
) -> Iterator[dict[str, Any]]:
    """The runs of everybody at every value of every axis, in turn, for what the machine does meanwhile strikes all."""
    settled: set[tuple[int, str, int, str]] = set()
    for number in range(1, plan.rounds + 1):
        first = number % max(len(subjects), 1)  # Nobody always comes first.
        in_turn = [*subjects[first:], *subjects[:first]]
        for cores, axis, subject, value in _all(plan.cores, axes, in_turn):
            if (cores, axis.name, value, subject) in settled:
                continue
            say(f"round {number} of {plan.rounds}: {axis.name} {value}, {subject}, {cores} cores")
            run = {"kind": "growth", "subject": subject, "cores": cores, "axis": axis.name, "value": value}
            run |= {"round": number, **figures(workshop, axis, subject, value, plan.seconds, cores=cores)}
            if subject != GMPRPC.name and "failure" in run:  # It won't go better in the next round.
                settled.add((cores, axis.name, value, subject))
            yield run


def _all(cores: Sequence[int], axes: Sequence[Axis], subjects: Sequence[str]) -> Iterator[tuple[int, Axis, str, int]]:
    for count in cores:
        for axis in axes:
            for value in axis.shapes:
                for subject in subjects:
                    if subject in axis.subjects or subject in axis.left_out:
                        yield count, axis, subject, value


def figures(
    workshop: Workshop, axis: Axis, subject: str, value: int, seconds: float, *, cores: int = 1
) -> dict[str, Any]:
    """What was found of ``subject`` at ``value``, or why there is nothing to find, as "failure"."""
    shape = axis.shape(subject, value)
    conditions = {
        "shape": shape.name,
        "connections": shape.connections,
        "in_flight": shape.in_flight,
        "payload_bytes": shape.payload_size,
        "max_message_size": axis.max_message_size,
    }
    try:
        if reason := axis.why_not(subject, value):
            raise BenchmarkError(f"not supported: {reason}")
        if connections_allowed(shape.connections) < shape.connections:
            raise BenchmarkError(f"{shape.connections} connections can't be had: see `ulimit -n`")
        if subject == BARE_SLEEP:
            found = _sleep(workshop, value, seconds)
        elif subject in _GROWTH_SERVERS:
            participant = replace(PARTICIPANTS[subject], server=_GROWTH_SERVERS[subject])
            methods = value if axis.name == "methods" else 1
            arguments = [str(methods), str(axis.max_message_size), str(axis.milliseconds)]
            found = workshop.measure(participant, shape, seconds, cores=cores, arguments=arguments)
        else:
            found = workshop.measure(PARTICIPANTS[subject], shape, seconds, cores=cores)
    except BenchmarkError as exc:
        return {**conditions, "failure": str(exc)}
    return {**conditions, **found}


def _sleep(workshop: Workshop, greenlets: int, seconds: float) -> dict[str, Any]:
    """The sleeps of bare greenlets, on the core of the servers, which they have for themselves."""
    warmup = seconds / 4
    options = {"--greenlets": greenlets, "--warmup": warmup, "--seconds": seconds}
    arguments = [part for option in options.items() for part in option]
    module = f"{__package__}.bare_sleep"
    return workshop.run(GMPRPC, "-m", module, *arguments, core=workshop.server_core, seconds=warmup + seconds)
