"""How fast clients are: each library's own, with one caller, shared by many callers, and with one that calls ahead.

Those of MessagePack-RPC call a server in C, which outruns them all; those of other protocols call their library's own
server, of which that can't be said. The programs are in ``client_programs/``.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from typing import Any

from .client_programs.measuring import CALLERS
from .participants import PARTICIPANTS, Participant
from .processes import BenchmarkError, Workshop
from .rounds import Plan

#: Whose clients are measured.
SUBJECTS = ("gmprpc", "mprpc", "zerorpc", "grpcio", "rpyc")

MODES = tuple(CALLERS)

# Whose clients know no greenlets: there the mode has as many threads.
_IN_THREADS = ("grpcio", "rpyc")

C_SERVER = Participant("c-server", "c_server.c")


def measure(
    workshop: Workshop,
    subjects: Sequence[str],
    modes: Sequence[str],
    plan: Plan,
    say: Callable[[str], None],
) -> Iterator[dict[str, Any]]:
    """The runs of every client in every mode, in turn, so that what the machine does meanwhile strikes all of them."""
    settled: set[tuple[int, str, str]] = set()
    for number in range(1, plan.rounds + 1):
        first = number % max(len(subjects), 1)  # Nobody always comes first.
        in_turn = [*subjects[first:], *subjects[:first]]
        for cores in plan.cores:
            for mode in modes:
                for subject in in_turn:
                    if (cores, mode, subject) in settled:
                        continue
                    say(f"round {number} of {plan.rounds}: {subject}'s client, {mode}, {cores} cores")
                    participant = PARTICIPANTS[subject]
                    run = {"kind": "client", "subject": subject, "cores": cores, "mode": mode, "callers": CALLERS[mode]}
                    run["callers_are"] = "threads" if subject in _IN_THREADS else "greenlets"
                    run |= {"round": number, **figures(workshop, participant, mode, plan.seconds, cores=cores)}
                    if participant.is_peer and "failure" in run:  # It won't go better in the next round.
                        settled.add((cores, mode, subject))
                    yield run


def server_for(participant: Participant) -> Participant:
    """The server that the client of ``participant`` calls."""
    return C_SERVER if participant.dialect == "msgpack-rpc" else participant


def figures(
    workshop: Workshop, participant: Participant, mode: str, seconds: float, *, cores: int = 1
) -> dict[str, Any]:
    """What the client of ``participant`` finds in ``mode``, or why there is nothing to find, as "failure"."""
    server = server_for(participant)
    try:
        core = workshop.other_core(cores)
        with workshop.start(server) as running:
            found = call(workshop, participant, running.port, mode, seconds, core=core)
            running.check()
    except BenchmarkError as exc:
        return {"failure": str(exc)}
    return {"server": server.name, **found}


def call(
    workshop: Workshop, participant: Participant, port: int, mode: str, seconds: float, *, core: int
) -> dict[str, Any]:
    """What the client of ``participant``, on ``core``, finds at whatever listens at ``port``.

    Raises:
        BenchmarkError: it found nothing.
    """
    warmup = seconds / 4
    module = f"{__package__}.client_programs.{participant.name}_client"
    options = {"--port": port, "--mode": mode, "--warmup": warmup, "--seconds": seconds}
    arguments = [part for option in options.items() for part in option]
    return workshop.run(participant, "-m", module, *arguments, core=core, seconds=warmup + seconds)
