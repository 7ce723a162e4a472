"""Which of the workers that one process starts have begun to serve, told in memory that all of them share.

An old worker that is to be replaced can stay until a new one serves: loading an application may take seconds.
"""

from __future__ import annotations

import struct
from collections.abc import Collection
from mmap import mmap

# The age of the youngest worker, then a byte for each of so many ages, the latest ones. Nobody has as many workers.
_YOUNGEST = struct.Struct("Q")
_SIZE = 4096

_BOOTING, _SETTLED = 0, 1


class Succession:
    """The workers of one master, each known by its age: a number, the higher the younger it is.

    Made by the master, before it forks. Each byte has one writer at a time.
    """

    def __init__(self) -> None:
        self._memory = mmap(-1, _YOUNGEST.size + _SIZE)

    def announce(self, age: int) -> None:
        """There will be a worker of ``age``; called by the master."""
        self._memory[self._place_of(age)] = _BOOTING
        _YOUNGEST.pack_into(self._memory, 0, age)

    def settle(self, age: int) -> None:
        """The worker of ``age`` serves, or never will; called by that worker."""
        self._memory[self._place_of(age)] = _SETTLED

    def heirs(self, age: int, number: int) -> list[int]:
        """Those among the ``number`` youngest workers that are younger than ``age`` and haven't settled yet."""
        (youngest,) = _YOUNGEST.unpack_from(self._memory)
        return [
            other
            for other in range(max(age, youngest - number) + 1, youngest + 1)
            if self._memory[self._place_of(other)] == _BOOTING
        ]

    def has_settled(self, ages: Collection[int]) -> bool:
        """Whether one of ``ages`` has."""
        return any(self._memory[self._place_of(age)] == _SETTLED for age in ages)

    def _place_of(self, age: int) -> int:
        return _YOUNGEST.size + age % _SIZE
