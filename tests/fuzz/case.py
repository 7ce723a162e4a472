"""What is given to a target, and what comes of it: the input, the counts, the finding."""

from __future__ import annotations

import itertools
import time
from collections.abc import Callable, Iterable
from dataclasses import dataclass, fields
from pathlib import Path
from random import Random
from typing import Self

_CORPUS = Path(__file__).parent / "corpus"


class Finding(Exception):
    """A property that the target promises doesn't hold."""


@dataclass(frozen=True, slots=True)
class Case:
    """One input: the bytes of a stream, and what the target is to choose for them.

    As bytes the choices stand first, one for each field and two for ``cuts``, so that a fuzzer can change them, too.
    """

    #: Which set of options, and which limits; a target takes them modulo what it has.
    options: int
    limits: int
    #: Seeds the choice of the splits.
    cuts: int
    stream: bytes

    _CHOICES = 4

    @classmethod
    def of(cls, data: bytes) -> Self:
        """The input that ``data`` stands for; all bytes stand for one."""
        choices = data[: cls._CHOICES].ljust(cls._CHOICES, b"\0")
        return cls(choices[0], choices[1], int.from_bytes(choices[2:], "big"), data[cls._CHOICES :])

    @classmethod
    def chosen(cls, random: Random, stream: bytes) -> Self:
        """An input of ``stream`` with choices by ``random``."""
        return cls(random.getrandbits(8), random.getrandbits(8), random.getrandbits(16), stream)

    def __bytes__(self) -> bytes:
        return bytes([self.options, self.limits]) + self.cuts.to_bytes(2, "big") + self.stream

    def pieces(self, random: Random, max_cuts: int = 12) -> list[bytes]:
        """The stream in pieces, none of them empty, cut where ``random`` says."""
        size = len(self.stream)
        cuts = {random.randrange(1, size) for _ in range(random.randint(1, max_cuts))} if size > 1 else ()
        return self.cut_at(cuts)

    def cut_at(self, cuts: Iterable[int]) -> list[bytes]:
        """The stream cut at each of ``cuts``."""
        ends = [0, *sorted(cuts), len(self.stream)]
        return [self.stream[start:end] for start, end in itertools.pairwise(ends)]


@dataclass
class Tally:
    """How much has been done, over any number of inputs."""

    inputs: int = 0
    splits: int = 0
    messages: int = 0
    protocol_errors: int = 0
    findings: int = 0

    def __str__(self) -> str:
        return ", ".join(f"{getattr(self, field.name):,} {field.name.replace('_', ' ')}" for field in fields(self))


#: A target: raises what is wrong with one input, a Finding for what it looks for.
Check = Callable[[Case, Tally], None]


def corpus() -> dict[str, bytes]:
    """The streams that are kept, by the names of their files."""
    return {path.name: path.read_bytes() for path in sorted(_CORPUS.iterdir())}


def minimised(case: Case, is_finding: Callable[[Case], bool], seconds: float = 30.0) -> Case:
    """A shorter stream, with the same choices, that is a finding too; looks for it for so many ``seconds`` at most."""
    ends_at = time.monotonic() + seconds
    size = len(case.stream)
    while size:
        start, is_shorter = 0, False
        while start < len(case.stream):
            if time.monotonic() > ends_at:
                return case
            shorter = Case(case.options, case.limits, case.cuts, case.stream[:start] + case.stream[start + size :])
            if is_finding(shorter):
                case, is_shorter = shorter, True
            else:
                start += size
        if not is_shorter or size > 1:
            size //= 2
    return case
