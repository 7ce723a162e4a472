"""Standard input and output as a stream of messages, and out of everybody else's way."""

from __future__ import annotations

import io
import os
import sys

from .exits import Misuse, Unreachable

_STDIN, _STDOUT, _STDERR = 0, 1, 2


def take_standard_streams() -> tuple[int, int]:
    """What to read requests from and to write answers to: descriptors of our own.

    In their old places are nothing to read and standard error, so that neither a method nor a program that it runs
    takes a request away, or gets something between the answers.
    """
    if sys.__stdin__ is None or sys.__stdout__ is None:  # Their numbers may be those of something else by now.
        raise Unreachable("standard input or output is closed: there is nobody to serve.")
    for fd, name in ((_STDIN, "input"), (_STDOUT, "output")):
        if os.isatty(fd):
            raise Misuse(
                f"standard {name} is a terminal: --stdio is for a program that starts this one and speaks "
                "MessagePack-RPC with it. Without it whoever connects is served."
            )
    reading, writing = os.dup(_STDIN), os.dup(_STDOUT)
    nothing = os.open(os.devnull, os.O_RDWR)
    has_stderr = sys.__stderr__ is not None
    if has_stderr and (_is_same(_STDERR, reading) or _is_same(_STDERR, writing)):
        os.dup2(nothing, _STDERR)  # As inetd has it: the log would get between the answers.
    os.dup2(nothing, _STDIN)
    os.dup2(_STDERR if has_stderr else nothing, _STDOUT)
    os.close(nothing)
    if isinstance(sys.stdout, io.TextIOWrapper):
        sys.stdout.reconfigure(line_buffering=True)  # As standard error is.
    return reading, writing


def _is_same(fd: int, other: int) -> bool:
    return os.path.samestat(os.fstat(fd), os.fstat(other))
