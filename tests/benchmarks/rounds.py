"""Every server in every shape of load, on one core shared with the load generator and on a core of its own."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

from .participants import Participant
from .processes import BenchmarkError, Shape, Workshop

SHAPES = {
    shape.name: shape
    for shape in (
        Shape(1, 1),
        Shape(1, 64),
        Shape(50, 1),
        Shape(50, 16),
        Shape(4, 1, payload_size=64 * 1024),
    )
}


@dataclass(frozen=True)
class Plan:
    """How much is measured, and how."""

    rounds: int = 7
    #: Of each measurement.
    seconds: float = 0.7
    #: The arrangements: 1, server and load generator share a core; 2, they have one each.
    cores: tuple[int, ...] = (1, 2)
    #: Whether processes are measured that have never had a large message.
    is_fresh: bool = False


def measure(
    workshop: Workshop,
    participants: Sequence[Participant],
    shapes: Sequence[Shape],
    plan: Plan,
    say: Callable[[str], None],
) -> Iterator[dict[str, Any]]:
    """The runs of all participants, in turn, so that what the machine does meanwhile strikes all of them."""
    settled: set[tuple[int, Shape, Participant]] = set()
    for number in range(1, plan.rounds + 1):
        first = number % len(participants)  # Nobody always comes first.
        in_turn = [*participants[first:], *participants[:first]]
        for cores in plan.cores:
            for shape in shapes:
                for participant in in_turn:
                    if (cores, shape, participant) in settled:
                        continue
                    say(f"round {number} of {plan.rounds}: {shape.name} {participant.name}, {cores} cores")
                    run = _run(workshop, participant, shape, cores, plan)
                    if not _is_worth_repeating(run, participant):
                        settled.add((cores, shape, participant))
                    yield run | {"round": number}


def _run(workshop: Workshop, participant: Participant, shape: Shape, cores: int, plan: Plan) -> dict[str, Any]:
    run = {
        "kind": "server",
        "subject": participant.name,
        "cores": cores,
        "shape": shape.name,
        "connections": shape.connections,
        "in_flight": shape.in_flight,
        "payload_bytes": shape.payload_size,
    }
    try:
        return run | workshop.measure(participant, shape, plan.seconds, cores=cores, fresh=plan.is_fresh)
    except BenchmarkError as exc:
        return run | {"failure": str(exc)}


def _is_worth_repeating(run: dict[str, Any], participant: Participant) -> bool:
    """Whether another round tells more: a peer that fails, or loses calls, costs seconds and isn't compared anyhow."""
    is_at_fault = "failure" in run or run["unanswered"] or run["lost_connections"]
    return not (participant.is_peer and is_at_fault)
