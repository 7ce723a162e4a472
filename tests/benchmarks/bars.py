"""The figures to reach, and whether a benchmark's JSON shows them reached.

A bar is for one arrangement: with 1 core server and load generator share it, with 2 they have one each.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

from .results import Ratio, Results, Run, Series, ratio

GMPRPC, MPRPC = "gmprpc", "mprpc"

RATE, P99 = "calls_per_second", "p99_us"


@dataclass(frozen=True)
class Verdict:
    """A bar, and how it was met."""

    what: str
    cores: int
    #: What is asked for, in words.
    bar: str
    #: What was found, in words; or why there is nothing to find.
    figure: str
    #: None where nothing could be compared.
    is_reached: bool | None

    @property
    def words(self) -> str:
        """The verdict in words."""
        return {True: "reached", False: "not reached", None: "not measured"}[self.is_reached]


def verdicts(results: Results) -> Iterator[Verdict]:
    """Every bar for an arrangement that was measured."""
    for cores in (1, 2):
        if results.values("cores", "server", cores=cores):
            yield from _of_servers(results, cores)
        if results.values("cores", "client", cores=cores):
            yield from _of_clients(results, cores)
        if results.runs("growth", cores=cores, axis="blocking") and cores == 1:
            yield _of_blocking_handlers(results)
    if results.runs("idle"):
        yield _of_idle_connections(results)


def best_peer(results: Results, cores: int, shape: str) -> str | None:
    """The fastest of the peers that have answered every call of ``shape``, all of which are used from Python."""
    rates = {name: results.series(RATE, "server", subject=name, cores=cores, shape=shape) for name in results.peers}
    comparable = {name: series.median for name, series in rates.items() if series.is_comparable}
    return max(comparable, key=comparable.__getitem__) if comparable else None


# Shape -> the least ratio to mprpc, on one core and on two.
_AGAINST_MPRPC = {"1x1": (1.0, 1.0), "50x1": (1.0, 1.3), "4x1-64k": (0.95, 1.15)}
# Where mprpc loses calls, shape -> the least ratio to the fastest peer that doesn't.
_AGAINST_BEST = {"1x64": (5.5, 2.5), "50x16": (4.5, 3.0)}


def _of_servers(results: Results, cores: int) -> Iterator[Verdict]:
    def series(figure: str, subject: str, shape: str) -> Series:
        return results.series(figure, "server", subject=subject, cores=cores, shape=shape)

    for shape in results.values("shape", "server", cores=cores):
        if shape in _AGAINST_MPRPC:
            ours, theirs = series(RATE, GMPRPC, shape), series(RATE, MPRPC, shape)
            yield _at_least(shape, cores, _AGAINST_MPRPC[shape][cores - 1], MPRPC, ours, theirs)
        if shape in _AGAINST_BEST:
            best = best_peer(results, cores, shape)
            whom = f"the best Python peer ({best})" if best else "the best Python peer"
            theirs = series(RATE, best, shape) if best else Series({}, "no peer answers every call")
            yield _at_least(shape, cores, _AGAINST_BEST[shape][cores - 1], whom, series(RATE, GMPRPC, shape), theirs)
        if cores == 1 and shape == "1x64":
            ours, theirs = series(RATE, GMPRPC, shape), series(RATE, MPRPC, "1x1")
            yield _at_least(shape, cores, 5.5, "mprpc's own 1x1", ours, theirs)
        if cores == 1 and shape == "50x1":
            ours, theirs = series(P99, GMPRPC, shape), series(P99, MPRPC, shape)
            yield _at_most(f"{shape}, p99", cores, 0.1, MPRPC, ours, theirs)


def _of_clients(results: Results, cores: int) -> Iterator[Verdict]:
    def series(subject: str, mode: str) -> Series:
        return results.series(RATE, "client", subject=subject, cores=cores, mode=mode)

    least, whom = (1.1, 1.0)[cores - 1], "mprpc's client"
    yield _at_least(
        "blocking client, 1 caller", cores, least, whom, series(GMPRPC, "blocking"), series(MPRPC, "blocking")
    )
    if cores == 1:
        whom = "mprpc's one-caller rate"
        ours, theirs = series(GMPRPC, "greenlets"), series(MPRPC, "blocking")
        yield _at_least("100 greenlets on one client connection", cores, 3.0, whom, ours, theirs)


def _of_blocking_handlers(results: Results) -> Verdict:
    def series(subject: str) -> Series:
        return results.series(RATE, "growth", subject=subject, cores=1, axis="blocking", value=50 * 16)

    ours, theirs = series(GMPRPC), series("bare-sleep")
    return _at_least("handlers that block 1 ms, 50x16", 1, 0.7, "as many bare greenlets that sleep", ours, theirs)


_IDLE_CONNECTIONS = 10_000
_IDLE_KIB = 16.0


def kib_for_each(run: Run, state: str = "quiet") -> float:
    """Resident KiB for each connection of a run with idle ones."""
    grown: int = run[f"resident_{state}"] - run["resident_before"]
    return grown / 1024 / float(run["connections"])


def _of_idle_connections(results: Results) -> Verdict:
    what = f"idle connection, of {_IDLE_CONNECTIONS:,}"
    bar = f"at most {_IDLE_KIB:g} KiB"
    conditions: dict[str, Any] = {"subject": GMPRPC, "connections": _IDLE_CONNECTIONS}
    series = results.series(kib_for_each, "idle", **conditions)
    if not series.is_comparable:
        return Verdict(what, 1, bar, series.fault or "not so many connections were measured", None)
    return Verdict(what, 1, bar, f"{series.median:.1f} KiB", series.median <= _IDLE_KIB)


def _at_least(what: str, cores: int, least: float, whom: str, ours: Series, theirs: Series) -> Verdict:
    found = ratio(ours, theirs)
    bar = f"at least {least:g} x {whom}"
    return Verdict(what, cores, bar, _figure(found, ours, theirs), None if found is None else found.value >= least)


def _at_most(what: str, cores: int, most: float, whom: str, ours: Series, theirs: Series) -> Verdict:
    found = ratio(ours, theirs)
    bar = f"at most {most:g} x {whom}"
    return Verdict(what, cores, bar, _figure(found, ours, theirs), None if found is None else found.value <= most)


def _figure(found: Ratio | None, ours: Series, theirs: Series) -> str:
    if found is not None:
        return f"{found.value:.2f} ({found.low:.2f}-{found.high:.2f})"
    return ours.fault or theirs.fault or "one of the two wasn't measured"
