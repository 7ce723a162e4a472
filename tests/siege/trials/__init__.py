"""The trials, by name. Each is a generator of rows, given the field on which it takes place."""

from __future__ import annotations

from collections.abc import Callable, Iterator

from tests.siege.field import Field
from tests.siege.report import Row

from . import endings, limits, memory, soak

Trial = Callable[[Field], Iterator[Row]]

TRIALS: dict[str, Trial] = {
    "unfinished": memory.unfinished,
    "parts": memory.parts,
    "gone": memory.gone,
    "unread": memory.unread,
    "flood": memory.flood,
    "zeros": limits.zeros,
    "half-close": endings.half_close,
    "signals": endings.signals,
    "files": limits.files,
    "churn": endings.churn,
    "soak": soak.soak,
    "idle": memory.idle,
    "tls": limits.tls,
    "names": limits.names,
    "killed": endings.killed,
    "resets": endings.resets,
}
