"""A stream over two descriptors, as a process has them for its standard input and output; it knows no protocol."""

from __future__ import annotations

import os
import stat
from collections.abc import Callable
from contextlib import suppress
from typing import Any

from gevent import monkey

from .streams import PlainStream, RawSocket, Stream, farewell_time, send_all

# How much is read at once: what a pipe of Linux holds, and a message of 64 KiB.
_READ_SIZE = 64 * 1024

#: Closes at once. (What gevent puts in the place of `os.close` does it when the loop has next woken up, so that nobody
#: is told of the end until something else happens.)
close_descriptor: Callable[[int], None] = monkey.get_original("os", "close")


class PipeStream:
    """A descriptor to read from and one to write to: pipes, sockets or files.

    (Not a terminal, which is no stream of bytes: it echoes, and gives a line at a time.)
    """

    is_amid_record = False

    def __init__(self, reading: int, writing: int) -> None:
        """Take both descriptors over; they may be the same one.

        Until they are closed by :meth:`close` or :meth:`finish` they don't block, neither here nor for another process
        that has them too.
        """
        self._reading, self._writing = reading, writing
        # Others may have them too, a shell perhaps, and expect to find them as they were. The first look is at both:
        # they can be two numbers for the same thing.
        self._blocking = [fd for fd in {reading, writing} if os.get_blocking(fd)]
        for fd in self._blocking:
            os.set_blocking(fd, False)

    def fileno(self) -> int:
        return self._reading

    def write_fileno(self) -> int:
        return self._writing

    def recv(self) -> bytes:
        return os.read(self._reading, _READ_SIZE)

    def send(self, data: Any, /) -> int:
        return os.write(self._writing, data)

    def finish(self, data: bytes, *, linger: bool) -> None:
        # There is nothing to linger for: what one of the two still holds isn't lost when the other one is closed.
        try:
            with suppress(OSError), farewell_time():
                send_all(self, data)
        finally:
            self.close()

    def close(self) -> None:
        for fd in self._blocking:
            with suppress(OSError):
                os.set_blocking(fd, True)
        self.abandon()

    def abandon(self) -> None:
        self._blocking.clear()
        descriptors = {self._reading, self._writing} - {-1}
        self._reading = self._writing = -1
        for fd in descriptors:
            close_descriptor(fd)


def stream_over(reading: int, writing: int) -> Stream:
    """A stream over two descriptors, which are taken over; over the socket, where both are the same one.

    A socket can tell the peer that this is the end although another process has it too.
    """
    status = os.fstat(reading)
    if stat.S_ISSOCK(status.st_mode) and os.path.samestat(status, os.fstat(writing)):
        if reading != writing:
            close_descriptor(writing)
        return PlainStream(RawSocket(fileno=reading))
    return PipeStream(reading, writing)
