"""How an operator sees workers of gunicorn as one service: at one place over HTTP, where each answers for all.

The process from which they are forked off opens that place, and makes the directory in which they have their metrics:
both before anything imports prometheus_client, which decides then how it counts.
"""

from __future__ import annotations

import atexit
import os
import shutil
import socket
import tempfile
from collections.abc import Callable
from contextlib import suppress
from importlib.util import find_spec
from typing import Any, Final

from .streams import RawSocket
from .transport import FD_PREFIX, UNIX_PREFIX, file_identity, makes_file, open_listener, parse_address

#: Names the place, in the environment, as ``gmprpc serve --metrics-bind`` does.
BIND: Final = "GMPRPC_METRICS_BIND"
# Where prometheus_client's processes have their metrics; see `sharedmetrics`, which can't be imported yet.
_DIRECTORY = "PROMETHEUS_MULTIPROC_DIR"

# The place, once it has been opened, and the directory, if it was made here.
_listener: Any = None
_made_directory: str | None = None


def prepare(bind: str) -> None:
    """Open the place ``bind``, and make the directory; in the process from which workers are forked off.

    Once is enough: then it does nothing.

    Raises:
        ModuleNotFoundError: the extra ``metrics`` isn't installed.
        OSError, ValueError: the place can't be had, or is none.
    """
    global _listener
    if _listener is not None:
        return
    if find_spec("prometheus_client") is None:
        raise ModuleNotFoundError(f"{BIND} needs prometheus-client: pip install 'gmprpc[metrics]'")
    _listener = _listen(bind)
    _prepare_directory()


def prepare_as_told() -> None:
    """Prepare if the environment names a place.

    Raises:
        RuntimeError: that has failed; the message is for a person.
    """
    if not (bind := os.environ.get(BIND)):
        return
    try:
        prepare(bind)
    except ModuleNotFoundError as exc:
        raise RuntimeError(str(exc)) from exc
    except (OSError, ValueError) as exc:
        raise RuntimeError(f"can't listen on {bind}: {getattr(exc, 'strerror', None) or exc} ({BIND})") from exc


def listener() -> Any:
    """The place that has been opened, a listening socket; None if the environment names none."""
    return _listener


def place() -> Any:
    """Where that is: ``(host, port, ...)`` or ``"unix:/path"``."""
    name = _listener.getsockname()
    return UNIX_PREFIX + name if isinstance(name, str) else name


def hand_over(uid: int, gid: int) -> None:
    """Let a worker have its metrics in the directory that will run as another user; called while it still may."""
    if _made_directory is None or (uid, gid) == (os.geteuid(), os.getegid()):
        return
    # A worker before this one, which has had the directory, may have put a link to something else in its place.
    directory = os.open(_made_directory, os.O_RDONLY | os.O_DIRECTORY | os.O_NOFOLLOW)
    try:
        os.fchown(directory, uid, gid)
    finally:
        os.close(directory)


def _listen(bind: str) -> Any:
    """A listening socket that belongs to no hub: there will be one in each worker."""
    replaces = "GUNICORN_PID" in os.environ  # The master to which somebody has sent SIGUSR2, and which still listens.
    if not makes_file(bind) and not bind.startswith(FD_PREFIX):
        address = parse_address(bind)
        family = socket.AF_INET6 if ":" in address[0] else socket.AF_INET
        return socket.create_server(address, family=family, reuse_port=True)
    path = bind.removeprefix(UNIX_PREFIX)
    if makes_file(bind) and replaces:
        with suppress(FileNotFoundError):
            os.unlink(path)
    listener = RawSocket(fileno=open_listener(bind).detach())
    if makes_file(bind):
        _at_exit(_unlink, path, file_identity(path))
    return listener


def _unlink(path: str, identity: tuple[int, int] | None) -> None:
    if file_identity(path) == identity:
        with suppress(OSError):
            os.unlink(path)


def _prepare_directory() -> None:
    global _made_directory
    if directory := os.environ.get(_DIRECTORY):
        os.makedirs(directory, exist_ok=True)
        return
    directory = os.environ[_DIRECTORY] = _made_directory = tempfile.mkdtemp(prefix="gmprpc-metrics-")
    _at_exit(shutil.rmtree, directory, ignore_errors=True)


def _at_exit(function: Callable[..., Any], *args: Any, **kwargs: Any) -> None:
    """Call ``function`` at the end of this process, and not of those that are forked off."""
    process = os.getpid()

    def call() -> None:
        if os.getpid() == process:
            function(*args, **kwargs)

    atexit.register(call)
