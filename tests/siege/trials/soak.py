"""The soak: honest, hostile and abandoned connections for long, and memory that doesn't grow."""

from __future__ import annotations

import random
from collections.abc import Iterator
from contextlib import ExitStack
from itertools import pairwise
from typing import Any

import gevent
from gevent.pool import Pool

from tests.siege.attacks import HOSTILE, Attack, abandon_calls
from tests.siege.field import QUIET, Client, Field, Target
from tests.siege.report import MIB, Row, at_most, exactly, reported

_QUARTERS = 4
_CLIENTS = 3


def soak(field: Field) -> Iterator[Row]:
    """1,000,000 calls with 5,000 hostile and 5,000 abandoned connections among them, in four quarters."""
    calls = field.choose(1_000_000, 40_000) // _QUARTERS
    strangers = field.choose(5000, 400) // _QUARTERS
    source = random.Random(1)
    with field.besieged() as (target, bystander):
        before = target.peak_census()
        start_size = target.resident_size()
        target.reset_peak()
        sizes: list[int] = []
        blocks: list[int] = []
        reports: list[dict[str, Any]] = []
        failures: list[str] = []
        for quarter in range(_QUARTERS):
            with ExitStack() as stack:
                clients = [
                    stack.enter_context(
                        Client(
                            target, "--calls", calls // _CLIENTS, "--round", 50, "--seed", quarter * _CLIENTS + number
                        )
                    )
                    for number in range(_CLIENTS)
                ]
                attacks: list[Attack] = [abandon_calls] * strangers
                attacks += [HOSTILE[number % len(HOSTILE)] for number in range(strangers)]
                source.shuffle(attacks)
                besiegers = Pool(8)
                laying_siege = gevent.spawn(_lay_siege, besiegers, target, attacks, source, failures)
                reports += [client.report() for client in clients]
                laying_siege.get()
            # Under the same conditions each time: nobody is there but the bystander, and nothing was going on lately.
            target.wait_alone()
            gevent.sleep(QUIET)
            blocks.append(target.blocks())
            kept = target.resident_size()
            # How much of what is free the allocator keeps is a matter of what happens to lie behind it.
            target.ask("trim")
            sizes.append(target.resident_size())
            what = f"resident at the end of quarter {quarter + 1} ({kept / MIB:.1f} MiB with what the allocator keeps)"
            yield reported(what, sizes[-1], "MiB", blocks=blocks[-1], with_kept=kept)
        total = sum(report["calls"] for report in reports)
        lost, wrong = (sum(report[what] for report in reports) for what in ("lost", "wrong"))
        first_fault = next((report["first_fault"] for report in reports if report["first_fault"]), None)
        yield exactly(f"of {total:,} calls: lost or wrong", lost + wrong, 0, first_fault=first_fault)
        yield reported("the most that was resident at any moment", target.peak_size(), "MiB")
        growth = max(after - earlier for earlier, after in pairwise(sizes))
        yield at_most("growth from one quarter to the next, at most", growth, MIB, "KiB", sizes=sizes, start=start_size)
        yield reported(
            "growth in blocks of memory that Python's objects take, from the first quarter's end to the last's",
            blocks[-1] - blocks[0],
        )
        each = f"{_QUARTERS * strangers:,}"
        what = f"of {each} hostile connections and {each} abandoned ones: not dealt with as expected"
        yield exactly(what, len(failures), 0, first=failures[:5])
        yield target.recovery_row("descriptors, greenlets and threads as before after", before)
        # No bar for its p99: here honest clients, on the bystander's core, take all that both cores can give.
        row = bystander.row(p99_bar=None)
        yield row
        counted = sum(report["notifications"] for report in [*reports, row.details])
        yield exactly("notifications that were not carried out", counted - target.counted(), 0)
        yield from target.complaints()


def _lay_siege(
    besiegers: Pool, target: Target, attacks: list[Attack], source: random.Random, failures: list[str]
) -> None:
    def attack(name: str, once: Attack) -> None:
        try:
            with gevent.Timeout(20):
                once(target, source)
        except (Exception, gevent.Timeout) as exc:
            failures.append(f"{name}: {type(exc).__name__}: {exc}")

    for once in attacks:
        besiegers.spawn(attack, once.__name__, once)
    besiegers.join()
